"""Build the default threshold, which needs no number."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from psclip_optax import clipping
from psclip_optax.thresholds.fixed import ConstantThreshold
from psclip_optax.thresholds.interface import AdaptiveThreshold, Threshold
from psclip_optax.thresholds.rules import build_rule
from psclip_optax.thresholds.running import zeros

# Chosen by `python -m benchmarks.thresholds.auto_threshold`. Twice this threshold fails at large
# learning rates with wrong labels; half of it trains slowly at small ones.
_DECAY = 0.99
_SHARE = 1 / 2
_FLOOR = 1 / 2
# The largest median is never forgotten, so a few outliers at the start must not set it.
_ENOUGH_NORMS = 32

_BINS_PER_OCTAVE = 32
_OCTAVES_BELOW = _OCTAVES_ABOVE = 32
_NUM_BINS = (_OCTAVES_BELOW + _OCTAVES_ABOVE) * _BINS_PER_OCTAVE


class AutoState(NamedTuple):
    """Holds the state of `auto_threshold`; only norms above 0 count.

    Attributes:
      unit: float, the median of the first batch with such norms; 0 before that batch.
      counts: float [2048], the discounted number of norms nearest to unit · 2^(i/32 − 32).
      median: float, the median of this histogram.
      largest: float, the largest value that the median has had.
    """

    unit: jax.Array
    counts: jax.Array
    median: jax.Array
    largest: jax.Array


def auto_threshold() -> AdaptiveThreshold[AutoState]:
    r"""Build a threshold at half of the running median of the norms, with a floor.

    $$\tau = \tfrac12 \max\bigl(m_t, \tfrac12 \max_{s \le t} m_s\bigr)$$

    where m_t is the median of the norms above 0 that were seen up to batch t. Each norm counts with
    the weight 0.99 to the power of the number of later batches. The threshold is the same for all
    samples of a batch. It needs no number, and is the default of [`psclip_optax.per_sample_clip`][]
    and [`psclip_optax.ps_clip_sgd`][].

    The median does not depend on the size of the largest norms, and rises slowly when too long a
    step makes all norms grow. The floor matters for a model that fits most of its samples: their
    norms vanish, and so does the median, but training still has to learn from the other samples.

    Most samples are clipped, so steps are shorter than without clipping, and the best learning rate
    is often a few times larger. Multiplying the loss by a constant multiplies τ by it and changes
    no γ_k.

    The first batch is clipped by its own norms, because no others are known. `per_sample_clip` and
    the train steps of Flax do this automatically. In your own loop, check `is_new(state)`; the
    threshold of a new state is 0. The state is a histogram of the norms' logarithms relative to the
    median of the first batch, with 32 bins per octave over 64 octaves (8 KiB in float32): τ has a
    relative error of at most 1.1 %.

    Returns:
      An [`psclip_optax.AdaptiveThreshold`][], whose thresholds are
      [`psclip_optax.constant_threshold`][].

    Raises:
      TypeError: in an update, the state is that of another rule.
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
      Networks](https://arxiv.org/abs/2007.14469), 2020 (the same for the mean gradients of all
      steps).
    """

    def init() -> AutoState:
        return AutoState(zeros(), zeros([_NUM_BINS]), zeros(), zeros())

    def threshold(state: AutoState) -> Threshold:
        return ConstantThreshold(_SHARE * jnp.maximum(state.median, _FLOOR * state.largest))

    def observe(state: AutoState, norms: jax.Array, counts: jax.Array) -> AutoState:
        # A zero gradient is never clipped, so it says nothing about the threshold.
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
    """Count the norms nearest to each power of 2^(1/32), in multiples of the unit."""
    octaves = jnp.log2(norms) - jnp.log2(unit) + _OCTAVES_BELOW
    # Rounded to the nearest bin, so that the unit is not at the edge of a bin.
    bins = jnp.clip(jnp.round(octaves * _BINS_PER_OCTAVE), 0, _NUM_BINS - 1).astype(int)
    return jnp.bincount(bins, weights=counts.astype(norms.dtype), length=_NUM_BINS)


def _median(counts: jax.Array) -> jax.Array:
    up_to = jnp.cumsum(counts)
    found = jnp.sum(up_to < up_to[-1] / 2)
    return jnp.exp2(found / _BINS_PER_OCTAVE - _OCTAVES_BELOW)
