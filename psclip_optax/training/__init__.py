"""Export the train steps for Flax, and the losses, models and data sets of `psclip`.

Names are imported at their first use. So `psclip --help` and `psclip doctor` work without Flax and
the other packages of the extra `train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psclip_optax.training.data.corruptions import corrupt as corrupt
    from psclip_optax.training.data.corruptions import with_label_noise as with_label_noise
    from psclip_optax.training.data.corruptions import (
        with_student_t_pixels as with_student_t_pixels,
    )
    from psclip_optax.training.data.datasets import dataset_shape as dataset_shape
    from psclip_optax.training.data.datasets import load_dataset as load_dataset
    from psclip_optax.training.data.pipeline import evaluation_batches as evaluation_batches
    from psclip_optax.training.data.pipeline import iterate as iterate
    from psclip_optax.training.data.pipeline import train_batches as train_batches
    from psclip_optax.training.data.splits import Dataset as Dataset
    from psclip_optax.training.data.splits import Split as Split
    from psclip_optax.training.data.splits import train_validation_split as train_validation_split
    from psclip_optax.training.models.classifiers import build_model as build_model
    from psclip_optax.training.models.losses import classification_loss as classification_loss
    from psclip_optax.training.steps import gradient_function as gradient_function
    from psclip_optax.training.steps import linen_eval_step as linen_eval_step
    from psclip_optax.training.steps import linen_train_step as linen_train_step
    from psclip_optax.training.steps import nnx_train_step as nnx_train_step

_MODULE_OF = {
    "Dataset": "data.splits",
    "Split": "data.splits",
    "build_model": "models.classifiers",
    "classification_loss": "models.losses",
    "corrupt": "data.corruptions",
    "dataset_shape": "data.datasets",
    "evaluation_batches": "data.pipeline",
    "gradient_function": "steps",
    "iterate": "data.pipeline",
    "linen_eval_step": "steps",
    "linen_train_step": "steps",
    "load_dataset": "data.datasets",
    "nnx_train_step": "steps",
    "train_batches": "data.pipeline",
    "train_validation_split": "data.splits",
    "with_label_noise": "data.corruptions",
    "with_student_t_pixels": "data.corruptions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
