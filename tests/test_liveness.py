"""Compare estimates of temporary memory with hand counts and with XLA's compilers."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import psclip_optax as psc
from benchmarks.common.publishing import RESULTS
from benchmarks.engine import memory
from benchmarks.engine.accelerators import JOBS
from psclip_optax.engine.liveness import peak_bytes

KB = 1024
GUIDE = " ".join((RESULTS.parents[1] / "docs/pages/guide/engine.md").read_text("utf-8").split())
SQUARE = jax.ShapeDtypeStruct((16, 16), jnp.float32)  # 1 KB


def peak(function, *arguments, is_tpu=True):
    return peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr, is_tpu=is_tpu)


def test_arguments_results_and_what_nothing_needs_are_not_temporary():
    assert peak(lambda x: x @ x, SQUARE) == 0
    assert peak(lambda x: (x @ x, jnp.sort(x))[0], SQUARE) == 0


def test_products_are_held_until_they_are_read():
    assert peak(lambda x: (x @ x) @ x, SQUARE) == KB
    assert peak(lambda x: (x @ x) @ (x @ x.T), SQUARE) == 2 * KB


def test_what_is_computed_by_elements_is_fused_into_its_reader():
    assert peak(lambda x: jnp.exp(jnp.sin(x)) @ x, SQUARE) == 0
    # The elementwise result is written in the product's place.
    assert peak(lambda x: jnp.sin(x @ x) @ x, SQUARE) == KB
    # The sum is written in the place of the second product; the first one is held until then.
    twice = lambda x, a: (lambda y: (y @ a, a @ y))((x @ x) @ a + (x @ a) @ x)
    assert peak(twice, SQUARE, SQUARE) == 2 * KB


def test_a_narrow_product_is_not_written_wide():
    def wide(x):
        y = lax.dot(x, x)
        return jnp.broadcast_to(jnp.sin(y)[..., None], (16, 16, 8)).sum((0, 1)) @ jnp.ones((8, 8))

    assert peak(wide, SQUARE) <= 2 * KB


def test_a_loop_works_in_the_place_of_its_carry():
    def looped(x):
        return lax.scan(lambda c, _: (jnp.sin(c @ c), None), jnp.zeros_like(x), length=3)[0]

    assert peak(looped, SQUARE) == 0  # the carry is the result
    assert peak(lambda x: looped(x) @ x, SQUARE) == KB
    stacked = lambda x: lax.scan(lambda c, _: (c @ x, c @ x), x, length=3)[1] @ x
    assert peak(stacked, SQUARE) == (3 + 1) * KB


def test_the_largest_branch_counts():
    def chosen(x):
        return lax.cond(x[0, 0] > 0, lambda x: ((x @ x) @ x) @ x, lambda x: x, x)

    assert peak(chosen, SQUARE) == pytest.approx(2 * KB, abs=16)


@pytest.mark.parametrize(("fuses", "expected"), [(True, 0), (False, 256 * KB)])
def test_a_scatter_of_entries_is_a_comparison_on_a_tpu(fuses, expected):
    def picked(logits, labels):
        one_hot = jnp.zeros_like(logits).at[jnp.arange(64), labels].add(1.0)
        return (one_hot * logits).sum(1) @ jnp.ones((64, 64))

    arguments = (
        jax.ShapeDtypeStruct((64, 1024), jnp.float32),
        jax.ShapeDtypeStruct((64,), jnp.int32),
    )
    assert peak(picked, *arguments, is_tpu=fuses) == pytest.approx(expected, abs=2 * KB)


@pytest.mark.parametrize(
    ("job", "target"),
    [
        ("zoo_gpt_scanned", "h100"),
        ("zoo_lstm", "h100"),
        ("zoo_dilated_cnn", "h100"),
        ("gpt2_scanned", "v5e"),
    ],
)
def test_one_pass_is_within_15_percent_of_what_compilers_report(job, target):
    rows = memory.compared(json.loads((RESULTS / "accelerators.json").read_text())["rows"])
    (row,) = (
        row for row in rows if (row["job"], row["target"], row["mode"]) == (job, target, "one_pass")
    )
    estimate = memory.estimate(JOBS[job](False), target, "one_pass")
    assert estimate == pytest.approx(row["temp_bytes"], rel=0.15)


def test_the_published_estimates_are_todays():
    result = json.loads((RESULTS / "memory.json").read_text())
    rows = result["rows"]
    compiled = json.loads((RESULTS / "accelerators.json").read_text())["rows"]
    named = lambda row: (row["target"], row["job"], row["mode"])
    assert list(map(named, rows)) == list(map(named, memory.compared(compiled)))
    ratios = [row["ratio"] for row in rows if row["mode"] == "one_pass"]
    assert f"it is {min(ratios):.2f} to {max(ratios):.2f} of what the compilers report" in GUIDE
    if result["machine"]["jax"] != jax.__version__:
        return  # which traces other programs
    row = next(row for row in rows if row["job"] == "zoo_lstm")
    today = memory.estimate(JOBS["zoo_lstm"](False), row["target"], row["mode"])
    assert today == row["estimated_bytes"]


def test_auto_goes_by_the_traced_pass():
    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return (x**2).sum()

    params, x = [jnp.ones((64, 64))] * 4, jnp.ones((512, 64))
    f = psc.clipped_grad(loss, 1.0, mode="one_pass")
    temporary = peak(f, params, x, is_tpu=False)
    held = 2 * 4 * 64 * 64 * 4 + x.nbytes
    for share, mode in ((0.9, "two_pass"), (1.3, "one_pass")):
        limited = psc.clipped_grad(loss, 1.0, memory_limit_bytes=held + int(share * temporary))
        assert limited.explain(params, x).mode == mode
