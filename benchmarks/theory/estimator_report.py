"""Reports the results of `benchmarks.theory.estimator_error`: sentences, tables and the figure."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.theory.heavy_tails import (
    CONSTANT,
    ESTIMATORS,
    GEOMETRIC_FEW,
    GROWING,
    MEAN,
    STATISTICS,
)


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
    """Writes a value with half the width of its interval, for tables with many columns."""
    if interval is None:
        return "–"
    value, low, high = interval
    return minus(f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}")


def largest_of_guarantee(result: dict[str, Any], noise: str) -> float:
    """Returns the largest RMS error over the sizes, relative to the theory's guarantee."""
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
    """Writes which claims hold and which do not, with the numbers."""
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
