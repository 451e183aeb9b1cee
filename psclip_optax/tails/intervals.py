"""Compute intervals for estimates that are approximately normal."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import scipy  # the whole package: its parts load at first use, not with psclip_optax

from psclip_optax.thresholds import check_number


def around(index: Any, k: Any, critical: float) -> tuple[Any, Any]:
    """Computes an interval around an index: log â is approximately normal with variance 1 / k."""
    factor = np.exp(critical / np.sqrt(k))
    return index / factor, index * factor


def normal_quantile(confidence: float) -> float:
    _check_confidence(confidence)
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)


def quantile_despite_bias(confidence: float, bias: float) -> float:
    """Finds the c with P(|Z + bias| ≤ c) = confidence, Z standard normal."""
    _check_confidence(confidence)
    return float(scipy.stats.foldnorm.ppf(confidence, bias))


def _check_confidence(confidence: float) -> None:
    check_number("psc.tails", "confidence", confidence, lowest=0, highest=1, open_ends=(True, True))
