"""How often does `per_sample_clip` read the stacked gradients?

    python -m benchmarks.engine.stacked_traffic

Prints a table and writes it to benchmarks/results as stacked_traffic.json and .png. The minimum is
two reads, one for the norms and one for the sum; the mean alone needs one.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from matplotlib.figure import Figure
from rich.table import Table

import psclip_optax as psc
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.timing import Case, quartiles, time_interleaved

NOTE = (
    "Bytes and temporary memory are XLA's figures for the compiled program. Of a branch XLA counts "
    "the dearer side, which drop takes only when a squared norm is out of range, and of a loop one "
    "pass: that side loops over up to 8 slices of the stack, and only where the number of samples "
    "is prime, so that there is one slice, is its count whole. Times are ratios to the mean's in "
    "the same round of an interleaved run: median (quartiles)."
)
CASES = {"mean": "#666666", "propagate": "#0072B2", "drop": "#009E73", "drop, one NaN": "#D55E00"}
MARKERS = dict(zip(CASES, "|os^", strict=True))


def mean(stack: jax.Array) -> jax.Array:
    # A dot product, because XLA's CPU backend is slow at sums over the first axis.
    weights = jnp.full(len(stack), 1 / len(stack), jnp.float32)
    dimensions = (((0,), (0,)), ((), ()))
    total = lax.dot_general(weights, stack.astype(jnp.float32), dimensions, lax.Precision.HIGHEST)
    return total.astype(stack.dtype)


def clip(on_nonfinite: Any, stack: jax.Array) -> tuple[Callable[..., Any], Any]:
    threshold = psc.constant_threshold(stack.shape[1] ** 0.5)  # about the norm of a sample
    transformation = psc.per_sample_clip(threshold, on_nonfinite=on_nonfinite)
    return transformation.update, transformation.init(stack[0])


def make_cases(n: int, size: int, dtype: str) -> dict[str, Case]:
    stack = jax.random.normal(jax.random.key(0), (n, size), dtype)
    propagate, state = clip("propagate", stack)
    drop, _ = clip("drop", stack)
    dropping = jax.jit(drop).lower(stack, state).compile()
    return {
        "mean": Case(jax.jit(mean).lower(stack).compile(), (stack,)),
        "propagate": Case(jax.jit(propagate).lower(stack, state).compile(), (stack, state)),
        "drop": Case(dropping, (stack, state)),
        "drop, one NaN": Case(dropping, (stack.at[n // 2, size // 2].set(jnp.nan), state)),
    }


def measure(n: int, size: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    cases = make_cases(n, size, dtype)
    stack_bytes = n * size * jnp.dtype(dtype).itemsize
    seconds = time_interleaved(cases, repeats)
    rows = []
    for name, case in cases.items():
        ratios = [t / base for t, base in zip(seconds[name], seconds["mean"], strict=True)]
        rows.append(
            {
                "samples": n,
                "parameters": size,
                "dtype": dtype,
                "case": name,
                "bytes_per_stack": case.program.cost_analysis()["bytes accessed"] / stack_bytes,
                "temporary_per_stack": (
                    case.program.memory_analysis().temp_size_in_bytes / stack_bytes
                ),
                "seconds_quartiles": quartiles(seconds[name]),
                "ratio_quartiles": quartiles(ratios),
            }
        )
    return rows


def stack_label(row: dict[str, Any]) -> str:
    return f"{row['samples']} × {row['parameters']:,} {row['dtype']}"


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    table.add_column("stack", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for name in ("bytes/stack", "temp/stack", "ms", "time/mean's"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        low, middle, high = row["ratio_quartiles"]
        table.add_row(
            stack_label(row) if row["case"] == "mean" else "",
            row["case"],
            f"{row['bytes_per_stack']:.2f}",
            f"{row['temporary_per_stack']:.2f}",
            f"{1e3 * row['seconds_quartiles'][1]:.1f}",
            f"{middle:.2f} ({low:.2f}–{high:.2f})",
            end_section=row["case"] == "drop, one NaN",
        )
    return table


def draw(result: dict[str, Any]) -> Figure:
    labels = list(dict.fromkeys(map(stack_label, result["rows"])))
    figure = Figure(figsize=(11, 1.8 + 0.55 * len(labels)), layout="constrained")
    traffic, times = figure.subplots(1, 2, sharey=True)
    for name, colour in CASES.items():
        rows = [row for row in result["rows"] if row["case"] == name]
        # Cases of the same stack are shifted, so that none hides another.
        offset = 0.18 * (list(CASES).index(name) - 1.5)
        heights = [labels.index(stack_label(row)) + offset for row in rows]
        style = {"color": colour, "marker": MARKERS[name], "linestyle": "none", "markersize": 8}
        if name != "drop, one NaN":  # the same program as without NaN
            traffic.plot([row["bytes_per_stack"] for row in rows], heights, **style)
        low, middle, high = zip(*(row["ratio_quartiles"] for row in rows), strict=True)
        spread = [
            [m - x for m, x in zip(middle, low, strict=True)],
            [x - m for m, x in zip(middle, high, strict=True)],
        ]
        times.errorbar(middle, heights, xerr=spread, label=name, capsize=3, **style)
    traffic.set_yticks(range(len(labels)), labels)
    traffic.set_ylim(len(labels) - 0.5, -0.5)
    traffic.set_xlim(0, None)
    traffic.set_xlabel("Bytes accessed, in stacks (XLA's count)")
    times.set_xscale("log")
    times.set_xlabel("Time, relative to the plain mean (median, quartiles)")
    for axes in (traffic, times):
        axes.grid(axis="x", which="both", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = times.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(CASES), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def main(
    out: pathlib.Path = RESULTS,
    repeats: int = 15,
    quick: bool = False,
) -> None:
    """Counts how often per_sample_clip reads the stacked gradients.

    Args:
      out: folder for stacked_traffic.json and stacked_traffic.png.
      repeats: timed rounds, at least 2.
      quick: one small stack a dtype, to check that the benchmark works.
    """
    stacks = [(64, 16_384)] if quick else [(128, 1_000_000), (127, 1_000_000), (1024, 100_000)]
    rows = [
        row
        for dtype in ("float32", "bfloat16")
        for n, size in stacks
        for row in measure(n, size, dtype, repeats)
    ]
    result = {"machine": describe_machine(), "repeats": repeats, "note": NOTE, "rows": rows}
    publish(out, "stacked_traffic", result, [to_table(result)], draw(result), width=104)


if __name__ == "__main__":
    tyro.cli(main)
