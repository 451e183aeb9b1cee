"""How much does it cost to clip each micro-batch's gradient before accumulation?

    python -m benchmarks.engine.accumulation

Prints a table and writes it to benchmarks/results as accumulation.json and .png: whole train steps
of AlexNet, and the optimizer's update alone, against optax.MultiSteps without clipping.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

import psclip_optax as psc
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.timing import quartiles
from benchmarks.zoo.models import ZOO, Model

NUM_MICROBATCHES = 8
# About the norm of a micro-batch's gradient, so that some are clipped and some are not.
ALPHA, BETA = 1.0, 1.5
NOTE = (
    "A window is 8 micro-batches: 8 train steps (forward, backward, update, parameters), of which "
    "the last changes the parameters, or 8 updates alone. Times are ratios to MultiSteps' in the "
    "same round of an interleaved run: median (quartiles). Bytes are XLA's figure for the compiled "
    "update."
)
CASES = {
    "not clipped (MultiSteps)": "#666666",
    "clipped before (accumulate_clipped)": "#0072B2",
    "clipped after (MultiSteps)": "#D55E00",
}
BASELINE = next(iter(CASES))
PARTS = ("train step", "update")


class Compiled(NamedTuple):
    """A program from (state, arguments) to state, with its initial state."""

    program: Any
    state: Any
    arguments: tuple[Any, ...]


def optimizers(every_k: int = NUM_MICROBATCHES) -> dict[str, Any]:
    inner = optax.sgd(0.01, momentum=0.9)
    clipped = optax.chain(optax.clip_by_global_norm(ALPHA), inner)
    threshold = psc.growing_threshold(ALPHA, BETA)
    built = (
        optax.MultiSteps(inner, every_k),
        psc.accumulate_clipped(inner, every_k, threshold),
        optax.MultiSteps(clipped, every_k),
    )
    return dict(zip(CASES, built, strict=True))


def mean_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    def mean(params: Any, *batch: Any) -> Any:
        return jnp.mean(jax.vmap(loss, (None, *[0] * len(batch)))(params, *batch))

    return mean


def train_step(model: Model, tx: Any, batch: tuple[Any, ...]) -> Compiled:
    def step(state: Any, *batch: Any) -> Any:
        params, opt_state = state
        gradients = jax.grad(mean_loss(model.loss))(params, *batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = jax.tree.map(jnp.copy, (model.params, tx.init(model.params)))
    return Compiled(compiled(step, state, batch), state, batch)


def update_alone(model: Model, tx: Any, gradients: Any) -> Compiled:
    def update(state: Any, gradients: Any) -> Any:
        _, opt_state = state
        return tx.update(gradients, opt_state, None)

    state = jax.tree.map(jnp.copy, (gradients, tx.init(model.params)))
    return Compiled(compiled(update, state, (gradients,)), state, (gradients,))


def compiled(function: Callable[..., Any], state: Any, arguments: tuple[Any, ...]) -> Any:
    return jax.jit(function, donate_argnums=0).lower(state, *arguments).compile()


def time_windows(
    cases: dict[str, Compiled], rounds: int, num_calls: int = NUM_MICROBATCHES
) -> dict[str, list[float]]:
    """Times each window of calls, after a warm-up call of each."""
    states = {name: case.state for name, case in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(num_calls):
                states[name] = case.program(states[name], *case.arguments)
            jax.block_until_ready(states[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def measure(
    model: Model, num_samples: int, rounds: int, parts: tuple[str, ...]
) -> list[dict[str, Any]]:
    batch = model.batch(num_samples)
    gradients = jax.jit(jax.grad(mean_loss(model.loss)))(model.params, *batch)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    rows = []
    for part in parts:
        cases = {
            name: train_step(model, tx, batch)
            if part == "train step"
            else update_alone(model, tx, gradients)
            for name, tx in optimizers().items()
        }
        accessed = {name: bytes_accessed(case) for name, case in cases.items()}
        seconds = time_windows(cases, rounds)
        for name in CASES:
            ratios = [t / b for t, b in zip(seconds[name], seconds[BASELINE], strict=True)]
            rows.append(
                {
                    "part": part,
                    "case": name,
                    "samples": num_samples,
                    "parameters": num_parameters,
                    "seconds_quartiles": quartiles(seconds[name]),
                    "ratio_quartiles": quartiles(ratios),
                    "bytes": accessed[name],
                    "bytes_ratio": accessed[name] / accessed[BASELINE],
                }
            )
    return rows


def bytes_accessed(case: Compiled) -> float:
    return case.program.cost_analysis()["bytes accessed"]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("gradients", no_wrap=True)
    for name in ("ms a window", "time", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        low, middle, high = row["ratio_quartiles"]
        is_first = row["case"] == BASELINE
        table.add_row(
            label(row) if is_first else "",
            row["case"],
            f"{1e3 * row['seconds_quartiles'][1]:.1f}",
            f"{middle:.3f} ({low:.3f}–{high:.3f})",
            f"{row['bytes_ratio']:.3f}",
            end_section=row["case"] == list(CASES)[-1],
        )
    return table


def label(row: dict[str, Any]) -> str:
    samples = f", n = {row['samples']}" if row["part"] == "train step" else ""
    return row["part"] + samples


def draw(result: dict[str, Any]) -> Figure:
    labels = list(dict.fromkeys(map(label, result["rows"])))
    figure = Figure(figsize=(10, 1.6 + 0.7 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for index, (name, colour) in enumerate(CASES.items()):
        rows = [row for row in result["rows"] if row["case"] == name]
        heights = [labels.index(label(row)) + 0.2 * (index - 1) for row in rows]
        low, middle, high = zip(*(row["ratio_quartiles"] for row in rows), strict=True)
        spread = [
            [m - x for m, x in zip(middle, low, strict=True)],
            [x - m for m, x in zip(middle, high, strict=True)],
        ]
        style = {"color": colour, "marker": "o^s"[index], "linestyle": "none", "markersize": 8}
        axes.errorbar(middle, heights, xerr=spread, label=name, capsize=3, **style)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("Time of a window, relative to MultiSteps without clipping (median, quartiles)")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(CASES), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def main(
    out: pathlib.Path = RESULTS,
    samples: tuple[int, ...] = (32, 128),
    rounds: int = 9,
    quick: bool = False,
) -> None:
    """Measures the cost of clipping before accumulation.

    Args:
      out: folder for accumulation.json and accumulation.png.
      samples: sizes of a micro-batch.
      rounds: timed windows, at least 2.
      quick: a small model and few rounds, to check that the benchmark works.
    """
    model = ZOO["alexnet"]("small" if quick else "full")
    sizes, rounds = ((4,), 3) if quick else (samples, rounds)
    step, _ = PARTS
    # The update alone does not depend on the samples.
    parts = [(size, PARTS if size == sizes[-1] else (step,)) for size in sizes]
    rows = [row for size, own in parts for row in measure(model, size, rounds, own)]
    result = {"machine": describe_machine(), "rounds": rounds, "note": NOTE, "rows": rows}
    publish(out, "accumulation", result, [to_table(result)], draw(result), width=112)


if __name__ == "__main__":
    tyro.cli(main)
