"""Computes the statistics of `benchmarks.theory.convergence_rate`, with paired intervals."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

LEVEL = 0.99
REPLICATES = 1000


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def best_point(values: list[float]) -> int:
    return int(np.argmin(np.nan_to_num(values, nan=np.inf)))


def estimate(values: np.ndarray, statistic: str) -> np.ndarray:
    """Computes a statistic over runs, on axis 0."""
    if statistic == "mean":
        return np.mean(values, axis=0)
    return np.quantile(values, LEVEL, axis=0, method="inverted_cdf")


def resample(runs: int, label: str) -> np.ndarray:
    """Draws how often each run occurs in each replicate, [replicates, runs]."""
    generator = np.random.default_rng(zlib.crc32(label.encode()))
    counts = generator.multinomial(runs, np.full(runs, 1 / runs), size=REPLICATES)
    return counts.astype(np.int16)


def replicate(values: np.ndarray, counts: np.ndarray, statistic: str) -> np.ndarray:
    """Computes the statistic of `values` [runs] in each replicate."""
    if statistic == "mean":
        return counts @ values / len(values)
    order = np.argsort(values)
    reached = np.cumsum(counts[:, order], axis=1, dtype=np.int32) >= LEVEL * len(values)
    return values[order][np.argmax(reached, axis=1)]


def interval(replicates: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.quantile(replicates, [0.025, 0.975], axis=0)]


def slope(totals: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """Fits the slope of log estimates [sizes, …] against log N by least squares."""
    centred = np.log(totals) - np.mean(np.log(totals))
    return np.tensordot(centred / np.sum(centred**2), np.log(estimates), axes=1)


def compare(
    ours: np.ndarray, others: np.ndarray, counts: np.ndarray, statistic: str
) -> dict[str, Any]:
    """Computes the ratio of a statistic over the same runs, with its paired interval."""
    low, high = interval(replicate(ours, counts, statistic) / replicate(others, counts, statistic))
    return {
        "estimates": [float(estimate(values, statistic)) for values in (ours, others)],
        "ratio": float(estimate(ours, statistic) / estimate(others, statistic)),
        "interval": [low, high],
        "verdict": "better" if high < 1 else "worse" if low > 1 else "equal",
    }


def is_at_edge(grid: list[float], value: float) -> bool:
    return min(grid) < max(grid) and value in (min(grid), max(grid))
