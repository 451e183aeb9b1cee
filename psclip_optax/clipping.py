"""Compute scales from norms and thresholds, for stacked gradients and for the engine.

The result is Σ γ_k g_k / N over a batch of n samples. A *masked* sample (padding) has no position,
no weight and no share in N. A *dropped* sample (not finite) has weight 0 and is counted, but keeps
its position and its share in N.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax.arrays import as_array, described
from psclip_optax.groups import Limits
from psclip_optax.thresholds import as_positions
from psclip_optax.typing import ArrayT, AxisName

OnNonfinite: TypeAlias = Literal["drop", "propagate"]


class ClipStats(NamedTuple):
    """Norms and scales of one batch's samples, and the number of clipped samples.

    Where a tree of thresholds clips by group, norms and scales are [n, groups] and `num_clipped` is
    [groups], in the order of the tree's leaves.

    Attributes:
      norms: float [n], the norm of each sample's whole gradient, before clipping. Masked samples
        have norms too, so use the mask when you read them.
      scales: float [n], γ_k in [0, 1]; 0 for masked and dropped samples.
      num_clipped: int32, the number of samples scaled by γ_k < 1, without dropped samples.
      num_nonfinite: int32, the number of unmasked samples whose gradient is not finite in at least
        one group.
    """

    norms: jax.Array
    scales: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array


def check_on_nonfinite(on_nonfinite: str) -> None:
    if on_nonfinite not in ("drop", "propagate"):
        raise ValueError(f'on_nonfinite is "drop" or "propagate", got {on_nonfinite!r}')


def check_sample_mask(sample_mask: jax.typing.ArrayLike, num_samples: int) -> jax.Array:
    expected = (
        f"sample_mask has shape [{num_samples}] (one flag a sample, True where it counts) and "
        "dtype bool"
    )
    mask = as_array(sample_mask, expected)
    if mask.shape != (num_samples,) or mask.dtype != jnp.bool_:
        raise ValueError(f"{expected}, got {described(mask)}")
    return mask


def check_positions(positions: jax.typing.ArrayLike, num_samples: int) -> jax.Array:
    expected = f"positions has shape [{num_samples}] (one 1-based integer a sample)"
    array = as_array(positions, expected)
    if array.shape != (num_samples,):
        raise ValueError(f"{expected}, got {described(array)}")
    return as_positions(array)


def batch_positions(
    num_samples: int, sample_mask: jax.Array | None, axis_name: AxisName = None
) -> jax.Array:
    """Number the unmasked samples 1, 2, …; a masked sample repeats a position, which is not used.

    Under shard_map the numbers continue over the devices of the mesh axes.
    """
    counts = jnp.ones(num_samples, bool) if sample_mask is None else sample_mask
    own = jnp.arange(1, num_samples + 1) if sample_mask is None else jnp.cumsum(counts)
    if axis_name is not None:
        own += _counts_before(jnp.sum(counts), axis_name)
    return jnp.maximum(own, 1)


def _counts_before(number: jax.Array, axis_name: AxisName) -> jax.Array:
    """Count the unmasked samples on the devices before this one."""
    numbers = lax.all_gather(number, axis_name)
    return jnp.sum(jnp.where(jnp.arange(numbers.size) < lax.axis_index(axis_name), numbers, 0))


def batch_thresholds(
    limits: Limits,
    num_samples: int,
    dtype: jax.typing.DTypeLike,
    sample_mask: jax.Array | None,
    positions: jax.Array | None,
    axis_name: AxisName = None,
) -> jax.Array:
    """Return τ_k of each sample, [n] or [n, groups]; a masked sample's has no effect."""
    if positions is None:
        positions = batch_positions(num_samples, sample_mask, axis_name)
    return limits.at(positions, dtype)


@jax.custom_batching.custom_vmap
def any_of(flags: jax.Array) -> jax.Array:
    """Tell whether any flag is set; under vmap, any flag of the whole batch.

    A `lax.cond` with a batched predicate runs both branches. One predicate may decide for all
    samples, because the guarded branch is correct in every case.
    """
    return jnp.any(flags)


@any_of.def_vmap
def _any_of_the_batch(
    axis_size: int, in_batched: list[bool], flags: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return any_of(flags), False


def beside(of_samples: jax.Array, values: jax.Array) -> jax.Array:
    """Reshape an array [n] to [n, 1] if the values have an axis of groups."""
    return of_samples if of_samples.ndim == values.ndim else of_samples[:, None]


def clip_stats(
    norms: jax.Array, scales: jax.Array, counts: jax.Array, finite: jax.Array
) -> ClipStats:
    """Build the statistics of a batch from arrays [n]; norms and scales may be [n, groups]."""
    kept = beside(counts & finite, scales)
    return ClipStats(
        norms=norms,
        scales=jnp.where(kept, scales, 0),
        num_clipped=jnp.sum(kept & (scales < 1), axis=0, dtype=jnp.int32),
        num_nonfinite=jnp.sum(counts & ~finite, dtype=jnp.int32),
    )


def gathered(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """Gather the whole batch's array [n, …] on each device from its shard, under shard_map."""
    # JAX knows that a sum is the same on all devices; it does not know this of an all_gather.
    devices = jnp.arange(lax.psum(1, axis_name)).reshape(-1, *[1] * array.ndim)
    mine = devices == lax.axis_index(axis_name)
    whole = lax.psum(jnp.where(mine, array, 0), axis_name)
    return whole.reshape(-1, *array.shape[1:]).astype(array.dtype)


def over_devices(
    stats: ClipStats, counts: jax.Array, kept: jax.Array, axis_name: AxisName
) -> tuple[ClipStats, jax.Array, jax.Array]:
    """Gather the whole batch's statistics and flags on each device, under shard_map."""
    num_clipped, num_nonfinite = lax.psum((stats.num_clipped, stats.num_nonfinite), axis_name)
    norms, scales, counts, kept = (
        gathered(array, axis_name) for array in (stats.norms, stats.scales, counts, kept)
    )
    return ClipStats(norms, scales, num_clipped, num_nonfinite), counts, kept


class BatchFigures(NamedTuple):
    """Holds scalars of a batch; mean, median and maximum exclude masked and dropped samples.

    When clipping by group these are arrays [groups], except `num_samples` and `num_nonfinite`.
    """

    num_samples: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    mean_scale: jax.Array
    median_norm: jax.Array
    max_norm: jax.Array


def batch_figures(stats: ClipStats, counts: jax.Array, kept: jax.Array) -> BatchFigures:
    """Summarise a batch; `counts` is False for padding, and `kept` for dropped samples too."""
    stats = jax.tree.map(lax.stop_gradient, stats)
    num_samples = jnp.sum(counts, dtype=jnp.int32)
    num_kept = num_samples - stats.num_nonfinite
    return BatchFigures(
        num_samples=num_samples,
        num_clipped=stats.num_clipped,
        num_nonfinite=stats.num_nonfinite,
        mean_scale=jnp.sum(stats.scales, 0) / jnp.maximum(num_kept, 1).astype(stats.scales.dtype),
        median_norm=median(stats.norms, kept),
        max_norm=jnp.max(stats.norms, 0, where=beside(kept, stats.norms), initial=0),
    )


def no_figures() -> BatchFigures:
    """Return the scalars of an empty batch."""
    return BatchFigures(*(jnp.zeros(()) for _ in BatchFigures._fields))


def median(values: jax.Array, counts: jax.Array) -> jax.Array:
    """Return the median of the values where `counts` is set, for each group; 0 if none is."""
    if values.ndim > 1:
        return jax.vmap(median, (1, None))(values, counts)
    if not values.size:
        return jnp.zeros((), values.dtype)
    number = jnp.sum(counts)
    ordered = jnp.sort(jnp.where(counts, values, jnp.inf))
    low = ordered[jnp.maximum(number - 1, 0) // 2]
    high = ordered[jnp.minimum(number // 2, values.size - 1)]
    return jnp.where(number > 0, low / 2 + high / 2, 0)


def norms_of(squared_norms: jax.Array) -> jax.Array:
    """Take the root, shape [n], with derivative 0 at 0, where that of `jnp.sqrt` is infinite."""
    is_zero = squared_norms == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squared_norms)))


def smallest_square(dtype: jax.typing.DTypeLike) -> float:
    """Return the squared norm below which squares of entries may have vanished from the sum."""
    return float(jnp.finfo(dtype).tiny) * 2.0**40


def is_tiny(taus: ArrayT, dtype: jax.typing.DTypeLike) -> ArrayT:
    """Tell which thresholds are too small to compare with a norm from a sum of squares."""
    return (taus > 0) & (taus < smallest_square(dtype) ** 0.5)


def may_exceed(norms: jax.Array, taus: jax.Array) -> jax.Array:
    """Tell where both τ and the norm are too small for the norm to be accurate, [n]."""
    return is_tiny(taus, taus.dtype) & (norms < smallest_square(taus.dtype) ** 0.5)


def clip_scales(norms: jax.Array, taus: jax.Array) -> jax.Array:
    """Return γ_k = min(1, τ_k / ‖g_k‖), shape [n]; 1 where the norm is 0 or NaN.

    Only norms above their threshold are divisors. So neither τ = 0 nor τ = ∞ nor a zero gradient
    gives NaN, in the value or in a derivative.
    """
    clipped = norms > taus
    return jnp.where(clipped, taus / jnp.where(clipped, norms, 1), 1)
