"""Check the figure's content, read back from its artists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psclip_optax.training.plot.figures import draw_comparison, survival, to_png

NAMES = ("momentum", "batch-clip", "ps-clip", "ps-clip-median")
ACCURACY = np.random.default_rng(0).uniform(0.6, 0.9, [4, 4, 5])


def result(norms: np.ndarray) -> dict[str, Any]:
    methods = {}
    for name, accuracies in zip(NAMES, ACCURACY, strict=True):
        curves = [
            {
                "steps": [1, 2, 3, 4, 5],
                "seconds": [(seed + 1) * step for step in (1, 2, 3, 4, 5)],
                "accuracy": accuracy.tolist(),
            }
            for seed, accuracy in enumerate(accuracies)
        ]
        methods[name] = {"label": name, "curves": curves}
    return {
        "task": "digits, MLP",
        "config": {"batch_size": 64},
        "methods": methods,
        "norms": {"initial": norms, "final": norms / 10, "thresholds": [0.5, 8.0]},
    }


@pytest.fixture(scope="module")
def figure():
    return draw_comparison(result(np.arange(1.0, 101.0)))


def test_lines_are_means_over_seeds(figure):
    over_steps, over_seconds, _ = figure.axes
    for axes, x in ((over_steps, [1, 2, 3, 4, 5]), (over_seconds, 2.5 * np.arange(1, 6))):
        lines = [line for line in axes.lines if len(line.get_xdata()) == 5]
        for line, accuracy in zip(lines, ACCURACY, strict=True):
            np.testing.assert_allclose(line.get_xdata(), x)
            np.testing.assert_allclose(line.get_ydata(), accuracy.mean(axis=0))


def test_bands_are_standard_errors(figure):
    bands = [collection.get_paths()[0].vertices for collection in figure.axes[0].collections]
    for vertices, accuracy in zip(bands, ACCURACY, strict=True):
        mean = accuracy.mean(axis=0)
        error = accuracy.std(axis=0, ddof=1) / 2
        np.testing.assert_allclose(vertices[:, 1].max(), (mean + error).max())
        np.testing.assert_allclose(vertices[:, 1].min(), (mean - error).min())


def test_accuracy_panels_share_their_axis(figure):
    over_steps, over_seconds, norms = figure.axes
    assert over_steps.get_ylim() == over_seconds.get_ylim()
    assert norms.get_xscale() == norms.get_yscale() == "log"


def test_thresholds_are_marked(figure):
    (band,) = figure.axes[2].patches
    np.testing.assert_allclose((band.get_x(), band.get_x() + band.get_width()), (0.5, 8.0))


def test_png_is_wide_enough_to_read(figure):
    png = to_png(figure)
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") >= 1600


@pytest.mark.parametrize("norms", [np.zeros(5), np.full(5, np.nan), np.array([0.0, np.inf])])
def test_run_that_diverged_is_drawn_too(norms: np.ndarray):
    assert to_png(draw_comparison(result(norms))).startswith(b"\x89PNG")


def test_survival_keeps_the_share_of_what_it_cannot_show():
    x, share = survival(np.array([0.0, 2.0, 1.0, np.inf]))
    np.testing.assert_array_equal(x, [1.0, 2.0])
    np.testing.assert_array_equal(share, [0.75, 0.5])
