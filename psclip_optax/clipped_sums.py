"""Sum stacked gradients with their clipping weights, or clip a single gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax import clipping, stacks
from psclip_optax.arrays import (
    promoted,
)
from psclip_optax.clipping import ClipStats, OnNonfinite
from psclip_optax.groups import Groups
from psclip_optax.stacks import Stack


class Batch(NamedTuple):
    """Each sample's threshold, [n] or [n, groups], and whether it counts, [n]."""

    taus: jax.Array
    counts: jax.Array


def _clip_in_two_reads(
    stack: Stack, batch: Batch, squared_norms: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
    """Sum γ_k g_k, if every squared norm is finite; otherwise the sum becomes NaN."""
    norms = clipping.norms_of(squared_norms)
    finite = jnp.isfinite(norms)
    scales = jnp.where(finite, clipping.clip_scales(norms, batch.taus), jnp.nan)
    weights = scales * clipping.beside(batch.counts, scales).astype(scales.dtype)
    sums = [stacks.weighted_sum(*one) for one in stack.with_own(weights)]
    return sums, norms, scales, stack.groups.in_all(finite)


def _clip_with_care(
    stack: Stack, batch: Batch, squared_norms: jax.Array, on_nonfinite: OnNonfinite
) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
    """Sum γ_k g_k without masked and dropped samples, after scaling each g_k into range.

    A weight of zero does not exclude a sample, because 0 · NaN is NaN. And the square of a norm may
    overflow or underflow although the norm and the clipped gradient do not.
    """
    own = _own_scales(stack, batch.taus, squared_norms)
    finite = stack.groups.in_all(own.finite)
    kept = batch.counts & finite if on_nonfinite == "drop" else batch.counts
    sums = [
        stacks.selected_weighted_sum(leaf, axis, kept, factors, weights)
        for leaf, axis, factors, weights in stack.with_own(own.factors, own.weights)
    ]
    return sums, own.norms, own.scales, finite


class _OwnScales(NamedTuple):
    """Holds the factors of γ_k g_k = weights_k (factors_k g_k), whose products stay in range.

    Each has shape [n] or [n, groups].
    """

    factors: jax.Array
    weights: jax.Array
    norms: jax.Array
    scales: jax.Array
    finite: jax.Array


def _own_scales(stack: Stack, taus: jax.Array, squared_norms: jax.Array) -> _OwnScales:
    huge = 2.0 ** (jnp.finfo(squared_norms.dtype).maxexp * 25 // 32)
    too_large = ~jnp.isfinite(squared_norms)
    too_small = squared_norms < clipping.smallest_square(taus.dtype)
    # The factors depend on the data. XLA would move a constant factor out of the square, which
    # would overflow again.
    factors = jnp.where(too_large, 1 / huge, jnp.where(too_small, huge, 1)).astype(taus.dtype)
    squares = stacks.scaled_squared_norms(stack, factors)
    norms, units, finite = clipping.norms_of(squares), 1 / factors, jnp.isfinite(squares)
    # γ_k g_k = (g_k / unit) · min(unit, τ_k / ‖g_k / unit‖), and no factor overflows. For a norm of
    # ∞ no ratio is computed: at τ = ∞ it would be NaN, and so would 0 times it.
    has_limit = (norms > 0) & finite
    limits = taus / jnp.where(has_limit, norms, 1)
    return _OwnScales(
        factors=factors,
        weights=jnp.where(has_limit, jnp.minimum(units, limits), units),
        norms=norms * units,
        scales=jnp.where(has_limit, jnp.minimum(1, limits / units), 1),
        finite=finite,
    )


def _needs_care(squared_norms: jax.Array, taus: jax.Array) -> jax.Array:
    """Tell whether some squared norm overflowed, is not finite, or is too small to compare."""
    smallest = clipping.smallest_square(taus.dtype)
    too_small = (squared_norms < smallest) & (taus < smallest**0.5)
    return clipping.any_of(lax.stop_gradient(~jnp.isfinite(squared_norms) | too_small))


# Compiled separately, so that updates without jit do not trace and compile the branches each time.
@functools.partial(jax.jit, static_argnames=("axes", "groups", "masked", "on_nonfinite"))
def clip_and_sum(
    leaves: list[jax.Array],
    batch: Batch,
    *,
    axes: tuple[int, ...],
    groups: Groups,
    masked: bool,
    on_nonfinite: OnNonfinite,
) -> tuple[list[jax.Array], ClipStats, jax.Array]:
    """Return Σ γ_k g_k per leaf, the statistics, and which samples were kept, bool [n]."""
    stack = Stack(leaves, axes, groups).apart()
    squared_norms = stacks.squared_norms(stack, batch.taus.dtype)
    if on_nonfinite == "propagate" and not masked:
        sums, norms, scales, finite = _clip_in_two_reads(stack, batch, squared_norms)
    else:
        sums, norms, scales, finite = lax.cond(
            _needs_care(squared_norms, batch.taus),
            lambda: _clip_with_care(stack, batch, squared_norms, on_nonfinite),
            lambda: _clip_in_two_reads(stack, batch, squared_norms),
        )
    kept = batch.counts & finite
    return groups.whole(sums), clipping.clip_stats(norms, scales, batch.counts, finite), kept


def clipped_alone(
    leaves: list[jax.Array], tau: jax.Array, groups: Groups
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Clip one gradient: return γ g, ‖g‖ and γ = min(1, τ / ‖g‖), all NaN if g is not finite.

    By group τ, ‖g‖ and γ have shape [groups].
    """
    stack = Stack([leaf[None] for leaf in leaves], (0,) * len(leaves), groups).apart()
    taus = tau.reshape(1, *groups.shape)
    squared_norms = stacks.squared_norms(stack, taus.dtype)

    def plainly() -> tuple[jax.Array, ...]:
        norms = clipping.norms_of(squared_norms)
        scales = clipping.clip_scales(norms, taus)
        return jnp.ones_like(norms), scales, norms, scales

    def with_care() -> tuple[jax.Array, ...]:
        own = _own_scales(stack, taus, squared_norms)
        weights, scales = (jnp.where(own.finite, x, jnp.nan) for x in (own.weights, own.scales))
        return own.factors, weights, own.norms, scales

    both = lax.cond(_needs_care(squared_norms, taus), with_care, plainly)
    factor, weight, norm, scale = (one[0] for one in both)

    def clipped(leaf: jax.Array, factor: jax.Array, weight: jax.Array) -> jax.Array:
        scaled = leaf.astype(promoted(leaf.dtype, factor.dtype)) * factor * weight
        return scaled.astype(leaf.dtype)

    both = stack.with_own(factor[None], weight[None])
    return (
        groups.whole([clipped(leaf[0], *(x[0] for x in own)) for leaf, _, *own in both]),
        norm,
        scale,
    )
