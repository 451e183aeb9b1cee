"""Check that every sample of every step is recorded once, whenever a run is stopped."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from psclip_optax.training.config.commands import TrainConfig, UsageError
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.run import runs, samples
from psclip_optax.training.run.runs import train
from psclip_optax.training.run.samples import read_samples, recording_samples
from psclip_optax.training.run.trainer import training_batches
from tests import slow
from tests.training.processes import assert_all_succeed, start_together

NUM_STEPS, BATCH_SIZE = 10, 16


def tiny(out: pathlib.Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "width": 0.05,
        "batch_size": BATCH_SIZE,
        "label_noise": 0.2,
        "steps": NUM_STEPS,
        "eval_every": NUM_STEPS,
        "checkpoint_every": 4,
        "record_samples": True,
        "out": out,
    }
    return TrainConfig(**fields | changes)


def run(config: TrainConfig) -> np.ndarray:
    train(config, Console(file=io.StringIO()))
    return read_samples(config.out / "samples")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> np.ndarray:
    return run(tiny(tmp_path_factory.mktemp("recorded") / "run"))


def batches_of(config: TrainConfig):
    digits = load_dataset("digits")
    return training_batches(digits.train, digits, config, config.seed)


def test_each_sample_of_each_step_is_there_once(recorded: np.ndarray, tmp_path: pathlib.Path):
    steps = np.repeat(np.arange(1, NUM_STEPS + 1), BATCH_SIZE)
    np.testing.assert_array_equal(recorded["step"], steps)
    batches = batches_of(tiny(tmp_path))
    index = np.concatenate([batches[step]["index"] for step in range(NUM_STEPS)])
    np.testing.assert_array_equal(recorded["index"], index)
    assert np.isfinite(recorded["loss"]).all()
    assert ((recorded["scale"] > 0) & (recorded["scale"] <= 1)).all()


def test_they_are_what_the_metrics_sum_up(recorded: np.ndarray, tmp_path: pathlib.Path):
    train(tiny(tmp_path, log_every=1), Console(file=io.StringIO()))
    lines = runs.read_records(tmp_path / "metrics.jsonl")
    for line in (line for line in lines if line["kind"] == "train"):
        own = recorded[recorded["step"] == line["step"]]
        assert line["loss"] == pytest.approx(own["loss"].mean(), rel=1e-5)
        assert line["clipped_share"] == pytest.approx((own["scale"] < 1).mean())
        assert line["mean_scale"] == pytest.approx(own["scale"].mean(), rel=1e-5)
        assert line["median_norm"] == pytest.approx(np.median(own["norm"]), rel=1e-5)


@pytest.mark.parametrize("at_step", slow.but([8], [4, 8, NUM_STEPS]))
def test_a_run_that_goes_on_records_nothing_twice_and_loses_nothing(
    recorded: np.ndarray, at_step: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint = runs.save_checkpoint

    def save_or_die(manager: Any, state: Any, norms: Any):
        if int(state.step) == at_step:
            raise KeyboardInterrupt  # between writing the file and its checkpoint
        save_checkpoint(manager, state, norms)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_checkpoint", save_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(tmp_path))
    assert read_samples(tmp_path / "samples")["step"][-1] == at_step
    (tmp_path / "samples" / ".00000099-00000100.npy.partial").write_bytes(b"torn")
    resumed = run(tiny(tmp_path, resume=True))
    np.testing.assert_array_equal(resumed, recorded)


def test_checkpoints_may_come_at_other_steps_when_it_goes_on(
    recorded: np.ndarray, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples, "_STEPS_OF_A_PART", 3)
    run(tiny(tmp_path))
    names = sorted(path.name for path in (tmp_path / "samples").glob("*.npy"))
    assert names[:2] == ["00000001-00000003.npy", "00000004-00000004.npy"]
    for step in (8, NUM_STEPS):
        (tmp_path / "checkpoints" / str(step) / "digests.json").unlink()
    resumed = run(tiny(tmp_path, resume=True, checkpoint_every=7))
    np.testing.assert_array_equal(resumed, recorded)


@pytest.mark.slow
def test_processes_record_what_one_does(recorded: np.ndarray, tmp_path: pathlib.Path):
    flags = {name: getattr(tiny(tmp_path), name) for name in ("label_noise", "eval_every")}
    flags |= {"steps": NUM_STEPS, "checkpoint_every": 4, "record_samples": True}
    assert_all_succeed(start_together(2, tmp_path, **flags))
    together = read_samples(tmp_path / "samples")
    for name in ("step", "index"):
        np.testing.assert_array_equal(together[name], recorded[name])
    for name in ("scale", "norm", "loss"):
        np.testing.assert_allclose(together[name], recorded[name], rtol=1e-3, atol=1e-5)


def test_recording_changes_nothing_of_the_training(tmp_path: pathlib.Path):
    results = [
        train(tiny(tmp_path / str(records), record_samples=records), Console(file=io.StringIO()))
        for records in (False, True)
    ]
    states = [jax.tree.leaves((result.state.params, result.state.opt_state)) for result in results]
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_goes_on_only_as_it_was_told_to_record(tmp_path: pathlib.Path):
    train(tiny(tmp_path, record_samples=False), Console(file=io.StringIO()))
    with pytest.raises(UsageError, match="--record-samples is True, was False"):
        run(tiny(tmp_path, resume=True))


# Files


def write(folder: pathlib.Path, *steps: int, from_step: int = 0):
    values = np.array([0.5, 1.0], np.float32)
    with recording_samples(folder, from_step) as log:
        for step in steps:
            log.add(
                step, {"index": np.array([7, 3]), "scale": values, "norm": values, "loss": values}
            )
        log.commit()
        log.commit()  # without new records


def test_what_was_not_committed_may_be_lost_and_is_recorded_again(tmp_path: pathlib.Path):
    write(tmp_path, 1, 2)
    write(tmp_path, 3, 4, from_step=2)
    write(tmp_path, 3, from_step=2)
    assert read_samples(tmp_path)["step"].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("content", [b"", b"torn", np.zeros(3).tobytes()])
def test_damage_is_found(tmp_path: pathlib.Path, content: bytes):
    write(tmp_path, 1, 2)
    (tmp_path / "00000001-00000002.npy").write_bytes(content)
    with pytest.raises(UsageError, match="the file is damaged"):
        read_samples(tmp_path)


def test_a_record_that_is_missing_is_found(tmp_path: pathlib.Path):
    write(tmp_path, 1, 2)
    path = tmp_path / "00000001-00000002.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UsageError, match="the file is damaged"):
        read_samples(tmp_path)


def test_what_cannot_be_written_is_told_at_the_next_checkpoint(tmp_path: pathlib.Path):
    folder = tmp_path / "samples"
    with recording_samples(folder, 0) as log:
        folder.rmdir()
        log.add(1, {name: np.ones(2) for name in ("index", "scale", "norm", "loss")})
        with pytest.raises(FileNotFoundError):
            log.commit()
