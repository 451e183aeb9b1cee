"""Does the engine agree with vmap(grad) on the models of other libraries?

    .ci/third_party [--libraries NAME…]

Every library is installed into a separate environment, with the newest JAX that it supports, and
its models run in a separate process. Prints the table and writes
benchmarks/results/third_party.json. Ends with an error if a gradient is wrong. Libraries in the
JSON are not tried again.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common.machine import describe_machine
from benchmarks.third_party.libraries import LIBRARIES, Library
from benchmarks.third_party.report import summarise, to_markdown
from benchmarks.third_party.worker import rows_in
from psclip_optax.training.output.files import write_atomically

ROOT = pathlib.Path(__file__).parents[2]
VERSIONS = (
    "import importlib.metadata, json, sys;"
    "print(json.dumps([importlib.metadata.version(name) for name in sys.argv[1:]]))"
)


def tried(library: Library, folder: pathlib.Path, time_limit_seconds: float) -> dict[str, Any]:
    """Builds the record of a library: its versions, and a row for each of its models."""
    start = time.perf_counter()
    record: dict[str, Any] = {"library": library.distribution, "models_of": library.models}
    if library.why:
        record["why"] = library.why
    python = folder / "bin" / "python"
    failure = installed(library, folder)
    if failure is not None:
        return record | {"failed": failure, "rows": []}
    done = subprocess.run(
        [python, "-c", VERSIONS, library.distribution, "jax"], capture_output=True, text=True
    )
    record["version"], record["jax"] = json.loads(done.stdout)
    rows = run_worker(python, library, folder / "rows.jsonl", time_limit_seconds)
    if not rows:
        record["failed"] = "its models cannot be imported"
    seconds = round(time.perf_counter() - start)
    return record | {"seconds": seconds, "date": describe_machine()["date"], "rows": rows}


def installed(library: Library, folder: pathlib.Path) -> str | None:
    """Installs a library; returns None, or the reason for a failure."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    done = subprocess.run(
        [*install, "--editable", ROOT, *library.requirements],
        capture_output=True,
        text=True,
    )
    said = done.stderr.strip().splitlines() or [""]
    return None if done.returncode == 0 else said[-1].strip()


def run_worker(
    python: pathlib.Path, library: Library, path: pathlib.Path, time_limit_seconds: float
) -> list[dict[str, Any]]:
    """Collects the rows of all models; if one ends the process, another process continues."""
    command = [python, "-W", "ignore", "-m", "benchmarks.third_party.worker", library.models, path]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    before = -1
    while len(rows := rows_in(path)) > before:
        before = len(rows)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=time_limit_seconds,
            )
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            break
        print(done.stderr[-2000:], file=sys.stderr)
    return list(rows_in(path).values())


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["libraries"] if path.exists() else []


def write(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    result = {"machine": describe_machine(), "summary": summarise(records), "libraries": records}
    write_atomically(path, f"{json.dumps(result, indent=1)}\n".encode())


def add_record(records: list[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a record, in the order of LIBRARIES."""
    order = [library.models for library in LIBRARIES]
    others = [other for other in records if other["models_of"] != record["models_of"]]
    return sorted([*others, record], key=lambda record: order.index(record["models_of"]))


def main(
    out: pathlib.Path = ROOT / "benchmarks" / "results",
    libraries: tuple[str, ...] = tuple(library.models for library in LIBRARIES),
    rerun: bool = False,
    time_limit_seconds: float = 1200,
) -> None:
    """Compares the engine with vmap(grad) on the models of other libraries.

    Args:
      out: folder for third_party.json.
      libraries: names of files in benchmarks/third_party/models; all by default.
      rerun: also try libraries that are in the file already.
      time_limit_seconds: the limit for all models of one library.
    """
    path = out / "third_party.json"
    records = load(path)
    done = set() if rerun else {record["models_of"] for record in records}
    for library in LIBRARIES:
        if library.models not in libraries or library.models in done:
            continue
        print(f"Trying {library.models}", flush=True)
        folder = pathlib.Path(tempfile.mkdtemp())
        try:
            record = tried(library, folder, time_limit_seconds)
        finally:
            shutil.rmtree(folder)
        records = add_record(records, record)
        write(path, records)
    print(to_markdown(records))
    if summarise(records)["outcomes"].get("wrong"):
        raise SystemExit("A gradient is wrong; see the table.")
