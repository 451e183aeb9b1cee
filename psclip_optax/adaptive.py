"""Adaptive thresholds: they follow the norms, so that no scale has to be known in advance.

Each is an [`psclip_optax.AdaptiveThreshold`][], whose threshold for a batch comes from the norms of
the batches *before* it. Given the past, γ_k then depends on no sample but its own, as the theory of
per-sample clipping needs: with this batch's norms in it, an outlier would raise the threshold that
it is clipped at. It is also what costs nothing where gradients are not stacked, for there the norms
come out of the same computation as the clipped gradient. So both faces of the library use it, and
give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, meshes
from psclip_optax.arrays import as_array, described, described_tree, promoted
from psclip_optax.thresholds import (
    AdaptiveThreshold,
    ConstantThreshold,
    GrowingThreshold,
    Threshold,
    as_threshold,
    check_number,
    concrete,
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


class RunningMean(NamedTuple):
    """A mean over what was seen, each batch discounted by the decay for every one after it.

    Attributes:
      weight: float, of all that was seen; 0 before that.
      mean: float.
    """

    weight: jax.Array
    mean: jax.Array


class RunningMoment(NamedTuple):
    """Roots of mean powers of the norms seen, (mean ‖g‖^p)^{1/p}.

    Attributes:
      weight: float, how many norms, each discounted.
      root: float, in the units of a norm; [m] for m orders p.
    """

    weight: jax.Array
    root: jax.Array


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


class TrackNormsState(NamedTuple):
    """State of `track_norms`.

    Attributes:
      threshold_state: the state of the adaptive threshold.
    """

    threshold_state: Any


def moment_threshold(
    p: jax.typing.ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.99,
    initial: jax.typing.ArrayLike = 0.0,
) -> AdaptiveThreshold:
    r"""A growing threshold whose scale is a running p-th moment of the norms: no α to tune.

    $$\tau_k = c \, \hat\sigma \, k^{1/p}, \qquad
    \hat\sigma = \bigl(\operatorname{mean} \|g\|^p\bigr)^{1/p}$$

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
    _check_memory("moment_threshold", decay, initial)
    orders = _ORDERS if p is None else p

    def init() -> MomentState:
        moment = RunningMoment(_zeros(), _zeros(np.shape(orders)))
        return MomentState(moment, RunningMean(_zeros(), _zeros()) if p is None else ())

    def threshold(state: MomentState) -> Threshold:
        order = _order_below_index(state.tail) if p is None else p
        root = state.moment.root
        sigma = jnp.interp(order, _ORDERS.astype(root.dtype), root) if p is None else root
        is_known = state.moment.weight > 0
        alpha = jnp.where(sigma > 0, scale * sigma, 0)  # a scale of ∞ times 0 would be NaN
        return GrowingThreshold(
            jnp.where(is_known, alpha, initial), jnp.where(is_known, order, jnp.inf)
        )

    def observe(state: MomentState, norms: jax.Array, counts: jax.Array) -> MomentState:
        moment = _observe_moment(state.moment, norms, counts, orders, decay)
        if p is not None:
            return MomentState(moment, ())
        excess, number = _hill(norms, counts)
        return MomentState(moment, _observe_mean(state.tail, excess, number, decay))

    return _rule(init, threshold, observe)


def quantile_threshold(
    quantile: jax.typing.ArrayLike = 0.9,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    initial: jax.typing.ArrayLike = 0.0,
) -> AdaptiveThreshold:
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
    _check_memory("quantile_threshold", decay, initial)

    def init() -> QuantileState:
        return QuantileState(_zeros([_NUM_BINS]))

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

    return _rule(init, threshold, observe)


def min_norm_threshold(
    *, decay: jax.typing.ArrayLike = 0.0, initial: jax.typing.ArrayLike = 0.0
) -> AdaptiveThreshold:
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
    _check_memory("min_norm_threshold", decay, initial)

    def init() -> MinNormState:
        return MinNormState(RunningMean(_zeros(), _zeros()))

    def threshold(state: MinNormState) -> Threshold:
        weight, mean = state.smallest
        return ConstantThreshold(jnp.where(weight > 0, mean, initial))

    def observe(state: MinNormState, norms: jax.Array, counts: jax.Array) -> MinNormState:
        smallest = jnp.min(norms, where=counts, initial=jnp.inf)
        return MinNormState(_observe_mean(state.smallest, smallest, 1, decay))

    return _rule(init, threshold, observe)


def track_norms(rule: AdaptiveThreshold) -> optax.GradientTransformationExtraArgs:
    """Keep the state of an adaptive threshold in an optimizer's: a link that changes no gradient.

    For gradients that are clipped before they come to the optimizer, as those of
    [`psclip_optax.clipped_value_and_grad`][]. The state is saved,
    restored and replicated with the optimizer's, where `optax.tree.get(state,
    "threshold_state")` finds it. [`psclip_optax.per_sample_clip`][] keeps
    the state itself.

    Args:
      rule: an adaptive threshold, such as [`psclip_optax.moment_threshold`][].

    Returns:
      An `optax.GradientTransformationExtraArgs` with a
      [`psclip_optax.adaptive.TrackNormsState`][]. Its update takes `norms`, float [n], and
      `sample_mask`, bool [n] or None, as further keyword arguments, which `optax.chain` passes
      on.

    Raises:
      TypeError: `rule` is no AdaptiveThreshold, or an update came without norms.
      ValueError: norms are not of shape [n], or the mask does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import psclip_optax as psc
      >>> loss = lambda w, x: jnp.dot(w, x)  # of one sample
      >>> f = psc.clipped_value_and_grad(loss, 0.0, return_stats=True)
      >>> rule = psc.min_norm_threshold()
      >>> tx = optax.chain(psc.track_norms(rule), optax.sgd(1.0))
      >>> w, x = jnp.zeros(2), jnp.array([[0.0, 2.0], [6.0, 8.0]])
      >>> state = tx.init(w)
      >>> for _ in range(2):  # the first batch only measures
      ...     threshold = rule.threshold(optax.tree.get(state, "threshold_state"))
      ...     value, grads, stats = f(w, x, threshold=threshold)
      ...     updates, state = tx.update(grads, state, w, norms=stats.norms)
      ...     print(-updates)
      [0. 0.]
      [0.6 1.8]
    """
    if not isinstance(rule, AdaptiveThreshold):
        raise TypeError(
            "track_norms keeps the state of an AdaptiveThreshold, such as psc.moment_threshold(), "
            f"got {rule!r}, which has none: give it to clipped_value_and_grad alone"
        )

    def init(params: optax.Params) -> TrackNormsState:
        del params
        return TrackNormsState(rule.init())

    def update(
        updates: optax.Updates,
        state: TrackNormsState,
        params: optax.Params | None = None,
        *,
        norms: jax.typing.ArrayLike | None = None,
        sample_mask: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackNormsState]:
        del params, extra_args
        if not isinstance(state, TrackNormsState):
            raise TypeError(
                "track_norms's update takes (grads, state, params) with a TrackNormsState from its "
                f"init or its last update, got {described(state)}"
            )
        if norms is None:
            raise TypeError(
                "track_norms expects the norms of the batch: write tx.update(grads, state, params, "
                "norms=stats.norms, sample_mask=sample_mask), with the stats of "
                "clipped_value_and_grad(…, return_stats=True)"
            )
        return updates, TrackNormsState(rule.update(state.threshold_state, norms, sample_mask))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] (the state has its own type)


def as_adaptive(threshold: Threshold | AdaptiveThreshold | jax.typing.ArrayLike) -> Any:
    """The rule itself, or one without a state that always has this threshold."""
    if isinstance(threshold, AdaptiveThreshold):
        return threshold
    fixed = as_threshold(threshold)
    return AdaptiveThreshold(tuple, lambda state: fixed, lambda state, *_: state)


def _check_memory(owner: str, decay: Any, initial: Any) -> None:
    check_number(owner, "decay", decay, lowest=0, highest=1)
    check_number(owner, "initial", initial, lowest=0)


def _zeros(shape: Any = ()) -> jax.Array:
    return jnp.zeros(shape, jnp.result_type(float))


def _rule(
    init: Callable[[], Any],
    threshold: Callable[[Any], Threshold],
    observe: Callable[[Any, jax.Array, jax.Array], Any],
) -> AdaptiveThreshold:
    """A rule from (state, norms, which of them have a say) → state, the others being 0."""
    expected = jax.eval_shape(init)

    def checked_threshold(state: Any) -> Threshold:
        _check_state(state, expected)
        return threshold(state)

    def update(
        state: Any,
        norms: jax.typing.ArrayLike,
        sample_mask: jax.typing.ArrayLike | None = None,
        *,
        axis_name: Any = None,
    ) -> Any:
        _check_state(state, expected)

        def compute(state: Any, norms: Any, sample_mask: Any) -> Any:
            meshes.check_axis_name(axis_name)
            norms, counts = _checked_norms(norms, sample_mask)
            if axis_name is not None:
                norms, counts = (clipping.gathered(x, axis_name) for x in (norms, counts))
            new = observe(state, jnp.where(counts, norms, 0), counts)
            return jax.tree.map(
                lambda new, old: jnp.where(jnp.any(counts), new, old).astype(old.dtype), new, state
            )

        arguments = (state, norms, sample_mask)
        mesh = meshes.explicit_mesh(arguments)
        if mesh is None:
            return compute(*arguments)
        return meshes.with_auto_axes(compute, arguments, mesh, P())

    return AdaptiveThreshold(init, checked_threshold, update)


def _check_state(state: Any, expected: Any) -> None:
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise TypeError(
            "an adaptive threshold's state comes from init() or update(state, norms) of the same "
            f"rule, {described_tree(expected)}, got {described_tree(state)}"
        )


def _checked_norms(norms: Any, sample_mask: Any) -> tuple[jax.Array, jax.Array]:
    """Norms in the dtype of a state, and which are finite and not masked."""
    expected = (
        "an adaptive threshold is updated with the norms of a batch, a float array of shape [n] "
        "such as stats.norms of psc.ClipStats"
    )
    norms = as_array(norms, expected)
    if norms.ndim != 1 or not jnp.issubdtype(norms.dtype, jnp.floating):
        raise ValueError(f"{expected}, got {described(norms)}")
    known = concrete(norms)
    negative = np.zeros(0) if known is None else known[np.isfinite(known) & (known < 0)]
    if negative.size:
        raise ValueError(
            f"norms are ≥ 0, but the smallest of {described(norms)} is {negative.min()}; pass "
            "stats.norms of psc.ClipStats as they are"
        )
    norms = lax.stop_gradient(norms).astype(promoted(norms.dtype, jnp.result_type(float)))
    finite = jnp.isfinite(norms)
    if sample_mask is None:
        return norms, finite
    return norms, finite & clipping.check_sample_mask(sample_mask, norms.size)


def _weigh(weight: jax.Array, amount: Any, decay: Any) -> tuple[jax.Array, jax.Array]:
    """The new weight, and the share in it of what is new."""
    amount = jnp.asarray(amount, weight.dtype)
    weight = decay * weight + amount
    return weight, amount / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)


def _observe_mean(running: Any, value: jax.Array, amount: Any, decay: Any) -> RunningMean:
    weight, share = _weigh(running.weight, amount, decay)
    return RunningMean(weight, running.mean + share * (value - running.mean))


def _observe_moment(
    running: RunningMoment, norms: jax.Array, counts: jax.Array, orders: Any, decay: Any
) -> RunningMoment:
    number = jnp.sum(counts)
    weight, share = _weigh(running.weight, number, decay)
    orders = jnp.asarray(orders, norms.dtype)
    # In units of the largest, of which no power overflows.
    largest = jnp.maximum(jnp.max(norms, initial=0), running.root)
    unit = jnp.where(largest > 0, largest, 1)
    behind_orders = (*[1] * orders.ndim, -1)
    powers = (norms.reshape(behind_orders) / unit[..., None]) ** orders[..., None]
    counted = jnp.where(counts.reshape(behind_orders), powers, 0)
    mean = jnp.sum(counted, axis=-1) / jnp.maximum(number, 1).astype(norms.dtype)
    before = (running.root / unit) ** orders
    return RunningMoment(weight, unit * ((1 - share) * before + share * mean) ** (1 / orders))


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


def _order_below_index(tail: Any) -> jax.Array:
    """From the mean excess to p; the highest where no tail was seen."""
    inverse = jnp.maximum(tail.mean, jnp.finfo(tail.mean.dtype).tiny)
    return jnp.clip(1 / inverse - _MARGIN, _LOWEST_ORDER, _HIGHEST_ORDER)
