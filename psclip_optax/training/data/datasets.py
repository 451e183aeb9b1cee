"""Load image classification data sets into memory."""

from __future__ import annotations

import os

from psclip_optax.training.data.archives import DatasetError
from psclip_optax.training.data.register import DATASETS
from psclip_optax.training.data.source import Origin, Source
from psclip_optax.training.data.splits import Dataset, DatasetShape


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
      data_dir: an existing copy of CIFAR, whose hash is not checked: the folder of the official
        archive, a folder that contains that folder or the archive, or the archive itself.
      cache_dir: folder for downloads; the user's cache folder by default.
      url: a mirror of the official archive.
      known_hash: `"<algorithm>:<hex digest>"` of the mirror's archive, if it differs from the
          official one.

    Returns:
      The dataset, its images uint8.

    Raises:
      DatasetError: the name is unknown, or the archive is not available or does not have the
        official layout.

    Examples:
      >>> digits = load_dataset("digits")
      >>> digits.train.images.dtype, digits.train.labels.dtype
      (dtype('uint8'), dtype('int32'))

    References:
      Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
      https://www.cs.toronto.edu/~kriz/cifar.html.
      Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998.
    """
    source = _source(name)
    if source.comes_with is not None and (data_dir is not None or url is not None):
        raise DatasetError(f"{name} comes with {source.comes_with}: leave out data_dir and url")
    return source.load(Origin(data_dir, cache_dir, url, known_hash))


def dataset_shape(name: str) -> DatasetShape:
    """Looks up the shapes of a data set, without downloading it.

    Args:
      name: a name that `load_dataset` accepts.

    Returns:
      Shape of an image and number of classes.

    Raises:
      DatasetError: the name is not known.

    Examples:
      >>> dataset_shape("cifar100")
      DatasetShape(image_shape=(32, 32, 3), num_classes=100)
    """
    return _source(name).shape


def _source(name: str) -> Source:
    if name not in DATASETS:
        raise DatasetError(f"unknown dataset {name!r}; expected one of {', '.join(DATASETS)}")
    return DATASETS[name]
