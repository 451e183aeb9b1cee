"""How much do TPU chips that share a batch and a model send each other? No TPU is needed.

    pip install -e '.[train,accelerators]'
    python -m benchmarks.engine.sharded

XLA's compiler for TPUs compiles every mode for 4, 16 and 256 chips, and `value_and_grad` of a mean
loss that is written for a batch. It reports elements sent, the peak memory of a chip, and estimated
cycles. Programs in the result are not compiled again.
"""

from __future__ import annotations

import collections
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

import psclip_optax as psc
from benchmarks.common import hlo
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.style import tidy
from benchmarks.engine import real_models, targets
from benchmarks.engine.accelerators import LEAST_BYTES
from benchmarks.engine.layouts import LAYOUTS, Laid, laid_out, mesh_of
from benchmarks.engine.real_models import by_layer

TARGET = "v5e"
TOPOLOGIES = ("2x2", "4x4", "16x16")
MODES = ("one_pass", "two_pass", "by_layer")
COLORS = {"one_pass": "#0072B2", "two_pass": "#E69F00", "by_layer": "#009E73"}
_RATIOS = {"cycles": "cycles", "compile": "compile_seconds"}
IN_THE_GUIDE = ("sent", "memory", "cycles")
COLUMNS = ("sent", "bytes", "memory", "cycles", "compile")
NOTE = (
    "Ratios to value_and_grad of the mean loss over as many chips. Sent: elements that a chip has "
    "at the larger end of each collective, less 32 for each sample and group. Memory: peak of a "
    "chip's temporary memory. Cycles: by the compiler's own estimates, without waits for others."
)


class Job(NamedTuple):
    """A model, and the number of samples for each chip along the batch's axis."""

    build: Callable[[real_models.Size], real_models.Model]
    samples_each: int


JOBS = {
    "gpt2": Job(real_models.gpt2, 2),
    "gpt2_scanned": Job(lambda size: real_models.gpt2(size, scanned=True), 2),
    "llama_1b": Job(real_models.llama_1b, 1),
}


class Point(NamedTuple):
    """A program to compile: a row of the result, with the keys of its first columns."""

    topology: str
    layout: str
    job: str
    mode: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> Point:
        return cls(*(row[name] for name in cls._fields))


def measure(point: Point, quick: bool) -> dict[str, Any]:
    """Compiles one mode, or "plain"; `fits` is False if a chip's memory is too small."""
    job = JOBS[point.job]
    model = job.build("tiny" if quick else "full")
    laid = laid_out(model, mesh_of(point.layout, TARGET, point.topology), job.samples_each)
    function, num_groups = _function(laid, point.mode)
    row = {
        **point._asdict(),
        "name": model.name,
        "samples": laid.arguments[1].shape[0],
        "groups": num_groups,
    }
    start = time.perf_counter()
    try:
        program = (
            jax.jit(function, out_shardings=(None, laid.gradients)).lower(*laid.arguments).compile()
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False}
    return row | {"fits": True, "compile_seconds": time.perf_counter() - start, **_cost(program)}


def _function(laid: Laid, mode: str) -> tuple[Callable[..., Any], int]:
    """Returns the function to compile, and its number of clipping groups."""
    if mode == "plain":
        return jax.value_and_grad(laid.batch_loss), 0
    threshold = by_layer(laid.arguments[0], 1.0) if mode == "by_layer" else 1.0
    chosen: Any = "auto" if mode == "by_layer" else mode
    clipped = psc.clipped_value_and_grad(laid.loss, threshold, mode=chosen, spmd_axis_name="data")
    return clipped, len(jax.tree.leaves(threshold))


def _cost(program: Any) -> dict[str, Any]:
    text = program.as_text()
    sizes: collections.Counter[str] = collections.Counter()
    for one in hlo.sent(text):
        sizes[one.kind] += one.bytes
    memory = program.memory_analysis()
    return {
        "elements": hlo.elements_sent(text),
        "bytes": dict(sizes),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "cycles": hlo.tpu_cycles(text),
    }


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {Point.of(row)[:3]: row for row in rows if row["mode"] == "plain"}

    def ratios(row: dict[str, Any]) -> dict[str, float]:
        base = plain.get(Point.of(row)[:3])
        if base is None or not (row["fits"] and base["fits"]):
            return {}
        allowed = 32 * row["samples"] * row["groups"]
        sent = max(sum(row["elements"].values()) - allowed, 0) / sum(base["elements"].values())
        of_bytes = sum(row["bytes"].values()) / sum(base["bytes"].values())
        memory = (max(one["temp_bytes"], LEAST_BYTES) for one in (row, base))
        others = {name: row[key] / base[key] for name, key in _RATIOS.items()}
        return {"sent": sent, "bytes": of_bytes, "memory": next(memory) / next(memory), **others}

    return [row | {"ratios": ratios(row)} for row in rows if row["mode"] != "plain"]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in ("chips", "layout", "model", "mode"):
        table.add_column(name, no_wrap=True)
    for name in (*COLUMNS, "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["ratios"]:
        cells = [row["topology"], row["layout"], f"{row['name']}, n {row['samples']}", row["mode"]]
        if not row["fits"]:
            table.add_row(*cells, "does not fit")
            continue
        numbers = [f"{row['ratios'][name]:.2f}" if row["ratios"] else "–" for name in COLUMNS]
        table.add_row(*cells, *numbers, f"{row['temp_bytes'] / 1e9:.2f}")
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the guide's table: each mode's traffic, memory and cycles relative to plain."""
    found = {Point.of(row): row for row in result["ratios"]}
    programs = dict.fromkeys((point.topology, point.layout, point.job) for point in found)
    body = []
    for topology, layout, job in programs:
        rows = [found.get(Point(topology, layout, job, mode)) for mode in MODES]
        first = next(row for row in rows if row is not None)
        name = f"{first['name']}, n {first['samples']}"
        body.append([name, topology, layout, *map(_ratios_in_the_guide, rows)])
    return markdown_table(
        [["model, samples", "chips", "layout", *(f"`{m}`" for m in MODES)], *body]
    )


def _ratios_in_the_guide(row: dict[str, Any] | None) -> str:
    if row is None or not row["ratios"]:
        return "–" if row is None or row["fits"] else "does not fit"
    return " / ".join(f"{row['ratios'][name]:.2f}" for name in IN_THE_GUIDE)


def draw(result: dict[str, Any]) -> Figure:
    """Draws the traffic and the memory of each model, layout and mode."""
    rows = [row for row in result["ratios"] if row["ratios"]]
    names = list(dict.fromkeys((row["name"], row["layout"], row["topology"]) for row in rows))
    figure = Figure(figsize=(4 + 0.5 * len(names), 6.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, ratio in zip(panels, ("sent", "memory"), strict=True):
        for i, mode in enumerate(MODES):
            own = [row for row in rows if row["mode"] == mode]
            at = [names.index((row["name"], row["layout"], row["topology"])) for row in own]
            heights = [row["ratios"][ratio] for row in own]
            axes.bar([p + 0.27 * (i - 1) for p in at], heights, 0.27, color=COLORS[mode])
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_ylabel(f"{ratio}\nto plain")
        tidy(axes)
    panels[-1].set_xticks(range(len(names)), map(", ".join, names), rotation=40, ha="right")
    handles = [panels[0].bar([0], [0], color=COLORS[mode]) for mode in MODES]
    figure.legend(handles, MODES, loc="outside upper center", ncols=len(MODES), frameon=False)
    return figure


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def place(row: dict[str, Any]) -> tuple[int, ...]:
        orders = (TOPOLOGIES, LAYOUTS, tuple(JOBS), ("plain", *MODES))
        return tuple(o.index(value) for o, value in zip(orders, Point.of(row), strict=True))

    ordered = sorted(rows, key=place)
    return {
        "machine": describe_machine(),
        "note": NOTE,
        "rows": ordered,
        "ratios": with_ratios(ordered),
    }


def main(
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = RESULTS,
    topology: Sequence[str] = TOPOLOGIES,
    layout: Sequence[str] = LAYOUTS,
    model: Sequence[str] = tuple(JOBS),
    mode: Sequence[str] = MODES,
    rerun: bool = False,
    quick: bool = False,
) -> None:
    """Compiles models for the chips of a TPU, and reports their traffic and memory.

    Args:
      out: folder for sharded.json and sharded.png.
      topology: which of 2x2, 4x4 and 16x16 chips to compile for.
      layout: which of "fsdp" and "tensor parallel" to compile.
      model: the models to compile.
      mode: the modes to compile, in addition to the plain gradient.
      rerun: whether to compile programs again that are in the result.
      quick: small models, to check that the benchmark works.
    """
    jax.config.update("jax_platforms", "cpu")
    path = out / "sharded.json"
    wanted = [
        Point(t, one, j, m)
        for t in topology
        for one in layout
        for j in model
        for m in ("plain", *mode)
    ]
    result = targets.compile_missing(
        path, wanted, Point.of, lambda point: measure(point, quick), summary, rerun
    )
    publish(out, "sharded", result, [to_table(result)], draw(result), width=110)


if __name__ == "__main__":
    tyro.cli(main)
