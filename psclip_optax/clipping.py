"""From norms and thresholds to scales: the rules that both faces of the library share.

Σ γ_k g_k / N over a batch of n samples. A *masked* sample (padding) has no position, no weight
and no share in N. A *dropped* one (not finite) has weight 0 and is counted, but keeps its position
and its share in N.
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
    """What clipping did to each sample of one batch.

    Where a tree of thresholds clips by group, norms and scales are [n, groups] and `num_clipped` is
    [groups], in the order of the tree's leaves.

    Attributes:
      norms: float [n], the norm of each sample's whole gradient, before clipping; of masked samples
        too, so that what is made of norms needs the mask as well.
      scales: float [n], γ_k in [0, 1]; 0 for masked and dropped samples.
      num_clipped: int32, how many samples were scaled by γ_k < 1, the dropped ones apart.
      num_nonfinite: int32, how many samples that count have a gradient that is not finite, in one
        group at least.
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
    """1, 2, … over the samples that count; a masked one repeats the last, never used, position.

    They run on over the devices of mesh axes under shard_map.
    """
    counts = jnp.ones(num_samples, bool) if sample_mask is None else sample_mask
    own = jnp.arange(1, num_samples + 1) if sample_mask is None else jnp.cumsum(counts)
    if axis_name is not None:
        own += _counts_before(jnp.sum(counts), axis_name)
    return jnp.maximum(own, 1)


def _counts_before(number: jax.Array, axis_name: AxisName) -> jax.Array:
    """How many samples count on the devices before this one."""
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
    """τ_k of each sample, [n] or [n, groups]; what it is for a masked one does not matter."""
    if positions is None:
        positions = batch_positions(num_samples, sample_mask, axis_name)
    return limits.at(positions, dtype)


@jax.custom_batching.custom_vmap
def any_of(flags: jax.Array) -> jax.Array:
    """Whether any flag is set; under vmap, any of the whole batch.

    A `lax.cond` whose predicate is batched runs both branches. Where the branch that it guards is
    right in every case, one predicate may decide for all.
    """
    return jnp.any(flags)


@any_of.def_vmap
def _any_of_the_batch(
    axis_size: int, in_batched: list[bool], flags: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return any_of(flags), False


def beside(of_samples: jax.Array, values: jax.Array) -> jax.Array:
    """The array [n] as [n, 1] where the values have an axis of groups."""
    return of_samples if of_samples.ndim == values.ndim else of_samples[:, None]


def clip_stats(
    norms: jax.Array, scales: jax.Array, counts: jax.Array, finite: jax.Array
) -> ClipStats:
    """The figures of one batch, from arrays [n]; norms and scales [n, groups] by group."""
    kept = beside(counts & finite, scales)
    return ClipStats(
        norms=norms,
        scales=jnp.where(kept, scales, 0),
        num_clipped=jnp.sum(kept & (scales < 1), axis=0, dtype=jnp.int32),
        num_nonfinite=jnp.sum(counts & ~finite, dtype=jnp.int32),
    )


def gathered(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """The whole batch's [n, …] on each device, from its shard of it, under shard_map."""
    # As a sum, which is known to be the same on all devices; an all_gather's result is not.
    devices = jnp.arange(lax.psum(1, axis_name)).reshape(-1, *[1] * array.ndim)
    mine = devices == lax.axis_index(axis_name)
    whole = lax.psum(jnp.where(mine, array, 0), axis_name)
    return whole.reshape(-1, *array.shape[1:]).astype(array.dtype)


def over_devices(
    stats: ClipStats, counts: jax.Array, kept: jax.Array, axis_name: AxisName
) -> tuple[ClipStats, jax.Array, jax.Array]:
    """The same of the whole batch on each device, from those of its shard, under shard_map."""
    num_clipped, num_nonfinite = lax.psum((stats.num_clipped, stats.num_nonfinite), axis_name)
    norms, scales, counts, kept = (
        gathered(array, axis_name) for array in (stats.norms, stats.scales, counts, kept)
    )
    return ClipStats(norms, scales, num_clipped, num_nonfinite), counts, kept


class BatchFigures(NamedTuple):
    """One batch in a few scalars; means, medians and maxima over the samples that are kept.

    By group arrays [groups], but for the numbers of samples and of those that are not finite.
    """

    num_samples: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    mean_scale: jax.Array
    median_norm: jax.Array
    max_norm: jax.Array


def batch_figures(stats: ClipStats, counts: jax.Array, kept: jax.Array) -> BatchFigures:
    """The figures of a batch; `counts` is False for padding, `kept` for dropped samples too."""
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
    """The figures of no sample at all."""
    return BatchFigures(*(jnp.zeros(()) for _ in BatchFigures._fields))


def median(values: jax.Array, counts: jax.Array) -> jax.Array:
    """The median of the values that count; 0 when there is none. That of each group, if several."""
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
    """‖g_k‖, shape [n], with the derivative 0 at 0, where that of `jnp.sqrt` is infinite."""
    is_zero = squared_norms == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squared_norms)))


def smallest_square(dtype: jax.typing.DTypeLike) -> float:
    """Bound a squared norm below which squares of entries may have vanished from the sum."""
    return float(jnp.finfo(dtype).tiny) * 2.0**40


def is_tiny(taus: ArrayT, dtype: jax.typing.DTypeLike) -> ArrayT:
    """Tell which thresholds are so small that a sum of squares may miss a norm above them."""
    return (taus > 0) & (taus < smallest_square(dtype) ** 0.5)


def may_exceed(norms: jax.Array, taus: jax.Array) -> jax.Array:
    """Tell where a sum of squares is too small for its norm to be held against a tiny τ, [n]."""
    return is_tiny(taus, taus.dtype) & (norms < smallest_square(taus.dtype) ** 0.5)


def clip_scales(norms: jax.Array, taus: jax.Array) -> jax.Array:
    """γ_k = min(1, τ_k / ‖g_k‖), shape [n]; 1 where the norm is 0 and where it is not finite.

    Never divides by a norm that is not above its threshold, so that neither τ = 0 nor τ = ∞ nor a
    zero gradient gives NaN, in the value or in a derivative.
    """
    clipped = norms > taus
    return jnp.where(clipped, taus / jnp.where(clipped, norms, 1), 1)
