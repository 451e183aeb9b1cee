"""Does per-sample clipping train faster? Accuracy over budgets of epochs, and time to accuracy.

    python -m benchmarks.cifar100.budgets --data-dir FOLDER --runs FILE

AlexNet on CIFAR-100, clean and with wrong labels, momentum SGD and AdamW, with a cosine schedule
over the budget. Each method is tuned separately at each budget, by runs of the full length, on a
lattice that extends towards the best point; the winner is tested with other seeds. Every finished
run is a line of --runs; repeat the command to resume. Prints tables of the complete budgets, and
writes them to benchmarks/results as budgets.json and .png.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import tyro

import psclip_optax as psc
from benchmarks.cifar100 import budgets_report as report
from benchmarks.cifar100 import step_times
from benchmarks.cifar100.runs import Numbers, Run, Setting
from benchmarks.cifar100.search import Point, best, open_sides, rate, rounded, search, threshold
from benchmarks.cifar100.tuned import (
    BATCH_NORM,
    SAMPLE_NORM,
    Options,
    Trainer,
    Tuned,
    build_trainer,
    described_steps,
    timed_once,
    validation_accuracy,
)
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.statistics import paired_difference

BATCH_SIZE = 128
TRIALS = 12
DEFAULTS = Options(RESULTS / "budgets.runs.jsonl", seeds=5)
Train: TypeAlias = Callable[[list[Run]], list[dict[str, Any]]]


class Method(NamedTuple):
    """A method that is compared.

    Attributes:
      numbers: point → numbers of a run.
      start: the first point at the smallest budget.
    """

    numbers: Callable[[Point], Numbers]
    start: Point


def raised_rate(point: Point, norm: float) -> float:
    """Returns the learning rate, larger for thresholds below the typical norm."""
    return rounded(rate(point[0]) * max(1.0, norm / threshold(point[1])))


METHODS = {
    "momentum": {
        report.UNCLIPPED: Method(lambda point: Numbers(rate(point[0])), (0,)),
        report.BATCH: Method(
            lambda point: Numbers(
                raised_rate(point, BATCH_NORM), batch_threshold=threshold(point[1])
            ),
            (4, 0),
        ),
        report.CONSTANT: Method(
            lambda point: Numbers(raised_rate(point, SAMPLE_NORM), threshold=threshold(point[1])),
            (12, 4),
        ),
        report.AUTOMATIC: Method(lambda point: Numbers(rate(point[0]), scale=1.0), (16,)),
    },
    # Its steps have the same length at every threshold.
    "AdamW": {
        report.UNCLIPPED: Method(lambda point: Numbers(rate(point[0])), (-12,)),
        report.BATCH: Method(
            lambda point: Numbers(rate(point[0]), batch_threshold=threshold(point[1])), (-12, 0)
        ),
        report.CONSTANT: Method(
            lambda point: Numbers(rate(point[0]), threshold=threshold(point[1])), (-12, 4)
        ),
        report.AUTOMATIC: Method(lambda point: Numbers(rate(point[0]), scale=1.0), (-12,)),
    },
}


class Condition(NamedTuple):
    """Training data, optimizer and budget.

    Attributes:
      noise: one of NOISES.
      epochs: the length of every run.
      optimizer: one of METHODS.
    """

    noise: str
    epochs: int
    optimizer: str = "momentum"

    def before(self) -> Condition | None:
        """Returns the condition whose winners are the first points of this one."""
        if self.noise != "clean":
            return self._replace(noise="clean")
        return self._replace(epochs=self.epochs // 2) if self.epochs > 1 else None

    def starts(self, winners: dict[Condition, dict[str, Point]]) -> dict[str, Point] | None:
        """Returns the first point of each method; None if the condition before is incomplete."""
        before = self.before()
        if before is None:
            return {name: method.start for name, method in METHODS[self.optimizer].items()}
        return winners.get(before)


# The cheapest and most informative conditions first.
PLAN = (
    *(Condition("clean", epochs) for epochs in (1, 2, 4)),
    *(Condition("20% labels", epochs) for epochs in (1, 2)),
    Condition("clean", 8),
    *(Condition("20% labels", epochs) for epochs in (4, 8)),
    *(Condition("clean", epochs, "AdamW") for epochs in (1, 2, 4, 8)),
    *(Condition(noise, epochs) for epochs in (16, 32) for noise in ("clean", "20% labels")),
)


def automatic_rule(scale: Any) -> psc.AdaptiveThreshold[Any]:
    """Builds the default threshold, which has no scale; a run uses it if its scale is not 0."""
    del scale
    return psc.auto_threshold()


def run_condition(
    condition: Condition,
    starts: dict[str, Point],
    train: Train,
    setting: Setting,
    seeds: int,
    trials: int,
) -> tuple[dict[str, Any], dict[str, Point]]:
    """Tunes and tests every method, and returns the results and the winners."""
    methods = METHODS[condition.optimizer]
    own_setting = dataclasses.replace(setting, optimizer=condition.optimizer)

    def make_run(stage: str, name: str, point: Point, seed: int) -> Run:
        numbers = methods[name].numbers(point)
        return Run(stage, name, condition.noise, numbers, condition.epochs, seed, own_setting)

    def score(name: str, point: Point) -> float:
        return validation_accuracy(train([make_run("tune", name, point, 0)])[0])

    found = {name: search(starts[name], trials, functools.partial(score, name)) for name in methods}
    winners = {name: best(scores) for name, scores in found.items()}
    tested = {
        name: train([make_run("final", name, point, seed) for seed in range(1, seeds + 1)])
        for name, point in winners.items()
    }
    numbers = {name: methods[name].numbers(point) for name, point in winners.items()}
    described = Tuned(numbers, tested).described()
    row = condition._asdict() | {
        "trials": {
            name: [
                {"numbers": methods[name].numbers(point)._asdict(), "validation_accuracy": value}
                for point, value in scores.items()
            ]
            for name, scores in found.items()
        },
        "open_sides": {name: open_sides(scores) for name, scores in found.items()},
        **described,
        "differences": differences(described["test_accuracies"]),
    }
    return row, winners


def differences(accuracies: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Computes the differences of our methods to the baselines, paired by seed."""
    return {
        ours: {
            other: paired_difference(accuracies[ours], accuracies[other])
            for other in report.BASELINES
        }
        for ours in report.OURS
    }


def run_plan(
    plan: tuple[Condition, ...], train: Train, setting: Setting, seeds: int, trials: int
) -> list[dict[str, Any]]:
    """Runs the conditions, and returns the results of the complete ones."""
    rows = []
    winners: dict[Condition, dict[str, Point]] = {}
    for condition in plan:
        starts = condition.starts(winners)
        if starts is None:
            continue
        try:
            row, winners[condition] = run_condition(
                condition, starts, train, setting, seeds, trials
            )
        except TimeoutError:  # later conditions may be complete
            continue
        rows.append(row)
    return rows


def training_until(end: float, trainer: Trainer) -> Train:
    """Builds a function that trains runs and raises TimeoutError after the end."""

    def train(runs: list[Run]) -> list[dict[str, Any]]:
        return trainer(runs, seconds=end - time.perf_counter(), automatic=automatic_rule)

    return train


def known_steps(trainer: Trainer, batch_size: int, timed: bool) -> dict[str, Any] | None:
    """Times the steps if asked to, or returns earlier times, or None."""
    if not timed and described_steps(trainer, batch_size=batch_size) not in trainer.cache:
        return None
    measure = functools.partial(step_times.time_steps, batch_size, trainer)
    return timed_once(trainer, measure, batch_size=batch_size)


def main(
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS,
    trials: int = TRIALS,
    time_steps: bool = False,
) -> None:
    """Measures accuracy over budgets of epochs, and the time to given accuracies.

    Args:
      common: the options of all comparisons on CIFAR-100; budgets take the place of epochs.
      trials: the largest number of each method's trials at a budget.
      time_steps: whether to time a step of each method, on an otherwise idle machine; by default
        the times of an earlier command are used, if any.
    """
    end = time.perf_counter() + common.seconds
    options, plan, batch_size = common, PLAN, BATCH_SIZE
    if common.quick:
        options = dataclasses.replace(common, width=0.05, seeds=2)
        plan = (*PLAN[:2], Condition("20% labels", 1), Condition("clean", 1, "AdamW"))
        trials, batch_size = 3, 32
    trainer = build_trainer(options)
    train = training_until(end, trainer)
    rows = run_plan(plan, train, options.setting(batch_size), options.seeds, trials)
    if not rows:
        raise SystemExit("no budget is complete; repeat the command to resume")
    result = {
        "machine": rows[0]["machine"],
        "note": report.NOTE,
        "protocol": {
            "width": options.width,
            "dtype": options.dtype,
            "seeds": options.seeds,
            "trials": trials,
            "batch_size": batch_size,
            "steps_per_epoch": len(trainer.data.train.images) // batch_size,
        },
        "steps": known_steps(trainer, batch_size, time_steps),
        "rows": rows,
    }
    publish(options.out, "budgets", result, report.to_tables(result), report.draw(result), 170)


if __name__ == "__main__":
    tyro.cli(main)
