"""Check dynamic slices that start out of bounds, which JAX clamps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import psclip_optax as psc
from psclip_optax.engine.analysis import slices_in_bounds
from tests.numerics import assert_close, in_all_modes

TABLE = jax.random.normal(jax.random.key(0), (4, 3))
STARTS = jnp.array([-7, -1, 0, 3, 4, 9])
LOSSES = {
    "slice": lambda w, i: jnp.sin(lax.dynamic_slice(w, (i, 0), (2, 3))).sum(),
    "index": lambda w, i: jnp.sin(w[i]).sum(),
    "in a scan": lambda w, i: lax.scan(
        lambda c, j: (jnp.sin(c + w[j]), None), jnp.zeros(3), i + jnp.arange(3)
    )[0].sum(),
    "in a branch": lambda w, i: lax.cond(
        i > 3, lambda: jnp.sin(w[i]).sum(), lambda: jnp.cos(w[i]).sum()
    ),
}


def means_of_one_after_the_other(loss):
    gradients = [jax.grad(loss)(TABLE, i) for i in STARTS]
    return np.mean(gradients, axis=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_one_sample_after_the_other(name):
    expected = means_of_one_after_the_other(LOSSES[name])
    for _, gradient, _ in in_all_modes(LOSSES[name], 1e6)(TABLE, STARTS).values():
        assert_close(gradient, expected, 1e-5)


def test_a_micro_batch_of_them_is():
    f = psc.clipped_grad(LOSSES["index"], 1e6, clip_at="micro-batch", microbatch_size=3)
    assert_close(f(TABLE, STARTS), means_of_one_after_the_other(LOSSES["index"]), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.int8])
@pytest.mark.parametrize("rows", [4, 300])
def test_a_clamped_slice_is_the_same_slice(dtype, rows, monkeypatch):
    monkeypatch.setattr(slices_in_bounds, "_vmap_promises", lambda: True)
    table = jnp.arange(3.0 * rows).reshape(rows, 3)

    def sliced(table, start):
        step = lambda c, i: (c + lax.dynamic_slice(table, (i, jnp.ones((), dtype)), (2, 2)), None)
        return lax.scan(step, jnp.zeros((2, 2)), start)[0]

    starts = jnp.array([0, 1, 3, 100, 127], dtype)
    closed = jax.make_jaxpr(sliced)(table, starts)
    held = slices_in_bounds.slices_in_bounds(closed)
    assert "held_inside" in str(held)
    (got,) = core.jaxpr_as_fun(held)(table, starts)
    np.testing.assert_array_equal(got, sliced(table, starts))
