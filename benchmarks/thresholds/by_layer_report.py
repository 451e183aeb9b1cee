"""Report the results of `benchmarks.thresholds.by_layer`: tables, a figure and sentences.

Nothing here runs on its own.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cifar100 import tuned
from benchmarks.cifar100.alexnet_cifar100 import FAILED
from benchmarks.common.machine import describe
from benchmarks.common.publishing import markdown_table
from benchmarks.common.statistics import describe_difference, describe_mean
from benchmarks.common.style import tidy

ALL, LAYER = "one threshold", "by layer"
ALL_AUTO, LAYER_AUTO = "one threshold, automatic", "by layer, automatic"
PAIRS = {LAYER: ALL, LAYER_AUTO: ALL_AUTO}
COLOURS = {LAYER: "#0072B2", LAYER_AUTO: "#D55E00"}
NOTE = (
    "Test accuracy (of the GPT: share of the characters that are named rightly) in %, mean ± "
    "standard error over seeds that chose nothing; differences of clipping by layer are paired by "
    "seed, with 95% intervals (Student's t)."
)


def to_rows(result: dict[str, Any]) -> list[list[str]]:
    """Makes a line for each condition, under a header."""
    header = ["training data", ALL, LAYER, "difference", ALL_AUTO, LAYER_AUTO, "difference"]
    rows = [header]
    for row in result["rows"]:
        cells = [row["label"]]
        for ours, other in PAIRS.items():
            cells += [describe_mean(row["methods"][m]["accuracies"]) for m in (other, ours)]
            cells.append(describe_difference(row["differences"][ours]))
        rows.append(cells)
    return rows


def to_table(result: dict[str, Any]) -> Table:
    header, *rows = to_rows(result)
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for cells in rows:
        table.add_row(*cells)
    return table


def to_chosen_table(result: dict[str, Any]) -> Table:
    table = Table(title="chosen: learning rate, threshold in first median norms; share clipped")
    for name in ("training data", *result["rows"][0]["methods"]):
        table.add_column(name)
    for row in result["rows"]:
        table.add_row(row["label"], *map(describe_chosen, row["methods"].values()))
    return table


def describe_chosen(own: dict[str, Any]) -> str:
    shares = [sum(of_group) / len(of_group) for of_group in zip(*own["clipped"], strict=True)]
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    clipped = f"{low}%" if low == high else f"{low}–{high}%"
    return f"{own['chosen']['rate']:.3g}, {own['chosen']['threshold']:g}; {clipped}"


def to_markdown(result: dict[str, Any]) -> str:
    return markdown_table(to_rows(result))


def sentences(result: dict[str, Any]) -> list[str]:
    """Writes where clipping by layer is better or worse, failed trials, and the GPT's loss."""
    found = [
        f"{ours[0].upper()}{ours[1:]}, {word} {other}: {'; '.join(labels)}"
        for ours, other in PAIRS.items()
        for word, labels in tuned.verdicts(result, ours).items()
        if labels
    ]
    (row,) = (row for row in result["rows"] if row["task"] == "GPT")
    bits = (
        f"{statistics.fmean(own['losses']) / math.log(2):.3f} {name}"
        for name, own in row["methods"].items()
    )
    return [
        *found,
        describe_failures([other for other in result["rows"] if other is not row]),
        describe_edges(result["rows"]),
        f"Bits a character of the held-out text: {'; '.join(bits)}",
    ]


def describe_failures(rows: list[dict[str, Any]]) -> str:
    """Counts the classifier's trials that end no better than chance."""
    trials = {
        name: [
            trial["accuracy"] < FAILED for row in rows for trial in row["methods"][name]["trials"]
        ]
        for name in rows[0]["methods"]
    }
    told = (f"{sum(failed)} of {len(failed)} {name}" for name, failed in trials.items())
    return f"Trials of AlexNet that end no better than chance: {'; '.join(told)}"


def describe_edges(rows: list[dict[str, Any]]) -> str:
    """Counts the winners with constant thresholds at the edge of their grid."""
    winners = [row["methods"][name] for row in rows for name in (ALL, LAYER)]
    smallest = outermost = 0
    for own in winners:
        chosen, trials = own["chosen"], own["trials"]
        rates = [t["rate"] for t in trials if t["threshold"] == chosen["threshold"]]
        smallest += chosen["threshold"] == min(trial["threshold"] for trial in trials)
        outermost += chosen["rate"] in (min(rates), max(rates))
    return (
        f"Of {len(winners)} winners with constant thresholds {smallest} have the smaller one, and "
        f"{outermost} the lowest or highest learning rate beside it: wider grids may do better"
    )


def draw(result: dict[str, Any]) -> Figure:
    """Draws a row for each condition, a mark for each threshold: by layer minus one for all."""
    rows = result["rows"]
    figure = Figure(figsize=(9, 1.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, colour) in enumerate(COLOURS.items()):
        own = [row["differences"][name] for row in rows]
        means = [100 * difference["mean"] for difference in own]
        half = [100 * (d["interval"][1] - d["interval"][0]) / 2 for d in own]
        heights = [i + 0.2 * (place - 0.5) for i in range(len(rows))]
        style: Any = {"color": colour, "marker": "os"[place], "linestyle": "none", "capsize": 3}
        axes.errorbar(means, heights, xerr=half, label=f"{name} − {PAIRS[name]}", **style)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("Test accuracy by layer, difference in percentage points (95%)")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure
