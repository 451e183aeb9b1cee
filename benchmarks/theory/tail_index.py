"""How often does the interval of a tail index contain the truth, and how wide is it?

    python -m benchmarks.theory.tail_index

Prints tables and writes them to benchmarks/results as tail_index.json and .png: coverage and width
of the intervals of `psc.tails` on samples from known distributions, and how often a tail is called
light.
"""

from __future__ import annotations

import functools
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.zoo.laws import LAWS, POWER_LAWS, Law
from psclip_optax import tails

NOTE = (
    "Intervals of 95%: of the index, and of σ(p) at the p that was chosen. Covers: the share of "
    "trials whose interval holds the truth, in percent (95% interval by Wilson). Width: median, "
    "relative to the truth. Textbook: Hill's interval on the top tenth, without a choice of k. A "
    "tail is called light or heavy where either is three times as likely as the other; where it is "
    "called light, the interval reaches to ∞. Unbounded: the share of intervals of σ that reach to "
    "∞, of those with a finite truth. Clipped: how many of 512 samples the suggested threshold "
    "clips, median."
)
COLOURS = ("#56B4E9", "#0072B2", "#000000", "#666666")
MARKERS = "os^D"
NOMINAL, ACCEPTED = 0.95, 0.9
BATCH = np.arange(1, 513)
QUANTILE = statistics.NormalDist().inv_cdf((1 + NOMINAL) / 2)


class Trial(NamedTuple):
    """The estimates from one sample."""

    covers: bool
    width: float
    k: int
    textbook_covers: bool
    verdict: str
    scale_covers: bool
    scale_width: float
    clipped: float


def one_trial(law: Law, norms: np.ndarray) -> Trial:
    suggestion = tails.suggest_threshold(norms, confidence=NOMINAL)
    tail, scale = suggestion.tail, suggestion.scale
    textbook = tails.hill_estimator(norms, len(norms) // 10, confidence=NOMINAL)
    sigma = true_scale(law, scale.p)
    return Trial(
        covers=tail.lower <= law.index <= tail.upper,
        width=(tail.upper - tail.lower) / law.index,
        k=tail.k,
        textbook_covers=textbook.lower <= law.index <= textbook.upper,
        verdict=tail.verdict,
        scale_covers=scale.lower <= sigma <= scale.upper,
        scale_width=(scale.upper - scale.lower) / sigma if sigma < math.inf else math.nan,
        clipped=clipped_of_a_batch(suggestion, norms),
    )


def clipped_of_a_batch(suggestion: tails.SuggestedThreshold, norms: np.ndarray) -> float:
    """Counts the samples that the suggestion clips in a batch of 512 norms, on average."""
    taus = suggestion.alpha * BATCH ** (1 / suggestion.beta)
    below = np.searchsorted(np.sort(norms), taus, side="right")
    return float(np.sum(1 - below / len(norms)))


def true_scale(law: Law, p: float) -> float:
    if law.moment is None:
        return math.nan
    return law.moment(p) ** (1 / p) if p < law.index else math.inf


def wilson(count: int, trials: int) -> list[float]:
    """Computes a share and its interval, in the order low, share, high."""
    share, squared = count / trials, QUANTILE**2
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    variance = share * (1 - share) / trials + squared / (4 * trials**2)
    half = QUANTILE * math.sqrt(variance) / (1 + squared / trials)
    # For a share of 0 or 1, rounding may put an end of the interval beyond it.
    return [min(centre - half, share), share, max(centre + half, share)]


def measure(name: str, num_norms: int, trials: int) -> dict[str, Any]:
    law = LAWS[name]
    # The samples do not depend on which other laws and sizes are measured.
    rng = np.random.default_rng([list(LAWS).index(name), num_norms])
    results = [one_trial(law, law.sample(rng, num_norms)) for _ in range(trials)]
    is_heavy = law.index < math.inf
    row: dict[str, Any] = {
        "law": name,
        "index": finite(law.index),
        "norms": num_norms,
        "trials": trials,
        "median_k": statistics.median(trial.k for trial in results),
        "clipped_of_512": statistics.median(trial.clipped for trial in results),
        "shares": {
            verdict: wilson(sum(trial.verdict == verdict for trial in results), trials)
            for verdict in ("light", "undecided", "heavy")
        },
    }
    if is_heavy:
        row["coverage"] = wilson(sum(trial.covers for trial in results), trials)
        row["width"] = finite(statistics.median(trial.width for trial in results))
        row["textbook_coverage"] = wilson(sum(trial.textbook_covers for trial in results), trials)
    if law.moment is not None:
        widths = [trial.scale_width for trial in results if not math.isnan(trial.scale_width)]
        unbounded = sum(math.isinf(width) for width in widths)
        row["scale_coverage"] = wilson(sum(trial.scale_covers for trial in results), trials)
        row["scale_width"] = finite(statistics.median(widths)) if widths else None
        row["scale_unbounded"] = unbounded / len(widths) if widths else None
    return row


def finite(value: float) -> float | None:
    """Replaces ∞, which JSON does not have."""
    return value if math.isfinite(value) else None


def to_tables(result: dict[str, Any]) -> list[Table]:
    return [coverage_table(result), verdict_table(result)]


def coverage_table(result: dict[str, Any]) -> Table:
    columns = ("n", "k", "covers", "width", "textbook covers", "σ covers", "σ width", "unbounded")
    table = make_table(f"Power laws. {describe(result['machine'])}", columns)
    for row, is_first, is_last in grouped(result["rows"], POWER_LAWS):
        table.add_row(
            row["law"] if is_first else "",
            f"{row['norms']:,}",
            f"{row['median_k']:.0f}",
            percent(row["coverage"]),
            number(row["width"]),
            percent(row["textbook_coverage"]),
            percent(row.get("scale_coverage")),
            scale_width(row),
            share(row.get("scale_unbounded")),
            end_section=is_last,
        )
    return table


def verdict_table(result: dict[str, Any]) -> Table:
    columns = ("n", "light", "undecided", "heavy", "σ covers", "σ width", "clipped")
    table = make_table("What a tail is called", columns, NOTE)
    for row, is_first, is_last in grouped(result["rows"], LAWS):
        table.add_row(
            row["law"] if is_first else "",
            f"{row['norms']:,}",
            *(percent(row["shares"][verdict]) for verdict in ("light", "undecided", "heavy")),
            percent(row.get("scale_coverage")) if row["index"] is None else "",
            scale_width(row) if row["index"] is None else "",
            number(row["clipped_of_512"]),
            end_section=is_last,
        )
    return table


def make_table(title: str, columns: tuple[str, ...], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("law", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def grouped(rows: list[dict[str, Any]], laws: dict[str, Law]) -> list[tuple[Any, bool, bool]]:
    """Marks the first and the last row of each law."""
    own = [row for row in rows if row["law"] in laws]
    names = [None, *(row["law"] for row in own), None]
    return [
        (row, before != row["law"], after != row["law"])
        for row, before, after in zip(own, names, names[2:], strict=False)
    ]


def percent(values: list[float] | None) -> str:
    if values is None:
        return "–"
    low, middle, high = (100 * value for value in values)
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def scale_width(row: dict[str, Any]) -> str:
    return number(row["scale_width"]) if "scale_width" in row else "–"


def number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def draw(result: dict[str, Any]) -> Figure:
    sizes = sorted({row["norms"] for row in result["rows"]})
    figure = Figure(figsize=(15, 8), layout="constrained")
    grid = figure.add_gridspec(1, 3)
    coverage = figure.add_subplot(grid[0])
    width = figure.add_subplot(grid[1], sharey=coverage)
    light = figure.add_subplot(grid[2])
    for order, size in enumerate(sizes):
        rows = [row for row in result["rows"] if row["norms"] == size]
        style = {"color": COLOURS[order], "marker": MARKERS[order], "markersize": 6}
        plot = functools.partial(draw_series, rows, style, 0.22 * (order - (len(sizes) - 1) / 2))
        plot(coverage, list(POWER_LAWS), lambda row: row["coverage"], f"n = {size:,}")
        plot(width, list(POWER_LAWS), lambda row: [row["width"] or math.nan] * 3)
        plot(light, list(LAWS), lambda row: row["shares"]["light"])
    coverage.axvline(NOMINAL, color="#666666", linewidth=1)
    coverage.axvline(ACCEPTED, color="#D55E00", linewidth=1, linestyle="--")
    light.axhline(len(POWER_LAWS) - 0.5, color="#666666", linewidth=1)
    coverage.set_xlabel("Share of intervals that hold the index\n(95% nominal; dashed: 90%)")
    width.set_xlabel("Median width of the interval,\nrelative to the index")
    light.set_xlabel("Share of samples called light\n(above the line: power laws)")
    width.set_xlim(0, None)
    width.tick_params(labelleft=False)
    for axes, laws in ((coverage, POWER_LAWS), (light, LAWS)):
        axes.set_yticks(range(len(laws)), list(laws))
        axes.set_ylim(len(laws) - 0.5, -0.5)
    for axes in (coverage, width, light):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = coverage.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(sizes), frameon=False)
    figure.suptitle(f"{result['trials']} trials each; {describe(result['machine'])}", fontsize=10)
    return figure


def draw_series(
    rows: list[dict[str, Any]],
    style: dict[str, Any],
    offset: float,
    axes: Axes,
    laws: list[str],
    quantity: Callable[[dict[str, Any]], list[float]],
    label: str | None = None,
) -> None:
    own = [row for row in rows if row["law"] in laws]
    low, middle, high = zip(*map(quantity, own), strict=True)
    spread = [
        [m - x for m, x in zip(middle, low, strict=True)],
        [x - m for m, x in zip(middle, high, strict=True)],
    ]
    heights = [laws.index(row["law"]) + offset for row in own]
    axes.errorbar(middle, heights, xerr=spread, label=label, linestyle="none", capsize=2, **style)


def main(
    out: pathlib.Path = RESULTS,
    sizes: tuple[int, ...] = (2_000, 10_000, 50_000),
    trials: int = 500,
    quick: bool = False,
) -> None:
    """Measures how often the interval of a tail index contains the truth, and its width.

    Args:
      out: folder for tail_index.json and tail_index.png.
      sizes: numbers of norms in a sample, at most four.
      trials: samples of each law and size.
      quick: few samples of the smallest size, to check that the benchmark works.
    """
    sizes, trials = (sizes[:1], 5) if quick else (sizes, trials)
    rows = [measure(name, size, trials) for name in LAWS for size in sizes]
    result = {"machine": describe_machine(), "trials": trials, "note": NOTE, "rows": rows}
    publish(out, "tail_index", result, to_tables(result), draw(result), width=150)


if __name__ == "__main__":
    tyro.cli(main)
