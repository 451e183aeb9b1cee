"""Keep dynamic slices within bounds where JAX's `vmap` does not.

Before JAX 0.9, `vmap` turns a `dynamic_slice` into a gather that promises indices in bounds. Its
transpose drops indices out of bounds, but the slice itself clamps them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax.engine.analysis.equations import with_each_equation


def slices_in_bounds(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Clamp the starts of all dynamic slices, if this JAX needs it."""
    if not _vmap_promises():
        return closed
    return closed.replace(jaxpr=with_each_equation(closed.jaxpr, _clamped))


@functools.cache
def _vmap_promises() -> bool:
    def rows(table: jax.Array, starts: jax.Array) -> jax.Array:
        return jax.vmap(lambda start: lax.dynamic_slice(table, (start,), (1,)))(starts)

    shapes = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    modes = [eqn.params.get("mode") for eqn in jax.make_jaxpr(rows)(*shapes).jaxpr.eqns]
    return lax.GatherScatterMode.PROMISE_IN_BOUNDS in modes


def _clamped(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Replace a `dynamic_slice` by a call that clamps its start indices first."""
    if eqn.primitive.name != "dynamic_slice":
        return eqn
    sizes = eqn.params["slice_sizes"]

    @jax.jit
    def held_inside(operand: jax.Array, *starts: jax.Array) -> jax.Array:
        lasts = [full - size for full, size in zip(operand.shape, sizes, strict=True)]
        inside = [_clamp(*both) for both in zip(starts, lasts, strict=True)]
        return lax.dynamic_slice(operand, inside, sizes)

    (call,) = jax.make_jaxpr(held_inside)(*(atom.aval for atom in eqn.invars)).jaxpr.eqns
    return call.replace(invars=eqn.invars, outvars=eqn.outvars)


def _clamp(start: jax.Array, last: int) -> Any:
    last = min(last, int(jnp.iinfo(start.dtype).max))  # for narrow integers
    return jnp.clip(start, 0, last)
