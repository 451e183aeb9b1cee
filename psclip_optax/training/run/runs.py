"""One training run: `psclip train`, and the parts of it that `psclip compare` repeats."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import psclip_optax
from psclip_optax.training.config.commands import (
    FREE_FIELDS,
    MethodName,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    UsageError,
    check_config,
    flag,
)
from psclip_optax.training.data.corruptions import corrupt
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.pipeline import Batch, evaluation_batches, iterate, train_batches
from psclip_optax.training.data.splits import Dataset, DatasetShape, Split
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.output.files import (
    CHECKPOINTS,
    COMPARISON,
    COMPARISON_FIGURE,
    CONFIG,
    METRICS,
    RUN,
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
    replicate,
    shard_batch,
    told_by_first_process,
    wait_for_all,
)
from psclip_optax.training.run.methods import (
    METHODS,
    Hyperparams,
    build_gradients,
    build_optimizer,
    gradient_figures,
    learning_rate_of,
    learning_rate_schedule,
    method_of_alpha,
    method_that_clips,
    with_hyperparams,
)
from psclip_optax.training.run.metrics import append_record, commit, cut_back, read_records
from psclip_optax.training.run.norms import NormWindow, norm_figures
from psclip_optax.training.run.tensorboard import check_tensorboard, writing_tensorboard
from psclip_optax.training.steps import Metrics, linen_eval_step, linen_train_step

_EVALUATION_BATCH_SIZE = 500
_LIBRARIES = ("jax", "jaxlib", "optax", "flax", "grain", "orbax-checkpoint", "numpy")


class Trainer(NamedTuple):
    """A method on a model, compiled once for all seeds, learning rates and thresholds.

    Attributes:
      init: (seed, hyperparams) → the initial state.
      step: (state, key, batch) → the next state and scalar metrics; the state is donated. "norms"
        is among the metrics where it was asked for.
    """

    init: Callable[[int, Hyperparams], TrainState]
    step: Callable[[TrainState, jax.Array, dict[str, Any]], tuple[TrainState, Metrics]]


class RunResult(NamedTuple):
    """How a run ended.

    Attributes:
      out: folder of `config.json`, `metrics.jsonl` and `checkpoints`.
      state: the state after the last step.
      accuracy: share of the test set that the model names rightly.
      loss: mean cross-entropy on the test set; None if it is not finite.
    """

    out: pathlib.Path
    state: TrainState
    accuracy: float
    loss: float | None


def build_task_model(config: ModelConfig, dataset: Dataset | DatasetShape) -> nn.Module:
    """Builds the classifier, and finds out now whether it takes the dataset's images.

    Args:
      config: names the model, its width and dropout rate.
      dataset: what it is to learn.

    Returns:
      A Linen module.

    Raises:
      UsageError: the model does not take these images.

    Examples:
      >>> build_task_model(TaskConfig(model="alexnet"), load_dataset("digits"))
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: --model alexnet: AlexNet takes images ...
    """
    model = build_model(
        config.model, dataset.num_classes, width=config.width, dropout_rate=config.dropout
    )
    try:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    except ValueError as error:
        raise UsageError(f"--model {config.model}: {error}") from error
    return model


def build_trainer(
    name: MethodName,
    model: nn.Module,
    dataset: Dataset,
    config: TaskConfig,
    num_steps: int,
    mesh: Mesh | None = None,
    *,
    return_norms: bool = False,
) -> Trainer:
    """Builds a method's initialisation and train step.

    Args:
      name: one of `METHODS`.
      model: the classifier.
      dataset: gives the shape of an image.
      config: names dropout rate, momentum and schedule.
      num_steps: length of a run, for the schedule.
      mesh: of the devices that share each batch; None for one device. A batch is then this
        process's slice, and a step's results are on all devices.
      return_norms: whether the metrics of methods that clip before they average have "norms", those
        of the gradients that are clipped, `[n]`, or one for each micro-batch.

    Returns:
      The trainer. A batch is a dict with `image`, `label` and `position`, as `train_batches` gives
      them; the key is that of the dropout, from which each sample takes its own by step and
      position.

    Examples:
      >>> digits, config = load_dataset("digits"), TaskConfig(width=0.1)
      >>> trainer = build_trainer("ps-clip", build_task_model(config, digits), digits, config, 10)
      >>> batch = training_batches(digits.train, digits, config, seed=0)[0]
      >>> state = trainer.init(0, Hyperparams(learning_rate=0.1, threshold=1.0, beta=1.5))
      >>> state, metrics = trainer.step(state, jax.random.key(0), batch)
      >>> int(state.step), int(metrics["num_samples"])
      (1, 64)
    """
    name = method_that_clips(name, config.clip_at)
    schedule = learning_rate_schedule(config.schedule, num_steps)
    tx = build_optimizer(
        name, Hyperparams(0.0, 0.0, 1.0), momentum=config.momentum, schedule=schedule
    )
    has_dropout = config.dropout > 0
    loss = classification_loss(model, dropout=has_dropout)
    return_norms = return_norms and METHODS[name].threshold is not None
    gradients = build_gradients(name, config)
    by_sample = gradients.get("clip_at") == "sample"
    update = linen_train_step(loss, has_aux=True, return_norms=return_norms, **gradients)

    def init(seed: int, hyperparams: Hyperparams) -> TrainState:
        params = _initial_params(jax.random.key(seed), model, dataset.image_shape)
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        opt_state = with_hyperparams(state.opt_state, hyperparams)
        # An array from the start: a Python number would have the step compiled twice.
        state = state.replace(step=jnp.int32(0), opt_state=opt_state)
        return state if mesh is None else replicate(mesh, state)

    everywhere = None if mesh is None else NamedSharding(mesh, P())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def compiled_step(
        state: TrainState, key: jax.Array, image: Any, label: Any, position: Any
    ) -> tuple[TrainState, Metrics]:
        keys = (_sample_keys(key, state.step, position),) if has_dropout else ()
        learning_rate = learning_rate_of(state.opt_state) * schedule(state.step)
        positions = position if by_sample else None
        state, metrics = update(state, image, label, *keys, positions=positions)
        metrics = metrics | gradient_figures(state.opt_state)
        return state, _named_metrics(metrics) | {"learning_rate": learning_rate}

    def step(state: TrainState, key: jax.Array, batch: Batch) -> tuple[TrainState, Metrics]:
        names = ("image", "label", "position")
        arrays = tuple(batch[name] for name in names)
        if mesh is not None:
            arrays, key = shard_batch(mesh, arrays), replicate(mesh, key)
        return compiled_step(state, key, *arrays)

    return Trainer(init, step)


def dropout_key(seed: int) -> jax.Array:
    """The key of a run's dropout, apart from that of the initial parameters.

    Args:
      seed: seed of the run.

    Returns:
      A scalar key, for `Trainer.step`.

    Examples:
      >>> bool(dropout_key(0) == jax.random.key(0))
      False
    """
    return jax.random.fold_in(jax.random.key(seed), 1)


def training_batches(
    split: Split,
    dataset: Dataset,
    config: TaskConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset[Batch]:
    """Corrupts a training split and batches it.

    Args:
      split: clean examples.
      dataset: whose pixels' mean and standard deviation normalise the images.
      config: names the corruption, the batch size and the augmentation.
      seed: of the corruption and of the order.
      process_index: which slice of each batch to load.
      process_count: how many slices there are.

    Returns:
      What `train_batches` returns.

    Examples:
      >>> digits = load_dataset("digits")
      >>> training_batches(digits.train, digits, TaskConfig(), seed=0)[0]["image"].shape
      (64, 8, 8, 1)
    """
    corrupted = corrupt(
        split,
        num_classes=dataset.num_classes,
        label_noise=config.label_noise,
        pixel_df=config.pixel_df,
        seed=seed,
    )
    return train_batches(
        corrupted,
        batch_size=config.batch_size,
        seed=seed,
        mean=dataset.pixel_mean,
        std=dataset.pixel_std,
        augment=config.augment,
        process_index=process_index,
        process_count=process_count,
    )


def build_evaluation(
    eval_step: Callable[..., Metrics], split: Split, dataset: Dataset, mesh: Mesh | None = None
) -> Callable[[Any], dict[str, float]]:
    """Builds the evaluation on a split.

    Args:
      eval_step: what `linen_eval_step` returned, for the `classification_loss` of a model.
      split: clean examples.
      dataset: whose pixels' mean and standard deviation normalise the images.
      mesh: of the devices that share each batch, and have the parameters; None for one device.

    Returns:
      A function from parameters to `loss`, the mean cross-entropy, and `accuracy`.

    Examples:
      >>> digits = load_dataset("digits")
      >>> model = build_task_model(TaskConfig(), digits)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, *digits.image_shape)))
      >>> eval_step = linen_eval_step(classification_loss(model), has_aux=True)
      >>> figures = build_evaluation(eval_step, digits.test, digits)(variables["params"])
      >>> 0 <= figures["accuracy"] < 0.5
      True
    """
    num_devices = 1 if mesh is None else mesh.size
    batches = evaluation_batches(
        split,
        batch_size=-(-_EVALUATION_BATCH_SIZE // num_devices) * num_devices,
        mean=dataset.pixel_mean,
        std=dataset.pixel_std,
        process_index=0 if mesh is None else jax.process_index(),
        process_count=1 if mesh is None else jax.process_count(),
    )

    def evaluate(params: Any) -> dict[str, float]:
        shares = (batch for _, batch in iterate(batches, 0, len(batches)))
        whole = shares if mesh is None else (shard_batch(mesh, batch) for batch in shares)
        sums = [
            eval_step(params, batch["image"], batch["label"], sample_mask=batch["mask"])
            for batch in whole
        ]
        total = {name: sum(float(part[name]) for part in sums) for name in ("loss", "aux", "count")}
        return {
            "loss": total["loss"] / total["count"],
            "accuracy": total["aux"] / total["count"],
        }

    return evaluate


def provenance() -> dict[str, Any]:
    """The versions and the device that a result came from.

    Returns:
      A dict that JSON takes.

    Examples:
      >>> sorted(provenance())
      ['device', 'platform', 'python', 'versions']
    """
    device = jax.devices()[0]
    return {
        "versions": {
            "psclip_optax": psclip_optax.__version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{len(jax.devices())} × {device.platform} ({device.device_kind})",
    }


def train(config: TrainConfig, console: Console) -> RunResult:
    """Trains one model; a run that goes on ends with the same bits as one that was never stopped.

    Args:
      config: what to train, on what, how, and where to write.
      console: where progress and notes are shown.

    Returns:
      How the run ended.

    Raises:
      UsageError: a number is out of range, the folder cannot be written, holds a run already, is
        being written by another process, or, with `resume`, holds none, another one or no intact
        checkpoint, or the processes of a distributed run did not come together.
      DatasetError: the dataset cannot be had.
      ProcessLostError: another process of a distributed run ended or does not answer.
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
    # What may fail comes before they meet, for the others would wait for this one.
    _check_folder(out, config)
    dataset = _dataset_of(config)
    join_processes(config)
    with noticing_lost_processes(), _held_by_first_process(out, config):
        return _train(config, dataset, out, console if is_first_process() else Console(quiet=True))


@contextlib.contextmanager
def _held_by_first_process(out: pathlib.Path, config: TrainConfig) -> Iterator[None]:
    """The folder, which the first process writes to; if it may not, all of them end."""
    refused = None
    with contextlib.ExitStack() as held:
        try:
            if is_first_process():
                held.enter_context(held_alone(out))
                _check_folder(out, config)  # once more, for another run may have ended meanwhile
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
    trainer = build_trainer(name, model, dataset, config, config.steps, mesh, return_norms=True)
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
    # Of the other processes nobody reads what they record.
    path = out / METRICS if is_first_process() else pathlib.Path(os.devnull)
    kept = cut_back(path, start) if is_first_process() else []
    clock = _Clock(kept[-1]["seconds"] if kept else 0.0)
    key = dropout_key(config.seed)
    label = METHODS[method_of_alpha(config.method, config.alpha)].label
    window = NormWindow(saved_norms(manager, start))
    board = out / TENSORBOARD if config.tensorboard and is_first_process() else None
    with (
        path.open("a", encoding="utf-8") as file,
        writing_tensorboard(board, kept, clock.seconds()) as write,
        reporting_progress(config.steps, console) as report,
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
            if _is_due(step, config.log_every, config.steps):
                figures = {name: value.item() for name, value in metrics.items()}
                of_norms = {} if norms is None else norm_figures(window.norms())
                record("train", step, figures | of_norms)
                report(step, label, figures["loss"], figures["clipped_share"])
            if _is_due(step, config.eval_every, config.steps):
                record("test", step, evaluate(state.params))
            if _is_due(step, config.checkpoint_every, config.steps):
                # Metrics first, so that no checkpoint is ahead of them.
                if is_first_process():
                    commit(file)
                save_checkpoint(manager, state, window.norms())
    return state


def _check_devices(config: TrainConfig, mesh: Mesh | None) -> None:
    if mesh is not None and config.batch_size % mesh.size:
        raise UsageError(
            f"--batch-size: expected a multiple of the {mesh.size} devices of "
            f"{jax.process_count()} processes, got {config.batch_size}"
        )


class _Clock:
    """Seconds of training so far, those before the run was stopped included."""

    def __init__(self, seconds_before: float):
        self._start = time.perf_counter() - seconds_before

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 6)


# Compiled once a model, for all methods: a Flax module is what its fields are.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _initial_params(key: jax.Array, model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    return model.init(key, jnp.zeros((1, *image_shape)))["params"]


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _sample_keys(key: jax.Array, step: Any, positions: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, step)))(positions)


def _named_metrics(metrics: Metrics) -> Metrics:
    # The step's mean is over the finite losses and 0 where there is none, which would look like a
    # perfect fit in a run that diverged.
    number = metrics.get("num_microbatches", metrics.get("num_samples", 1))
    is_finite = metrics["num_nonfinite"] < number
    named = {name: value for name, value in metrics.items() if name != "aux"}
    return named | {
        "loss": jnp.where(is_finite, metrics["loss"], jnp.nan),
        "accuracy": metrics["aux"],
    }


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
        before = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
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
