"""Compares the models of one library, in a separate process and environment.

    python -m benchmarks.third_party.worker LIBRARY ROWS.jsonl [MODEL…]

`benchmarks.third_party.run` starts it. A row is written before and after each model, so that a
model that ends the process is known; a later call continues with the next.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
import time
from typing import Any

from benchmarks.third_party.common import Model

ENDED = {"outcome": "failed", "stage": "process", "message": "it ended before the model did"}


def rows_in(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads the last row of each model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def write(path: pathlib.Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main(library: str, path: pathlib.Path, chosen: list[str]) -> None:
    from benchmarks.third_party.compare import compare  # after the module may have configured JAX

    module = importlib.import_module(f"benchmarks.third_party.models.{library}")
    models: dict[str, Model] = module.MODELS
    done = rows_in(path)
    for name, model in models.items():
        if name in done or (chosen and name not in chosen):
            continue
        write(path, {"model": name} | ENDED)
        start = time.perf_counter()
        row = {"model": name} | compare(model)
        row["seconds"] = round(time.perf_counter() - start, 1)
        write(path, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:])
