"""Jitted train and evaluation steps for Flax: Linen's `TrainState` and NNX's `Optimizer`.

Linen and NNX differ only in how parameters are split from a model and merged again.
`gradient_function` or `psclip_optax.clipped_value_and_grad` defines how gradients are computed.
"""

from psclip_optax.training.steps.batch import Metrics
from psclip_optax.training.steps.functions import GradientFunction, gradient_function
from psclip_optax.training.steps.linen import linen_eval_step, linen_train_step
from psclip_optax.training.steps.nnx import nnx_train_step

__all__ = [
    "GradientFunction",
    "Metrics",
    "gradient_function",
    "linen_eval_step",
    "linen_train_step",
    "nnx_train_step",
]
