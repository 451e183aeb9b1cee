from __future__ import annotations

import itertools
import threading
from typing import Any

import chex
import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psclip_optax.training.data.pipeline import Batch, evaluation_batches, iterate, train_batches
from psclip_optax.training.data.splits import Split, to_unit_scale

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def make_split(num_examples: int) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(num_examples, 6, 5, 3), dtype=np.uint8)
    return Split(images, rng.integers(10, size=num_examples, dtype=np.int32))


SPLIT = make_split(23)


def make_batches(**options: Any) -> grain.MapDataset[Batch]:
    return train_batches(
        **{"split": SPLIT, "batch_size": 8, "seed": 0, "mean": MEAN, "std": STD, **options}
    )


def element(dataset: grain.MapDataset[Batch], step: int) -> Batch:
    batch = dataset[step]
    assert batch is not None
    return batch


def batch_at(step: int, **options: Any) -> Batch:
    return element(make_batches(**options), step)


def order(num_examples: int, batch_size: int = 8, **options: Any) -> np.ndarray:
    dataset = make_batches(batch_size=batch_size, **options)
    num_steps = -(-num_examples // batch_size)
    indices = [element(dataset, step)["index"] for step in range(num_steps)]
    return np.concatenate(indices)[:num_examples]


def test_batches_hold_what_they_say():
    batch = batch_at(5)
    index = batch["index"]
    expected = (SPLIT.images[index] / 255 - MEAN) / STD
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch["label"], SPLIT.labels[index])
    np.testing.assert_array_equal(batch["position"], np.arange(1, 9))
    assert {key: value.dtype for key, value in batch.items()} == {
        "image": np.float32,
        "label": np.int32,
        "position": np.int32,
        "index": np.int64,
    }


def test_float_images_are_normalised_and_left_alone():
    images = to_unit_scale(SPLIT.images)
    kept = images.copy()
    batch = batch_at(3, split=Split(images, SPLIT.labels), augment=True)
    chex.assert_trees_all_equal(batch, batch_at(3, augment=True), strict=True)
    np.testing.assert_array_equal(images, kept)


@given(
    num_examples=st.integers(1, 20),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2),
)
def test_every_epoch_is_a_permutation(num_examples: int, batch_size: int, seed: int, epoch: int):
    split = make_split(num_examples)
    indices = order((epoch + 1) * num_examples, batch_size, seed=seed, split=split)
    np.testing.assert_array_equal(np.sort(indices[-num_examples:]), np.arange(num_examples))


def test_epochs_and_seeds_differ():
    epochs = [order(3 * 23, seed=seed).reshape(3, 23) for seed in (0, 1, 2)]
    orders = np.concatenate(epochs).tolist()
    assert len(set(map(tuple, orders))) == 9


def test_every_example_comes_first_as_often():
    firsts = order(23 * 1150, batch_size=230).reshape(1150, 23)[:, 0]
    counts = np.bincount(firsts, minlength=23)
    assert np.all(np.abs(counts - 50) < 5 * np.sqrt(50))


@given(step=st.integers(0, 2**40), seed=st.integers(0, 2**40), augment=st.booleans())
def test_batch_is_a_function_of_seed_and_step(step: int, seed: int, augment: bool):
    dataset = make_batches(seed=seed, augment=augment)
    first = element(dataset, step)
    element(dataset, step + 1)
    chex.assert_trees_all_equal(element(dataset, step), first, strict=True)
    chex.assert_trees_all_equal(batch_at(step, seed=seed, augment=augment), first, strict=True)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_process_slices_make_the_global_batch(process_count: int, augment: bool):
    for step in (0, 2, 11):
        slices = [
            batch_at(step, augment=augment, process_index=i, process_count=process_count)
            for i in range(process_count)
        ]
        assert all(len(part["index"]) == 8 // process_count for part in slices)
        union = {key: np.concatenate([part[key] for part in slices]) for key in slices[0]}
        chex.assert_trees_all_equal(union, batch_at(step, augment=augment), strict=True)


def test_augmentation_changes_images_alone():
    plain, augmented = batch_at(4), batch_at(4, augment=True)
    assert np.any(plain.pop("image") != augmented.pop("image"))
    chex.assert_trees_all_equal(plain, augmented, strict=True)


def crops(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Return all 9 × 9 crops of the zero-padded image, plain and flipped, with their offsets."""
    height, width, _ = image.shape
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    return {
        padded[y : y + height, x : x + width][:, :: -1 if flip else 1].tobytes(): (y, x, flip)
        for y, x, flip in itertools.product(range(9), range(9), (False, True))
    }


def test_augmentation_crops_and_flips():
    dataset = make_batches(augment=True, mean=[0.0] * 3, std=[1.0] * 3)
    drawn = []
    for _, batch in iterate(dataset, 0, 120):
        images = np.rint(batch["image"] * 255).astype(np.uint8)
        drawn += [
            crops(SPLIT.images[index])[image.tobytes()]
            for index, image in zip(batch["index"], images, strict=True)
        ]
    rows, columns, flips = np.array(drawn).T
    for offsets in (rows, columns):
        assert np.all(np.abs(np.bincount(offsets, minlength=9) / len(drawn) - 1 / 9) < 0.06)
    assert abs(flips.mean() - 0.5) < 0.1


def test_same_example_is_augmented_anew():
    dataset = make_batches(split=make_split(1), batch_size=1, augment=True)
    images = {batch["image"].tobytes() for _, batch in iterate(dataset, 0, 20)}
    assert len(images) > 10


@pytest.mark.parametrize("start_step", [0, 1, 7])
def test_iterate_resumes_anywhere(start_step: int):
    dataset = make_batches(augment=True)
    steps = list(iterate(dataset, start_step, 12))
    assert [step for step, _ in steps] == list(range(start_step, start_step + 12))
    for step, batch in steps:
        chex.assert_trees_all_equal(batch, batch_at(step, augment=True), strict=True)


def test_iterate_reads_ahead():
    loaded = threading.Semaphore(0)

    def load(batch: Batch) -> Batch:
        loaded.release()
        return batch

    steps = iterate(make_batches().map(load), 0, 100)
    next(steps)
    assert all(loaded.acquire(timeout=60) for _ in range(4))


def test_iterate_over_no_steps():
    assert list(iterate(make_batches(), 3, 0)) == []


@pytest.mark.parametrize(("start_step", "num_steps"), [(-1, 2), (1, -2)])
def test_iterate_refuses_negative_steps(start_step: int, num_steps: int):
    with pytest.raises(ValueError, match=f"start_step={start_step}, num_steps={num_steps}"):
        iterate(make_batches(), start_step, num_steps)


@given(num_examples=st.integers(1, 30), batch_size=st.integers(1, 35))
def test_evaluation_sees_every_example_once(num_examples: int, batch_size: int):
    split = make_split(num_examples)
    dataset = evaluation_batches(split, batch_size=batch_size, mean=MEAN, std=STD)
    batches = [batch for _, batch in iterate(dataset, 0, len(dataset))]
    assert len(batches) == -(-num_examples // batch_size)
    assert all(batch["image"].shape == (batch_size, 6, 5, 3) for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < num_examples)
    np.testing.assert_array_equal(labels[mask], split.labels, strict=True)
    expected = (split.images / 255 - MEAN) / STD
    np.testing.assert_allclose(images[mask], expected, rtol=1e-5, atol=1e-6)
    assert np.all(images[~mask] == images[mask][-1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size: expected an int of at least 1, got 0"),
        ({"process_count": 3}, "multiple of process_count=3, got 8; take 6"),
        ({"process_count": 16}, "multiple of process_count=16, got 8; take 16"),
        ({"process_index": 2, "process_count": 2}, "process_index=2, process_count=2"),
        ({"process_index": -1}, "process_index=-1, process_count=1"),
        ({"process_count": 0}, "process_index=0, process_count=0"),
        ({"seed": -1}, "seed: expected a non-negative int, got -1"),
        ({"mean": [0.5]}, r"mean: expected 3 finite numbers, one a channel, got \[0.5\]"),
        ({"std": [1.0, float("nan"), 1.0]}, "std: expected 3 finite numbers"),
        ({"std": [1.0, 0.0, 1.0]}, "std: expected positive numbers"),
        (
            {"split": Split(SPLIT.images, SPLIT.labels[1:])},
            r"labels: expected a NumPy array, int32 \[23\]",
        ),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], expected: str):
    with pytest.raises(ValueError, match=expected):
        make_batches(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size: expected an int of at least 1"),
        ({"mean": [1.0]}, "mean: expected 3"),
    ],
)
def test_evaluation_arguments_are_checked(options: dict[str, Any], expected: str):
    with pytest.raises(ValueError, match=expected):
        evaluation_batches(**{"split": SPLIT, "batch_size": 8, "mean": MEAN, "std": STD, **options})
