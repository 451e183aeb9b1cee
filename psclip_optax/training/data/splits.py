"""Define data sets in memory, and split them."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from psclip_optax.arrays import described, is_integer


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
      images: `[N, H, W, C]`, uint8 in 0…255, or float32, scaled so that 1 is 255.
      labels: `[N]`, int32.

    Examples:
      >>> from psclip_optax.training import load_dataset
      >>> load_dataset("digits").test.images.shape
      (500, 8, 8, 1)
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A train and a test split, and the names of their labels.

    Attributes:
      name: its name in `load_dataset`.
      num_classes: labels are in `0 … num_classes - 1`.
      label_names: `num_classes` names.
      train: split for training.
      test: split for evaluation.

    Examples:
      >>> from psclip_optax.training import load_dataset
      >>> digits = load_dataset("digits")
      >>> digits.image_shape, digits.num_classes, len(digits.train.labels)
      ((8, 8, 1), 10, 1297)
      >>> digits.pixel_mean.round(2), digits.pixel_std.round(2)
      (array([0.31], dtype=float32), array([0.38], dtype=float32))
    """

    name: str
    num_classes: int
    label_names: tuple[str, ...]
    train: Split
    test: Split

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.train.images.shape[1:]

    @property
    def pixel_mean(self) -> np.ndarray:
        return self._pixel_moments[0]

    @property
    def pixel_std(self) -> np.ndarray:
        return self._pixel_moments[1]

    @functools.cached_property
    def _pixel_moments(self) -> tuple[np.ndarray, np.ndarray]:
        images = self.train.images
        white = 255 if images.dtype == np.uint8 else 1
        # Over examples first: NumPy adds whole images many times faster than three channels.
        sums = images.sum(axis=0, dtype=np.float64)
        square_sums = np.einsum("nhwc,nhwc->hwc", images, images, dtype=np.float64)
        mean = sums.mean(axis=(0, 1)) / len(images)
        std = np.sqrt(square_sums.mean(axis=(0, 1)) / len(images) - mean**2)
        return (mean / white).astype(np.float32), (std / white).astype(np.float32)


class DatasetShape(NamedTuple):
    """The shapes of a data set, on which a model depends.

    Attributes:
      image_shape: the shape of one image, `(H, W, C)`.
      num_classes: labels are in `0 … num_classes - 1`.
    """

    image_shape: tuple[int, ...]
    num_classes: int


def train_validation_split(split: Split, *, num_validation: int, seed: int) -> tuple[Split, Split]:
    """Holds examples out, stratified by class and deterministic in `seed`.

    Each class contributes its proportional share of the validation examples, rounded up or down.

    Args:
      split: `N` examples.
      num_validation: the number of examples to hold out, `0 … N - 1`.
      seed: non-negative seed.

    Returns:
      The remaining and the held-out examples, each in the order of `split`.

    Raises:
      ValueError: `num_validation` leaves nothing to train on, or `split` is malformed.

    Examples:
      >>> split = Split(np.zeros([6, 2, 2, 1], np.uint8), np.repeat(np.int32([0, 1]), 3))
      >>> train, validation = train_validation_split(split, num_validation=2, seed=0)
      >>> train.labels.tolist(), validation.labels.tolist()
      ([0, 0, 1, 1], [0, 1])
    """
    num_examples = check_split(split)
    if not is_integer(num_validation) or not 0 <= num_validation < num_examples:
        raise ValueError(
            f"num_validation: expected an int, 0 to {num_examples - 1}, so that some of the "
            f"{num_examples} examples are left to train on, got {num_validation!r}"
        )
    shuffled = random_generator(seed, "validation split").permutation(num_examples)
    by_class = shuffled[np.argsort(split.labels[shuffled], kind="stable")]
    # Evenly spaced picks from the examples sorted by class give every class its share.
    picks = (2 * np.arange(num_validation) + 1) * num_examples // max(2 * num_validation, 1)
    is_held_out = np.zeros(num_examples, bool)
    is_held_out[by_class[picks]] = True
    return _take(split, ~is_held_out), _take(split, is_held_out)


def to_unit_scale(images: np.ndarray) -> np.ndarray:
    """Scales pixels so that 1 is white.

    Args:
      images: uint8 or float32, any shape.

    Returns:
      float32 of the same shape: uint8 divided by 255, float32 unchanged.

    Examples:
      >>> to_unit_scale(np.uint8([0, 51, 255]))
      array([0. , 0.2, 1. ], dtype=float32)
    """
    return images / np.float32(255) if images.dtype == np.uint8 else images


def random_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Makes a random generator whose stream is specific to its purpose and indices.

    Args:
      seed: non-negative seed.
      purpose: the purpose of the numbers.
      *indices: non-negative, such as a step.

    Returns:
      A NumPy generator that is a pure function of the arguments.

    Raises:
      ValueError: `seed` is negative.

    Examples:
      >>> crop, again, flip = (random_generator(0, p).random() for p in ("crop", "crop", "flip"))
      >>> crop == again, crop == flip
      (True, False)
    """
    if not is_integer(seed) or seed < 0:
        raise ValueError(f"seed: expected a non-negative int, got {seed!r}")
    return np.random.default_rng([seed, *purpose.encode(), *indices])


def check_images(images: np.ndarray) -> None:
    """Checks the dtype and rank of images.

    Args:
      images: uint8 or float32 `[N, H, W, C]`.

    Raises:
      ValueError: they are not such images.

    Examples:
      >>> check_images(np.zeros([3, 8, 8, 1], np.uint8))
    """
    is_array = isinstance(images, np.ndarray)
    if not is_array or images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise ValueError(
            "images: expected a NumPy array, uint8 or float32 [N, H, W, C], got "
            f"{described(images)}"
        )


def check_split(split: Split) -> int:
    """Checks the dtypes and shapes of a `Split`.

    Args:
      split: images `[N, H, W, C]` and labels `[N]`.

    Returns:
      `N`, at least 1.

    Raises:
      ValueError: it is not such a split.

    Examples:
      >>> check_split(Split(np.zeros([3, 8, 8, 1], np.uint8), np.zeros([3], np.int32)))
      3
    """
    if not isinstance(split, Split):
        raise ValueError(f"split: expected a Split of images and labels, got {described(split)}")
    images, labels = split
    check_images(images)
    is_array = isinstance(labels, np.ndarray)
    if not is_array or labels.dtype != np.int32 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected a NumPy array, int32 [{len(images)}], one label an image, got "
            f"{described(labels)}"
        )
    if not len(images):
        raise ValueError("split: expected at least one example, got none")
    return len(images)


def _take(split: Split, indices: np.ndarray) -> Split:
    return Split(split.images[indices], split.labels[indices])
