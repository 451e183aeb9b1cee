"""Defines training runs on CIFAR-100, their data and their records."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from psclip_optax.training.data.corruptions import with_label_noise, with_student_t_pixels
from psclip_optax.training.data.splits import Dataset, Split, train_validation_split
from psclip_optax.training.output.files import to_json

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


class Noise(NamedTuple):
    """The corruption of the training data.

    Attributes:
      label_noise: share of labels that are replaced.
      pixel_df: degrees of freedom of the Student-t factors of images; None for no factors.
      pixel_fraction: share of images that are multiplied by them.
    """

    label_noise: float = 0.0
    pixel_df: float | None = None
    pixel_fraction: float = 0.0


NOISES = {
    "clean": Noise(),
    "20% labels": Noise(label_noise=0.2),
    "40% labels": Noise(label_noise=0.4),
    "heavy pixels": Noise(pixel_df=1.5, pixel_fraction=0.2),
}


class Numbers(NamedTuple):
    """The numbers of one run's method, or of several, [R]; ∞ and 0 switch a part off.

    Attributes:
      learning_rate: the rate before the cosine schedule.
      momentum: the decay of the momentum.
      threshold: largest norm at position 1, of a sample's or micro-batch's gradient.
      exponent: 1/β of the growth with the position.
      scale: the scale of the automatic threshold, as a factor of σ̂; 0 for a given threshold.
      batch_threshold: largest norm of the batch's gradient.
    """

    learning_rate: Any
    momentum: Any = 0.9
    threshold: Any = float("inf")
    exponent: Any = 0.0
    scale: Any = 0.0
    batch_threshold: Any = float("inf")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings for which a program is compiled; runs that share them are trained together.

    Attributes:
      width: multiplies AlexNet's channels and hidden sizes.
      batch_size: samples in a step.
      num_microbatches: the number of micro-batches whose mean gradients are clipped; None for
      samples.
      augment: whether images are shifted and mirrored at random.
      dtype: the dtype of the forward and backward pass; parameters and their updates are float32.
      optimizer: "momentum" or "AdamW".
    """

    width: float
    batch_size: int = 128
    num_microbatches: int | None = None
    augment: bool = True
    dtype: str = "float32"
    optimizer: str = "momentum"


class Run(NamedTuple):
    """One training run, with everything that determines its result.

    Attributes:
      stage: the purpose of the run.
      method: the name of the method.
      noise: one of NOISES.
      numbers: the numbers of the method.
      epochs: the length of the run.
      seed: the seed of parameters, order, augmentation and noise.
      setting: the setting that is compiled.
      watches_tails: whether the tail index of the samples' norms is estimated in some epochs.
    """

    stage: str
    method: str
    noise: str
    numbers: Numbers
    epochs: int
    seed: int
    setting: Setting
    watches_tails: bool = False

    def described(self) -> dict[str, Any]:
        """Converts a value to JSON, with null for ∞."""
        setting = dataclasses.asdict(self.setting)
        if self.setting.optimizer == "momentum":
            # Runs that were finished before AdamW was added keep their digests.
            del setting["optimizer"]
        return as_json(self._asdict() | {"numbers": self.numbers._asdict(), "setting": setting})


def as_json(value: Any) -> Any:
    """Converts a value to what its JSON is read as: NaN and ∞ become None."""
    return json.loads(to_json(value))


class Example(NamedTuple):
    """The training data of one run: its labels and pixel factors, [N]."""

    labels: Any
    factors: Any


class Data(NamedTuple):
    """The data set on the device, with images uint8 or float32 [N, H, W, C]."""

    train: Split
    validation: Split
    test: Split
    mean: jax.Array
    std: jax.Array


def load_data(dataset: Dataset, num_validation: int) -> Data:
    """Loads the data set on the default device, without validation images in its training split."""
    train, validation = train_validation_split(dataset.train, num_validation=num_validation, seed=0)
    splits: Any = jax.tree.map(jnp.asarray, (train, validation, dataset.test))
    return Data(*splits, mean=jnp.asarray(dataset.pixel_mean), std=jnp.asarray(dataset.pixel_std))


def corrupted(split: Split, noise: Noise, num_classes: int, seed: int) -> Example:
    """Corrupts the labels of one run, and draws its pixel factors."""
    labels = with_label_noise(np.asarray(split.labels), noise.label_noise, num_classes, seed)
    factors = np.ones((len(labels), 1, 1, 1), np.float32)
    if noise.pixel_df is not None:
        factors = with_student_t_pixels(factors, noise.pixel_df, seed, noise.pixel_fraction)
    return Example(labels, factors.reshape(-1))


def tail_figures(norms: np.ndarray) -> dict[str, Any] | None:
    """Estimates the tail of an epoch's norms; None for a diverged run."""
    if not np.all(np.isfinite(norms)):
        return None
    tail = psc.tails.tail_index(norms)
    return {
        "verdict": tail.verdict,
        "index": tail.index,
        "interval": [tail.lower, tail.upper],
        "quantiles": rounded(np.quantile(norms, QUANTILES)),
    }


def record_of(curves: list[dict[str, np.ndarray]], place: int) -> dict[str, Any]:
    """Collects the curves of one run, with an entry for each epoch (null if not measured)."""
    names = sorted({name for epoch in curves for name in epoch} - {"norms"})
    norms = {
        str(epoch + 1): figures["norms"][place]
        for epoch, figures in enumerate(curves)
        if "norms" in figures
    }
    return {
        "curves": {
            name: [rounded(epoch[name][place]) if name in epoch else None for epoch in curves]
            for name in names
        },
        "norms": norms,
    }


def rounded(value: np.ndarray) -> Any:
    # None of these numbers has more than six significant digits.
    return [float(f"{v:.6g}") for v in value] if value.ndim else float(f"{value:.6g}")
