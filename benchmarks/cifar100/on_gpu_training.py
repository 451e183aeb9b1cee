"""Does per-sample clipping train AlexNet of full width faster? For `benchmarks.engine.on_gpu`.

Clean CIFAR-100, batches of 128, momentum 0.9, cosine schedule, a few epochs. Each method has 20
trials of the same length. The best by validation accuracy is trained again from other seeds and
tested. All runs of a chunk are one program, with the images on the device.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax

import psclip_optax as psc
from benchmarks.cifar100.many_runs import build_loss, train_together
from benchmarks.cifar100.runs import Data, Numbers, Run, Setting, as_json, load_data
from benchmarks.cifar100.tuned import (
    batch_clipping_grid,
    describe_numbers,
    edges,
    growing_grid,
    test_accuracy,
    tune_and_test,
)
from benchmarks.common.cache import RunsCache
from benchmarks.common.publishing import markdown_table
from benchmarks.common.statistics import describe_difference, describe_mean, paired_difference
from benchmarks.common.timing import Case, quartiles, time_interleaved
from benchmarks.engine.accumulation import mean_loss
from benchmarks.engine.on_gpu_results import Results, say
from psclip_optax.training.data.splits import Dataset, Split
from psclip_optax.training.models.classifiers import build_model

# The most important question comes first, because the time limit may end the list.
EPOCHS = (4, 2, 1)
SEEDS = 15
BATCH_SIZE = 128
RATES = (0.008, 0.02, 0.05, 0.125)
# Over three decades: the smallest clips every sample, the largest hardly any.
THRESHOLDS = (0.02, 0.2, 1.0, 4.5, 20.0)
BETA = 2.0
MOMENTUM, BATCH, GROWING, MEDIAN = METHODS = (
    "momentum",
    "batch clipping",
    "per-sample, growing",
    "per-sample, median",
)
TOGETHER = 5 * len(METHODS)
STEPS_IN_WINDOW = 16

NOTE = (
    "Chosen: the best of 20 trials of the same length by validation accuracy, with seed 0; tested "
    "with other seeds: mean ± standard error, and differences paired by seed with their 95% "
    "intervals (Student's t). Step: a train step's time, scanned on the device, interleaved: ratio "
    "to momentum's, median (quartiles)."
)


class Plan(NamedTuple):
    """The amount of training.

    Attributes:
      data_dir: folder of the parts of CIFAR-100.
      epochs: the lengths of the runs, each with its own tuning.
      seeds: the number of seeds of each tuned method.
      together: the number of runs that are trained at once.
      tiny: a tiny net and random images instead.
      end: the time by `time.perf_counter` after which nothing is started.
    """

    data_dir: pathlib.Path | None
    epochs: tuple[int, ...]
    seeds: int
    together: int
    tiny: bool
    end: float

    def setting(self) -> Setting:
        if self.tiny:
            return Setting(0.05, 16, augment=False)
        return Setting(1.0, BATCH_SIZE, dtype="bfloat16")


def median_rule(scale: Any) -> psc.AdaptiveThreshold[Any]:
    """Builds the running median, which needs no scale."""
    del scale
    return psc.quantile_threshold(0.5)


def make_grids(batch_size: int) -> dict[str, list[Numbers]]:
    """Builds twenty points for each method."""
    rates = np.geomspace(RATES[0] / 4, 4 * RATES[-1], len(RATES) * len(THRESHOLDS)).tolist()
    return {
        MOMENTUM: [Numbers(rate) for rate in rates],
        BATCH: batch_clipping_grid(RATES, THRESHOLDS),
        GROWING: growing_grid(RATES, THRESHOLDS, BETA, batch_size),
        MEDIAN: [Numbers(rate, scale=1.0) for rate in rates],
    }


# Data


def read_split(paths: list[pathlib.Path]) -> Split:
    parts = [np.load(path) for path in paths]
    labels = np.concatenate([part["fine_labels"] for part in parts]).astype(np.int32)
    return Split(np.concatenate([part["images"] for part in parts]), labels)


def read_parts(folder: pathlib.Path | None) -> Dataset:
    """Reads CIFAR-100 from its parts in a folder."""
    train, test = (
        sorted(folder.glob(f"*{name}*.npz")) if folder else [] for name in ("train", "test")
    )
    if not train or not test:
        raise SystemExit(f"expected *train*.npz and *test*.npz in --data-dir, got {folder}")
    names = tuple(map(str, range(100)))
    return Dataset("cifar100", 100, names, read_split(train), read_split(test))


def random_images() -> Dataset:
    generator = np.random.default_rng(0)

    def split(n: int) -> Split:
        images = generator.integers(0, 256, (n, 16, 16, 3), np.uint8)
        return Split(images, np.arange(n, dtype=np.int32) % 10)

    return Dataset("random", 10, tuple("0123456789"), split(80), split(40))


# Runs


@dataclasses.dataclass
class Trainer:
    """Trains runs on one data set, and stores their records.

    Attributes:
      cache: the cache of finished runs.
      data: the data to train on.
      num_classes: number of labels.
      plan: the number of runs at once, and the time limit.
      seconds_of_epoch: the time of the last chunk's epochs, to predict whether another one fits.
    """

    cache: RunsCache
    data: Data
    num_classes: int
    plan: Plan
    seconds_of_epoch: float = 0.0

    def __call__(self, runs: list[Run]) -> list[dict[str, Any]]:
        """Returns the records of these runs.

        Raises:
          TimeoutError: the time limit is reached before all are finished.
        """
        pending = [run for run in runs if self.described(run) not in self.cache]
        together = self.plan.together
        for first in range(0, len(pending), together):
            self.train(pending[first : first + together])
        return [self.described(run) | self.cache[self.described(run)] for run in runs]

    def train(self, chunk: list[Run]) -> None:
        start, epochs = time.perf_counter(), chunk[0].epochs
        if start + epochs * self.seconds_of_epoch > self.plan.end:
            raise TimeoutError
        found = train_together(chunk, self.data, self.num_classes, self.plan.together, median_rule)
        self.seconds_of_epoch = (time.perf_counter() - start) / epochs
        for run, own in zip(chunk, found, strict=True):
            del own["norms"]  # for every sample
            self.cache.add(self.described(run), as_json(own))
        best = max(map(test_accuracy, found))
        say(
            f"  {chunk[0].stage}, {len(chunk)} runs: {self.seconds_of_epoch:.2f} s an epoch, "
            f"at best {100 * best:.1f} % right"
        )

    def images(self) -> dict[str, int]:
        return {
            name: len(getattr(self.data, name).images) for name in ("train", "validation", "test")
        }

    def described(self, run: Run) -> dict[str, Any]:
        return run.described() | {"images": self.images()}


def train_all(results: Results, plan: Plan) -> None:
    """Times the steps, then tunes and tests at each length until the time limit."""
    dataset = random_images() if plan.tiny else read_parts(plan.data_dir)
    add_steps(results, plan, dataset.num_classes, dataset.image_shape)
    data = load_data(dataset, len(dataset.train.labels) // 10)
    trainer = Trainer(RunsCache(results.runs), data, dataset.num_classes, plan)
    say(f"training on {trainer.images()}")
    try:
        for epochs in plan.epochs:
            say(f"{epochs} epochs")
            tune_and_test_in_turn(trainer, epochs)
    except TimeoutError:
        say("The time is over; the same command goes on")


def tune_and_test_in_turn(train: Trainer, epochs: int) -> None:
    """Tests a few seeds of all methods in turn, so that all have equally many at the time limit."""
    plan, setting = train.plan, train.plan.setting()
    grids = make_grids(setting.batch_size)
    if plan.tiny:
        grids = {name: points[:2] for name, points in grids.items()}

    def make_run(stage: str, name: str, numbers: Numbers, seed: int) -> Run:
        return Run(stage, name, "clean", numbers, epochs, seed, setting)

    at_once = max(1, plan.together // len(METHODS))
    for seeds in range(at_once, plan.seeds + 1, at_once):
        tune_and_test(grids, make_run, train, seeds)


# Time of a step


def gradients_of(method: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Builds (params, state of the rule, *batch) → gradient, new state."""
    plain = jax.grad(mean_loss(loss))
    clipped = psc.clipped_value_and_grad(
        loss, psc.growing_threshold(1.0, BETA), mode="one_pass", return_stats=True
    )
    rule = median_rule(1.0)

    def unclipped(params: Any, seen: Any, *batch: Any) -> Any:
        return plain(params, *batch), seen

    def growing(params: Any, seen: Any, *batch: Any) -> Any:
        return clipped(params, *batch)[1], seen

    def median(params: Any, seen: Any, *batch: Any) -> Any:
        _, gradient, stats = clipped(params, *batch, threshold=rule.threshold(seen))
        return gradient, rule.update(seen, stats.norms)

    return {GROWING: growing, MEDIAN: median}.get(method, unclipped)


def train_steps(method: str, loss: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """Builds for a method params → state, and (state, *batches) → state after a step with each."""
    gradients = gradients_of(method, loss)
    clip = optax.clip_by_global_norm(1.0) if method == BATCH else optax.identity()
    tx = optax.chain(clip, optax.sgd(0.01, momentum=0.9))

    def init(params: Any) -> Any:
        return params, tx.init(params), median_rule(1.0).init()

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, seen = state
        gradient, seen = gradients(params, seen, *batch)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, seen), None

    return init, lambda state, *batches: lax.scan(step, state, batches)[0]


def measure_steps(
    setting: Setting, num_classes: int, shape: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Times a train step of one run by each method."""
    model = build_model("alexnet", num_classes, width=setting.width)
    both = build_loss(model, setting.dtype, as_products=False)
    key = jax.random.key(0, impl="rbg")
    images = jax.random.normal(key, (STEPS_IN_WINDOW, setting.batch_size, *shape))
    labels = jax.random.randint(key, images.shape[:2], 0, num_classes)
    params = jax.jit(model.init)(key, images[0, :1])["params"]
    cases = {}
    for method in METHODS:
        init, steps = train_steps(method, lambda *arguments: both(*arguments)[0])
        arguments = (init(params), images, labels)
        cases[method] = Case(jax.jit(steps).lower(*arguments).compile(), arguments)
    windows = time_interleaved(cases, rounds)
    return {
        method: {
            "seconds_quartiles": [q / STEPS_IN_WINDOW for q in quartiles(own)],
            "ratio_quartiles": quartiles(
                [mine / other for mine, other in zip(own, windows[MOMENTUM], strict=True)]
            ),
        }
        for method, own in windows.items()
    }


def add_steps(results: Results, plan: Plan, num_classes: int, shape: tuple[int, ...]) -> None:
    size, setting = "tiny" if plan.tiny else "full", plan.setting()
    if any(row["what"] == "step" and row["size"] == size for row in results.rows()):
        return
    say("steps of each method")
    ways = measure_steps(setting, num_classes, shape, 3 if plan.tiny else 12)
    results.add({"what": "step", "name": "alexnet", "size": size, "ways": ways})
    for method, own in ways.items():
        say(f"  {method}: {step_cell(own)}")


# Table


def step_cell(own: dict[str, Any]) -> str:
    low, middle, high = own["ratio_quartiles"]
    return f"{1e3 * own['seconds_quartiles'][1]:.3f} ms, {middle:.2f} ({low:.2f}–{high:.2f})"


def to_markdown(rows: list[dict[str, Any]], path: pathlib.Path) -> str:
    """Writes the tuned methods at each length, and the time of a step of each."""
    steps = next((row["ways"] for row in rows if row["what"] == "step"), {})
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for record in RunsCache(path).records():
        groups.setdefault((record["epochs"], record["images"]["train"]), []).append(record)
    table = [
        ["epochs", "train images", "method", "chosen", "at an edge", "seeds", "test accuracy, %"]
    ]
    table[0] += ["− momentum", "step"]
    for (epochs, images), records in sorted(groups.items()):
        for method in METHODS:
            cells = accuracy_cells(records, method)
            step = step_cell(steps[method]) if steps else ""
            table.append([str(epochs), f"{images:,}", method, *cells, step])
    return f"{markdown_table(table)}\n{NOTE}\n" if groups else ""


def accuracy_cells(records: list[dict[str, Any]], method: str) -> list[str]:
    tested = by_seed(records, method)
    if len(tested) < 2:
        return ["", "", str(len(tested)), "", ""]
    trials = [r for r in records if (r["method"], r["stage"]) == (method, "tune")]
    chosen = next(iter(tested.values()))["numbers"]
    own = list(map(test_accuracy, tested.values()))
    other = [test_accuracy(by_seed(records, MOMENTUM)[seed]) for seed in tested]
    return [
        describe_numbers(chosen),
        ", ".join(edges({"chosen": chosen, "trials": trials})),
        str(len(tested)),
        describe_mean(own),
        "" if method == MOMENTUM else describe_difference(paired_difference(own, other)),
    ]


def by_seed(records: list[dict[str, Any]], method: str) -> dict[int, dict[str, Any]]:
    """Lists the tested runs of a method."""
    return {r["seed"]: r for r in records if (r["method"], r["stage"]) == (method, "final")}
