"""Reports the rows of `benchmarks.engine.cost`: summary, table and figure."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.style import show_ticks, tidy

NOTE = (
    "Time: ratio to the plain gradient's in the same round, median (quartiles). Temp: temporary "
    "memory of the compiled program; allowed is 1.1 × (plain + the sites' cotangents). FLOPs: "
    "XLA's count with every scan unrolled, and of a branch the dearer side. Compile: tracing "
    "included, median over the settings' number of compilations. Error: of the gradients, half "
    "of the samples clipped, against stacked ones in float32; relative to the largest entry of "
    "each leaf, largest over the leaves."
)

# Okabe and Ito's colours, which colour-blind readers can distinguish; hatched for grey prints.
STYLES = {
    "one_pass": ("#0072B2", ""),
    "two_pass": ("#56B4E9", "///"),
    "by_layer": ("#009E73", "\\\\\\"),
    "vmap": ("#D55E00", "..."),
}
_BAR = 0.8 / len(STYLES)

LINES = {"alexnet": ("#0072B2", "o"), "mlp": ("#D55E00", "s"), "gpt_tied": ("#009E73", "^")}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Computes geometric means of times over the zoo, and fits the ratio's slope in each sweep."""
    means = {}
    for mode in STYLES:
        ratios = [figures["ratio_quartiles"][1] for _, figures in in_zoo(rows, mode)]
        if ratios:
            means[mode] = {"ratio": statistics.geometric_mean(ratios), "models": len(ratios)}
    variation = {}
    for (sweep, model), points in sweeps_of(rows).items():
        ratios = [row["modes"]["one_pass"]["ratio_quartiles"][1] for row in points]
        variation[f"{sweep} of {model}"] = max(ratios) / min(ratios)
    return {"geometric_mean_of_time": means, "largest_per_smallest_ratio": variation}


def in_zoo(rows: list[dict[str, Any]], mode: str) -> list[tuple[int, dict[str, Any]]]:
    """Lists the results of a mode with the index of their model, for models on which it ran."""
    zoo = [row for row in rows if row["experiment"] == "zoo"]
    figures = [(index, row["modes"][mode]) for index, row in enumerate(zoo)]
    return [(index, of_mode) for index, of_mode in figures if "skipped" not in of_mode]


def sweeps_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["experiment"] != "zoo":
            sweeps.setdefault((row["experiment"], row["model"]), []).append(row)
    return sweeps


# Table


def label(row: dict[str, Any]) -> str:
    length = "" if row["length"] is None else f", T = {row['length']}"
    return f"{row['model']}, n = {row['samples']}{length}"


def to_table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    caption = "\n".join([NOTE, *reasons_to_show(rows)])
    table = Table(title=describe(machine), caption=caption, caption_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for name in ("ms", "time/plain", "temp", "of allowed", "FLOPs", "compile", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown = {mode: f for mode, f in row["modes"].items() if is_shown(row, f)}
        for i, (mode, figures) in enumerate(shown.items()):
            is_last = i == len(shown) - 1
            table.add_row("" if i else label(row), mode, *cells(figures), end_section=is_last)
    summary = summarise(rows)
    for mode, mean in summary["geometric_mean_of_time"].items():
        table.add_row(f"geometric mean of {mean['models']}", mode, "", f"{mean['ratio']:.2f}")
    for sweep, ratio in summary["largest_per_smallest_ratio"].items():
        table.add_row(f"over {sweep}", "one_pass", "", f"largest/smallest {ratio:.2f}")
    return table


def is_shown(row: dict[str, Any], figures: dict[str, Any]) -> bool:
    return row["experiment"] == "zoo" or "skipped" not in figures


def reasons_to_show(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"– {label(row)}, {mode}: {figures['skipped']}"
        for row in rows
        for mode, figures in row["modes"].items()
        if row["experiment"] == "zoo" and "skipped" in figures
    ]


def cells(figures: dict[str, Any]) -> list[str]:
    if "skipped" in figures:
        return ["–"] * 7
    low, middle, high = figures["ratio_quartiles"]
    is_unit = low == high == 1
    return [
        f"{1e3 * figures['seconds_quartiles'][1]:.1f}",
        "1" if is_unit else f"{middle:.2f} ({low:.2f}–{high:.2f})",
        f"{figures['temp_bytes'] / 1e6:.1f} MB" if is_unit else f"{figures['temp_ratio']:.2f}",
        f"{figures['temp_per_allowed']:.2f}" if "temp_per_allowed" in figures else "",
        f"{figures['flops'] / 1e9:.2f} G" if is_unit else f"{figures['flops_ratio']:.3f}",
        f"{figures['compile_seconds']:.1f} s" if is_unit else f"{figures['compile_ratio']:.2f}",
        f"{figures['error']:.0e}" if "error" in figures else "",
    ]


# Figure


def draw(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    labels = [label(row) for row in rows if row["experiment"] == "zoo"]
    sweeps = sweeps_of(rows)
    heights = [1 + 0.6 * len(labels)] * bool(labels) + [3.2] * bool(sweeps)
    figure = Figure(figsize=(11, 1 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(max(1, len(heights)), 2, height_ratios=heights or None)
    if labels:
        times, memory = (figure.add_subplot(grid[0, column]) for column in range(2))
        draw_bars(times, rows, "ratio_quartiles", labels)
        draw_bars(memory, rows, "temp_ratio", [""] * len(labels))
        times.set_xlabel("Time, relative to the plain gradient (median, quartiles)")
        memory.set_xlabel("Temporary memory, relative to the plain gradient's")
        handles, names = times.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(STYLES), frameon=False)
    for column, (sweep, name) in enumerate([("n", "Samples"), ("length", "Sequence length")]):
        lines = {model: points for (own, model), points in sweeps.items() if own == sweep}
        if lines:
            axes = figure.add_subplot(grid[len(heights) - 1, column])
            draw_sweep(axes, lines, "samples" if sweep == "n" else "length")
            axes.set_xlabel(name)
    figure.suptitle(describe(machine), fontsize=10, x=0.01, ha="left")
    return figure


def draw_bars(axes: Axes, rows: list[dict[str, Any]], quantity: str, labels: list[str]) -> None:
    axes.set_xscale("log")
    for k, (mode, (colour, hatch)) in enumerate(STYLES.items()):
        figures = in_zoo(rows, mode)
        if not figures:
            continue
        heights = [index + _offset(k) for index, _ in figures]
        values = [of_mode[quantity] for _, of_mode in figures]
        low, middle, high = zip(*(as_quartiles(value) for value in values), strict=True)
        spread = [np.subtract(middle, low), np.subtract(high, middle)]
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        # Bars start at 1: to the left is cheaper than a plain gradient, to the right more
        # expensive.
        widths = np.subtract(middle, 1)
        axes.barh(heights, widths, 0.9 * _BAR, left=1, label=mode, linewidth=0, **style)
        if quantity == "ratio_quartiles":
            axes.errorbar(middle, heights, xerr=spread, fmt="none", ecolor="black", capsize=2)
        for height, value, end in zip(heights, middle, high, strict=True):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{value:.2f}", (max(end, 1), height), fontsize=7, **place)
    for k, mode in enumerate(STYLES):
        for index in set(range(len(labels))) - {index for index, _ in in_zoo(rows, mode)}:
            axes.annotate("– not run", (1.02, index + _offset(k)), fontsize=7, va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high * 1.3, 2))
    show_ticks(axes.xaxis, axes.get_xlim())
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _offset(k: int) -> float:
    """Returns the distance of a mode's bar from the middle of its model's."""
    return _BAR * (k - (len(STYLES) - 1) / 2)


def as_quartiles(value: Any) -> tuple[float, float, float]:
    return tuple(value) if isinstance(value, list) else (value, value, value)


def draw_sweep(axes: Axes, lines: dict[str, list[dict[str, Any]]], along: str) -> None:
    for model, points in lines.items():
        colour, marker = LINES[model]
        places = [row[along] for row in points]
        ratios = [row["modes"]["one_pass"]["ratio_quartiles"] for row in points]
        low, middle, high = zip(*ratios, strict=True)
        fixed = "" if along == "samples" else f", n = {points[0]['samples']}"
        axes.plot(places, middle, color=colour, marker=marker, label=model + fixed)
        axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.8, low), max(1.6, high))
    axes.set_ylabel("Time of one_pass,\nrelative to the plain gradient")
    axes.legend(frameon=False)
    tidy(axes)


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Writes the guide's table: the cost of each mode relative to a plain gradient, by model.

    Args:
      rows: the rows of engine.json.
    """
    columns = ["model, samples", *(f"`{mode}`: time | memory" for mode in STYLES)]
    lines = [f"| {' | '.join(columns)} |", "|---" * (1 + 2 * len(STYLES)) + "|"]
    for row in rows:
        if row["experiment"] == "zoo":
            modes = [_markdown(row["modes"][mode]) for mode in STYLES]
            lines.append(f"| {row['model']}, {row['samples']} | {' | '.join(modes)} |")
    return "\n".join(lines)


def _markdown(figures: dict[str, Any]) -> str:
    if "skipped" in figures:
        return "– | –"
    low, median, high = figures["ratio_quartiles"]
    return f"{median:.2f} ({low:.2f}–{high:.2f}) | {figures['temp_ratio']:.2f}"
