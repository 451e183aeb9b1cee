"""Choose by platform what is run, where CPUs and accelerators are fast in different ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

from psclip_optax.thresholds import concrete

_Result = TypeVar("_Result")


def by_platform(
    *arguments: Any, cpu: Callable[..., _Result], elsewhere: Callable[..., _Result]
) -> _Result:
    """Call one of two functions with the same results, for the platform that is lowered for."""
    first = jax.tree.leaves(arguments)[0]
    if concrete(first.ravel()[:0]) is None:
        return lax.platform_dependent(*arguments, cpu=cpu, default=elsewhere)
    # Outside of jit a choice that is traced would be compiled, anew in each call.
    return (cpu if jax.default_backend() == "cpu" else elsewhere)(*arguments)
