"""Give an operation a custom derivative rule."""

from __future__ import annotations

from typing import Any

import jax

from tests.random_programs.program import Run


def with_other_vjp(run: Run) -> Run:
    """Return the same function with a derivative rule that is not its derivative."""

    @jax.custom_vjp
    def other(*inputs: Any) -> Any:
        return run(*inputs)

    def backward(pull_back: Any, dy: Any) -> Any:
        return tuple(x if x.dtype == jax.dtypes.float0 else 0.7 * x for x in pull_back(dy))

    other.defvjp(lambda *inputs: jax.vjp(run, *inputs), backward)
    return other


def with_other_jvp(run: Run) -> Run:
    @jax.custom_jvp
    def other(*inputs: Any) -> Any:
        return run(*inputs)

    @other.defjvp
    def _(inputs: Any, tangents: Any) -> Any:
        y, dy = jax.jvp(run, inputs, tangents)
        return y, 1.3 * dy

    return other
