"""Check that a sample which is not finite leaves the others alone, whatever convolves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, enable_x64

N, TAU = 4, 0.5


def conv(x, filters):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], filters, (1, 1), "SAME", dimension_numbers=dims)[0]


@jax.custom_vjp
def custom(x, filters):
    return conv(x, filters)


def custom_backward(kept, cotangent):
    return jax.vjp(conv, *kept)[1](cotangent)


custom.defvjp(lambda x, filters: (conv(x, filters), (x, filters)), custom_backward)


# Losses for one example: filters w [3, 3, 2, 3], v [3], image x [5, 5, 2]


def plain(params, x):
    return jnp.sum(jnp.tanh(conv(x, params["w"])) @ params["v"]) ** 2


def standardised(params, x):
    w = params["w"] - params["w"].mean((0, 1, 2))
    return plain(params | {"w": w / (w.std((0, 1, 2)) + 0.1)}, x)


def penalised(params, x):
    return plain(params, x) + jnp.sum(params["w"] ** 2 * jnp.mean(x))


def of_own_rule(params, x):
    return jnp.sum(jnp.tanh(custom(x, params["w"])) @ params["v"]) ** 2


def made_of_data(params, x):
    return plain(params | {"w": params["w"] * jnp.sum(jnp.nan_to_num(x))}, x)


def overlapping(params, x):
    ends = conv(x, params["w"][..., :2]), jnp.sin(conv(x, params["w"][..., 1:]))
    return jnp.sum(ends[0] * params["v"][:2]) ** 2 + jnp.sum(ends[1]) ** 2


def in_layers(params, x):
    def layer(h, scale):
        return jnp.tanh(conv(h, params["w"][..., :2] * scale)), None

    scales = jnp.stack([jnp.ones(()), jnp.mean(jnp.nan_to_num(x))])
    return jnp.sum(lax.scan(layer, x, scales)[0]) ** 2 + jnp.sum(params["v"] ** 2)


def in_a_branch(params, x):
    def branch(function):
        return lambda: function(conv(x, params["w"] * params["w"])) @ params["v"]

    return jnp.sum(lax.cond(jnp.nan_to_num(x[0, 0, 0]) > 0, branch(jnp.tanh), branch(jnp.sin))) ** 2


LOSSES = [plain, standardised, penalised, of_own_rule, made_of_data, overlapping, in_layers]
CASES = [(loss, mode) for loss in [*LOSSES, in_a_branch] for mode in ("one_pass", "vmap")]
QUICK = [(plain, "vmap"), (standardised, "one_pass"), (penalised, "one_pass")]


@pytest.mark.parametrize("case", slow.but(QUICK, CASES), ids=lambda case: case[0].__name__)
def test_a_sample_that_is_not_finite_leaves_the_others_alone(case):
    loss, mode = case
    rng = np.random.default_rng(0)
    with enable_x64(True):
        params = {"w": jnp.array(rng.normal(size=(3, 3, 2, 3))), "v": jnp.array(rng.normal(size=3))}
        images = jnp.array(rng.normal(size=(N, 5, 5, 2))).at[1, 2, 2, 0].set(jnp.nan)
        gradient = jax.jit(jax.grad(loss))
        kept = [clipped(gradient(params, images[k])) for k in (0, 2, 3)]
        expected = jax.tree.map(lambda *each: sum(each) / N, *kept)
        f = psc.clipped_value_and_grad(loss, TAU, mode=mode, return_stats=True)
        _, grads, stats = jax.jit(f)(params, images)
        assert int(stats.num_nonfinite) == 1
        assert_close(grads, expected, 1e-10)


def clipped(gradient):
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert np.isfinite(norm)
    return jax.tree.map(lambda leaf: np.asarray(leaf) * min(1, TAU / norm), gradient)
