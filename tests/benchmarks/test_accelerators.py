"""Check the costs of programs compiled for accelerators, read from their text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.common import hlo
from benchmarks.engine import accelerators

# One of each counted kind: a loop with six steps by the constant of its comparison, one with a
# known count of two, one of unknown length, a branch, and collectives.
TEXT = """\
HloModule a

%f (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"10"}
}

%bound (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %six = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%p, %six), direction=LT
}

%unbound (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  ROOT %less = pred[] compare(%p, %p), direction=LT
}

ENTRY %main (x: f32[8], y: bf16[4,2]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  %known = f32[8]{0} while(%x), condition=%bound, body=%body
  %counted = f32[8]{0} while(%x), condition=%unbound, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %unknown = f32[8]{0} while(%x), condition=%unbound, body=%body
  %chosen = f32[8]{0} conditional(%x, %x), branch_computations={%body, %body}
  %sum = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%known, %y), to_apply=%add
  %gathered = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %scattered = f32[2]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %copy = f32[8]{0} copy(%known), backend_config={"estimated_cycles":"3"}
}
"""


def test_loops_count_by_their_steps():
    assert hlo.tpu_cycles(TEXT) == (6 + 2 + 1) * 10 + 3


def test_kernels_and_their_bytes_are_counted():
    cost = hlo.gpu_cost(TEXT)
    assert cost.kernels == 6 + 2 + 1 + 1
    assert cost.bytes == 10 * (32 + 32)
    assert cost.waits == 3


def test_elements_are_those_of_the_larger_end():
    sent = hlo.elements_sent(TEXT)
    assert sent == {"all-reduce": 8 + 8, "all-gather": 32, "reduce-scatter": 4 * 2}


# As on a TPU whose chips send parts of a matrix around a ring while they multiply.
WINDOWED = """\
HloModule w

%below (state: (f32[8], u32[], u32[])) -> pred[] {
  %end = u32[]{:T(128)} constant(7)
  %state = (f32[8]{0}, u32[], /*index=2*/u32[]) parameter(0)
  %counter = u32[] get-tuple-element(%state), index=2
  ROOT %less = pred[] compare(%counter, %end), direction=LT
}

%body (state: (f32[8], u32[], u32[])) -> (f32[8], u32[], u32[]) {
  %state = (f32[8]{0}, u32[], u32[]) parameter(0)
  %five = u32[]{:T(128)} constant(5)
  %two = u32[]{:T(128)} constant(2)
  %part = f32[8]{0} get-tuple-element(%state), index=0
  %counter = u32[] get-tuple-element(%state), index=2
  %other = u32[] add(%counter, %five)
  %next = u32[] add(%counter, %two)
  %sent = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%part), channel_id=1
  %received = f32[8]{0} collective-permute-done(%sent)
  ROOT %state.1 = (f32[8]{0}, u32[], /*index=2*/u32[]) tuple(%received, %other, /*index=2*/%next)
}

ENTRY %main (x: (f32[8], u32[], u32[])) -> (f32[8], u32[], u32[]) {
  %x = (f32[8]{0}, u32[], u32[]) parameter(0)
  ROOT %end = (f32[8]{0}, u32[], u32[]) while(%x), condition=%below, body=%body
}
"""


def test_counters_may_grow_by_more_than_one():
    # 0, 2, 4 and 6 are below 7; each step sends 8 elements, and two numbers to itself.
    assert hlo.elements_sent(WINDOWED) == {"collective-permute": 4 * 8}


# As on a TPU: a reduce-scatter is a fusion, and a collective during products is sent in steps, each
# a fusion of one chain.
FUSED = """\
HloModule b

%all-reduce-scatter.1 (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %sum = bf16[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
  ROOT %own = bf16[2,4]{1,0} dynamic-slice(%sum, %i), dynamic_slice_sizes={2,4}
}

%start (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  ROOT %sent = f32[16]{0} all-gather(%p), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
}

%end (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  ROOT %sent = f32[16]{0} all-gather(%p), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[8,4], y: f32[4]) -> bf16[2,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %one = f32[16]{0} fusion(%y), kind=kCustom, calls=%start
  %two = f32[16]{0} fusion(%y), kind=kCustom, calls=%end
  %rest = f32[2]{0} reduce-scatter(%y), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  ROOT %own = bf16[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_what_fusions_send_is_counted_once():
    assert hlo.elements_sent(FUSED) == {"all-gather": 16, "reduce-scatter": 2 * 2 + 32}
    assert sum(one.bytes for one in hlo.sent(FUSED)) == 4 * (16 + 2 * 2) + 2 * 32


def test_a_program_of_this_jax_is_read():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))

    def summed(x):
        step = lambda carry, _: (jnp.sin(carry) + x.sum(), None)
        return lax.scan(step, jnp.zeros(()), None, length=5)[0]

    x = jax.device_put(jnp.ones((4, 3)), sharded)
    text = jax.jit(summed).lower(x).compile().as_text()
    assert sum(hlo.elements_sent(text or "").values()) in (1, 5)  # in the loop or before it


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip(
        "libtpu", reason="compiles for a TPU: pip install 'psclip_optax[accelerators]'"
    )
    out = tmp_path_factory.mktemp("accelerators")
    chosen = {"target": ("v5e",), "model": ("alexnet", "gpt2_scanned"), "mode": ("one_pass",)}
    accelerators.main(out, **chosen, quick=True)
    return out, chosen


def test_small_models_are_compiled_for_a_tpu(compiled):
    out, _ = compiled
    result = json.loads((out / "accelerators.json").read_text())
    assert [row["mode"] for row in result["ratios"]] == ["one_pass"] * 2
    for row in result["ratios"]:
        assert row["ratios"]["cycles"] > 0.5
        assert row["ratios"]["waits"] == 0
    assert (out / "accelerators.png").stat().st_size > 1000


def test_what_was_compiled_is_not_compiled_again(compiled, monkeypatch):
    out, chosen = compiled
    monkeypatch.setattr(accelerators, "measure", lambda *_: pytest.fail("compiled again"))
    accelerators.main(out, **chosen, quick=True)


def test_rows_wait_for_the_plain_gradient_that_is_compiled_again():
    cost = {"fits": True, "cycles": 6, "temp_bytes": 2**23, "compile_seconds": 2.0, "waits": 0}
    rows = [{"target": "v5e", "job": "a", "mode": mode, **cost} for mode in ("plain", "one_pass")]
    (row,) = accelerators.with_ratios(rows)
    assert row["ratios"] == {"cycles": 1, "compile_seconds": 1, "memory": 1, "waits": 0}
    assert accelerators.with_ratios(rows[1:]) == []
