"""Reports the rows of `benchmarks.thresholds.auto_threshold`: tables and figure."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.publishing import markdown_table
from benchmarks.common.statistics import describe_difference
from benchmarks.common.style import tidy
from benchmarks.thresholds.auto_rules import AUTO, BATCH, FIXED, NONE

COLOURS = {
    NONE: "#000000",
    BATCH: "#E69F00",
    FIXED: "#56B4E9",
    AUTO: "#0072B2",
}
SHOWN = (NONE, BATCH, FIXED, AUTO)
# The aim: how far the automatic threshold may be below the best tuned method.
AIM_LIGHT, AIM_HEAVY = -0.005, -0.01
GROUPS = {
    "chosen on, light": (False, False),
    "chosen on, heavy": (False, True),
    "held out, light": (True, False),
    "held out, heavy": (True, True),
}

NOTE = (
    "Test accuracy, or R² of the regressions, in %, is the mean over seeds at the learning rate "
    "(and threshold) that is best on validation data. Best is the best of no clipping, batch "
    "clipping and the fixed threshold, by the mean on test data. Differences to it are in points, "
    "paired by seed, with 95 % intervals. The aim is to be no more than 0.5 points below it, or "
    "1.0 under heavy tails; it is open if the mean misses it and the interval reaches it. A trial, "
    "of one learning rate and one seed, fails if it ends below 20 %, or 25 % for text, and some "
    "threshold of batch or fixed clipping does not."
)


def aim_of(row: dict[str, Any]) -> float:
    return AIM_HEAVY if row["cell"]["is_heavy"] else AIM_LIGHT


def verdict(row: dict[str, Any], name: str = AUTO) -> str:
    """Tells whether a method meets its aim: met, open or missed."""
    difference = row["differences"][name]
    if difference["mean"] >= aim_of(row):
        return "met"
    return "open" if difference["interval"][1] >= aim_of(row) else "missed"


def group_of(rows: list[dict[str, Any]], is_held_out: bool, is_heavy: bool) -> list[dict[str, Any]]:
    wanted = (is_held_out, is_heavy)
    return [row for row in rows if (row["cell"]["is_held_out"], row["cell"]["is_heavy"]) == wanted]


CONDITION_COLUMNS = ["condition", "tails", "held out", "best tuned, %", *SHOWN, "aim", "failures"]


def condition_rows(result: dict[str, Any]) -> list[list[str]]:
    """Lays out each condition: the best tuned method, and the differences to it."""
    return [
        [
            row["label"],
            "heavy" if row["cell"]["is_heavy"] else "light",
            "yes" if row["cell"]["is_held_out"] else "",
            f"{100 * statistics.fmean(row['tuned'][row['best']]['test']):.1f}",
            *(
                "best" if n == row["best"] else describe_difference(row["differences"][n])
                for n in SHOWN
            ),
            verdict(row),
            str(sum(row["failures"][AUTO])),
        ]
        for row in result["rows"]
    ]


RULE_COLUMNS = [
    "rule",
    *GROUPS,
    "aim met, open, missed: chosen on",
    "held out",
    "failures",
    "held out",
]


def rule_rows(result: dict[str, Any]) -> list[list[str]]:
    """Lays out each method: its mean and worst difference in each group, its aims, its failures."""
    rows = result["rows"]
    halves = [[row for row in rows if row["cell"]["is_held_out"] == held] for held in (False, True)]
    return [
        [
            name,
            *(mean_and_worst(group_of(rows, *group), name) for group in GROUPS.values()),
            *(counted(half, name) for half in halves),
            *(str(sum(sum(row["failures"][name]) for row in half)) for half in halves),
        ]
        for name in rows[0]["tuned"]
    ]


def mean_and_worst(rows: list[dict[str, Any]], name: str) -> str:
    if not rows:
        return "–"
    means = [100 * row["differences"][name]["mean"] for row in rows]
    return f"{statistics.fmean(means):+.1f}, {min(means):+.1f}"


def counted(rows: list[dict[str, Any]], name: str) -> str:
    found = [verdict(row, name) for row in rows]
    return ", ".join(str(found.count(word)) for word in ("met", "open", "missed"))


def conditions_to_markdown(result: dict[str, Any]) -> str:
    return markdown_table([CONDITION_COLUMNS, *condition_rows(result)])


def rules_to_markdown(result: dict[str, Any]) -> str:
    return markdown_table([RULE_COLUMNS, *rule_rows(result)])


def sentences(result: dict[str, Any]) -> list[str]:
    """Names the conditions in which the automatic threshold misses its aim, or may do so."""
    found = []
    for word, told in (("missed", "Aim missed"), ("open", "Aim open")):
        names = [
            f"{row['label']} {describe_difference(row['differences'][AUTO])}"
            for row in result["rows"]
            if verdict(row) == word
        ]
        found.append(f"{told}: {'; '.join(names) or 'nowhere'}")
    failed = [
        f"{row['label']} {count} at {rate:g}"
        for row in result["rows"]
        for rate, count in zip(row["rates"], row["failures"][AUTO], strict=True)
        if count
    ]
    found.append(f"Failures by learning rate: {'; '.join(failed) or 'none'}")
    return found + [say_others(row) for row in result["rows"] if verdict(row) == "missed"]


def say_others(row: dict[str, Any]) -> str:
    """Names the differences of other rules where the automatic threshold misses its aim."""
    names = ("automatic × 2", "by spread", "0.9 quantile", "growing", "slow median")
    told = ", ".join(f"{name} {100 * row['differences'][name]['mean']:+.2f}" for name in names)
    rate = row["tuned"][AUTO]["learning_rate"]
    return f"{row['label']}, with the learning rate {rate:g} of {row['rates']}: {told}"


def tables(result: dict[str, Any]) -> list[Table]:
    title = describe(result["machine"])
    conditions = Table(title=title, caption=NOTE, caption_justify="left")
    rules = Table(title="Mean and worst difference of each method", title_justify="left")
    for table, columns, rows in (
        (conditions, CONDITION_COLUMNS, condition_rows(result)),
        (rules, RULE_COLUMNS, rule_rows(result)),
    ):
        for name in columns:
            table.add_column(name)
        for cells in rows:
            table.add_row(*cells)
    return [conditions, rules]


def draw(result: dict[str, Any]) -> Figure:
    """Draws a row for each condition, with a mark for each method: its difference to the best."""
    rows = result["rows"]
    figure = Figure(figsize=(9, 1.8 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, ((name, colour), marker) in enumerate(zip(COLOURS.items(), "sDvo", strict=True)):
        means = np.array([100 * row["differences"][name]["mean"] for row in rows])
        low, high = 100 * np.transpose([row["differences"][name]["interval"] for row in rows])
        spread = np.maximum([means - low, high - means], 0) if name == AUTO else None
        heights = np.arange(len(rows)) + 0.12 * (index - 1.5)
        style = {"fmt": marker, "color": colour, "label": name, "markersize": 5, "alpha": 0.85}
        axes.errorbar(means, heights, xerr=spread, **style)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.scatter(
        [100 * aim_of(row) for row in rows],
        range(len(rows)),
        marker="|",
        s=160,
        color="#D55E00",
        label="aim",
    )
    labels = [f"{row['label']}{', held out' * row['cell']['is_held_out']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("Test score at each method's tuned learning rate, points to the best tuned")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=len(COLOURS) + 1, frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure
