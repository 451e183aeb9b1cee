"""Estimate the tail index, and decide whether the tail is a power law at all."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy

from psclip_optax.tails.hill import choose_k_of
from psclip_optax.tails.intervals import around, quantile_despite_bias
from psclip_optax.tails.norms import as_norms, mean_spacing, spacings_of_upper_half, without_zeros
from psclip_optax.tails.printing import table, with_interval

Verdict: TypeAlias = Literal["heavy", "light", "undecided"]

_BIAS_IN_STANDARD_ERRORS = 0.5
# "Substantial" evidence is a likelihood ratio of about 3 (Kass and Raftery 1995).
_SUBSTANTIAL_EVIDENCE = math.log(3)
# The power for log-normal tails; tails that decay as exp(-x^c) have -1.
_LIGHTEST_POWER = -0.5
# Without a bound the likelihood has no maximum if all but a few of the norms are equal.
_STEEPEST = 50.0
_REASONS: dict[Verdict, str] = {
    "heavy": "a power law is more likely than a light tail",
    "light": "no finite index; a light tail is more likely than a power law",
    "undecided": "a light tail is about as likely as a power law",
}


@dataclasses.dataclass(frozen=True)
class TailIndex:
    """Holds a tail index, its interval and a verdict; `print` shows them in words.

    Attributes:
      index: the tail index a; ∞ for a light tail.
      lower: lower end of its interval.
      upper: upper end; ∞ for a light tail.
      k: how many of the largest norms Hill's estimator used.
      num_norms: the number of norms.
      confidence: that of the interval.
      verdict: "heavy", "light", or "undecided" if both fit; the index is then valid if the tail is
        heavy.
      log_likelihood_ratio: the log-likelihood ratio of a power law to a light tail.
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
        """Tells whether the tail decays faster than any power, as a Gaussian or log-normal does."""
        return self.verdict == "light"

    def __str__(self) -> str:
        return table(tail_rows(self))


def tail_index(norms: npt.ArrayLike, *, confidence: float = 0.95) -> TailIndex:
    """Measures how heavy the tail is: index, interval, and whether it is a power law at all.

    The index and the interval are Hill's with the k of `choose_k`. The interval allows for a bias
    of half a standard error, as fixed-length intervals for biased estimates do. A likelihood ratio
    decides whether the tail is a power law, from the normalised log-spacings of the upper half of
    the norms. Far out in a power law their mean is constant, up to a term linear in j / n. In a
    light tail (log-normal, Gaussian, exponential or Weibull) it falls as a power of log(n / j) with
    exponent -1/2 or less. The verdict is the hypothesis that is at least three times as likely as
    the other.

    A light-tailed mixture of very different scales can be mistaken for heavy. With few samples, a
    log-normal can be mistaken for heavy too, and a power law of index 2 or 3 for light.

    Args:
      norms: as for `hill_estimator`: norms before clipping, e.g. `ClipStats.norms` of one or more
        batches without their padding.
      confidence: that of the two-sided interval, in (0, 1).

    Returns:
      The index with its interval and verdict. For a light tail the index is ∞, and its interval
      extends from the least index that fits these norms to ∞.

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
      Planning and Inference 141(1), 2011 (log-spacings of light tails; log-normals are halfway).
    """
    return tail_index_of(as_norms(norms), confidence)


def tail_index_of(norms: np.ndarray, confidence: float) -> TailIndex:
    spacings = spacings_of_upper_half(norms)
    k = choose_k_of(spacings)
    index = 1 / mean_spacing(spacings, k)
    critical = quantile_despite_bias(confidence, _BIAS_IN_STANDARD_ERRORS)
    lower, upper = map(float, around(index, k, critical))
    ratio = _heavy_to_light(spacings, len(without_zeros(norms)))
    verdict = _verdict(ratio)
    if verdict == "light":
        index = upper = math.inf
    return TailIndex(index, lower, upper, k, len(norms), confidence, verdict, ratio)


def _verdict(heavy_to_light: float) -> Verdict:
    if abs(heavy_to_light) < _SUBSTANTIAL_EVIDENCE:
        return "undecided"
    return "heavy" if heavy_to_light > 0 else "light"


def _heavy_to_light(spacings: np.ndarray, num_norms: int) -> float:
    """Computes the log-likelihood ratio of a power law to a light tail, two parameters each."""
    j = np.arange(1, len(spacings) + 1)
    relative = spacings / spacings.mean()
    heavy = _log_likelihood(relative, j / (len(j) + 1))
    light = _log_likelihood(relative, np.log(np.log(num_norms / (j - 0.5))), _LIGHTEST_POWER)
    return heavy - light


def _log_likelihood(
    values: np.ndarray, covariate: np.ndarray, largest_slope: float = math.inf
) -> float:
    """Maximises the likelihood of exponential values whose log-mean is linear in a covariate."""
    centred = covariate - covariate.mean()

    def intercept(slope: float) -> float:
        """Finds the most likely intercept for a slope; it is convex in the slope."""
        return math.log(np.mean(values * np.exp(-slope * centred)))

    best = scipy.optimize.minimize_scalar(intercept, bounds=(-_STEEPEST, _STEEPEST)).x
    return -len(values) * (1 + intercept(min(best, largest_slope)))


def tail_rows(tail: TailIndex) -> list[tuple[str, str]]:
    reason = f"{_REASONS[tail.verdict]} (log-likelihood ratio {tail.log_likelihood_ratio:.1f})"
    interval = with_interval(tail.index, tail.lower, tail.upper, tail.confidence)
    return [
        ("tail of", f"{tail.num_norms:,} norms"),
        ("verdict", f"{tail.verdict}: {reason}"),
        ("tail index", f"{interval}, Hill's estimator on the top k = {tail.k}"),
    ]
