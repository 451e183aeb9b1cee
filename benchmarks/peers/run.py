"""How much does per-sample clipping cost in each library, and do they agree?

    python -m benchmarks.peers

Results are relative to a plain step of the library's framework, with the same weights and batch, in
the same process and round. Prints tables and writes benchmarks/peers/results/peers.json and .png.
Ends with an error if a library's clipped gradients differ from ours. Rows in the JSON are not
measured again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console

from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import load
from benchmarks.common.timing import quartiles
from benchmarks.peers.common import PEERS
from benchmarks.peers.reference import DTYPES, Reference, errors_of, prepare
from benchmarks.peers.report import NOTE, draw, problems, to_errors, to_markdown, to_table
from psclip_optax.training.output.files import write_atomically

Model = Literal["alexnet", "gpt"]
SAMPLES: dict[str, int] = {"alexnet": 32, "gpt": 16}
ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("jaxlib", "flax", "optax", "jax-privacy", "numpy", "torch", "opacus", "fastDP")
WHY_MISSING = {
    "fastDP": "fastDP is not importable; it is not on PyPI",
}


class Task(NamedTuple):
    """One peer on one model."""

    model: str
    samples: int
    peer: str

    def is_in(self, rows: list[dict[str, Any]]) -> bool:
        return any(all(row[k] == v for k, v in self._asdict().items()) for row in rows)


class Options(NamedTuple):
    rounds: int
    time_limit_seconds: float


# One row


def measure(
    task: Task, folder: pathlib.Path, references: dict[str, Reference], options: Options
) -> dict[str, Any]:
    peer = PEERS[task.peer]
    row = task._asdict() | {"framework": peer.framework, "date": describe_machine()["date"]}
    if importlib.util.find_spec(peer.module) is None:
        reason = WHY_MISSING.get(peer.module, f"{peer.module} is not importable")
        return row | {"skipped": reason, "errors": {}}
    for earlier in (*folder.glob("gradients_*.npz"), *folder.glob("report.json")):
        earlier.unlink()
    failure = run_worker(task.peer, folder, options)
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {"losses": {}}
    norms, threshold = references["float32"].norms, np.median(references["float32"].norms)
    row |= {
        "threshold": float(threshold),
        "clipped_share": float(np.mean(norms > threshold)),
        "errors": read_errors(folder, report, references, peer.epsilon),
    }
    if failure is not None:
        row["failed"] = failure
    return row | (figures_of(report) if "seconds" in report else too_slow(report, options))


def run_worker(peer: str, folder: pathlib.Path, options: Options) -> str | None:
    """Runs a worker; returns the end of its output if it failed, else None, also at a timeout."""
    arguments = {
        "--folder": folder,
        "--peer": peer,
        "--rounds": options.rounds,
        "--time-limit-seconds": options.time_limit_seconds,
    }
    command = [sys.executable, "-m", "benchmarks.peers.worker"]
    command += [str(word) for pair in arguments.items() for word in pair]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=options.time_limit_seconds,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or [""]
    return f"ended with status {done.returncode}: {said[-1]}"


def read_errors(
    folder: pathlib.Path, report: dict[str, Any], references: dict[str, Reference], epsilon: float
) -> dict[str, dict[str, float]]:
    errors = {}
    for dtype in DTYPES:
        path = folder / f"gradients_{dtype}.npz"
        if path.exists():
            with np.load(path) as file:
                gradients = {name: file[name] for name in sorted(file)}
            errors[dtype] = errors_of(
                references[dtype], epsilon, report["losses"][dtype], gradients
            )
    return errors


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    plain, clipped = report["seconds"]
    ratios = [own / unit for own, unit in zip(clipped, plain, strict=True)]
    figures: dict[str, Any] = {
        "plain_seconds_quartiles": quartiles(plain),
        "seconds_quartiles": quartiles(clipped),
        "ratio_quartiles": quartiles(ratios),
    }
    for name in ("peak_bytes", "temp_bytes"):
        pair = report.get(name)
        if pair is not None and pair[0]:  # a small step may fit into resident memory
            figures |= {f"plain_{name}": pair[0], name: pair[1], f"{name}_ratio": pair[1] / pair[0]}
    return figures


def too_slow(report: dict[str, Any], options: Options) -> dict[str, Any]:
    limit = f"{options.time_limit_seconds:.0f} s"
    if "first_seconds" not in report:
        return {"skipped": f"no step had ended after {limit}"}
    plain, clipped = report["first_seconds"]
    reason = f"a step took {clipped:.1f} s, so that {options.rounds} rounds take over {limit}"
    return {"skipped": reason, "first_ratio": clipped / plain}


# All rows


def add_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a row in order, replacing one of the same peer and model, whatever its batch."""
    return sorted([*(other for other in rows if slot(other) != slot(row)), row], key=slot)


def slot(row: dict[str, Any]) -> tuple[int, int]:
    return list(SAMPLES).index(row["model"]), list(PEERS).index(row["peer"])


def write(path: pathlib.Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    result = {"settings": settings, "note": NOTE, "rows": rows}
    write_atomically(path, f"{json.dumps(result, indent=2)}\n".encode())


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(
    out: pathlib.Path = pathlib.Path(__file__).parent / "results",
    models: tuple[Model, ...] = ("alexnet", "gpt"),
    peers: tuple[str, ...] = tuple(PEERS),
    samples: dict[str, int] | None = None,
    rounds: int | None = None,
    time_limit_seconds: float = 75,
    quick: bool = False,
    rerun: bool = False,
    markdown: bool = False,
) -> None:
    """Measures the cost of per-sample clipping in each library, and compares the gradients.

    Args:
      out: folder for peers.json and peers.png.
      models: alexnet, gpt or both.
      peers: ours, jax_privacy, jax_privacy_sliced, optax, opacus_ghost, opacus_hooks, fastdp.
      samples: batch sizes that replace 32 and 16, as in --samples alexnet 8 gpt 4.
      rounds: timed rounds; 7 by default.
      time_limit_seconds: the limit for each peer on each model, including start and compilation.
      quick: small models, four samples and few rounds, to check that the benchmark works.
      rerun: also measure what is in the file already.
      markdown: measure nothing; print a Markdown table from the file.
    """
    if markdown:
        print(to_markdown(json.loads((out / "peers.json").read_text())["rows"]))
        return
    unknown = set(peers) - set(PEERS)
    if unknown:
        raise SystemExit(f"--peers are of {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    jax.config.update("jax_platforms", "cpu")
    settings = {
        "machine": describe_machine() | versions(),
        "rounds": rounds or (3 if quick else 7),
        "size": "small" if quick else "full",
    }
    numbers = {**(dict.fromkeys(SAMPLES, 4) if quick else SAMPLES), **(samples or {})}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "peers.json"
    rows = load(path, settings, rerun)
    console = Console()
    if not console.is_terminal:
        console.width = 132  # that of the table
    options = Options(settings["rounds"], time_limit_seconds)
    for model in models:
        tasks = [Task(model, numbers[model], peer) for peer in peers]
        tasks = [task for task in tasks if rerun or not task.is_in(rows)]
        if not tasks:
            continue
        console.print(f"Preparing {model}, n = {numbers[model]}", style="dim")
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            epsilons = {PEERS[task.peer].epsilon for task in tasks}
            references = prepare(folder, model, settings["size"], numbers[model], epsilons)
            for task in tasks:
                start = time.perf_counter()
                row = measure(task, folder, references, options)
                rows = add_row(rows, row)
                write(path, settings, rows)
                console.print(progress(row, time.perf_counter() - start), style="dim")
    machine = settings["machine"]
    console.print(to_table(machine, rows), to_errors(rows))
    draw(machine, rows).savefig(out / "peers.png", dpi=160)
    found = problems(rows)
    if found:
        raise SystemExit("\n".join(found))


def progress(row: dict[str, Any], seconds: float) -> str:
    of = f"{row['model']}, {PEERS[row['peer']].label}"
    if "ratio_quartiles" in row:
        return f"{of}: {row['ratio_quartiles'][1]:.2f} × its plain step ({seconds:.0f} s)"
    return f"{of}: {row.get('failed', row['skipped'])} ({seconds:.0f} s)"
