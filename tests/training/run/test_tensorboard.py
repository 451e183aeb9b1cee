"""Check that TensorBoard shows the content of metrics.jsonl, also for a resumed run."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.run.tensorboard import check_tensorboard, writing_tensorboard
from tests.training.run.test_runs import records, run, run_until_killed, tiny

pytest.importorskip("tensorboardX")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

WITH_NORMS: dict[str, Any] = {
    "method": "ps-clip",
    "batch_size": 64,
    "log_every": 2,
    "tensorboard": True,
}


def shown(folder: pathlib.Path) -> Any:
    accumulator = event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    board = shown(folder)
    events = [(tag, event) for tag in board.Tags()["scalars"] for event in board.Scalars(tag)]
    found = {(tag, event.step): event.value for tag, event in events}
    assert len(found) == len(events), "a step is shown twice"
    return found


def expected_scalars(out: pathlib.Path) -> dict[tuple[str, int], float]:
    return {
        (f"{record['kind']}/{name}", record["step"]): value
        for record in records(out)
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "seconds")
    }


def test_scalars_are_the_records(tmp_path: pathlib.Path):
    run(tiny(tmp_path, **WITH_NORMS))
    got, want = scalars(tmp_path / "tensorboard"), expected_scalars(tmp_path)
    assert got.keys() == want.keys()
    assert {"train/loss", "train/accuracy", "train/clipped_share", "test/accuracy"} < {
        tag for tag, _ in got
    }
    assert {"train/norm_q50", "train/norm_q99", "train/tail_lower"} < {tag for tag, _ in got}
    np.testing.assert_allclose(*([d[key] for key in want] for d in (got, want)), rtol=1e-6)


def test_histogram_holds_the_norms(tmp_path: pathlib.Path):
    counts = {"-2": 3, "1": 5}  # norms of 1/2 to 2^-0.5 and of 2^0.5 to 2
    record = {"kind": "train", "step": 4, "norm_histogram": counts, "seconds": 1.0}
    with writing_tensorboard(tmp_path, [], 1.0) as write:
        write(record)
    (event,) = shown(tmp_path).Histograms("train/log2_norm")
    value = event.histogram_value
    assert (event.step, value.num, value.min, value.max) == (4, 8, -1.0, 1.0)
    assert list(value.bucket_limit) == [-0.5, 0.0, 0.5, 1.0]
    assert list(value.bucket) == [3, 0, 0, 5]


@pytest.mark.parametrize("from_the_start", [True, False])
def test_run_that_goes_on_shows_what_one_never_stopped_does(
    from_the_start: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    run_until_killed(tiny(tmp_path, **WITH_NORMS | {"tensorboard": from_the_start}), 8, monkeypatch)
    run(tiny(tmp_path, **WITH_NORMS, resume=True))
    got, want = scalars(tmp_path / "tensorboard"), expected_scalars(tmp_path)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(*([d[key] for key in want] for d in (got, want)), rtol=1e-6)


def test_nothing_is_written_unasked(tmp_path: pathlib.Path):
    run(tiny(tmp_path, steps=2))
    assert not (tmp_path / "tensorboard").exists()


def test_missing_package_is_told_before_any_work(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"pip install 'psclip_optax\[tensorboard\]'"):
        run(tiny(tmp_path / "run", tensorboard=True))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="--tensorboard: tensorboardX is not installed"):
        check_tensorboard()
