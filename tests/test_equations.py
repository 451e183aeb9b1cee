"""Check reading equations that contain a jaxpr, in every version of JAX."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import psclip_optax as psc
from psclip_optax.engine.analysis.equations import (
    ScanCounts,
    inner_jaxprs,
    scan_counts,
    without_debugging,
)
from tests.numerics import assert_close, clipped_mean

X = jnp.arange(12.0).reshape(3, 4) / 10
W = jnp.cos(jnp.arange(16.0)).reshape(4, 4)


def recurrent(w, x):
    """Run a scan with a constant, a carry, xs and ys."""
    return lax.scan(lambda h, xi: (jnp.tanh(h @ w + xi), h.sum()), jnp.zeros(4), x)


def backwards_without_carry(w, x):
    return lax.scan(lambda _, xi: (None, jnp.sin(xi @ w)), None, x, reverse=True)


def counting(w, x):
    """Run a scan without xs, with carries of several ranks, and layers of the same rank."""
    step = lambda state, _: ((state[0] + 1, state[1] * w.sum(), jnp.sin(state[2])), state[1])
    return lax.scan(step, (0, jnp.float32(1), x), None, length=4)


def over_layers_of_the_carrys_shape(w, x):
    step = lambda h, layer: (jnp.tanh(h @ layer), h)
    return lax.scan(step, w, jnp.stack([w, w]) + x[0])


def with_random_keys(w, x):
    step = lambda key, xi: (jax.random.split(key)[0], jax.random.normal(key, (4,)) + xi @ w)
    return lax.scan(step, jax.random.key(0), x)[1]


SCANS = {
    "recurrent": (recurrent, ScanCounts(1, 1)),
    "backwards, without carry": (backwards_without_carry, ScanCounts(1, 0)),
    "counting": (counting, ScanCounts(1, 3)),
    "over layers of the carry's shape": (over_layers_of_the_carrys_shape, ScanCounts(0, 1)),
    "with random keys": (with_random_keys, ScanCounts(1, 1)),
    "vmap": (lambda w, x: jax.vmap(recurrent, (None, 0))(w, jnp.stack([x, x])), ScanCounts(1, 1)),
}


def scans_of(function):
    jaxpr = jax.make_jaxpr(function)(W, X).jaxpr
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


@pytest.mark.parametrize("name", SCANS)
def test_counts_of_a_scan(name):
    function, expected = SCANS[name]
    (eqn,) = scans_of(function)
    assert scan_counts(eqn) == expected


def parted(eqn, inputs):
    """Run the scan from the counts of its inputs."""
    counts, body = scan_counts(eqn), core.jaxpr_as_fun(eqn.params["jaxpr"])
    consts = inputs[: counts.consts]
    init, xs = inputs[counts.consts :][: counts.carry], inputs[sum(counts) :]

    def step(carry, xs):
        outs = body(*consts, *carry, *xs)
        return outs[: counts.carry], outs[counts.carry :]

    settings = {name: eqn.params[name] for name in ("length", "reverse")}
    carry, ys = lax.scan(step, init, xs, **settings)
    return [*carry, *ys]


def test_counts_of_the_scans_of_a_gradient_part_its_inputs():
    """Check that derivatives, which bind scans over tangents and cotangents, are read too."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: recurrent(w, X)[0].sum()))(W)
    values, num_scans = dict(zip(jaxpr.jaxpr.invars, [W], strict=True)), 0
    values.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    for eqn in jaxpr.jaxpr.eqns:
        inputs = [a.val if isinstance(a, core.Literal) else values[a] for a in eqn.invars]
        outs = eqn.primitive.bind(*inputs, **eqn.params)
        outs = outs if eqn.primitive.multiple_results else [outs]
        values.update(zip(eqn.outvars, outs, strict=True))
        if eqn.primitive.name == "scan":
            num_scans += 1
            for got, wanted in itertools.zip_longest(parted(eqn, inputs), outs):
                np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert num_scans >= 2


def layer(w, x):
    return jnp.tanh(x @ w)


def assert_is_a_dense_site(loss):
    stacked = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(W, X)
    for mode in ("one_pass", "two_pass"):
        f = psc.clipped_grad(loss, 1.0, mode=mode)
        assert_close(jax.jit(f)(W, X), clipped_mean(stacked, np.ones(len(X))), 1e-5)
        assert [row.route for row in f.explain(W, X).rows] == ["dense"]


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="takes one flag alone")
def test_checkpoint_with_a_flag_for_each_argument():
    scaled = jax.checkpoint(lambda w, x, y: y * layer(w, x), prevent_cse=(True, False, False))
    assert_is_a_dense_site(lambda w, x: scaled(w, x, jnp.exp(x)).sum())


@pytest.mark.skipif("__call__" not in vars(jax.stages.Traced), reason="is not called")
def test_a_function_that_was_traced_before():
    assert_is_a_dense_site(lambda w, x: jax.jit(layer).trace(w, x)(w, x).sum())


def names_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        yield from itertools.chain(*map(names_in, inner_jaxprs(eqn)))


def test_what_debugging_calls_is_left_out_wherever_it_is():
    def shown(x):
        jax.debug.print("{}", x)
        return x + 1

    def function(x):
        jax.debug.callback(lambda _: None, x)
        x = lax.cond(x > 0, shown, lambda x: -x, jax.jit(shown)(x))
        return lax.scan(lambda x, _: (shown(x), None), x, None, length=3)[0]

    closed = jax.make_jaxpr(function)(1.0)
    silent = without_debugging(closed)
    assert sum(name.startswith("debug") for name in names_in(closed.jaxpr)) == 4
    assert not any(name.startswith("debug") for name in names_in(silent.jaxpr))
    assert core.jaxpr_as_fun(silent)(1.0) == [6.0]
