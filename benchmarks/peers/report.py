"""Reports the rows of peers.json: tables, the figure, and errors."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.style import show_ticks
from benchmarks.peers.common import PEERS
from benchmarks.peers.reference import DTYPES, FLOAT64_LIMIT, SAMPLES_IN_FLOAT64, limit

NOTE = (
    "Time: ratio to the plain step's (loss and gradient of the mean loss) of the library's own "
    "framework in the same process and round, median (quartiles). JAX is compiled, PyTorch eager, "
    "as the libraries for it need. A step ends with the clipped sum or mean: no noise, no update. "
    "Peak: how far a step raises the process's resident memory, results included, relative to the "
    "plain step. Temp: XLA's temporary memory, likewise. One by one: jax_privacy's "
    "microbatch_size=1, the fastest tried; of a whole batch XLA's CPU backend fuses the "
    "scaling and the sum over samples so badly that time grows about with the square of the "
    "parameters. The GPT's output matrix is not tied to its embedding, since ghost clipping in "
    "Opacus refuses tied weights. Book-keeping for PyTorch: pip finds no distribution of fastDP, "
    "fast-differential-privacy, private-transformers or private-vision on PyPI (`No matching "
    "distribution found`), so fastDP is measured only where it was installed from its authors' "
    "sources; the noise that it draws even at scale 0 is left out."
)
ERRORS_NOTE = (
    "Against psclip_optax on the same weights and batch, half of the samples clipped: the clipped "
    "mean gradient's error relative to the largest entry of each leaf, largest over the leaves (a "
    "leaf that vanishes but for rounding against 1 % of the largest of all leaves); the loss's "
    f"relative error. float64: {SAMPLES_IN_FLOAT64} samples. Opacus and fastDP clip by "
    "min(1, C / (norm + 1e-6)); the reference for them has the same 1e-6. Let through are "
    f"{PEERS['ours'].float32_limit:.0e} in float32 and {FLOAT64_LIMIT:.0e} in float64; from "
    f"Opacus's hooks {PEERS['opacus_hooks'].float32_limit:.0e} in float32, since PyTorch's float32 "
    "norm of a whole layer's entries is off by that much on CPU."
)
MODELS = {"alexnet": "AlexNet-CIFAR", "gpt": "GPT"}
FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Lists the reasons for the command to fail: peers that broke or disagree."""
    found = []
    for row in rows:
        peer = PEERS[row["peer"]]
        of = f"{label(row)}, {peer.label}"
        if "failed" in row:
            found.append(f"{of} {row['failed']}")
        for dtype, errors in row["errors"].items():
            for what, error in errors.items():
                largest = limit(peer, dtype, what)
                if not error <= largest:  # so that NaN is found too
                    is_more = f"{error:.1e}, more than {largest:.0e}"
                    found.append(f"{of}: the error of the {what} in {dtype} is {is_more}")
    return found


# Tables


def label(row: dict[str, Any]) -> str:
    return f"{MODELS[row['model']]}, n = {row['samples']}"


def to_table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    caption = "\n".join([NOTE, *reasons(rows)])
    table = Table(title=title(machine), caption=caption, caption_justify="left")
    for name in ("model", "library", "of"):
        table.add_column(name, no_wrap=True)
    for name in ("plain, ms", "ms", "time/plain", "peak/plain", "temp/plain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, is_first, is_last in with_ends(rows):
        peer = PEERS[row["peer"]]
        names = [label(row) if is_first else "", peer.label, FRAMEWORKS[peer.framework]]
        table.add_row(*names, *cells(row), end_section=is_last)
    return table


def title(machine: dict[str, Any]) -> str:
    others = {"PyTorch": "torch", "Opacus": "opacus", "jax_privacy": "jax-privacy"}
    named = [f"{name} {machine[package]}" for name, package in others.items()]
    return "; ".join([describe(machine), *named])


def reasons(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"– {label(row)}, {PEERS[row['peer']].label}: {row.get('failed', row['skipped'])}"
        for row in rows
        if "skipped" in row
    ]


def with_ends(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], bool, bool]]:
    """Marks the first and the last row of each model."""
    models = [None, *(row["model"] for row in rows), None]
    neighbours = zip(models[:-2], models[2:], strict=True)
    return [
        (row, row["model"] != before, row["model"] != after)
        for row, (before, after) in zip(rows, neighbours, strict=True)
    ]


def cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return ["–"] * 5
    low, middle, high = row["ratio_quartiles"]
    return [
        f"{1e3 * row['plain_seconds_quartiles'][1]:.0f}",
        f"{1e3 * row['seconds_quartiles'][1]:.0f}",
        f"{middle:.2f} ({low:.2f}–{high:.2f})",
        f"{row['peak_bytes_ratio']:.2f}" if "peak_bytes" in row else "",
        f"{row['temp_bytes_ratio']:.2f}" if "temp_bytes" in row else "",
    ]


def to_errors(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Agreement", caption=ERRORS_NOTE, caption_justify="left")
    for name in ("model", "library"):
        table.add_column(name, no_wrap=True)
    columns = [(dtype, what) for dtype in DTYPES for what in ("loss", "gradients")]
    for dtype, what in columns:
        table.add_column(f"{what}, {dtype}", justify="right", no_wrap=True)
    for row, is_first, is_last in with_ends(rows):
        peer = PEERS[row["peer"]]
        errors = [
            shown_error(row["errors"].get(dtype, {}).get(what), limit(peer, dtype, what))
            for dtype, what in columns
        ]
        names = [label(row) if is_first else "", peer.label]
        table.add_row(*names, *errors, end_section=is_last)
    return table


def shown_error(error: float | None, largest: float) -> str:
    if error is None:
        return "not reached"
    return f"{error:.0e}" if error <= largest else f"[bold red]{error:.0e}[/]"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Writes a Markdown table: each library's time and peak memory, relative to its plain step.

    Args:
      rows: the rows of peers.json.
    """
    models = list(dict.fromkeys(map(label, rows)))
    columns = ["library", *(f"{model}: time | memory" for model in models)]
    lines = [f"| {' | '.join(columns)} |", "|---" * (1 + 2 * len(models)) + "|"]
    for key, peer in PEERS.items():
        of_peer = {label(row): row for row in rows if row["peer"] == key}
        if of_peer:
            cells = [markdown_cells(of_peer.get(model)) for model in models]
            name = f"{peer.label} ({FRAMEWORKS[peer.framework]})"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_cells(row: dict[str, Any] | None) -> str:
    if row is None or "skipped" in row:
        slow = row is not None and "first_ratio" in row
        return f"about {row['first_ratio']:.0f} | –" if slow else "– | –"  # pyright: ignore
    low, middle, high = row["ratio_quartiles"]
    memory = f"{row['peak_bytes_ratio']:.2f}" if "peak_bytes" in row else "–"
    return f"{middle:.2f} ({low:.2f}–{high:.2f}) | {memory}"


# Figure


def draw(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    labels = list(dict.fromkeys(map(label, rows)))
    keys = [key for key in PEERS if any(row["peer"] == key for row in rows)]
    figure = Figure(figsize=(11, 1.8 + 0.42 * len(keys)), layout="constrained")
    plots = figure.subplots(1, max(1, len(labels)), sharey=True, squeeze=False)[0]
    for axes, name in zip(plots, labels, strict=False):
        draw_bars(axes, {row["peer"]: row for row in rows if label(row) == name}, keys)
        axes.set_title(name, fontsize=10)
    plots[0].set_yticks(range(len(keys)), [PEERS[key].label for key in keys])
    plots[0].set_ylim(max(1, len(keys)) - 0.5, -0.5)
    below = "Time, relative to the framework's plain step (median, quartiles)"
    figure.supxlabel(below, fontsize=10)
    figure.suptitle(title(machine), fontsize=9, x=0.01, ha="left")
    return figure


def draw_bars(axes: Axes, of_peer: dict[str, dict[str, Any]], keys: list[str]) -> None:
    axes.set_xscale("log")
    place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    for height, key in enumerate(keys):
        peer, row = PEERS[key], of_peer.get(key, {"skipped": "not measured"})
        if "skipped" in row:
            axes.annotate(shown_reason(row), (1, height), fontsize=8, **place)
            continue
        low, middle, high = row["ratio_quartiles"]
        style: dict[str, Any] = {"color": peer.colour, "hatch": peer.hatch, "edgecolor": "white"}
        # Bars start at 1: to the left is cheaper than a plain step, to the right more expensive.
        axes.barh(height, middle - 1, 0.7, left=1, linewidth=0, **style)
        spread = [[middle - low], [high - middle]]
        axes.errorbar(middle, height, xerr=spread, fmt="none", ecolor="black", capsize=3)
        axes.annotate(f"{middle:.2f}", (max(high, 1), height), fontsize=8, **place)
    axes.axvline(1, color="black", linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(1.8 * high, 3))
    show_ticks(axes.xaxis, axes.get_xlim())
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def shown_reason(row: dict[str, Any]) -> str:
    if "first_ratio" in row:
        return f"– about {row['first_ratio']:.0f}: too slow for the time limit"
    return "– " + row.get("failed", row["skipped"])[:60]
