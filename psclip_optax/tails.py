"""How heavy is the gradient noise: tail index, scale, and thresholds from them.

The clipped mean is made for norms whose tail is a power law, P(‖g‖ > x) ~ x^{-a}: moments of an
order below the tail index a are finite, those above it are not. Everything here looks at concrete
norms, in NumPy float64 on the host, outside of `jax.jit`: estimates of a tail need sorting, choices
that depend on the data, and more samples than one batch may have.

The interval of an index holds sampling noise *and* the bias that comes from a tail that is a power
law only far out; `python -m benchmarks.tail_index` measures how often it holds the truth.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import statistics
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from psclip_optax.arrays import described
from psclip_optax.thresholds import GrowingThreshold, check_number, concrete

Verdict: TypeAlias = Literal["heavy", "light", "undecided"]

MIN_NORMS = 500
_MIN_K = 25
# Guillou and Hall's diagnostic speaks where the power law visibly ends. There the bias is several
# standard errors; with a tenth of the order statistics it falls below one half in the laws of
# benchmarks/tail_index.py, which is what the interval allows for.
_SMALLEST_DIAGNOSED_K = 30
_CRITICAL_TREND = 2.0
_WINDOW = (0.25, 1.75)
_UNDERSMOOTHING = 10
_BIAS_IN_STANDARD_ERRORS = 0.5
# "Substantial" evidence is a likelihood ratio of about 3 (Kass and Raftery 1995).
_SUBSTANTIAL_EVIDENCE = math.log(3)
# Of log-normal tails; those that decay as exp(-x^c) have -1.
_LIGHTEST_POWER = -0.5
_SMALLEST_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class HillEstimate:
    """Hill's estimate of a tail index from the k largest norms.

    Attributes:
      index: the estimate of the tail index a.
      lower: lower end of its interval, for sampling noise alone.
      upper: upper end.
      k: how many of the largest norms it was taken from.
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
      lower: float [m], lower ends of the intervals, for sampling noise alone, each for itself.
      upper: float [m], upper ends.
    """

    k: np.ndarray
    index: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclasses.dataclass(frozen=True)
class TailIndex:
    """How heavy a tail is; `print` shows it in words.

    Attributes:
      index: the tail index a; ∞ where the tail is light.
      lower: lower end of its interval.
      upper: upper end; ∞ where the tail is light.
      k: how many of the largest norms Hill's estimator took.
      num_norms: how many norms there were.
      confidence: of the interval.
      verdict: "heavy", "light", or "undecided" where both fit and the index holds if it is heavy.
      log_likelihood_ratio: of a power law to a light tail.
    """

    index: float
    lower: float
    upper: float
    k: int
    num_norms: int
    confidence: float
    verdict: Verdict
    log_likelihood_ratio: float

    @property
    def is_light(self) -> bool:
        """Whether the tail decays faster than any power, as of Gaussians and log-normals."""
        return self.verdict == "light"

    def __str__(self) -> str:
        return _table(_tail_rows(self))


@dataclasses.dataclass(frozen=True)
class MomentScale:
    """The scale σ̂ = (mean ‖g‖^p)^{1/p}; `print` shows it in words.

    Attributes:
      value: σ̂, in the units of the norms.
      lower: lower end of the interval of σ = (E ‖g‖^p)^{1/p}.
      upper: upper end; ∞ where the moment of order p may be infinite.
      p: the order.
      confidence: of the interval.
      method: "normal" where the variance of ‖g‖^p is finite, else "tail".
    """

    value: float
    lower: float
    upper: float
    p: float
    confidence: float
    method: Literal["normal", "tail"]

    def __str__(self) -> str:
        return _table(_scale_rows(self))


@dataclasses.dataclass(frozen=True)
class SuggestedThreshold:
    """α and β from observed norms; `print` shows what they rest on.

    Attributes:
      tail: how heavy the tail is.
      scale: σ̂ of the order p that the tail allows.
    """

    tail: TailIndex
    scale: MomentScale

    @property
    def alpha(self) -> float:
        """α = σ̂(p), in the units of the norms."""
        return self.scale.value

    @property
    def alpha_interval(self) -> tuple[float, float]:
        """Of σ(p) at this p."""
        return self.scale.lower, self.scale.upper

    @property
    def beta(self) -> float:
        """β = p, in [1, 2]."""
        return self.scale.p

    @property
    def beta_interval(self) -> tuple[float, float]:
        """What β would be at either end of the index's interval."""
        tail = self.tail
        return _order_below(tail.lower, tail.k), _order_below(tail.upper, tail.k)

    @property
    def threshold(self) -> GrowingThreshold:
        """`psc.growing_threshold(alpha, beta)`."""
        return GrowingThreshold(self.alpha, self.beta)

    def __str__(self) -> str:
        rows = [
            *_tail_rows(self.tail),
            *_scale_rows(self.scale),
            ("α", _with_interval(self.alpha, *self.alpha_interval)),
            ("β", _with_interval(self.beta, *self.beta_interval)),
        ]
        write = f"psc.growing_threshold(alpha={self.alpha:.3g}, beta={self.beta:.3g})"
        return "\n".join([_table(rows), *_warnings(self), write])


def hill_estimator(norms: Any, k: int, *, confidence: float = 0.95) -> HillEstimate:
    r"""Hill's estimate of the tail index from a given number of the largest norms.

    $$\hat a = \Big( \frac1k \sum_{j=1}^k \log X_{(j)} - \log X_{(k+1)} \Big)^{-1}$$

    with $X_{(1)} \ge X_{(2)} \ge \dots$. Its interval knows of sampling noise alone: where k
    is too large, it lies beside the truth. `tail_index` chooses k and allows for that.

    Args:
      norms: real [n], n ≥ 500, finite and ≥ 0; any dtype, computed in float64. Zeros do not count.
      k: how many of the largest norms, at least 1 and less than the number of positive ones.
      confidence: of the two-sided interval, in (0, 1).

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
    positive = _positive(_as_norms(norms))
    try:
        k = operator.index(k)
    except TypeError as error:
        raise TypeError(f"hill_estimator expects an int as `k`, got {k!r}") from error
    if not 1 <= k < len(positive):
        raise ValueError(
            f"hill_estimator expects 1 ≤ k < {len(positive)}, the number of positive norms, got {k}"
        )
    index = 1 / _mean_spacing(_log_spacings(positive, k), k)
    lower, upper = map(float, _around(index, k, _normal_quantile(confidence)))
    return HillEstimate(index, lower, upper, k)


def hill_plot(norms: Any, *, confidence: float = 0.95) -> HillPlot:
    """Hill's estimate for every number of order statistics up to half of the norms.

    A power law shows as a level stretch that begins at small k; there is no index to read off
    where the curve keeps falling to the left or has no level.

    Args:
      norms: as of `hill_estimator`.
      confidence: of each interval, in (0, 1).

    Returns:
      Arrays of shape [m], m half the number of positive norms.

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
    means = _hill_means(_spacings_of_upper_half(_as_norms(norms)))
    k = np.arange(1, len(means) + 1)
    with np.errstate(divide="ignore"):
        index = 1 / means
    return HillPlot(k, index, *_around(index, k, _normal_quantile(confidence)))


def choose_k(norms: Any) -> int:
    """How many of the largest norms to estimate a tail index from.

    Among the k largest norms of a power law the normalised log-spacings j log(X_(j) / X_(j+1)),
    j = 1, …, k, are independent and alike. Guillou and Hall's diagnostic is the standardised trend
    in them, smoothed over k; the power law ends at the smallest k where that exceeds 2. An interval
    around Hill's estimate covers best with fewer order statistics than its mean-square error asks
    for (Cheng and Peng), so a tenth of them is taken, and at least 25.

    Args:
      norms: as of `hill_estimator`.

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
    return _choose_k(_spacings_of_upper_half(_as_norms(norms)))


def tail_index(norms: Any, *, confidence: float = 0.95) -> TailIndex:
    """How heavy the tail is: index, interval, and whether it is a power law at all.

    Index and interval are Hill's with the k of `choose_k`; the interval allows for a bias of half a
    standard error, as intervals of fixed length for biased estimates do. Whether there is a power
    law is decided by likelihood: the mean of the normalised log-spacings of the upper half of the
    norms is constant far out in a power law, up to a term linear in j / n, and falls as
    a power -1/2 or less of log(n / j) in a light tail: as of log-normals, Gaussians, exponentials
    and Weibull laws. Where either is three times as likely as the other, that is the verdict.

    A light mixture of very different scales can pass for heavy, and with few samples a log-normal
    for a power law or a power law of index 2 or 3 for a light tail.

    Args:
      norms: as of `hill_estimator`, e.g. `ClipStats.norms` of one or more batches, without those
        of padding; norms before clipping.
      confidence: of the two-sided interval, in (0, 1).

    Returns:
      The index with its interval and verdict; of a light tail the index is ∞, and its interval
      runs from the least index that these norms speak for to ∞.

    Raises:
      TypeError: norms are traced or not real.
      ValueError: norms of another shape, too few, negative, not finite or, the largest, all equal;
        confidence out of range.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> norms = np.linspace(0, 1, 5000, endpoint=False)[1:] ** (-1 / 1.5)  # of tail index 1.5
      >>> print(psc.tails.tail_index(norms))
      tail of     4,999 norms
      verdict     heavy: a power law is more likely than a light tail (log-likelihood ratio ...)
      tail index  1.52 (95%: 1.32 to 1.74), Hill's estimator on the top k = 249

    References:
      Armstrong and Kolesár, Simple and Honest Confidence Intervals in Nonparametric Regression,
      Quantitative Economics 11(1), 2020 (critical values that allow for bias).

      Feuerverger and Hall, Estimating a Tail Exponent by Modelling Departure from a Pareto
      Distribution, Annals of Statistics 27(2), 1999 (log-spacings of a power law).

      Gardes, Girard and Guillou, Weibull Tail-Distributions Revisited, Journal of Statistical
      Planning and Inference 141(1), 2011 (log-spacings of light tails; log-normals lie half way).
    """
    return _tail_index(_as_norms(norms), confidence)


def moment_scale(norms: Any, p: float, *, confidence: float = 0.95) -> MomentScale:
    r"""The raw-moment scale $\hat\sigma = (\frac1n \sum_k \|g_k\|^p)^{1/p}$.

    Its interval is the central limit theorem's where the tail is light or the index's interval lies
    above 2p, so that ‖g‖^p has a variance. Else that theorem, and resampling likewise, misses the
    rare large norms that make the moment, and the interval is taken apart: the mean below the k-th
    largest norm, and above it the moment of a power law with either end of the index's interval.
    Where that reaches down to p the moment may be infinite, and so is the upper end.

    Args:
      norms: as of `hill_estimator`; zeros count.
      p: the order, a finite number > 0.
      confidence: of the two-sided interval, in (0, 1).

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
    values = _as_norms(norms)
    check_number("moment_scale", "p", p, lowest=0, open_ends=(True, True))
    return _moment_scale(values, float(p), _tail_index(values, confidence))


def suggest_threshold(norms: Any, *, confidence: float = 0.95) -> SuggestedThreshold:
    """α and β for `psc.growing_threshold` from the norms of per-sample gradients.

    β = p is a little under the tail index, by a tenth or by a standard error of it, whichever is
    more, and in [1, 2]; α = σ̂(p) of the raw moment, so that a large mean gradient raises it. A
    starting point for tuning: the intervals tell how far the norms determine it.

    Args:
      norms: as of `tail_index`.
      confidence: of the intervals, in (0, 1).

    Returns:
      A result to print, with `alpha`, `beta`, their intervals, and `threshold`, the
      `psc.growing_threshold` itself.

    Raises:
      TypeError: norms are traced or not real.
      ValueError: norms of another shape, too few, negative, not finite or, the largest, all equal;
        confidence out of range.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> norms = np.linspace(0, 1, 5000, endpoint=False)[1:] ** (-1 / 1.5)  # of tail index 1.5
      >>> suggestion = psc.tails.suggest_threshold(norms)
      >>> print(suggestion)
      tail of     4,999 norms
      verdict     heavy: a power law is more likely than a light tail (log-likelihood ratio ...)
      tail index  1.52 (95%: 1.32 to 1.74), Hill's estimator on the top k = 249
      scale σ(p)  3.81 (95%: 3.74 to ∞), p = 1.36
      α           3.81 (3.74 to ∞)
      β           1.36 (1.19 to 1.57)
      The index may be below p: then σ is infinite, and σ̂ grows with the number of norms.
      psc.growing_threshold(alpha=3.81, beta=1.36)
      >>> suggestion.threshold(np.arange(1, 3))
      Array([3.81..., 6.33...], dtype=float32)

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026 (α = σ and β = p).
    """
    values = _as_norms(norms)
    tail = _tail_index(values, confidence)
    return SuggestedThreshold(tail, _moment_scale(values, _order_below(tail.index, tail.k), tail))


def _as_norms(norms: Any) -> np.ndarray:
    expected = "psc.tails expects norms of a real dtype and shape [n], one a sample"
    try:
        known = concrete(norms)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}, got {described(norms)}") from error
    if known is None:
        raise TypeError(
            "psc.tails looks at concrete norms, on the host, but got traced ones; return the norms "
            "from the jitted function (ClipStats.norms) and call psc.tails outside of it"
        )
    came = f"{known.dtype}{list(known.shape)}"
    if not (jnp.issubdtype(known.dtype, jnp.floating) or jnp.issubdtype(known.dtype, jnp.integer)):
        raise TypeError(f"{expected}, got {came}")
    if known.ndim != 1:
        raise ValueError(
            f"{expected}, got {came}; those of several batches go into one array by norms.ravel() "
            "or jnp.concatenate"
        )
    values = known.astype(np.float64)
    num_nonfinite = np.count_nonzero(~np.isfinite(values))
    if num_nonfinite:
        raise ValueError(
            f"psc.tails expects finite norms, but {num_nonfinite} of {len(values)} are NaN or "
            "infinite; look at where they come from, or leave them out by norms[isfinite(norms)]"
        )
    if (values < 0).any():
        raise ValueError(
            f"psc.tails expects norms ≥ 0, but {np.count_nonzero(values < 0)} of {len(values)} are "
            f"negative, the least {values.min():g}; of signed values pass the absolute ones"
        )
    if np.count_nonzero(values) < MIN_NORMS:
        raise ValueError(
            f"psc.tails needs at least {MIN_NORMS} positive norms for an interval that can be "
            f"trusted, got {np.count_nonzero(values)} in {came}; gather those of several batches"
        )
    return values


def _positive(norms: np.ndarray) -> np.ndarray:
    return norms[norms > 0]


def _log_spacings(positive: np.ndarray, k: int) -> np.ndarray:
    """The first k of j log(X_(j) / X_(j+1)): exponential and of mean 1 / a in a power law."""
    largest = np.sort(np.log(np.partition(positive, -k - 1)[-k - 1 :]))[::-1]
    return np.arange(1, k + 1) * -np.diff(largest)


def _spacings_of_upper_half(norms: np.ndarray) -> np.ndarray:
    positive = _positive(norms)
    spacings = _log_spacings(positive, len(positive) // 2)
    _mean_spacing(spacings, _MIN_K)
    return spacings


def _mean_spacing(spacings: np.ndarray, k: int) -> float:
    mean = float(spacings[:k].mean())
    if mean == 0:
        raise ValueError(
            f"the {k + 1} largest norms are equal, so that they have no tail to estimate; pass the "
            "norms before clipping, in a dtype in which they do not saturate"
        )
    return mean


def _hill_means(spacings: np.ndarray) -> np.ndarray:
    return np.cumsum(spacings) / np.arange(1, len(spacings) + 1)


def _choose_k(spacings: np.ndarray) -> int:
    trends = _mean_over_window(_squared_trends(spacings)) > _CRITICAL_TREND**2
    trends[: _SMALLEST_DIAGNOSED_K - 1] = False
    end_of_power_law = int(np.argmax(trends)) + 1 if trends.any() else len(spacings)
    return max(_MIN_K, end_of_power_law // _UNDERSMOOTHING)


def _squared_trends(spacings: np.ndarray) -> np.ndarray:
    """T_k², the squared standardised slope of the first k spacings, for each k; χ²_1 if level."""
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


def _tail_index(norms: np.ndarray, confidence: float) -> TailIndex:
    spacings = _spacings_of_upper_half(norms)
    k = _choose_k(spacings)
    index = 1 / _mean_spacing(spacings, k)
    critical = _quantile_despite_bias(confidence, _BIAS_IN_STANDARD_ERRORS)
    lower, upper = map(float, _around(index, k, critical))
    ratio = _heavy_to_light(spacings, len(_positive(norms)))
    verdict = _verdict(ratio)
    if verdict == "light":
        index = upper = math.inf
    return TailIndex(index, lower, upper, k, len(norms), confidence, verdict, ratio)


def _verdict(heavy_to_light: float) -> Verdict:
    if abs(heavy_to_light) < _SUBSTANTIAL_EVIDENCE:
        return "undecided"
    return "heavy" if heavy_to_light > 0 else "light"


def _heavy_to_light(spacings: np.ndarray, num_norms: int) -> float:
    """The log-likelihood ratio of a power law to a light tail, two parameters each."""
    j = np.arange(1, len(spacings) + 1)
    relative = spacings / spacings.mean()
    heavy = _log_likelihood(relative, j / (len(j) + 1))
    light = _log_likelihood(relative, np.log(np.log(num_norms / (j - 0.5))), _LIGHTEST_POWER)
    return heavy - light


def _log_likelihood(
    values: np.ndarray, covariate: np.ndarray, largest_slope: float = math.inf
) -> float:
    """Of exponential values whose log-mean is linear in a covariate, at its maximum."""
    centred = covariate - covariate.mean()
    slope = min(_slope(values, centred), largest_slope)
    # Of a given slope the most likely intercept is known.
    log_means = slope * centred + math.log(np.mean(values * np.exp(-slope * centred)))
    return -float(np.sum(log_means + values * np.exp(-log_means)))


def _slope(values: np.ndarray, centred: np.ndarray) -> float:
    """The most likely one, by Fisher scoring, whose steps are cut while they are long."""
    intercept = math.log(values.mean())
    slope = 0.0
    for _ in range(50):
        residuals = values * np.exp(-intercept - slope * centred) - 1
        steps = np.array([residuals.mean(), centred @ residuals / (centred @ centred)])
        steps /= max(1.0, np.abs(steps).max())
        intercept, slope = np.array([intercept, slope]) + steps
        if np.abs(steps).max() < 1e-9:
            break
    return float(slope)


def _moment_scale(norms: np.ndarray, p: float, tail: TailIndex) -> MomentScale:
    # Relative to the largest, so that no power overflows.
    largest = norms.max()
    powers = (norms / largest) ** p
    is_normal = tail.is_light or tail.lower > 2 * p
    mean = powers.mean()
    lower, upper = _mean_by_normal(powers, tail) if is_normal else _mean_by_tail(powers, p, tail)
    # The interval by the tail need not hold the plain mean.
    moments = np.array([mean, min(max(lower, 0.0), mean), max(upper, mean)])
    value, low, high = map(float, largest * moments ** (1 / p))
    return MomentScale(value, low, high, p, tail.confidence, "normal" if is_normal else "tail")


def _mean_by_normal(powers: np.ndarray, tail: TailIndex) -> tuple[float, float]:
    error = _normal_quantile(tail.confidence) * powers.std() / math.sqrt(len(powers))
    return powers.mean() - error, powers.mean() + error


def _mean_by_tail(powers: np.ndarray, p: float, tail: TailIndex) -> tuple[float, float]:
    start = np.partition(powers, -tail.k - 1)[-tail.k - 1]
    body = np.mean(powers, where=powers <= start) * np.mean(powers <= start)
    of_bounded = _mean_by_normal(np.minimum(powers, start), tail)
    error = (of_bounded[1] - of_bounded[0]) / 2

    def of_tail(index: float) -> float:
        if index <= p:
            return math.inf
        return np.mean(powers > start) * start * index / (index - p)

    return body - error + of_tail(tail.upper), body + error + of_tail(tail.lower)


def _order_below(index: float, k: int) -> float:
    margin = max(_SMALLEST_MARGIN, 1 / math.sqrt(k))
    return min(2.0, max(1.0, (1 - margin) * index))


def _around(index: Any, k: Any, critical: float) -> tuple[Any, Any]:
    """Its interval: log â is about normal, of variance 1 / k."""
    factor = np.exp(critical / np.sqrt(k))
    return index / factor, index * factor


def _normal_quantile(confidence: float) -> float:
    check_number("psc.tails", "confidence", confidence, lowest=0, highest=1, open_ends=(True, True))
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)


def _quantile_despite_bias(confidence: float, bias: float) -> float:
    """The c with P(|Z + bias| ≤ c) = confidence, Z standard normal."""
    cdf = statistics.NormalDist().cdf
    low = _normal_quantile(confidence)
    high = low + bias
    for _ in range(60):
        middle = (low + high) / 2
        covers = cdf(middle - bias) - cdf(-middle - bias) >= confidence
        low, high = (low, middle) if covers else (middle, high)
    return high


_REASONS: dict[Verdict, str] = {
    "heavy": "a power law is more likely than a light tail",
    "light": "no finite index; a light tail is more likely than a power law",
    "undecided": "a light tail is about as likely as a power law",
}


def _tail_rows(tail: TailIndex) -> list[tuple[str, str]]:
    reason = f"{_REASONS[tail.verdict]} (log-likelihood ratio {tail.log_likelihood_ratio:.1f})"
    interval = _with_interval(tail.index, tail.lower, tail.upper, tail.confidence)
    return [
        ("tail of", f"{tail.num_norms:,} norms"),
        ("verdict", f"{tail.verdict}: {reason}"),
        ("tail index", f"{interval}, Hill's estimator on the top k = {tail.k}"),
    ]


def _scale_rows(scale: MomentScale) -> list[tuple[str, str]]:
    interval = _with_interval(scale.value, scale.lower, scale.upper, scale.confidence)
    return [("scale σ(p)", f"{interval}, p = {scale.p:.3g}")]


def _with_interval(
    value: float, lower: float, upper: float, confidence: float | None = None
) -> str:
    share = "" if confidence is None else f"{100 * confidence:.4g}%: "
    value_, lower_, upper_ = ("∞" if math.isinf(x) else f"{x:.3g}" for x in (value, lower, upper))
    return f"{value_} ({share}{lower_} to {upper_})"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _warnings(suggestion: SuggestedThreshold) -> list[str]:
    warnings = {
        "The index may be below p: then σ is infinite, and σ̂ grows with the number of norms.": (
            math.isinf(suggestion.scale.upper)
        ),
        "The index may be 1 or less: then the gradient has no mean, and no threshold mends that.": (
            suggestion.tail.lower <= 1
        ),
    }
    return [text for text, applies in warnings.items() if applies]
