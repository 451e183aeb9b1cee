"""Where does per-sample clipping win, and where does it not?

    python -m benchmarks.cifar100.clipping_map --data-dir FOLDER --runs FILE

AlexNet on CIFAR-100, around one setting; batch size, momentum, noise and length vary. In each cell
three methods get the same number of trials, six or eight, of half the length, and the winners three
more seeds. Every finished run is a line of --runs; repeat the command to resume. Prints a table and
writes it to benchmarks/results as clipping_map.json and .png.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cifar100.runs import NOISES, Numbers, Run
from benchmarks.cifar100.tuned import (
    Options,
    Trainer,
    batch_clipping_grid,
    build_trainer,
    describe_numbers,
    draw_differences,
    growing_grid,
    run_length,
    tune_and_test,
    with_lower,
)
from benchmarks.common.machine import describe
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.statistics import describe_difference, describe_mean

BETA = 2.0
METHODS = ("no clipping", "batch clipping", "per-sample, growing")
COLOURS: dict[str, str] = dict(zip(METHODS[:2], ("#000000", "#D55E00"), strict=True))
DEFAULTS = Options(RESULTS / "clipping_map.runs.jsonl")
NOTE = (
    "Test accuracy in %, mean ± standard error over seeds that chose nothing; differences of "
    "per-sample clipping to each other method are paired by seed, with 95% intervals (Student's t)."
)


class Cell(NamedTuple):
    """One condition.

    Attributes:
      noise: one of NOISES.
      batch_size: samples in a step.
      momentum: the decay of the momentum.
      epochs: the epochs of every run.
    """

    noise: str
    batch_size: int
    momentum: float
    epochs: int

    def label(self) -> str:
        momentum = f"momentum {self.momentum:g}" if self.momentum else "no momentum"
        return f"{self.noise}, n = {self.batch_size}, {momentum}, {self.epochs} epochs"


def build_cells(epochs: int, quick: bool) -> list[Cell]:
    """Lists the cells: each noise with and without momentum, batch sizes, and run lengths."""
    if quick:
        return [Cell("clean", 32, 0.9, 1), Cell("40% labels", 32, 0.0, 1)]
    base = [Cell(noise, 128, momentum, epochs) for momentum in (0.0, 0.9) for noise in NOISES]
    sizes = [
        Cell(noise, size, 0.9, epochs) for size in (512, 32) for noise in ("clean", "heavy pixels")
    ]
    lengths = [Cell("40% labels", 128, 0.9, length) for length in (epochs // 3, 3 * epochs)]
    return [*base, *sizes, *lengths]


def build_grids(cell: Cell) -> dict[str, list[Numbers]]:
    """Builds the same number of points for each method; momentum m makes steps 1 / (1 − m) long."""
    # Steps of larger batches may be longer, by the root of the size, because their noise is
    # smaller.
    unit = (cell.batch_size / 128) ** 0.5 * (1 - cell.momentum) / (1 - 0.9)
    few = tuple(rate * unit for rate in (0.015, 0.04, 0.1))
    many = tuple(rate * unit for rate in np.geomspace(0.0006, 0.2, 6))
    if cell.noise == "heavy pixels" and cell.momentum:
        few, many = with_lower(few, (4,)), with_lower(many, (10, 3))
    own: dict[str, Any] = {"momentum": cell.momentum}
    return {
        "no clipping": [Numbers(rate, **own) for rate in many],
        "batch clipping": batch_clipping_grid(few, (1.0, 8.0), **own),
        "per-sample, growing": growing_grid(few, (2.0, 10.0), BETA, cell.batch_size, **own),
    }


def run_cell(cell: Cell, train: Trainer) -> dict[str, Any]:
    setting = train.options.setting(cell.batch_size)

    def make_run(stage: str, name: str, numbers: Numbers, seed: int) -> Run:
        return Run(stage, name, cell.noise, numbers, run_length(stage, cell.epochs), seed, setting)

    grids = build_grids(cell)
    tuned = tune_and_test(grids, make_run, train, train.options.seeds)
    return {
        "cell": cell._asdict(),
        "label": cell.label(),
        "trials": len(grids[METHODS[2]]),
        **tuned.described_against(METHODS[2]),
    }


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    table.add_column("cell", no_wrap=True)
    for name in METHODS:
        table.add_column(name, justify="right", no_wrap=True)
    for name in METHODS[:2]:
        table.add_column(f"against {name}", justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["label"],
            *(describe_mean(row["test_accuracies"][name]) for name in METHODS),
            *(describe_difference(row["differences"][name]) for name in METHODS[:2]),
        )
    return table


def to_chosen_table(result: dict[str, Any]) -> Table:
    table = Table(title="chosen")
    for name in ("cell", *METHODS):
        table.add_column(name, no_wrap=True)
    for row in result["rows"]:
        table.add_row(row["label"], *(describe_numbers(row["chosen"][name]) for name in METHODS))
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the test accuracy of each method, and the differences of per-sample clipping."""
    rows = [["condition", *METHODS, *(f"per-sample − {name}" for name in METHODS[:2])]]
    for row in result["rows"]:
        rows.append(
            [
                row["label"],
                *(describe_mean(row["test_accuracies"][name]) for name in METHODS),
                *(describe_difference(row["differences"][name]) for name in METHODS[:2]),
            ]
        )
    return markdown_table(rows)


def draw(result: dict[str, Any]) -> Figure:
    label = "Test accuracy of per-sample clipping, difference in percentage points (95%)"
    return draw_differences(result["rows"], COLOURS, label, describe(result["machine"]))


def main(
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS, cells: tuple[int, ...] | None = None
) -> None:
    """Maps where per-sample clipping wins, and where it does not.

    Args:
      common: the options of all comparisons on CIFAR-100.
      cells: only these conditions, by their index in the table.
    """
    options = common
    if common.quick:
        options = dataclasses.replace(common, width=0.05, seeds=2, together=6)
    every = build_cells(options.epochs, options.quick)
    chosen = range(len(every)) if cells is None else cells
    if any(not 0 <= i < len(every) for i in chosen):
        raise ValueError(f"cells are numbers from 0 to {len(every) - 1}, got {cells}")
    train = build_trainer(options)
    rows = [run_cell(every[i], train) for i in chosen]
    result = {
        "machine": rows[0]["machine"],
        "note": NOTE,
        "protocol": options.protocol(),
        "rows": rows,
    }
    tables = [to_table(result), to_chosen_table(result)]
    publish(options.out, "clipping_map", result, tables, draw(result), width=170)


if __name__ == "__main__":
    tyro.cli(main)
