"""Defines distributions of positive norms with known tails, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Sampler: TypeAlias = Callable[[np.random.Generator, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Law:
    """A distribution of norms.

    Attributes:
      index: the tail index; ∞ for a light tail.
      sample: a function that draws n norms.
      moment: E ‖g‖^p for an order p below the index; None if there is no formula.
    """

    index: float
    sample: Sampler
    moment: Callable[[float], float] | None = None


def pareto(index: float) -> Law:
    return Law(
        index,
        lambda rng, n: (1 - rng.uniform(size=n)) ** (-1 / index),
        lambda p: index / (index - p),
    )


def student(df: float, dimensions: int = 1) -> Law:
    """Builds the law of a multivariate Student-t's norm; in one dimension |t|."""

    def moment(p: float) -> float:
        of_gaussian = _chi_moment(p, dimensions)
        log_of_mixing = math.lgamma((df - p) / 2) - math.lgamma(df / 2)
        return of_gaussian * (df / 2) ** (p / 2) * math.exp(log_of_mixing)

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.sqrt(rng.chisquare(dimensions, n) / (rng.chisquare(df, n) / df))

    return Law(df, sample, moment)


def stable(index: float) -> Law:
    """Builds the law of |X|, X symmetric stable of scale 1, by Chambers, Mallows and Stuck."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        angle = rng.uniform(-np.pi / 2, np.pi / 2, n)
        ratio = np.cos((1 - index) * angle) / rng.exponential(size=n)
        values = np.sin(index * angle) / np.cos(angle) ** (1 / index)
        return np.abs(values * ratio ** ((1 - index) / index))

    def moment(p: float) -> float:
        of_signs = 2**p * math.gamma((1 + p) / 2) / (math.sqrt(math.pi) * math.gamma(1 - p / 2))
        return of_signs * math.gamma(1 - p / index)

    return Law(index, sample, moment)


def contaminated(index: float, share: float) -> Law:
    """Builds a half-normal law with a share of large norms from a power law."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        large = 3 * np.abs(rng.standard_t(index, n))
        return np.where(rng.uniform(size=n) < share, large, np.abs(rng.standard_normal(n)))

    return Law(index, sample)


def chi(dimensions: int) -> Law:
    """Builds the law of a standard Gaussian's norm; in one dimension |N(0, 1)|."""
    return Law(
        math.inf,
        lambda rng, n: np.sqrt(rng.chisquare(dimensions, n)),
        lambda p: _chi_moment(p, dimensions),
    )


def _chi_moment(p: float, dimensions: int) -> float:
    return 2 ** (p / 2) * math.exp(math.lgamma((dimensions + p) / 2) - math.lgamma(dimensions / 2))


def log_normal(sigma: float) -> Law:
    return Law(
        math.inf,
        lambda rng, n: np.exp(sigma * rng.standard_normal(n)),
        lambda p: math.exp((sigma * p) ** 2 / 2),
    )


def exponential() -> Law:
    return Law(math.inf, lambda rng, n: rng.exponential(size=n), lambda p: math.gamma(1 + p))


def log_normal_mixture(sigmas: tuple[float, float], share: float) -> Law:
    """Builds a mixture of two log-normals, with the second σ for the given share."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        sigma = np.where(rng.uniform(size=n) < share, sigmas[1], sigmas[0])
        return np.exp(sigma * rng.standard_normal(n))

    return Law(math.inf, sample)


POWER_LAWS = {
    **{f"Pareto {a:g}": pareto(a) for a in (1.2, 1.5, 2, 3)},
    **{f"Student-t {df:g}": student(df) for df in (1.3, 1.5, 2, 3)},
    **{f"stable {a:g}": stable(a) for a in (1.1, 1.3, 1.5)},
    "Student-t 1.5, 100 dimensions": student(1.5, 100),
    "5% Student-t 1.5 in Gaussian": contaminated(1.5, 0.05),
}
LIGHT_LAWS = {
    "log-normal σ = 1": log_normal(1.0),
    "log-normal σ = 0.5": log_normal(0.5),
    "|N(0, 1)|": chi(1),
    "‖N(0, I)‖, 10 dimensions": chi(10),
    "‖N(0, I)‖, 1,000 dimensions": chi(1000),
    "exponential": exponential(),
    "log-normal, 30% σ = 1, else 0.4": log_normal_mixture((0.4, 1.0), 0.3),
}
LAWS = POWER_LAWS | LIGHT_LAWS
