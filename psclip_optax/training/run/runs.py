"""Run `psclip train`, and the parts of a run that `psclip compare` repeats."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from rich.console import Console

from psclip_optax.training.config.checks import check_config, flag
from psclip_optax.training.config.commands import (
    FREE_FIELDS,
    TrainConfig,
    UsageError,
)
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.pipeline import Batch, iterate
from psclip_optax.training.data.splits import Dataset
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.output.files import (
    CHECKPOINTS,
    COMPARISON,
    COMPARISON_FIGURE,
    CONFIG,
    METRICS,
    RUN,
    SAMPLES,
    TENSORBOARD,
    check_holds_none_of,
    held_alone,
    named_in,
    noticing_what_cannot_be_written,
    to_json,
    writable_folder,
    write_atomically,
)
from psclip_optax.training.output.progress import reporting_progress
from psclip_optax.training.run.checkpoints import (
    open_checkpoints,
    restore_newest,
    save_checkpoint,
    saved_norms,
)
from psclip_optax.training.run.distributed import (
    data_parallel_mesh,
    is_first_process,
    join_processes,
    noticing_lost_processes,
    told_by_first_process,
    wait_for_all,
)
from psclip_optax.training.run.groups import recorded
from psclip_optax.training.run.methods import (
    METHODS,
    Hyperparams,
    method_of_alpha,
)
from psclip_optax.training.run.metrics import append_record, commit, cut_back, read_records
from psclip_optax.training.run.norms import NormWindow, norm_figures
from psclip_optax.training.run.samples import SampleLog, recording_samples
from psclip_optax.training.run.tensorboard import check_tensorboard, writing_tensorboard
from psclip_optax.training.run.trainer import (
    Trainer,
    build_evaluation,
    build_task_model,
    build_trainer,
    dropout_key,
    provenance,
    training_batches,
)
from psclip_optax.training.steps import linen_eval_step


class RunResult(NamedTuple):
    """The result of a run.

    Attributes:
      out: folder of `config.json`, `metrics.jsonl`, `checkpoints` and, if recorded, `samples`.
      state: the state after the last step.
      accuracy: the accuracy on the test set.
      loss: mean cross-entropy on the test set; None if it is not finite.
    """

    out: pathlib.Path
    state: TrainState
    accuracy: float
    loss: float | None


def train(config: TrainConfig, console: Console) -> RunResult:
    """Trains one model; a resumed run ends with the same bits as an uninterrupted one.

    Args:
      config: names model, data and method, and where to write.
      console: the console for progress and notes.

    Returns:
      The result of the run.

    Raises:
      UsageError: a number is out of range, the folder cannot be written, contains a run already, is
        being written by another process, or, with `resume`, contains no run, another run or no
        intact checkpoint, or the processes of a distributed run did not connect.
      DatasetError: the dataset is not available.
      ProcessLostError: another process of a distributed run ended or does not respond.
    """
    check_config(config)
    if config.tensorboard:
        check_tensorboard()
    with writable_folder(config.out) as out:
        return (_train_together if config.distributed else _train_alone)(config, out, console)


def _train_alone(config: TrainConfig, out: pathlib.Path, console: Console) -> RunResult:
    with held_alone(out):
        _check_folder(out, config)
        return _train(config, _dataset_of(config), out, console)


def _train_together(config: TrainConfig, out: pathlib.Path, console: Console) -> RunResult:
    # Steps that may fail come before the processes connect; otherwise the others would wait.
    _check_folder(out, config)
    dataset = _dataset_of(config)
    join_processes(config)
    with noticing_lost_processes(), _held_by_first_process(out, config):
        return _train(config, dataset, out, console if is_first_process() else Console(quiet=True))


@contextlib.contextmanager
def _held_by_first_process(out: pathlib.Path, config: TrainConfig) -> Generator[None]:
    """Locks the folder in the first process, which writes to it; if that fails, all end."""
    refused = None
    with contextlib.ExitStack() as held:
        try:
            if is_first_process():
                held.enter_context(held_alone(out))
                _check_folder(out, config)  # again, because another run may have ended meanwhile
        except UsageError as error:
            refused = error
        if told_by_first_process(refused is not None):
            raise refused or UsageError(
                f"--out: the first process may not write to {out}, and says why"
            )
        yield


def _dataset_of(config: TrainConfig) -> Dataset:
    return load_dataset(config.dataset, data_dir=config.data_dir, cache_dir=config.cache_dir)


def _train(config: TrainConfig, dataset: Dataset, out: pathlib.Path, console: Console) -> RunResult:
    mesh = data_parallel_mesh() if config.distributed else None
    _check_devices(config, mesh)
    model = build_task_model(config, dataset)
    name = method_of_alpha(config.method, config.alpha)
    trainer = build_trainer(
        name,
        model,
        dataset,
        config,
        config.steps,
        mesh,
        return_norms=True,
        return_samples=config.record_samples,
        clip_groups=config.clip_groups,
    )
    eval_step = linen_eval_step(classification_loss(model), has_aux=True)
    evaluate = build_evaluation(eval_step, dataset.test, dataset, mesh)
    index, count = (jax.process_index(), jax.process_count()) if mesh else (0, 1)
    batches = training_batches(dataset.train, dataset, config, config.seed, index, count)
    alpha = 1.0 if config.alpha is None else config.alpha
    state = trainer.init(config.seed, Hyperparams(config.lr, alpha, config.beta))
    if not config.resume and is_first_process():
        content = {"config": _resolved(config), **provenance()}
        write_atomically(out / CONFIG, to_json(content, indent=2).encode())
    with noticing_what_cannot_be_written(out), open_checkpoints(out / CHECKPOINTS) as manager:
        state, damaged = restore_newest(manager, state)
        for step in damaged:
            console.print(
                f"checkpoint {step} is damaged and was removed: going on from {state.step}"
            )
        state = _train_on(config, trainer, state, batches, evaluate, manager, out, console)
    wait_for_all("end of training")
    last = [record for record in read_records(out / METRICS) if record["kind"] == "test"][-1]
    return RunResult(out, state, last["accuracy"], last["loss"])


def _train_on(
    config: TrainConfig,
    trainer: Trainer,
    state: TrainState,
    batches: grain.MapDataset[Batch],
    evaluate: Callable[[Any], dict[str, float]],
    manager: ocp.CheckpointManager,
    out: pathlib.Path,
    console: Console,
) -> TrainState:
    start = int(state.step)
    # The records of the other processes are not read.
    path = out / METRICS if is_first_process() else pathlib.Path(os.devnull)
    kept = cut_back(path, start) if is_first_process() else []
    clock = _Clock(kept[-1]["seconds"] if kept else 0.0)
    key = dropout_key(config.seed)
    label = _label(config)
    window = NormWindow(saved_norms(manager, start))
    board = out / TENSORBOARD if config.tensorboard and is_first_process() else None
    with (
        path.open("a", encoding="utf-8") as file,
        writing_tensorboard(board, kept, clock.seconds()) as write,
        reporting_progress(config.steps, console) as report,
        _recording(config, out, start) as samples,
    ):

        def record(kind: str, step: int, figures: dict[str, Any]) -> None:
            line = {"kind": kind, "step": step, **figures, "seconds": clock.seconds()}
            append_record(file, line)
            write(line)

        for index, batch in iterate(batches, start, config.steps - start):
            state, metrics = trainer.step(state, key, batch)
            step = index + 1
            norms = metrics.pop("norms", None)
            if norms is not None:
                window.add(norms)
            of_samples = metrics.pop("samples", None)
            if samples is not None:
                samples.add(step, of_samples)
            if _is_due(step, config.log_every, config.steps):
                figures = recorded(metrics, trainer.groups)
                of_norms = {} if norms is None else norm_figures(window.norms())
                record("train", step, figures | of_norms)
                report(step, label, figures["loss"], figures["clipped_share"])
            if _is_due(step, config.eval_every, config.steps):
                record("test", step, evaluate(state.params))
            if _is_due(step, config.checkpoint_every, config.steps):
                # Metrics first, so that no checkpoint is ahead of them.
                if is_first_process():
                    commit(file)
                if samples is not None:
                    samples.commit()
                save_checkpoint(manager, state, window.norms())
    return state


def _recording(
    config: TrainConfig, out: pathlib.Path, start: int
) -> contextlib.AbstractContextManager[SampleLog | None]:
    """Opens the log of samples, which the first process writes for all processes."""
    if config.record_samples and is_first_process():
        return recording_samples(out / SAMPLES, start)
    return contextlib.nullcontext()


def _label(config: TrainConfig) -> str:
    label = METHODS[method_of_alpha(config.method, config.alpha)].label
    return label if config.clip_groups == "all" else f"{label}, by {config.clip_groups}"


def _check_devices(config: TrainConfig, mesh: Mesh | None) -> None:
    if mesh is not None and config.batch_size % mesh.size:
        raise UsageError(
            f"--batch-size: expected a multiple of the {mesh.size} devices of "
            f"{jax.process_count()} processes, got {config.batch_size}"
        )


class _Clock:
    """Counts seconds of training, including those before the run was interrupted."""

    def __init__(self, seconds_before: float):
        self._start = time.perf_counter() - seconds_before

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 6)


# Compiled once for each model, for all methods: Flax modules compare by their fields.


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _resolved(config: TrainConfig) -> dict[str, Any]:
    folders = {
        name: value.expanduser().absolute()
        for name, value in vars(config).items()
        if isinstance(value, pathlib.Path)
    }
    return json.loads(to_json(vars(config) | folders))


def _check_folder(out: pathlib.Path, config: TrainConfig) -> None:
    found = named_in(out, RUN)
    if found and not config.resume:
        raise UsageError(
            f"--out: {out} holds a run already ({found}); go on with --resume, or choose another "
            "folder"
        )
    check_holds_none_of(out, (COMPARISON, COMPARISON_FIGURE))
    if config.resume:
        _check_same_run(out / CONFIG, _resolved(config))


def _check_same_run(path: pathlib.Path, config: dict[str, Any]) -> None:
    try:
        # Fields that a run of an earlier version did not have.
        before = {"clip_groups": "all", "record_samples": False} | json.loads(
            path.read_text(encoding="utf-8")
        )["config"]
    except FileNotFoundError as error:
        raise UsageError(f"--resume: no run in {path.parent}, {path.name} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path} is not what psclip train wrote") from error
    differing = [
        f"{flag(name)} is {value}, was {before.get(name)}"
        for name, value in config.items()
        if name not in FREE_FIELDS and before.get(name) != value
    ]
    if differing:
        raise UsageError(
            f"--resume: the run in {path.parent} was another one ({'; '.join(differing)}); repeat "
            "its flags, or choose another folder"
        )
