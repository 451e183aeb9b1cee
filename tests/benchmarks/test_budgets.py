"""Accuracy over budgets: the search without edges, steps to accuracies, and what was committed."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import jax
import pytest

from benchmarks.cifar100 import budgets, budgets_report, many_runs, search, tuned
from benchmarks.cifar100.runs import Run
from benchmarks.common.cache import RunsCache, digest
from benchmarks.common.publishing import RESULTS

METHODS = tuple(budgets_report.STYLES)
MOMENTUM = budgets.METHODS["momentum"]


def hill(*top):
    """A score that falls with the distance to a point."""
    return lambda point: -sum((a - b) ** 2 for a, b in zip(point, top, strict=True))


def row(epochs, accuracies, noise="clean", sides=()):
    own = {name: [value, value + 0.01] for name, value in zip(METHODS, accuracies, strict=True)}
    numbers = MOMENTUM[METHODS[0]].numbers((0,))._asdict()
    return {
        "noise": noise,
        "epochs": epochs,
        "optimizer": "momentum",
        "test_accuracies": own,
        "chosen": dict.fromkeys(METHODS, numbers),
        "trials": {name: [numbers] for name in METHODS},
        "open_sides": {name: list(sides) for name in METHODS},
        "differences": budgets.differences(own),
    }


def result(*rows, ways=None):
    steps = ways and {"ways": {name: {"seconds_quartiles": [0, s, 9]} for name, s in ways.items()}}
    return {"protocol": {"steps_per_epoch": 100}, "steps": steps, "rows": list(rows)}


@pytest.mark.parametrize("start", [(0,), (40,), (-3,)])
def test_a_search_goes_as_far_as_the_best_rate_lies(start):
    found = search.search(start, 30, hill(17))
    assert search.best(found) == (17,)
    assert next(iter(found)) == start
    assert search.open_sides(found) == []


def test_a_search_finds_rate_and_threshold():
    found = search.search((0, 0), 60, hill(-9, 6))
    assert search.best(found) == (-9, 6)
    assert search.open_sides(found) == []


def test_a_search_ends_with_its_trials_and_tells_what_it_did_not_try():
    found = search.search((0, 0), 4, hill(40, -40))
    assert list(found) == [(0, 0), (4, 0), (8, 0), (12, 0)]
    assert search.open_sides(found) == [
        "larger learning rate",
        "larger threshold",
        "smaller threshold",
    ]


def test_more_trials_go_on_where_fewer_ended():
    few, many = (search.search((0, 0), trials, hill(9, -5)) for trials in (6, 15))
    assert list(many)[:6] == list(few)


def test_where_nothing_trains_the_lowest_point_is_the_best():
    found = search.search((0,), 12, lambda point: 0.01)
    assert search.best(found) == min(found)


def test_points_are_rates_and_thresholds():
    assert [search.rate(i) for i in (-4, 0, 2, 4)] == [0.005, 0.01, 0.0141421, 0.02]
    assert [search.threshold(i) for i in (-8, 0, 4, 8)] == [0.1, 1.0, 3.16228, 10.0]


@pytest.mark.parametrize(
    ("name", "field"), list(zip(METHODS[1:3], ("batch_threshold", "threshold"), strict=True))
)
def test_smaller_thresholds_have_longer_steps(name, field):
    numbers = MOMENTUM[name].numbers
    small, large, huge = (numbers((0, j)) for j in (0, -8, 80))
    assert getattr(small, field) == 10 * getattr(large, field)
    assert large.learning_rate == pytest.approx(10 * small.learning_rate)
    assert huge.learning_rate == search.rate(0)


def test_conditions_start_where_others_ended_that_come_before():
    for place, condition in enumerate(budgets.PLAN):
        assert condition.before() in (None, *budgets.PLAN[:place])
    assert len(set(budgets.PLAN)) == 16


def test_steps_to_an_accuracy_are_interpolated_over_their_logarithm():
    steps, means = [100, 400, 1600], [0.1, 0.2, 0.15]
    assert budgets_report.steps_to(0.1, steps, means) == 100
    assert budgets_report.steps_to(0.15, steps, means) == pytest.approx(200)
    assert budgets_report.steps_to(0.05, steps, means) == -math.inf
    assert budgets_report.steps_to(0.2, steps, means) == math.inf


def test_tables_tell_steps_seconds_and_what_is_not_known():
    rows = (row(2, (0.2, 0.2, 0.3, 0.26)), row(1, (0.1, 0.1, 0.2, 0.18)))  # means are 0.005 higher
    header, *cells = budgets_report.steps_cells(result(*rows))
    assert header[2:] == list(METHODS)
    by_accuracy = {accuracy: own for _, accuracy, *own in cells}
    assert list(by_accuracy) == [
        "12.5 %",
        "15 %",
        "17.5 %",
        "20 %",
        "22.5 %",
        "25 %",
        "27.5 %",
        "30 %",
    ]
    assert by_accuracy["20 %"][:3] == ["193", "193", "≤ 100"]
    assert by_accuracy["30 %"][0] == "> 200"
    timed = result(*rows, ways=dict(zip(METHODS, (0.01, 0.01, 0.02, 0.02), strict=True)))
    by_accuracy = {accuracy: own for _, accuracy, *own in budgets_report.steps_cells(timed)}
    assert by_accuracy["20 %"][::2] == ["193 (1.9 s)", "≤ 100 (≤ 2.0 s)"]


def test_a_single_budget_has_no_steps_to_accuracies():
    one = result(row(1, (0.1, 0.2, 0.2, 0.1))) | {
        "machine": {"platform": "tpu", "device": "", "jax": "", "date": ""}
    }
    assert "Steps to accuracies" not in budgets_report.filled_tables(one)
    assert len(budgets_report.draw(one).axes) == 1
    two = one | {
        "rows": [*one["rows"], row(2, (0.2, 0.2, 0.3, 0.2)), row(1, (0.1,) * 4, "20% labels")]
    }
    assert list(budgets_report.filled_tables(two)) == list(budgets_report.TABLES)
    assert len(budgets_report.draw(two).axes) == 2


def test_sentences_tell_who_is_above_and_which_winners_have_an_edge():
    ahead, level = row(1, (0.1, 0.2, 0.2, 0.1)), row(2, (0.1,) * 4, sides=["smaller threshold"])
    first, *_, edge = budgets_report.sentences(result(ahead, row(4, (0.1, 0.2, 0.2, 0.1)), level))
    assert first.startswith("per-sample, constant against no clipping")
    assert "above it for clean, momentum (1, 4); not dist" in first
    assert first.endswith("not distinguishable from it for clean, momentum (2)")
    assert "no clipping, clean, momentum (2), smaller threshold; batch clipping" in edge
    assert "(1)" not in edge
    assert budgets_report.sentences(result(ahead))[-1].startswith("No winner lies at an edge")


@pytest.mark.slow
def test_a_quick_run_writes_table_and_figure_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    options = dataclasses.replace(
        budgets.DEFAULTS, runs=tmp_path / "runs.jsonl", out=tmp_path, quick=True
    )
    budgets.main(options, time_steps=True)
    printed = capsys.readouterr().out
    assert all(title in printed for title in budgets_report.TABLES)
    first = json.loads((tmp_path / "budgets.json").read_text())
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")
    assert set(first["steps"]["ways"]) == {*METHODS, budgets_report.STACKED}
    assert len(first["rows"]) == 4
    monkeypatch.setattr(many_runs, "train_together", None)
    budgets.main(dataclasses.replace(options, out=tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "budgets.json").read_text()) == first


def test_without_a_complete_budget_nothing_is_written(tmp_path):
    options = dataclasses.replace(
        budgets.DEFAULTS, runs=tmp_path / "runs.jsonl", out=tmp_path, quick=True, seconds=0.0
    )
    with pytest.raises(SystemExit, match="no budget is complete"):
        budgets.main(options)
    assert not list(tmp_path.iterdir())


def test_committed_runs_are_those_that_the_command_goes_on_from(monkeypatch):
    read, described = set(), Run.described
    monkeypatch.setattr(
        Run, "described", lambda run: read.add(digest(described(run))) or described(run)
    )
    cache = RunsCache(budgets.DEFAULTS.runs)

    def train(runs):
        if any(run.described() not in cache for run in runs):
            raise TimeoutError  # as where no time is left
        return [cache[run.described()] for run in runs]

    options = budgets.DEFAULTS
    budgets.run_plan(budgets.PLAN, train, options.setting(), options.seeds, budgets.TRIALS)
    lines = [json.loads(line) for line in options.runs.read_text("ascii").splitlines()]
    assert [line["digest"] for line in lines] == [digest(line["run"]) for line in lines]
    assert {line["digest"] for line in lines if "seed" in line["run"]} <= read


def test_committed_result_is_that_of_the_committed_runs(tmp_path, monkeypatch):
    cifar = types.SimpleNamespace(num_classes=100, image_shape=(32, 32, 3))
    data = types.SimpleNamespace(train=types.SimpleNamespace(images=range(45_000)))
    monkeypatch.setattr(tuned, "load_dataset", lambda *_, **__: cifar)
    monkeypatch.setattr(tuned, "load_data", lambda *_: data)
    # Without time for missing runs, an incomplete budget is left out.
    budgets.main(dataclasses.replace(budgets.DEFAULTS, out=tmp_path, seconds=0.0))
    written, committed = (
        json.loads((folder / "budgets.json").read_text()) for folder in (tmp_path, RESULTS)
    )
    assert jax.tree.structure(written) == jax.tree.structure(committed)
    for leaf, told in zip(*map(jax.tree.leaves, (written, committed)), strict=True):
        # Student-t quantiles of SciPy versions differ in the last digits.
        assert leaf == told if isinstance(told, str) else leaf == pytest.approx(told, rel=1e-9)
    protocol = committed["protocol"]
    for own in committed["rows"]:
        assert max(map(len, own["trials"].values())) <= protocol["trials"]
        assert {len(values) for values in own["test_accuracies"].values()} == {protocol["seeds"]}
