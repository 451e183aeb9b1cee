"""Check derivatives through the clipping, in parameters and thresholds, in all modes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests.numerics import assert_close, enable_x64
from tests.passes import two_passes

N, LAYERS, ROWS, WIDTH = 4, 2, 3, 5


def parameters():
    random = np.random.default_rng(0)
    shapes = {"up": (LAYERS, WIDTH, 8), "down": (LAYERS, 8, WIDTH), "bias": (WIDTH,)}
    return {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}


def loss(params, x):
    @jax.checkpoint
    def layer(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    layers = {name: params[name] for name in ("up", "down")}
    return jnp.sum(jnp.square(lax.scan(layer, x, layers)[0] + params["bias"]))


def outer(mode, threshold):
    """Return a number that depends on a clipped gradient, from parameters and α."""

    def run(params, alpha):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(N, ROWS, WIDTH)))
        limit = psc.by_layer(params, alpha) if threshold == "by layer" else alpha
        grads = psc.clipped_grad(loss, limit, mode=mode)(params, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(grads))

    return run


@pytest.mark.parametrize(
    ("mode", "threshold"),
    [(mode, "together") for mode in ("one_pass", "two_pass", "two passes", "auto")]
    + [(mode, "by layer") for mode in ("one_pass", "auto")],
)
def test_derivatives_are_those_of_a_stack(mode, threshold):
    passes = two_passes() if mode == "two passes" else contextlib.nullcontext()
    with enable_x64(True), passes:
        point = parameters(), jnp.asarray(2.0)
        along = jax.tree.map(jnp.ones_like, point)
        own, expected = (outer(m, threshold) for m in (mode.replace(" passes", "_pass"), "vmap"))
        slopes = jax.jit(jax.grad(own, (0, 1)))(*point)
        assert_close(slopes, jax.jit(jax.grad(expected, (0, 1)))(*point), 1e-9)
        _, slope = jax.jvp(own, point, along)
        assert_close(slope, jax.jvp(expected, point, along)[1], 1e-9)


def two_convolutions(params, x):
    for kernel in params:
        dimensions = ("NWC", "WIO", "NWC")
        x = lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=dimensions)
        x = jnp.tanh(x[0])
    return jnp.sum(x)


@pytest.mark.parametrize(
    ("mode", "num_samples", "size"),
    [("one_pass", 1, None), ("two_pass", 2, None), ("two passes", 2, 1)],
)
def test_convolutions_on_one_sample_at_a_time(mode, num_samples, size):
    random = np.random.default_rng(2)
    passes = two_passes() if mode == "two passes" else contextlib.nullcontext()
    with enable_x64(True), passes:
        params = [jnp.asarray(random.normal(size=shape)) for shape in ((3, 2, 4), (3, 4, 2))]
        x = jnp.asarray(random.normal(size=(num_samples, 6, 2)))
        own = mode.replace(" passes", "_pass")
        f = psc.clipped_grad(two_convolutions, 0.1, mode=own, microbatch_size=size)
        expected = psc.clipped_grad(two_convolutions, 0.1, mode="vmap")
        seeds = [jnp.stack([kernel, 2 * kernel]) for kernel in params]
        both = (jax.vmap(g, (0, None))(seeds, x) for g in (f, expected))
        assert_close(*both, 1e-10)
        slopes = (
            jax.grad(lambda p, g=g: sum(jnp.sum(jnp.sin(leaf)) for leaf in g(p, x)))(params)
            for g in (f, expected)
        )
        assert_close(*slopes, 1e-9)
