"""Check data and parameters with an axis of size 0: they have no gradient, and nothing fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, clipped_mean, in_all_modes


def ones(*shape):
    return jnp.ones(shape) / 3


def convolved(w, x):
    return lax.conv_general_dilated(
        x[None], w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def padded(w, x):
    return lax.conv_general_dilated(
        x[None], w, (1, 1), [(2, 2), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def scanned(w, x):
    return lax.scan(lambda h, row: (jnp.tanh(h + row @ w), h), jnp.zeros(2), x)[0]


def of_layers(w, x):
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0]


def looked_up(w, x):
    return w[jnp.asarray(x, int)]


# Functions of the parameter and an example, and the shapes of both.
FORMS = {
    "rows": (lambda w, x: x @ w, (3, 2), (0, 3)),
    "features": (lambda w, x: x @ w, (0, 2), (4, 0)),
    "columns": (lambda w, x: x @ w, (3, 0), (4, 3)),
    "blocks": (lambda w, x: jnp.einsum("bij,bjk->bik", x, w), (0, 3, 2), (0, 4, 3)),
    "a batch axis": (lambda w, x: jnp.einsum("bij,jk->bik", x, w), (3, 2), (0, 4, 3)),
    "bias": (lambda w, x: x + w, (3,), (0, 3)),
    "scale": (lambda w, x: x * w, (3,), (0, 3)),
    "look-ups": (looked_up, (5, 2), (0,)),
    "look-ups of rows without entries": (looked_up, (5, 0), (4,)),
    "steps": (scanned, (3, 2), (0, 3)),
    "layers": (of_layers, (0, 3, 3), (3,)),
    "columns of layers": (of_layers, (2, 0, 0), (0,)),
    "pixels": (convolved, (1, 1, 3, 2), (0, 4, 3)),
    "padded pixels": (padded, (3, 3, 3, 2), (0, 4, 3)),
    "channels": (convolved, (2, 2, 0, 2), (4, 4, 0)),
    "concatenated": (lambda w, x: jnp.concatenate([x, w]), (3,), (0,)),
    "concatenated with a part of size 0": (lambda w, x: jnp.concatenate([2 * w, jnp.sin(w)[3:], x]), (3,), (2,)),
    "concatenated with its own part of size 0": (lambda w, x: jnp.concatenate([w * x, w[3:], x]), (3,), (3,)),
    "both sides": (lambda w, x: x @ w @ w, (3, 3), (0, 3)),
    "computed": (lambda w, x: x @ (w / jnp.linalg.norm(w)), (3, 2), (0, 3)),
}  # fmt: skip


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("form", slow.but([*FORMS][::2], FORMS))
def test_gradients_are_those_of_vmap_of_grad(form):
    function, shape, of_one = FORMS[form]

    def loss(p, x):
        return jnp.sum(jnp.sin(function(p["w"], x))) + jnp.sum(p["v"] ** 2)

    p, x = {"w": ones(*shape), "v": ones(2)}, ones(4, *of_one)
    stack = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(p, x)
    norms = np.sqrt(sum(np.sum(np.asarray(g).reshape(4, -1) ** 2, 1) for g in stack.values()))
    for mode, (_, grads, stats) in in_all_modes(loss, 0.5)(p, x).items():
        assert_close(grads, clipped_mean(stack, [0.5] * 4), 1e-5, floor=1e-3)
        np.testing.assert_allclose(stats.norms, norms, rtol=1e-5)
        assert psc.clipped_grad(loss, 0.5, mode=mode).explain(p, x).rows
