"""Reports the results of `benchmarks.cifar100.budgets`: tables and figure."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cifar100 import tuned
from benchmarks.cifar100.tuned import describe_numbers
from benchmarks.common.machine import describe
from benchmarks.common.publishing import markdown_table
from benchmarks.common.statistics import describe_difference, describe_mean
from benchmarks.common.style import show_ticks, tidy
from psclip_optax.training.compare.summary import estimate

BASELINES = UNCLIPPED, BATCH = "no clipping", "batch clipping"
OURS = CONSTANT, AUTOMATIC = "per-sample, constant", "per-sample, automatic"
STACKED = "per-sample, constant, stacked gradients"
STYLES = {
    UNCLIPPED: ("#000000", "o"),
    BATCH: ("#D55E00", "s"),
    CONSTANT: ("#0072B2", "^"),
    AUTOMATIC: ("#009E73", "D"),
}
ACCURACIES = np.arange(0.025, 1, 0.025).tolist()
NOTE = (
    "Test accuracy in %, mean ± standard error over seeds that chose nothing; differences are "
    "paired by seed, with 95% intervals (Student's t). Steps to an accuracy: where the mean "
    "accuracies of the budgets, joined by lines over the logarithm of the steps, first reach it. "
    "Each budget is tuned by itself and ends at a learning rate of 0, so that these are no points "
    "of one training. ≤: the smallest budget reaches more; >: no budget reaches it."
)


def steps_of(row: dict[str, Any], result: dict[str, Any]) -> int:
    return row["epochs"] * result["protocol"]["steps_per_epoch"]


def training_of(row: dict[str, Any]) -> str:
    return f"{row['noise']}, {row['optimizer']}"


def rows_by_training(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Groups the rows by data and optimizer, and sorts each group by budget."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["epochs"]):
        groups.setdefault(training_of(row), []).append(row)
    return groups


def mean_accuracies(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [statistics.fmean(row["test_accuracies"][name]) for row in rows]


def steps_to(accuracy: float, steps: list[int], means: list[float]) -> float:
    """Interpolates the number of steps that reaches an accuracy.

    Args:
      accuracy: the target.
      steps: the steps of each budget, increasing.
      means: the mean accuracy of each budget.

    Returns:
      The number of steps; −∞ if the smallest budget is above the target, ∞ if no budget reaches
      it.
    """
    if means[0] > accuracy:
        return -math.inf
    points = list(zip(steps, means, strict=True))
    for (fewer, lower), (more, upper) in itertools.pairwise(points):
        if lower <= accuracy < upper:
            return fewer * (more / fewer) ** ((accuracy - lower) / (upper - lower))
    return math.inf


def steps_to_all(
    rows: list[dict[str, Any]], result: dict[str, Any], accuracies: list[float]
) -> dict[str, list[float]]:
    """Interpolates the steps to each accuracy, for each method."""
    steps = [steps_of(row, result) for row in rows]
    return {
        name: [steps_to(accuracy, steps, mean_accuracies(rows, name)) for accuracy in accuracies]
        for name in STYLES
    }


def shown_accuracies(rows: list[dict[str, Any]]) -> list[float]:
    """Selects the accuracies that some method reaches between its budgets."""
    means = [mean_accuracies(rows, name) for name in STYLES]
    return [
        accuracy for accuracy in ACCURACIES if any(own[0] <= accuracy < max(own) for own in means)
    ]


# Tables


def accuracy_cells(result: dict[str, Any]) -> list[list[str]]:
    """Writes the accuracy of each method."""
    header = ["training", "epochs", "steps", *STYLES]
    return [
        header,
        *(
            [
                training_of(row),
                str(row["epochs"]),
                f"{steps_of(row, result):,}",
                *(describe_mean(row["test_accuracies"][name]) for name in STYLES),
            ]
            for rows in rows_by_training(result).values()
            for row in rows
        ),
    ]


def difference_cells(result: dict[str, Any]) -> list[list[str]]:
    pairs = list(itertools.product(OURS, BASELINES))
    return [
        ["training", "epochs", *(f"{ours} − {other}" for ours, other in pairs)],
        *(
            [
                training_of(row),
                str(row["epochs"]),
                *(describe_difference(row["differences"][ours][other]) for ours, other in pairs),
            ]
            for rows in rows_by_training(result).values()
            for row in rows
        ),
    ]


def steps_cells(result: dict[str, Any]) -> list[list[str]]:
    """Writes the steps to accuracies and, if steps were timed, the seconds."""
    cells = [["training", "test accuracy", *STYLES]]
    for training, rows in rows_by_training(result).items():
        accuracies = shown_accuracies(rows)
        reached = steps_to_all(rows, result, accuracies)
        limits = [steps_of(row, result) for row in (rows[0], rows[-1])]
        for place, accuracy in enumerate(accuracies):
            own = [
                _describe_steps(reached[name][place], limits, step_seconds(result, name))
                for name in STYLES
            ]
            cells.append([training, f"{100 * accuracy:g} %", *own])
    return cells


def step_seconds(result: dict[str, Any], name: str) -> float | None:
    """Returns the median time of a method's step, None if steps were not timed."""
    steps = result["steps"]
    return steps and steps["ways"][name]["seconds_quartiles"][1]


def _describe_steps(steps: float, limits: list[int], seconds: float | None) -> str:
    sign, number = "", steps
    if math.isinf(steps):
        sign, number = ("> ", limits[1]) if steps > 0 else ("≤ ", limits[0])
    time = f" ({sign}{number * seconds:.1f} s)" if seconds else ""
    return f"{sign}{number:,.0f}{time}"


def chosen_cells(result: dict[str, Any]) -> list[list[str]]:
    """Writes the chosen numbers and the number of trials."""
    return [
        ["training", "epochs", *STYLES],
        *(
            [
                training_of(row),
                str(row["epochs"]),
                *(
                    f"{describe_numbers(row['chosen'][name])} ({len(row['trials'][name])} trials)"
                    for name in STYLES
                ),
            ]
            for rows in rows_by_training(result).values()
            for row in rows
        ),
    ]


TABLES = {
    "Accuracy over budgets": accuracy_cells,
    "Differences": difference_cells,
    "Steps to accuracies": steps_cells,
    "Chosen": chosen_cells,
}


def filled_tables(result: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Writes the tables that have rows: from a single budget no steps are interpolated."""
    written = {title: cells(result) for title, cells in TABLES.items()}
    return {title: cells for title, cells in written.items() if len(cells) > 1}


def to_tables(result: dict[str, Any]) -> list[Table]:
    tables = [_to_table(title, cells) for title, cells in filled_tables(result).items()]
    tables[-1].caption = "\n".join([NOTE, *sentences(result)])
    tables[-1].caption_justify = "left"
    return tables


def _to_table(title: str, cells: list[list[str]]) -> Table:
    table = Table(title=title)
    for place, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if place else "left")
    for row in cells[1:]:
        table.add_row(*row)
    return table


def to_markdown(result: dict[str, Any]) -> str:
    return "\n".join(map(markdown_table, filled_tables(result).values()))


def label(row: dict[str, Any]) -> str:
    return f"{training_of(row)}: {row['epochs']}"


def together(labels: list[str]) -> str:
    """Joins labels of the same training, with their budgets in parentheses."""
    groups: dict[str, list[str]] = {}
    for training, _, epochs in (one.rpartition(": ") for one in labels):
        groups.setdefault(training, []).append(epochs)
    return ", ".join(f"{training} ({', '.join(epochs)})" for training, epochs in groups.items())


def sentences(result: dict[str, Any]) -> list[str]:
    """Writes where each of our methods is above or below each baseline, and winners at an edge."""
    found = []
    for ours, other in itertools.product(OURS, BASELINES):
        rows = [
            {"label": label(row), "differences": row["differences"][ours]} for row in result["rows"]
        ]
        told = "; ".join(
            f"{word} it for {together(labels)}"
            for word, labels in tuned.verdicts({"rows": rows}, other).items()
            if labels
        )
        found.append(f"{ours} against {other}, by the intervals at budgets of (epochs): {told}")
    return [*found, edge_sentence(result)]


def edge_sentence(result: dict[str, Any]) -> str:
    """Lists the winners that have an untried side."""
    edges = [
        f"{name}, {together([label(row)])}, {' and '.join(sides)}"
        for row in result["rows"]
        for name, sides in row["open_sides"].items()
        if sides
    ]
    if not edges:
        return "No winner lies at an edge of the points that were tried"
    return f"Winners at an edge of the points that were tried: {'; '.join(edges)}"


# Figure


def draw(result: dict[str, Any]) -> Figure:
    """Draws accuracy over budgets, and the steps or time to an accuracy.

    A group with a single budget has no lines, and appears in the tables only, unless all have.
    """
    groups = rows_by_training(result)
    lines = {name: rows for name, rows in groups.items() if len(rows) > 1}
    drawn, height = (lines, 2) if lines else (groups, 1)
    figure = Figure(figsize=(max(8, 5 * len(drawn)), 3.6 * height), layout="constrained")
    axes = figure.subplots(height, len(drawn), squeeze=False)
    for column, (name, rows) in enumerate(drawn.items()):
        _draw_accuracies(axes[0, column], rows)
        axes[0, column].set_title(name)
    for column, rows in enumerate(lines.values()):
        _draw_ratios(axes[1, column], rows, result)
    unit = "time" if result["steps"] else "steps"
    axes[-1, 0].set_ylabel(f"{unit} to accuracy, ratio to no clipping")
    axes[0, 0].set_ylabel("test accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STYLES), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def _draw_accuracies(axes: Axes, rows: list[dict[str, Any]]) -> None:
    epochs = [row["epochs"] for row in rows]
    for place, (name, (colour, marker)) in enumerate(STYLES.items()):
        # Shifted a little, so that no error bar hides another.
        shifted = np.multiply(epochs, 1.02 ** (place - 1.5))
        means, errors = 100 * np.transpose([estimate(row["test_accuracies"][name]) for row in rows])
        style = {"color": colour, "marker": marker, "capsize": 3, "markersize": 5}
        axes.errorbar(shifted, means, errors, label=name, **style)
    axes.set(xscale="log", xlabel="budget, epochs")
    axes.set_xticks(epochs, list(map(str, epochs)))
    axes.set_xticks([], minor=True)
    tidy(axes)


def _draw_ratios(axes: Axes, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Draws the ratio of each method's steps or time to no clipping's, where both are known."""
    accuracies = np.linspace(0, 1, 1001).tolist()
    reached = {
        name: np.multiply(own, step_seconds(result, name) or 1)
        for name, own in steps_to_all(rows, result, accuracies).items()
    }
    for name, (colour, _) in STYLES.items():
        known = np.isfinite(reached[name]) & np.isfinite(reached[UNCLIPPED])
        ratios = reached[name][known] / reached[UNCLIPPED][known]
        axes.plot(100 * np.array(accuracies)[known], ratios, color=colour)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    limits = min(low, 0.45), max(high, 1.3)
    axes.set_ylim(limits)
    show_ticks(axes.yaxis, limits)
    axes.set_xlabel("test accuracy, %")
    tidy(axes)
