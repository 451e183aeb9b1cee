"""Messages of thresholds, fixed and adaptive."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax

import psclip_optax as psc
from tests.messages.rows import MEAN, PARAMS, RULE, Row, X, Y, clip, grad


def track(rule: Any, norms: Any):
    tx = psc.track_norms(rule)
    return tx.update(MEAN, tx.init(PARAMS), norms=norms)


ROWS = [
    # Thresholds
    Row(
        lambda: psc.growing_threshold("1", 2.0),
        TypeError,
        "growing_threshold expects a real number as `alpha`, got '1'",
    ),
    Row(
        lambda: psc.constant_threshold(True),
        TypeError,
        "constant_threshold expects a real number as `value`, got True",
    ),
    Row(
        lambda: psc.constant_threshold(np.ones(4)),
        ValueError,
        "constant_threshold expects a real scalar as `value`, got float64[4]; for one threshold"
        " per sample pass a callable, `lambda k: taus[k - 1]`",
    ),
    Row(
        lambda: psc.growing_threshold(-1.0, 2.0),
        ValueError,
        "growing_threshold expects `alpha` >= 0, got -1",
    ),
    Row(
        lambda: psc.quantile_threshold(50),
        ValueError,
        "quantile_threshold expects `quantile` > 0 and < 1, got 50",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)("abc"),
        TypeError,
        "positions are 1-based integers k = 1, 2, …, of shape [n], got a str",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)(np.ones(3)),
        TypeError,
        "positions are 1-based integers k = 1, 2, …, but came as float32[3]; cast them with "
        ".astype(int)",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)(np.arange(3)),
        ValueError,
        "positions are 1-based, but the smallest that came is 0; write `jnp.arange(1, n + 1)`",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)(3),
        TypeError,
        "a threshold takes the positions of a batch's samples, an integer array of shape [n], "
        "but was called with a scalar. `optax.inject_hyperparams` does this to any callable, "
        "taking it for a schedule over steps: to schedule the numbers in a threshold, write "
        "`optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=…, alpha=…, beta=…)`, or pass"
        " a number or a schedule as `threshold`; to keep it as it is, add "
        "static_args=('threshold',)",
    ),
    Row(
        lambda: clip(threshold=lambda k: None),
        TypeError,
        "a threshold gives one real norm per position, [4] of them from ⟨the function⟩, got None",
    ),
    Row(
        lambda: clip(threshold=optax.constant_schedule(1.0)),
        ValueError,
        "a threshold gives one real norm per position, [4] of them from ⟨the function⟩, got "
        "float32[]; a number stands for the same at all positions",
    ),
    Row(
        lambda: clip(threshold=lambda k: k > 2),
        ValueError,
        "a threshold gives one real norm per position, [4] of them from ⟨the function⟩, got "
        "bool[4]; a number stands for the same at all positions",
    ),
    Row(
        lambda: clip(threshold=lambda k: -1.0 * k),
        ValueError,
        "a threshold's norms are ≥ 0 and not NaN, but ⟨the function⟩ gave -1.0; write α ≥ 0, or"
        " clamp it with jnp.maximum(…, 0)",
    ),
    Row(
        lambda: clip(threshold=lambda: 1.0),
        TypeError,
        "⟨what was raised there⟩\nThe threshold ⟨the function⟩ was called with positions, "
        "int32[4], for a norm at each.",
    ),
    Row(
        lambda: grad(threshold=psc.growing_threshold),
        TypeError,
        "⟨what was raised there⟩\nThe threshold ⟨the function⟩ was called with positions, "
        "int32[4], for a norm at each.",
    ),
    Row(
        lambda: grad(threshold=RULE),
        TypeError,
        "an AdaptiveThreshold has a state, which is not kept here; expected a number or a "
        "callable from positions [n] to norms [n]. With clipped_value_and_grad(…, "
        "return_stats=True) keep it yourself: pass threshold=rule.threshold(state) to each "
        "call, then write state = rule.update(state, stats.norms, sample_mask). "
        "psc.per_sample_clip(rule) keeps it, and so do the train steps of an optimizer with "
        "psc.track_norms(rule)",
    ),
    # Adaptive thresholds
    Row(
        lambda: psc.track_norms(1.0),
        TypeError,
        "track_norms keeps the state of an AdaptiveThreshold, such as psc.moment_threshold(), "
        "got 1.0, which has none: give it to clipped_value_and_grad alone",
    ),
    Row(
        lambda: psc.track_norms(RULE).update(MEAN, psc.track_norms(RULE).init(PARAMS)),
        TypeError,
        "track_norms expects the norms of the batch: write tx.update(grads, state, params, "
        "norms=stats.norms, sample_mask=sample_mask), with the stats of "
        "clipped_value_and_grad(…, return_stats=True)",
    ),
    Row(
        lambda: psc.track_norms(RULE).update(MEAN, None, norms=Y),
        TypeError,
        "track_norms's update takes (grads, state, params) with a TrackNormsState from its init"
        " or its last update, got None",
    ),
    Row(
        lambda: RULE.update(RULE.init(), None),
        TypeError,
        "an adaptive threshold is updated with the norms of a batch, a float array of shape [n]"
        " such as stats.norms of psc.ClipStats, got None",
    ),
    Row(
        lambda: RULE.update(RULE.init(), X),
        ValueError,
        "an adaptive threshold is updated with the norms of a batch, a float array of shape [n]"
        " such as stats.norms of psc.ClipStats, got float32[4, 3]",
    ),
    Row(
        lambda: track({"w": RULE, "b": 1.0}, Y),
        ValueError,
        "a tree of adaptive thresholds is updated with the norms of a batch by group, a float array"
        " of shape [n, 2] such as stats.norms of psc.ClipStats, got float32[4]",
    ),
    Row(
        lambda: RULE.update(RULE.init(), -Y),
        ValueError,
        "norms are ≥ 0, but the smallest of float32[4] is -1.0; pass stats.norms of "
        "psc.ClipStats as they are",
    ),
    Row(
        lambda: RULE.update(psc.moment_threshold().init(), Y),
        TypeError,
        "an adaptive threshold's state comes from init() or update(state, norms) of the same "
        "rule, MomentState(moment=RunningMoment(weight=float32[], root=float32[]), tail=()), "
        "got MomentState(moment=RunningMoment(weight=float32[], root=float32[20]), "
        "tail=RunningMean(weight=float32[], mean=float32[]))",
    ),
    Row(
        lambda: RULE.threshold(None),
        TypeError,
        "an adaptive threshold's state comes from init() or update(state, norms) of the same "
        "rule, MomentState(moment=RunningMoment(weight=float32[], root=float32[]), tail=()), "
        "got None",
    ),
    Row(
        lambda: RULE.update(RULE.init(), Y, axis_name="data"),
        ValueError,
        "axis_name is the mesh axis (or a tuple of axes) of the jax.shard_map that this runs "
        "in, got 'data', which none around it maps; outside of shard_map leave it out: under "
        "jit a sharded batch needs no name",
    ),
]
