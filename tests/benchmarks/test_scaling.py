import functools
import json
from unittest import mock

import pytest

from benchmarks.engine import scaling


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    built_once = {name: functools.cache(build) for name, build in scaling.ZOO.items()}
    with mock.patch.object(scaling, "ZOO", built_once):
        scaling.main(out=out, quick=True)
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "scaling.json").read_text())


def row_of(result, model, mode, devices):
    [row] = [
        row
        for row in result["rows"]
        if (row["model"], row["mode"], row["devices"]) == (model, mode, devices)
    ]
    return row


@pytest.mark.slow
@pytest.mark.parametrize("model", scaling.SAMPLES_PER_DEVICE)
def test_a_plain_gradient_sends_its_parameters_once(result, model):
    assert row_of(result, model, "plain", 1)["bytes_sent"] == 0
    row = row_of(result, model, "plain", 8)
    # And the loss; the two gradients of a tied table are summed over devices separately.
    assert row["parameter_bytes"] <= row["bytes_sent"] <= 1.2 * row["parameter_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("model", scaling.SAMPLES_PER_DEVICE)
def test_clipping_sends_and_computes_little_more(result, model):
    row = row_of(result, model, "one_pass", 8)
    assert row["bytes_sent_ratio"] < 1.05
    assert 0.9 < row["flops_ratio"] < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("model", scaling.SAMPLES_PER_DEVICE)
def test_efficiency_is_the_formula_by_hand(result, model):
    assumed = result["assumptions"]
    plain, ours = (row_of(result, model, mode, 8) for mode in ("plain", "one_pass"))
    [curve] = [c for c in result["simulated"] if (c["model"], c["mode"]) == (model, "one_pass")]
    seconds = (
        ours["flops"] / assumed["flops_per_second"]
        + 2 * 3 / 4 * ours["bytes_sent"] / assumed["bytes_per_second"]
        + 2 * 2 * assumed["seconds_per_message"]
    )
    expected = plain["flops"] / assumed["flops_per_second"] / seconds
    assert curve["efficiency"][curve["devices"].index(4)] == pytest.approx(expected)


def test_too_few_devices_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling.jax, "device_count", lambda: 2)
    with pytest.raises(
        SystemExit, match=r"JAX_NUM_CPU_DEVICES=8 python -m benchmarks.engine.scaling"
    ):
        scaling.main(out=tmp_path)
