import math
import os
from concurrent import futures

import pytest

from tests.fuzz import command
from tests.fuzz.check import SOURCE
from tests.random_programs import source as random_programs


def test_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = []

    def outcome_of(source, seed, worker):
        ran.append(seed)
        message = {1: "one_pass, clipped: inf", 3: "no reference: XLA aborts"}.get(seed, "")
        return command.Outcome(
            seed, "float64", 30, ("one_pass",), not message, math.inf if message else 1e-12,
            0.5, {"dense": 2}, message,
        )  # fmt: skip

    monkeypatch.setattr(command, "outcome_of", outcome_of)
    main = command.main_of(SOURCE)
    out = tmp_path / "programs.jsonl"
    main(count=2, out=out)
    out.write_text(out.read_text() + '{"seed": 2, "mix')  # cut off while being written
    main(count=4, out=out)
    assert ran == [0, 1, 2, 3]
    shown = capsys.readouterr().out
    assert "seed 1: one_pass, clipped: inf" in shown
    assert "seed 3" not in shown
    assert "dense" in shown


@pytest.mark.parametrize("source", [SOURCE, random_programs.SOURCE])
def test_an_abort_of_xla_is_an_outcome(source):
    def both_abort(function, seed):
        raise futures.BrokenExecutor

    def ours_aborts(function, seed):
        if function is source.check:
            raise futures.BrokenExecutor

    assert not command.outcome_of(source, 3, both_abort).has_reference
    outcome = command.outcome_of(source, 3, ours_aborts)
    assert outcome.has_reference
    assert not outcome.ok


def test_failures_are_of_a_kind_whatever_their_numbers():
    one, other = (
        command.Outcome(1, "float64", 3, (), False, 1.0, 0.1, {}, f"two_pass, gradient: {error}")
        for error in ("0.13", "2.1e-06")
    )
    assert command.kind_of(one) == command.kind_of(other) == "two_pass, gradient: #"


def test_the_worker_outlives_an_abort():
    with command.Worker() as worker:
        with pytest.raises(futures.BrokenExecutor):
            worker(os._exit, 6)
        assert worker(abs, -6) == 6
