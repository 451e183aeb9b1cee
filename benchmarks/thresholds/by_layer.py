"""Does a threshold for each layer train as well as one for the whole gradient?

    python -m benchmarks.thresholds.by_layer --data-dir FOLDER

AlexNet is trained on CIFAR-100 under four noises with momentum SGD, and a small GPT with AdamW on
the text of Python's `help`. Both ways of clipping get the same trials of constant thresholds, and
the same learning rates for the automatic one. The best by validation data are trained again from
other seeds, twice as long, and tested. Every finished run is a line of --runs; repeat the command
to resume. Prints a table and writes it to benchmarks/results as by_layer.json and .png.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

import psclip_optax as psc
from benchmarks.cifar100.many_runs import as_json
from benchmarks.cifar100.tuned import enlarged_digits, raised
from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.statistics import paired_difference
from benchmarks.thresholds.by_layer_report import (
    ALL,
    ALL_AUTO,
    LAYER,
    LAYER_AUTO,
    NOTE,
    PAIRS,
    draw,
    to_chosen_table,
    to_table,
)
from benchmarks.thresholds.by_layer_tasks import Task, alexnet, language_model
from psclip_optax.groups import in_groups_of
from psclip_optax.thresholds.tracking import as_adaptive
from psclip_optax.training.data.datasets import load_dataset

# Relative to the median norm of the whole gradient in the first batch.
THRESHOLDS = (0.3, 2.0)
AUTOMATIC = 0.5  # the automatic threshold, relative to the same
EVALUATED_TOGETHER = 500


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the comparison.

    Attributes:
      runs: file of the finished runs; by default that of the published results.
      data_dir: folder with an official archive of CIFAR-100; it is downloaded otherwise.
      out: folder for the table as JSON, and the figure.
      seeds: the number of seeds of the tested runs, at least 2.
      conditions: only these conditions, by their index.
      quick: digits, tiny nets and few runs, to check that the benchmark works.
    """

    runs: pathlib.Path = RESULTS / "by_layer.runs.jsonl"
    data_dir: pathlib.Path | None = None
    out: pathlib.Path = RESULTS
    seeds: int = 4
    conditions: tuple[int, ...] = (0, 1, 2, 3, 4)
    quick: bool = False


DEFAULTS = Options()


class Method(NamedTuple):
    """A way of clipping.

    Attributes:
      rule: (parameters, threshold) → the rule.
      thresholds: the thresholds to tune over; one if there is nothing to tune.
    """

    rule: Callable[[Any, Any], Any]
    thresholds: tuple[float, ...]


def automatic_by_layer(params: Any, threshold: Any) -> Any:
    del threshold
    return dict.fromkeys(params, psc.auto_threshold())


METHODS = {
    ALL: Method(lambda params, threshold: psc.constant_threshold(threshold), THRESHOLDS),
    LAYER: Method(psc.by_layer, THRESHOLDS),
    ALL_AUTO: Method(lambda params, threshold: psc.auto_threshold(), (AUTOMATIC,)),
    LAYER_AUTO: Method(automatic_by_layer, (AUTOMATIC,)),
}


class Point(NamedTuple):
    """The tuned numbers."""

    rate: float
    threshold: float


class Carry(NamedTuple):
    """The state of a run between two steps; `limit` is the threshold as a norm."""

    params: Any
    opt_state: Any
    rule: Any
    limit: Any


class Program(NamedTuple):
    """The compiled functions of one task and method."""

    start: Callable[..., Carry]
    step: Callable[..., Any]


@functools.cache
def build_program(task: Task, method: str) -> Program:
    """Builds the functions that train a run; they compile when first called."""
    value_and_grad = psc.clipped_value_and_grad(task.loss, jnp.inf, has_aux=True, return_stats=True)

    def rule_of(params: Any, limit: Any) -> psc.AdaptiveThreshold[Any]:
        return as_adaptive(METHODS[method].rule(params, limit))

    def start(key: jax.Array, threshold: Any, *arrays: Any) -> Carry:
        """Clips the first batch by its own norms, like every rule."""
        params = task.init(key)
        rule = rule_of(params, 1.0)
        unclipped = in_groups_of(rule.threshold(rule.init()), jnp.inf)
        examples = task.examples(first_key(key), *arrays)
        norms = value_and_grad(params, *examples, threshold=unclipped)[-1].norms
        whole = jnp.sqrt(jnp.square(norms.reshape(len(norms), -1)).sum(axis=1))
        limit = threshold * jnp.median(whole)
        return Carry(params, task.optimizer.init(params), rule.update(rule.init(), norms), limit)

    def step(carry: Carry, rate: Any, index: Any, total: Any, key: jax.Array, *arrays: Any) -> Any:
        rule = rule_of(carry.params, carry.limit)
        examples = task.examples(jax.random.fold_in(first_key(key), index), *arrays)
        (loss, _), grads, stats = value_and_grad(
            carry.params, *examples, threshold=rule.threshold(carry.rule)
        )
        updates, opt_state = task.optimizer.update(grads, carry.opt_state, carry.params)
        factor = -rate * (1 + jnp.cos(jnp.pi * index / total)) / 2
        params = optax.apply_updates(carry.params, optax.tree.scale(factor, updates))
        followed = lax.cond(  # the first batch counts once
            index == 0, lambda: carry.rule, lambda: rule.update(carry.rule, stats.norms)
        )
        clipped = stats.num_clipped / len(stats.norms)
        return Carry(params, opt_state, followed, carry.limit), (loss, jnp.atleast_1d(clipped))

    return Program(jax.jit(start), jax.jit(step, donate_argnums=0))


def first_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 1)


@functools.cache
def build_evaluation(task: Task) -> Callable[..., Any]:
    return jax.jit(jax.vmap(task.loss, (None, *[0] * len(task.held_out["test"]))))


def evaluated(task: Task, params: Any, split: str) -> dict[str, float]:
    """Computes mean loss and accuracy; accuracy is 0 if the loss is not finite."""
    arrays = task.held_out[split]
    parts = [
        build_evaluation(task)(params, *(array[i : i + EVALUATED_TOGETHER] for array in arrays))
        for i in range(0, len(arrays[0]), EVALUATED_TOGETHER)
    ]
    losses, right = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    loss = float(jnp.mean(losses))
    return {"loss": loss, "accuracy": float(jnp.mean(right)) if loss < float("inf") else 0.0}


class Run(NamedTuple):
    """One training run, with everything that determines its result except the task."""

    stage: str
    method: str
    condition: str
    point: Point
    steps: int
    seed: int

    def described(self, task: Task) -> dict[str, Any]:
        own = self._asdict() | {"point": self.point._asdict(), "task": task.name}
        return as_json(own | task.described)


def train(task: Task, run: Run) -> dict[str, Any]:
    """Trains and evaluates a run: trials on validation data, others on test data."""
    program, key = build_program(task, run.method), jax.random.key(run.seed)
    batches = task.batches(run.condition, run.seed, run.steps)
    first = next(batches)
    carry = program.start(key, run.point.threshold, *first)
    curve = []
    for index, arrays in enumerate(itertools.chain([first], batches)):
        carry, figures = program.step(carry, run.point.rate, index, run.steps, key, *arrays)
        curve.append(figures)
    losses, clipped = zip(*jax.device_get(curve), strict=True)
    split = "validation" if run.stage == "tune" else "test"
    return as_json(
        {
            **evaluated(task, carry.params, split),
            "training_loss": statistics.fmean(map(float, losses[-50:])),
            "clipped": np.mean(clipped, axis=0).tolist(),
            "limit": float(carry.limit),
            "machine": describe_machine(),
        }
    )


def points_of(task: Task, method: str) -> list[Point]:
    """Pairs every rate with every threshold; by layer as many as for the whole gradient."""
    return [
        Point(rate, threshold)
        for threshold in METHODS[method].thresholds
        for rate in raised(task.rates, 1 / threshold if task.feels_scale else 1)
    ]


def run_condition(task: Task, condition: str, options: Options, cache: RunsCache) -> dict[str, Any]:
    """Tunes and tests all methods on one task."""

    def found(run: Run) -> dict[str, Any]:
        return cache.once(run.described(task), functools.partial(train, task, run))

    def chosen(method: str) -> tuple[Point, list[dict[str, Any]]]:
        trials = {
            point: found(Run("tune", method, condition, point, task.steps // 2, 0))
            for point in points_of(task, method)
        }
        best = max(trials, key=lambda point: trials[point]["accuracy"])
        return best, [point._asdict() | {"accuracy": trials[point]["accuracy"]} for point in trials]

    rows = {}
    for method in METHODS:
        point, trials = chosen(method)
        runs = [
            found(Run("final", method, condition, point, task.steps, seed))
            for seed in range(1, options.seeds + 1)
        ]
        rows[method] = {
            "chosen": point._asdict(),
            "trials": trials,
            "accuracies": [run["accuracy"] for run in runs],
            "losses": [run["loss"] for run in runs],
            "clipped": [run["clipped"] for run in runs],
            "machine": runs[0]["machine"],
        }
    return {
        "task": task.name,
        "condition": condition,
        "label": f"{task.name}, {condition}",
        "described": task.described | {"steps": task.steps},
        "methods": rows,
        "differences": {
            ours: paired_difference(rows[ours]["accuracies"], rows[other]["accuracies"])
            for ours, other in PAIRS.items()
        },
    }


def build_tasks(options: Options) -> Iterator[tuple[Task, str]]:
    """Lists each task with each of its conditions, the quickest first."""
    gpt = language_model(16, 1, steps=4) if options.quick else language_model(64, 2, steps=400)
    yield from ((gpt, condition) for condition in gpt.conditions)
    dataset, num_validation = (
        (enlarged_digits(), 200)
        if options.quick
        else (load_dataset("cifar100", data_dir=options.data_dir), 5_000)
    )
    width, steps = (0.05, 4) if options.quick else (0.125, 1200)
    net = alexnet(dataset, width, num_validation, steps)
    yield from ((net, condition) for condition in net.conditions)


def main(common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS) -> None:
    """Does a threshold for each layer train as well as one for the whole gradient?

    Args:
      common: the options of the comparison.
    """
    options = common
    if common.quick:
        options = dataclasses.replace(common, seeds=2, conditions=(0,))
    cache = RunsCache(options.runs)
    every = enumerate(build_tasks(options))
    rows = [
        run_condition(task, condition, options, cache)
        for place, (task, condition) in every
        if place in options.conditions
    ]
    result = {
        "machine": rows[0]["methods"][ALL]["machine"],
        "note": NOTE,
        "protocol": {"seeds": options.seeds},
        "rows": rows,
    }
    tables = [to_table(result), to_chosen_table(result)]
    publish(options.out, "by_layer", result, tables, draw(result), width=150)


if __name__ == "__main__":
    tyro.cli(main)
