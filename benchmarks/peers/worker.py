"""Measures one peer on one model, in a separate process.

`benchmarks.peers.run` starts it: JAX's and PyTorch's threads would disturb each other in one
process, and a process can be ended at the time limit. Results are written at once, so that they are
not lost then.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro

from benchmarks.peers.common import PEERS, Inputs, Steps

STATUS = pathlib.Path("/proc/self/status")
CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")


def measure(folder: pathlib.Path, peer: str, rounds: int, time_limit_seconds: float) -> None:
    """Writes report.json and, per dtype, the clipped gradients.

    Args:
      folder: the folder of the inputs, float32.npz and float64.npz.
      peer: a key of PEERS.
      rounds: timed calls of the plain and the clipped step, in turn.
      time_limit_seconds: after the first call, nothing more is timed if all calls would take
          longer.
    """
    start = time.perf_counter()
    steps = build(peer, folder / "float32.npz", with_plain=True)
    plain, clipped = steps.plain, steps.clipped
    assert plain is not None
    report: dict[str, Any] = {"temp_bytes": steps.temp_bytes, "losses": {}}
    plain_seconds = timed(plain)[1]
    result, clipped_seconds = timed(clipped)
    report["first_seconds"] = [plain_seconds, clipped_seconds]
    record(folder, report, "float32", steps, result)
    del result
    left = time_limit_seconds - (time.perf_counter() - start)
    if rounds * (plain_seconds + clipped_seconds) > left:
        return
    report["seconds"] = time_rounds(plain, clipped, rounds)
    report["peak_bytes"] = []
    for step in (plain, clipped):
        steps.clear()
        report["peak_bytes"].append(peak_bytes(step))
    write(folder, report)
    check_in_float64(folder, peer, report)


def build(peer: str, inputs: pathlib.Path, with_plain: bool) -> Steps:
    if PEERS[peer].framework == "jax":
        from benchmarks.peers import jax_peers as peers
    else:
        from benchmarks.peers import torch_peers as peers
    return peers.build(peer, Inputs.load(inputs), with_plain)


def check_in_float64(folder: pathlib.Path, peer: str, report: dict[str, Any]) -> None:
    if PEERS[peer].framework == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)  # only now: timing uses the defaults
    steps = build(peer, folder / "float64.npz", with_plain=False)
    record(folder, report, "float64", steps, steps.clipped())


def record(
    folder: pathlib.Path, report: dict[str, Any], dtype: str, steps: Steps, result: Any
) -> None:
    report["losses"][dtype] = steps.loss(result)
    save(folder, dtype, steps.gradients(result))
    write(folder, report)


def timed(step: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = step()
    return result, time.perf_counter() - start


def time_rounds(
    plain: Callable[[], Any], clipped: Callable[[], Any], rounds: int
) -> list[list[float]]:
    """Times the plain and the clipped step in turn, [2][rounds]."""
    pairs = [(timed(plain)[1], timed(clipped)[1]) for _ in range(rounds)]
    return [list(seconds) for seconds in zip(*pairs, strict=True)]


def peak_bytes(step: Callable[[], Any]) -> int | None:
    """Measures how much the resident memory rises during a step; None without Linux."""
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide the rise
    CLEAR_REFS.write_text("5")  # resets the peak to the present value
    before = resident_bytes("VmRSS")
    result = step()
    risen = resident_bytes("VmHWM") - before
    del result
    return risen


def resident_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def write(folder: pathlib.Path, report: dict[str, Any]) -> None:
    replace(folder / "report.json", lambda path: path.write_text(json.dumps(report)))


def save(folder: pathlib.Path, dtype: str, gradients: dict[str, Any]) -> None:
    def save_to(path: pathlib.Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **gradients)

    replace(folder / f"gradients_{dtype}.npz", save_to)


def replace(path: pathlib.Path, write_to: Callable[[pathlib.Path], Any]) -> None:
    # Written atomically: the process may be ended meanwhile.
    unfinished = path.with_suffix(".tmp")
    write_to(unfinished)
    os.replace(unfinished, path)


if __name__ == "__main__":
    tyro.cli(measure)
