"""Reports the results of `benchmarks.cifar100.alexnet_cifar100`: tables and figures."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cifar100.many_runs import Numbers
from benchmarks.cifar100.tuned import (
    describe_numbers,
    edges,
)
from benchmarks.common.machine import describe
from benchmarks.common.publishing import markdown_table
from benchmarks.common.statistics import describe_difference, describe_mean, paired_difference
from benchmarks.common.style import tidy

BASELINES = ("SGD", "momentum", "batch clipping")

FAILED = 0.015  # chance is 0.01

NOTE = (
    "Chosen: the best of 12 trials by validation accuracy; tested with other seeds, 95% intervals "
    "of differences paired by seed (Student's t). Stopped early: at the epoch of the best "
    "validation accuracy. The best baseline is chosen by its test accuracy, in its favour. Times "
    "are of one run's steps, interleaved: ratios to the plain gradient's, median (quartiles)."
)


class Method(NamedTuple):
    """The grid of a method, and its style in figures.

    Attributes:
      grid: 12 points.
      colour: in figures.
      marker: in figures.
    """

    grid: tuple[Numbers, ...]
    colour: str
    marker: str


def best_of(methods: dict[str, Any], accuracies: str) -> str:
    return max(BASELINES, key=lambda name: statistics.fmean(methods[name][accuracies]))


def to_tables(result: dict[str, Any]) -> list[Table]:
    noises = result["noises"]
    return [
        steps_table(result),
        *(noise_table(result, noise) for noise in noises),
        tails_table(noises),
        edges_table(noises),
    ]


def steps_table(result: dict[str, Any]) -> Table:
    machine = describe(result["steps"]["machine"])
    table = Table(title=machine, caption=NOTE, caption_justify="left")
    table.add_column("gradient of a train step", no_wrap=True)
    for name in ("ms", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in result["steps"]["ways"].items():
        low, middle, high = row["ratio_quartiles"]
        ms = f"{1e3 * row['seconds_quartiles'][1]:.2f}"
        table.add_row(name, ms, f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return table


def noise_table(result: dict[str, Any], noise: str) -> Table:
    found = result["noises"][noise]
    table = Table(title=f"{noise}: test accuracy, %")
    for name in ("method", "chosen"):
        table.add_column(name, no_wrap=True)
    for name in (
        "last epoch",
        f"against {found['best_baseline']} (95%)",
        "stopped early",
        f"against {found['best_stopped_baseline']} (95%)",
        "clipped",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name, own in found["methods"].items():
        clipped = own["batch_clipped"] if name == "batch clipping" else own["clipped_share"]
        table.add_row(
            name,
            describe_numbers(own["chosen"]),
            describe_mean(own["test_accuracies"]),
            "" if name == found["best_baseline"] else describe_difference(own["difference"]),
            describe_mean(own["stopped_accuracies"]),
            ""
            if name == found["best_stopped_baseline"]
            else describe_difference(own["stopped_difference"]),
            f"{clipped:.0%}",
        )
    return table


def tails_table(noises: dict[str, Any]) -> Table:
    table = Table(
        title="tails of the samples' gradient norms, over the training batches of an epoch",
        caption="Index: Hill's estimate with its 95% interval, by psclip_optax.tails; a light tail "
        "has all moments.",
        caption_justify="left",
    )
    for name in ("training data", "method", "epoch"):
        table.add_column(name, no_wrap=True)
    for name in ("tail index", "median", "99%", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for noise, found in noises.items():
        for method, epochs in found["tails"].items():
            for epoch, tail in epochs.items():
                table.add_row(noise, method, epoch, *describe_tail(tail))
    return table


def describe_tail(tail: dict[str, Any] | None) -> tuple[str, str, str, str]:
    if tail is None:
        return "diverged", "", "", ""
    median, _, high, _, largest = tail["quantiles"]
    low, up = tail["interval"]
    index = "light" if tail["index"] is None else f"{tail['index']:.2f} ({low:.2f} to {up:.2f})"
    undecided = " or light" if tail["verdict"] == "undecided" else ""
    return index + undecided, f"{median:.1f}", f"{high:.1f}", f"{largest:.0f}"


def edges_table(noises: dict[str, Any]) -> Table:
    """Lists winners at the edge of their grid, beyond which there may be better ones."""
    table = Table(title="chosen at an edge of the grid")
    for name in ("training data", "method", "chosen", "edge"):
        table.add_column(name, no_wrap=True)
    for noise, found in noises.items():
        for name, own in found["methods"].items():
            for edge in edges(own):
                table.add_row(noise, name, describe_numbers(own["chosen"]), edge)
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the guide's table: test accuracy after the last epoch."""
    ours = "per-sample, growing"
    names = list(result["protocol"]["trials"])
    rows = [["training data", "tail index", *names, "growing − best baseline"]]
    for noise, found in result["noises"].items():
        index, *_ = describe_tail(list(found["tails"][ours].values())[-1])
        accuracies = [describe_mean(found["methods"][name]["test_accuracies"]) for name in names]
        difference = describe_difference(found["methods"][ours]["difference"])
        rows.append([noise, index, *accuracies, difference])
    return markdown_table(rows)


def differences_to_markdown(result: dict[str, Any]) -> str:
    """Writes the differences of per-sample clipping to each baseline, with and without stopping."""
    rows = [["training data", "threshold", "stopped", *(f"− {name}" for name in BASELINES)]]
    for noise, found in result["noises"].items():
        for ours in ("constant", "growing", "automatic"):
            for when, accuracies in (("no", "test_accuracies"), ("early", "stopped_accuracies")):
                own, *others = (
                    found["methods"][name][accuracies]
                    for name in (f"per-sample, {ours}", *BASELINES)
                )
                differences = [describe_difference(paired_difference(own, o)) for o in others]
                rows.append([noise, ours, when, *differences])
    return markdown_table(rows)


def failures_to_markdown(result: dict[str, Any]) -> str:
    """Writes how many trials are not above chance."""
    names = list(result["protocol"]["trials"])
    rows = [["training data", *names]]
    for noise, found in result["noises"].items():
        trials = [found["methods"][name]["trials"] for name in names]
        failed = [sum(t["validation_accuracy"] < FAILED for t in own) for own in trials]
        rows.append(
            [noise, *(f"{few} of {len(own)}" for few, own in zip(failed, trials, strict=True))]
        )
    return markdown_table(rows)


def tails_to_markdown(result: dict[str, Any]) -> str:
    rows = [["training data", "method", "epoch", "tail index", "median", "99%", "largest"]]
    rows += [
        [noise, method, epoch, *describe_tail(tail)]
        for noise, found in result["noises"].items()
        for method, epochs in found["tails"].items()
        for epoch, tail in epochs.items()
    ]
    return markdown_table(rows)


def draw(result: dict[str, Any], styles: dict[str, Method]) -> Figure:
    noises = result["noises"]
    figure = Figure(figsize=(14, 3.6 * len(noises) + 0.6), layout="constrained")
    rows = figure.subplots(len(noises), 3, squeeze=False)
    for row, (noise, found) in zip(rows, noises.items(), strict=True):
        draw_curves(row[0], found["methods"], styles, dict.fromkeys(styles, 1.0), "epoch")
        row[0].set_ylabel(f"{noise}: test accuracy, %")
        minutes = {name: seconds_of_epoch(result, name) / 60 for name in styles}
        draw_curves(row[1], found["methods"], styles, minutes, "minutes of training, by the engine")
        name = "per-sample, growing"
        slow = {name: minutes[name] * vmap_ratio(result)}
        draw_curves(row[1], {name: found["methods"][name]}, styles, slow, "", dashed=True)
        draw_trials(row[2], found["methods"], styles)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(styles), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def vmap_ratio(result: dict[str, Any]) -> float:
    steps = result["steps"]["ways"]
    return steps["vmap"]["seconds_quartiles"][1] / steps["engine"]["seconds_quartiles"][1]


def seconds_of_epoch(result: dict[str, Any], name: str) -> float:
    way = "engine" if name.startswith("per-sample") else "plain"
    seconds = result["steps"]["ways"][way]["seconds_quartiles"][1]
    return result["protocol"]["steps_per_epoch"] * seconds


def draw_curves(
    axes: Axes,
    methods: dict[str, Any],
    styles: dict[str, Method],
    unit: dict[str, float],
    label: str,
    *,
    dashed: bool = False,
) -> None:
    for name, own in methods.items():
        curves = 100 * np.array(own["test_curves"], float)
        measured = np.isfinite(curves[0])
        x = unit[name] * (1 + np.flatnonzero(measured))
        mean = curves[:, measured].mean(axis=0)
        error = curves[:, measured].std(axis=0, ddof=1) / len(curves) ** 0.5
        style = {"color": styles[name].colour, "linewidth": 1.6}
        axes.plot(x, mean, "--" if dashed else "-", label="_" if dashed else name, **style)
        axes.fill_between(x, mean - error, mean + error, alpha=0.2, color=styles[name].colour)
        axes.plot(x[-1], mean[-1], styles[name].marker, color=styles[name].colour)
    if label:
        axes.set_xlabel(label)
    tidy(axes)


def draw_trials(axes: Axes, methods: dict[str, Any], styles: dict[str, Method]) -> None:
    for name, own in methods.items():
        rates = [trial["numbers"]["learning_rate"] for trial in own["trials"]]
        values = [100 * trial["validation_accuracy"] for trial in own["trials"]]
        axes.plot(rates, values, styles[name].marker, color=styles[name].colour, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of a trial")
    axes.set_ylabel("validation accuracy, %")
    tidy(axes)
