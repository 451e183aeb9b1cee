"""Suggest a growing threshold from the tail index and the scale."""

from __future__ import annotations

import dataclasses
import math

import numpy.typing as npt

from psclip_optax.tails.index import TailIndex, tail_index_of, tail_rows
from psclip_optax.tails.norms import as_norms
from psclip_optax.tails.printing import table, with_interval
from psclip_optax.tails.scale import MomentScale, moment_scale_of, scale_rows
from psclip_optax.thresholds import GrowingThreshold

_SMALLEST_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class SuggestedThreshold:
    """Holds α and β from observed norms; `print` shows the estimates behind them.

    Attributes:
      tail: the estimate of the tail index.
      scale: σ̂ for the order p, which is below the tail index.
    """

    tail: TailIndex
    scale: MomentScale

    @property
    def alpha(self) -> float:
        """Returns α = σ̂(p), in the units of the norms."""
        return self.scale.value

    @property
    def alpha_interval(self) -> tuple[float, float]:
        """Returns the interval of σ(p) at this p."""
        return self.scale.lower, self.scale.upper

    @property
    def beta(self) -> float:
        """Returns β = p, in [1, 2]."""
        return self.scale.p

    @property
    def beta_interval(self) -> tuple[float, float]:
        """Returns β at both ends of the index's interval."""
        tail = self.tail
        return _order_below(tail.lower, tail.k), _order_below(tail.upper, tail.k)

    @property
    def threshold(self) -> GrowingThreshold:
        """Builds `psc.growing_threshold(alpha, beta)`."""
        return GrowingThreshold(self.alpha, self.beta)

    def __str__(self) -> str:
        rows = [
            *tail_rows(self.tail),
            *scale_rows(self.scale),
            ("α", with_interval(self.alpha, *self.alpha_interval)),
            ("β", with_interval(self.beta, *self.beta_interval)),
        ]
        write = f"psc.growing_threshold(alpha={self.alpha:.3g}, beta={self.beta:.3g})"
        return "\n".join([table(rows), *_warnings(self), write])


def suggest_threshold(norms: npt.ArrayLike, *, confidence: float = 0.95) -> SuggestedThreshold:
    """Suggests α and β for `psc.growing_threshold` from the norms of per-sample gradients.

    β = p is in [1, 2] and below the tail index, by 0.1 or by its standard error, whichever is more.
    α = σ̂(p) is computed from the raw moment, so a large mean gradient raises it. Both are a
    starting point for tuning; the intervals show how well the norms determine them.

    Args:
      norms: as for `tail_index`.
      confidence: that of the intervals, in (0, 1).

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
    values = as_norms(norms)
    tail = tail_index_of(values, confidence)
    return SuggestedThreshold(tail, moment_scale_of(values, _order_below(tail.index, tail.k), tail))


def _order_below(index: float, k: int) -> float:
    margin = max(_SMALLEST_MARGIN, 1 / math.sqrt(k))
    return min(2.0, max(1.0, (1 - margin) * index))


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
