from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from psclip_optax.training.compare.summary import (
    describe_task,
    difference_to_best_other,
    edge_notes,
    estimate,
    results_table,
    verdict,
)
from psclip_optax.training.config.commands import CompareConfig


def method(label: str, accuracies, **changes: Any) -> dict[str, Any]:
    curves = [
        {"accuracy": [0.1, a], "median_step_seconds": 0.00125, "mean_clipped_share": 0.25}
        for a in accuracies
    ]
    fields = {"learning_rate": 0.1, "threshold": math.inf, "beta": 1.5}
    return {"label": label, "curves": curves, **fields, **changes}


ACCURACIES = {
    "momentum": [0.70, 0.74, 0.72],
    "batch-clip": [0.80, 0.86, 0.82],
    "ps-clip": [0.81, 0.89, 0.84],
    "ps-clip-median": [0.75, 0.77, 0.76],
}
RESULT = {
    "methods": {
        "momentum": method("momentum SGD", ACCURACIES["momentum"]),
        "batch-clip": method("batch clipping", ACCURACIES["batch-clip"], threshold=0.5),
        "ps-clip": method("per-sample clipping", ACCURACIES["ps-clip"], threshold=20.0),
        "ps-clip-median": method(
            "per-sample clipping, running median", ACCURACIES["ps-clip-median"]
        ),
    }
}


def test_estimate_is_that_of_numpy():
    values = ACCURACIES["ps-clip"]
    expected = np.mean(values), np.std(values, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(estimate(values), expected)


@pytest.mark.parametrize(
    ("name", "other"),
    [("momentum", "ps-clip"), ("batch-clip", "ps-clip"), ("ps-clip", "batch-clip")],
)
def test_differences_are_paired(name: str, other: str):
    found, difference = difference_to_best_other(RESULT["methods"], name)
    pairs = np.subtract(ACCURACIES[name], ACCURACIES[other])
    assert found == other
    np.testing.assert_allclose(difference, (pairs.mean(), pairs.std(ddof=1) / np.sqrt(3)))


def test_verdict_tells_a_clear_win():
    assert verdict(RESULT) == (
        "Per-sample clipping came out best, 2.0 ± 0.6 points above batch clipping over 3 paired "
        "seeds of equal steps: more than twice the standard error."
    )


def test_verdict_tells_chance_whoever_wins():
    methods = RESULT["methods"] | {"momentum": method("momentum SGD", [0.95, 0.80, 0.90])}
    assert verdict({"methods": methods}) == (
        "Momentum SGD came out best, 3.7 ± 6.7 points above per-sample clipping over 3 paired "
        "seeds of equal steps: not more than twice the standard error, so these runs do not tell the "
        "two apart."
    )


def test_table_fits_eighty_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(RESULT))
    assert isinstance(console.file, io.StringIO)
    rows = console.file.getvalue().splitlines()
    row = next(row for row in rows if row.startswith("per-sample clipping"))
    cells = " ".join(row.split())
    assert cells == "per-sample clipping 0.1 20 84.7 ± 2.3 +2.0 ± 0.6 1.25 25%"
    assert not any("…" in row for row in rows)


def test_a_threshold_that_is_found_has_a_clipped_share_but_no_number():
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(RESULT))
    assert isinstance(console.file, io.StringIO)
    rows = [" ".join(row.split()) for row in console.file.getvalue().splitlines()]
    assert "per-sample clipping, 0.1 found 76.0 ± 0.6 -8.7 ± 1.8 1.25 25%" in rows
    (unclipped,) = (row for row in rows if row.startswith("momentum SGD"))
    assert unclipped.startswith("momentum SGD 0.1 – 72.0")
    assert unclipped.endswith("1.25 –")


def test_the_edge_of_the_grid_that_the_running_median_shares_is_named():
    trials = [{"learning_rate": rate, "threshold": math.inf} for rate in (0.1, 0.2)]
    chosen = method("per-sample clipping, running median", [1.0], learning_rate=0.2)
    name = "ps-clip-median"
    result = {"methods": {name: chosen}, "trials": {name: trials}, "units": {}}
    assert edge_notes(result) == [
        "Note: per-sample clipping, running median chose the largest of --momentum-learning-rates, "
        "0.2."
    ]


def test_interior_choices_need_no_note():
    axis = (0.1, 0.2, 0.4)
    trials = [{"learning_rate": lr, "threshold": t} for lr in axis for t in axis]
    chosen = method("batch clipping", [1.0], learning_rate=0.2, threshold=0.2)
    result = {
        "methods": {"batch-clip": chosen},
        "trials": {"batch-clip": trials},
        "units": {"batch-clip": 0.1},
    }
    assert edge_notes(result) == []
    chosen["threshold"] = 0.1
    assert edge_notes(result) == [
        "Note: batch clipping chose the smallest of --batch-clip-thresholds, 1."
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label_noise": 0.0, "pixel_df": None}, "digits, MLP of width 0.5"),
        ({"pixel_df": None}, "digits with 20% label noise, MLP of width 0.5"),
        (
            {"label_noise": 0.0, "dataset": "cifar100", "model": "resnet18", "width": 1},
            "CIFAR-100 with Student-t pixel factors (ν = 1.5), ResNet-18 of width 1",
        ),
    ],
)
def test_task_in_words(changes: dict[str, Any], expected: str):
    assert describe_task(CompareConfig(**changes)) == expected
