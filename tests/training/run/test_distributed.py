"""Check that several processes train like one, and that none waits forever for a lost one."""

from __future__ import annotations

import pathlib
import signal
import time

import chex
import numpy as np
import pytest

from psclip_optax.training.output.files import held_alone
from tests.training.processes import (
    SMALL,
    assert_all_succeed,
    command,
    final_state,
    records,
    start,
    start_together,
    wait_until,
)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert_all_succeed([start(command(out))])
    return out


def assert_same_run(out: pathlib.Path, expected: pathlib.Path):
    # Sums over processes have another order: equal up to rounding.
    chex.assert_trees_all_close(final_state(out), final_state(expected), rtol=1e-4, atol=1e-6)
    got, want = records(out), records(expected)
    assert [(r["kind"], r["step"]) for r in got] == [(r["kind"], r["step"]) for r in want]
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        counts = [r.pop("norm_histogram", {}) for r in (a, b)]
        assert sum(counts[0].values()) == sum(counts[1].values())
        words = {k for k, value in a.items() if value is None or isinstance(value, str)}
        assert all(a[k] == b[k] for k in words)
        numbers = [k for k in a if k not in words]
        np.testing.assert_allclose(*([r[k] for k in numbers] for r in (a, b)), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_processes_train_as_one(number: int, alone: pathlib.Path, tmp_path: pathlib.Path):
    printed = assert_all_succeed(start_together(number, tmp_path))
    assert "Test accuracy" in printed[0]
    for output in printed[1:]:  # except for messages of the communication library
        assert all(line.startswith("[Gloo]") for line in output.splitlines())
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "who"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)]
)
def test_a_lost_process_ends_the_run_and_one_process_goes_on_from_its_checkpoint(
    how: signal.Signals, who: int, alone: pathlib.Path, tmp_path: pathlib.Path
):
    running = start_together(2, tmp_path, checkpoint_every=1, distributed_timeout=10)
    wait_until(lambda: (tmp_path / "checkpoints" / "3" / "digests.json").exists())
    running[who].send_signal(how)
    lost = time.monotonic()
    left = running[1 - who]
    _, complaint = left.communicate(timeout=120)
    assert time.monotonic() - lost < 60
    assert left.returncode != 0
    ours = f"psclip: error: process {1 - who} of 2: another one ended or does not answer"
    # If JAX's coordination service notices first, it ends the process with its own message.
    assert (ours in complaint and "--resume" in complaint) or "another task died" in complaint
    running[who].kill()
    running[who].communicate()
    assert records(tmp_path)[-1]["step"] < SMALL["steps"]
    assert_all_succeed([start(command(tmp_path, resume=True))])
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_the_number_of_processes_may_change(alone: pathlib.Path, tmp_path: pathlib.Path):
    running = start(command(tmp_path, checkpoint_every=1))
    wait_until(lambda: (tmp_path / "checkpoints" / "3" / "digests.json").exists())
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert_all_succeed(start_together(2, tmp_path, resume=True))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_a_process_that_stays_alone_says_so(tmp_path: pathlib.Path):
    started = time.monotonic()
    first, second = start_together(2, tmp_path, distributed_timeout=5)
    first.kill()
    first.communicate()
    _, complaint = second.communicate(timeout=120)
    assert time.monotonic() - started < 100
    assert second.returncode != 0
    assert "--distributed" in complaint or "distributed service" in complaint
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_all_processes_end_where_another_run_is_writing(tmp_path: pathlib.Path):
    with held_alone(tmp_path):
        complaints = []
        for process in start_together(2, tmp_path):
            complaints.append(process.communicate(timeout=120)[1])
            assert process.returncode == 2
    assert f"another psclip is writing to {tmp_path}" in complaints[0]
    assert f"the first process may not write to {tmp_path}, and says why" in complaints[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_batch_that_devices_cannot_share_is_refused(tmp_path: pathlib.Path):
    running = start_together(2, tmp_path, batch_size=15)
    for process in running:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 2
        assert (
            "--batch-size: expected a multiple of the 2 devices of 2 processes, got 15" in complaint
        )
    assert not (tmp_path / "config.json").exists()
