"""Per-sample gradient clipping for JAX and Optax: clip each sample's gradient, then average."""

from psclip_optax import tails
from psclip_optax.accumulation import accumulate_clipped
from psclip_optax.clipped_grad import clipped_grad, clipped_value_and_grad
from psclip_optax.clipping import ClipStats
from psclip_optax.groups import by_layer
from psclip_optax.optimizers import ps_clip_sgd
from psclip_optax.slices import each_slice
from psclip_optax.thresholds import AdaptiveThreshold, constant_threshold, growing_threshold
from psclip_optax.thresholds.adaptive import (
    min_norm_threshold,
    moment_threshold,
    quantile_threshold,
)
from psclip_optax.thresholds.auto import auto_threshold
from psclip_optax.thresholds.tracking import track_norms
from psclip_optax.transforms import per_sample_clip

__version__ = "0.2.0"

__all__ = [
    "AdaptiveThreshold",
    "ClipStats",
    "accumulate_clipped",
    "auto_threshold",
    "by_layer",
    "clipped_grad",
    "clipped_value_and_grad",
    "constant_threshold",
    "each_slice",
    "growing_threshold",
    "min_norm_threshold",
    "moment_threshold",
    "per_sample_clip",
    "ps_clip_sgd",
    "quantile_threshold",
    "tails",
    "track_norms",
]
