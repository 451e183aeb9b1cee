"""Store the state of an adaptive threshold in the state of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import optax
from jax import lax

from psclip_optax import groups
from psclip_optax.arrays import described
from psclip_optax.thresholds.auto import auto_threshold
from psclip_optax.thresholds.checks import concrete
from psclip_optax.thresholds.interface import AdaptiveThreshold
from psclip_optax.typing import AxisName, PyTree, ThresholdLike, ThresholdTree

StateT = TypeVar("StateT")


class TrackNormsState(NamedTuple):
    """Holds the state of `track_norms`.

    Attributes:
      threshold_state: the state of the adaptive threshold.
    """

    threshold_state: PyTree


def track_norms(
    rule: AdaptiveThreshold[PyTree] | ThresholdTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Store an adaptive threshold's state in an optimizer's; the link changes no gradient.

    Use it for gradients that are clipped before they reach the optimizer, such as those of
    [`psclip_optax.clipped_value_and_grad`][]. The state is saved, restored and replicated with the
    optimizer's, and `optax.tree.get(state, "threshold_state")` finds it.
    [`psclip_optax.per_sample_clip`][] needs no such link: it stores the state itself.

    Args:
      rule: an adaptive threshold, such as [`psclip_optax.moment_threshold`][]. None means
        [`psclip_optax.auto_threshold`][]. For a tree prefix of the parameters with one for each
        group, the state is the tree of their states, and the tree of thresholds is
        `jax.tree.map(lambda rule, state: rule.threshold(state), rules, states, is_leaf=lambda node:
        isinstance(node, psc.AdaptiveThreshold))`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a
      [`psclip_optax.thresholds.tracking.TrackNormsState`][]. Its update accepts `norms`, float [n]
      or, when clipping by group, [n, groups], and `sample_mask`, bool [n] or None, as additional
      keyword arguments, which `optax.chain` passes on.

    Raises:
      TypeError: `rule` is no AdaptiveThreshold, or an update is called without norms.
      ValueError: norms are not of shape [n], or [n, groups] when clipping by group, or the mask
          does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import psclip_optax as psc
      >>> loss = lambda w, x: jnp.dot(w, x)  # for one sample
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
    rule = as_adaptive(rule) if rule is None or groups.has_rules(rule) else rule
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
        **extra_args: object,
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


def state_for_batch(
    rule: AdaptiveThreshold[StateT],
    state: StateT,
    measure: Callable[[], jax.Array],
    sample_mask: jax.Array | None = None,
    *,
    axis_name: AxisName = None,
) -> StateT:
    """Return the state whose threshold clips a batch, updated by its own norms if it is new."""
    if rule.is_new is None:
        return state

    def measured() -> StateT:
        return rule.update(state, measure(), sample_mask, axis_name=axis_name)

    is_new = rule.is_new(state)
    known = concrete(is_new)
    if known is not None:  # without jit, each update would compile a lax.cond again
        return measured() if known else state
    return lax.cond(is_new, measured, lambda: state)


def as_adaptive(
    threshold: ThresholdLike | AdaptiveThreshold[PyTree] | ThresholdTree | None,
) -> AdaptiveThreshold[PyTree]:
    """Make one rule from a rule, a tree of rules, a fixed threshold, or None (automatic)."""
    if threshold is None:
        return auto_threshold()
    if isinstance(threshold, AdaptiveThreshold):
        return threshold
    if groups.has_rules(threshold):
        return groups.rule_by_group(threshold)
    return groups.fixed_rule(threshold)
