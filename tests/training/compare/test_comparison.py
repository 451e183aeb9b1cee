"""Check the comparison: equal budgets, the same batches, and a readable result."""

from __future__ import annotations

import io
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from psclip_optax.training.compare.comparison import Trial, best_trial, build_grids, compare
from psclip_optax.training.config.commands import CompareConfig, UsageError
from psclip_optax.training.output.files import held_alone
from psclip_optax.training.run.methods import Hyperparams

METHODS = ["momentum", "batch-clip", "ps-clip", "ps-clip-median"]
NOTHING_CLIPPED = 1e6


def tiny(out: pathlib.Path, **changes: Any) -> CompareConfig:
    fields: dict[str, Any] = {
        "width": 0.05,
        "batch_size": 32,
        "steps": 6,
        "eval_every": 4,
        "num_seeds": 3,
        "pixel_df": None,
        "momentum_learning_rates": (0.02, 0.05),
        "batch_clip_learning_rates": (0.05,),
        "batch_clip_thresholds": (NOTHING_CLIPPED, 2 * NOTHING_CLIPPED),
        "ps_clip_learning_rates": (0.05,),
        "ps_clip_thresholds": (NOTHING_CLIPPED, 2 * NOTHING_CLIPPED),
        "out": out,
    }
    return CompareConfig(**fields | changes)


def run(config: CompareConfig) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=80)
    result = compare(config, console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "compare"
    result, output = run(tiny(out))
    return out, result, output


def test_without_clipping_all_methods_are_the_same(compared):
    _, result, _ = compared
    momentum, *others = (result["methods"][name] for name in METHODS[:-1])
    assert momentum["learning_rate"] == 0.05, "the larger one learns faster in six steps"
    for other in others:
        for ours, theirs in zip(momentum["curves"], other["curves"], strict=True):
            np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=1e-4)
            np.testing.assert_allclose(theirs["accuracy"], ours["accuracy"], atol=0.005)


def test_the_automatic_threshold_clips_whatever_grids_the_others_have(compared):
    _, result, output = compared
    automatic = result["methods"]["ps-clip-median"]
    rates = [trial["learning_rate"] for trial in result["trials"]["ps-clip-median"]]
    assert rates == [trial["learning_rate"] for trial in result["trials"]["momentum"]]
    assert all(0.5 < curve["mean_clipped_share"] <= 1 for curve in automatic["curves"])
    (row,) = (line for line in output.splitlines() if line.startswith("running median"))
    (before,) = (line for line in output.splitlines() if "found" in line and "%" in line)
    assert before.startswith("per-sample clipping,")
    assert not row.removeprefix("running median").strip()


def test_seeds_differ_from_each_other_and_from_the_tuning_seed(compared):
    _, result, _ = compared
    curves = result["methods"]["momentum"]["curves"]
    assert [curve["seed"] for curve in curves] == [1, 2, 3]
    assert len({curve["loss"][-1] for curve in curves}) == 3


def test_files_hold_the_result(compared):
    out, result, output = compared
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]
    saved = json.loads((out / "compare.json").read_text(), parse_constant=pytest.fail)
    assert list(saved["methods"]) == METHODS
    assert saved["config"]["momentum_learning_rates"] == [0.02, 0.05]
    assert [len(trials) for trials in saved["trials"].values()] == [2, 2, 2, 2]
    curve = saved["methods"]["ps-clip"]["curves"][0]
    assert curve["steps"] == [4, 6]
    assert curve["accuracy"] == result["methods"]["ps-clip"]["curves"][0]["accuracy"]
    assert {"versions", "device", "units"} <= set(saved)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "compare.png") in output


def test_output_tells_the_splits_and_the_outcome(compared):
    _, _, output = compared
    assert "1038 training images, corrupted; 259 to validate and 500 to test on, both" in output
    assert "came out best" in output
    assert all(label in output for label in ("momentum SGD", "batch clipping", "per-sample clip"))


def test_a_folder_that_is_being_written_to_is_refused_at_once(tmp_path: pathlib.Path):
    with held_alone(tmp_path), pytest.raises(UsageError, match="another psclip is writing to"):
        run(tiny(tmp_path))


def test_result_is_not_overwritten_unless_told(compared):
    out, _, _ = compared
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match=r"holds a result already \(compare.json, compare.png\)"):
        run(tiny(out, seed=5))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_overwritten_result_of_tiny_thresholds_clips_all(tmp_path: pathlib.Path):
    for name in ("compare.json", "compare.png"):
        (tmp_path / name).write_text("old")
    thresholds = {"batch_clip_thresholds": (1e-6, 1e-5), "ps_clip_thresholds": (1e-7, 1e-6)}
    run(tiny(tmp_path, **thresholds, steps=2, overwrite=True))
    saved = json.loads((tmp_path / "compare.json").read_text())
    for name in ("batch-clip", "ps-clip"):
        assert [c["mean_clipped_share"] for c in saved["methods"][name]["curves"]] == [1.0] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_seeds": 2}, "--num-seeds: expected at least 3"),
        ({"ps_clip_thresholds": (1.0,)}, "momentum 2, batch-clip 1 × 2 = 2, ps-clip 1 × 1 = 1"),
        ({"batch_clip_learning_rates": ()}, "as many trials for every method, at least 1"),
        ({"momentum_learning_rates": (0.1, -1.0)}, "--momentum-learning-rates: .* got -1.0"),
        ({"validation_share": 1.0}, "--validation-share: expected a number between 0 and 1"),
        ({"validation_share": 0.9999}, "--validation-share: 0.9999 leaves nothing of the 1297"),
    ],
)
def test_bad_configuration_is_refused(changes, message: str, tmp_path: pathlib.Path):
    with pytest.raises(UsageError, match=message):
        run(tiny(tmp_path / "new", **changes))


def test_default_grids_are_equal_in_size():
    grids = build_grids(CompareConfig(), {"batch-clip": 1.0, "ps-clip": 1.0})
    assert {name: len(set(grid)) for name, grid in grids.items()} == dict.fromkeys(METHODS, 9)


@pytest.mark.parametrize(
    ("outcomes", "best"),
    [
        ([(0.8, 0.1), (0.9, 0.5)], 1),
        ([(0.9, 0.5), (0.9, 0.4), (0.9, math.nan), (0.9, math.inf)], 1),
        ([(0.1, math.nan), (0.1, math.nan)], 0),
    ],
)
def test_best_trial(outcomes, best: int):
    trials = [Trial(Hyperparams(i, 1.0, 1.5), *outcome) for i, outcome in enumerate(outcomes)]
    assert best_trial(trials) is trials[best]
