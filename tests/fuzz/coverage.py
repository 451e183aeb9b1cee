"""Print which differentiable primitives occur in drawn programs: python -m tests.fuzz.coverage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jax.interpreters import ad
from rich.console import Console
from rich.table import Table

from tests.fuzz.programs import draw_program, primitives_of
from tests.numerics import enable_x64

MODULES = (jnp, jnp.linalg, jnp.fft, jax.nn, jsp.special, jsp.linalg, jsp.signal, lax, lax.linalg)

# Primitives that no program has, and why.
OF_A_MESH = (
    "speaks to the devices of a mesh: tests/test_many_devices.py; vmap's own axes leave none"
)
LEFT_OUT = {
    **dict.fromkeys(("all_gather", "all_to_all", "ppermute", "ragged_all_to_all"), OF_A_MESH),
    "dce_sink": "JAX 0.10 has no gradient of a loss with one",
    "stage": "of Python's numbers outside of any trace",
}


def _names_of_lax() -> set[str]:
    """Return the names of lax's public primitives that have a derivative."""
    public = [getattr(lax, name) for name in dir(lax) if name.endswith("_p")]
    return {primitive.name for primitive in public if primitive in ad.primitive_jvps}


def _traced(function: Callable[..., Any], operands: tuple[Any, ...]) -> set[str]:
    try:
        return primitives_of(jax.make_jaxpr(function)(*operands))
    except Exception:
        return set()


def _public_functions() -> Iterable[Callable[..., Any]]:
    for module in MODULES:
        for name in dir(module):
            value = getattr(module, name)
            if not name.startswith("_") and callable(value) and not inspect.isclass(value):
                yield value


def _names_of_libraries() -> set[str]:
    """Return the primitives of public functions called with one to three square matrices."""
    x = jnp.eye(3) + 0.5
    calls = [(x,), (x, x), (x, x, x)]
    found: set[str] = set()
    for function in _public_functions():
        for operands in calls:
            found |= _traced(function, operands)
    with_derivative = {primitive.name for primitive in ad.primitive_jvps}
    return found & with_derivative


def differentiable_primitives() -> set[str]:
    with enable_x64(True):
        return _names_of_lax() | _names_of_libraries()


def met(seeds: Iterable[int]) -> set[str]:
    """Return the primitives in the losses of these seeds' programs."""
    return set().union(*(primitives_of(draw_program(seed).jaxpr()) for seed in seeds))


def main() -> None:
    every, found = differentiable_primitives(), met(range(400))
    table = Table("primitive", "met", "why not")
    for name in sorted(every):
        table.add_row(name, "yes" if name in found else "no", LEFT_OUT.get(name, ""))
    console = Console()
    console.print(table)
    share = len(every & found) / len(every)
    console.print(f"{len(every & found)} of {len(every)}, {share:.1%}")


if __name__ == "__main__":
    main()
