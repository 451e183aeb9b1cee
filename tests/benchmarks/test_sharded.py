"""Check the traffic of chips that share a model, compiled for a TPU without the hardware."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.engine import layouts, real_models, sharded


def mesh_of(layout):
    devices = np.array(jax.devices()[:4])
    return (
        Mesh(devices, ("data",))
        if layout == "fsdp"
        else Mesh(devices.reshape(2, 2), ("data", "model"))
    )


def specs(model, layout):
    laid = layouts.laid_out(model, mesh_of(layout), 2)
    assert laid.arguments[1].sharding.spec == P("data")
    assert laid.arguments[1].shape[0] == 2 * mesh_of(layout).shape["data"]
    return jax.tree.map(lambda leaf: leaf.sharding.spec, laid.arguments[0])


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_products_are_parted_by_columns_and_what_follows_by_rows():
    block = specs(real_models.gpt2("tiny"), "tensor parallel")["Block_1"]
    assert block["Dense_0"]["kernel"] == P("data", "model")
    assert block["Dense_1"]["kernel"] == P("model", "data")
    assert block["Attention_0"]["Dense_1"]["kernel"] == P("model", "data")
    assert block["LayerNorm_0"]["scale"] == P()
    layers = specs(real_models.llama_1b("tiny"), "tensor parallel")["CheckpointLlamaBlock_0"]
    assert layers["Dense_4"]["kernel"] == P(None, "data", "model")
    assert layers["Dense_5"]["kernel"] == P(None, "model", "data")


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_the_longer_axis_of_a_matrix_is_shared_but_not_that_of_layers():
    layers = specs(real_models.gpt2("tiny", scanned=True), "fsdp")["CheckpointBlock_0"]
    assert layers["Dense_0"]["kernel"] == P(None, None, "data")
    assert layers["Dense_1"]["kernel"] == P(None, "data", None)
    assert layers["Dense_0"]["bias"] == P()


def row(mode, **numbers):
    keys = {"topology": "2x2", "layout": "fsdp", "job": "gpt2", "mode": mode, "fits": True}
    of_plain = {
        "elements": {"all-gather": 1000},
        "bytes": {"all-gather": 2000},
        "temp_bytes": 10**8,
    }
    return keys | of_plain | {"cycles": 5, "compile_seconds": 2.0, "samples": 2} | numbers


def test_what_is_sent_is_less_what_norms_take():
    own = row(
        "by_layer",
        elements={"all-gather": 1100, "all-reduce": 128},
        groups=2,
        temp_bytes=15 * 10**7,
    )
    too_large = {**row("two_pass"), "fits": False}
    by_layer, unknown = sharded.with_ratios([row("plain", groups=0), own, too_large])
    expected = {"sent": 1.1, "bytes": 1.0, "memory": 1.5, "cycles": 1.0, "compile": 1.0}
    assert by_layer["ratios"] == pytest.approx(expected)
    assert unknown["ratios"] == {}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip(
        "libtpu", reason="compiles for a TPU: pip install 'psclip_optax[accelerators]'"
    )
    out = tmp_path_factory.mktemp("sharded")
    chosen: dict[str, Any] = {
        "topology": ("2x2",),
        "layout": ("fsdp",),
        "model": ("gpt2_scanned",),
        "mode": ("one_pass",),
    }
    sharded.main(out, **chosen, quick=True)
    return out, chosen


def test_a_small_model_is_compiled_for_four_chips(compiled):
    out, _ = compiled
    result = json.loads((out / "sharded.json").read_text())
    (one,) = result["ratios"]
    assert (one["mode"], one["samples"]) == ("one_pass", 8)
    assert 0.5 < one["ratios"]["sent"] <= 1.1
    assert (out / "sharded.png").stat().st_size > 1000


def test_what_was_compiled_is_not_compiled_again(compiled, monkeypatch):
    out, chosen = compiled
    monkeypatch.setattr(sharded, "measure", lambda *_: pytest.fail("compiled again"))
    sharded.main(out, **chosen, quick=True)
