"""Computes means over seeds with their intervals."""

from __future__ import annotations

import statistics
from typing import Any

from scipy import stats

from psclip_optax.training.compare.summary import estimate


def paired_difference(own: list[float], other: list[float]) -> dict[str, Any]:
    """Computes the mean over seeds of own − other, and its interval."""
    differences = [one - two for one, two in zip(own, other, strict=True)]
    return {"mean": statistics.fmean(differences), "interval": interval(differences)}


def interval(values: list[float]) -> list[float]:
    """Computes the mean's two-sided 95% interval by Student's t."""
    mean, error = estimate(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return [mean - half, mean + half]


def describe_mean(accuracies: list[float]) -> str:
    """Formats mean ± standard error, in percent."""
    mean, error = estimate(accuracies)
    return f"{100 * mean:.2f} ± {100 * error:.2f}"


def describe_difference(difference: dict[str, Any]) -> str:
    """Formats a difference with its interval, in percentage points."""
    low, high = difference["interval"]
    return f"{100 * difference['mean']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
