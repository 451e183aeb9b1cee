"""How accurate is the memory estimate by which "auto" chooses a mode?

    python -m benchmarks.engine.memory

Traces the models of `benchmarks.engine.accelerators`, estimates the peak of their temporary memory,
and compares it with what XLA's compilers reported there. A TPU has 128 MiB of on-chip memory, which
its compiler's report does not include, so small models are compared on an H100 only.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, cast

import jax
import tyro

import psclip_optax as psc
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table
from benchmarks.engine.accelerators import JOBS, Job
from psclip_optax.engine.liveness import peak_bytes
from psclip_optax.options import Mode
from psclip_optax.training.output.files import to_json

MODES = ("one_pass", "two_pass")
# Below this, a TPU's on-chip memory is more than an eighth of the total.
LEAST_BYTES = {"v5e": 2**30, "v6e": 2**30, "h100": 2**24}


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the compilers' results to compare with."""
    return [
        row
        for row in rows
        if row["mode"] in MODES and row["fits"] and row["temp_bytes"] >= LEAST_BYTES[row["target"]]
    ]


def estimate(job: Job, target: str, mode: str) -> int:
    """Returns the estimated peak of temporary memory of a model's program, in bytes."""
    f = psc.clipped_value_and_grad(job.loss, 1.0, mode=cast("Mode", mode))
    traced = jax.make_jaxpr(f)(*job.arguments)
    return peak_bytes(traced.jaxpr, is_tpu=target != "h100")


def measure(row: dict[str, Any]) -> dict[str, Any]:
    estimated = estimate(JOBS[row["job"]](False), row["target"], row["mode"])
    kept = {name: row[name] for name in ("target", "job", "mode", "name", "temp_bytes")}
    return kept | {"estimated_bytes": estimated, "ratio": estimated / row["temp_bytes"]}


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the ratios of estimate to compiled program, a row for each model and target."""
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        ratios.setdefault((row["name"], row["target"]), {})[row["mode"]] = row["ratio"]
    cells = [
        [name, target, *(f"{found[mode]:.2f}" if mode in found else "–" for mode in MODES)]
        for (name, target), found in ratios.items()
    ]
    return markdown_table([["model", "compiled for", *MODES], *cells])


def main(out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = RESULTS) -> None:
    """Compares the estimated memory with the compilers'.

    Args:
      out: folder with accelerators.json, where memory.json is written.
    """
    rows = compared(json.loads((out / "accelerators.json").read_text())["rows"])
    found = [measure(row) for row in rows]
    result = {"machine": describe_machine(), "rows": found}
    (out / "memory.json").write_text(to_json(result, indent=2) + "\n")
    print(to_markdown(found))


if __name__ == "__main__":
    tyro.cli(main)
