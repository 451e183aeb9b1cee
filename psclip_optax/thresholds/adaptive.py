"""Build thresholds that follow the norms, so that no scale has to be known in advance.

Each is an [`psclip_optax.AdaptiveThreshold`][], which computes the threshold of a batch from the
norms of the batches *before* it. Given those, γ_k depends only on the k-th sample, as the theory of
per-sample clipping requires. If the norms of the batch itself were used, an outlier would raise its
own threshold. It would also cost more: if gradients are not stacked, one computation gives the
norms and the clipped gradient. `per_sample_clip` and `clipped_value_and_grad` use these thresholds
with the same results.
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

# How much the estimate of p is below the tail index, at which the moment is infinite.
_MARGIN = 0.1
_LOWEST_ORDER, _HIGHEST_ORDER = 1.05, 2.0
_ORDERS = np.linspace(_LOWEST_ORDER, _HIGHEST_ORDER, 20)
# The share of a batch's norms that Hill's estimator uses. Many batches are averaged, so the bias,
# which falls with the share, matters more than the variance.
_TAIL_SHARE = 0.05

# Norms outside this range have squares that overflow or underflow float32.
_LOWEST_LOG2, _HIGHEST_LOG2 = -64, 64
_BINS_PER_OCTAVE = 32
_NUM_BINS = (_HIGHEST_LOG2 - _LOWEST_LOG2) * _BINS_PER_OCTAVE


class MomentState(NamedTuple):
    """Holds the state of `moment_threshold`.

    Attributes:
      moment: the moment of order p, or moments of a grid of orders if p is estimated.
      tail: the mean of log(norm / start of the tail) over norms in the tail, which estimates the
        inverse of the tail index; () if p is given.
    """

    moment: RunningMoment
    tail: RunningMean | tuple[()]


class QuantileState(NamedTuple):
    """Holds the state of `quantile_threshold`.

    Attributes:
      counts: float [4096], the discounted number of norms nearest to 2^(i/32 − 64).
    """

    counts: jax.Array


class MinNormState(NamedTuple):
    """Holds the state of `min_norm_threshold`.

    Attributes:
      smallest: the mean over batches of each batch's smallest norm.
    """

    smallest: RunningMean


def moment_threshold(
    p: jax.typing.ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.99,
    initial: jax.typing.ArrayLike = 0.0,
) -> AdaptiveThreshold[MomentState]:
    r"""Build a growing threshold whose scale is a running p-th moment of the norms.

    $$\tau_k = c \, \hat\sigma \, k^{1/p}, \qquad
    \hat\sigma = {\bigl(\operatorname{mean} \|g\|^p\bigr)}^{1/p}$$

    There is no α to tune. The moment is that of the norms themselves, not of the deviations from
    the mean gradient. It bounds both the noise and the mean gradient. A central moment bounds only
    the noise: when the noise vanishes, the threshold would clip the signal and stop training.

    With p = None the order is estimated too: it is the tail index of the norms minus 0.1, at least
    1.05 and at most 2. The index is Hill's estimate from the largest 5 % of each batch (at least
    one norm); the mean excess is averaged over batches like the moment. The excess is computed
    within each batch, so a scale that changes from step to step is not mistaken for a heavy tail.
    Hill's estimator is not shift-invariant: if the mean gradient is large compared with the noise,
    the tail looks lighter than it is.

    Each batch has the weight `decay` to the power of the number of later batches. The weighted sum
    is divided by the sum of the weights, so it has no bias towards 0 at the start. The moment of a
    heavy tail is uncertain: the closer p is to the tail index, the more it depends on a single
    norm.

    Args:
      p: the order of the moment, in [1, 2]; the theory asks for an order at which the moment of the
        gradient noise is finite. May be traced. None estimates it.
      scale: c ≥ 0, without unit; may be traced.
      decay: the factor per update, in [0, 1]; 1 takes the mean over all norms seen, 0 only the last
        batch.
      initial: τ_k for all k before any norm was seen. With 0 the first batch only measures, and its
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
      Clipping](https://arxiv.org/abs/2605.02701), 2026 (the threshold; the way of estimating its
      scale is ours).

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
    r"""Build a constant threshold at a running quantile of the norms.

    The share 1 − `quantile` of the samples is clipped, whatever their scale. τ is the smallest norm
    such that at least the share `quantile` of the norms seen is no larger than it. Each norm counts
    with the weight `decay` to the power of the number of later batches.

    The state is a histogram of the norms' logarithms, with 32 bins per octave from 2⁻⁶⁴ to 2⁶⁴ (16
    KiB in float32). So τ has a relative error of at most 1.1 %, and a norm out of range counts in
    the first or last bin. Unlike a buffer of the last norms, a histogram does not forget faster
    when batches are larger. With `decay=1` it counts all norms, as AutoClip does, and it can be
    summed over devices. Stochastic approximation would need a step size that fits the scale; the
    histogram is accurate from the first batch on.

    Args:
      quantile: in (0, 1); may be traced.
      decay: the factor per update, in [0, 1]; 1 takes the quantile of all norms seen, 0 that of the
        last batch.
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
        # The last nonempty bin below which the share of norms is less than the quantile. Rounding
        # of the sums must not select an empty bin.
        is_below = up_to - state.counts < quantile * up_to[-1]
        bins = jnp.arange(_NUM_BINS)
        found = jnp.max(jnp.where((state.counts > 0) & is_below, bins, 0))
        norm = jnp.exp2(found / _BINS_PER_OCTAVE + _LOWEST_LOG2)
        return ConstantThreshold(jnp.where(up_to[-1] > 0, norm, initial))

    def observe(state: QuantileState, norms: jax.Array, counts: jax.Array) -> QuantileState:
        # Rounded to the nearest bin, so that powers of 2 are not at the edge of a bin.
        bins = jnp.round((jnp.log2(norms) - _LOWEST_LOG2) * _BINS_PER_OCTAVE)
        bins = jnp.clip(bins, 0, _NUM_BINS - 1).astype(int)
        seen = jnp.bincount(bins, weights=counts.astype(norms.dtype), length=_NUM_BINS)
        return QuantileState(state.counts * decay + seen)

    return build_rule(init, threshold, observe)


def min_norm_threshold(
    *, decay: jax.typing.ArrayLike = 0.0, initial: jax.typing.ArrayLike = 0.0
) -> AdaptiveThreshold[MinNormState]:
    r"""Build a constant threshold at the smallest norm of the previous batch: ρ = min_j ‖ĝ_j‖.

    With micro-batches (`clip_at="micro-batch"` of [`psclip_optax.clipped_value_and_grad`][], or the
    means of micro-batches as the stack of [`psclip_optax.per_sample_clip`][]) this is adaptive
    micro-batch clipping, with one difference. In the paper ρ_t is the smallest norm of the batch
    that is clipped, so every micro-batch is scaled to the same norm. Here it is the smallest norm
    of the previous batch: a micro-batch with a smaller norm is not scaled, and no second pass is
    needed.

    A single zero gradient makes the next step zero. A `decay` above 0 averages the minima of
    several batches, which softens this; the paper does not average.

    Args:
      decay: the factor per update, in [0, 1], of the average of the minima; 0 takes only the last.
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
    """Return the mean excess of log norms over the k largest, and k; (0, 0) for fewer than two."""
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
    """Convert the mean excess to p; return the highest p if no tail was seen."""
    inverse = jnp.maximum(tail.mean, jnp.finfo(tail.mean.dtype).tiny)
    return jnp.clip(1 / inverse - _MARGIN, _LOWEST_ORDER, _HIGHEST_ORDER)
