"""Reports the results of `benchmarks.theory.automatic_theory`: tables and the figure."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.publishing import markdown_table
from benchmarks.common.style import tidy
from benchmarks.theory.convergence_report import select, with_interval
from benchmarks.theory.descent import AUTOMATIC, STATISTICS
from benchmarks.theory.estimator_report import show

GROWING, FIRST_BATCH, WARM = "growing", "automatic, first batch", "automatic"
COLOURS = {WARM: "#0072B2", FIRST_BATCH: "#56B4E9", "constant": "#009E73", "plain mean": "#D55E00"}
MARKERS: dict[str, dict[str, Any]] = {
    WARM: {"marker": "o", "markersize": 4},
    # Drawn around the other marker, from which it hardly differs.
    FIRST_BATCH: {"marker": "s", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"},
    "constant": {"marker": "D", "markersize": 4},
    "plain mean": {"marker": "^", "markersize": 4},
}
VERDICTS = ("better", "equal", "worse")
# Maps a row's fields to their titles in a table.
SHOWN = {
    "rms_ratio": "RMS error",
    "q99_ratio": "99% error",
    "rescaled_rms_ratio": "RMS, rescaled",
    "rescaled_q99_ratio": "99%, rescaled",
}


def shown_errors(result: dict[str, Any], *sizes: int) -> list[list[str]]:
    """Lays out the automatic threshold's errors, relative to those of the growing one."""
    rows = [
        row
        for row in result["errors"]
        if row["estimator"] in (WARM, FIRST_BATCH) and row["n"] in sizes
    ]
    return [
        [row["noise"], str(row["n"]), row["estimator"], *(show(row[name]) for name in SHOWN)]
        for row in rows
    ]


def shown_ratios(result: dict[str, Any]) -> list[list[str]]:
    """Lays out ‖∇F‖ of the automatic threshold, relative to that of the other methods."""
    found = []
    keys = ("problem", "noise", "samples")
    for pair in dict.fromkeys(tuple(row[key] for key in keys) for row in result["ratios"]):
        rows = select(result["ratios"], **dict(zip(keys, pair, strict=True)))
        by_other = [select(rows, other=other) for other in others(result)]
        cells = [
            "; ".join(with_interval(row["ratio"], row["interval"]) for row in own)
            for own in by_other
        ]
        found.append([", ".join(pair[:2]), *cells])
    return found


def others(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["other"] for row in result["ratios"]))


ERROR_COLUMNS = ["noise", "n", "estimator", *SHOWN.values()]


def ratio_columns(result: dict[str, Any]) -> list[str]:
    return ["problem, noise", *(f"/ {other}" for other in others(result))]


def errors_to_markdown(result: dict[str, Any], *sizes: int) -> str:
    return markdown_table([ERROR_COLUMNS, *shown_errors(result, *sizes)])


def ratios_to_markdown(result: dict[str, Any]) -> str:
    return markdown_table([ratio_columns(result), *shown_ratios(result)])


def table_of(title: str, caption: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


def error_table(result: dict[str, Any]) -> Table:
    rows = shown_errors(result, *result["plan"]["sizes"])
    return table_of(describe(result["machine"]), result["note"], ERROR_COLUMNS, rows)


def ratio_table(result: dict[str, Any]) -> Table:
    title = "‖∇F‖ of descent, automatic / other, each tuned: mean; 99% quantile over runs"
    return table_of(title, edges(result), ratio_columns(result), shown_ratios(result))


def sentences(result: dict[str, Any]) -> list[str]:
    """Writes the results in sentences, whichever method is better."""
    sizes = result["plan"]["sizes"]
    return [
        *(say_errors(result, n) for n in (sizes[0], sizes[-1])),
        say_first_batch(result),
        say_turned(result),
        *(say_descent(result, kind) for kind in kinds(result)),
        edges(result).removesuffix("."),
    ]


def kinds(result: dict[str, Any]) -> list[str]:
    """Lists the kinds of noise, with which the names of noises end."""
    return list(dict.fromkeys(row["noise"].rpartition(", ")[2] for row in result["ratios"]))


def say_errors(result: dict[str, Any], n: int) -> str:
    rows, parts = select(result["errors"], estimator=WARM, n=n), []
    for name, told in SHOWN.items():
        ratios = [row[name] for row in rows]
        smaller, larger = sum(r[2] < 1 for r in ratios), sum(r[1] > 1 for r in ratios)
        values = [r[0] for r in ratios]
        parts.append(
            f"{told} {min(values):.2f} to {max(values):.2f} of the oracle's (smaller under "
            f"{smaller}, larger under {larger} of {len(rows)} laws)"
        )
    return f"n = {n:,}, after {result['plan']['warm_up']} batches: {'; '.join(parts)}"


def say_first_batch(result: dict[str, Any]) -> str:
    ratios = []
    for row in select(result["errors"], estimator=FIRST_BATCH):
        (warm,) = select(result["errors"], estimator=WARM, noise=row["noise"], n=row["n"])
        ratios.append(row["q99"][0] / warm["q99"][0])
    return (
        f"A first batch, clipped by its own norms, has {min(ratios):.2f} to {max(ratios):.2f} of "
        "the 99% error of later ones, over all laws and n"
    )


def say_turned(result: dict[str, Any]) -> str:
    """Names the laws whose bias turns an estimate against the mean, so that no rate helps."""
    parts = []
    for estimator in (WARM, GROWING):
        rows = [row for row in select(result["errors"], estimator=estimator) if row["factor"] == 0]
        sizes = {row["noise"]: [] for row in rows}
        for row in rows:
            sizes[row["noise"]].append(f"{row['n']:,}")
        told = "; ".join(f"{noise}, n = {' '.join(own)}" for noise, own in sizes.items())
        parts.append(f"by {estimator} under {told or 'none'}")
    return f"The clipped mean points against μ, and the best factor is 0, {' – and '.join(parts)}"


def say_descent(result: dict[str, Any], kind: str) -> str:
    """Writes the range of the ratios under one kind of noise, and who is better by intervals."""
    parts = []
    for other, statistic in itertools.product(others(result), STATISTICS):
        rows = select(result["ratios"], other=other, statistic=statistic)
        rows = [row for row in rows if kind in row["noise"]]
        verdicts, ratios = [row["verdict"] for row in rows], [row["ratio"] for row in rows]
        counts = [f"{word} {verdicts.count(word)}" for word in VERDICTS if word in verdicts]
        told = f"{min(ratios):.2f} to {max(ratios):.2f} ({', '.join(counts)})"
        parts.append(f"{statistic} / {other} {told}")
    return f"‖∇F‖ under {kind} noise: {'; '.join(parts)}"


def edges(result: dict[str, Any]) -> str:
    at_edge = {}
    for row in result["tunings"]:
        at_edge[row["method"]] = at_edge.get(row["method"], 0) + bool(row["at_edge"])
    number = len(select(result["tunings"], method=AUTOMATIC))
    counts = ", ".join(f"{method} {count}" for method, count in at_edge.items())
    return f"At an edge of the grid, of {number} choices: {counts}."


def draw(result: dict[str, Any]) -> Figure:
    """Draws the ratios of errors over n, a column for each law, and below those of ‖∇F‖."""
    laws = result["plan"]["laws"]
    figure = Figure(figsize=(2.6 * max(len(laws), 4), 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.4, 1], squeeze=False)[:, 0]
    grid = above.subplots(2, len(laws), sharex=True, sharey="row", squeeze=False)
    for own, name in zip(grid, ("q99_ratio", "rescaled_q99_ratio"), strict=True):
        own[0].set_ylabel(f"{SHOWN[name]},\nratio to growing, α = σ, β = p")
        for axes, law in zip(own, laws, strict=True):
            draw_errors(axes, select(result["errors"], noise=law), name)
    for axes, law in zip(grid[0], laws, strict=True):
        axes.set_title(law, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("Samples n")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    draw_ratios(below, result)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def draw_errors(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    for estimator, colour in COLOURS.items():
        own = [row for row in select(rows, estimator=estimator) if row[name] is not None]
        if not own:
            continue
        value, low, high = np.transpose([row[name] for row in own])
        axes.errorbar(
            [row["n"] for row in own],
            value,
            np.maximum([value - low, high - value], 0),
            color=colour,
            label=estimator,
            linewidth=1,
            **MARKERS[estimator],
        )
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    tidy(axes)


def draw_ratios(figure: Any, result: dict[str, Any]) -> None:
    problems, noises = result["plan"]["descent"]["problems"], result["plan"]["descent"]["noises"]
    grid = figure.subplots(1, len(problems) * len(STATISTICS), sharey=True, squeeze=False)[0]
    panels = list(itertools.product(problems, STATISTICS))
    for axes, (problem, statistic) in zip(grid, panels, strict=True):
        for index, (other, colour) in enumerate(
            zip(others(result), COLOURS.values(), strict=False)
        ):
            rows = select(result["ratios"], problem=problem, statistic=statistic, other=other)
            ratios = np.array([row["ratio"] for row in rows])
            low, high = np.transpose([row["interval"] for row in rows])
            axes.errorbar(
                ratios,
                np.arange(len(noises)) + 0.16 * (index - 1),
                xerr=np.maximum([ratios - low, high - ratios], 0),
                label=f"automatic / {other}",
                color=colour,
                marker="osD"[index],
                linestyle="none",
                markersize=5,
                capsize=2,
            )
        axes.axvline(1, color="k", linewidth=0.8)
        axes.set_title(f"{problem}: {statistic} of ‖∇F‖", fontsize=10)
        axes.set_xlabel("Ratio, each method tuned")
        tidy(axes)
    grid[0].set_yticks(range(len(noises)), noises)
    grid[0].set_ylim(len(noises) - 0.5, -0.5)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
