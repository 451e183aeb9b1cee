"""Read the official archives of CIFAR."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np
import pooch

from psclip_optax.arrays import described
from psclip_optax.training.data.archives import (
    FETCH_AGAIN,
    DatasetError,
    fetch_archive,
    read_pickles,
)
from psclip_optax.training.data.source import Origin
from psclip_optax.training.data.splits import Dataset, Split


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


_ARCHIVES = {
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


def load_cifar(name: str, origin: Origin) -> Dataset:
    """Loads CIFAR-10 or CIFAR-100.

    Args:
      name: `"cifar10"` or `"cifar100"`.
      origin: an existing copy, or where to download one.

    Returns:
      The dataset.

    Raises:
      DatasetError: the archive is not available, or does not have the official layout.
    """
    archive = _ARCHIVES[name]
    if origin.data_dir is not None:
        copy = _find_copy(pathlib.Path(origin.data_dir).expanduser(), archive)
        return _load_cifar(name, copy)
    path = fetch_archive(
        origin.url or archive.url,
        origin.known_hash or archive.known_hash,
        archive.filename,
        pathlib.Path(origin.cache_dir or pooch.os_cache("psclip_optax")),
    )
    return _load_cifar(name, path)


def _load_cifar(name: str, source: pathlib.Path) -> Dataset:
    archive = _ARCHIVES[name]
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
