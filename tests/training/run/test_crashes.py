"""Check that a run killed at any moment resumes to the bits of an uninterrupted run."""

from __future__ import annotations

import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from psclip_optax.training.run.samples import read_samples
from tests.training.processes import assert_all_succeed, command, final_state, records, start

# Every step writes a line and a checkpoint, so most kills occur while one of them is written.
# Dropout, noise and crops, so that all random numbers must be reproduced.
FLAGS = {
    "steps": 60,
    "checkpoint_every": 1,
    "eval_every": 7,
    "dropout": 0.1,
    "label_noise": 0.2,
    "pixel_df": 1.5,
    "augment": True,
    "accumulate": 2,
    "record_samples": True,
}
RESUME = {"resume": True}
NUM_KILLS = int(os.environ.get("PSCLIP_KILLS", "4"))

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert_all_succeed([start(command(out, **FLAGS))])
    return out


@pytest.mark.slow
def test_killed_at_random_moments(uninterrupted: pathlib.Path, tmp_path: pathlib.Path):
    moments = random.Random(0)
    out, killed = tmp_path / "run", 0
    while killed < NUM_KILLS:
        resume = RESUME if (out / "config.json").exists() else {}
        process = start(command(out, **FLAGS, **resume))
        # After the first checkpoint; before that, from the start.
        if moments.random() < 0.8:
            wait_for_a_new_line(out, process)
        time.sleep(moments.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
        elif killed < NUM_KILLS:  # it had finished: start again
            assert_same(out, uninterrupted)
            shutil.rmtree(out)
    resume = RESUME if (out / "config.json").exists() else {}
    assert_all_succeed([start(command(out, **FLAGS, **resume))])
    assert_same(out, uninterrupted)


def wait_for_a_new_line(out: pathlib.Path, process: subprocess.Popen[str]) -> None:
    def size() -> int:
        path = out / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    before, end = size(), time.monotonic() + 120
    while size() <= before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def assert_same(out: pathlib.Path, expected: pathlib.Path) -> None:
    assert records(out) == records(expected)
    chex.assert_trees_all_equal(final_state(out), final_state(expected))
    np.testing.assert_array_equal(*(read_samples(folder / "samples") for folder in (out, expected)))


# Disks


def in_own_mounts(script: str, *arguments: str) -> list[str]:
    """Return a command that runs a shell script in its own mount namespace."""
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments]


def needs_leave_to(mount: str) -> None:
    if not sys.platform.startswith("linux") or subprocess.run(in_own_mounts(mount)).returncode:
        pytest.skip(f"needs leave to mount, as in: {mount}")


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line_and_room_lets_it_go_on(tmp_path: pathlib.Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=6m tmpfs {disk}"
    needs_leave_to(mount)
    flags = {"width": 2.0, "steps": 8, "checkpoint_every": 1}
    first, then = (shlex.join(command(disk / "run", **flags, **more)) for more in ({}, RESUME))
    script = f"""
        {mount} && {first} 2> {tmp_path}/complaint
        echo $? > {tmp_path}/status
        mount -o remount,size=64m {disk} && {then} && cp -r {disk}/run {tmp_path}/resumed
    """
    process = start(in_own_mounts(script))
    process.communicate(timeout=300)
    complaint = (tmp_path / "complaint").read_text()
    assert (tmp_path / "status").read_text() == "2\n"
    assert complaint.count("\n") == 1, complaint
    assert complaint.startswith(f"psclip: error: --out: cannot write to {disk}/run: No space left")
    assert "--resume" in complaint
    assert process.returncode == 0
    assert_all_succeed([start(command(tmp_path / "whole", **flags))])
    assert_same(tmp_path / "resumed", tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_refused_before_work(tmp_path: pathlib.Path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    (folder / "config.json").write_text("theirs")
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
    needs_leave_to(mount)
    process = start(in_own_mounts(f'{mount} && exec "$@"', *command(folder)))
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 2
    assert complaint.startswith("psclip: error: --out: cannot write to ")
    assert "Read-only file system" in complaint
    assert (folder / "config.json").read_text() == "theirs"
