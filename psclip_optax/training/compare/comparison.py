"""Tune and compare four methods on the same model, seeds and batches: `psclip compare`."""

from __future__ import annotations

import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from rich.console import Console

from psclip_optax.clipped_grad import clipped_value_and_grad
from psclip_optax.training.compare import summary
from psclip_optax.training.config.checks import check_config
from psclip_optax.training.config.commands import CompareConfig, MethodName, UsageError
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.pipeline import Batch, iterate
from psclip_optax.training.data.splits import Dataset, Split, train_validation_split
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.output.files import (
    COMPARISON,
    COMPARISON_FIGURE,
    RUN,
    check_holds_none_of,
    held_alone,
    named_in,
    to_json,
    writable_folder,
    write_atomically,
)
from psclip_optax.training.output.progress import Report, reporting_progress
from psclip_optax.training.plot.figures import draw_comparison, to_png
from psclip_optax.training.run.methods import METHODS, Hyperparams
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

Grids = dict[MethodName, list[Hyperparams]]

_COMPARED: tuple[MethodName, ...] = ("momentum", "batch-clip", "ps-clip", "ps-clip-median")
_REPORT_EVERY = 10
_MAX_NORMS = 2048


class Norms(NamedTuple):
    """Holds gradient norms at some parameters.

    Attributes:
      samples: `[N]`, the norms of single samples' gradients.
      batches: `[B]`, the norms of batches' mean gradients.
    """

    samples: np.ndarray
    batches: np.ndarray


class Trial(NamedTuple):
    """One point of a method's grid, with its result on the validation split.

    Attributes:
      hyperparams: the point of the grid.
      accuracy: the accuracy on the validation split after the last step.
      loss: the mean cross-entropy there.
    """

    hyperparams: Hyperparams
    accuracy: float
    loss: float


class _Job(NamedTuple):
    """Holds the model, data and functions that all runs share."""

    config: CompareConfig
    trainers: dict[MethodName, Trainer]
    batches: Callable[[int], grain.MapDataset[Batch]]
    gradient_norms: Callable[[Any, grain.MapDataset[Batch]], Norms]
    validate: Callable[[Any], dict[str, float]]
    test: Callable[[Any], dict[str, float]]


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Tunes and compares momentum SGD, batch clipping and two kinds of per-sample clipping.

    Args:
      config: names model, data and grids, and where to write.
      console: the console for the progress and the result.

    Returns:
      The content of `compare.json`: curves, chosen values, grids, versions, device.

    Raises:
      UsageError: a number is out of range, the grids differ in size, or the folder cannot be
        written, contains a result already or is being written by another process.
      DatasetError: the dataset is not available.
    """
    check_config(config)
    with writable_folder(config.out) as out, held_alone(out):
        _check_folder(out, config)
        return _compare(config, out, console)


def _compare(config: CompareConfig, out: pathlib.Path, console: Console) -> dict[str, Any]:
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, cache_dir=config.cache_dir)
    splits = _hold_out(dataset.train, config)
    job = _prepare(config, dataset, *splits)
    units = _measure_units(job)
    grids = build_grids(config, units)
    num_trials = sum(map(len, grids.values()))
    console.print(summary.introduction(config, dataset, *splits, units), soft_wrap=True)
    with reporting_progress(
        (num_trials + len(grids) * config.num_seeds) * config.steps, console
    ) as report:
        trials = _tune(job, grids, report)
        chosen: dict[MethodName, Hyperparams] = {
            name: best_trial(points).hyperparams for name, points in trials.items()
        }
        methods, norms = _run_finals(job, chosen, num_trials, report)
    result = {
        "config": vars(config),
        **provenance(),
        "task": summary.describe_task(config),
        "units": units,
        "trials": {
            name: [trial.hyperparams._asdict() | _validation(trial) for trial in points]
            for name, points in trials.items()
        },
        "methods": methods,
        "norms": norms,
    }
    png = to_png(draw_comparison(result))
    write_atomically(out / COMPARISON, to_json(result, indent=1).encode())
    write_atomically(out / COMPARISON_FIGURE, png)
    summary.print_result(result, console)
    console.print(f"Figure: {out / COMPARISON_FIGURE}\nNumbers: {out / COMPARISON}", soft_wrap=True)
    return result


def build_grids(config: CompareConfig, units: dict[str, float]) -> Grids:
    """Builds the grid of points over which each method is tuned.

    Args:
      config: names the learning rates, and the thresholds relative to the units.
      units: by method, the gradient norm that is the unit of its thresholds.

    Returns:
      The points by method, with the same number for each.

    Examples:
      >>> grids = build_grids(CompareConfig(), {"batch-clip": 2.0, "ps-clip": 8.0})
      >>> {name: len(points) for name, points in grids.items()}
      {'momentum': 9, 'batch-clip': 9, 'ps-clip': 9, 'ps-clip-median': 9}
      >>> sorted({point.threshold for point in grids["ps-clip"]})
      [0.024, 0.24, 2.4]
    """
    axes: dict[MethodName, tuple[tuple[float, ...], tuple[float, ...]]] = {
        "momentum": (config.momentum_learning_rates, (math.inf,)),
        "batch-clip": (
            config.batch_clip_learning_rates,
            tuple(units["batch-clip"] * factor for factor in config.batch_clip_thresholds),
        ),
        "ps-clip": (
            config.ps_clip_learning_rates,
            tuple(units["ps-clip"] * factor for factor in config.ps_clip_thresholds),
        ),
        "ps-clip-median": (config.momentum_learning_rates, (math.inf,)),  # which it ignores
    }
    return {
        name: [
            Hyperparams(lr, threshold, config.beta) for lr, threshold in itertools.product(*axis)
        ]
        for name, axis in axes.items()
    }


def best_trial(trials: list[Trial]) -> Trial:
    """Finds the trial with the highest validation accuracy; ties go to the lowest loss.

    Args:
      trials: one or more trials.

    Returns:
      The best trial; NaN counts as the highest loss.

    Examples:
      >>> point = Hyperparams(0.1, 1.0, 1.5)
      >>> trials = [Trial(point, 0.9, 0.4), Trial(point, 0.9, 0.3), Trial(point, 0.9, math.nan)]
      >>> best_trial(trials).loss
      0.3
    """
    return max(trials, key=lambda t: (t.accuracy, -math.inf if math.isnan(t.loss) else -t.loss))


def _check_folder(out: pathlib.Path, config: CompareConfig) -> None:
    check_holds_none_of(out, RUN)
    found = named_in(out, (COMPARISON, COMPARISON_FIGURE))
    if found and not config.overwrite:
        raise UsageError(
            f"--out: {out} holds a result already ({found}); choose another folder, or pass "
            "--overwrite"
        )


def _hold_out(split: Split, config: CompareConfig) -> tuple[Split, Split]:
    # Split before the corruption: the validation split is clean, like the test set.
    num_validation = max(1, round(config.validation_share * len(split.labels)))
    if num_validation >= len(split.labels):
        raise UsageError(
            f"--validation-share: {config.validation_share} leaves nothing of the "
            f"{len(split.labels)} training images; take less"
        )
    return train_validation_split(split, num_validation=num_validation, seed=config.seed)


def _prepare(config: CompareConfig, dataset: Dataset, train: Split, validation: Split) -> _Job:
    model = build_task_model(config, dataset)
    loss = classification_loss(model)
    eval_step = linen_eval_step(loss, has_aux=True)

    plain = clipped_value_and_grad(loss, math.inf, has_aux=True, return_stats=True)

    @jax.jit
    def batch_norms(params: Any, image: Any, label: Any) -> tuple[jax.Array, jax.Array]:
        _, mean, stats = plain(params, image, label)
        return stats.norms, optax.tree.norm(mean)

    def gradient_norms(params: Any, batches: grain.MapDataset[Batch]) -> Norms:
        num_samples = min(len(train.labels), _MAX_NORMS)
        num_batches = math.ceil(num_samples / config.batch_size)
        norms = [
            jax.device_get(batch_norms(params, batch["image"], batch["label"]))
            for _, batch in iterate(batches, 0, num_batches)
        ]
        samples, means = zip(*norms, strict=True)
        return Norms(np.concatenate(samples)[:num_samples], np.stack(means))

    return _Job(
        config=config,
        trainers={
            name: build_trainer(name, model, dataset, config, config.steps) for name in _COMPARED
        },
        batches=lambda seed: training_batches(train, dataset, config, seed),
        gradient_norms=gradient_norms,
        validate=build_evaluation(eval_step, validation, dataset),
        test=build_evaluation(eval_step, dataset.test, dataset),
    )


def _measure_units(job: _Job) -> dict[str, float]:
    norms = _initial_norms(job, job.config.seed)
    return {
        "batch-clip": float(np.median(norms.batches)),
        "ps-clip": float(np.median(norms.samples)),
    }


def _initial_norms(job: _Job, seed: int) -> Norms:
    state = job.trainers["ps-clip"].init(seed, Hyperparams(0.0, 0.0, job.config.beta))
    return job.gradient_norms(state.params, job.batches(seed))


def _tune(job: _Job, grids: Grids, report: Report) -> dict[MethodName, list[Trial]]:
    config, batches = job.config, job.batches(job.config.seed)
    trials: dict[MethodName, list[Trial]] = {name: [] for name in grids}
    points: list[tuple[MethodName, Hyperparams]] = [
        (name, point) for name, grid in grids.items() for point in grid
    ]
    for number, (name, point) in enumerate(points):
        trial = f"trial {len(trials[name]) + 1}/{len(grids[name])}"
        curve, _ = _run(
            job.trainers[name],
            point,
            config.seed,
            batches,
            num_steps=config.steps,
            eval_every=config.steps,
            evaluate=job.validate,
            report=_shifted(report, number * config.steps, f"{METHODS[name].label}, {trial}"),
        )
        trials[name].append(Trial(point, curve["accuracy"][-1], curve["test_loss"][-1]))
    return trials


def _run_finals(
    job: _Job, chosen: dict[MethodName, Hyperparams], num_trials: int, report: Report
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs all methods in turn for each seed, so that changes of the machine's speed affect all."""
    config = job.config
    seeds = range(config.seed + 1, config.seed + 1 + config.num_seeds)
    curves: dict[MethodName, list[dict[str, Any]]] = {name: [] for name in chosen}
    norms: dict[str, Any] = {}
    runs = itertools.count(num_trials)
    for number, seed in enumerate(seeds, 1):
        batches = job.batches(seed)
        for name, point in chosen.items():
            curve, params = _run(
                job.trainers[name],
                point,
                seed,
                batches,
                num_steps=config.steps,
                eval_every=config.eval_every,
                evaluate=job.test,
                report=_shifted(
                    report,
                    next(runs) * config.steps,
                    f"{METHODS[name].label}, seed {number}/{config.num_seeds}",
                ),
            )
            curves[name].append({"seed": seed, **curve})
            if name == "ps-clip" and number == 1:
                norms = _norms_before_and_after(job, seed, batches, params, point)
    methods = {
        name: {"label": METHODS[name].label, **point._asdict(), "curves": curves[name]}
        for name, point in chosen.items()
    }
    return methods, norms


def _norms_before_and_after(
    job: _Job,
    seed: int,
    batches: grain.MapDataset[Batch],
    params: Any,
    point: Hyperparams,
) -> dict[str, Any]:
    largest = point.threshold * job.config.batch_size ** (1 / point.beta)
    return {
        "initial": np.sort(_initial_norms(job, seed).samples),
        "final": np.sort(job.gradient_norms(params, batches).samples),
        "thresholds": [point.threshold, largest],
    }


def _run(
    trainer: Trainer,
    point: Hyperparams,
    seed: int,
    batches: grain.MapDataset[Batch],
    *,
    num_steps: int,
    eval_every: int,
    evaluate: Callable[[Any], dict[str, float]],
    report: Callable[[int, float, float], None],
) -> tuple[dict[str, Any], Any]:
    """Trains once; returns the curve, with means between its points, and the last parameters."""
    state, key = trainer.init(seed, point), dropout_key(seed)
    loss, clipped, seconds = np.zeros((3, num_steps))
    points: list[tuple[int, dict[str, float]]] = []
    for index, batch in iterate(batches, 0, num_steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(trainer.step(state, key, batch))
        seconds[index] = time.perf_counter() - start
        loss[index], clipped[index] = metrics["loss"], metrics["clipped_share"]
        step = index + 1
        if step % _REPORT_EVERY == 0 or step == num_steps:
            report(step, loss[index], clipped[index])
        if step % eval_every == 0 or step == num_steps:
            points.append((step, evaluate(state.params)))
    steps = [step for step, _ in points]
    spans = [slice(*span) for span in itertools.pairwise([0, *steps])]
    curve = {
        "steps": steps,
        "seconds": [float(seconds[:step].sum()) for step in steps],
        "loss": [float(loss[span].mean()) for span in spans],
        "clipped_share": [float(clipped[span].mean()) for span in spans],
        "accuracy": [figures["accuracy"] for _, figures in points],
        "test_loss": [figures["loss"] for _, figures in points],
        "median_step_seconds": float(np.median(seconds)),
        "mean_clipped_share": float(clipped.mean()),
    }
    return curve, state.params


def _shifted(report: Report, completed: int, doing: str) -> Callable[[int, float, float], None]:
    return lambda step, loss, clipped: report(completed + step, doing, loss, clipped)


def _validation(trial: Trial) -> dict[str, float]:
    return {"validation_accuracy": trial.accuracy, "validation_loss": trial.loss}
