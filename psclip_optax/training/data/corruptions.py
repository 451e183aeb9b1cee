"""Corrupt training data to make the noise of its gradients heavy-tailed."""

from __future__ import annotations

import numpy as np

from psclip_optax.arrays import described, is_integer
from psclip_optax.thresholds import check_number
from psclip_optax.training.data.splits import (
    Split,
    check_images,
    check_split,
    random_generator,
    to_unit_scale,
)


def with_label_noise(labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Replaces each label, with probability `rate`, by a uniformly random other class.

    The result for label i depends only on `seed` and i; a higher rate makes all the changes of a
    lower rate, and more.

    Args:
      labels: `[N]`, int, in `0 … num_classes - 1`.
      rate: probability in [0, 1].
      num_classes: number of classes, at least 2.
      seed: non-negative seed.

    Returns:
      New labels, `[N]`, of the dtype of `labels`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: `rate` is no number.

    Examples:
      >>> with_label_noise(np.int32([0, 1, 1]), rate=1.0, num_classes=2, seed=0)
      array([1, 0, 0], dtype=int32)

    References:
      Natarajan et al., "Learning with Noisy Labels", NeurIPS 2013.
    """
    check_number("with_label_noise", "rate", rate, lowest=0, highest=1)
    if not is_integer(num_classes) or num_classes < 2:
        raise ValueError(f"num_classes: expected an int of at least 2, got {num_classes!r}")
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels: expected a NumPy array, int [N], got {described(labels)}")
    if np.any((labels < 0) | (labels >= num_classes)):
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}"
        )
    is_flipped = random_generator(seed, "label flips").random(len(labels)) < rate
    shifts = random_generator(seed, "label shifts").integers(1, num_classes, len(labels))
    return ((labels + shifts * is_flipped) % num_classes).astype(labels.dtype)


def with_student_t_pixels(
    images: np.ndarray, degrees_of_freedom: float, seed: int, fraction: float = 1.0
) -> np.ndarray:
    """Multiplies the pixels of each image by an independent Student-t factor.

    With few degrees of freedom ν some images become enormous: the factor's tail index is ν, so
    its variance is infinite for ν ≤ 2 and its mean does not exist for ν ≤ 1. The result for image i
    depends only on `seed` and i.

    Args:
      images: `[N, H, W, C]`, uint8 or float32.
      degrees_of_freedom: ν > 0.
      seed: non-negative seed.
      fraction: probability in [0, 1] that an image is multiplied.

    Returns:
      float32 `[N, H, W, C]`, scaled so that 255 of uint8 is 1.

    Raises:
      ValueError: an argument is out of range.
      TypeError: one is no number.

    Examples:
      >>> with_student_t_pixels(np.ones([3, 1, 1, 1], np.float32), 2.0, seed=0).shape
      (3, 1, 1, 1)

    References:
      Zhang et al., "Why are Adaptive Methods Good for Attention Models?", NeurIPS 2020.
    """
    owner = "with_student_t_pixels"
    check_number(owner, "degrees_of_freedom", degrees_of_freedom, lowest=0, open_ends=(True, True))
    check_number(owner, "fraction", fraction, lowest=0, highest=1)
    check_images(images)
    is_multiplied = random_generator(seed, "pixel choices").random(len(images)) < fraction
    factors = random_generator(seed, "pixel factors").standard_t(degrees_of_freedom, len(images))
    # An infinite factor would turn black pixels into NaN; this bound also leaves room to normalise.
    largest = np.sqrt(np.finfo(np.float32).max)
    factors = np.where(is_multiplied, np.clip(factors, -largest, largest), 1).astype(np.float32)
    return to_unit_scale(images) * factors[:, None, None, None]


def corrupt(
    split: Split,
    *,
    num_classes: int,
    label_noise: float = 0.0,
    pixel_df: float | None = None,
    seed: int,
) -> Split:
    """Corrupts labels and pixels of a training split, independently of each other.

    Normalise with the pixel mean and standard deviation of the clean split: those of the corrupted
    split depend on a few images.

    Args:
      split: images `[N, H, W, C]` and labels `[N]`.
      num_classes: number of classes.
      label_noise: `rate` of `with_label_noise`.
      pixel_df: `degrees_of_freedom` of `with_student_t_pixels`; None does not change the pixels.
      seed: non-negative seed.

    Returns:
      The corrupted split; it shares uncorrupted arrays with `split`.

    Raises:
      ValueError: an argument is out of range.

    Examples:
      >>> split = Split(np.ones([4, 1, 1, 1], np.uint8), np.zeros(4, np.int32))
      >>> noisy = corrupt(split, num_classes=2, label_noise=1.0, pixel_df=1.5, seed=0)
      >>> noisy.labels.tolist(), noisy.images.dtype
      ([1, 1, 1, 1], dtype('float32'))
    """
    check_split(split)
    labels = with_label_noise(split.labels, label_noise, num_classes, seed)
    if pixel_df is None:
        return Split(split.images, labels)
    return Split(with_student_t_pixels(split.images, pixel_df, seed), labels)
