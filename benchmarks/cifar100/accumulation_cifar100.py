"""Clip micro-batches before they are accumulated, after, or not at all?

    python -m benchmarks.cifar100.accumulation_cifar100 --data-dir FOLDER --runs FILE

AlexNet on CIFAR-100, with 4 and 16 micro-batches of 32 samples in a step. Every way of clipping is
tuned with the same number of trials, six or eight, of half the length, and tested with other seeds.
Every finished run is a line of --runs; repeat the command to resume. Prints a table and writes it
to benchmarks/results as accumulation_cifar100.json and .png.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cifar100.many_runs import check_noises
from benchmarks.cifar100.runs import Numbers, Run
from benchmarks.cifar100.tuned import (
    BATCH_NORM,
    Options,
    Trainer,
    batch_clipping_grid,
    build_trainer,
    describe_numbers,
    draw_differences,
    growing_grid,
    run_length,
    timed_once,
    tune_and_test,
    with_lower,
)
from benchmarks.common.machine import describe
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.statistics import describe_difference, describe_mean
from benchmarks.common.timing import quartiles
from benchmarks.engine.accumulation import CASES, optimizers, time_windows, train_step
from benchmarks.zoo.models import Model
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss

MICROBATCH_SIZE = 32
BETA = 2.0
METHODS = ("not clipped", "clipped after", "clipped before")
COLOURS: dict[str, str] = dict(zip(METHODS[:2], ("#000000", "#D55E00"), strict=True))
RATES = (0.006, 0.02, 0.06)
DEFAULTS = Options(RESULTS / "accumulation_cifar100.runs.jsonl")
NOTE = (
    "Test accuracy in %, mean ± standard error over seeds that chose nothing; differences of "
    "clipping before to each other way are paired by seed, with 95% intervals (Student's t). Time: "
    "a step of K micro-batches by optax.MultiSteps or accumulate_clipped, as a ratio to that "
    "without clipping in the same round, median (quartiles)."
)


def build_grids(noise: str, number: int) -> dict[str, list[Numbers]]:
    """Builds the same number of points for each method; steps grow with the root of batch size."""
    unit = (number / 4) ** 0.5
    rates = tuple(rate * unit for rate in RATES)
    many = tuple(rate * unit for rate in (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08))
    if noise == "heavy pixels":
        rates, many = with_lower(rates, (3,)), with_lower(many, (10, 3))
    return {
        "not clipped": [Numbers(rate) for rate in many],
        "clipped after": batch_clipping_grid(rates, (0.5, 2.0)),
        # The norms of micro-batches' gradients are close to those of batches.
        "clipped before": growing_grid(rates, (0.5, 2.0), BETA, number, BATCH_NORM),
    }


def run_cell(noise: str, number: int, train: Trainer) -> dict[str, Any]:
    """Runs one noise with one number of micro-batches."""
    options, setting = train.options, train.options.setting(number * MICROBATCH_SIZE)

    def make_run(stage: str, name: str, numbers: Numbers, seed: int) -> Run:
        # Without clipping before, the mean of micro-batches' gradients is the batch's gradient.
        parts = number if name == "clipped before" else None
        own = dataclasses.replace(setting, num_microbatches=parts)
        return Run(stage, name, noise, numbers, run_length(stage, options.epochs), seed, own)

    grids = build_grids(noise, number)
    tuned = tune_and_test(grids, make_run, train, options.seeds)
    return {
        "noise": noise,
        "microbatches": number,
        "label": f"{noise}, K = {number}",
        "trials": len(grids[METHODS[2]]),
        **tuned.described_against(METHODS[2]),
    }


def time_steps(number: int, train: Trainer) -> Any:
    """Times a step of K micro-batches of one run, for each way of clipping."""
    size, num_classes = train.image_size, train.num_classes
    net = build_model("alexnet", num_classes, width=train.options.width)
    key = jax.random.key(0)
    plain = classification_loss(net)

    def batch(n: int) -> tuple[jax.Array, jax.Array]:
        images = jax.random.normal(key, (n, size, size, 3))
        return images, jax.random.randint(key, (n,), 0, num_classes)

    params = net.init(key, batch(1)[0])["params"]
    model = Model(lambda params, *example: plain(params, *example)[0], params, batch)
    cases = {
        name: train_step(model, tx, batch(MICROBATCH_SIZE))
        for name, tx in optimizers(number).items()
    }
    seconds = time_windows(cases, train.options.rounds(), number)
    baseline, before, after = (seconds[name] for name in CASES)
    return {
        name: {
            "seconds_quartiles": quartiles(own),
            "ratio_quartiles": quartiles([t / b for t, b in zip(own, baseline, strict=True)]),
        }
        for name, own in zip(METHODS, (baseline, after, before), strict=True)
    }


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in ("training data", "way", "chosen"):
        table.add_column(name, no_wrap=True)
    for name in ("test accuracy", "clipped before, against it", "ms a step", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        ways = result["steps"][str(row["microbatches"])]["ways"]
        for name in METHODS:
            table.add_row(
                row["label"] if name == METHODS[0] else "",
                name,
                describe_numbers(row["chosen"][name]),
                describe_mean(row["test_accuracies"][name]),
                "" if name == METHODS[2] else describe_difference(row["differences"][name]),
                f"{1e3 * ways[name]['seconds_quartiles'][1]:.1f}",
                describe_ratio(ways[name]["ratio_quartiles"]),
                end_section=name == METHODS[2],
            )
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes test accuracies, the differences of clipping before, and the times of a step."""
    header = [
        "training data, micro-batches",
        *METHODS,
        *(f"before − {name}" for name in METHODS[:2]),
    ]
    rows = [[*header, "time of a step: after", "before"]]
    for row in result["rows"]:
        ways = result["steps"][str(row["microbatches"])]["ways"]
        rows.append(
            [
                row["label"],
                *(describe_mean(row["test_accuracies"][name]) for name in METHODS),
                *(describe_difference(row["differences"][name]) for name in METHODS[:2]),
                *(describe_ratio(ways[name]["ratio_quartiles"]) for name in METHODS[1:]),
            ]
        )
    return markdown_table(rows)


def describe_ratio(ratios: list[float]) -> str:
    low, middle, high = ratios
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def draw(result: dict[str, Any]) -> Figure:
    label = "Test accuracy of clipping before, difference in percentage points (95%)"
    return draw_differences(result["rows"], COLOURS, label, describe(result["machine"]))


def main(
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS,
    noises: tuple[str, ...] = ("clean", "heavy pixels"),
    microbatches: tuple[int, ...] = (4, 16),
) -> None:
    """Clip micro-batches before they are accumulated, after, or not at all?

    Args:
      common: the options of all comparisons on CIFAR-100.
      noises: the corruptions of the training data.
      microbatches: the numbers of micro-batches in a step, one comparison each.
    """
    options = common
    if common.quick:
        options = dataclasses.replace(common, width=0.05, epochs=1, seeds=2, together=4)
        noises, microbatches = ("clean",), (4,)
    check_noises(noises)
    train = build_trainer(options)
    rows = [run_cell(noise, number, train) for noise in noises for number in microbatches]
    steps = {
        str(number): timed_once(
            train, functools.partial(time_steps, number, train), microbatches=number
        )
        for number in microbatches
    }
    result = {
        "machine": rows[0]["machine"],
        "note": NOTE,
        "protocol": {**options.protocol(), "microbatch_size": MICROBATCH_SIZE},
        "rows": rows,
        "steps": steps,
    }
    table, figure = to_table(result), draw(result)
    publish(options.out, "accumulation_cifar100", result, [table], figure, width=150)


if __name__ == "__main__":
    tyro.cli(main)
