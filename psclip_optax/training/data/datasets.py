"""Image classification datasets in memory: digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pooch

from psclip_optax.arrays import described, is_integer
from psclip_optax.training.data.archives import (
    FETCH_AGAIN,
    DatasetError,
    fetch_archive,
    read_pickles,
)


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
      images: `[N, H, W, C]`, uint8 in 0…255, or float32 where 1 stands for 255.
      labels: `[N]`, int32.

    Examples:
      >>> load_dataset("digits").test.images.shape
      (500, 8, 8, 1)
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A train and a test split, and what their labels mean.

    Attributes:
      name: name that `load_dataset` knows it by.
      num_classes: labels are in `0 … num_classes - 1`.
      label_names: `num_classes` names.
      train: split to learn from.
      test: split to evaluate on.

    Examples:
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
    """What a model must know of a dataset.

    Attributes:
      image_shape: of one image, `(H, W, C)`.
      num_classes: labels are in `0 … num_classes - 1`.
    """

    image_shape: tuple[int, ...]
    num_classes: int


class _CifarArchive(NamedTuple):
    url: str
    known_hash: str
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    meta_file: str
    labels_key: bytes
    names_key: bytes
    num_classes: int

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, self.test_file, self.meta_file)


_CIFAR = {
    "cifar10": _CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        known_hash="md5:c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_file="test_batch",
        meta_file="batches.meta",
        labels_key=b"labels",
        names_key=b"label_names",
        num_classes=10,
    ),
    "cifar100": _CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        known_hash="md5:eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train_files=("train",),
        test_file="test",
        meta_file="meta",
        labels_key=b"fine_labels",
        names_key=b"fine_label_names",
        num_classes=100,
    ),
}
_NAMES = ("digits", *_CIFAR)
_DIGITS_NUM_TEST = 500
_DIGITS_SEED = 0


def load_dataset(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    url: str | None = None,
    known_hash: str | None = None,
) -> Dataset:
    """Loads a dataset into memory, downloading it once if there is no copy.

    `"digits"` comes with scikit-learn; its 1797 images are permuted and split into 1297 train
    and 500 test images, stratified by class, always in the same way.

    Args:
      name: `"digits"`, `"cifar10"` or `"cifar100"`.
      data_dir: an existing copy of CIFAR, for which no hash is asked: the folder of the official
        archive, a folder that holds that folder or the archive, or the archive itself.
      cache_dir: where downloads are kept; the user's cache folder by default.
      url: a mirror of the official archive.
      known_hash: `"<algorithm>:<hex digest>"` of the mirror's archive, if it is not the official.

    Returns:
      The dataset, its images uint8.

    Raises:
      DatasetError: the name is unknown, the archive cannot be had, or its content is not that of
        the official layout.

    Examples:
      >>> digits = load_dataset("digits")
      >>> digits.train.images.dtype, digits.train.labels.dtype
      (dtype('uint8'), dtype('int32'))

    References:
      Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
      https://www.cs.toronto.edu/~kriz/cifar.html.
      Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998.
    """
    _check_name(name)
    if name == "digits":
        if data_dir is not None or url is not None:
            raise DatasetError("digits comes with scikit-learn: leave out data_dir and url")
        return _load_digits()
    archive = _CIFAR[name]
    if data_dir is not None:
        return _load_cifar(name, _find_copy(pathlib.Path(data_dir).expanduser(), archive))
    path = fetch_archive(
        url or archive.url,
        known_hash or archive.known_hash,
        archive.filename,
        pathlib.Path(cache_dir or pooch.os_cache("psclip_optax")),
    )
    return _load_cifar(name, path)


def dataset_shape(name: str) -> DatasetShape:
    """The shapes of a dataset, without its images: nothing is downloaded.

    Args:
      name: one that `load_dataset` knows.

    Returns:
      Shape of an image and number of classes.

    Raises:
      DatasetError: the name is not known.

    Examples:
      >>> dataset_shape("cifar100")
      DatasetShape(image_shape=(32, 32, 3), num_classes=100)
    """
    _check_name(name)
    if name == "digits":
        return DatasetShape((8, 8, 1), 10)
    return DatasetShape((32, 32, 3), _CIFAR[name].num_classes)


def train_validation_split(split: Split, *, num_validation: int, seed: int) -> tuple[Split, Split]:
    """Holds examples out, stratified by class and deterministic in `seed`.

    Each class gives its proportional share of the validation examples, rounded up or down.

    Args:
      split: `N` examples.
      num_validation: how many to hold out, `0 … N - 1`.
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
    # Evenly spaced picks out of the examples sorted by class give every class its share.
    picks = (2 * np.arange(num_validation) + 1) * num_examples // max(2 * num_validation, 1)
    is_held_out = np.zeros(num_examples, bool)
    is_held_out[by_class[picks]] = True
    return _take(split, ~is_held_out), _take(split, is_held_out)


def to_unit_scale(images: np.ndarray) -> np.ndarray:
    """Brings pixels to the scale on which 1 is white.

    Args:
      images: uint8 or float32, any shape.

    Returns:
      float32 of the same shape: uint8 divided by 255, float32 as it is.

    Examples:
      >>> to_unit_scale(np.uint8([0, 51, 255]))
      array([0. , 0.2, 1. ], dtype=float32)
    """
    return images / np.float32(255) if images.dtype == np.uint8 else images


def random_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Makes a generator whose stream no other purpose or index shares.

    Args:
      seed: non-negative seed.
      purpose: what the numbers are for.
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


def check_images(images: np.ndarray):
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
    """Checks the dtypes and shapes that `Split` promises.

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


def _check_name(name: str) -> None:
    if name not in _NAMES:
        raise DatasetError(f"unknown dataset {name!r}; expected one of {', '.join(_NAMES)}")


def _take(split: Split, indices: np.ndarray) -> Split:
    return Split(split.images[indices], split.labels[indices])


def _load_digits() -> Dataset:
    # Here, because scikit-learn takes a second to import.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = random_generator(_DIGITS_SEED, "digits").permutation(len(labels))
    train, test = train_validation_split(
        Split(pixels[order], labels[order].astype(np.int32)),
        num_validation=_DIGITS_NUM_TEST,
        seed=_DIGITS_SEED,
    )
    return Dataset("digits", 10, tuple("0123456789"), train, test)


def _find_copy(data_dir: pathlib.Path, archive: _CifarArchive) -> pathlib.Path:
    if data_dir.is_file() or (data_dir / archive.meta_file).is_file():
        return data_dir
    for copy in (data_dir / archive.folder, data_dir / archive.filename):
        if copy.exists():
            return copy
    found = "" if data_dir.is_dir() else ", which is not a folder"
    raise DatasetError(
        f"expected {archive.folder}/ or {archive.filename} in {data_dir}{found}; pass --data-dir "
        "with the folder that holds it, or leave it out to download"
    )


def _load_cifar(name: str, source: pathlib.Path) -> Dataset:
    archive = _CIFAR[name]
    contents = read_pickles(source, archive.folder, archive.files)
    batches = {
        file: _cifar_split(contents[file], archive, f"{source}:{file}")
        for file in (*archive.train_files, archive.test_file)
    }
    train = [batches[file] for file in archive.train_files]
    return Dataset(
        name,
        archive.num_classes,
        _label_names(contents[archive.meta_file], archive, f"{source}:{archive.meta_file}"),
        Split(*map(np.concatenate, zip(*train, strict=True))),
        batches[archive.test_file],
    )


def _cifar_split(content: dict[Any, Any], archive: _CifarArchive, where: str) -> Split:
    data = _entry(content, b"data", where)
    if not isinstance(data, np.ndarray):
        raise DatasetError(
            f"{where}: expected an array at b'data', got a {type(data).__name__}; {FETCH_AGAIN}"
        )
    if data.dtype != np.uint8 or data.shape != (len(data), 3 * 32 * 32) or not len(data):
        raise DatasetError(
            f"{where}: expected b'data' of uint8 [N, 3072], got {described(data)}; {FETCH_AGAIN}"
        )
    labels = _entry(content, archive.labels_key, where)
    if not isinstance(labels, list) or len(labels) != len(data):
        size = f" of {len(labels)}" if isinstance(labels, list) else ""
        raise DatasetError(
            f"{where}: expected a list of {len(data)} at {archive.labels_key}, one label an "
            f"image, got a {type(labels).__name__}{size}; {FETCH_AGAIN}"
        )
    is_label = [type(label) is int and 0 <= label < archive.num_classes for label in labels]
    if not all(is_label):
        raise DatasetError(
            f"{where}: expected {archive.labels_key} of 0 to {archive.num_classes - 1}, "
            f"got {labels[is_label.index(False)]!r}; {FETCH_AGAIN}"
        )
    channels_last = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(channels_last), np.array(labels, np.int32))


def _label_names(content: dict[Any, Any], archive: _CifarArchive, where: str) -> tuple[str, ...]:
    names = _entry(content, archive.names_key, where)
    is_names = isinstance(names, list) and all(isinstance(name, bytes) for name in names)
    if not is_names or len(names) != archive.num_classes:
        raise DatasetError(
            f"{where}: expected a list of {archive.num_classes} names (bytes) at "
            f"{archive.names_key}, got {str(names)[:80]}; {FETCH_AGAIN}"
        )
    return tuple(name.decode(errors="replace") for name in names)


def _entry(content: dict[Any, Any], key: bytes, where: str) -> Any:
    if key not in content:
        found = ", ".join(sorted(map(repr, content)))
        raise DatasetError(f"{where}: expected the key {key}, got {found}; {FETCH_AGAIN}")
    return content[key]
