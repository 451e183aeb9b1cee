"""Check the benchmark of the cost of recording samples."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine import recording


@pytest.mark.slow
def test_a_quick_run_has_a_row_for_each_setting(tmp_path, capsys):
    recording.main(out=tmp_path, repeats=2, quick=True)
    result = json.loads((tmp_path / "recording.json").read_text())
    (row,) = result["rows"]
    low, middle, high = row["ratio_quartiles"]
    assert 0 < low <= middle <= high
    assert row["bytes_a_sample"] > 20  # four numbers and a step, of four bytes each
    assert (
        f"| mlp of width 0.05, 16 | {1e3 * row['seconds_a_step']:.2f} |" in capsys.readouterr().out
    )
    assert {"cpu", "cores", "jax"} <= result["machine"].keys()


def test_windows_take_turns_and_the_first_does_not_count():
    called: list[str] = []
    windows = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    seconds = recording.time_in_turn(windows, repeats=2)
    assert called == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert min(map(min, seconds.values())) >= 0


def test_noise_has_the_shape_of_the_data():
    dataset = recording.random_images("cifar100")
    assert dataset.train.images.shape == (recording.NUM_IMAGES, 32, 32, 3)
    assert dataset.num_classes == 100
    assert dataset.train.images.mean() == pytest.approx(127.5, abs=1)
