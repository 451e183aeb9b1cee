"""Check losses for a batch of one, from which the engine removes axes of size 1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend import core

import psclip_optax as psc
from psclip_optax.engine.analysis.unit_axes import without_unit_axes
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, in_all_modes

N, T, D, V = 3, 4, 6, 7


def dense(p, x):
    return x[None] @ p["w"] + p["b"]


def normalized(p, x):
    x = x[None] @ p["w"]
    centred = x - x.mean(axis=-1, keepdims=True)
    return p["b"] * centred / jnp.sqrt(x.var(axis=-1, keepdims=True) + 0.1)


def attention(p, x):
    heads = (x[None] @ p["w"]).reshape(1, T, 2, D // 2)
    scores = jnp.einsum("bthd,bshd->bhts", heads, heads)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e9)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), heads)
    return mixed.reshape(1, T, D) + p["b"][None, None]


def scanned(p, x):
    step = lambda x, w: (jnp.tanh(x @ w) + p["b"], x.sum(axis=-1))
    last, sums = lax.scan(step, x[None], jnp.stack([p["w"], p["w"].T]))
    return last + sums.sum()


def scanned_once(p, x):
    return lax.scan(lambda x, w: (jnp.sin(x @ w) * p["b"], None), x[None], p["w"][None])[0]


def read_within_a_scan_and_behind_it(p, x):
    other = nn.relu(x[None] @ p["w"])  # a custom rule, so it keeps its axes
    last, _ = lax.scan(lambda c, _: (jnp.sin(c @ p["w"]) + other, None), x[None], None, length=2)
    return last * other + p["b"]


def checkpointed(p, x):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(lambda p, x: nn.relu(dense(p, x)), policy=policy)(p, x)


def one_head_of_one(p, x):
    return jnp.einsum("bthd,de->bhte", x[None, :, None], p["w"]) * p["b"]


def one_feature(p, x):
    return x[None] @ p["w"][:, :1] + p["b"][:1]


def convolution(p, x):
    kernel = p["w"].reshape(1, 1, D, D)
    dims = ("NHWC", "HWIO", "NHWC")
    image = x.reshape(1, 2, 2, D)
    return nn.relu(lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dims))


def joined_and_cut(p, x):
    x = x[None] @ p["w"]
    return jnp.concatenate([x[..., ::2], -x[..., 1::2]], axis=-1)[:, 1:] * p["b"]


def joined_along_the_unit(p, x):
    x = x[None] @ p["w"]
    return jnp.concatenate([x, 2 * x]) * p["b"]


def of_numbers_alone(p, x):
    return jnp.where(jnp.full((1, 1), True), x[None] @ p["w"], 2.0) * p["b"]


def looked_up(p, x):
    labels = (jnp.abs(x[:, 0]) * 3).astype(jnp.int32) % D
    return optax.softmax_cross_entropy_with_integer_labels(dense(p, x), labels[None])


def rows_of_a_table(p, x):
    tokens = (jnp.abs(x[:, 0]) * 3).astype(jnp.int32) % D
    return p["w"][tokens[None]] * p["b"]


def largest(p, x):
    x = jax.nn.silu(x[None] @ p["w"])
    return jnp.where(jnp.argmax(x, axis=-1, keepdims=True) > 1, x, 0.5 * x).max(axis=1) * p["b"]


NETS = [
    *(
        dense,
        normalized,
        attention,
        scanned,
        scanned_once,
        read_within_a_scan_and_behind_it,
        checkpointed,
        one_head_of_one,
    ),
    *(
        one_feature,
        convolution,
        joined_and_cut,
        joined_along_the_unit,
        of_numbers_alone,
        looked_up,
        rows_of_a_table,
    ),
    largest,
]


def loss_of(net):
    return lambda p, x: jnp.sum(jnp.square(net(p, x)))


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    p = {"w": jax.random.normal(keys[0], (D, D)), "b": jax.random.normal(keys[1], (D,))}
    return p, jax.random.normal(keys[2], (N, T, D))


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("net", slow.but(NETS[::2], NETS), ids=lambda net: net.__name__)
def test_gradients_are_those_of_the_loss(net):
    with enable_x64(True):
        p, x = arguments()
        stacked = jax.jit(jax.vmap(jax.grad(loss_of(net)), in_axes=(None, 0)))(p, x)
        for _, gradient, _ in in_all_modes(loss_of(net), 0.5)(p, x).values():
            assert_close(gradient, clipped_mean(stacked, np.full(N, 0.5)), 1e-10)


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_the_loss_is_the_same_function(net):
    p, x = arguments()
    traced = jax.make_jaxpr(loss_of(net))(p, x[0])
    changed = jax.jit(core.jaxpr_as_fun(without_unit_axes(traced)))
    loss = jax.jit(loss_of(net))
    for example in x:
        assert_close(changed(*jax.tree.leaves(p), example)[0], loss(p, example), 1e-6)


@pytest.mark.parametrize("net", [dense, normalized, attention, looked_up])
def test_products_have_no_axes_of_size_1(net):
    p, x = arguments()
    changed = without_unit_axes(jax.make_jaxpr(loss_of(net))(p, x[0]))
    products = [eqn for eqn in changed.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert products
    assert all(1 not in eqn.outvars[0].aval.shape for eqn in products)
    gathers = [eqn for eqn in changed.jaxpr.eqns if eqn.primitive.name == "gather"]
    assert all(1 not in eqn.invars[0].aval.shape for eqn in gathers[:1])
    assert bool(gathers) == (net is looked_up)


def test_a_loss_without_them_is_left_alone():
    p, x = arguments()
    traced = jax.make_jaxpr(lambda p, x: jnp.sum(x @ p["w"]))(p, x[0])
    assert without_unit_axes(traced) is traced


def test_numbers_outside_of_a_table_stay_outside():
    def loss(p, tokens):
        return jnp.sum(p.at[tokens[None]].get(mode="fill", fill_value=0) @ p.T)

    p = jax.random.normal(jax.random.key(0), (V, D))
    tokens = jnp.array([[0, V + 2, 3], [1, 1, V]])
    f = psc.clipped_value_and_grad(loss, np.inf, mode="one_pass")
    _, gradient = jax.jit(f)(p, tokens)
    wanted = jax.jit(jax.grad(lambda p: jax.vmap(loss, in_axes=(None, 0))(p, tokens).mean()))(p)
    assert_close(gradient, wanted, 1e-5)


def picks(closed):
    """Find batched look-ups of single entries: the axes of the indices, and their numbers."""
    inner = (eqn.params["jaxpr"].eqns for eqn in closed.eqns if eqn.primitive.name == "jit")
    gathers = (
        eqn
        for eqns in (closed.eqns, *inner)
        for eqn in eqns
        if eqn.primitive.name == "gather" and eqn.params["dimension_numbers"].operand_batching_dims
    )
    return [
        (eqn.invars[1].aval.ndim, eqn.params["dimension_numbers"].offset_dims) for eqn in gathers
    ]


def test_labels_are_picked_as_a_batch_picks_them():
    """Check that indices have a last axis of size 1, which compilers turn into a comparison."""

    def losses(w, xs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(xs @ w, labels).mean(axis=1)

    def loss(w, x, labels):
        return losses(w, x[None], labels[None])[0]

    w, x, labels = jnp.ones((D, V)), jnp.ones((N, T, D)), jnp.zeros((N, T), int)
    ((ndim, of_slices),) = picks(jax.make_jaxpr(losses)(w, x, labels))
    changed = without_unit_axes(jax.make_jaxpr(loss)(w, x[0], labels[0]))
    assert picks(changed) == [(ndim - 1, of_slices)]
