"""Stores the results of `benchmarks.engine.on_gpu` for one card, and prints its progress."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import time
from typing import Any, NamedTuple

import jax

from benchmarks.common.machine import describe, describe_machine
from psclip_optax.training.output.files import to_json, write_atomically


def say(line: str) -> None:
    """Prints a line at once: buffered output would be lost at the time limit."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Results(NamedTuple):
    """The file of one card's measurements.

    Attributes:
      path: the path of the JSON.
      machine: the machine of new rows.
    """

    path: pathlib.Path
    machine: dict[str, Any]

    @property
    def runs(self) -> pathlib.Path:
        """Opens the cache of training runs, one per line."""
        return self.path.with_suffix(".runs.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.path)

    def add(self, row: dict[str, Any]) -> None:
        """Rewrites the file with this row, which replaces an earlier one."""
        others = [other for other in self.rows() if key(other) != key(row)]
        content = to_json({"rows": [*others, row | {"machine": self.machine}]}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, f"{content}\n".encode())


def results_of_this_card(out: pathlib.Path) -> Results:
    machine = describe_card()
    card = re.sub(r"\W+", "_", machine["device"]).lower()
    return Results(out / f"on_gpu_{card}.json", machine)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["what"], row["name"], row["size"]


def describe_card() -> dict[str, Any]:
    """Describes the machine, with its card's driver if known."""
    platform = jax.devices()[0].client.platform_version
    return describe_machine() | {"driver": driver_version(), "xla_platform": platform}


def driver_version() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else None


def described(machine: dict[str, Any]) -> str:
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return describe(machine).replace(";", driver + ";", 1)
