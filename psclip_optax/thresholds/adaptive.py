"""Adaptive thresholds: they follow the norms, so that no scale has to be known in advance.

Each is an [`psclip_optax.AdaptiveThreshold`][], whose threshold for a batch comes from the norms of
the batches *before* it. Given the past, γ_k then depends on no sample but its own, as the theory of
per-sample clipping needs: with this batch's norms in it, an outlier would raise the threshold that
it is clipped at. It is also what costs nothing where gradients are not stacked, for there the norms
come out of the same computation as the clipped gradient. So both faces of the library use it, and
give the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psclip_optax.thresholds.checks import check_number
from psclip_optax.thresholds.fixed import ConstantThreshold, GrowingThreshold
from psclip_optax.thresholds.interface import AdaptiveThreshold, Threshold
from psclip_optax.thresholds.rules import build_rule, check_memory
from psclip_optax.thresholds.running import (
    RunningMean,
    RunningMoment,
    observe_mean,
    observe_moment,
    zeros,
)

# p is estimated to be that much below the tail index, for the moment of that order is infinite.
_MARGIN = 0.1
_LOWEST_ORDER, _HIGHEST_ORDER = 1.05, 2.0
_ORDERS = np.linspace(_LOWEST_ORDER, _HIGHEST_ORDER, 20)
# Of a batch's norms, those that Hill's estimate is from. Many batches are averaged, so that what
# matters is the bias, which falls with the share, and not the variance.
_TAIL_SHARE = 0.05

# Norms outside of them have squares that float32 does not hold.
_LOWEST_LOG2, _HIGHEST_LOG2 = -64, 64
_BINS_PER_OCTAVE = 32
_NUM_BINS = (_HIGHEST_LOG2 - _LOWEST_LOG2) * _BINS_PER_OCTAVE


class MomentState(NamedTuple):
    """State of `moment_threshold`.

    Attributes:
      moment: of the order p, or of a grid of orders if p is estimated.
      tail: mean logarithm of a norm in the tail over where the tail begins, the inverse of the tail
        index; () if p is given.
    """

    moment: RunningMoment
    tail: RunningMean | tuple[()]


class QuantileState(NamedTuple):
    """State of `quantile_threshold`.

    Attributes:
      counts: float [4096], how many norms, each discounted, were nearest to 2^(i/32 − 64).
    """

    counts: jax.Array


class MinNormState(NamedTuple):
    """State of `min_norm_threshold`.

    Attributes:
      smallest: mean over the batches of the smallest norm of each.
    """

    smallest: RunningMean


def moment_threshold(
    p: jax.typing.ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.99,
    initial: jax.typing.ArrayLike = 0.0,
) -> AdaptiveThreshold[MomentState]:
    r"""A growing threshold whose scale is a running p-th moment of the norms: no α to tune.

    $$\tau_k = c \, \hat\sigma \, k^{1/p}, \qquad
    \hat\sigma = {\bigl(\operatorname{mean} \|g\|^p\bigr)}^{1/p}$$

    The moment is that of the norms themselves, not of their deviations from the mean gradient. It
    bounds both the noise and the mean gradient; the central one falls with the noise alone, so that
    the threshold would clip the signal, and in the end stop the training.

    With p = None its order is estimated as well: the tail index of the norms less 0.1, within 1.05
    and 2. The index is Hill's, from the largest 5 % of each batch (one norm at least), the mean
    excess averaged over batches as the moment is. Each batch is held against its own norms alone,
    so that a scale that changes from step to step does not pass for a heavy tail. Hill's estimate
    takes no account of a shift: where the mean gradient is large beside the noise the tail looks
    lighter than it is.

    The mean gives the norms of a batch the weight `decay` to the number of batches after it, and
    is divided by the sum of the weights: no bias towards 0 at the start. A heavy tail's moment is
    itself uncertain: the closer p is to the tail index, the more a single norm decides.

    Args:
      p: order of the moment, in [1, 2]; of a finite moment of the gradient noise in theory. May be
        traced. None estimates it.
      scale: c ≥ 0, without unit; may be traced.
      decay: in [0, 1], by update; 1 is the mean over everything seen, 0 the last batch alone.
      initial: τ_k of all k before any norm was seen. At 0 the first batch only measures: its
        clipped gradient is zero; ∞ leaves it unclipped.

    Returns:
      An [`psclip_optax.AdaptiveThreshold`][], whose thresholds are
      [`psclip_optax.growing_threshold`][].

    Raises:
      TypeError: an argument is not a real number.
      ValueError: one is out of its range or not a scalar; in an update, norms are not of shape [n]
        or the mask does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> rule = psc.moment_threshold(p=2.0)
      >>> state = rule.update(rule.init(), jnp.array([1.0, 7.0, jnp.nan]))  # σ̂ = √25
      >>> print(rule.threshold(state)(jnp.array([1, 4])))
      [ 5. 10.]

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026 (the threshold; that its scale is estimated
      in this way is ours).

      Hill, [A Simple General Approach to Inference About the Tail of a
      Distribution](https://doi.org/10.1214/aos/1176343247), 1975.
    """
    if p is not None:
        check_number("moment_threshold", "p", p, lowest=1, highest=2)
    check_number("moment_threshold", "scale", scale, lowest=0)
    check_memory("moment_threshold", decay, initial)
    orders = _ORDERS if p is None else p

    def init() -> MomentState:
        moment = RunningMoment(zeros(), zeros(np.shape(orders)))
        return MomentState(moment, RunningMean(zeros(), zeros()) if p is None else ())

    def threshold(state: MomentState) -> Threshold:
        order, sigma = orders, state.moment.root
        if isinstance(state.tail, RunningMean):
            order = _order_below_index(state.tail)
            sigma = jnp.interp(order, _ORDERS.astype(sigma.dtype), sigma)
        is_known = state.moment.weight > 0
        alpha = jnp.where(sigma > 0, scale * sigma, 0)  # a scale of ∞ times 0 would be NaN
        return GrowingThreshold(
            jnp.where(is_known, alpha, initial), jnp.where(is_known, order, jnp.inf)
        )

    def observe(state: MomentState, norms: jax.Array, counts: jax.Array) -> MomentState:
        moment = observe_moment(state.moment, norms, counts, orders, decay)
        if not isinstance(state.tail, RunningMean):
            return MomentState(moment, ())
        excess, number = _hill(norms, counts)
        return MomentState(moment, observe_mean(state.tail, excess, number, decay))

    return build_rule(init, threshold, observe)


def quantile_threshold(
    quantile: jax.typing.ArrayLike = 0.9,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    initial: jax.typing.ArrayLike = 0.0,
) -> AdaptiveThreshold[QuantileState]:
    r"""A constant threshold at a running quantile of the norms.

    The share 1 − `quantile` of the samples is clipped, whatever their scale. τ is the smallest
    norm that the share `quantile` of those seen, each weighted by `decay` to the number of
    batches after it, does not exceed.

    The norms are kept as a histogram of their logarithms, of 32 bins an octave from 2⁻⁶⁴ to 2⁶⁴
    (16 KiB in float32): τ is exact to 1.1 %, and what lies beyond counts as the last bin. Unlike a
    buffer of the last norms, it forgets at the same rate whatever the size of a batch, keeps
    everything at `decay=1`, as AutoClip does, and sums over devices; unlike stochastic
    approximation, it has no step size to fit to the scale, and is right from the first batch on.

    Args:
      quantile: in (0, 1); may be traced.
      decay: in [0, 1], by update; 1 is the quantile of everything seen, 0 that of the last batch.
      initial: τ before any norm was seen; see [`psclip_optax.moment_threshold`][].

    Returns:
      An [`psclip_optax.AdaptiveThreshold`][], whose thresholds are
      [`psclip_optax.constant_threshold`][].

    Raises:
      TypeError: an argument is not a real number.
      ValueError: one is out of its range or not a scalar; in an update, norms are not of shape [n]
        or the mask does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> rule = psc.quantile_threshold(0.75)
      >>> state = rule.update(rule.init(), jnp.array([1.0, 2.0, 4.0, 1000.0]))
      >>> print(rule.threshold(state)(jnp.array([1, 2])))
      [4. 4.]

    References:
      Merad and Gaïffas, [Robust Stochastic Optimization via Gradient Quantile
      Clipping](https://arxiv.org/abs/2309.17316), 2023 (of the gradient of each step, from a
      buffer).

      Seetharaman et al., [AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks](https://arxiv.org/abs/2007.14469), 2020 (of the mean gradient, from all steps).

      Masson, Rim and Lee, [DDSketch](https://arxiv.org/abs/1908.10693), 2019 (quantiles from a
      histogram of logarithms).
    """
    check_number(
        "quantile_threshold", "quantile", quantile, lowest=0, highest=1, open_ends=(True, True)
    )
    check_memory("quantile_threshold", decay, initial)

    def init() -> QuantileState:
        return QuantileState(zeros([_NUM_BINS]))

    def threshold(state: QuantileState) -> Threshold:
        up_to = jnp.cumsum(state.counts)
        # By what is below a bin: bins without a norm must not win by a rounding of the sums.
        is_below = up_to - state.counts < quantile * up_to[-1]
        bins = jnp.arange(_NUM_BINS)
        found = jnp.max(jnp.where((state.counts > 0) & is_below, bins, 0))
        norm = jnp.exp2(found / _BINS_PER_OCTAVE + _LOWEST_LOG2)
        return ConstantThreshold(jnp.where(up_to[-1] > 0, norm, initial))

    def observe(state: QuantileState, norms: jax.Array, counts: jax.Array) -> QuantileState:
        # Rounded to the nearest, so that round norms are not at the edge of a bin.
        bins = jnp.round((jnp.log2(norms) - _LOWEST_LOG2) * _BINS_PER_OCTAVE)
        bins = jnp.clip(bins, 0, _NUM_BINS - 1).astype(int)
        seen = jnp.bincount(bins, weights=counts.astype(norms.dtype), length=_NUM_BINS)
        return QuantileState(state.counts * decay + seen)

    return build_rule(init, threshold, observe)


def min_norm_threshold(
    *, decay: jax.typing.ArrayLike = 0.0, initial: jax.typing.ArrayLike = 0.0
) -> AdaptiveThreshold[MinNormState]:
    r"""A constant threshold at the smallest norm of the batch before: ρ = min_j ‖ĝ_j‖.

    Over micro-batches (`clip_at="micro-batch"` of [`psclip_optax.clipped_value_and_grad`][], or the
    means of micro-batches as the stack of [`psclip_optax.per_sample_clip`][]) this is the rule of
    adaptive micro-batch clipping, but for one thing: there ρ_t is the smallest norm of the batch
    that is clipped, so that every micro-batch is scaled to the same norm; here it is that of the
    batch before, so that what is smaller yet is left as it is, and the rule needs no second pass.

    A single zero gradient makes the next step zero (but for other zero gradients); a `decay`
    above 0 averages the minima of batches, which softens that and is not in the paper.

    Args:
      decay: in [0, 1], by update: of the average of the minima; 0 is the last one alone.
      initial: τ before any norm was seen; see [`psclip_optax.moment_threshold`][].

    Returns:
      An [`psclip_optax.AdaptiveThreshold`][], whose thresholds are
      [`psclip_optax.constant_threshold`][].

    Raises:
      TypeError: an argument is not a real number.
      ValueError: one is out of its range or not a scalar; in an update, norms are not of shape [n]
        or the mask does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> rule = psc.min_norm_threshold()
      >>> state = rule.update(rule.init(), jnp.array([3.0, 2.0, 100.0]))
      >>> print(rule.threshold(state)(jnp.array([1, 2])))
      [2. 2.]

    References:
      Wang et al., [Adaptive micro-batch clipping](https://arxiv.org/abs/2408.16204), ICLR 2025.
    """
    check_memory("min_norm_threshold", decay, initial)

    def init() -> MinNormState:
        return MinNormState(RunningMean(zeros(), zeros()))

    def threshold(state: MinNormState) -> Threshold:
        weight, mean = state.smallest
        return ConstantThreshold(jnp.where(weight > 0, mean, initial))

    def observe(state: MinNormState, norms: jax.Array, counts: jax.Array) -> MinNormState:
        smallest = jnp.min(norms, where=counts, initial=jnp.inf)
        return MinNormState(observe_mean(state.smallest, smallest, 1, decay))

    return build_rule(init, threshold, observe)


def _hill(norms: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean logarithm of the k largest norms over the next one, and k; 0 and 0 of less than two."""
    if not norms.size:
        return jnp.zeros((), norms.dtype), jnp.int32(0)
    positive = counts & (norms > 0)
    number = jnp.sum(positive)
    k = jnp.ceil(_TAIL_SHARE * number.astype(norms.dtype)).astype(int)
    k = jnp.clip(k, 0, jnp.maximum(number - 1, 0))
    logs = jnp.log(jnp.where(positive, norms, 1))
    ordered = -jnp.sort(jnp.where(positive, -logs, jnp.finfo(norms.dtype).max))
    excesses = ordered - ordered[jnp.minimum(k, norms.size - 1)]
    total = jnp.sum(excesses, where=jnp.arange(norms.size) < k)
    return total / jnp.maximum(k, 1).astype(total.dtype), k


def _order_below_index(tail: RunningMean) -> jax.Array:
    """From the mean excess to p; the highest where no tail was seen."""
    inverse = jnp.maximum(tail.mean, jnp.finfo(tail.mean.dtype).tiny)
    return jnp.clip(1 / inverse - _MARGIN, _LOWEST_ORDER, _HIGHEST_ORDER)
