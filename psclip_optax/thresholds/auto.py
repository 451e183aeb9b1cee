"""The threshold that needs no number: what is taken where none is given."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from psclip_optax import clipping
from psclip_optax.thresholds.fixed import ConstantThreshold
from psclip_optax.thresholds.interface import AdaptiveThreshold, Threshold
from psclip_optax.thresholds.rules import build_rule
from psclip_optax.thresholds.running import zeros

# Chosen by `python -m benchmarks.thresholds.auto_threshold`. Twice the threshold fails at large
# learning rates under wrong labels; half of it trains slowly at small ones.
_DECAY = 0.99
_SHARE = 1 / 2
_FLOOR = 1 / 2
# The largest median is kept for good, so it must not be that of a few outliers at the start.
_ENOUGH_NORMS = 32

_BINS_PER_OCTAVE = 32
_OCTAVES_BELOW = _OCTAVES_ABOVE = 32
_NUM_BINS = (_OCTAVES_BELOW + _OCTAVES_ABOVE) * _BINS_PER_OCTAVE


class AutoState(NamedTuple):
    """State of `auto_threshold`; all of it is of norms above 0.

    Attributes:
      unit: float, the median of the first batch that had one; 0 before.
      counts: float [2048], how many norms, each discounted, were nearest to unit · 2^(i/32 − 32).
      median: float, of these.
      largest: float, the largest value that the median has had.
    """

    unit: jax.Array
    counts: jax.Array
    median: jax.Array
    largest: jax.Array


def auto_threshold() -> AdaptiveThreshold[AutoState]:
    r"""Clip at half of the running median of the norms, and never far below where that has been.

    $$\tau = \tfrac12 \max\bigl(m_t, \tfrac12 \max_{s \le t} m_s\bigr)$$

    where m_t is the median of the norms above 0 that were seen up to batch t, each weighted by 0.99
    to the number of batches after it. The threshold is the same for all samples of a batch, and no
    number has to be chosen: it is what [`psclip_optax.per_sample_clip`][] and
    [`psclip_optax.ps_clip_sgd`][] take where no threshold is given.

    A median does not feel how large the largest norms are, and follows them late when a step that
    was too long makes them all grow. Where a model comes to fit most of its samples their norms
    vanish, and the median with them, while those of the others are what there is left to learn
    from: hence the floor.

    Most samples are clipped, so that the steps are shorter than without clipping: the best learning
    rate is often a few times larger. Multiplying the loss by a constant multiplies τ by it and
    changes no γ_k.

    The first batch is clipped by its own norms, as no others are known. `per_sample_clip` and the
    train steps of Flax do so; in a loop of your own `is_new(state)` tells it, and a threshold from
    a new state is 0. The norms are kept as a histogram of their logarithms relative to the median
    of the first batch, of 32 bins an octave over 64 octaves (8 KiB in float32): τ is exact to
    1.1 %.

    Returns:
      An [`psclip_optax.AdaptiveThreshold`][], whose thresholds are
      [`psclip_optax.constant_threshold`][].

    Raises:
      TypeError: in an update, the state is of another rule.
      ValueError: in an update, norms are not of shape [n] or the mask does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> tx = psc.per_sample_clip(psc.auto_threshold())
      >>> grads = jnp.array([[4.0], [-4.0], [4.0], [1e6]])  # of one parameter; one is an outlier
      >>> update, state = tx.update(grads, tx.init(grads[0]))
      >>> print(update)  # (2 − 2 + 2 + 2) / 4
      [1.]

    References:
      Merad and Gaïffas, [Robust Stochastic Optimization via Gradient Quantile
      Clipping](https://arxiv.org/abs/2309.17316), 2023 (a quantile of the norms as the threshold;
      the median, its half and the floor are ours, chosen by
      `python -m benchmarks.thresholds.auto_threshold`).

      Seetharaman et al., [AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks](https://arxiv.org/abs/2007.14469), 2020 (the same of all steps' mean gradients).
    """

    def init() -> AutoState:
        return AutoState(zeros(), zeros([_NUM_BINS]), zeros(), zeros())

    def threshold(state: AutoState) -> Threshold:
        return ConstantThreshold(_SHARE * jnp.maximum(state.median, _FLOOR * state.largest))

    def observe(state: AutoState, norms: jax.Array, counts: jax.Array) -> AutoState:
        # A sample without a gradient is not clipped: it says nothing of where to.
        positive = counts & (norms > 0)
        unit = jnp.where(state.unit > 0, state.unit, clipping.median(norms, positive))
        seen = _DECAY * state.counts + _histogram(norms, positive, unit)
        median = unit * _median(seen)
        is_known = jnp.sum(state.counts) >= _ENOUGH_NORMS
        new = AutoState(
            unit, seen, median, jnp.where(is_known, jnp.maximum(state.largest, median), median)
        )
        any_positive = jnp.any(positive)
        both = zip(new, state, strict=True)
        return AutoState(*(jnp.where(any_positive, new, old) for new, old in both))

    return build_rule(init, threshold, observe, is_new=lambda state: state.unit == 0)


def _histogram(norms: jax.Array, counts: jax.Array, unit: jax.Array) -> jax.Array:
    """How many norms are nearest to each power; of a unit that scales as they do."""
    octaves = jnp.log2(norms) - jnp.log2(unit) + _OCTAVES_BELOW
    # Rounded to the nearest, so that the unit itself is not at the edge of a bin.
    bins = jnp.clip(jnp.round(octaves * _BINS_PER_OCTAVE), 0, _NUM_BINS - 1).astype(int)
    return jnp.bincount(bins, weights=counts.astype(norms.dtype), length=_NUM_BINS)


def _median(counts: jax.Array) -> jax.Array:
    up_to = jnp.cumsum(counts)
    found = jnp.sum(up_to < up_to[-1] / 2)
    return jnp.exp2(found / _BINS_PER_OCTAVE - _OCTAVES_BELOW)
