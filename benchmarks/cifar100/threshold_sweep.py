"""How much does the threshold matter, and how should one choose it?

    python -m benchmarks.cifar100.threshold_sweep --data-dir FOLDER --runs FILE

AlexNet on CIFAR-100 with growing thresholds τ_k = α √k, from one that clips everything to one that
clips next to nothing, and without clipping. Each α is tuned separately, over four learning rates
with runs of half the length, and its winner is tested with other seeds. Every finished run is a
line of --runs; repeat the command to resume. Prints a table and writes it to benchmarks/results as
threshold_sweep.json and .png.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cifar100.many_runs import check_noises
from benchmarks.cifar100.runs import Numbers, Run
from benchmarks.cifar100.tuned import (
    Options,
    Trainer,
    build_trainer,
    growing_grid,
    run_length,
    tune_and_test,
)
from benchmarks.common.machine import describe
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.statistics import describe_difference, describe_mean, paired_difference
from benchmarks.common.style import tidy
from psclip_optax.training.compare.summary import estimate

BETA = 2.0
RATES = (0.006, 0.02, 0.06, 0.2)
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
UNCLIPPED = "no clipping"
DEFAULTS = Options(RESULTS / "threshold_sweep.runs.jsonl")
NOTE = (
    "Test accuracy in %, mean ± standard error over seeds that chose nothing; differences to no "
    "clipping are paired by seed, with 95% intervals (Student's t). Share: of the samples of the "
    "last epoch, clipped."
)
HEADER = ("training data", "α", "learning rate", "share", "test accuracy", "against no clipping")


def build_grids(batch_size: int) -> dict[str, list[Numbers]]:
    """Builds the same number of learning rates for each α; smaller thresholds get larger rates."""
    grids = {UNCLIPPED: list(map(Numbers, RATES))}
    return grids | {
        f"α = {alpha:g}": growing_grid(RATES, (alpha,), BETA, batch_size) for alpha in ALPHAS
    }


def run_noise(noise: str, batch_size: int, train: Trainer) -> dict[str, Any]:
    options, setting = train.options, train.options.setting(batch_size)

    def make_run(stage: str, name: str, numbers: Numbers, seed: int) -> Run:
        return Run(stage, name, noise, numbers, run_length(stage, options.epochs), seed, setting)

    tuned = tune_and_test(build_grids(batch_size), make_run, train, options.seeds)
    described = tuned.described()
    accuracies = described["test_accuracies"]
    return described | {
        "noise": noise,
        "clipped_shares": {
            name: statistics.fmean(record["curves"]["clipped_share"][-1] for record in records)
            for name, records in tuned.tested.items()
        },
        "differences": {
            name: paired_difference(own, accuracies[UNCLIPPED])
            for name, own in accuracies.items()
            if name != UNCLIPPED
        },
    }


def to_cells(row: dict[str, Any]) -> list[list[str]]:
    """Writes a line of the table for no clipping and for each α."""
    return [
        [
            row["noise"],
            name.removeprefix("α = "),
            f"{row['chosen'][name]['learning_rate']:.3g}",
            f"{100 * row['clipped_shares'][name]:.1f} %",
            describe_mean(accuracies),
            describe_difference(row["differences"][name]) if name != UNCLIPPED else "",
        ]
        for name, accuracies in row["test_accuracies"].items()
    ]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == HEADER[0] else "right", no_wrap=True)
    for row in result["rows"]:
        for cells in to_cells(row):
            table.add_row(*cells)
        table.add_section()
    return table


def to_markdown(result: dict[str, Any]) -> str:
    return markdown_table([list(HEADER), *(c for row in result["rows"] for c in to_cells(row))])


def draw(result: dict[str, Any]) -> Figure:
    rows = result["rows"]
    figure = Figure(figsize=(4.5 * len(rows) + 0.5, 4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        _draw_noise(axes, row)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def _draw_noise(axes: Axes, row: dict[str, Any]) -> None:
    """Draws accuracy over α with standard errors, and that without clipping."""
    names = [name for name in row["test_accuracies"] if name != UNCLIPPED]
    alphas = [row["chosen"][name]["threshold"] for name in names]
    means, errors = 100 * np.transpose([estimate(row["test_accuracies"][n]) for n in names])
    axes.errorbar(alphas, means, errors, color="#0072B2", marker="o", capsize=3, label="τ = α √k")
    mean, error = (100 * number for number in estimate(row["test_accuracies"][UNCLIPPED]))
    axes.axhline(mean, color="#000000", linestyle="--", label=UNCLIPPED)
    axes.axhspan(mean - error, mean + error, color="#000000", alpha=0.12, linewidth=0)
    for alpha, height, name in zip(alphas, means, names, strict=True):
        share = f"{100 * row['clipped_shares'][name]:.0f} %"
        offset = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(share, (alpha, height), **offset)
    axes.set(xscale="log", xlabel="α (and the share of the samples clipped)", title=row["noise"])
    axes.margins(x=0.13, y=0.12)
    axes.legend(frameon=False)
    tidy(axes)


def main(
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS,
    noises: tuple[str, ...] = ("clean", "heavy pixels"),
    batch_size: int = 128,
) -> None:
    """Measures how much the threshold matters.

    Args:
      common: the options of all comparisons on CIFAR-100.
      noises: the corruptions of the training data.
      batch_size: samples in a step.
    """
    options = common
    if common.quick:
        options = dataclasses.replace(common, width=0.05, epochs=1, seeds=2, together=7)
        noises, batch_size = ("clean",), 32
    check_noises(noises)
    train = build_trainer(options)
    rows = [run_noise(noise, batch_size, train) for noise in noises]
    result = {
        "machine": rows[0]["machine"],
        "note": NOTE,
        "protocol": {**options.protocol(), "batch_size": batch_size, "rates": len(RATES)},
        "rows": rows,
    }
    publish(options.out, "threshold_sweep", result, [to_table(result)], draw(result), width=130)


if __name__ == "__main__":
    tyro.cli(main)
