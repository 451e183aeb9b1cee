"""Check that a scan over layers stacks small weights' gradients in the dtype it computes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from psclip_optax.engine.analysis.equations import inner_jaxprs
from psclip_optax.engine.analysis.hoisting import hoisted
from tests.numerics import assert_close, enable_x64

LAYERS, N, ROWS, WIDTH = 3, 4, 40, 6


def parameters(dtype):
    random = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(random.normal(size=(LAYERS, WIDTH, WIDTH)), dtype),
        "bias": jnp.asarray(random.normal(size=(LAYERS, WIDTH)), dtype),
    }


def loss_in(dtype, remat):
    def layer(x, layer):
        kernel, bias = (layer[name].astype(dtype) for name in ("kernel", "bias"))
        return jnp.tanh(x @ kernel + bias), None

    def loss(params, x):
        x, _ = lax.scan(jax.checkpoint(layer) if remat else layer, x.astype(dtype), params)
        return jnp.sum(jnp.square(x).astype(params["bias"].dtype))

    return loss


def stacks_of(jaxpr):
    """Find the dtypes in which scans return gradients of all samples' kernels."""
    shapes = {(LAYERS, N, WIDTH, WIDTH), (N, LAYERS, WIDTH, WIDTH)}  # of JAX 0.7 and later
    found = set()
    for eqn in jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            found |= stacks_of(inner)
        if eqn.primitive.name == "scan":
            found |= {str(v.aval.dtype) for v in eqn.outvars if v.aval.shape in shapes}
    return found


@pytest.mark.parametrize("remat", [False, True])
def test_layers_are_stacked_as_narrow_as_they_are_computed(remat):
    params, x = parameters(jnp.float32), jnp.ones((N, ROWS, WIDTH))
    f = psc.clipped_grad(loss_in(jnp.bfloat16, remat), 1.0, mode="one_pass")
    assert stacks_of(jax.make_jaxpr(f)(params, x).jaxpr) == {"bfloat16"}
    whole = psc.clipped_grad(loss_in(jnp.float32, remat), 1.0, mode="one_pass")
    assert stacks_of(jax.make_jaxpr(whole)(params, x).jaxpr) == {"float32"}


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_those_of_a_stack(mode, remat):
    with enable_x64(True):
        params = parameters(np.float64)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(N, ROWS, WIDTH)))
        x = x.at[1].set(jnp.nan)

        def clipped(mode):
            loss = loss_in(jnp.float32, remat)
            return jax.jit(psc.clipped_value_and_grad(loss, 2.0, mode=mode, return_stats=True))

        (_, grads, stats), (_, stack, of_stack) = (clipped(m)(params, x) for m in (mode, "vmap"))
        assert_close(grads, stack, 1e-5)
        np.testing.assert_allclose(stats.norms, of_stack.norms, rtol=1e-5)
        assert grads["kernel"].dtype == np.float64


def xs_of_scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            first = eqn.params["num_consts"] + eqn.params["num_carry"]
            yield {str(v.aval.dtype) for v in eqn.invars[first:]}
        for inner in inner_jaxprs(eqn):
            yield from xs_of_scans(inner)


@pytest.mark.parametrize("remat", [False, True])
def test_scans_no_longer_take_what_was_cast_before_them(remat):
    params, x = parameters(jnp.float32), jnp.ones((ROWS, WIDTH))
    loss = jax.make_jaxpr(lambda params, x: loss_in(jnp.bfloat16, remat)(params, x))(params, x)
    assert list(xs_of_scans(loss.jaxpr)) == [{"float32"}]
    assert list(xs_of_scans(hoisted(loss, 2, with_casts=True).jaxpr)) == [{"bfloat16"}]


@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_layer_of_a_scan_is_stacked_if_that_is_less_than_its_input(is_scanned):
    wide, narrow, num_rows = 12, 4, 8  # a gradient: 48, a layer's input: 96, its output: 32

    def layer(x, kernel):
        return jnp.tile(jnp.tanh(x @ kernel), wide // narrow), None

    def loss(kernels, x):
        x, _ = lax.scan(layer, x, kernels) if is_scanned else layer(x, kernels[0])
        return jnp.sum(x**2)

    random = np.random.default_rng(2)
    kernels = jnp.asarray(random.normal(size=(LAYERS, wide, narrow)), jnp.float32)
    x = jnp.asarray(random.normal(size=(N, num_rows, wide)), jnp.float32)
    f = psc.clipped_value_and_grad(loss, 1.0, mode="one_pass")
    (row,) = f.explain(kernels, x).rows
    assert row.route == ("direct" if is_scanned else "dense")
    expected = psc.clipped_value_and_grad(loss, 1.0, mode="vmap")(kernels, x)
    assert_close(f(kernels, x), expected, 1e-5)
