"""Intervals of estimates that are about normal."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from psclip_optax.thresholds import check_number


def around(index: Any, k: Any, critical: float) -> tuple[Any, Any]:
    """Its interval: log â is about normal, of variance 1 / k."""
    factor = np.exp(critical / np.sqrt(k))
    return index / factor, index * factor


def normal_quantile(confidence: float) -> float:
    check_number("psc.tails", "confidence", confidence, lowest=0, highest=1, open_ends=(True, True))
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)


def quantile_despite_bias(confidence: float, bias: float) -> float:
    """The c with P(|Z + bias| ≤ c) = confidence, Z standard normal."""
    cdf = statistics.NormalDist().cdf
    low = normal_quantile(confidence)
    high = low + bias
    for _ in range(60):
        middle = (low + high) / 2
        covers = cdf(middle - bias) - cdf(-middle - bias) >= confidence
        low, high = (low, middle) if covers else (middle, high)
    return high
