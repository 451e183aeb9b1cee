"""Draws the figure of `benchmarks.theory.estimator_error`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.common.machine import describe
from benchmarks.common.style import show_ticks, tidy
from benchmarks.theory.estimator_report import find, minus, show_briefly, tail_size
from benchmarks.theory.heavy_tails import (
    CONSTANT,
    COORDINATE_FEW,
    GEOMETRIC_FEW,
    GEOMETRIC_MANY,
    GROWING,
    MEAN,
)

# Okabe and Ito's colours, which colour-blind readers can distinguish.
STYLES = {
    GROWING: ("#0072B2", "o"),
    CONSTANT: ("#56B4E9", "s"),
    MEAN: ("#D55E00", "^"),
    GEOMETRIC_FEW: ("#009E73", "D"),
    GEOMETRIC_MANY: ("#E69F00", "v"),
    COORDINATE_FEW: ("#CC79A7", "P"),
}


def draw_errors(axes: Axes, result: dict[str, Any], noise: dict[str, Any]) -> None:
    label = noise["noise"]
    rows = [row for row in result["levels"] if row["noise"] == label]
    for estimator, (colour, marker) in STYLES.items():
        own = [row for row in rows if row["estimator"] == estimator]
        sizes = np.array([row["n"] for row in own])
        values = np.array([row["rms"][0] for row in own])
        slope = find(result["slopes"], noise=label, estimator=estimator)["rms"]
        filled = colour if slope else "none"
        axes.plot(sizes, values, marker, color=colour, markerfacecolor=filled, markersize=5)
        if slope:
            centre = np.exp(np.mean(np.log(values))), np.exp(np.mean(np.log(sizes)))
            axes.plot(sizes, centre[0] * (sizes / centre[1]) ** slope[0], color=colour, linewidth=1)
    growing = [row for row in rows if row["estimator"] == GROWING]
    sizes = np.array([row["n"] for row in growing])
    unit = noise["sigma"] * sizes ** noise["slope_of_bound"]
    guaranteed = unit * [row["guaranteed_level"] for row in growing]
    axes.plot(sizes, guaranteed, color="black", linestyle="--", linewidth=1.2)
    slope = find(result["slopes"], noise=label, estimator=GROWING)["rms"]
    bound = minus(f"{noise['slope_of_bound']:.3f}")
    axes.set_title(f"{label}\nslope: growing {show_briefly(slope)}, bound {bound}", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("Samples n")


def draw_tails(axes: Axes, result: dict[str, Any], noise: dict[str, Any]) -> None:
    n = tail_size(result)
    for estimator, (colour, marker) in STYLES.items():
        row = find(result["tails"], noise=noise["noise"], n=n, estimator=estimator)
        value, low, high = np.array(row["quantiles"]).T
        axes.plot(row["deltas"], value, color=colour, marker=marker, markersize=4, linewidth=1)
        axes.fill_between(row["deltas"], low, high, color=colour, alpha=0.2, linewidth=0)
        if estimator == MEAN and noise["index"]:
            ratios = np.array(row["deltas"]) / row["deltas"][-1]
            guide = 1.4 * value[-1] * ratios ** (-1 / noise["index"])
            axes.plot(row["deltas"], guide, color="black", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("Failure probability δ")


def draw_figure(result: dict[str, Any]) -> Figure:
    shown = [row for row in result["noises"] if row["one_sided"] or row["index"] is None]
    figure = Figure(figsize=(max(11, 3.4 * len(shown)), 8), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    for (above, below), noise in zip(grid.T, shown, strict=True):
        draw_errors(above, result, noise)
        draw_tails(below, result, noise)
    grid[0, 0].set_ylabel("RMS error, and its fit")
    grid[1, 0].set_ylabel(f"Error exceeded with probability δ, n = {tail_size(result)}")
    for axes in grid.flat:
        tidy(axes)
        show_ticks(axes.yaxis, axes.get_ylim())
    add_legend(figure)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def add_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1, label=name)
        for name, (colour, marker) in STYLES.items()
    ]
    dashed = Line2D([], [], color="black", linestyle="--", label="guaranteed for growing")
    dotted = Line2D([], [], color="black", linestyle=":", label="δ^(−1/a)")
    hollow = Line2D(
        [],
        [],
        color=STYLES[MEAN][0],
        marker=STYLES[MEAN][1],
        markerfacecolor="none",
        linestyle="none",
        label="plain mean of one set of trials: its expectation is infinite",
    )
    figure.legend(
        handles=[*handles, dashed, dotted, hollow],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
