"""How much do devices that share a batch compute, and send each other?

    python -m benchmarks.engine.scaling

Prints tables and writes them to benchmarks/results as scaling.json and .png: floating-point
operations and bytes of the compiled programs for 1 to 8 devices, read from the programs, and a
simulated weak-scaling curve to 4,096 devices under the assumptions that it states.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.collectives import num_bytes
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.style import tidy
from benchmarks.engine.cost import step
from benchmarks.zoo.models import ZOO
from psclip_optax.engine.flops import count_flops

DEVICES = (1, 2, 4, 8)
SIMULATED = tuple(2**i for i in range(13))
SAMPLES_PER_DEVICE = {"alexnet": 128, "gpt_tied": 16}
MODES = {"plain": "#666666", "one_pass": "#0072B2"}


class Assumptions(NamedTuple):
    """The assumptions about the simulated cluster. None of these numbers was measured."""

    flops_per_second: float = 100e12
    bytes_per_second: float = 50e9
    seconds_per_message: float = 10e-6


ASSUMPTIONS = Assumptions()
NOTE = (
    "FLOPs and bytes are of one device, from XLA's count of the program compiled for all of them, "
    "each step of a loop counted, and from its text; ratios to the plain gradient's at as many "
    "devices. Each device has as many samples, whatever the number of devices. Nothing is timed: "
    "the devices are virtual."
)
MODEL = (
    f"Simulated: a device computes {ASSUMPTIONS.flops_per_second / 1e12:.0f} TFLOP/s, and all "
    "reduce one after the other by rings, without overlap: 2 (D − 1) / D of their bytes at "
    f"{ASSUMPTIONS.bytes_per_second / 1e9:.0f} GB/s each, and 2 log₂ D messages of "
    f"{ASSUMPTIONS.seconds_per_message * 1e6:.0f} µs. Efficiency is samples per second and device, "
    "relative to the plain gradient on one device. FLOPs and bytes as counted at 8 devices."
)


def measure(name: str, mode: str, num_devices: int, size: str) -> dict[str, Any]:
    model = ZOO[name](size)  # pyright: ignore[reportArgumentType]
    per_device = SAMPLES_PER_DEVICE[name] if size == "full" else 2
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    everywhere, by_sample = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    batch = jax.device_put(model.batch(per_device * num_devices), by_sample)
    params = jax.device_put(model.params, everywhere)
    arguments = (params, np.float32(1), *batch)
    function = step(model.loss, mode)  # pyright: ignore[reportArgumentType]
    program = jax.jit(function).lower(*arguments).compile()
    text = program.as_text()
    analysis: Any = program.cost_analysis()
    return {
        "model": name,
        "mode": mode,
        "devices": num_devices,
        "samples_per_device": per_device,
        "flops_of_loops_once": float(analysis["flops"]),
        "flops": count_flops(function, arguments) if num_devices == 1 else 0.0,
        "bytes_sent": num_bytes(text or ""),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
    }


def with_flops(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the operations of several devices, relative to those of a single device."""
    alone = {(r["model"], r["mode"]): r for r in rows if r["devices"] == 1}

    def flops(row: dict[str, Any]) -> float:
        one = alone[row["model"], row["mode"]]
        return one["flops"] * row["flops_of_loops_once"] / one["flops_of_loops_once"]

    return [row | {"flops": flops(row)} for row in rows]


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {(r["model"], r["devices"]): r for r in rows if r["mode"] == "plain"}

    def ratio(row: dict[str, Any], name: str) -> float | None:
        base = plain[row["model"], row["devices"]][name]
        return row[name] / base if base else None

    return [row | {f"{name}_ratio": ratio(row, name) for name in NUMBERS} for row in rows]


NUMBERS = ("flops", "bytes_sent")


def seconds(row: dict[str, Any], num_devices: int) -> float:
    """Predicts the seconds of a simulated step by the formula of MODEL."""
    computing = row["flops"] / ASSUMPTIONS.flops_per_second
    share = 2 * (num_devices - 1) / num_devices
    sending = share * row["bytes_sent"] / ASSUMPTIONS.bytes_per_second
    return computing + sending + 2 * math.log2(num_devices) * ASSUMPTIONS.seconds_per_message


def simulate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    at_most = [row for row in rows if row["devices"] == DEVICES[-1]]
    alone = {row["model"]: seconds(row, 1) for row in at_most if row["mode"] == "plain"}
    return [
        {
            "model": row["model"],
            "mode": row["mode"],
            "devices": list(SIMULATED),
            "efficiency": [alone[row["model"]] / seconds(row, number) for number in SIMULATED],
        }
        for row in at_most
    ]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in ("model", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("devices", "GFLOP", "FLOPs", "MB sent", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            f"{row['model']}, {row['samples_per_device']} a device",
            row["mode"],
            str(row["devices"]),
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops_ratio']:.3f}",
            f"{row['bytes_sent'] / 1e6:.3f}",
            "–" if row["bytes_sent_ratio"] is None else f"{row['bytes_sent_ratio']:.4f}",
            end_section=row["devices"] == DEVICES[-1],
        )
    return table


def simulated_table(result: dict[str, Any]) -> Table:
    table = Table(title="Simulated efficiency", caption=MODEL, caption_justify="left")
    for name in ("model", "mode"):
        table.add_column(name, no_wrap=True)
    shown = [number for number in SIMULATED if number in (1, 8, 64, 512, 4096)]
    for number in shown:
        table.add_column(f"{number:,}", justify="right", no_wrap=True)
    for curve in result["simulated"]:
        at = dict(zip(curve["devices"], curve["efficiency"], strict=True))
        table.add_row(curve["model"], curve["mode"], *(f"{at[number]:.1%}" for number in shown))
    return table


def draw(result: dict[str, Any]) -> Figure:
    models = list(dict.fromkeys(curve["model"] for curve in result["simulated"]))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for curve in (c for c in result["simulated"] if c["model"] == model):
            style = {
                "color": MODES[curve["mode"]],
                "marker": "o^"[list(MODES).index(curve["mode"])],
            }
            axes.plot(curve["devices"], curve["efficiency"], label=curve["mode"], **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIMULATED[::2], [f"{number:,}" for number in SIMULATED[::2]])
        axes.set_xlabel("Devices (simulated)")
        axes.set_title(f"{model}, {SAMPLES_PER_DEVICE[model]} samples a device")
        axes.set_ylim(0, 1.08)
        tidy(axes)
    panels[0].set_ylabel(
        "Samples per second and device,\nrelative to a plain gradient on one device"
    )
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(MODES), frameon=False)
    return figure


def main(out: pathlib.Path = RESULTS, quick: bool = False) -> None:
    """Counts the operations of devices that share a batch, and the bytes they send each other.

    Args:
      out: folder for scaling.json and scaling.png.
      quick: small models, to check that the benchmark works.
    """
    if jax.device_count() < DEVICES[-1]:
        raise SystemExit(
            f"expected {DEVICES[-1]} devices, found {jax.device_count()}; a CPU has them with "
            f"JAX_NUM_CPU_DEVICES={DEVICES[-1]} python -m benchmarks.engine.scaling"
        )
    size = "small" if quick else "full"
    numbers = (1, DEVICES[-1]) if quick else DEVICES
    points = [(name, mode, d) for name in SAMPLES_PER_DEVICE for mode in MODES for d in numbers]
    rows = with_ratios(with_flops([measure(*point, size) for point in points]))
    result = {
        "machine": describe_machine(),
        "note": NOTE,
        "assumptions": ASSUMPTIONS._asdict() | {"model": MODEL},
        "rows": rows,
        "simulated": simulate(rows),
    }
    tables = [to_table(result), simulated_table(result)]
    publish(out, "scaling", result, tables, draw(result), width=104)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES[-1])  # before JAX starts
    tyro.cli(main)
