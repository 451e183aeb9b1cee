"""Run `psclip train` in separate processes, to be killed, starved and compared."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from psclip_optax.training.config.commands import TrainConfig
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.run.checkpoints import open_checkpoints, restore_newest
from psclip_optax.training.run.methods import Hyperparams, method_of_alpha
from psclip_optax.training.run.trainer import build_task_model, build_trainer

SMALL = {"width": 0.05, "batch_size": 16, "steps": 20, "log_every": 1, "checkpoint_every": 5}


def command(out: pathlib.Path, **flags: Any) -> list[str]:
    argv = [sys.executable, "-m", "psclip_optax", "train", "--out", str(out)]
    for name, value in (SMALL | flags).items():
        given = "--" + name.replace("_", "-")
        argv += [given] if value is True else [given, str(value)]
    return argv


def start(argv: list[str]) -> subprocess.Popen[str]:
    # One device each, whatever the environment sets.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    changed = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONUNBUFFERED": "1"}
    environment = os.environ | changed
    return subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_together(number: int, out: pathlib.Path, **flags: Any) -> list[subprocess.Popen[str]]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    shared = {"distributed": True, "coordinator": f"127.0.0.1:{port}", "num_processes": number}
    return [start(command(out, **shared | flags, process_id=i)) for i in range(number)]


def assert_all_succeed(running: list[subprocess.Popen[str]]) -> list[str]:
    """Return the output of each process, once all have succeeded."""
    printed = [process.communicate(timeout=300) for process in running]
    for process, (_, complaint) in zip(running, printed, strict=True):
        assert process.returncode == 0, complaint
    return [output for output, _ in printed]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def records(out: pathlib.Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in parsed]


def final_state(out: pathlib.Path) -> list[np.ndarray]:
    """Return parameters and optimizer state of the newest checkpoint."""
    saved = json.loads((out / "config.json").read_text())["config"]
    folders = {"out": out, "data_dir": None, "cache_dir": None}
    config = TrainConfig(**saved | folders)
    dataset = load_dataset("digits")
    model = build_task_model(config, dataset)
    method = method_of_alpha(config.method, config.alpha)
    trainer = build_trainer(method, model, dataset, config, config.steps)
    with open_checkpoints(out / "checkpoints") as manager:
        state, damaged = restore_newest(manager, trainer.init(0, Hyperparams(1.0, 1.0, 1.0)))
    assert not damaged
    assert int(state.step) == config.steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]
