"""Estimate a tail index by Hill, and choose how many of the largest norms to use."""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import numpy.typing as npt

from psclip_optax.tails.intervals import around, normal_quantile
from psclip_optax.tails.norms import (
    MIN_K,
    as_norms,
    log_spacings,
    mean_spacing,
    spacings_of_upper_half,
    without_zeros,
)

# Guillou and Hall's diagnostic responds where the power law visibly ends. There the bias is several
# standard errors. With a tenth of the order statistics it is below half a standard error for the
# distributions of benchmarks/theory/tail_index.py, and the interval allows for that much.
_SMALLEST_DIAGNOSED_K = 30
_CRITICAL_TREND = 2.0
_WINDOW = (0.25, 1.75)
_UNDERSMOOTHING = 10


@dataclasses.dataclass(frozen=True)
class HillEstimate:
    """Hill's estimate of a tail index from the k largest norms.

    Attributes:
      index: the estimate of the tail index a.
      lower: lower end of its interval, which covers only sampling noise.
      upper: upper end.
      k: how many of the largest norms were used.
    """

    index: float
    lower: float
    upper: float
    k: int


@dataclasses.dataclass(frozen=True, eq=False)
class HillPlot:
    """Hill's estimate against the number of order statistics, for a figure.

    Attributes:
      k: int [m], 1, …, m: the number of largest norms.
      index: float [m], the estimate; ∞ while the k + 1 largest norms are equal.
      lower: float [m], lower ends of the pointwise intervals, which cover only sampling noise.
      upper: float [m], upper ends.
    """

    k: np.ndarray
    index: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def hill_estimator(norms: npt.ArrayLike, k: int, *, confidence: float = 0.95) -> HillEstimate:
    r"""Computes Hill's estimate of the tail index from a given number of the largest norms.

    $$\hat a = \left( \frac1k \sum_{j=1}^k \log X_{(j)} - \log X_{(k+1)} \right)^{-1}$$

    with $X_{(1)} \ge X_{(2)} \ge \dots$. Its interval covers only sampling noise: if k is too
    large, it misses the true index. `tail_index` chooses k and allows for the bias.

    Args:
      norms: real [n], n ≥ 500, finite and ≥ 0; any dtype, computed in float64. Zeros do not count.
      k: how many of the largest norms to use, at least 1 and less than the number of positive ones.
      confidence: that of the two-sided interval, in (0, 1).

    Returns:
      The estimate, its interval and k.

    Raises:
      TypeError: norms are traced or not real, or k is not an integer.
      ValueError: norms of another shape, too few, negative, not finite or, the k + 1 largest, all
        equal; k or confidence out of range.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> norms = np.linspace(0, 1, 2000, endpoint=False)[1:] ** (-1 / 1.5)  # of tail index 1.5
      >>> estimate = psc.tails.hill_estimator(norms, k=400)
      >>> f"{estimate.index:.2f} ({estimate.lower:.2f} to {estimate.upper:.2f})"
      '1.51 (1.37 to 1.67)'

    References:
      Hill, A Simple General Approach to Inference About the Tail of a Distribution, Annals of
      Statistics 3(5), 1975.
    """
    positive = without_zeros(as_norms(norms))
    try:
        k = operator.index(k)
    except TypeError as error:
        raise TypeError(f"hill_estimator expects an int as `k`, got {k!r}") from error
    if not 1 <= k < len(positive):
        raise ValueError(
            f"hill_estimator expects 1 ≤ k < {len(positive)}, the number of positive norms, got {k}"
        )
    index = 1 / mean_spacing(log_spacings(positive, k), k)
    lower, upper = map(float, around(index, k, normal_quantile(confidence)))
    return HillEstimate(index, lower, upper, k)


def hill_plot(norms: npt.ArrayLike, *, confidence: float = 0.95) -> HillPlot:
    """Computes Hill's estimate of the tail index for every k up to half of the norms.

    For a power law the curve has a level stretch that begins at small k. If it has none, or keeps
    falling to the left, there is no index.

    Args:
      norms: as for `hill_estimator`.
      confidence: that of each interval, in (0, 1).

    Returns:
      Arrays of shape [m], where m is half the number of positive norms.

    Raises:
      TypeError: norms are traced or not real.
      ValueError: norms of another shape, too few, negative, not finite or, the largest, all equal;
        confidence out of range.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> norms = np.linspace(0, 1, 2000, endpoint=False)[1:] ** (-1 / 1.5)  # of tail index 1.5
      >>> plot = psc.tails.hill_plot(norms)
      >>> plot.index[[99, 399, 998]].round(2)
      array([1.53, 1.51, 1.51])

    References:
      Drees, de Haan and Resnick, How to Make a Hill Plot, Annals of Statistics 28(1), 2000.
    """
    means = _hill_means(spacings_of_upper_half(as_norms(norms)))
    k = np.arange(1, len(means) + 1)
    with np.errstate(divide="ignore"):
        index = 1 / means
    return HillPlot(k, index, *around(index, k, normal_quantile(confidence)))


def choose_k(norms: npt.ArrayLike) -> int:
    """Chooses how many of the largest norms to use for a tail index.

    Among the k largest norms of a power law the normalised log-spacings j log(X_(j) / X_(j+1)),
    j = 1, …, k, are independent and identically distributed. Guillou and Hall's diagnostic is their
    standardised trend, smoothed over k. The power law ends at the smallest k where the diagnostic
    exceeds 2. For the best coverage, an interval around Hill's estimate needs fewer order
    statistics than for the least mean-square error (Cheng and Peng). So a tenth of them is used,
    but at least 25.

    Args:
      norms: as for `hill_estimator`.

    Returns:
      k, at least 25.

    Raises:
      TypeError: norms are traced or not real.
      ValueError: norms of another shape, too few, negative, not finite or, the largest, all equal.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> psc.tails.choose_k(np.linspace(0, 1, 2000, endpoint=False)[1:] ** (-1 / 1.5))
      99

    References:
      Guillou and Hall, A Diagnostic for Selecting the Threshold in Extreme Value Analysis, Journal
      of the Royal Statistical Society B 63(2), 2001 (T_k and Q_k, here over a window of ±3k/4).

      Cheng and Peng, Confidence Intervals for the Tail Index, Bernoulli 7(5), 2001.
    """
    return choose_k_of(spacings_of_upper_half(as_norms(norms)))


def choose_k_of(spacings: np.ndarray) -> int:
    trends = _mean_over_window(_squared_trends(spacings)) > _CRITICAL_TREND**2
    trends[: _SMALLEST_DIAGNOSED_K - 1] = False
    end_of_power_law = int(np.argmax(trends)) + 1 if trends.any() else len(spacings)
    return max(MIN_K, end_of_power_law // _UNDERSMOOTHING)


def _squared_trends(spacings: np.ndarray) -> np.ndarray:
    """Computes T_k², the squared standardised slope of the first k spacings; χ²_1 without one."""
    k = np.arange(1, len(spacings) + 1)
    slopes = np.cumsum(k * spacings) - (k + 1) / 2 * np.cumsum(spacings)
    variances = k * (k**2 - 1.0) / 12 * _hill_means(spacings) ** 2
    return slopes**2 / np.maximum(variances, np.finfo(np.float64).tiny)


def _mean_over_window(values: np.ndarray) -> np.ndarray:
    k = np.arange(1, len(values) + 1)
    first = np.maximum((_WINDOW[0] * k).astype(int), 1) - 1
    last = np.minimum((_WINDOW[1] * k).astype(int), len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last] - sums[first]) / (last - first)


def _hill_means(spacings: np.ndarray) -> np.ndarray:
    return np.cumsum(spacings) / np.arange(1, len(spacings) + 1)
