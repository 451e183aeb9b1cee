"""Does clipping scale as a plain gradient does? Simulated, from programs compiled for TPU chips.

    python -m benchmarks.engine.scaling

Takes each program's cycles and traffic from benchmarks/results/sharded.json, and simulates a step
on 4 to 4,096 chips that share batch and parameters, with equally many samples for each chip, under
the assumptions that it states. Prints a table, and writes it as scaling.json and .png.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import tyro
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.style import tidy
from benchmarks.engine import sharded

LAYOUT = "fsdp"
MODES = ("plain", *sharded.MODES)
COLORS = {"plain": "#666666", **sharded.COLORS}
# All chips of the largest topology are one pod.
POD = 256
PODS = (2, 4, 8, 16)
SHOWN = (16, POD, 4096)


class Assumptions(NamedTuple):
    """The assumptions about the chips and their networks. None of these numbers was measured.

    They follow Google's description of TPU v5e: 197 TFLOP/s by 4 matrix units of 128 x 128; links
    of 1,600 Gbit/s, of which a chip at an edge of a grid has half; 6.4 Tbit/s for each pod.
    """

    cycles_per_second: float = 1.5e9
    bytes_per_second_in_a_pod: float = 100e9
    bytes_per_second_between_pods: float = 3.1e9


ASSUMPTIONS = Assumptions()
MODEL = (
    f"Simulated: a chip has {ASSUMPTIONS.cycles_per_second / 1e9:g} GHz, sends "
    f"{ASSUMPTIONS.bytes_per_second_in_a_pod / 1e9:g} GB/s within a pod of {POD} and "
    f"{ASSUMPTIONS.bytes_per_second_between_pods / 1e9:g} GB/s between pods. Rings move "
    "(D − 1) / D of a collective's bytes, all-reduces twice as much, permutations all of them. "
    "Pods train the same model: their chips add up gradients of their own shares of the "
    "parameters. Latencies are left out. Efficiency is samples per second and chip without overlap "
    "of computing and sending, relative to the plain gradient of the fewest chips. To plain: time "
    "relative to the plain gradient's on as many chips, without overlap and if the shorter of both "
    "is hidden."
)


class Step(NamedTuple):
    """The seconds of a simulated step of each chip."""

    computing: float
    sending: float

    @property
    def apart(self) -> float:
        return self.computing + self.sending

    @property
    def overlapped(self) -> float:
        return max(self)


def num_chips(row: dict[str, Any]) -> int:
    return math.prod(map(int, row["topology"].split("x")))


def simulated_step(row: dict[str, Any], num_pods: int = 1) -> Step:
    """Predicts the seconds of a program's step by the formula of MODEL."""
    within = sum(_share(kind, num_chips(row)) * size for kind, size in row["bytes"].items())
    between = _share("all-reduce", num_pods) * row["argument_bytes"]
    return Step(
        row["cycles"] / ASSUMPTIONS.cycles_per_second,
        within / ASSUMPTIONS.bytes_per_second_in_a_pod
        + between / ASSUMPTIONS.bytes_per_second_between_pods,
    )


def _share(kind: str, members: int) -> float:
    """Returns the bytes that a ring's member sends, relative to a collective's."""
    if kind == "collective-permute":
        return 1.0
    once = (members - 1) / members
    return 2 * once if kind == "all-reduce" else once


def simulate(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Simulates the models whose plain gradient was compiled for a whole pod.

    Returns:
      A row for each model, mode and number of chips; models in order of `rows`.
    """
    compiled = [row for row in rows if row["layout"] == LAYOUT and row["fits"]]
    whole = [row["job"] for row in compiled if num_chips(row) == POD and row["mode"] == "plain"]
    return [row for job in whole for row in _of_model([r for r in compiled if r["job"] == job])]


def _of_model(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = {
        (row["mode"], pods * num_chips(row)): (row, simulated_step(row, pods))
        for row in compiled
        for pods in (1, *(PODS if num_chips(row) == POD else ()))
    }
    plain = {chips: step for (mode, chips), (_, step) in steps.items() if mode == "plain"}
    least = plain[min(plain)].apart
    ordered = sorted(steps, key=lambda key: (MODES.index(key[0]), key[1]))
    return [
        {
            "job": row["job"],
            "name": row["name"],
            "samples_per_chip": row["samples"] / num_chips(row),
            "mode": mode,
            "chips": chips,
            **step._asdict(),
            "efficiency": least / step.apart,
            "apart": step.apart / plain[chips].apart,
            "overlapped": step.overlapped / plain[chips].overlapped,
        }
        for mode, chips in ordered
        if chips in plain
        for row, step in [steps[mode, chips]]
    ]


def _cells(result: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each model and mode, with two cells for each of SHOWN."""
    found = {(row["name"], row["mode"], row["chips"]): row for row in result["rows"]}
    series = dict.fromkeys((name, mode) for name, mode, _ in found)
    return [
        [*one, *(text for chips in SHOWN for text in _figures(found.get((*one, chips))))]
        for one in series
    ]


def _figures(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["–", "–"]
    ratios = dict.fromkeys(f"{ratio:.2f}" for ratio in sorted((row["apart"], row["overlapped"])))
    return [f"{row['efficiency']:.0%}", "–".join(ratios)]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=MODEL, caption_justify="left")
    for name in ("model", "mode"):
        table.add_column(name, no_wrap=True)
    for chips in SHOWN:
        table.add_column(f"{chips:,}", justify="right", no_wrap=True)
        table.add_column("to plain", justify="right", no_wrap=True)
    for cells in _cells(result):
        table.add_row(*cells, end_section=cells[1] == MODES[-1])
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the guide's table: efficiency, and time relative to a plain gradient."""
    heads = [head for chips in SHOWN for head in (f"{chips:,} chips", "to plain")]
    body = [[name, f"`{mode}`", *figures] for name, mode, *figures in _cells(result)]
    return markdown_table([["model", "mode", *heads], *body])


def draw(result: dict[str, Any]) -> Figure:
    """Draws the efficiency of each mode over the number of chips, a panel for each model."""
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    figure = Figure(figsize=(5.5 * len(names), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for mode in MODES:
            own = [row for row in result["rows"] if (row["name"], row["mode"]) == (name, mode)]
            chips, heights = ([row[key] for row in own] for key in ("chips", "efficiency"))
            axes.plot(chips, heights, label=mode, color=COLORS[mode], marker="o")
        axes.set_xscale("log", base=2)
        ticks = (4, 16, 64, POD, 1024, 4096)
        axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
        axes.set_xlabel("TPU v5e chips (simulated)")
        axes.set_title(name)
        axes.set_ylim(0, 1.08)
        tidy(axes)
    panels[0].set_ylabel("Samples per second and chip,\nrelative to a plain gradient on few chips")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MODES), frameon=False)
    return figure


def main(
    source: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")] = RESULTS / "sharded.json",
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = RESULTS,
) -> None:
    """Simulates weak scaling to 4,096 chips from compiled programs.

    Args:
      source: the result of benchmarks.engine.sharded.
      out: folder for scaling.json and scaling.png.
    """
    compiled = json.loads(source.read_text())
    rows = simulate(compiled["rows"])
    if not rows:
        raise SystemExit(
            f"expected {LAYOUT} programs for {POD} chips in {source}, found none; compile them by "
            "python -m benchmarks.engine.sharded --topology 16x16"
        )
    result = {
        "machine": compiled["machine"],
        "assumptions": ASSUMPTIONS._asdict() | {"model": MODEL},
        "rows": rows,
    }
    publish(out, "scaling", result, [to_table(result)], draw(result), width=110)


if __name__ == "__main__":
    tyro.cli(main)
