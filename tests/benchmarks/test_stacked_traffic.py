import json
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.engine.stacked_traffic", "--quick"]
    command += ["--repeats", "3", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "bytes/stack" in run.stdout
    return out


def rows(results):
    return json.loads((results / "stacked_traffic.json").read_text())["rows"]


@pytest.mark.slow
def test_says_on_what_machine_it_measured_every_case(results):
    written = json.loads((results / "stacked_traffic.json").read_text())
    assert {"cpu", "cores", "platform", "device", "jax", "date"} <= written["machine"].keys()
    assert written["machine"]["jax"] == jax.__version__
    assert written["repeats"] == 3
    cases = {(row["dtype"], row["case"]) for row in written["rows"]}
    names = ("mean", "propagate", "drop", "drop, one NaN")
    assert cases == {(dtype, name) for dtype in ("float32", "bfloat16") for name in names}
    for row in written["rows"]:
        for quartiles in (row["seconds_quartiles"], row["ratio_quartiles"]):
            assert len(quartiles) == 3
            assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]
        assert row["bytes_per_stack"] >= 1
        assert row["temporary_per_stack"] >= 0
        assert row["case"] != "mean" or row["ratio_quartiles"] == [1, 1, 1]
    assert (results / "stacked_traffic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="XLA for CPU does not yet fuse a square into its sum, but writes it out",
)
def test_propagate_reads_the_stack_twice(results):
    (row,) = (r for r in rows(results) if (r["dtype"], r["case"]) == ("float32", "propagate"))
    # The result is written, read and written again; a stack is n times as large.
    assert 2 <= row["bytes_per_stack"] < 2 + 4 / row["samples"]
