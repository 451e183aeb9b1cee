"""Defines the rules without a number that `benchmarks.thresholds.auto_threshold` compares.

Every rule computes its threshold from the state of `psc.auto_threshold`: a running histogram of the
norms, their median, and the largest value of the median. So one program trains with any of them.
Nothing here runs by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

import psclip_optax as psc
from psclip_optax.thresholds.auto import AutoState

AUTOMATIC = psc.auto_threshold()
MOMENT = 1.5  # p of the automatic threshold of version 0.1.0
SLOWEST_GROWTH = 1.05
# Norms of the histogram's bins, relative to the median of the first batch.
CENTRES = jnp.exp2(jnp.arange(2048) / 32 - 32)


class Found(NamedTuple):
    """A threshold α k^exponent; α is a norm."""

    alpha: Any
    exponent: Any = 0.0


class State(NamedTuple):
    """A summary of the norms so far.

    Attributes:
      auto: the state of `psc.auto_threshold`.
      slow: a median that rises by at most 5 % per batch.
      largest_slow: the largest value of `slow`.
    """

    auto: AutoState
    slow: jax.Array
    largest_slow: jax.Array


# A function from the state and the number of samples in a batch.
Rule: TypeAlias = Callable[[State, int], Found]


def initial_state() -> State:
    return State(AUTOMATIC.init(), jnp.zeros(()), jnp.zeros(()))


def updated(state: State, norms: jax.Array) -> State:
    auto = AUTOMATIC.update(state.auto, norms)
    limit = jnp.where(state.slow > 0, SLOWEST_GROWTH * state.slow, jnp.inf)
    slow = jnp.minimum(auto.median, limit)
    return State(auto, slow, jnp.maximum(state.largest_slow, slow))


def shares(state: State) -> jax.Array:
    """Computes the share of the norms in each bin."""
    return state.auto.counts / jnp.maximum(jnp.sum(state.auto.counts), 1e-30)


def first_bin(state: State, reached: jax.Array) -> jax.Array:
    """Finds the norm of the first bin for which `reached` is set."""
    bin_number = jnp.minimum(jnp.sum(~reached), CENTRES.size - 1)
    return state.auto.unit * CENTRES[bin_number]


def floored(state: State, threshold: Any) -> Any:
    """Keeps a threshold above a quarter of the largest median, like the automatic one."""
    return jnp.maximum(threshold, state.auto.largest / 4)


def floored_median(median: jax.Array, largest: jax.Array) -> jax.Array:
    return jnp.maximum(median, largest / 2)


def mean_of_clipped_squares(state: State) -> jax.Array:
    """Computes the mean of min(‖g‖²/τ², 1) for τ at each bin."""
    weights = shares(state)
    below = jnp.cumsum(weights * jnp.square(CENTRES)) / jnp.square(CENTRES)
    return below + beyond(weights)


def beyond(values: jax.Array) -> jax.Array:
    """Sums the values of all later bins, exactly 0 if there are none."""
    return jnp.append(jnp.cumsum(values[:0:-1])[::-1], 0)


def moment(state: State, n: int) -> Found:
    """Returns the growing threshold of a running moment, which `psclip train` used in 0.1.0."""
    del n
    scale = jnp.sum(shares(state) * CENTRES**MOMENT) ** (1 / MOMENT)
    return Found(state.auto.unit * scale, 1 / MOMENT)


def quantile(share: float) -> Rule:
    """Builds a running quantile of the norms."""

    def rule(state: State, n: int) -> Found:
        del n
        return Found(first_bin(state, jnp.cumsum(shares(state)) >= share))

    return rule


def truncated_squares(state: State, n: int) -> Found:
    """Returns τ with mean min(‖g‖²/τ², 1) = log(n + 1) / n, which balances bias and variance.

    This applies the tuning-free principle of Wang, Zheng, Zhou and Zhou (Statistica Sinica, 2021)
    to norms.
    """
    return Found(first_bin(state, mean_of_clipped_squares(state) <= math.log(n + 1) / n))


def squares_at(level: float) -> Rule:
    """Builds τ with mean min(‖g‖²/τ², 1) = level, floored."""

    def rule(state: State, n: int) -> Found:
        del n
        return Found(floored(state, first_bin(state, mean_of_clipped_squares(state) <= level)))

    return rule


def bias_and_variance(state: State, n: int) -> Found:
    """Returns τ with the least bias² + variance / n of the clipped mean, floored.

    The bias is at most mean (‖g‖ − τ)₊, and the variance at most mean min(‖g‖, τ)².
    """
    weights = shares(state)
    # Later bins have larger norms, so no term is below 0.
    bias = jnp.maximum(beyond(weights * CENTRES) - beyond(weights) * CENTRES, 0)
    variance = mean_of_clipped_squares(state) * jnp.square(CENTRES)
    best = jnp.argmin(jnp.square(bias) + variance / n)
    return Found(floored(state, state.auto.unit * CENTRES[best]))


def efficient(state: State, n: int) -> Found:
    """Returns τ with the least variance of a location estimate, between ½ and 4 medians.

    The variance of Huber's estimator is mean min(‖g‖, τ)² / share(‖g‖ ≤ τ)²: clipped samples
    contribute noise but no signal.
    """
    del n
    weights = shares(state)
    squares = mean_of_clipped_squares(state) * jnp.square(CENTRES)
    variance = squares / jnp.square(jnp.maximum(jnp.cumsum(weights), 1e-6))
    medians = state.auto.unit * CENTRES / floored_median(state.auto.median, state.auto.largest)
    is_near = (medians >= 1 / 2) & (medians <= 4)
    best = jnp.argmin(jnp.where(is_near, variance, jnp.inf))
    return Found(state.auto.unit * CENTRES[best])


def by_spread(state: State, n: int) -> Found:
    """Multiplies the automatic threshold by up to 4 if the norms hardly vary.

    The factor is 1 if the 0.9 quantile is 8 medians or more.
    """
    spread = quantile(0.9)(state, n).alpha / state.auto.median
    return Found(automatic(state, n).alpha * jnp.clip(8 / spread, 1, 4))


def slow(state: State, n: int) -> Found:
    """Returns the automatic threshold for medians that grow by at most 5 % per batch."""
    del n
    return Found(floored_median(state.slow, state.largest_slow) / 2)


def automatic(state: State, n: int) -> Found:
    del n
    return Found(AUTOMATIC.threshold(state.auto)(jnp.ones(1, int))[0])


def times(factor: float) -> Rule:
    return lambda state, n: Found(factor * automatic(state, n).alpha)


def growing(state: State, n: int) -> Found:
    """Multiplies the automatic threshold by (k / middle)^{1/2}: equal in the middle of a batch."""
    return Found(automatic(state, n).alpha * (2 / (n + 1)) ** 0.5, 0.5)


def growing_from_16(state: State, n: int) -> Found:
    """Multiplies the automatic threshold by (k / 16)^{1/4}: larger batches are clipped less."""
    return Found(automatic(state, n).alpha * 16**-0.25, 0.25)


NONE, BATCH, FIXED, AUTO = "no clipping", "batch clipping", "fixed threshold", "automatic"
TUNED = (NONE, BATCH, FIXED)  # with which the others are compared
RULES: dict[str, Rule] = {
    "running moment": moment,
    "truncated squares": truncated_squares,
    "0.9 quantile": quantile(0.9),
    "median": quantile(0.5),
    "bias² + variance/n": bias_and_variance,
    "squares at 0.8": squares_at(0.8),
    "efficient": efficient,
    "by spread": by_spread,
    "slow median": slow,
    "growing": growing,
    "growing from 16": growing_from_16,
    "automatic × 2": times(2),
    "automatic / 2": times(0.5),
    AUTO: automatic,
}


class Candidate(NamedTuple):
    """The threshold of a run, as data, so that one program can run all methods.

    Attributes:
      rule: int, the index of a rule, or −1 for a fixed threshold.
      sample: float, the fixed threshold, relative to the median norm in the first batch.
      batch: float, the threshold for the norm of the batch's gradient, relative to the same.
    """

    rule: Any = -1
    sample: Any = math.inf
    batch: Any = math.inf


METHODS: dict[str, tuple[Candidate, ...]] = {
    NONE: (Candidate(),),
    BATCH: tuple(Candidate(batch=own) for own in (0.01, 0.03, 0.1, 0.3)),
    FIXED: tuple(Candidate(sample=own) for own in (0.03, 0.1, 0.3, 1.0, 3.0)),
    **{name: (Candidate(rule=index),) for index, name in enumerate(RULES)},
}


def threshold_of(candidate: Candidate, fixed: Any, state: State, n: int) -> psc.growing_threshold:
    """Returns the threshold of a batch; `candidate` and `fixed`, a norm, may be traced."""
    found = [Found(fixed), *(rule(state, n) for rule in RULES.values())]
    alpha, exponent = (jnp.stack(jnp.broadcast_arrays(*own)) for own in zip(*found, strict=True))
    # β = 1 / 0 = ∞: the same threshold for all samples.
    return psc.growing_threshold(alpha[candidate.rule + 1], 1 / exponent[candidate.rule + 1])
