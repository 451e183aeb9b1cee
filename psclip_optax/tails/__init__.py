"""Estimate how heavy the gradient noise is: tail index, scale, and thresholds from them.

The clipped mean is made for norms whose tail is a power law, P(‖g‖ > x) ~ x^{-a}: moments of order
below the tail index a are finite, and those of order above it are not. The functions here take
concrete norms and compute in NumPy float64 on the host, outside of `jax.jit`. Estimating a tail
needs sorting, choices that depend on the data, and often more samples than one batch has.

The interval of an index covers sampling noise *and* the bias of a tail that is a power law only far
out. `python -m benchmarks.theory.tail_index` measures how often it contains the truth.

`most_clipped` ranks the samples in the tail: those that were clipped most during training.
"""

from psclip_optax.tails.clipped import MostClipped, most_clipped
from psclip_optax.tails.hill import HillEstimate, HillPlot, choose_k, hill_estimator, hill_plot
from psclip_optax.tails.index import TailIndex, Verdict, tail_index
from psclip_optax.tails.norms import MIN_NORMS
from psclip_optax.tails.scale import MomentScale, moment_scale
from psclip_optax.tails.suggestion import SuggestedThreshold, suggest_threshold

__all__ = [
    "MIN_NORMS",
    "HillEstimate",
    "HillPlot",
    "MomentScale",
    "MostClipped",
    "SuggestedThreshold",
    "TailIndex",
    "Verdict",
    "choose_k",
    "hill_estimator",
    "hill_plot",
    "moment_scale",
    "most_clipped",
    "suggest_threshold",
    "tail_index",
]
