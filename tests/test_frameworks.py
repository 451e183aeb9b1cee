"""Check the engine on models of each framework, with the framework's parameter trees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64

WIDTH, HEADS, WORDS = 4, 2, 11


class Case(NamedTuple):
    """A loss for one example, and its parameters."""

    loss: Callable[..., Any]
    params: Any


def batch(n=3):
    images = jax.random.normal(jax.random.key(1), (n, 4, 4, 2))
    return images, jax.random.randint(jax.random.key(2), (n, 5), 0, WORDS)


def squared(y):
    return jnp.square(y.astype(jnp.promote_types(y.dtype, jnp.float32)) - 1).sum()


def cast(tree, dtype):
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def without_optimising(f):
    """Compile in about half the time, for functions that run once."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


# One model in each framework: a convolution, an embedding, group and layer normalisation,
# attention, a recurrent cell and a dense layer. `dtype` is that of the computation.


class LinenNet(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, image, tokens):
        dtype = self.dtype
        image = nn.Conv(WIDTH, (3, 3), 2, dtype=dtype)(image)
        image = nn.relu(nn.GroupNorm(2, reduction_axes=(-3, -2, -1), dtype=dtype)(image))
        x = nn.Embed(WORDS, WIDTH, dtype=dtype)(tokens) + image.mean((0, 1))
        x += nn.MultiHeadDotProductAttention(HEADS, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
        cell = nn.GRUCell(WIDTH, dtype=dtype)
        x = nn.RNN(cell)(x, initial_carry=jnp.zeros(WIDTH, dtype))
        return nn.Dense(WIDTH, dtype=dtype)(x[-1])


def linen(dtype) -> Case:
    module = LinenNet(dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), *(leaf[0] for leaf in batch()))
    params = drawn(params["params"])
    return Case(
        lambda params, *example: squared(module.apply({"params": params}, *example)), params
    )


class NNXNet(nnx.Module):
    def __init__(self, rngs, dtype):
        options = {"rngs": rngs, "dtype": dtype}
        self.conv = nnx.Conv(2, WIDTH, (3, 3), 2, **options)
        self.group_norm = nnx.GroupNorm(WIDTH, 2, **options)
        self.embed = nnx.Embed(WORDS, WIDTH, **options)
        self.layer_norm = nnx.LayerNorm(WIDTH, **options)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, dropout_rate=0.2, deterministic=False, decode=False, **options
        )
        self.recurrent = nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, **options), rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, **options)

    def __call__(self, image, tokens):
        image = nnx.relu(self.group_norm(self.conv(image[None])))[0]
        x = self.embed(tokens) + image.mean((0, 1))
        x += self.attention(self.layer_norm(x))
        x = self.recurrent(x[None], initial_carry=jnp.zeros((1, WIDTH), x.dtype))[0]
        return self.dense(x[-1])


def copied(streams):
    """Copy random streams for a trace, because each use advances their counters."""
    return jax.tree.map(jnp.asarray, streams)


def nnx_state(dtype) -> Case:
    shapes = nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0), dtype))
    graph, params, streams = nnx.split(shapes, nnx.Param, ...)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    first = lambda leaf: jax.random.key(3) if is_key(leaf) else jnp.zeros(leaf.shape, leaf.dtype)
    streams = jax.tree.map(first, streams)

    def loss(params, *example):
        return squared(nnx.merge(graph, params, copied(streams))(*example))

    return Case(loss, drawn(params))


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    group_norm: eqx.nn.GroupNorm
    embed: eqx.nn.Embedding
    layer_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    cell: eqx.nn.GRUCell
    dense: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv2d(2, WIDTH, 3, 2, 1, key=keys[0])
        self.group_norm = eqx.nn.GroupNorm(2, WIDTH)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=keys[1])
        self.layer_norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[2])
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=keys[3])
        self.dense = eqx.nn.Linear(WIDTH, WIDTH, key=keys[4])

    def __call__(self, image, tokens):
        image = jax.nn.relu(self.group_norm(self.conv(jnp.moveaxis(image, -1, 0))))
        x = jax.vmap(self.embed)(tokens) + image.mean((1, 2))
        y = jax.vmap(self.layer_norm)(x)
        x += self.attention(y, y, y)
        step = lambda carry, x: (self.cell(x, carry), None)
        return self.dense(jax.lax.scan(step, jnp.zeros(WIDTH, x.dtype), x)[0])


def equinox(dtype) -> Case:
    shapes = eqx.filter_eval_shape(EquinoxNet, jax.random.key(0))
    params, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def loss(params, image, tokens):
        net = eqx.combine(cast(params, dtype), static)
        return squared(net(image.astype(dtype), tokens))

    return Case(loss, drawn(params))


def haiku_net(image, tokens):
    image = hk.Conv2D(WIDTH, 3, 2)(image[None])
    image = jax.nn.relu(hk.GroupNorm(2)(image))[0]
    x = hk.Embed(WORDS, WIDTH)(tokens) + image.mean((0, 1))
    y = hk.LayerNorm(-1, True, True)(x)
    init = hk.initializers.VarianceScaling()
    x += hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)(y, y, y)
    x, _ = hk.dynamic_unroll(hk.GRU(WIDTH), x, jnp.zeros(WIDTH, x.dtype))
    return hk.Linear(WIDTH)(x[-1])


def haiku(dtype) -> Case:
    net = hk.without_apply_rng(hk.transform(haiku_net))
    params = jax.eval_shape(net.init, jax.random.key(0), *(leaf[0] for leaf in batch()))

    def loss(params, image, tokens):
        return squared(net.apply(cast(params, dtype), image.astype(dtype), tokens))

    return Case(loss, drawn(params))


def drawn(shapes):
    """Initialise without compiling; scales of normalisation need not be 1 here."""
    leaves, treedef = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    return treedef.unflatten(
        [jnp.asarray(random.normal(0.3, 0.5, leaf.shape), jnp.float32) for leaf in leaves]
    )


FRAMEWORKS = {"linen": linen, "nnx": nnx_state, "equinox": equinox, "haiku": haiku}


def stacked_gradients(loss, params, batch, in_axes=0):
    in_axes = (None, *in_axes) if isinstance(in_axes, tuple) else (None, *[in_axes] * len(batch))
    return without_optimising(jax.vmap(jax.grad(loss), in_axes))(params, *batch)


def taus_of(stacked):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    norms = np.sqrt(sum((leaf.reshape(len(leaf), -1) ** 2).sum(1) for leaf in leaves))
    return norms * np.resize([1.5, 0.3, 0.7], len(norms))


def by_position(taus):
    return lambda k: jnp.asarray(taus)[k - 1]


@functools.cache
def reference(framework):
    """Return the case in float64, its batch, thresholds, and the clipped mean."""
    with enable_x64(True):
        loss, params = FRAMEWORKS[framework](jnp.float64)
        params, arguments = cast((params, batch()), jnp.float64)
        stacked = stacked_gradients(loss, params, arguments)
        taus = taus_of(stacked)
        return loss, params, arguments, taus, clipped_mean(stacked, taus)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("framework", "mode"), slow.diagonal(FRAMEWORKS, ["one_pass", "two_pass"]))
def test_each_framework_equals_vmap_of_grad_in_float64(framework, mode):
    loss, params, arguments, taus, expected = reference(framework)
    with enable_x64(True):
        f = psc.clipped_grad(loss, by_position(taus), mode=mode)
        grads = without_optimising(f)(params, *arguments)
    # Relative to each leaf's largest entry, and for keys' biases, whose gradient vanishes, to the
    # tree's.
    assert_close(grads, expected, 1e-10, floor=1e-3)
    assert type(grads) is type(params)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_matrices_and_tables_need_no_fallback(framework):
    loss, params = FRAMEWORKS[framework](jnp.float32)
    plan = psc.clipped_grad(loss, 1.0).explain(params, *batch())
    escaped = {
        row.parameter
        for row, leaf in zip(plan.rows, jax.tree.leaves(params), strict=True)
        if leaf.size > 3 * WIDTH  # the largest bias, of a recurrent cell's three gates
        and row.route == "direct"
        and not row.reason.startswith("no larger than what its sites would store")
    }
    assert escaped == set(), plan


def test_bfloat16_computation_gives_gradients_in_the_parameters_dtype():
    half = {"dtype": jnp.bfloat16}
    module = nn.Sequential(
        [
            nn.Conv(WIDTH, (3, 3), 2, **half),
            nn.GroupNorm(2, reduction_axes=(-3, -2, -1), **half),
            lambda x: x.reshape(-1, WIDTH),
            nn.MultiHeadDotProductAttention(HEADS, **half),
            nn.Dense(3, **half),
        ]
    )
    images = batch()[:1]
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), images[0][0]))
    loss = lambda params, image: squared(module.apply(params, image))
    stacked = stacked_gradients(loss, params, images)
    taus = taus_of(stacked)
    grads = without_optimising(psc.clipped_grad(loss, by_position(taus)))(params, *images)
    assert_close(grads, clipped_mean(stacked, taus), 3e-2, floor=0.1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_dtype_is_promoted_in_passing(framework):
    loss, params = FRAMEWORKS[framework](jnp.float32)
    f = psc.clipped_value_and_grad(loss, psc.growing_threshold(1.0, 2.0), return_stats=True)
    with jax.numpy_dtype_promotion("strict"):
        value, grads, _ = jax.eval_shape(f, params, *batch(), sample_mask=jnp.ones(3, bool))
    assert value.dtype == jnp.float32
    for grad, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


# NNX: what else there is in a model


class DropoutNet(nnx.Module):
    def __init__(self, rngs, streams):
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs if streams else None)
        self.dense = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, key=None):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return self.dense(self.dropout(nnx.relu(self.hidden(x)), rngs=rngs))


def shared_streams(x):
    graph, params, streams = nnx.split(DropoutNet(nnx.Rngs(0), True), nnx.Param, ...)
    loss = lambda params, streams, x: squared(nnx.merge(graph, params, copied(streams))(x))
    return loss, params, (streams, x), (None, 0)


def a_key_for_each_sample(x):
    graph, params = nnx.split(DropoutNet(nnx.Rngs(0), False), nnx.Param)
    loss = lambda params, x, key: squared(nnx.merge(graph, params)(x, key))
    return loss, params, (x, jax.random.split(jax.random.key(2), len(x))), (0, 0)


@pytest.mark.parametrize("given", [shared_streams, a_key_for_each_sample])
def test_nnx_dropout_without_and_under_jit(given):
    x = jax.random.normal(jax.random.key(1), (3, 4))
    loss, params, arguments, in_axes = given(x)
    stacked = stacked_gradients(loss, params, arguments, in_axes)
    taus = taus_of(stacked)
    f = psc.clipped_grad(loss, by_position(taus), in_axes=in_axes)
    for run in (f, without_optimising(f)):
        grads = run(params, *arguments)
        assert_close(grads, clipped_mean(stacked, taus), 1e-5)
        assert isinstance(grads, nnx.State)


# Equinox: many models at once


def test_an_equinox_ensemble_is_clipped_model_by_model():
    make = lambda key: eqx.nn.MLP(4, 2, 6, 1, key=key)
    models = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 2))
    params, static = eqx.partition(models, eqx.is_inexact_array)
    loss = lambda params, x: squared(eqx.combine(params, static)(x))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    over_samples = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    stacked = without_optimising(jax.vmap(over_samples, in_axes=(0, None)))(params, x)
    grads = without_optimising(jax.vmap(psc.clipped_grad(loss, 0.5), in_axes=(0, None)))(params, x)
    for i in range(2):
        own, expected = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (grads, stacked))
        assert_close(own, clipped_mean(expected, np.full(5, 0.5)), 1e-5)


# Plain trees


class Pair(NamedTuple):
    w: Any
    b: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class Layer:
    w: Any
    b: Any
    name: str = "dense"


W = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]])
B = np.array([0.1, -0.2])
X = np.array([[1.0, -0.5, 2.0], [0.3, 4.0, 0.1], [-1.0, 0.2, 0.0], [0.0, 0.0, 0.0]])
TREES = {
    "dict": ({"w": W, "b": B}, lambda p: (p["w"], p["b"])),
    "lists in a tuple": (([W], [[B]]), lambda p: (p[0][0], p[1][0][0])),
    "NamedTuple": (Pair(W, B), lambda p: p),
    "registered dataclass": (Layer(W, B), lambda p: (p.w, p.b)),
    "None among the leaves": ({"w": W, "b": None, "c": (None, {})}, lambda p: (p["w"], 0.0)),
    "bare array": (W, lambda p: (p, 0.0)),
    "Python number": ({"w": W, "b": 0.3}, lambda p: (p["w"], p["b"])),
    "no use of a parameter": ({"w": W, "b": B}, lambda p: (p["w"], 0.0)),
}


@pytest.mark.parametrize(("tree", "mode"), slow.diagonal(TREES, ["one_pass", "two_pass"]))
def test_plain_trees_come_back_as_they_are(tree, mode):
    params, w_and_b = TREES[tree]

    def loss(params, x):
        w, b = w_and_b(params)
        return squared(jnp.tanh(x @ w + b))

    with enable_x64(True):
        stacked = stacked_gradients(loss, params, (X,))
        taus = taus_of(stacked)
        f = psc.clipped_grad(loss, by_position(taus), mode=mode)
        grads = without_optimising(f)(params, X)
    assert_close(grads, clipped_mean(stacked, taus), 1e-10)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def plain_loss(params, x):
    return jnp.square(jnp.tanh(x @ params["w"] + params["b"])).sum()


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", ["one_pass", "two_pass", "vmap"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, np.inf])
def test_no_nan_is_made_in_passing(mode, threshold):
    params = {"w": W.astype(np.float32), "b": np.zeros(2, np.float32)}
    f = psc.clipped_value_and_grad(plain_loss, threshold, mode=mode, return_stats=True)
    with jax.debug_nans(True):  # not under jit, which would check only the results
        _, _, stats = f(params, X.astype(np.float32))
    assert float(stats.norms[-1]) == 0  # a sample whose gradient vanishes


# Outer derivatives


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("mode", "microbatch_size"), [("one_pass", None), ("two_pass", None), ("one_pass", 3)]
)
def test_derivatives_of_the_clipped_gradients(mode, microbatch_size):
    f = psc.clipped_grad(plain_loss, 1.0, mode=mode, microbatch_size=microbatch_size)

    def outer(threshold, params):
        grads = f(params, X, threshold=threshold)
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(grads))

    with enable_x64(True):
        at = (
            psc.growing_threshold(jnp.asarray(0.4), jnp.asarray(2.0)),
            {"w": jnp.asarray(W), "b": jnp.asarray(B)},
        )
        leaves, treedef = jax.tree.flatten(at)
        rng = np.random.default_rng(0)
        along = treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])
        got = without_optimising(jax.grad(outer, argnums=(0, 1)))(*at)
        moved = lambda step: jax.tree.map(lambda a, d: a + step * d, at, along)
        run = without_optimising(outer)
        expected = (run(*moved(1e-5)) - run(*moved(-1e-5))) / 2e-5
        products = jax.tree.map(lambda g, d: jnp.vdot(g, d), got, along)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-7)
