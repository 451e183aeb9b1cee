"""Check the benchmark of losses that need a special route, at a tiny size."""

import json

import pytest

from benchmarks.common.publishing import RESULTS
from benchmarks.engine import routes


@pytest.mark.slow
def test_each_loss_is_measured_in_each_mode_that_jax_has(tmp_path):
    routes.main(out=tmp_path, rounds=2, quick=True)
    result = json.loads((tmp_path / "routes.json").read_text())
    assert [row["loss"] for row in result["rows"]] == list(routes.NETS)
    for row in result["rows"]:
        wanted = {"plain", *routes.MODES} - ({"vmap"} if row["loss"] == "experts" else set())
        assert set(row["modes"]) == wanted
    assert (tmp_path / "routes.png").stat().st_size > 10_000


def test_no_published_loss_stacks_gradients():
    rows = json.loads((RESULTS / "routes.json").read_text())["rows"]
    assert [row["loss"] for row in rows] == list(routes.NETS)
    for row in rows:
        plain, one_pass = (row["modes"][mode]["bytes"] for mode in ("plain", "one_pass"))
        assert one_pass <= max(2.5 * plain, 0.3 * row["stack"]), row["loss"]
