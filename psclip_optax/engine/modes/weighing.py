"""Compute the weights of a sum from norms, and exclude samples that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax import clipping
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Samples
from psclip_optax.thresholds import concrete

_Values = TypeVar("_Values")


def weigh(
    problem: Problem, samples: Samples, losses: jax.Array, squares: jax.Array
) -> tuple[jax.Array, ...]:
    """Return norms, scales (0 for samples left out), and which samples are finite and kept."""
    # The array has no axis of samples if the loss does not depend on any parameter.
    norms = clipping.norms_of(jnp.broadcast_to(squares, samples.taus.shape))
    scales = told_scales(norms, samples.taus)
    finite = problem.groups.in_all(~jnp.isnan(scales)) & jnp.isfinite(losses)
    kept = samples.counts & finite if problem.on_nonfinite == "drop" else samples.counts
    return norms, jnp.where(clipping.beside(kept, scales), scales, 0), finite, kept


def told_scales(norms: jax.Array, taus: jax.Array) -> jax.Array:
    """Return γ_k; NaN if the square of the norm underflowed, or the norm is not finite."""
    is_told = jnp.isfinite(norms) & ~clipping.may_exceed(norms, taus)
    return jnp.where(is_told, clipping.clip_scales(norms, taus), jnp.nan)


def weights_of_sum(
    taus: jax.Array, shares: jax.Array, norms: jax.Array, scales: jax.Array
) -> jax.Array:
    """Return γ_k / N; 0 if τ_k = 0, even if a nonzero norm has underflowed."""
    shares = clipping.beside(shares, scales)
    return jnp.where((taus > 0) | (norms > 0), scales * shares, 0)


def changed_if_any(
    flags: jax.Array, change: Callable[..., _Values], values: _Values, *operands: Any
) -> _Values:
    """Return change(values, *operands) if any flag is set, else the unchanged values."""
    any_flag = clipping.any_of(lax.stop_gradient(flags))
    known = concrete(any_flag)
    if known is not None:  # not under jit: a loop would be compiled again in each call
        return change(values, *operands) if known else values

    # A loop of zero or one step, not a branch: a branch would store the values twice, and a loop
    # updates them in place.
    @jax.custom_jvp
    def changed(flag: jax.Array, values: _Values, operands: tuple[Any, ...]) -> _Values:
        def once(state: tuple[jax.Array, _Values]) -> tuple[jax.Array, _Values]:
            return jnp.zeros_like(flag), change(state[1], *operands)

        return lax.while_loop(lambda state: state[0], once, (flag, values))[1]

    @changed.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def branch(flag: jax.Array, values: _Values, operands: tuple[Any, ...]) -> _Values:
            return lax.cond(flag, lambda: change(values, *operands), lambda: values)

        return jax.jvp(branch, primals, tangents)

    return changed(any_flag, values, operands)
