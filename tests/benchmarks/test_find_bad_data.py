"""Check the benchmark of finding wrong labels: its scores, its figures and committed results."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest

from benchmarks.cifar100 import find_bad_data
from benchmarks.common.cache import digest
from benchmarks.common.publishing import RESULTS
from psclip_optax.training.data.splits import Split

RUNS = RESULTS / "find_bad_data.runs.jsonl"
RESULT = RESULTS / "find_bad_data.json"


def records(scale, norm, loss):
    index = np.tile(np.arange(len(scale)), (3, 1))
    values = {"scale": scale, "norm": norm, "loss": loss}
    return {"index": index} | {name: np.tile(own, (3, 1)) for name, own in values.items()}


def test_an_order_that_is_right_has_all_of_the_area_and_one_that_is_wrong_none():
    is_wrong = np.arange(100) < 20
    right, reverse = np.where(is_wrong, 2.0, 1.0), np.where(is_wrong, 1.0, 2.0)
    judged = find_bad_data.judge(records(1 / right, reverse, right), is_wrong, [1, 2, 3], seed=0)
    assert judged["areas"]["scale"] == [1.0] * 3
    assert judged["areas"]["norm"] == [0.0] * 3
    assert judged["found"]["loss"][find_bad_data.SHARES.index(0.2)] == 1
    assert judged["found"]["norm"][0] == 0
    assert 0.3 < judged["areas"]["random order"][0] < 0.7


def test_equal_scores_have_half_of_the_area_and_infinite_ones_a_place():
    is_wrong = np.arange(10) < 2
    judged = find_bad_data.judge(
        records(np.ones(10), np.where(is_wrong, np.inf, 1), np.arange(10.0)), is_wrong, [3], seed=0
    )
    assert judged["areas"]["scale"] == [0.5]
    assert judged["areas"]["norm"] == [1.0]
    assert judged["areas"]["loss"] == [0.0]


@pytest.mark.slow
def test_a_quick_run_writes_table_and_figure_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    options = {"runs": tmp_path / "runs.jsonl", "quick": True}
    find_bad_data.main(out=tmp_path, **options)
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*find_bad_data.SCORES, "is the best order"])
    first = json.loads((tmp_path / "find_bad_data.json").read_text())
    assert (tmp_path / "find_bad_data.png").read_bytes().startswith(b"\x89PNG")
    unclipped = next(row for row in first["rows"] if row["method"] == "no clipping")
    assert {area for areas in unclipped["areas"]["scale"] for area in areas} == {0.5}
    monkeypatch.setattr(find_bad_data, "train", None)
    find_bad_data.main(out=tmp_path / "again", **options)
    assert json.loads((tmp_path / "again" / "find_bad_data.json").read_text()) == first


def test_committed_results_are_of_the_committed_runs(tmp_path, monkeypatch):
    nothing = Split(np.zeros([1, 32, 32, 3], np.uint8), np.zeros(1, np.int32))
    cifar = types.SimpleNamespace(train=nothing, num_classes=100)
    monkeypatch.setattr(find_bad_data, "load_dataset", lambda *_, **__: cifar)
    monkeypatch.setattr(find_bad_data, "train", None)  # because every run is stored
    find_bad_data.main(out=tmp_path)
    lines = [json.loads(line) for line in RUNS.read_text("ascii").splitlines()]
    assert [line["digest"] for line in lines] == [digest(line["run"]) for line in lines]
    result = json.loads(RESULT.read_text())
    assert len(lines) == len(result["rows"]) * result["protocol"]["seeds"]
    written = json.loads((tmp_path / RESULT.name).read_text())
    assert jax.tree.structure(written) == jax.tree.structure(result)
    for leaf, told in zip(*map(jax.tree.leaves, (written, result)), strict=True):
        # Quantiles of different SciPy versions differ in the last digits.
        assert leaf == told if isinstance(told, str) else leaf == pytest.approx(told, rel=1e-9)
