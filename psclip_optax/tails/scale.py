"""Estimate the scale of norms: the root of their raw moment of an order below the tail index."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from psclip_optax.tails.index import TailIndex, tail_index_of
from psclip_optax.tails.intervals import normal_quantile
from psclip_optax.tails.norms import as_norms
from psclip_optax.tails.printing import table, with_interval
from psclip_optax.thresholds import check_number


@dataclasses.dataclass(frozen=True)
class MomentScale:
    """Holds the scale σ̂ = (mean ‖g‖^p)^{1/p}; `print` shows it in words.

    Attributes:
      value: σ̂, in the units of the norms.
      lower: lower end of the interval of σ = (E ‖g‖^p)^{1/p}.
      upper: upper end; ∞ if the moment of order p may be infinite.
      p: the order.
      confidence: that of the interval.
      method: "normal" if the variance of ‖g‖^p is finite, else "tail".
    """

    value: float
    lower: float
    upper: float
    p: float
    confidence: float
    method: Literal["normal", "tail"]

    def __str__(self) -> str:
        return table(scale_rows(self))


def moment_scale(norms: npt.ArrayLike, p: float, *, confidence: float = 0.95) -> MomentScale:
    r"""Measures the raw-moment scale $\hat\sigma = (\frac1n \sum_k \|g_k\|^p)^{1/p}$.

    If the tail is light or the interval of the index is above 2p, ‖g‖^p has a finite variance, and
    the interval is that of the central limit theorem. Otherwise that theorem, like resampling,
    misses the rare large norms that dominate the moment. Each end of the interval is then the sum
    of two parts: the mean below the k-th largest norm, and above it the moment of a power law whose
    index is an end of the index's interval. If that interval extends down to p, the moment may be
    infinite, and the upper end is ∞.

    Args:
      norms: as for `hill_estimator`; zeros count.
      p: the order, a finite number > 0.
      confidence: that of the two-sided interval, in (0, 1).

    Returns:
      σ̂, in the units of the norms, with its interval.

    Raises:
      TypeError: norms are traced or not real.
      ValueError: norms of another shape, too few, negative, not finite or, the largest, all equal;
        p or confidence out of range.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> norms = np.linspace(0, 1, 5000, endpoint=False)[1:] ** (-1 / 3)  # of tail index 3
      >>> print(psc.tails.moment_scale(norms, p=1))  # 3 / 2 is the truth
      scale σ(p)  1.5 (95%: 1.48 to 1.52), p = 1
      >>> print(psc.tails.moment_scale(norms, p=3))  # infinite in truth
      scale σ(p)  2.09 (95%: 2.09 to ∞), p = 3

    References:
      Johansson, Estimating the Mean of Heavy-Tailed Distributions, Extremes 6, 2003 (the mean of
      the body and that of the fitted tail).
    """
    values = as_norms(norms)
    check_number("moment_scale", "p", p, lowest=0, open_ends=(True, True))
    return moment_scale_of(values, float(p), tail_index_of(values, confidence))


def moment_scale_of(norms: np.ndarray, p: float, tail: TailIndex) -> MomentScale:
    # Relative to the largest norm, so that no power overflows.
    largest = norms.max()
    powers = (norms / largest) ** p
    is_normal = tail.is_light or tail.lower > 2 * p
    mean = powers.mean()
    lower, upper = _mean_by_normal(powers, tail) if is_normal else _mean_by_tail(powers, p, tail)
    # The interval from the tail may not contain the plain mean.
    moments = np.array([mean, min(max(lower, 0.0), mean), max(upper, mean)])
    value, low, high = map(float, largest * moments ** (1 / p))
    return MomentScale(value, low, high, p, tail.confidence, "normal" if is_normal else "tail")


def _mean_by_normal(powers: np.ndarray, tail: TailIndex) -> tuple[float, float]:
    error = normal_quantile(tail.confidence) * float(powers.std()) / math.sqrt(len(powers))
    mean = float(powers.mean())
    return mean - error, mean + error


def _mean_by_tail(powers: np.ndarray, p: float, tail: TailIndex) -> tuple[float, float]:
    start = float(np.partition(powers, -tail.k - 1)[-tail.k - 1])
    body = float(np.mean(powers, where=powers <= start)) * float(np.mean(powers <= start))
    of_bounded = _mean_by_normal(np.minimum(powers, start), tail)
    error = (of_bounded[1] - of_bounded[0]) / 2

    def of_tail(index: float) -> float:
        if index <= p:
            return math.inf
        return float(np.mean(powers > start)) * start * index / (index - p)

    return body - error + of_tail(tail.upper), body + error + of_tail(tail.lower)


def scale_rows(scale: MomentScale) -> list[tuple[str, str]]:
    interval = with_interval(scale.value, scale.lower, scale.upper, scale.confidence)
    return [("scale σ(p)", f"{interval}, p = {scale.p:.3g}")]
