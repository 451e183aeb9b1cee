from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from psclip_optax.training.data.corruptions import corrupt, with_label_noise, with_student_t_pixels
from psclip_optax.training.data.splits import Split, to_unit_scale

LABELS = np.random.default_rng(0).integers(10, size=20_000, dtype=np.int32)
ONES = np.ones((20_000, 1, 1, 1), np.float32)


@given(
    rate=st.floats(0, 1),
    num_classes=st.integers(2, 20),
    seed=st.integers(0, 2**40),
    num_examples=st.integers(0, 50),
)
def test_noisy_labels_are_labels(rate: float, num_classes: int, seed: int, num_examples: int):
    labels = np.arange(num_examples, dtype=np.int32) % num_classes
    noisy = with_label_noise(labels, rate, num_classes, seed)
    assert noisy.dtype == labels.dtype
    assert np.all((noisy >= 0) & (noisy < num_classes))
    np.testing.assert_array_equal(noisy, with_label_noise(labels, rate, num_classes, seed))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_label_noise_has_its_rate(rate: float):
    is_changed = with_label_noise(LABELS, rate, 10, seed=1) != LABELS
    five_sigma = 5 * np.sqrt(rate * (1 - rate) / len(LABELS))
    assert abs(is_changed.mean() - rate) <= five_sigma


def test_label_noise_is_uniform_over_the_other_classes():
    noisy = with_label_noise(LABELS, 1.0, 10, seed=2)
    shifts = np.bincount((noisy - LABELS) % 10, minlength=10)
    assert shifts[0] == 0
    assert stats.chisquare(shifts[1:]).pvalue > 1e-4


def test_higher_rate_keeps_the_changes_of_a_lower_one():
    low, high = (with_label_noise(LABELS, rate, 10, seed=3) for rate in (0.2, 0.4))
    is_changed = low != LABELS
    np.testing.assert_array_equal(high[is_changed], low[is_changed])


def test_corruption_depends_on_seed_and_example_alone():
    labels = with_label_noise(LABELS, 0.5, 10, seed=4)
    pixels = with_student_t_pixels(ONES, 2.0, seed=4, fraction=0.5)
    np.testing.assert_array_equal(with_label_noise(LABELS[:77], 0.5, 10, seed=4), labels[:77])
    np.testing.assert_array_equal(
        with_student_t_pixels(ONES[:77], 2.0, seed=4, fraction=0.5), pixels[:77]
    )
    assert np.any(with_label_noise(LABELS, 0.5, 10, seed=5) != labels)
    assert np.any(with_student_t_pixels(ONES, 2.0, seed=5) != pixels)


@pytest.mark.parametrize("degrees_of_freedom", [0.7, 2.0, 10.0])
def test_pixel_factors_are_student_t(degrees_of_freedom: float):
    factors = with_student_t_pixels(ONES, degrees_of_freedom, seed=6).ravel()
    assert stats.kstest(factors, stats.t(degrees_of_freedom).cdf).pvalue > 1e-4


def test_one_factor_an_image():
    images = np.random.default_rng(0).random((50, 4, 3, 2), np.float32) + 1
    ratios = with_student_t_pixels(images, 3.0, seed=7) / images
    assert len(np.unique(ratios[:, 0, 0, 0])) == 50
    np.testing.assert_allclose(ratios, ratios[:, :1, :1, :1] * np.ones_like(images), rtol=1e-6)


def test_fraction_of_images_is_multiplied():
    factors = with_student_t_pixels(ONES, 3.0, seed=8, fraction=0.3).ravel()
    assert abs(np.mean(factors != 1) - 0.3) <= 5 * np.sqrt(0.3 * 0.7 / len(ONES))
    everywhere = with_student_t_pixels(ONES, 3.0, seed=8).ravel()
    np.testing.assert_array_equal(factors[factors != 1], everywhere[factors != 1])


def test_no_image_is_multiplied_at_fraction_zero():
    images = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3)
    untouched = with_student_t_pixels(images, 1.0, seed=0, fraction=0.0)
    np.testing.assert_array_equal(untouched, to_unit_scale(images), strict=True)


def test_pixels_stay_finite_at_the_heaviest_tail():
    images = np.concatenate([ONES, ONES * 0], axis=1)
    pixels = with_student_t_pixels(images, 1e-3, seed=0)
    assert pixels.dtype == np.float32
    assert np.isfinite(pixels).all()
    assert np.all(pixels[:, 1] == 0)


def test_labels_and_pixels_are_corrupted_independently():
    split = Split(ONES, LABELS)
    noisy = corrupt(split, num_classes=10, label_noise=0.3, pixel_df=2.0, seed=9)
    np.testing.assert_array_equal(noisy.labels, with_label_noise(LABELS, 0.3, 10, seed=9))
    np.testing.assert_array_equal(noisy.images, with_student_t_pixels(ONES, 2.0, seed=9))
    is_changed = noisy.labels != LABELS
    is_large = np.abs(noisy.images.ravel()) > np.median(np.abs(noisy.images))
    correlation = np.corrcoef(is_changed, is_large)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(LABELS))


def test_nothing_is_corrupted_by_default():
    split = Split((ONES * 255).astype(np.uint8), LABELS)
    clean = corrupt(split, num_classes=10, seed=0)
    assert clean.images is split.images
    np.testing.assert_array_equal(clean.labels, LABELS)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_are_probabilities(rate: float):
    with pytest.raises(ValueError, match="expects `rate` >= 0 and <= 1"):
        with_label_noise(LABELS, rate, 10, seed=0)
    with pytest.raises(ValueError, match="expects `fraction` >= 0 and <= 1"):
        with_student_t_pixels(ONES, 2.0, seed=0, fraction=rate)


@pytest.mark.parametrize("degrees_of_freedom", [0.0, -1.0, float("inf"), float("nan")])
def test_degrees_of_freedom_are_positive(degrees_of_freedom: float):
    with pytest.raises(ValueError, match="expects `degrees_of_freedom` > 0 and < inf"):
        with_student_t_pixels(ONES, degrees_of_freedom, seed=0)


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    [
        (LABELS, 1, "num_classes: expected an int of at least 2, got 1"),
        (LABELS, 9, "labels: expected 0 to 8, got 0 to 9"),
        (-LABELS, 10, "labels: expected 0 to 9, got -9 to 0"),
        (LABELS[None], 10, r"int \[N\], got int32\[1, 20000\]"),
        (LABELS * 1.0, 10, r"int \[N\], got float64\[20000\]"),
    ],
)
def test_labels_are_labels(labels: np.ndarray, num_classes: int, expected: str):
    with pytest.raises(ValueError, match=expected):
        with_label_noise(labels, 0.5, num_classes, seed=0)


def test_images_are_images():
    with pytest.raises(ValueError, match=r"got float64\[2, 8, 8, 1\]"):
        with_student_t_pixels(np.ones((2, 8, 8, 1)), 2.0, seed=0)
