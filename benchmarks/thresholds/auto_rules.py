"""Defines the rules without a number that `benchmarks.thresholds.auto_threshold` compares.

Nothing here runs by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

import psclip_optax as psc
from psclip_optax.thresholds.adaptive import QuantileState
from psclip_optax.thresholds.tracking import as_adaptive

# A function from a threshold, in units of a norm, and the number of samples in a batch.
Rule: TypeAlias = Callable[[Any, int], psc.AdaptiveThreshold[Any]]

MOMENT = 1.5  # p of the automatic threshold of version 0.1.0
GROWTH = 2.0  # β of the growing variant
# Bins of psc.quantile_threshold, but for those whose squares leave the range of float32.
CENTRES = jnp.exp2(jnp.clip(jnp.arange(4096) / 32 - 64, -60, 60))


class Method(NamedTuple):
    """A way to clip.

    Attributes:
      rule: the rule for the samples.
      clips_batch: whether the threshold is for the norm of the batch's gradient instead.
      thresholds: the thresholds to tune, in units of the median norm in the first batch; a single
        one where there is nothing to tune.
    """

    rule: Rule
    clips_batch: bool = False
    thresholds: tuple[float, ...] = (1.0,)

    @property
    def is_tuned(self) -> bool:
        return len(self.thresholds) > 1


def fixed(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
    del n
    return as_adaptive(psc.constant_threshold(threshold))


def unclipped(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
    return fixed(math.inf, n)


def moment(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
    """Builds the growing threshold of a running moment, which `psclip train` used in 0.1.0."""
    del threshold, n
    return psc.moment_threshold(MOMENT)


def quantile(share: float) -> Rule:
    """Builds a running quantile of the norms."""

    def rule(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
        del threshold, n
        return psc.quantile_threshold(share)

    return rule


def truncated_squares(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
    """Builds τ with mean min(‖g‖²/τ², 1) = log(n + 1) / n, which balances bias and variance.

    This applies the tuning-free principle of Wang, Zheng, Zhou and Zhou (Statistica Sinica, 2021)
    to norms.
    """
    del threshold
    level = math.log(n + 1) / n

    def threshold_of(state: QuantileState) -> psc.constant_threshold:
        weights = state.counts / jnp.sum(state.counts)
        below = jnp.cumsum(weights * jnp.square(CENTRES)) / jnp.square(CENTRES)
        above = 1 - jnp.cumsum(weights)
        found = jnp.minimum(jnp.sum(below + above > level), CENTRES.size - 1)
        return psc.constant_threshold(CENTRES[found])

    return psc.quantile_threshold()._replace(threshold=threshold_of)


def automatic(factor: float = 1.0) -> Rule:
    def rule(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
        del threshold, n
        own = psc.auto_threshold()

        def threshold_of(state: Any) -> psc.constant_threshold:
            return psc.constant_threshold(factor * own.threshold(state)(jnp.ones(1, int))[0])

        return own if factor == 1 else own._replace(threshold=threshold_of)

    return rule


def growing(threshold: Any, n: int) -> psc.AdaptiveThreshold[Any]:
    """Multiplies the automatic threshold by (k / middle)^{1/β}: equal in the middle of a batch."""
    del threshold
    rule = psc.auto_threshold()

    def threshold_of(state: Any) -> psc.growing_threshold:
        middle = rule.threshold(state)(jnp.ones(1, int))[0]
        return psc.growing_threshold(middle * (2 / (n + 1)) ** (1 / GROWTH), GROWTH)

    return rule._replace(threshold=threshold_of)


NONE, BATCH, FIXED, AUTO = "no clipping", "batch clipping", "fixed threshold", "automatic"
METHODS = {
    NONE: Method(unclipped),
    BATCH: Method(unclipped, clips_batch=True, thresholds=(0.01, 0.03, 0.1, 0.3)),
    FIXED: Method(fixed, thresholds=(0.03, 0.1, 0.3, 1.0, 3.0)),
    "running moment": Method(moment),
    "truncated squares": Method(truncated_squares),
    "0.9 quantile": Method(quantile(0.9)),
    "median": Method(quantile(0.5)),
    "automatic, growing": Method(growing),
    "automatic × 2": Method(automatic(2.0)),
    "automatic / 2": Method(automatic(0.5)),
    AUTO: Method(automatic()),
}
