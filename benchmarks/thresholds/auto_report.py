"""Reports the rows of `benchmarks.thresholds.auto_threshold`: table and figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.style import tidy
from benchmarks.thresholds.auto_rules import AUTO, FIXED, NONE

COLOURS = {
    NONE: "#000000",
    "truncated squares": "#D55E00",
    "median": "#E69F00",
    FIXED: "#56B4E9",
    AUTO: "#0072B2",
}

NOTE = (
    "Test accuracy, or R² of the regressions, in %: mean over seeds at the learning rate (and "
    "threshold) that is best on validation data. Best: of no clipping, batch clipping and the "
    "fixed threshold. Failures: trials, of a learning rate and a seed, that end below 20 % while "
    "some threshold of batch or fixed clipping does not."
)


def to_cells(row: dict[str, Any]) -> list[str]:
    """Writes a line of the table: the best method, and each one's difference to it."""
    return [
        row["label"],
        f"{100 * row['best']:.1f}",
        *(f"{100 * difference:+.1f}" for difference in row["differences"].values()),
    ]


def totals(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Finds the worst difference and counts the failures of each method, over all conditions."""
    names = rows[0]["tuned"]
    worst = [min(row["differences"][name] for row in rows) for name in names]
    failures = [sum(row["failures"][name] for row in rows) for name in names]
    return [
        ["worst difference", "", *(f"{100 * value:+.1f}" for value in worst)],
        ["failures", "", *map(str, failures)],
    ]


def to_rows(result: dict[str, Any]) -> list[list[str]]:
    return [*map(to_cells, result["rows"]), *totals(result["rows"])]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    table.add_column("condition", no_wrap=True)
    for name in ("best", *result["rows"][0]["tuned"]):
        table.add_column(name, justify="right")
    for cells in to_rows(result):
        table.add_row(*cells)
    return table


def draw(result: dict[str, Any]) -> Figure:
    """Draws a row for each condition, with a mark for each method: its difference to the best."""
    rows = result["rows"]
    figure = Figure(figsize=(9, 1.8 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for (name, colour), marker in zip(COLOURS.items(), "sDv^o", strict=True):
        points = [100 * row["differences"][name] for row in rows]
        axes.plot(points, range(len(rows)), marker, color=colour, label=name, alpha=0.8)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("Test score at each method's tuned learning rate, points to the best tuned")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure
