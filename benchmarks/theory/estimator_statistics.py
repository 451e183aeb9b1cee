"""Computes the statistics of `benchmarks.theory.estimator_error`, with their intervals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from benchmarks.theory.heavy_tails import (
    Errors,
)


def statistics_of(norms: np.ndarray) -> np.ndarray:
    """Computes RMS, median and 99% quantile of errors [estimators, trials]."""
    rms = np.sqrt(np.mean(np.square(norms), axis=1))
    return np.stack([rms, *np.quantile(norms, [0.5, 0.99], axis=1)])


def bootstrap(norms: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Computes the statistics of resampled trials, the same for all estimators: [replicates, …]."""
    trials = norms.shape[1]
    draws = (rng.integers(trials, size=trials) for _ in range(replicates))
    return np.stack([statistics_of(norms[:, chosen]) for chosen in draws])


def with_interval(value: Any, replicates: np.ndarray) -> list[float]:
    """Returns [value, low, high] with a two-sided 95% percentile interval."""
    low, high = np.quantile(replicates, [0.025, 0.975])
    return [float(value), float(low), float(high)]


def slope_weights(x: np.ndarray) -> np.ndarray:
    """Computes weights of the values at x whose sum is their least-squares slope over x."""
    centred = x - x.mean()
    return centred / np.sum(centred**2)


def log_slopes(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fits least-squares slopes of log values over x, along the first axis."""
    return np.tensordot(slope_weights(x), np.log(values), axes=1)


def against(interval: list[float], bound: float) -> str:
    _, low, high = interval
    return "below" if high < bound else "above" if low > bound else "contains"


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def signed_bias(along: np.ndarray) -> list[float]:
    mean, error = mean_and_error(along)
    return [mean, mean - 1.96 * error, mean + 1.96 * error]


def bias_slope(alongs: dict[int, np.ndarray]) -> list[float] | None:
    """Fits the slope of log |bias| over log n; None unless every bias differs from 0."""
    means, errors = np.array([mean_and_error(along) for along in alongs.values()]).T
    if np.any(np.abs(means) < 1.96 * errors):
        return None
    weights = slope_weights(np.log(list(alongs)))
    slope = float(weights @ np.log(np.abs(means)))
    error = float(np.sqrt(np.sum((weights * errors / means) ** 2)))
    return [slope, slope - 1.96 * error, slope + 1.96 * error]


class Analysed(NamedTuple):
    """The statistics over sizes: [sizes, statistics, estimators], and [sizes, replicates, …]."""

    sizes: np.ndarray
    values: np.ndarray
    replicates: np.ndarray


def analyse(errors: dict[int, Errors], replicates: int, rng: np.random.Generator) -> Analysed:
    values = [statistics_of(own.norms) for own in errors.values()]
    resampled = [bootstrap(own.norms, replicates, rng) for own in errors.values()]
    return Analysed(np.array(list(errors)), np.stack(values), np.stack(resampled))


def failure_probabilities(trials: int) -> np.ndarray:
    """Lists probabilities from 1e-1 to 1e-4 beyond which there are at least 20 trials."""
    deltas = np.geomspace(1e-1, 1e-4, 13)
    return deltas[deltas * trials >= 19.99]


def resampled_quantiles(
    ordered: np.ndarray, ranks: np.ndarray, replicates: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws the order statistics at 1-based ranks of resampled trials, [replicates, ranks].

    Order statistics of uniforms are sums of exponentials divided by their total, so no resample is
    sorted.
    """
    trials = len(ordered)
    steps = np.diff(ranks, prepend=0, append=trials + 1)
    sums = np.cumsum(rng.standard_gamma(steps, size=(replicates, len(steps))), axis=1)
    return ordered[np.floor(sums[:, :-1] / sums[:, -1:] * trials).astype(int)]


def fit(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits slopes and sums of squared residuals of log values [points, fits] over x [points]."""
    slopes = log_slopes(x, values)
    logs = np.log(values)
    residuals = logs - logs.mean(axis=0) - np.outer(x - x.mean(), slopes)
    return slopes, np.sum(residuals**2, axis=0)
