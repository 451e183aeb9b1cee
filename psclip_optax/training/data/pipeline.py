"""Make batches as a pure function of (seed, step), sliced by process and read ahead by Grain."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from psclip_optax.arrays import is_integer
from psclip_optax.training.data.splits import Split, check_split, random_generator, to_unit_scale

Batch = dict[str, np.ndarray]

_CROP_PADDING = 4
# Gathering a batch from memory takes a few milliseconds: more threads would wait for the GIL.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
    augment: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset[Batch]:
    """Makes infinite training batches: element s is this process's slice of step s's batch.

    Every epoch is a new permutation of all examples. Batches straddle epochs, so no example is
    dropped. The examples of a step do not depend on the number of processes.

    Args:
      split: `N` examples, images `[N, H, W, C]`.
      batch_size: size of the global batch, divisible by `process_count`; may exceed `N`.
      seed: non-negative seed of the order and of the augmentation.
      mean: `[C]`, pixel mean of the training set, scaled so that 255 is 1.
      std: `[C]`, pixel standard deviation on the same scale.
      augment: whether to crop at random from zero-padded images and flip half of them.
      process_index: which contiguous slice of each global batch to load.
      process_count: how many slices there are.

    Returns:
      A random-access dataset of dicts with `n = batch_size / process_count` examples:
      `image` float32 `[n, H, W, C]`, normalised; `label` int32 `[n]`; `position` int32 `[n]`,
      1-based in the global batch; `index` int64 `[n]`, into `split`.

    Raises:
      ValueError: an argument is out of range, or `split` is malformed.

    Examples:
      >>> split = Split(np.zeros([6, 2, 2, 1], np.uint8), np.arange(6, dtype=np.int32))
      >>> batches = train_batches(split, batch_size=3, seed=0, mean=[0.0], std=[1.0])
      >>> batches[7]["image"].shape, batches[7]["position"].tolist()
      ((3, 2, 2, 1), [1, 2, 3])
      >>> sorted([*batches[0]["index"].tolist(), *batches[1]["index"].tolist()])
      [0, 1, 2, 3, 4, 5]

    References:
      He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, for the
      augmentation.
    """
    num_examples = check_split(split)
    mean, std = _as_images(split, mean, std)
    local = _local_slice(batch_size, process_index, process_count)
    examples_at = _endless_order(num_examples, seed)

    def load(step: int) -> Batch:
        start = step * batch_size
        index = examples_at(start + local.start, start + local.stop)
        images = split.images[index]
        if augment:
            # Drawn for the whole global batch, so that every slicing gets the same crops.
            generator = random_generator(seed, "augmentation", step)
            corners = generator.integers(2 * _CROP_PADDING + 1, size=(batch_size, 2))
            is_flipped = generator.random(batch_size) < 0.5
            images = _crop_and_flip(images, corners[local], is_flipped[local])
        return {
            "image": _normalize_gathered(images, mean, std),
            "label": split.labels[index],
            "position": np.arange(local.start + 1, local.stop + 1, dtype=np.int32),
            "index": index,
        }

    return grain.MapDataset.range(sys.maxsize // batch_size).map(load)


def iterate(
    dataset: grain.MapDataset[Batch], start_step: int, num_steps: int
) -> Iterator[tuple[int, Batch]]:
    """Iterates over steps, and loads the next batches in threads while one is used.

    Args:
      dataset: the result of `train_batches` or `evaluation_batches`.
      start_step: first step, such as that of a checkpoint.
      num_steps: the number of steps.

    Returns:
      An iterator over `(step, dataset[step])`.

    Raises:
      ValueError: an argument is negative.

    Examples:
      >>> split = Split(np.zeros([4, 2, 2, 1], np.uint8), np.arange(4, dtype=np.int32))
      >>> batches = train_batches(split, batch_size=2, seed=0, mean=[0.0], std=[1.0])
      >>> [step for step, batch in iterate(batches, start_step=5, num_steps=3)]
      [5, 6, 7]
    """
    if start_step < 0 or num_steps < 0:
        raise ValueError(
            "expected a non-negative start_step and num_steps, "
            f"got start_step={start_step}, num_steps={num_steps}"
        )
    steps = dataset[start_step : start_step + num_steps]
    return enumerate(steps.to_iter_dataset(_READ_OPTIONS), start_step)


def evaluation_batches(
    split: Split,
    *,
    batch_size: int,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset[Batch]:
    """Makes batches of equal size that contain every example once, in order, with a mask.

    `iterate(batches, 0, len(batches))` reads them ahead with little memory.

    Args:
      split: `N` examples, images `[N, H, W, C]`.
      batch_size: size of each batch, divisible by `process_count`.
      mean: `[C]`, see `train_batches`.
      std: `[C]`, see `train_batches`.
      process_index: which contiguous slice of each batch to load.
      process_count: how many slices there are.

    Returns:
      A random-access dataset of `⌈N / batch_size⌉` dicts with `n = batch_size / process_count`
      examples: `image` float32 `[n, H, W, C]`, normalised; `label` int32 `[n]`; `mask` bool `[n]`,
      False for the copies of the last example that fill the last batch.

    Raises:
      ValueError: an argument is out of range, or `split` is malformed.

    Examples:
      >>> split = Split(np.zeros([3, 2, 2, 1], np.uint8), np.arange(3, dtype=np.int32))
      >>> batches = evaluation_batches(split, batch_size=2, mean=[0.0], std=[1.0])
      >>> [batch["mask"].tolist() for _, batch in iterate(batches, 0, len(batches))]
      [[True, True], [True, False]]
    """
    num_examples = check_split(split)
    mean, std = _as_images(split, mean, std)
    local = _local_slice(batch_size, process_index, process_count)

    def load(start: int) -> Batch:
        positions = np.arange(start + local.start, start + local.stop)
        index = np.minimum(positions, num_examples - 1)
        return {
            "image": _normalize_gathered(split.images[index], mean, std),
            "label": split.labels[index],
            "mask": positions < num_examples,
        }

    return grain.MapDataset.range(0, num_examples, batch_size).map(load)


def _endless_order(num_examples: int, seed: int) -> Callable[[int, int], np.ndarray]:
    # Grain's shuffle works example by example: 1 ms for a batch of 128 out of 50,000, but more than
    # 100 ms if it has to search its 16-bit domain for one of a few dozen examples.
    @functools.lru_cache(maxsize=4)
    def permutation(epoch: int) -> np.ndarray:
        return random_generator(seed, "order", epoch).permutation(num_examples)

    def examples_at(start: int, stop: int) -> np.ndarray:
        first_epoch, offset = divmod(start, num_examples)
        last_epoch = (stop - 1) // num_examples
        epochs = [permutation(epoch) for epoch in range(first_epoch, last_epoch + 1)]
        return np.concatenate(epochs)[offset : offset + stop - start]

    permutation(0)  # Called now, so that a bad seed raises before work starts.
    return examples_at


def _as_images(
    split: Split, mean: Sequence[float] | np.ndarray, std: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    num_channels = split.images.shape[-1]
    moments = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    for name, moment in zip(("mean", "std"), moments, strict=True):
        if moment.shape != (num_channels,) or not np.isfinite(moment).all():
            raise ValueError(
                f"{name}: expected {num_channels} finite numbers, one a channel, got {moment}"
            )
    if not np.all(moments[1] > 0):
        raise ValueError(f"std: expected positive numbers, got {moments[1]}")
    # Whole images: NumPy subtracts and divides by these twice as fast as by three channels.
    image_mean, image_std = (np.full(split.images.shape[1:], moment) for moment in moments)
    return image_mean, image_std


def _normalize_gathered(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    # In place, for float32 in `images` itself: nothing else uses a gathered batch, and allocating
    # every intermediate result would cost several times the arithmetic.
    pixels = to_unit_scale(images)
    pixels -= mean
    pixels /= std
    return pixels


def _check_batch_size(batch_size: int):
    if not is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size: expected an int of at least 1, got {batch_size!r}")


def _local_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    _check_batch_size(batch_size)
    if not 0 <= process_index < process_count:
        raise ValueError(
            "expected 0 <= process_index < process_count, "
            f"got process_index={process_index}, process_count={process_count}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size: expected a multiple of process_count={process_count}, got {batch_size}; "
            f"take {batch_size - batch_size % process_count or process_count}"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _crop_and_flip(images: np.ndarray, corners: np.ndarray, is_flipped: np.ndarray) -> np.ndarray:
    border = (_CROP_PADDING, _CROP_PADDING)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2, 3))
    crops = windows[np.arange(len(images)), corners[:, 0], corners[:, 1], 0]
    crops[is_flipped] = crops[is_flipped, :, ::-1]
    return crops
