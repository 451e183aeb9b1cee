"""Messages of data sets, their archives and the pipeline."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import pickle
from typing import Any
from unittest import mock

import numpy as np

from psclip_optax.training.data import archives, corruptions, datasets, pipeline, splits
from psclip_optax.training.data.archives import DatasetError
from tests.messages.rows import Row, in_folder, under_a_file
from tests.training.official_archives import cifar100, closed_port_url, serve

SPLIT = splits.Split(np.zeros((6, 2, 2, 1), np.uint8), np.zeros(6, np.int32))


def batches(**options: Any):
    given = {"batch_size": 2, "seed": 0, "mean": [0.0], "std": [1.0]} | options
    return pipeline.train_batches(given.pop("split", SPLIT), **given)


def fetch(
    folder: pathlib.Path,
    path: str = "/toy",
    known_hash: str = "md5:" + "0" * 32,
    server: bool = True,
):
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1"}))
        running = stack.enter_context(serve()) if server else None
        if running:
            running.bodies["/toy"] = b"toy"
        url = running.url if running else closed_port_url()
        archives.fetch_archive(url + path, known_hash, "toy.tar.gz", folder)


def unpickle(content: Any):
    data = content if isinstance(content, bytes) else pickle.dumps(content)
    return archives.load_pickle(io.BytesIO(data), "toy")


def cifar(folder: pathlib.Path, file: str = "train", **changes: Any):
    archive = cifar100()
    for name, content in archive.contents.items():
        changed = content | {key.encode(): item for key, item in changes.items() if name == file}
        kept = {key: item for key, item in changed.items() if item is not None}
        (folder / name).write_bytes(pickle.dumps(kept))
    return datasets.load_dataset("cifar100", data_dir=folder)


def archive_of_another(folder: pathlib.Path) -> pathlib.Path:
    (folder / "toy.tar.gz").write_bytes(cifar100().targz)
    return folder / "toy.tar.gz"


# As Python 3 pickles bytes for Python 2, but with an encoding that does not exist.
NOT_LATIN1 = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R."


ROWS = [
    # Data
    Row(
        lambda: datasets.load_dataset("mnist"),
        DatasetError,
        "unknown dataset 'mnist'; expected one of digits, cifar10, cifar100",
    ),
    Row(
        lambda: datasets.load_dataset("digits", data_dir="data"),
        DatasetError,
        "digits comes with scikit-learn: leave out data_dir and url",
    ),
    Row(
        lambda: datasets.load_dataset("cifar10", data_dir="nowhere"),
        DatasetError,
        "expected cifar-10-batches-py/ or cifar-10-python.tar.gz in nowhere, which is not a "
        "folder; pass --data-dir with the folder that holds it, or leave it out to download",
    ),
    Row(
        in_folder(lambda folder: datasets.load_dataset("cifar10", data_dir=folder)),
        DatasetError,
        "expected cifar-10-batches-py/ or cifar-10-python.tar.gz in ⟨folder⟩; pass --data-dir "
        "with the folder that holds it, or leave it out to download",
    ),
    Row(
        lambda: splits.train_validation_split(SPLIT, num_validation=6, seed=0),
        ValueError,
        "num_validation: expected an int, 0 to 5, so that some of the 6 examples are left to "
        "train on, got 6",
    ),
    Row(
        lambda: splits.train_validation_split(SPLIT, num_validation=0.1, seed=0),
        ValueError,
        "num_validation: expected an int, 0 to 5, so that some of the 6 examples are left to "
        "train on, got 0.1",
    ),
    Row(
        lambda: splits.random_generator(-1, "order"),
        ValueError,
        "seed: expected a non-negative int, got -1",
    ),
    Row(
        lambda: batches(seed=1.5),
        ValueError,
        "seed: expected a non-negative int, got 1.5",
    ),
    Row(
        lambda: splits.check_images(SPLIT.images / 255),
        ValueError,
        "images: expected a NumPy array, uint8 or float32 [N, H, W, C], got float64[6, 2, 2, 1]",
    ),
    Row(
        lambda: splits.check_split(SPLIT.images),
        ValueError,
        "split: expected a Split of images and labels, got uint8[6, 2, 2, 1]",
    ),
    Row(
        lambda: splits.check_split(SPLIT._replace(labels=[0] * 6)),
        ValueError,
        "labels: expected a NumPy array, int32 [6], one label an image, got a list",
    ),
    Row(
        lambda: splits.check_split(splits.Split(*(part[:0] for part in SPLIT))),
        ValueError,
        "split: expected at least one example, got none",
    ),
    Row(
        lambda: batches(batch_size=0),
        ValueError,
        "batch_size: expected an int of at least 1, got 0",
    ),
    Row(
        lambda: batches(batch_size=3, process_count=2),
        ValueError,
        "batch_size: expected a multiple of process_count=2, got 3; take 2",
    ),
    Row(
        lambda: batches(process_index=2, process_count=2),
        ValueError,
        "expected 0 <= process_index < process_count, got process_index=2, process_count=2",
    ),
    Row(
        lambda: batches(mean=[0.0, 0.0]),
        ValueError,
        "mean: expected 1 finite numbers, one a channel, got [0. 0.]",
    ),
    Row(
        lambda: batches(std=[0.0]),
        ValueError,
        "std: expected positive numbers, got [0.]",
    ),
    Row(
        lambda: pipeline.iterate(batches(), -1, 2),
        ValueError,
        "expected a non-negative start_step and num_steps, got start_step=-1, num_steps=2",
    ),
    Row(
        lambda: corruptions.with_label_noise(SPLIT.labels, 1.5, 10, seed=0),
        ValueError,
        "with_label_noise expects `rate` >= 0 and <= 1, got 1.5",
    ),
    Row(
        lambda: corruptions.with_label_noise(SPLIT.labels, 0.5, 1, seed=0),
        ValueError,
        "num_classes: expected an int of at least 2, got 1",
    ),
    Row(
        lambda: corruptions.with_label_noise([0, 1], 0.5, 10, seed=0),
        ValueError,
        "labels: expected a NumPy array, int [N], got a list",
    ),
    Row(
        lambda: corruptions.with_label_noise(SPLIT.labels - 1, 0.5, 10, seed=0),
        ValueError,
        "labels: expected 0 to 9, got -1 to -1",
    ),
    Row(
        lambda: corruptions.with_student_t_pixels(SPLIT.images, 0.0, seed=0),
        ValueError,
        "with_student_t_pixels expects `degrees_of_freedom` > 0 and < inf, got 0",
    ),
    # Archives
    Row(
        in_folder(lambda folder: fetch(folder, known_hash="eb9058c3")),
        DatasetError,
        "expected a hash such as 'md5:<hex digest>', got 'eb9058c3'",
    ),
    Row(
        in_folder(lambda folder: fetch(folder, "/missing")),
        DatasetError,
        "cannot fetch ⟨url⟩/missing: the server answered 404 Not Found; try again, or pass "
        "--data-dir with an existing copy",
    ),
    Row(
        in_folder(lambda folder: fetch(folder, server=False)),
        DatasetError,
        "cannot fetch ⟨url⟩/toy: the server cannot be reached, or the connection was lost; try "
        "again, or pass --data-dir with an existing copy",
    ),
    Row(
        in_folder(lambda folder: fetch(folder)),
        DatasetError,
        "cannot use ⟨url⟩/toy: ⟨Pooch's words⟩; try again, or pass --data-dir with an existing "
        "copy",
    ),
    Row(
        in_folder(lambda folder: fetch(under_a_file(folder))),
        DatasetError,
        "cannot write ⟨folder⟩/file/below/toy.tar.gz: Not a directory; make room or choose "
        "another cache folder, or pass --data-dir with an existing copy",
    ),
    Row(
        in_folder(lambda folder: archives.read_pickles(folder, "toy", ["meta"])),
        DatasetError,
        "cannot read ⟨folder⟩: [Errno 2] No such file or directory: '⟨folder⟩/meta'; use a "
        "fresh copy of the official archive",
    ),
    Row(
        in_folder(
            lambda folder: archives.read_pickles(archive_of_another(folder), "toy", ["meta"])
        ),
        DatasetError,
        "⟨folder⟩/toy.tar.gz: expected toy/meta, not found; use a fresh copy of the official "
        "archive",
    ),
    Row(
        lambda: unpickle([1, 2]),
        DatasetError,
        "toy: expected a pickled dict, got a list; use a fresh copy of the official archive",
    ),
    Row(
        lambda: unpickle({"data": print}),
        DatasetError,
        "toy: refused to load 'builtins.print', which no array needs; use a fresh copy of the "
        "official archive",
    ),
    Row(
        lambda: unpickle({"data": np.array([1j])}),
        DatasetError,
        "toy: expected bool, int or float arrays, got dtype '<c16'; use a fresh copy of the "
        "official archive",
    ),
    Row(
        lambda: unpickle(b"no pickle"),
        DatasetError,
        "toy: not a readable pickle (UnpicklingError); use a fresh copy of the official archive",
    ),
    Row(
        lambda: unpickle(NOT_LATIN1),
        DatasetError,
        "toy: not a readable pickle (UnpicklingError); use a fresh copy of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, data=None)),
        DatasetError,
        "⟨folder⟩:train: expected the key b'data', got b'filenames', b'fine_labels'; use a "
        "fresh copy of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, data=[0, 1])),
        DatasetError,
        "⟨folder⟩:train: expected an array at b'data', got a list; use a fresh copy of the "
        "official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, data=np.zeros((7, 3), np.uint8))),
        DatasetError,
        "⟨folder⟩:train: expected b'data' of uint8 [N, 3072], got uint8[7, 3]; use a fresh copy"
        " of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, fine_labels=[0, 1])),
        DatasetError,
        "⟨folder⟩:train: expected a list of 7 at b'fine_labels', one label an image, got a list"
        " of 2; use a fresh copy of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, fine_labels=[100] * 7)),
        DatasetError,
        "⟨folder⟩:train: expected b'fine_labels' of 0 to 99, got 100; use a fresh copy of the "
        "official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, "meta", fine_label_names=[b"cat"])),
        DatasetError,
        "⟨folder⟩:meta: expected a list of 100 names (bytes) at b'fine_label_names', got "
        "[b'cat']; use a fresh copy of the official archive",
    ),
]
