"""Map a sample's position in the batch to the largest norm that its gradient may have.

A threshold is any callable from 1-based integer positions, shape `[n]`, to norms τ, shape `[n]`.
`fixed` has the thresholds that are known in advance, `adaptive` those that follow the norms, and
`auto` the one that needs no number.
"""

from psclip_optax.thresholds.checks import as_positions, check_number, concrete
from psclip_optax.thresholds.fixed import (
    ConstantThreshold,
    GrowingThreshold,
    as_threshold,
    constant_threshold,
    growing_threshold,
    least_norm,
    thresholds_at,
)
from psclip_optax.thresholds.interface import AdaptiveThreshold, Threshold

__all__ = [
    "AdaptiveThreshold",
    "ConstantThreshold",
    "GrowingThreshold",
    "Threshold",
    "as_positions",
    "as_threshold",
    "check_number",
    "concrete",
    "constant_threshold",
    "growing_threshold",
    "least_norm",
    "thresholds_at",
]
