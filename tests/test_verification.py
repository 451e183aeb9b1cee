import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psclip_optax as psc
from psclip_optax.engine import norms
from tests.numerics import enable_x64

RANDOM = np.random.default_rng(0)
PARAMS = {
    "in": jnp.asarray(RANDOM.normal(size=(3, 8)), jnp.float32),
    "out": jnp.asarray(RANDOM.normal(size=8), jnp.float32),
}
X = jnp.asarray(RANDOM.normal(size=(12, 3)), jnp.float32)


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["in"]) @ params["out"]) ** 2


def verify(of=loss, x=X, num_samples=4, **options):
    return psc.clipped_value_and_grad(of, 1.0, **options).verify(PARAMS, x, num_samples=num_samples)


OPTIONS = {
    "one pass": {"mode": "one_pass"},
    "two passes": {"mode": "two_pass"},
    "stacked": {"mode": "vmap"},
    "slices": {"microbatch_size": 2},
    "micro-batches": {"microbatch_size": 3, "clip_at": "micro-batch"},
    "micro-batches, the last a short one": {"microbatch_size": 5, "clip_at": "micro-batch"},
    "last axis": {"in_axes": -1},
    "propagated": {"on_nonfinite": "propagate"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_right_is_ok(name):
    result = verify(x=X.T if name == "last axis" else X, **OPTIONS[name])
    assert result.ok is True
    assert result.report is None
    assert [row.parameter for row in result.rows] == ["['in']", "['out']", "norms", "loss"]
    assert all(0 <= row.error < 1e-5 for row in result.rows)
    assert result.mode == OPTIONS[name].get(
        "mode", "micro-batch" if "clip_at" in OPTIONS[name] else "one_pass"
    )


def test_the_table_tells_routes_errors_and_what_was_compared():
    lines = str(verify()).splitlines()
    assert lines[0].startswith("mode one_pass against vmap(grad), 4 samples in float32, tolerance")
    assert lines[1].split() == ["parameter", "route", "largest", "error", "ok"]
    assert lines[3].split()[:2] == ["['in']", "dense"]
    assert lines[3].endswith("yes")


def test_float64_is_taken_where_it_is_on_and_the_loss_takes_it():
    with enable_x64(True):
        assert verify().dtype == "float64"
        assert verify().tolerance < 1e-7
        scan = lambda p, x: jax.lax.scan(
            lambda h, r: (h + r @ p["in"], None), jnp.zeros(8, jnp.float32), x[None]
        )[0].sum()
        assert verify(of=scan).dtype == "float32"


def test_coarser_dtypes_inside_the_loss_have_a_coarser_tolerance():
    half = lambda p, x: loss({n: w.astype(jnp.bfloat16) for n, w in p.items()}, x).astype(
        jnp.float32
    )
    assert verify(of=half).ok
    assert 0.05 < verify(of=half).tolerance < 0.1


def test_aux_and_samples_that_are_not_finite():
    assert verify(of=lambda p, x: (loss(p, x), x), has_aux=True).ok
    assert verify(x=X.at[1].set(jnp.inf)).ok
    assert verify(x=X[:1]).num_samples == 1


def test_what_is_wrong_is_found_and_described(monkeypatch):
    right = norms.squared_norms
    monkeypatch.setattr(norms, "squared_norms", lambda *args: 1.05 * right(*args))
    result = verify(mode="one_pass")
    assert not result.ok
    rows = {row.parameter: row for row in result.rows}
    assert not rows["norms"].ok
    assert rows["norms"].error == pytest.approx(np.sqrt(1.05) - 1, rel=1e-3)
    assert 'take mode="vmap" meanwhile, and report' in str(result)
    report = pathlib.Path(result.report)
    text = report.read_text(encoding="utf-8")
    assert "dot_general" in text
    assert "mode one_pass, 12 samples" in text
    report.unlink()


def test_clipped_grad_has_it_too():
    assert psc.clipped_grad(loss, 1.0).verify(PARAMS, X).ok


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_samples is a positive int"):
        verify(num_samples=0)
    with pytest.raises(ValueError, match="the batch has none"):
        verify(x=X[:0])
    with pytest.raises(TypeError, match="by name"):
        psc.clipped_grad(loss, 1.0).verify(PARAMS, x=X)
    with pytest.raises(ValueError, match="without axis_name"):
        jax.vmap(
            lambda x: psc.clipped_grad(loss, 1.0, axis_name="i").verify(PARAMS, x).ok, axis_name="i"
        )(X[None])
