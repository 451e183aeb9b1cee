"""Messages of runs, checkpoints, processes and plots."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any
from unittest import mock

import jax
import optax
from flax.training.train_state import TrainState
from rich.console import Console

from psclip_optax.training.compare import comparison
from psclip_optax.training.config.commands import CompareConfig, PlotConfig, TrainConfig, UsageError
from psclip_optax.training.output import files
from psclip_optax.training.plot import plots
from psclip_optax.training.run import checkpoints, distributed, runs
from psclip_optax.training.run.distributed import ProcessLostError
from tests.messages.rows import MEAN, Row, check, in_folder, under_a_file


def train(folder: pathlib.Path, found: dict[str, str] | None = None, **options: Any):
    for name, content in (found or {}).items():
        (folder / name).write_text(content)
    return runs.train(TrainConfig(out=folder, **options), Console(quiet=True))


def held_by_another(folder: pathlib.Path):
    with files.held_alone(folder):
        train(folder)


def with_a_folder_for_a_lock(folder: pathlib.Path):
    (folder / files.LOCK).mkdir()
    train(folder)


def not_of_the_first_process(folder: pathlib.Path):
    with (
        mock.patch.object(runs, "join_processes"),
        mock.patch.object(runs, "is_first_process", return_value=False),
        mock.patch.object(runs, "told_by_first_process", return_value=True),
    ):
        train(folder, distributed=True)


def written(**options: Any) -> str:
    """Return the configuration that `psclip train` writes."""
    return files.to_json({"config": vars(TrainConfig(**options))})


def plot(folder: pathlib.Path, found: dict[str, str]):
    for name, content in found.items():
        (folder / name).write_text(content)
    plots.read_runs(folder)


def compare(folder: pathlib.Path, found: tuple[str, ...] = (), **options: Any):
    for name in found:
        (folder / name).write_text("")
    return comparison.compare(CompareConfig(out=folder, **options), Console(quiet=True))


def checkpoint(folder: pathlib.Path, free: int | None = None):
    state = TrainState.create(apply_fn=None, params=MEAN, tx=optax.sgd(0.1))
    with checkpoints.open_checkpoints(folder) as manager:
        usage = mock.Mock(free=shutil.disk_usage(folder).free if free is None else free)
        with mock.patch.object(shutil, "disk_usage", return_value=usage):
            checkpoints.save_checkpoint(manager, state)
        (folder / "0" / "digests.json").unlink()
        checkpoints.restore_newest(manager, state)


def joining_late():
    jax.devices()  # JAX has started, so it is too late
    distributed.join_processes(TrainConfig(distributed=True))


def losing_a_process():
    with (
        mock.patch.object(jax, "process_count", return_value=2),
        distributed.noticing_lost_processes(),
    ):
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: connection closed by peer\nmore")


def writing(error: Exception):
    with files.noticing_what_cannot_be_written(pathlib.Path("run")):
        raise error


ROWS = [
    # Runs, checkpoints and processes
    Row(
        in_folder(lambda folder: train(folder, {"config.json": "{}"})),
        UsageError,
        "--out: ⟨folder⟩ holds a run already (config.json); go on with --resume, or choose "
        "another folder",
    ),
    Row(
        in_folder(lambda folder: train(folder, {"compare.json": "{}"})),
        UsageError,
        "--out: ⟨folder⟩ holds what another command wrote (compare.json), and of a run and a "
        "comparison in one folder psclip plot shows the run alone; choose another folder",
    ),
    Row(
        in_folder(lambda folder: train(folder, resume=True)),
        UsageError,
        "--resume: no run in ⟨folder⟩, config.json is missing",
    ),
    Row(
        in_folder(lambda folder: train(folder, {"config.json": "{}"}, resume=True)),
        UsageError,
        "--resume: ⟨folder⟩/config.json is not what psclip train wrote",
    ),
    Row(
        in_folder(lambda folder: train(folder, {"config.json": '{"config": [1]}'}, resume=True)),
        UsageError,
        "--resume: ⟨folder⟩/config.json is not what psclip train wrote",
    ),
    Row(
        in_folder(
            lambda folder: train(
                folder, {"config.json": written(lr=1.0, model="small_cnn")}, resume=True
            )
        ),
        UsageError,
        "--resume: the run in ⟨folder⟩ was another one (--model is mlp, was small_cnn; --lr is "
        "0.05, was 1.0); repeat its flags, or choose another folder",
    ),
    # Plots
    Row(
        lambda: check(PlotConfig, runs=()),
        UsageError,
        "plot: expected at least one folder that psclip train wrote, got none",
    ),
    Row(
        lambda: check(PlotConfig, runs=(pathlib.Path(),), out=pathlib.Path("plot.pdf")),
        UsageError,
        "--out: expected a file that ends in .png, got plot.pdf",
    ),
    Row(
        in_folder(lambda folder: plots.read_runs(folder / "nowhere")),
        UsageError,
        "⟨folder⟩/nowhere: expected a folder that psclip train or psclip compare wrote, but "
        "there is no such folder",
    ),
    Row(
        in_folder(lambda folder: plots.read_runs(folder)),
        UsageError,
        "⟨folder⟩: expected a folder that psclip train or psclip compare wrote, but config.json "
        "and compare.json are missing",
    ),
    Row(
        in_folder(lambda folder: plot(folder, {"config.json": "{"})),
        UsageError,
        "⟨folder⟩/config.json: expected JSON, got ⟨Python's words⟩; leave this folder out, or make "
        "it anew",
    ),
    Row(
        in_folder(lambda folder: plot(folder, {"config.json": "[]"})),
        UsageError,
        "⟨folder⟩/config.json: expected an object with 'config' in it, as psclip wrote it; leave "
        "this folder out, or make it anew",
    ),
    Row(
        in_folder(lambda folder: plot(folder, {"config.json": written()})),
        UsageError,
        "⟨folder⟩: no record in metrics.jsonl yet; wait for the run's first --log-every steps",
    ),
    Row(
        in_folder(
            lambda folder: plot(
                folder,
                {"config.json": written(), "metrics.jsonl": '{"kind": "tr\n{"kind": "test"}\n'},
            )
        ),
        UsageError,
        "⟨folder⟩/metrics.jsonl, line 1: expected a record with kind and step, got "
        '\'{"kind": "tr\'; remove the line, or let psclip train --resume go on from the last '
        "checkpoint before it",
    ),
    Row(
        in_folder(lambda folder: train(folder, model="alexnet")),
        UsageError,
        "--model alexnet: AlexNet takes images [..., H, W, C] with H and W at least 16, got "
        'shape [1, 8, 8, 1]; resize them, or take "mlp" or "resnet18"',
    ),
    Row(
        in_folder(lambda folder: compare(folder, ("compare.json",))),
        UsageError,
        "--out: ⟨folder⟩ holds a result already (compare.json); choose another folder, or pass "
        "--overwrite",
    ),
    Row(
        in_folder(lambda folder: compare(folder, ("config.json", "metrics.jsonl"), overwrite=True)),
        UsageError,
        "--out: ⟨folder⟩ holds what another command wrote (config.json, metrics.jsonl), and of a "
        "run and a comparison in one folder psclip plot shows the run alone; choose another folder",
    ),
    Row(
        in_folder(lambda folder: compare(folder, validation_share=0.9999)),
        UsageError,
        "--validation-share: 0.9999 leaves nothing of the 1297 training images; take less",
    ),
    Row(
        in_folder(lambda folder: train(under_a_file(folder))),
        UsageError,
        "--out: cannot write to ⟨folder⟩/file/below: Not a directory; choose another folder",
    ),
    Row(
        in_folder(with_a_folder_for_a_lock),
        UsageError,
        "--out: cannot write to ⟨folder⟩: ⟨the system's words⟩; choose another folder",
    ),
    Row(
        in_folder(held_by_another),
        UsageError,
        "--out: another psclip is writing to ⟨folder⟩; wait until it ends, or choose another "
        "folder",
    ),
    Row(
        in_folder(not_of_the_first_process),
        UsageError,
        "--out: the first process may not write to ⟨folder⟩, and says why",
    ),
    Row(
        lambda: writing(OSError(28, "No space left on device")),
        UsageError,
        "--out: cannot write to run: No space left on device; the checkpoints before are whole:"
        " make room, and go on with --resume",
    ),
    Row(
        in_folder(lambda folder: checkpoint(folder, free=0)),
        OSError,
        "[Errno 28] No space left on device: '⟨folder⟩'",
    ),
    Row(
        in_folder(lambda folder: checkpoint(folder)),
        UsageError,
        "--resume: no checkpoint in ⟨folder⟩ is intact (steps 0); start again in another folder",
    ),
    Row(
        joining_late,
        UsageError,
        "--distributed: the processes did not come together: ⟨JAX's words⟩; start all of them "
        "within --distributed-timeout seconds, and where no cluster tells who they are, give "
        "each --coordinator HOST:PORT, --num-processes and its --process-id",
    ),
    Row(
        losing_a_process,
        ProcessLostError,
        "process 0 of 2: another one ended or does not answer (Gloo all-reduce failed: "
        "connection closed by peer); end those that are left, and go on from the last "
        "checkpoint with --resume, with any number of processes",
    ),
]
