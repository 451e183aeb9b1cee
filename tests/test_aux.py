"""Check the leaves of aux that are no plain arrays: keys, flags, and arrays without entries."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests.passes import two_passes

N = 4


def convolved(params, x):
    dimensions = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x[None], params["k"], (1,), "SAME", dimension_numbers=dimensions
    )


def product(params, x):
    return x @ params["k"][0]


@pytest.mark.parametrize("operation", [convolved, product])
@pytest.mark.parametrize("size", [None, 2, 1])
@pytest.mark.parametrize("mode", ["vmap", "one_pass", "two_pass", "two passes", "auto", "by layer"])
def test_any_leaf_is_stacked(mode, size, operation):
    random = np.random.default_rng(0)
    shapes = {"k": (3, 2, 4), "w": (4,)}
    params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    x = jnp.asarray(random.normal(size=(N, 6, 2))).at[1].set(jnp.nan)
    keys = jax.random.split(jax.random.key(0), N)

    def loss(params, x, key):
        aux = {"key": jax.random.split(key)[0], "flag": x[0, 0] > 0, "empty": x[:0]}
        return jnp.sum(jnp.tanh(operation(params, x)) @ params["w"]), aux

    threshold = psc.by_layer(params, 1.0) if mode == "by layer" else 1.0
    own = {"two passes": "two_pass", "by layer": "auto"}.get(mode, mode)
    with two_passes() if mode == "two passes" else contextlib.nullcontext():
        f = psc.clipped_value_and_grad(
            loss, threshold, has_aux=True, mode=own, microbatch_size=size
        )
        (_, aux), grads = f(params, x, keys)
    expected = jax.vmap(lambda x, key: loss(params, x, key)[1])(x, keys)
    for name in ("flag", "empty"):
        np.testing.assert_array_equal(aux[name], expected[name])
    np.testing.assert_array_equal(*map(jax.random.key_data, (aux["key"], expected["key"])))
    assert all(jnp.all(jnp.isfinite(leaf)) and jnp.any(leaf) for leaf in jax.tree.leaves(grads))
