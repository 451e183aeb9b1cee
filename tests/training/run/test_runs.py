"""Check that a run that was stopped, killed or damaged ends with the bits of one that was not."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import psclip_optax as psc
from psclip_optax.training.config.commands import TrainConfig, UsageError
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.output.files import held_alone
from psclip_optax.training.run import runs
from psclip_optax.training.run.methods import Hyperparams
from psclip_optax.training.run.runs import RunResult, train
from psclip_optax.training.run.trainer import (
    build_task_model,
    build_trainer,
    dropout_key,
    training_batches,
)
from tests import slow
from tests.training.run.test_checkpoints import flip_a_bit

NUM_STEPS = 10
MICRO_BATCHES: dict[str, Any] = {"clip_at": "micro-batch", "accumulate": 4}


def tiny(out: pathlib.Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "width": 0.05,
        "batch_size": 16,
        "method": "momentum",
        "pixel_df": 1.5,
        "steps": NUM_STEPS,
        "eval_every": 4,
        "checkpoint_every": 4,
        "log_every": 1,
        "out": out,
    }
    return TrainConfig(**fields | changes)


def run(config: TrainConfig) -> tuple[RunResult, str]:
    console = Console(file=io.StringIO(), width=200)
    result = train(config, console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def records(out: pathlib.Path) -> list[dict[str, Any]]:
    def refuse(token: str):
        raise AssertionError(f"{token} is no JSON")

    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def without_seconds(out: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(out)]


def files(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(actual: RunResult, expected: RunResult):
    assert without_seconds(actual.out) == without_seconds(expected.out)
    states = [(result.state.params, result.state.opt_state) for result in (actual, expected)]
    chex.assert_trees_all_equal(*states)
    assert (actual.accuracy, actual.loss) == (expected.accuracy, expected.loss)


class KilledError(Exception):
    pass


def run_until_killed(config: TrainConfig, at_step: int, monkeypatch: pytest.MonkeyPatch):
    """Run until the process ends between the metrics of a step and its checkpoint."""
    save_checkpoint = runs.save_checkpoint

    def save_or_die(manager: Any, state: Any, norms: Any):
        if int(state.step) == at_step:
            raise KilledError
        save_checkpoint(manager, state, norms)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_checkpoint", save_or_die)
        with pytest.raises(KilledError):
            run(config)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunResult:
    return run(tiny(tmp_path_factory.mktemp("finished") / "run"))[0]


@pytest.mark.parametrize("at_step", slow.but([4], [4, NUM_STEPS]))
def test_killed_run_goes_on_to_the_same_bits(
    finished: RunResult, at_step: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    run_until_killed(tiny(tmp_path), at_step, monkeypatch)
    assert records_before_torn_line(tmp_path)[-1]["step"] == at_step
    resumed, _ = run(tiny(tmp_path, resume=True))
    assert_same_run(resumed, finished)


def test_killed_run_of_all_randomness_goes_on_to_the_same_bits(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    everything = {"method": "ps-clip", "dropout": 0.2, "label_noise": 0.2, "augment": True}
    expected, _ = run(tiny(tmp_path / "one", **everything))
    run_until_killed(tiny(tmp_path / "two", **everything), 8, monkeypatch)
    resumed, _ = run(tiny(tmp_path / "two", **everything, resume=True))
    assert_same_run(resumed, expected)


@pytest.mark.parametrize("options", slow.but([{}], [{}, MICRO_BATCHES]))
def test_killed_run_of_an_automatic_threshold_goes_on_to_the_same_bits(
    options: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    automatic = {"method": "ps-clip-auto", "alpha": 0.5} | options
    expected, _ = run(tiny(tmp_path / "one", **automatic))
    run_until_killed(tiny(tmp_path / "two", **automatic), 8, monkeypatch)
    resumed, _ = run(tiny(tmp_path / "two", **automatic, resume=True))
    assert_same_run(resumed, expected)
    scales = [r["threshold_scale"] for r in records(expected.out) if r["kind"] == "train"]
    assert scales[0] == 0 < min(scales[1:])
    assert len(set(scales)) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MICRO_BATCHES])
def test_killed_run_without_an_alpha_goes_on_to_the_same_bits(
    options: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    given = {"method": "ps-clip", "alpha": None} | options
    expected, _ = run(tiny(tmp_path / "one", **given))
    run_until_killed(tiny(tmp_path / "two", **given), 8, monkeypatch)
    resumed, _ = run(tiny(tmp_path / "two", **given, resume=True))
    assert_same_run(resumed, expected)
    named, _ = run(tiny(tmp_path / "three", **given | {"method": "ps-clip-median"}))
    chex.assert_trees_all_equal(named.state.params, expected.state.params)
    scales = [r["threshold_scale"] for r in records(expected.out) if r["kind"] == "train"]
    assert min(scales) > 0, "the first batch is clipped by its own norms"


@pytest.mark.parametrize(
    "options",
    slow.but([{"batch_size": 256}], [{"batch_size": 256}, MICRO_BATCHES]),
)
def test_norms_of_a_killed_run_are_those_of_one_never_stopped(
    options: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    # Checkpoints between two records, and windows longer than both intervals.
    clipping = {"method": "ps-clip", "log_every": 3, "eval_every": 10, **options}
    expected, _ = run(tiny(tmp_path / "one", **clipping))
    run_until_killed(tiny(tmp_path / "two", **clipping), 8, monkeypatch)
    resumed, _ = run(tiny(tmp_path / "two", **clipping, resume=True))
    assert_same_run(resumed, expected)
    per_step = 256 if "batch_size" in options else 4
    training = [r for r in records(expected.out) if r["kind"] == "train"]
    assert [r["step"] for r in training] == [3, 6, 9, 10]
    assert [r["num_norms"] for r in training] == [min(n * per_step, 2048) for n in (3, 6, 9, 10)]
    assert all((r["tail_verdict"] is None) == (r["num_norms"] < 500) for r in training)


def test_norms_recorded_are_those_of_the_batches(tmp_path: pathlib.Path):
    result, _ = run(tiny(tmp_path, method="ps-clip", steps=3, log_every=1))
    first, second, _ = (r for r in records(result.out) if r["kind"] == "train")
    assert (first["norm_q50"], first["norm_max"]) == pytest.approx(
        (first["median_norm"], first["max_norm"]), rel=1e-6
    )
    assert second["norm_max"] == pytest.approx(max(first["max_norm"], second["max_norm"]))
    assert sum(second["norm_histogram"].values()) == second["num_norms"] == 32


def test_methods_that_do_not_clip_samples_record_no_norms(finished: RunResult):
    assert not {name for record in records(finished.out) for name in record if "norm_" in name}


def records_before_torn_line(out: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_damaged_checkpoint_is_told_and_the_one_before_taken(
    finished: RunResult, tmp_path: pathlib.Path
):
    shutil.copytree(finished.out, tmp_path / "copy")
    flip_a_bit(tmp_path / "copy" / "checkpoints" / str(NUM_STEPS))
    resumed, output = run(tiny(tmp_path / "copy", resume=True))
    assert f"checkpoint {NUM_STEPS} is damaged and was removed: going on from 8" in output
    assert_same_run(resumed, finished)


def test_finished_run_is_left_as_it_is(finished: RunResult):
    before = files(finished.out)
    resumed, _ = run(tiny(finished.out, resume=True))
    assert resumed.accuracy == finished.accuracy
    assert files(finished.out) == before


def test_existing_run_is_not_overwritten(finished: RunResult):
    before = files(finished.out)
    with pytest.raises(UsageError, match=r"holds a run already \(config.json, metrics.jsonl, ch"):
        run(tiny(finished.out, seed=1))
    assert files(finished.out) == before


def test_other_configuration_is_not_resumed(finished: RunResult):
    before = files(finished.out)
    with pytest.raises(
        UsageError, match=r"--momentum is 0.5, was 0.9; --lr is 0.01, was 0.05\); repeat its flags"
    ):
        run(tiny(finished.out, lr=0.01, momentum=0.5, resume=True))
    assert files(finished.out) == before


def test_log_and_checkpoint_intervals_may_change(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    run_until_killed(tiny(tmp_path), 8, monkeypatch)
    config = tiny(tmp_path, resume=True, log_every=5, eval_every=3, checkpoint_every=9)
    run(config)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 9, 10, 10]


def test_resume_without_a_run_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(UsageError, match=f"no run in {tmp_path}, config.json is missing"):
        run(tiny(tmp_path, resume=True))


def test_garbled_configuration_is_refused(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text('{"config"')
    with pytest.raises(UsageError, match="is not what psclip train wrote"):
        run(tiny(tmp_path, resume=True))


def test_configuration_is_resolved(finished: RunResult):
    content = json.loads((finished.out / "config.json").read_text())
    config = content["config"]
    assert config["out"] == str(finished.out)
    assert (config["schedule"], config["beta"], config["pixel_df"]) == ("cosine", 1.5, 1.5)
    assert content["versions"]["jax"] == jax.__version__
    assert "cpu" in content["device"] or "gpu" in content["device"] or "tpu" in content["device"]


def test_metrics_say_what_happened(finished: RunResult):
    lines = records(finished.out)
    assert [r["step"] for r in lines if r["kind"] == "test"] == [4, 8, 10]
    training = [r for r in lines if r["kind"] == "train"]
    assert [r["step"] for r in training] == list(range(1, NUM_STEPS + 1))
    assert all(
        {"loss", "accuracy", "clipped_share", "num_nonfinite", "seconds"} <= set(r)
        for r in training
    )
    cosine = [0.05 * (1 + np.cos(np.pi * step / NUM_STEPS)) / 2 for step in range(NUM_STEPS)]
    np.testing.assert_allclose([r["learning_rate"] for r in training], cosine, rtol=1e-5)
    assert np.all(np.diff([r["seconds"] for r in lines]) >= 0)


def test_run_that_diverged_has_no_loss(tmp_path: pathlib.Path):
    config = tiny(tmp_path, lr=1e30, schedule="constant", steps=6)
    result, output = run(config)
    assert records(tmp_path)[-2]["loss"] is None
    assert "loss not finite" in output
    assert result.accuracy < 0.5


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_a_run_is_writing_to_is_refused_at_once(
    finished: RunResult, resume: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    before = files(out)
    monkeypatch.setattr(runs, "load_dataset", lambda *_, **__: pytest.fail("not at once"))
    with held_alone(out), pytest.raises(UsageError, match="another psclip is writing to"):
        run(tiny(out, resume=resume))
    assert files(out) == before


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path: pathlib.Path):
    with pytest.raises(UsageError, match="--model alexnet"):
        run(tiny(tmp_path / "new" / "run", model="alexnet"))
    assert list(tmp_path.iterdir()) == []


def test_image_of_another_size_is_refused_before_anything_is_written(tmp_path: pathlib.Path):
    with pytest.raises(UsageError, match="--model alexnet: AlexNet takes images"):
        run(tiny(tmp_path, model="alexnet"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "method", slow.but(["ps-clip", "batch-clip"], ["momentum", "ps-clip", "batch-clip"])
)
def test_accumulating_changes_no_number(method: str, tmp_path: pathlib.Path):
    # For clipping by sample, or only of the whole batch.
    once, _ = run(tiny(tmp_path / "once", method=method))
    in_parts, _ = run(tiny(tmp_path / "parts", method=method, accumulate=4))
    for got, want in zip(*map(params_of, (in_parts, once)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def params_of(result: RunResult) -> list[Any]:
    return jax.tree.leaves(result.state.params)


def test_clipping_at_the_micro_batch_is_accumulate_clipped(tmp_path: pathlib.Path):
    alpha, lr = 0.5, 0.1
    result, _ = run(tiny(tmp_path, method="ps-clip", **MICRO_BATCHES, steps=1, alpha=alpha, lr=lr))
    config = tiny(tmp_path)
    digits = load_dataset("digits")
    model = build_task_model(config, digits)
    batch: Any = training_batches(digits.train, digits, config, 0)[0]
    init = build_trainer("momentum", model, digits, config, 1).init
    params = init(0, Hyperparams(lr, alpha, config.beta)).params
    loss = classification_loss(model)
    tx = psc.accumulate_clipped(
        optax.sgd(lr, momentum=0.9), 4, psc.growing_threshold(alpha, config.beta)
    )

    @jax.jit
    def stepped(params: Any, state: Any, *part: Any) -> Any:
        grads = jax.grad(lambda p: jax.vmap(loss, (None, 0, 0))(p, *part)[0].mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(0, 16, 4):
        params, state = stepped(params, state, batch["image"][i : i + 4], batch["label"][i : i + 4])
    chex.assert_trees_all_close(params_of(result), jax.tree.leaves(params), rtol=1e-4, atol=1e-6)
    train_record = records(tmp_path)[0]
    assert train_record["num_microbatches"] == 4
    assert train_record["num_samples"] == 16
    assert 0 < train_record["clipped_share"] <= 1


def test_clipping_at_the_batch_is_batch_clipping(tmp_path: pathlib.Path):
    options: dict[str, Any] = {"alpha": 0.5, "accumulate": 2}
    at_batch, _ = run(tiny(tmp_path / "at", method="ps-clip", clip_at="batch", **options))
    expected, _ = run(tiny(tmp_path / "expected", method="batch-clip", **options))
    assert_same_run(at_batch, expected)


def trainer_and_batch(**changes: Any):
    digits, config = load_dataset("digits"), tiny(pathlib.Path(), dropout=0.5, **changes)
    trainer = build_trainer("momentum", build_task_model(config, digits), digits, config, 10)
    batch: Any = training_batches(digits.train, digits, config, 0)[0]
    return trainer, batch


def test_dropout_is_a_function_of_seed_step_and_position():
    trainer, batch = trainer_and_batch()
    key = dropout_key(0)

    def loss(batch, key=key, step=0):
        state = trainer.init(0, Hyperparams(0.1, 1.0, 1.5))
        return float(trainer.step(state.replace(step=np.int32(step)), key, batch)[1]["loss"])

    order = np.random.default_rng(0).permutation(len(batch["label"]))
    permuted = {name: values[order] for name, values in batch.items()}
    assert loss(permuted) == pytest.approx(loss(batch), rel=1e-5)
    others = [
        loss(batch | {"position": batch["position"] + 1}),
        loss(batch, step=1),
        loss(batch, key=dropout_key(1)),
    ]
    assert all(other != pytest.approx(loss(batch), rel=1e-3) for other in others)


@pytest.mark.parametrize(
    "method", slow.but(["ps-clip-auto"], ["sgd", "batch-clip", "ps-clip-constant", "ps-clip-auto"])
)
def test_other_methods_train_too(method: str, tmp_path: pathlib.Path):
    config = tiny(tmp_path, pixel_df=None, dropout=0.0, steps=40, alpha=10.0)
    run(TrainConfig(**vars(config) | {"width": 0.1, "log_every": 10, "checkpoint_every": 40}))
    lines = [r for r in records(tmp_path) if r["kind"] == "test"]
    assert lines[-1]["accuracy"] > 0.5
