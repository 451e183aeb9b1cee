"""Check which losses cause the warning about normalising over a batch axis of size 1."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import psclip_optax as psc
from benchmarks.zoo.models import ZOO
from psclip_optax.engine.analysis.statistics import warn_of_batch_statistics
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss

IMAGES = jnp.asarray(np.ones((2, 6, 6, 3), np.float32))
VECTORS = jnp.asarray(np.ones((2, 4), np.float32))
SQUARE = jnp.asarray(np.eye(4, dtype=np.float32))


def look_at(loss, params, *example):
    """Trace the loss for one example, with or without a warning."""
    leaves, treedef = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda leaves, *example: loss(treedef.unflatten(leaves), *example))(
        leaves, *example
    )
    warn_of_batch_statistics(closed, len(leaves))


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def normalised(x, axis=0):
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-5)


# Flax and Equinox


class Net(nn.Module):
    norm: str
    train: bool = True
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        is_image = x.ndim > 2
        x = nn.Conv(4, (3, 3), self.stride)(x) if is_image else nn.Dense(4)(x)
        norms = {
            "batch": lambda: nn.BatchNorm(use_running_average=not self.train),
            "group": lambda: nn.GroupNorm(2, reduction_axes=(-3, -2, -1)),
            "layer": nn.LayerNorm,
            "instance": nn.InstanceNorm,
            "rms": nn.RMSNorm,
        }
        x = nn.relu(norms[self.norm]()(x))
        return nn.Dense(3)(x.mean((-3, -2)) if is_image else x)


def linen(module, x):
    variables = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(module.init, jax.random.key(0), x)
    )
    params = variables.pop("params")

    def loss(params, x):
        y, _ = module.apply({"params": params, **variables}, x, mutable=["batch_stats"])
        return jnp.square(y).sum()

    return loss, params


@pytest.mark.parametrize("keep_batch_dim", [True, False])
@pytest.mark.parametrize("batch", [IMAGES, VECTORS], ids=["images", "vectors"])
def test_linen_batch_norm_in_training_is_warned_of(keep_batch_dim, batch):
    loss, params = linen(Net("batch"), batch)
    one = loss if keep_batch_dim else lambda params, x: loss(params, x[None])
    f = psc.clipped_grad(one, 1.0, keep_batch_dim=keep_batch_dim)
    with pytest.warns(UserWarning, match=r"batch axis of size 1.*\n  .*normalization\.py") as seen:
        jax.eval_shape(f, params, batch)
    assert len(seen) == 1
    assert "use_running_average=True" in str(seen[0].message)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("norm", ["group", "layer", "instance", "rms", "batch"])
def test_linen_norms_of_one_sample_are_not(norm, no_warning):
    look_at(*linen(Net(norm, train=False), IMAGES[:1]), IMAGES[:1])
    loss, params = linen(Net(norm, train=False), IMAGES)
    look_at(lambda params, x: loss(params, x[None]), params, IMAGES[0])


def test_an_axis_of_an_image_that_shrank_to_one_is_no_batch_axis(no_warning):
    image = IMAGES[0, :2, :2]  # to which Flax's convolution adds a batch axis, and takes it away
    look_at(*linen(Net("group", stride=2), image), image)


@pytest.mark.parametrize("train", [True, False])
def test_nnx_batch_norm_is_warned_of_in_training_alone(train):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    (model.train if train else model.eval)()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        own = jax.tree.map(jnp.asarray, rest)  # running statistics, which this trace may write
        return nnx.merge(graph, params, own)(x).sum()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        look_at(loss, params, VECTORS[:1])
    assert len(seen) == train


def test_equinox_batch_norm_is_warned_of():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="batch", mode="batch")
    params, static = eqx.partition(norm, eqx.is_inexact_array)

    def loss(params, x):
        layer = eqx.combine(params, static)
        batched = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return jnp.square(batched(x[None], state)[0]).sum()

    with pytest.warns(UserWarning, match="batch axis of size 1"):
        look_at(loss, params, VECTORS[0])


# Written by hand


def scanned(w, x):
    body = lambda carry, w: (jnp.tanh(normalised(carry) @ w), None)
    return jax.lax.scan(body, x[None], jnp.stack([w, w]))[0].sum()


def in_a_scan_over_time(w, x):
    steps = jnp.moveaxis(jnp.stack([x, x])[None], 1, 0)  # [time, 1, d]
    return jax.lax.scan(lambda c, x: (c + normalised(x) @ w, x), x[None], steps)[0].sum()


def in_a_custom_vjp(w, x):
    norm = jax.custom_vjp(lambda x: normalised(x))
    norm.defvjp(lambda x: jax.vjp(normalised, x), lambda pull_back, dy: pull_back(dy))
    return norm(x[None] @ w).sum()


def repeated(w, x):
    body = lambda _, carry: jnp.tanh(normalised(carry) @ w)
    return jax.lax.fori_loop(0, jnp.argmax(x), body, x[None]).sum()


COUPLED = {
    "by hand": lambda w, x: jnp.square(normalised(x[None] @ w)).sum(),
    "without keepdims": lambda w, x: jnp.square(x[None] @ w - (x[None] @ w).mean(0)).sum(),
    "the largest entry": lambda w, x: (x[None] @ w / jnp.max(x[None] @ w, axis=0)).sum(),
    "softmax over the batch": lambda w, x: jnp.square(jax.nn.softmax(x[None] @ w, axis=0)).sum(),
    "channels first": lambda w, x: normalised((x @ w).reshape(1, 2, 2, 1), (0, 2, 3)).sum(),
    "behind attention": lambda w, x: normalised(jnp.einsum("btd,dk->btk", x[None, None], w), (0, 1)).sum(),
    "flattened": lambda w, x: normalised((x @ w).reshape(1, 2, 2).reshape(1, -1)).sum(),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w: normalised(x[None] @ w).sum())(w),
    "jit": lambda w, x: jax.jit(normalised)(jax.jit(jnp.matmul)(x[None], w)).sum(),
    "behind attention of a batch": lambda w, x: normalised(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", (x @ w)[None, None], x[None, None])), x[None, None]), (0, 1)).sum(),
    "behind attention with a residual": lambda w, x: normalised(x[None] + (x[None] @ w @ x[None].T) @ x[None]).sum(),
    "a weight of the example": lambda w, x: normalised(x[None] @ (w * x)).sum(),
    "branch": lambda w, x: jax.lax.cond(x[0] > 0, normalised, jnp.sin, x[None] @ w).sum(),
    "scan": scanned,
    "scan over time": in_a_scan_over_time,
    "loop": repeated,
    "custom_jvp": lambda w, x: jax.nn.relu(normalised(jax.nn.relu(x[None] @ w))).sum(),
    "custom_vjp": in_a_custom_vjp,
    "in an inner gradient": lambda w, x: jnp.square(jax.grad(lambda w: normalised(x[None] @ w).sum())(w)).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_normalising_over_the_batch_axis_is_warned_of(name):
    with pytest.warns(UserWarning, match=r"batch axis of size 1.*\n  .*test_batch_statistics\.py"):
        look_at(COUPLED[name], SQUARE, VECTORS[0])


def test_a_batch_axis_that_the_examples_have_already_is_one_too():
    with pytest.warns(UserWarning, match="batch axis of size 1"):
        look_at(lambda w, x: normalised(x @ w).sum(), SQUARE, VECTORS[:1])


def inner_step(model):
    """Take a gradient step in the loss: the bias's gradient is a sum over the batch axis."""

    def loss(w, x):
        params = {"w": w, "b": jnp.zeros(4)}
        inner = lambda params: jnp.square(model(params, x[None])).sum()
        grads = jax.grad(inner)(params)
        return inner(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

    return loss


def affine(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def own_rule(params, x):
    tanh = jax.custom_vjp(jnp.tanh)
    tanh.defvjp(lambda y: (jnp.tanh(y), y), lambda y, dy: (dy * (1 - jnp.tanh(y) ** 2),))
    return tanh(x @ params["w"] + params["b"])


def twice(params, x):
    return jax.lax.scan(lambda x, _: (affine(params, x), None), x, None, length=2)[0]


def two_uses_of_a_pooled_image(w, x):
    image = jnp.tanh(jnp.outer(x, x)[None, :, :, None] * w[0])
    return jnp.square(jnp.tanh(image.mean((0, 1, 2)) @ w)).sum()


APART = {
    "the mean of the losses": lambda w, x: jnp.square(x[None] @ w).mean(0).sum(),
    "the mean of losses with weights": lambda w, x: (jnp.square(x[None] @ w) * x).sum(0).mean(),
    "everything at once": lambda w, x: normalised(x[None] @ w, (0, 1)).sum(),
    "each sample": lambda w, x: normalised(x[None] @ w, -1).sum(),
    "pooling": two_uses_of_a_pooled_image,
    "an inner gradient": inner_step(affine),
    "an inner gradient, jit": inner_step(jax.jit(affine)),
    "an inner gradient, checkpoint": inner_step(jax.checkpoint(affine)),
    "an inner gradient, scan": inner_step(twice),
    "an inner gradient, custom_vjp": inner_step(own_rule),
    "a standardised weight": lambda w, x: jnp.tanh(x @ normalised(w[None], (0, 1))[0]).sum(),
    "a standardised weight, its axis last": lambda w, x: (x[None] @ normalised(w.T[None], (0, 2))[0]).sum(),
    "vmap": lambda w, x: jax.vmap(lambda x: normalised(x @ w))(x[None]).sum(),
    "one group of channels": lambda w, x: normalised((x @ w).reshape(1, 4), 1).sum(),
    "a metric": lambda w, x: (x[None] @ w).sum() + jax.lax.stop_gradient((x[None] @ w).max(0)).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_other_reductions_are_not(name, no_warning):
    look_at(APART[name], SQUARE, VECTORS[0])


# Attention to one token


def attention(queries, tokens, w, scores="qhd,khd->hqk", axis=-1):
    q, k, v = (x.reshape(-1, 2, 2) for x in (queries @ w, tokens @ w, tokens @ w.T))
    weights = jax.nn.softmax(jnp.einsum(scores, q, k), axis=axis)
    mixed = jnp.einsum(f"{scores[-3:]},khd->qhd", weights, v)
    return jnp.square(queries.reshape(q.shape) + mixed).sum()


def by_jax(queries, tokens, w):
    q, k, v = (x.reshape(1, -1, 2, 2) for x in (queries @ w, tokens @ w, tokens))
    return jnp.square(jax.nn.dot_product_attention(q, k, v)).sum()


def by_equinox(queries, tokens, w):
    layer = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))
    layer = jax.tree.map(lambda leaf: leaf * w[0, 0] if eqx.is_array(leaf) else leaf, layer)
    return jnp.square(layer(queries, tokens, tokens)).sum()


def by_flax(queries, tokens, w):
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, w[0, 0]),
        jax.eval_shape(module.init, jax.random.key(0), queries, tokens),
    )
    return jnp.square(module.apply(variables, queries, tokens)).sum()


ATTENTION = {
    "by hand": attention,
    "keys not last": lambda q, t, w: attention(q, t, w, "qhd,khd->qkh", 1),
    "jax.nn": by_jax,
    "Equinox": by_equinox,
    "Flax": by_flax,
}


@pytest.mark.parametrize("own_axis", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_a_token_to_itself_is_not(name, own_axis, no_warning):
    one = (lambda x: x) if own_axis else (lambda x: x[None])
    loss = lambda w, x: ATTENTION[name](one(x), one(x), w)
    look_at(loss, SQUARE, VECTORS[:1] if own_axis else VECTORS[0])


@pytest.mark.parametrize("queries", ["of the example", "learned"])
@pytest.mark.parametrize("name", ["by hand", "jax.nn", "Equinox", "Flax"])
def test_attention_of_many_queries_to_one_token_is_not(name, queries, no_warning):
    of = {"of the example": lambda w, x: jnp.outer(w[0], x), "learned": lambda w, x: w}[queries]
    look_at(lambda w, x: ATTENTION[name](of(w, x), x[None], w), SQUARE, VECTORS[0])


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_not(name, no_warning):
    def build_and_look():
        model = ZOO[name]("small")
        look_at(model.loss, model.params, *(leaf[0] for leaf in model.batch(2)))

    jax.eval_shape(build_and_look)  # nothing is computed


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "alexnet", "resnet18"])
def test_the_models_of_the_command_are_not(name, no_warning):
    module = build_model(name, 10, width=0.05, dropout_rate=0.2)
    loss = classification_loss(module, dropout=True)

    def build_and_look(image, key):
        params = module.init(key, image[None])["params"]
        look_at(lambda *inputs: loss(*inputs)[0], params, image, jnp.zeros((), int), key)

    jax.eval_shape(build_and_look, jnp.ones((16, 16, 3)), jax.random.key(0))


def test_it_is_warned_of_once_a_trace_where_the_engine_is_called():
    f = jax.jit(psc.clipped_value_and_grad(COUPLED["by hand"], 1.0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        f(SQUARE, VECTORS)
        f(SQUARE, 2 * VECTORS)
    assert [warning.filename for warning in seen] == [__file__]


def test_many_places_are_counted():
    def loss(w, x):
        y = x[None] @ w
        total = normalised(y)
        total += y - jnp.max(y, axis=0)
        total += y - jnp.min(y, axis=0)
        return (total / jnp.prod(y, axis=0)).sum()

    with pytest.warns(UserWarning, match="and 2 more"):
        look_at(loss, SQUARE, VECTORS[0])
