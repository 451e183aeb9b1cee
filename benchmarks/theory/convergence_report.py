"""Reports the results of `benchmarks.theory.convergence_rate`: tables and the figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.style import tidy
from benchmarks.theory.descent import METHODS, OTHERS, OURS, PLAIN, STATISTICS
from benchmarks.theory.noisy_problems import LIGHT


def select(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def with_interval(value: float, bounds: list[float], digits: int = 2) -> str:
    low, high = bounds
    return f"{value:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"


def pairs_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("problem", "noise")} for row in result["noises"]]


def table_with(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, no_wrap=True, justify="left" if index < 2 else "right")
    return table


def slopes_table(result: dict[str, Any]) -> Table:
    methods = list(dict.fromkeys(row["method"] for row in result["rates"]))
    last = f"{THEORY}, last two N"
    columns = ["noise", "statistic", "tail index", "bound", *methods, last]
    table = table_with("Slope of ‖∇F‖ against N, untuned: η = 1/L", columns, result["note"])
    for noise in result["noises"]:
        for statistic in STATISTICS:
            of_pair = {name: noise[name] for name in ("problem", "noise")}
            rows = select(result["rates"], statistic=statistic, **of_pair)
            is_first = statistic == STATISTICS[0]
            table.add_row(
                f"{noise['problem']}, {noise['noise']}" if is_first else "",
                statistic,
                tail_of(noise) if is_first else "",
                f"{rows[0]['bound']:.3f}",
                *(with_interval(row["slope"], row["slope_interval"], 3) for row in rows),
                with_interval(rows[0]["last_slope"], rows[0]["last_slope_interval"], 3),
                end_section=not is_first,
            )
    return table


def tail_of(noise: dict[str, Any]) -> str:
    if noise["index"] is None:
        return noise["verdict"]
    return with_interval(noise["index"], [bound or math.inf for bound in noise["index_interval"]])


def ratios_table(result: dict[str, Any]) -> Table:
    """Lays out the ratios at the largest N, for all noises except the light one."""
    samples = max(result["plan"]["tuned_sizes"])
    title = f"PS-Clip-SGD / other, each tuned, N = {samples} (below 1: ours is better)"
    table = table_with(title, ["noise", "statistic", *OTHERS], describe_tuning(result))
    for pair in pairs_of(result):
        if pair["noise"] == LIGHT.label:
            continue
        for statistic in STATISTICS:
            rows = select(result["ratios"], samples=samples, statistic=statistic, **pair)
            is_first = statistic == STATISTICS[0]
            table.add_row(
                f"{pair['problem']}, {pair['noise']}" if is_first else "",
                statistic,
                *(with_interval(row["ratio"], row["interval"]) for row in rows),
                end_section=not is_first,
            )
    return table


def describe_tuning(result: dict[str, Any]) -> str:
    plan = result["plan"]
    points = math.prod(plan["grid"])
    at_edge = {
        m: sum(bool(r["at_edge"]) for r in select(result["tunings"], method=m)) for m in METHODS
    }
    number = len(select(result["tunings"], method=OURS))
    edges = ", ".join(f"{method} {count}" for method, count in at_edge.items())
    return (
        f"Tuned for each statistic by itself, on {points} points a method and "
        f"{plan['tuning_runs']} runs a point, other ones than the {plan['runs']} compared. At an "
        f"edge of the grid, of {number} choices: {edges}."
    )


def control_table(result: dict[str, Any]) -> Table:
    """Compares with SGD under Gaussian noise, untuned at the same step and tuned."""
    columns = ["problem, N", "statistic", "setting", "PS-Clip-SGD / SGD", "PS-Clip-SGD is"]
    table = table_with("Control: Gaussian noise", columns)
    rows = select(result["theory_ratios"], noise=LIGHT.label)
    rows += select(result["ratios"], noise=LIGHT.label, other=PLAIN)
    for row in rows:
        setting = row["ours"].partition(", ")[2]
        table.add_row(
            f"{row['problem']}, {row['samples']}",
            row["statistic"],
            f"1/L, {setting}" if setting else "tuned",
            with_interval(row["ratio"], row["interval"], 4),
            row["verdict"],
        )
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the results page's table: slopes of PS-Clip-SGD, and its tuned ratios to others.

    Args:
      result: the content of convergence_rate.json.
    """
    samples = max(result["plan"]["tuned_sizes"])
    columns = ["problem, noise", "bound", "slope: mean", "99%", *(f"/ {m}" for m in OTHERS)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for pair in pairs_of(result):
        slopes = select(result["rates"], method=THEORY, **pair)
        cells = [f"{pair['problem']}, {pair['noise']}", f"{slopes[0]['bound']:.3f}"]
        cells += [with_interval(row["slope"], row["slope_interval"], 3) for row in slopes]
        for other in OTHERS:
            rows = select(result["ratios"], samples=samples, other=other, **pair)
            cells.append("; ".join(with_interval(row["ratio"], row["interval"]) for row in rows))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


LINES = {f"{OURS}, α = σ": "#0072B2", f"{OURS}, α = median": "#009E73", PLAIN: "#D55E00"}
THEORY = next(iter(LINES))
COLOURS = dict(zip(OTHERS, ("#D55E00", "#E69F00", "#666666", "#56B4E9", "#CC79A7"), strict=True))
MARKERS = dict(zip(OTHERS, "os^Dv", strict=True))


def draw(result: dict[str, Any]) -> Figure:
    problems, noises = result["plan"]["problems"], result["plan"]["noises"]
    figure = Figure(figsize=(3 * max(len(noises), 4), 12.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.25, 1], squeeze=False)[:, 0]
    grid = above.subplots(len(problems), len(noises), sharex=True, sharey="row", squeeze=False)
    for axes_of_problem, problem in zip(grid, problems, strict=True):
        for axes, noise in zip(axes_of_problem, noises, strict=True):
            draw_rates(axes, select(result["rates"], problem=problem, noise=noise))
            axes.set_title(f"{problem}\n{noise}", fontsize=10)
        axes_of_problem[0].set_ylabel("‖∇F‖ over runs")
    for axes in grid[-1]:
        axes.set_xlabel("Samples N = nT")
    handles = [Line2D([], [], color=colour, label=name) for name, colour in LINES.items()]
    handles += [
        Line2D([], [], color="k", marker="o", label="mean"),
        Line2D([], [], color="k", marker="^", linestyle="--", label="99% quantile"),
        Line2D([], [], color="k", linestyle=":", label="slope of the bound"),
    ]
    above.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    draw_ratios(below, result, noises)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def draw_rates(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        is_mean = row["statistic"] == STATISTICS[0]
        low, high = np.transpose(row["intervals"])
        estimates = np.array(row["estimates"])
        style = {"marker": "o" if is_mean else "^", "linestyle": "-" if is_mean else "--"}
        spread = np.maximum([estimates - low, high - estimates], 0)
        axes.errorbar(
            row["samples"], estimates, spread, color=LINES[row["method"]], markersize=4, **style
        )
    first = select(rows, method=THEORY, statistic=STATISTICS[0])[0]
    samples = np.array(first["samples"])
    bound = first["estimates"][0] * (samples / samples[0]) ** first["bound"]
    axes.plot(samples, bound, color="k", linestyle=":")
    axes.set(xscale="log", yscale="log")
    tidy(axes)


def draw_ratios(figure: Any, result: dict[str, Any], noises: list[str]) -> None:
    samples, problems = max(result["plan"]["tuned_sizes"]), result["plan"]["problems"]
    grid = figure.subplots(1, len(problems) * len(STATISTICS), sharey=True)
    for axes, (problem, statistic) in zip(
        grid, itertools.product(problems, STATISTICS), strict=True
    ):
        for index, other in enumerate(OTHERS):
            rows = select(
                result["ratios"],
                problem=problem,
                statistic=statistic,
                other=other,
                samples=samples,
            )
            # The methods of a noise are shifted, so that none hides another.
            heights = np.arange(len(noises)) + 0.14 * (index - (len(OTHERS) - 1) / 2)
            ratios = np.array([row["ratio"] for row in rows])
            low, high = np.transpose([row["interval"] for row in rows])
            axes.errorbar(
                ratios,
                heights,
                xerr=np.maximum([ratios - low, high - ratios], 0),
                label=f"/ {other}",
                color=COLOURS[other],
                marker=MARKERS[other],
                linestyle="none",
                markersize=5,
                capsize=2,
            )
        axes.axvline(1, color="k", linewidth=0.8)
        axes.set_title(f"{problem}: {statistic}", fontsize=10)
        axes.set_xlabel(f"PS-Clip-SGD / other, N = {samples}")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(noises)), noises)
    grid[0].set_ylim(len(noises) - 0.5, -0.5)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
