"""Reports the results of `benchmarks.theory.estimator_error`: sentences, tables and the figure."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.style import show_ticks, tidy
from benchmarks.theory.heavy_tails import (
    CONSTANT,
    COORDINATE_FEW,
    ESTIMATORS,
    GEOMETRIC_FEW,
    GEOMETRIC_MANY,
    GROWING,
    MEAN,
    STATISTICS,
)

# Okabe and Ito's colours, which the colour-blind can tell apart.
STYLES = {
    GROWING: ("#0072B2", "o"),
    CONSTANT: ("#56B4E9", "s"),
    MEAN: ("#D55E00", "^"),
    GEOMETRIC_FEW: ("#009E73", "D"),
    GEOMETRIC_MANY: ("#E69F00", "v"),
    COORDINATE_FEW: ("#CC79A7", "P"),
}


def find(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    (row,) = (row for row in rows if all(row[name] == value for name, value in values.items()))
    return row


def minus(number: str) -> str:
    return number.replace("-", "−")


def show(interval: list[float] | None, digits: int = 2) -> str:
    if interval is None:
        return "–"
    value, low, high = (minus(f"{x:.{digits}f}") for x in interval)
    return f"{value} ({low} to {high})"


def show_briefly(interval: list[float] | None, digits: int = 3) -> str:
    """Writes a value with half the width of its interval, for tables of many columns."""
    if interval is None:
        return "–"
    value, low, high = interval
    return minus(f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}")


def largest_of_guarantee(result: dict[str, Any], noise: str) -> float:
    """Returns the largest RMS error over the sizes, relative to what the theory guarantees."""
    rows = [row for row in result["levels"] if row["noise"] == noise]
    shares = (
        row["level"][0] / row["guaranteed_level"] for row in rows if row["estimator"] == GROWING
    )
    return max(shares)


def shown_size(result: dict[str, Any]) -> int:
    return result["settings"]["shown_size"]


def tail_size(result: dict[str, Any]) -> int:
    return result["settings"]["tail_sizes"][-1]


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the results page's table: how the error of the growing threshold falls.

    Args:
      result: the content of estimator_error.json.
    """
    shown, tail = shown_size(result), tail_size(result)
    columns = (
        "noise",
        "slope: bound",
        "measured",
        "RMS error ÷ guarantee",
        "99% error ÷ plain mean's",
        "÷ constant threshold's",
        "÷ median of means'",
        "growth of the error",
        "of the plain mean's",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for noise in result["noises"]:
        label = noise["noise"]
        slope = find(result["slopes"], noise=label, estimator=GROWING)["rms"]
        ratios = [
            find(result["ratios"], noise=label, n=shown, growing_against=other)["q99"]
            for other in (MEAN, CONSTANT, GEOMETRIC_FEW)
        ]
        growths = [
            find(result["tails"], noise=label, n=tail, estimator=estimator)["growth"]
            for estimator in (GROWING, MEAN)
        ]
        cells = [
            label,
            minus(f"{noise['slope_of_bound']:.2f}"),
            show(slope, 3),
            f"{largest_of_guarantee(result, label):.2f}",
            *map(show, ratios),
            *(show(growth, 1) for growth in growths),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summarise(result: dict[str, Any]) -> list[str]:
    """Writes which claims hold and which do not, with the figures."""
    return [
        say_slopes(result),
        say_levels(result),
        say_bias(result),
        say_ratios(result),
        say_tails(result),
        say_fits(result),
        say_tail_of_mean(result),
        say_light_tails(result),
        say_strong_signal(result),
    ]


def labels(result: dict[str, Any], *, heavy: bool = True) -> list[str]:
    return [row["noise"] for row in result["noises"] if (row["index"] is not None) == heavy]


def say_slopes(result: dict[str, Any]) -> str:
    rows = [row for row in result["slopes"] if row["estimator"] == GROWING]
    by_verdict = {
        verdict: [row["noise"] for row in rows if row["rms_against_bound"] == verdict]
        for verdict in ("below", "contains", "above")
    }
    said = "; ".join(
        f"{verdict}: {', '.join(names) or 'none'}" for verdict, names in by_verdict.items()
    )
    exact = "; ".join(
        f"{noise['noise']}: {minus(format(noise['slope_expected'], '.3f'))}, measured "
        + show(find(rows, noise=noise["noise"])["rms"], 3)
        for noise in result["noises"]
        if noise["slope_expected"] is not None
    )
    return (
        f"Slope of the RMS error, growing threshold, its interval against the bound's. {said}. "
        f"What the exact second moments of the clipped noise give over the same sizes. {exact}."
    )


def say_levels(result: dict[str, Any]) -> str:
    shares = {row["noise"]: largest_of_guarantee(result, row["noise"]) for row in result["noises"]}
    worst = max(shares, key=lambda label: shares[label])
    verb = "stays within" if shares[worst] <= 1 else "exceeds"
    return (
        f"RMS error, growing threshold, {verb} what the theory guarantees: at most "
        f"{shares[worst]:.2f} of it ({worst}), at least {min(shares.values()):.2f}."
    )


def say_bias(result: dict[str, Any]) -> str:
    n, parts = shown_size(result), []
    for row in result["slopes"]:
        if row["estimator"] != GROWING or row["bias"] is None:
            continue
        level = find(result["levels"], noise=row["noise"], n=n, estimator=GROWING)
        share = (level["bias"][0] / level["rms"][0]) ** 2
        parts.append(f"{row['noise']}: {share:.2f}, slope {show(row['bias'], 3)}")
    return (
        f"Share of the squared bias in the mean-square error at n = {n}, and slope of the bias, "
        f"growing threshold, where every bias is told from 0. {'; '.join(parts) or 'Nowhere'}."
    )


def say_ratios(result: dict[str, Any]) -> str:
    n, parts = shown_size(result), []
    for other in ESTIMATORS[1:]:
        ratios = [
            find(result["ratios"], noise=label, n=n, growing_against=other)["q99"]
            for label in labels(result)
        ]
        smaller, larger = sum(r[2] < 1 for r in ratios), sum(r[1] > 1 for r in ratios)
        values = [r[0] for r in ratios]
        parts.append(
            f"{other}: {min(values):.2f} to {max(values):.2f} (smaller under {smaller}, larger "
            f"under {larger} of {len(ratios)})"
        )
    return (
        f"99% error under heavy tails at n = {n}, growing threshold relative to "
        + "; ".join(parts)
        + "."
    )


def say_tails(result: dict[str, Any]) -> str:
    n, parts = tail_size(result), []
    for estimator in ESTIMATORS:
        growths = [
            find(result["tails"], noise=label, n=n, estimator=estimator)["growth"][0]
            for label in labels(result)
        ]
        parts.append(f"{estimator}: {min(growths):.1f} to {max(growths):.1f}")
    row = result["tails"][0]
    return (
        f"Error's growth from δ = {row['deltas'][0]:.0e} to {row['deltas'][-1]:.0e} under heavy "
        f"tails at n = {n}, {'; '.join(parts)}."
    )


def say_fits(result: dict[str, Any]) -> str:
    parts = []
    for estimator in ESTIMATORS:
        fits = [
            row["fits_better"]
            for row in result["tails"]
            if row["estimator"] == estimator and row["noise"] in labels(result)
        ]
        counts = ", ".join(
            f"{fits.count(name)} {name}" for name in ("polynomial", "polylog", "undecided")
        )
        parts.append(f"{estimator}: {counts}")
    return f"What fits the error's quantiles better, heavy tails and sizes, {'; '.join(parts)}."


def say_tail_of_mean(result: dict[str, Any]) -> str:
    n, parts = tail_size(result), []
    for noise in result["noises"]:
        if noise["index"] is not None:
            row = find(result["tails"], noise=noise["noise"], n=n, estimator=MEAN)
            slope = show(row["polynomial"]["slope"], 3)
            parts.append(f"{noise['noise']}: {slope}, 1/a = {1 / noise['index']:.3f}")
    return f"Plain mean, s of the polynomial fit at n = {n}. {'; '.join(parts)}."


def say_light_tails(result: dict[str, Any]) -> str:
    (label,) = labels(result, heavy=False)
    rows = [
        row for row in result["ratios"] if row["noise"] == label and row["growing_against"] == MEAN
    ]
    said = ", ".join(f"{show(row['rms'], 4)} at n = {row['n']}" for row in (rows[0], rows[-1]))
    return (
        f"Gaussian noise, RMS error of the growing threshold relative to the plain mean's: {said}."
    )


def say_strong_signal(result: dict[str, Any]) -> str:
    rows = result["strong_signal"]
    said = "; ".join(f"{row['estimator']}: {show(row['q99'])}" for row in rows)
    return f"Mean far above the noise, n = {rows[0]['n']}, 99% error, {said}."


# Tables


def error_table(result: dict[str, Any]) -> Table:
    n = shown_size(result)
    table = Table(title=describe(result["machine"]), caption=result["note"], caption_justify="left")
    for name in ("noise:\nslope of the bound", "estimator"):
        table.add_column(name, no_wrap=True)
    slopes = ("slope of\nRMS error", "against\nbound", "slope of\n99% error")
    for name in (*slopes, f"level,\nn = {n}", "growing ÷ this:\nRMS error", "\n99% error"):
        table.add_column(name, justify="right", no_wrap=True)
    bounds = {row["noise"]: row["slope_of_bound"] for row in result["noises"]}
    for row in result["slopes"]:
        noise, estimator = row["noise"], row["estimator"]
        level = find(result["levels"], noise=noise, n=n, estimator=estimator)["level"]
        ratio = {"rms": None, "q99": None}
        if estimator != GROWING:
            ratio = find(result["ratios"], noise=noise, n=n, growing_against=estimator)
        table.add_row(
            f"{noise}: {minus(f'{bounds[noise]:.3f}')}" if estimator == GROWING else "",
            estimator,
            show_briefly(row["rms"]),
            row["rms_against_bound"] or "–",
            *map(show_briefly, (row["q99"], level, ratio["rms"], ratio["q99"])),
            end_section=estimator == ESTIMATORS[-1],
        )
    return table


def tail_table(result: dict[str, Any]) -> Table:
    table = Table(caption=result["note_of_tails"], caption_justify="left")
    for name in ("noise", "estimator"):
        table.add_column(name, no_wrap=True)
    for name in ("polynomial: s", "residual", "polylog: s", "residual", "ΔAIC", "fits better"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("growth", justify="right", no_wrap=True)
    for row in result["tails"]:
        fits = [row["polynomial"], row["polylog"]]
        cells = [(show_briefly(f["slope"]), f"{f['residual_deviation']:.3f}") for f in fits]
        table.add_row(
            f"{row['noise']}, n = {row['n']}" if row["estimator"] == GROWING else "",
            row["estimator"],
            *(cell for pair in cells for cell in pair),
            show_briefly(row["delta_aic"], 0),
            row["fits_better"],
            show_briefly(row["growth"], 2),
            end_section=row["estimator"] == ESTIMATORS[-1],
        )
    return table


def strong_table(result: dict[str, Any]) -> Table:
    table = Table(caption=result["note_of_strong_signal"], caption_justify="left")
    table.add_column("estimator", no_wrap=True)
    for name in ("RMS error", "median", "99%", "bias along μ"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["strong_signal"]:
        table.add_row(row["estimator"], *(show(row[s], 3) for s in (*STATISTICS, "bias")))
    return table


# Figure


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
