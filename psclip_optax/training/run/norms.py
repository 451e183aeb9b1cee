"""Record the norms of a run's gradients: quantiles, tail index, and a histogram.

They are computed over a window of the latest norms, because one batch has too few to estimate a
tail.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from psclip_optax.tails import MIN_NORMS, tail_index

WINDOW = 2048
"""How many norms a window holds, or a batch, if that has more."""
BINS_PER_OCTAVE = 2
_QUANTILES = {"norm_q50": 0.5, "norm_q90": 0.9, "norm_q99": 0.99, "norm_max": 1.0}


class NormWindow:
    """The norms of the latest samples, at least `WINDOW` of them once so many were seen.

    They stay on the device until they are read, so no step waits for them.

    Examples:
      >>> window = NormWindow(np.arange(WINDOW - 1.0))
      >>> window.add(np.array([5.0, 7.0]))
      >>> window.norms()[[0, -1]], len(window.norms())
      (array([1., 7.], dtype=float32), 2048)
    """

    def __init__(self, norms: np.ndarray):
        """Starts with the norms `[N]` of an earlier window."""
        self._on_host = np.asarray(norms, np.float32)
        self._on_device: collections.deque[Any] = collections.deque()

    def add(self, norms: Any) -> None:
        """Adds the norms of a batch, `[n]`, and drops batches outside the window."""
        self._on_device.append(norms)
        while (len(self._on_device) - 1) * norms.size >= WINDOW:
            self._on_device.popleft()

    def norms(self) -> np.ndarray:
        """Returns the norms, float32 `[N]`, from the oldest to the newest."""
        if self._on_device:
            size = max(WINDOW, self._on_device[-1].size)
            latest = jax.device_get(list(self._on_device))
            self._on_host = np.concatenate([self._on_host, *latest], dtype=np.float32)[-size:]
            self._on_device.clear()
        return self._on_host


def norm_figures(norms: np.ndarray) -> dict[str, Any]:
    """Summarises norms for a record.

    Args:
      norms: `[N]`; norms that are not finite do not count.

    Returns:
      `num_norms`, the number that count; their quantiles, `norm_q50`, `norm_q90`, `norm_q99` and
      `norm_max`; `tail_index` with `tail_lower` and `tail_upper`, the ends of its 95 % interval;
      `tail_verdict`: "heavy", "light" (index and upper end are ∞) or "undecided"; and
      `norm_histogram`, by `histogram`. Values that need more norms are None: fewer than 500 norms
      give no tail index.

    Examples:
      >>> figures = norm_figures(np.linspace(0, 1, 2001)[1:] ** (-1 / 1.5))  # of tail index 1.5
      >>> f"{figures['tail_index']:.2f}", figures["tail_verdict"], f"{figures['norm_q50']:.2f}"
      ('1.53', 'heavy', '1.59')
      >>> norm_figures(np.array([3.0, np.nan]))["tail_verdict"] is None
      True
    """
    finite = norms[np.isfinite(norms)].astype(np.float64)
    # One pass over the norms for all of them.
    levels = list(_QUANTILES.values())
    values = np.quantile(finite, levels).tolist() if finite.size else [None] * len(levels)
    return {
        "num_norms": finite.size,
        **dict(zip(_QUANTILES, values, strict=True)),
        **_tail_figures(finite),
        "norm_histogram": histogram(finite),
    }


def histogram(norms: np.ndarray) -> dict[str, int]:
    """Counts norms in bins of half a power of two.

    Args:
      norms: `[N]`, finite; zeros are in no bin.

    Returns:
      By bin, the number of norms in `[2^(bin / 2), 2^((bin + 1) / 2))`, without empty bins. The
      bins are strings, for JSON.

    Examples:
      >>> histogram(np.array([0.0, 1.0, 1.1, 4.0]))
      {'0': 2, '4': 1}
    """
    positive = norms[norms > 0]
    bins = np.floor(BINS_PER_OCTAVE * np.log2(positive)).astype(int)
    return {str(bin): int(count) for bin, count in zip(*np.unique_counts(bins), strict=True)}


def bin_edges(bins: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Computes the edges of a histogram's bins.

    Args:
      bins: the numbers of N bins.

    Returns:
      The lower and the upper edges, `[N]` each, in the units of the norms.

    Examples:
      >>> bin_edges([0, 2])
      (array([1., 2.]), array([1.41421356, 2.82842712]))
    """
    lower = np.array(list(bins), float)
    return 2 ** (lower / BINS_PER_OCTAVE), 2 ** ((lower + 1) / BINS_PER_OCTAVE)


def _tail_figures(norms: np.ndarray) -> dict[str, Any]:
    try:
        tail = tail_index(norms) if norms.size >= MIN_NORMS else None
    except ValueError:  # the largest norms are equal, e.g. with zero gradients
        tail = None
    if tail is None:
        return dict.fromkeys(("tail_index", "tail_lower", "tail_upper", "tail_verdict"))
    return {
        "tail_index": tail.index,
        "tail_lower": tail.lower,
        "tail_upper": tail.upper,
        "tail_verdict": tail.verdict,
    }
