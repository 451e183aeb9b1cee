from __future__ import annotations

import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from psclip_optax.training.data.archives import DatasetError
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.splits import (
    Dataset,
    Split,
    check_split,
    random_generator,
    to_unit_scale,
    train_validation_split,
)
from tests.training.official_archives import (
    OfficialArchive,
    Server,
    cifar10,
    cifar100,
    closed_port_url,
    python2_pickle,
)


def assert_is_dataset_of(dataset: Dataset, archive: OfficialArchive):
    labels_key = b"labels" if archive.dataset == "cifar10" else b"fine_labels"
    test_file = "test_batch" if archive.dataset == "cifar10" else "test"
    train_files = [
        file for file in archive.contents if file == "train" or file.startswith("data_batch")
    ]
    assert dataset.name == archive.dataset
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.label_names == tuple(f"class_{i}" for i in range(dataset.num_classes))
    for split, files in ((dataset.train, train_files), (dataset.test, [test_file])):
        planes = np.concatenate([archive.contents[file][b"data"] for file in files])
        labels = np.concatenate([archive.contents[file][labels_key] for file in files])
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.labels, labels)
        for row, column, channel in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 1)):
            np.testing.assert_array_equal(
                split.images[:, row, column, channel], planes[:, 1024 * channel + 32 * row + column]
            )


def unpack(archive: OfficialArchive, into: pathlib.Path) -> pathlib.Path:
    folder = into / archive.folder
    folder.mkdir()
    for name, content in archive.contents.items():
        (folder / name).write_bytes(python2_pickle(content))
    return folder


def test_cifar_is_downloaded_once(archive: OfficialArchive, server: Server, tmp_path: pathlib.Path):
    server.bodies["/mirror"] = archive.targz
    options: dict[str, Any] = {"cache_dir": tmp_path, "known_hash": archive.md5}
    downloaded = load_dataset(archive.dataset, url=f"{server.url}/mirror", **options)
    offline = load_dataset(archive.dataset, url=f"{closed_port_url()}/mirror", **options)
    assert_is_dataset_of(downloaded, archive)
    assert_is_dataset_of(offline, archive)
    assert server.requested == ["/mirror"]


def test_mirror_must_have_the_official_hash_unless_told(
    archive: OfficialArchive, server: Server, tmp_path: pathlib.Path
):
    server.bodies["/mirror"] = archive.targz
    with pytest.raises(DatasetError, match="does not match the known hash"):
        load_dataset(archive.dataset, url=f"{server.url}/mirror", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/missing", "/truncated/mirror"])
def test_failed_download_is_an_error(
    path: str, archive: OfficialArchive, server: Server, tmp_path: pathlib.Path
):
    server.bodies["/truncated/mirror"] = archive.targz
    with pytest.raises(DatasetError, match="cannot fetch") as caught:
        load_dataset(
            archive.dataset, url=server.url + path, known_hash=archive.md5, cache_dir=tmp_path
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_read(archive: OfficialArchive, tmp_path: pathlib.Path):
    folder = unpack(archive, tmp_path)
    assert_is_dataset_of(load_dataset(archive.dataset, data_dir=tmp_path), archive)
    assert_is_dataset_of(load_dataset(archive.dataset, data_dir=folder), archive)


def test_existing_archive_is_read(archive: OfficialArchive, tmp_path: pathlib.Path):
    name = "cifar-10-python.tar.gz" if archive.dataset == "cifar10" else "cifar-100-python.tar.gz"
    (tmp_path / name).write_bytes(archive.targz)
    assert_is_dataset_of(load_dataset(archive.dataset, data_dir=tmp_path), archive)
    assert_is_dataset_of(load_dataset(archive.dataset, data_dir=tmp_path / name), archive)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_data_dir_without_a_copy_is_an_error(archive: OfficialArchive, tmp_path: pathlib.Path):
    for data_dir in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DatasetError, match=f"expected {archive.folder}/ or .* in {data_dir}"):
            load_dataset(archive.dataset, data_dir=data_dir)


def test_incomplete_folder_names_the_missing_file(archive: OfficialArchive, tmp_path: pathlib.Path):
    folder = unpack(archive, tmp_path)
    missing = "test_batch" if archive.dataset == "cifar10" else "test"
    (folder / missing).unlink()
    with pytest.raises(DatasetError, match=f"cannot read .*{missing}"):
        load_dataset(archive.dataset, data_dir=tmp_path)


def test_archive_of_the_other_dataset_is_an_error(tmp_path: pathlib.Path):
    (tmp_path / "cifar.tar.gz").write_bytes(cifar10().targz)
    with pytest.raises(DatasetError, match="expected cifar-100-python/train, not found"):
        load_dataset("cifar100", data_dir=tmp_path / "cifar.tar.gz")


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({b"fine_labels": [0, 1]}, r"expected the key b'data', got .*fine_labels"),
        ({b"data": PIXELS}, "expected the key b'fine_labels'"),
        ({b"data": [1, 2], b"fine_labels": [0, 1]}, "expected an array at b'data', got a list"),
        ({b"data": PIXELS[0], b"fine_labels": [0]}, r"\[N, 3072\], got uint8\[3072\]"),
        ({b"data": PIXELS[:, 1:], b"fine_labels": [0, 1]}, r"got uint8\[2, 3071\]"),
        ({b"data": PIXELS[:0], b"fine_labels": []}, r"got uint8\[0, 3072\]"),
        ({b"data": PIXELS, b"fine_labels": [0]}, "expected a list of 2 .* got a list of 1"),
        ({b"data": PIXELS, b"fine_labels": b"01"}, "expected a list of 2 .* got a bytes"),
        ({b"data": PIXELS, b"fine_labels": [0, 100]}, "of 0 to 99, got 100"),
        ({b"data": PIXELS, b"fine_labels": [0, -1]}, "of 0 to 99, got -1"),
        ({b"data": PIXELS, b"fine_labels": [0, b"1"]}, "of 0 to 99, got b'1'"),
    ],
)
@pytest.mark.parametrize("file", ["train", "test"])
def test_malformed_images_are_refused(
    file: str, content: dict[bytes, Any], expected: str, tmp_path: pathlib.Path
):
    unpack(cifar100().with_content(**{file: content}), tmp_path)
    with pytest.raises(DatasetError, match=rf"cifar-100-python:{file}: .*{expected}") as caught:
        load_dataset("cifar100", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [[b"one"], b"names", [b"class"] * 99 + [99]])
def test_malformed_label_names_are_refused(names: Any, tmp_path: pathlib.Path):
    unpack(cifar100().with_content(meta={b"fine_label_names": names}), tmp_path)
    with pytest.raises(DatasetError, match="meta: expected a list of 100 names"):
        load_dataset("cifar100", data_dir=tmp_path)


def test_float_pixels_are_refused(tmp_path: pathlib.Path):
    folder = unpack(cifar100(), tmp_path)
    content = {b"data": PIXELS.astype(np.float32), b"fine_labels": [0, 1]}
    (folder / "train").write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match=r"got float32\[2, 3072\]"):
        load_dataset("cifar100", data_dir=tmp_path)


def test_unknown_dataset_lists_the_known():
    with pytest.raises(DatasetError, match=r"'mnist'; expected one of digits, cifar10, cifar100"):
        load_dataset("mnist")


@pytest.mark.parametrize("option", ["data_dir", "url"])
def test_digits_take_no_copy(option: str):
    options: dict[str, Any] = {option: "somewhere"}
    with pytest.raises(DatasetError, match="leave out data_dir and url"):
        load_dataset("digits", **options)


def test_digits_are_all_there_and_stratified():
    digits = load_dataset("digits")
    assert len(digits.train.images) == 1297
    assert len(digits.test.images) == 500
    images = np.concatenate([digits.train.images, digits.test.images])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    official_images, official_labels = load_digits(return_X_y=True)
    rows = np.column_stack([images.reshape(-1, 64) * (16 / 255), labels])
    official = np.column_stack([official_images, official_labels])
    np.testing.assert_array_equal(sorted(rows.round().tolist()), sorted(official.tolist()))
    shares = np.bincount(labels) * 500 / 1797
    assert np.all(np.abs(np.bincount(digits.test.labels) - shares) < 1)
    assert np.any(np.diff(digits.test.labels) < 0), "the examples come sorted by class"


def test_digits_are_the_same_every_time():
    first, second = load_dataset("digits"), load_dataset("digits")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pixel_moments_are_those_of_the_train_pixels(dtype: type):
    pixels = np.random.default_rng(0).integers(256, size=(9, 5, 4, 3)) * [1.0, 0.5, 0.1]
    images = (pixels if dtype == np.uint8 else pixels / 255).astype(dtype)
    train = Split(images, np.zeros(9, np.int32))
    dataset = Dataset("toy", 1, ("zero",), train, Split(images[:1] * 0, train.labels[:1]))
    unit = to_unit_scale(images).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.pixel_mean, unit.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(dataset.pixel_std, unit.std(axis=0), rtol=1e-6)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_validation_split_is_stratified(counts: list[int], seed: int, data: st.DataObject):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    examples = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    num_validation = data.draw(st.integers(0, len(labels) - 1))
    split = Split(examples, labels.astype(np.int32))
    train, validation = train_validation_split(split, num_validation=num_validation, seed=seed)
    kept, held_out = train.images.ravel(), validation.images.ravel()
    assert len(held_out) == num_validation
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), examples.ravel())
    for part in (train, validation):
        np.testing.assert_array_equal(part.labels, labels[part.images.ravel().astype(int)])
        assert np.all(np.diff(part.images.ravel()) > 0)
    shares = np.array(counts) * num_validation / len(labels)
    held_out_counts = np.bincount(validation.labels, minlength=len(counts))
    assert np.all(np.abs(held_out_counts - shares) < 1)


def test_validation_split_depends_on_the_seed_alone():
    train = load_dataset("digits").train
    splits = [train_validation_split(train, num_validation=100, seed=s)[1] for s in (0, 0, 1)]
    np.testing.assert_array_equal(splits[0].images, splits[1].images)
    assert np.any(splits[0].images != splits[2].images)


@pytest.mark.parametrize("num_validation", [-1, 1297, 2000])
def test_validation_split_must_leave_examples(num_validation: int):
    train = load_dataset("digits").train
    with pytest.raises(ValueError, match=f"expected an int, 0 to 1296, .* got {num_validation}"):
        train_validation_split(train, num_validation=num_validation, seed=0)


def test_negative_seed_is_an_error():
    with pytest.raises(ValueError, match="expected a non-negative int, got -1"):
        random_generator(-1, "order")


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (np.zeros((2, 8, 8)), np.zeros(2, np.int32), r"got float64\[2, 8, 8\]"),
        (np.zeros((2, 8, 8, 1)), np.zeros(2, np.int32), r"got float64\[2, 8, 8, 1\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2), r"int32 \[2\].* got float64\[2\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, np.int32), r"got int32\[3\]"),
        (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int32), "at least one example"),
    ],
)
def test_malformed_split_is_an_error(images: np.ndarray, labels: np.ndarray, expected: str):
    with pytest.raises(ValueError, match=expected):
        check_split(Split(images, labels))
