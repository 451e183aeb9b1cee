"""Check that finished runs are found again after interruptions and concurrent writes."""

import json
import multiprocessing
import pathlib

import pytest

from benchmarks.common.cache import RunsCache, digest


@pytest.fixture
def cache(tmp_path):
    return RunsCache(tmp_path / "results" / "test.runs.jsonl")


def add_many(path: pathlib.Path, writer: int) -> None:
    cache = RunsCache(path)
    for seed in range(20):
        cache.add({"seed": seed}, {"writer": writer})
        cache.add({"seed": seed, "writer": writer}, {"long": "x" * 10_000})


def test_runs_are_done_once_and_kept_in_ascii(cache):
    run, found = {"method": "α = 1", "rate": 0.1}, {"loss": float("inf"), "curve": [0.1, None]}
    assert run not in cache
    assert cache.once(run, lambda: found) == found
    again = RunsCache(cache.path)
    assert again.once(dict(reversed(run.items())), lambda: pytest.fail("again")) == found
    assert again.records() == [run | found]
    (line,) = cache.path.read_text("ascii").splitlines()
    assert json.loads(line) == {"digest": digest(run), "run": run, "found": found}


def test_what_another_adds_is_found(cache):
    assert {"seed": 1} not in cache
    RunsCache(cache.path).add({"seed": 1}, {"loss": 1.0})
    assert cache[{"seed": 1}] == {"loss": 1.0}


def test_a_torn_last_line_is_no_run_and_goes_with_the_next(cache):
    cache.add({"seed": 1}, {"loss": 1.0})
    whole = cache.path.read_text()
    for torn in (whole[:-1], whole[:9], "{"):
        cache.path.write_text(whole + torn.replace('"seed": 1', '"seed": 2'))
        reader = RunsCache(cache.path)
        assert {"seed": 2} not in reader
        assert reader.records() == [{"seed": 1, "loss": 1.0}]
        reader.add({"seed": 2}, {"loss": 2.0})
        assert RunsCache(cache.path).records() == [{"seed": n, "loss": n} for n in (1, 2)]
        assert len(cache.path.read_text().splitlines()) == 2


def test_the_first_of_lines_with_the_same_digest_counts(cache):
    cache.add({"seed": 1}, {"loss": 1.0})
    line = cache.path.read_text()
    cache.path.write_text(line + line.replace("1.0", "2.0"))
    assert RunsCache(cache.path).records() == [{"seed": 1, "loss": 1.0}]
    cache.add({"seed": 1}, {"loss": 3.0})
    assert cache[{"seed": 1}] == {"loss": 1.0}
    assert len(cache.path.read_text().splitlines()) == 2


def test_a_broken_line_between_others_is_told(cache):
    cache.add({"seed": 1}, {"loss": 1.0})
    cache.path.write_text("{\n" + cache.path.read_text())
    with pytest.raises(json.JSONDecodeError):
        RunsCache(cache.path).records()


def test_processes_write_to_one_file(cache):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=add_many, args=(cache.path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in cache.path.read_text("ascii").splitlines()]
    assert len(lines) == len({line["digest"] for line in lines}) == 80
