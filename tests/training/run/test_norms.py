"""Check the recorded statistics of norms, for any norms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from psclip_optax.tails import tail_index
from psclip_optax.training.run.norms import WINDOW, NormWindow, bin_edges, histogram, norm_figures

NORMS = np.random.default_rng(0).pareto(1.5, 3000).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 7, 300, 5000])
@pytest.mark.parametrize("every", [1, 4])
def test_window_is_the_latest_norms_however_often_it_is_read(batch_size: int, every: int):
    batches = np.random.default_rng(1).random([12, batch_size]).astype(np.float32)
    window = NormWindow(NORMS[:2000])
    for number, batch in enumerate(batches, 1):
        window.add(jnp.asarray(batch))
        if number % every == 0:
            seen = np.concatenate([NORMS[:2000], *batches[:number]])
            np.testing.assert_array_equal(window.norms(), seen[-max(WINDOW, batch_size) :])


def test_window_goes_on_from_what_it_held():
    window, batch = NormWindow(np.empty(0)), jnp.asarray(NORMS[:100])
    for _ in range(30):
        window.add(batch)
    again = NormWindow(window.norms())
    for one in (window, again):
        one.add(2 * batch)
    np.testing.assert_array_equal(window.norms(), again.norms())


def test_window_forgets_what_it_will_not_tell():
    window = NormWindow(np.empty(0))
    for _ in range(5000):
        window.add(NORMS[:64])
    assert len(window._on_device) == WINDOW // 64


def test_figures_are_those_of_numpy_and_of_the_tail_index():
    figures, tail = norm_figures(NORMS), tail_index(NORMS)
    names = ("norm_q50", "norm_q90", "norm_q99", "norm_max")
    expected = np.quantile(NORMS.astype(float), [0.5, 0.9, 0.99, 1.0])
    np.testing.assert_allclose([figures[name] for name in names], expected)
    assert (figures["tail_index"], figures["tail_lower"]) == (tail.index, tail.lower)
    assert (figures["tail_upper"], figures["tail_verdict"]) == (tail.upper, "heavy")
    assert figures["num_norms"] == 3000


def test_light_tail_has_no_finite_index():
    figures = norm_figures(np.random.default_rng(0).exponential(size=3000))
    assert figures["tail_verdict"] == "light"
    assert np.isinf(figures["tail_index"])
    assert 1 < figures["tail_lower"] < np.inf


@pytest.mark.parametrize("norms", [NORMS[:499], np.ones(600), np.zeros(600), np.full(600, np.nan)])
def test_what_norms_do_not_tell_is_none(norms: np.ndarray):
    figures = norm_figures(norms)
    assert [figures[name] for name in figures if name.startswith("tail")] == [None] * 4


def test_norms_that_are_not_finite_do_not_count():
    spoilt = np.concatenate([NORMS, [np.nan, np.inf]])
    assert norm_figures(spoilt) == norm_figures(NORMS)
    assert norm_figures(np.array([np.nan]))["norm_max"] is None


def test_every_positive_norm_is_in_the_bin_of_its_edges():
    counts = histogram(np.append(NORMS, [0.0, 1e-30, 1e30]))
    assert sum(counts.values()) == len(NORMS) + 2
    lower, upper = bin_edges(map(int, counts))
    inside = [(a <= NORMS) & (b > NORMS) for a, b in zip(lower, upper, strict=True)]
    assert [int(i.sum()) for i in inside][1:-1] == list(counts.values())[1:-1]
