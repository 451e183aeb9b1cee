"""Compare the train steps with a NumPy loop; check donation, retracing and errors."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import psclip_optax as psc
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.steps import (
    gradient_function,
    linen_eval_step,
    linen_train_step,
    nnx_train_step,
)
from tests import slow
from tests.numerics import enable_x64

ALPHA, BETA, LEARNING_RATE, MOMENTUM = 2.0, 1.5, 0.05, 0.9
NUM_SAMPLES, NUM_STEPS = 8, 10
X, Y = np.ones([4, 3], np.float32), np.ones(4, np.float32)


def clipped_sgd():
    return optax.chain(
        psc.per_sample_clip(psc.growing_threshold(ALPHA, BETA)),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
    )


class LinenRegressor(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.Dense(5)(x)))[..., 0]


class NNXRegressor(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.hidden = nnx.Linear(3, 5, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(5, 1, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))[..., 0]


def linen_loss(params, x, y):
    return (LinenRegressor().apply({"params": params}, x) - y) ** 2


def nnx_loss(model, x, y):
    return (model(x) - y) ** 2


def train_state(params, tx) -> Any:
    return TrainState.create(apply_fn=None, params=params, tx=tx)


def linen_state(tx, dtype=jnp.float32):
    params = LinenRegressor().init(jax.random.key(0), jnp.zeros(3))["params"]
    return train_state(jax.tree.map(lambda leaf: leaf.astype(dtype), params), tx)


def nnx_pair(tx, dtype=jnp.float32):
    model = NNXRegressor(nnx.Rngs(0), dtype)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def heavy_tailed_batches(dtype, num_steps=NUM_STEPS):
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        x = rng.standard_normal([NUM_SAMPLES, 3]).astype(dtype)
        y = rng.standard_t(1.5, NUM_SAMPLES).astype(dtype)
        yield x, y, rng.random(NUM_SAMPLES) < 0.7


def numpy_clipped_sgd(per_sample_grads, params, batches):
    """Run PS-Clip-SGD with momentum in float64, in NumPy except for the per-sample gradients."""
    treedef = jax.tree.structure(params)
    params = [leaf.astype(np.float64) for leaf in leaves(params)]
    velocity = [np.zeros_like(leaf) for leaf in params]
    scales_seen = []
    for x, y, mask in batches:
        grads = leaves(per_sample_grads(jax.tree.unflatten(treedef, params), x, y))
        norms = np.sqrt(sum((g.reshape(len(x), -1) ** 2).sum(axis=1) for g in grads))
        taus = ALPHA * np.cumsum(mask) ** (1 / BETA)
        scales = np.where(mask, np.minimum(1, taus / norms), 0)
        means = [np.tensordot(scales, g, axes=1) / mask.sum() for g in grads]
        velocity = [MOMENTUM * v + mean for v, mean in zip(velocity, means, strict=True)]
        params = [p - LEARNING_RATE * v for p, v in zip(params, velocity, strict=True)]
        scales_seen += scales[mask].tolist()
    assert 0.1 < np.mean(np.array(scales_seen) < 1) < 0.9, "clipped and unclipped samples are met"
    return params


def assert_relative_error(actual, expected, tolerance):
    actual, expected = (np.concatenate([leaf.ravel() for leaf in t]) for t in (actual, expected))
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def train_linen(dtype, batches):
    state = linen_state(clipped_sgd(), dtype)
    gradient = jax.jit(jax.vmap(jax.grad(linen_loss), in_axes=(None, 0, 0)))
    expected = numpy_clipped_sgd(gradient, state.params, batches)
    step = linen_train_step(linen_loss)
    for x, y, mask in batches:
        state, _ = step(state, x, y, sample_mask=mask)
    assert state.step == NUM_STEPS
    return leaves(state.params), expected


def train_nnx(dtype, batches):
    model, optimizer = nnx_pair(clipped_sgd(), dtype)
    graphdef, params = nnx.split(model)
    gradient = jax.jit(
        jax.vmap(
            jax.grad(lambda params, x, y: nnx_loss(nnx.merge(graphdef, params), x, y)),
            in_axes=(None, 0, 0),
        )
    )
    expected = numpy_clipped_sgd(gradient, params, batches)
    step = nnx_train_step(nnx_loss)
    for x, y, mask in batches:
        step(model, optimizer, x, y, sample_mask=mask)
    assert optimizer.step[...] == NUM_STEPS
    return leaves(nnx.state(model)), expected


@pytest.mark.parametrize("train", [train_linen, train_nnx])
def test_ten_steps_against_numpy(train):
    with enable_x64(True):
        batches = list(heavy_tailed_batches(np.float64))
        actual, expected = train(jnp.float64, batches)
    assert all(leaf.dtype == np.float64 for leaf in actual)
    assert_relative_error(actual, expected, 1e-12)


@pytest.mark.parametrize("train", [train_linen, train_nnx])
def test_ten_steps_in_float32(train):
    actual, expected = train(jnp.float32, list(heavy_tailed_batches(np.float32)))
    assert all(leaf.dtype == np.float32 for leaf in actual)
    assert_relative_error(actual, expected, 1e-5)


def test_positions_replace_the_count():
    """Pass two samples as the third and fourth: their thresholds, and a mean over two."""
    state = train_state({"w": jnp.zeros(2)}, psc.ps_clip_sgd(1.0, alpha=1.0, beta=2.0))
    step: Any = linen_train_step(lambda params, x: jnp.dot(params["w"], x))
    state, _ = step(state, 100 * jnp.eye(2), positions=jnp.array([3, 4]))
    np.testing.assert_allclose(state.params["w"], [-np.sqrt(3) / 2, -1.0], rtol=1e-6)


@pytest.mark.parametrize("gradients", ["per_sample", "mean"])
def test_linen_state_is_donated_and_traced_once(gradients):
    tx = clipped_sgd() if gradients == "per_sample" else optax.sgd(0.1, momentum=0.9)
    traces = []

    def counted_loss(params, x, y):
        traces.append(x.shape)
        return linen_loss(params, x, y)

    step = linen_train_step(counted_loss, gradients=gradients)
    state = linen_state(tx)
    for x, y, mask in heavy_tailed_batches(np.float32, num_steps=3):
        old = jax.tree.leaves((state.params, optax.tree_utils.tree_get(state.opt_state, "trace")))
        state, _ = step(state, x, y, sample_mask=mask)
        assert all(leaf.is_deleted() for leaf in old)
    assert traces == [(3,)]


@pytest.mark.parametrize("gradients", ["per_sample", "mean"])
def test_nnx_pair_is_donated_and_traced_once(gradients):
    tx = clipped_sgd() if gradients == "per_sample" else optax.sgd(0.1, momentum=0.9)
    traces = []

    def counted_loss(model, x, y):
        traces.append(x.shape)
        return nnx_loss(model, x, y)

    step = nnx_train_step(counted_loss, gradients=gradients)
    model, optimizer = nnx_pair(tx)
    for x, y, mask in heavy_tailed_batches(np.float32, num_steps=3):
        old = jax.tree.leaves(nnx.state(model)) + jax.tree.leaves(nnx.state(optimizer))
        step(model, optimizer, x, y, sample_mask=mask)
        assert all(leaf.is_deleted() for leaf in old if leaf.ndim)
    assert traces == [(3,)]


def plain_adam(params, batches, gradient):
    tx = optax.adam(0.01)
    state = tx.init(params)
    for x, y, mask in batches:
        updates, state = tx.update(gradient(params, x[mask], y[mask]), state, params)
        params = optax.apply_updates(params, updates)
    return leaves(params)


def with_nan_padding(batches):
    for x, y, mask in batches:
        yield np.where(mask[:, None], x, np.nan), np.where(mask, y, np.inf), mask


def test_linen_mean_gradients_are_plain_optax_on_the_samples_that_count():
    batches = list(heavy_tailed_batches(np.float32, num_steps=4))
    state = linen_state(optax.adam(0.01))

    def mean_loss(params, x, y):
        return jnp.mean(linen_loss(params, x, y))

    expected = plain_adam(state.params, batches, jax.grad(mean_loss))
    step = linen_train_step(linen_loss, gradients="mean")
    for x, y, mask in with_nan_padding(batches):
        state, metrics = step(state, x, y, sample_mask=mask)
        assert set(metrics) == {"loss"}
        assert np.isfinite(metrics["loss"])
    assert_relative_error(leaves(state.params), expected, 1e-5)


def test_nnx_mean_gradients_are_plain_optax_on_the_samples_that_count():
    batches = list(heavy_tailed_batches(np.float32, num_steps=4))
    model, optimizer = nnx_pair(optax.adam(0.01))
    graphdef, params = nnx.split(model)

    def mean_loss(params, x, y):
        return jnp.mean(nnx_loss(nnx.merge(graphdef, params), x, y))

    expected = plain_adam(params, batches, jax.grad(mean_loss))
    step = nnx_train_step(nnx_loss, gradients="mean")
    for x, y, mask in with_nan_padding(batches):
        step(model, optimizer, x, y, sample_mask=mask)
    assert_relative_error(leaves(nnx.state(model)), expected, 1e-5)


def product_loss(params, x):
    """Return the loss w · x, with gradient x, and two aux scalars."""
    value = params["w"] * x
    return value, {"x": x, "is_large": x > 5}


def product_step(x, mask) -> Any:
    tx = optax.chain(psc.per_sample_clip(4.0), optax.sgd(1.0))
    step = linen_train_step(product_loss, has_aux=True)
    return step(train_state({"w": jnp.ones(())}, tx), jnp.array(x), sample_mask=mask)


def test_metrics_against_hand_computed_numbers():
    mask = jnp.array([True, True, True, True, False])
    state, metrics = product_step([1.0, 2.0, 8.0, jnp.inf, 100.0], mask)
    expected = {
        "loss": 11 / 3,
        "aux": {"x": 11 / 3, "is_large": 1 / 3},
        "num_samples": 4,
        "num_clipped": 1,
        "num_nonfinite": 1,
        "clipped_share": 1 / 4,
        "mean_scale": (1 + 1 + 0.5) / 3,
        "median_norm": 2,
        "max_norm": 8,
    }
    assert jax.tree.structure(metrics) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), metrics, expected)
    np.testing.assert_allclose(state.params["w"], 1 - (1 + 2 + 4) / 4)


def test_no_sample_gives_zeros():
    state, metrics = product_step([1.0, jnp.nan], jnp.zeros(2, bool))
    assert all(leaf == 0 for leaf in jax.tree.leaves(metrics))
    assert state.params["w"] == 1.0


def test_hyperparameters_set_by_hand_do_not_retrace():
    traces = []

    def loss(params, x):
        traces.append(x.shape)
        return params["w"] * x

    tx = optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=1.0, alpha=1.0, beta=2.0)
    state = train_state({"w": jnp.zeros(())}, tx)
    step: Any = linen_train_step(loss)
    state, _ = step(state, jnp.array([100.0]))
    assert state.params["w"] == -1.0
    state.opt_state.hyperparams["alpha"] = jnp.float32(3.0)
    state, metrics = step(state, jnp.array([100.0]))
    assert state.params["w"] == -4.0
    assert metrics["num_clipped"] == 1
    assert traces == [()]


@pytest.mark.parametrize("gradients", ["per_sample", "mean"])
def test_linen_dropout_has_a_key_of_each_sample(gradients):
    model = build_model("mlp", 4, width=0.1, dropout_rate=0.5)
    images, labels = jnp.ones([NUM_SAMPLES, 8, 8, 1]), jnp.zeros(NUM_SAMPLES, int)
    keys = jax.random.split(jax.random.key(2), NUM_SAMPLES)
    loss = classification_loss(model, dropout=True)
    tx = clipped_sgd() if gradients == "per_sample" else optax.sgd(0.1)
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    of_one = jax.jit(loss)
    losses = [of_one(params, *example)[0] for example in zip(images, labels, keys, strict=True)]
    step = linen_train_step(loss, gradients=gradients, has_aux=True)
    _, metrics = step(train_state(params, tx), images, labels, keys)
    assert np.std(losses) > 0
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


class Stateful(nnx.Module):
    """A regressor with one additional layer, which may have state."""

    def __init__(self, extra):
        self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        self.extra = extra

    def __call__(self, x, **options):
        return self.linear(self.extra(x[None], **options))[0, 0]


def stateful_loss(model, x, y):
    return (model(x) - y) ** 2


def stateful_pair(extra):
    model = Stateful(extra)
    return model, nnx.Optimizer(model, clipped_sgd(), wrt=nnx.Param)


def test_nnx_dropout_has_a_key_of_each_sample():
    model, optimizer = stateful_pair(nnx.Dropout(0.5))
    keys = jax.random.split(jax.random.key(2), NUM_SAMPLES)
    x, y = jnp.ones([NUM_SAMPLES, 3]), jnp.zeros(NUM_SAMPLES)

    def loss(model, x, y, key):
        return (model(x, rngs=nnx.Rngs(dropout=key)) - y) ** 2

    losses = [loss(model, *example) for example in zip(x, y, keys, strict=True)]
    metrics = nnx_train_step(loss)(model, optimizer, x, y, keys)
    assert np.std(losses) > 0
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_nnx_state_that_is_only_read_stays():
    norm = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.array([1.0, 2.0, 3.0])
    model, optimizer = stateful_pair(norm)
    before = leaves(nnx.state(model, nnx.Param))
    nnx_train_step(stateful_loss)(model, optimizer, jnp.ones([4, 3]), jnp.ones(4))
    np.testing.assert_array_equal(model.extra.mean[...], [1.0, 2.0, 3.0])
    assert not np.allclose(before[-1], leaves(nnx.state(model, nnx.Param))[-1])


class Recorder(nnx.Module):
    def __call__(self, x):
        self.seen = nnx.Intermediate(x)
        return x


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "'extra.rngs.count'"),
        (lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)), "'extra.mean', 'extra.var'"),
        (Recorder, "'extra.seen'"),
    ],
)
def test_nnx_state_that_a_sample_would_write_is_refused(extra, path):
    model, optimizer = stateful_pair(extra())
    with pytest.raises(ValueError, match=f"writes to {path}.* one key a sample"):
        nnx_train_step(stateful_loss)(model, optimizer, jnp.ones([4, 3]), jnp.ones(4))


def test_nnx_trains_what_wrt_selects():
    model = NNXRegressor(nnx.Rngs(0))
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, clipped_sgd(), wrt=head)
    hidden, before = leaves(nnx.state(model.hidden)), leaves(nnx.state(model.head))
    x, y, _ = next(heavy_tailed_batches(np.float32))
    features = jnp.tanh(model.hidden(jnp.asarray(x)))
    norms_of_head = 2 * jnp.abs(model(x) - y) * jnp.sqrt(1 + jnp.sum(features**2, axis=1))
    metrics = nnx_train_step(nnx_loss)(model, optimizer, x, y)
    chex.assert_trees_all_equal(hidden, leaves(nnx.state(model.hidden)))
    assert not np.allclose(before[0], leaves(nnx.state(model.head))[0])
    np.testing.assert_allclose(metrics["max_norm"], norms_of_head.max(), rtol=1e-5)


def test_padded_evaluation_is_exact():
    x, y, _ = next(heavy_tailed_batches(np.float32))
    params = linen_state(optax.identity()).params

    def loss(params, x, y):
        value = linen_loss(params, x, y)
        return value, {"small": value < 1}

    losses = jax.vmap(linen_loss, in_axes=(None, 0, 0))(params, x, y)
    step = linen_eval_step(loss, has_aux=True)
    whole = step(params, x[:5], y[:5])
    padding = np.full([2, 3], np.nan, np.float32)
    mask = np.array([True] * 3 + [False] * 2)
    padded = step(params, np.concatenate([x[5:], padding]), np.resize(y[5:], 5), sample_mask=mask)
    total = jax.tree.map(jnp.add, whole, padded)
    assert total["count"] == NUM_SAMPLES
    np.testing.assert_allclose(total["loss"], losses.sum(), rtol=1e-5)
    np.testing.assert_array_equal(total["aux"]["small"], (losses < 1).sum())
    assert 0 < total["aux"]["small"] < NUM_SAMPLES


def test_evaluation_shows_a_loss_that_diverged():
    sums = linen_eval_step(lambda params, x: params / x)(jnp.array(1.0), jnp.array([1.0, 0.0]))
    assert sums["loss"] == np.inf
    assert sums["count"] == 2


@pytest.mark.parametrize("mode", slow.but(["auto", "two_pass"], ["auto", "two_pass", "vmap"]))
def test_clipped_gradients_train_as_stacked_ones_do(mode):
    batches = list(heavy_tailed_batches(np.float32, 4))
    threshold = psc.growing_threshold(ALPHA, BETA)
    stacked, linen = linen_state(clipped_sgd()), linen_state(optax.sgd(LEARNING_RATE, MOMENTUM))
    model, optimizer = nnx_pair(optax.sgd(LEARNING_RATE, MOMENTUM))
    nnx_stacked = nnx_pair(clipped_sgd())
    step, nnx_step = linen_train_step(linen_loss), nnx_train_step(nnx_loss)
    engine = linen_train_step(linen_loss, threshold=threshold, mode=mode)
    nnx_engine = nnx_train_step(nnx_loss, threshold_from=lambda _: threshold, mode=mode)
    for x, y, mask in batches:
        stacked, expected = step(stacked, x, y, sample_mask=mask)
        linen, metrics = engine(linen, x, y, sample_mask=mask)
        nnx_expected = nnx_step(*nnx_stacked, x, y, sample_mask=mask)
        nnx_metrics = nnx_engine(model, optimizer, x, y, sample_mask=mask)
        assert_relative_error(leaves(metrics), leaves(expected), 1e-5)
        assert_relative_error(leaves(nnx_metrics), leaves(nnx_expected), 1e-5)
    assert set(metrics) == set(expected)
    assert_relative_error(leaves(linen.params), leaves(stacked.params), 1e-5)
    assert_relative_error(leaves(nnx.state(model)), leaves(nnx.state(nnx_stacked[0])), 1e-5)


@pytest.mark.parametrize(
    ("options", "train_step"),
    slow.diagonal(
        [
            {"mode": "two_pass"},
            {"microbatch_size": 3},
            {"clip_at": "micro-batch", "microbatch_size": 2},
        ],
        [linen_train_step, nnx_train_step],
    ),
)
def test_a_built_gradient_function_trains_as_the_loss_with_its_options(options, train_step):
    batches, sgd = list(heavy_tailed_batches(np.float32, 3)), optax.sgd(LEARNING_RATE)
    threshold = psc.growing_threshold(ALPHA, BETA)
    loss = linen_loss if train_step is linen_train_step else nnx_loss
    built = psc.clipped_value_and_grad(loss, threshold, **options)
    results = [
        trained(train_step, sgd, batches, built),
        trained(train_step, sgd, batches, gradient_function(built)),
        trained(
            train_step,
            sgd,
            batches,
            psc.clipped_value_and_grad(loss, **options),
            threshold=threshold,
        ),
        trained(train_step, sgd, batches, threshold=threshold, **options),
    ]
    chex.assert_trees_all_equal(*((params, metrics) for params, _, metrics in results))


def test_a_built_gradient_function_keeps_its_aux():
    loss = lambda params, x, y: (linen_loss(params, x, y), {"y": y})
    step = linen_train_step(psc.clipped_value_and_grad(loss, 1.0, has_aux=True), return_norms=True)
    _, metrics = step(linen_state(optax.sgd(0.1)), X, 2 * Y)
    assert metrics["aux"]["y"] == 2
    assert metrics["norms"].shape == (4,)


def test_without_a_threshold_a_built_gradient_function_takes_the_automatic_one():
    tx = optax.chain(psc.track_norms(), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
    batches = list(heavy_tailed_batches(np.float32))
    got, _, metrics = trained(linen_train_step, tx, batches, psc.clipped_value_and_grad(linen_loss))
    expected, _, _ = trained(linen_train_step, tx, batches)
    chex.assert_trees_all_equal(got, expected)
    assert metrics[0]["threshold_scale"] > 0


def adaptive_rule():
    return psc.moment_threshold(1.5, scale=0.3, decay=0.9)


def trained(train_step, tx, batches, loss=None, **options):
    """Return parameters, optimizer state and all metrics, of Linen or NNX."""
    pair = nnx_pair(tx) if train_step is nnx_train_step else None
    state = None if pair else linen_state(tx)
    step = train_step(loss or (nnx_loss if pair else linen_loss), **options)
    metrics = []
    for x, y, mask in batches:
        if pair:
            metrics.append(step(*pair, x, y, sample_mask=mask))
        else:
            state, figures = step(state, x, y, sample_mask=mask)
            metrics.append(figures)
    params, opt_state = (
        (nnx.state(pair[0]), pair[1].opt_state) if pair else (state.params, state.opt_state)
    )
    return leaves(params), opt_state, metrics


@pytest.mark.parametrize("train_step", [linen_train_step, nnx_train_step])
def test_adaptive_threshold_of_tracked_norms_is_that_of_the_stacked_face(train_step):
    rule, sgd = adaptive_rule(), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    batches = list(heavy_tailed_batches(np.float32))
    batches[3][1][:2] = np.nan
    got, opt_state, metrics = trained(
        train_step, optax.chain(psc.track_norms(rule), sgd), batches, threshold=rule
    )
    expected, clip_state, stacked_metrics = trained(
        train_step, optax.chain(psc.per_sample_clip(rule), sgd), batches
    )
    assert_relative_error(got, expected, 1e-5)
    assert_relative_error(leaves(opt_state), leaves(clip_state)[8:], 1e-5)
    scales = [float(figures.pop("threshold_scale")) for figures in metrics]
    assert scales[0] == 0
    assert len(set(scales)) == len(scales)
    for figures, stacked in zip(metrics[1:], stacked_metrics[1:], strict=True):
        assert figures["num_clipped"] == stacked["num_clipped"]
        assert figures.keys() == stacked.keys()


def test_rules_by_group_of_tracked_norms_are_those_of_the_stacked_face():
    sgd = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    rules = jax.tree.map(lambda _: adaptive_rule(), linen_state(sgd).params)
    batches = list(heavy_tailed_batches(np.float32))
    tx = optax.chain(psc.track_norms(rules), sgd)
    got, _, metrics = trained(linen_train_step, tx, batches, threshold=rules, return_norms=True)
    stacked_tx = optax.chain(psc.per_sample_clip(rules), sgd)
    expected, _, stacked_metrics = trained(linen_train_step, stacked_tx, batches)
    assert_relative_error(got, expected, 1e-5)
    number = len(jax.tree.leaves(rules, is_leaf=lambda x: isinstance(x, psc.AdaptiveThreshold)))
    assert number > 1
    for figures, stacked in zip(metrics[1:], stacked_metrics[1:], strict=True):
        assert figures.pop("norms").shape == (len(batches[0][0]), number)
        scales = figures.pop("threshold_scale")
        assert scales.shape == (number,)
        assert len(set(scales.tolist())) == number
        np.testing.assert_array_equal(figures["num_clipped"], stacked["num_clipped"])
        assert figures.keys() == stacked.keys()


def test_adaptive_threshold_of_micro_batches_follows_their_norms():
    rule = psc.min_norm_threshold()
    tx = optax.chain(psc.track_norms(rule), optax.sgd(1.0))
    state = train_state({"w": jnp.zeros(2)}, tx)
    step = linen_train_step(
        lambda params, x: jnp.dot(params["w"], x),
        threshold=rule,
        microbatch_size=2,
        clip_at="micro-batch",
    )
    x = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 9.0], [0.0, 1.0]])  # means have norms 2 and 5
    mask = jnp.array([True, True, True, True])
    for clipped, scale in [(2, 0.0), (1, 2.0)]:
        state, metrics = step(state, x, sample_mask=mask)
        assert (int(metrics["num_clipped"]), float(metrics["threshold_scale"])) == (clipped, scale)
    np.testing.assert_allclose(state.params["w"], [-1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("train_step", [linen_train_step, nnx_train_step])
@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([], "holds 0 TrackNormsState. Write optax.chain"),
        ([adaptive_rule()] * 2, "holds 2 TrackNormsState. Write optax.chain"),
        ([psc.moment_threshold()], "holds 1 TrackNormsState, of another rule"),
        ([psc.min_norm_threshold()], "holds 1 TrackNormsState, of another rule"),
    ],
    ids=["none", "two", "another order", "another kind"],
)
def test_adaptive_threshold_needs_the_norms_of_its_rule_tracked(train_step, links, message):
    tx = optax.chain(*map(psc.track_norms, links), optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        trained(train_step, tx, heavy_tailed_batches(np.float32, 1), threshold=adaptive_rule())


@pytest.mark.parametrize(
    ("train_step", "options"),
    slow.diagonal(
        [linen_train_step, nnx_train_step], [{}, {"gradients": "clipped", "microbatch_size": 3}]
    ),
)
def test_without_a_threshold_tracked_norms_are_clipped_at_the_automatic_one(train_step, options):
    batches = list(heavy_tailed_batches(np.float32))
    batches[0][1][:2] = np.nan
    sgd = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    got, opt_state, metrics = trained(
        train_step, optax.chain(psc.track_norms(), sgd), batches, **options
    )
    stacked = psc.ps_clip_sgd(LEARNING_RATE, momentum=MOMENTUM)
    expected, clip_state, stacked_metrics = trained(train_step, stacked, batches)
    assert_relative_error(got, expected, 1e-5)
    assert_relative_error(leaves(opt_state), leaves(clip_state)[8:], 1e-5)
    assert metrics[0]["threshold_scale"] > 0, "the first batch is clipped by its own norms"
    for figures, by_stack in zip(metrics, stacked_metrics, strict=True):
        assert figures["num_clipped"] == by_stack["num_clipped"]


@pytest.mark.parametrize("build", [linen_train_step, nnx_train_step])
@pytest.mark.parametrize(
    "options",
    [
        {"gradients": "mean", "threshold": 1.0},
        {"gradients": "per_sample", "threshold": 1.0},
        {"threshold": 1.0, "threshold_from": lambda _: 1.0},
    ],
)
def test_a_threshold_goes_with_clipped_gradients_alone(build, options):
    with pytest.raises(ValueError, match='"clipped" takes one of threshold and threshold_from'):
        build(linen_loss, **options)


@pytest.mark.parametrize("train_step", [linen_train_step, nnx_train_step])
def test_norms_are_of_the_samples_and_not_a_number_for_padding(train_step):
    batches = list(heavy_tailed_batches(np.float32, 2))
    options = {"threshold": 0.1, "return_norms": True}
    *_, metrics = trained(train_step, optax.sgd(0.1), batches, **options)
    for (*_, mask), figures in zip(batches, metrics, strict=True):
        norms = np.asarray(figures["norms"])
        np.testing.assert_array_equal(np.isnan(norms), ~mask)
        np.testing.assert_allclose(norms[mask].max(), figures["max_norm"], rtol=1e-6)
        np.testing.assert_allclose(np.median(norms[mask]), figures["median_norm"], rtol=1e-6)


def test_norms_of_micro_batches_are_one_for_each():
    step = linen_train_step(
        lambda params, x: jnp.dot(params["w"], x),
        threshold=1.0,
        microbatch_size=2,
        clip_at="micro-batch",
        return_norms=True,
    )
    x = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 9.0], [0.0, 1.0]])
    _, metrics = step(train_state({"w": jnp.zeros(2)}, optax.sgd(1.0)), x)
    np.testing.assert_allclose(metrics["norms"], [2.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize("build", [linen_train_step, nnx_train_step])
@pytest.mark.parametrize("gradients", ["per_sample", "mean"])
def test_norms_are_of_clipped_gradients_alone(build, gradients):
    with pytest.raises(ValueError, match=f"return_norms is of .*, got gradients='{gradients}'"):
        build(linen_loss, gradients=gradients, return_norms=True)


@pytest.mark.parametrize("build", [linen_train_step, nnx_train_step])
def test_unknown_gradients_are_refused(build):
    with pytest.raises(ValueError, match="'per_sample', 'mean', 'clipped', got 'stacked'"):
        build(linen_loss, gradients="stacked")


@pytest.mark.parametrize("build", [linen_train_step, nnx_train_step])
@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"mode": "fast"}, ValueError, "'vmap', got 'fast'"),
        ({"gradients": "mean", "microbatch_size": 0}, ValueError, "positive int or None, got 0"),
        (
            {"gradients": "mean", "microbatch_size": 2, "clip_at": "micro-batch"},
            ValueError,
            "clip_at is of .*, got 'micro-batch' with gradients='mean'",
        ),
        ({"threshold_from": 1.0}, TypeError, "threshold_from is a function .*, got 1.0"),
    ],
)
def test_options_are_checked_before_the_first_step(build, options, error, expected):
    with pytest.raises(error, match=expected):
        build(linen_loss, **options)


@pytest.mark.parametrize("build", [linen_train_step, nnx_train_step, linen_eval_step])
def test_a_loss_that_is_no_function_is_refused(build):
    with pytest.raises(TypeError, match=r"the loss is a function .*, got 1\.0"):
        build(1.0)


@pytest.mark.parametrize("build", [linen_train_step, nnx_train_step])
def test_positions_have_no_use_where_micro_batches_are_clipped(build):
    options = {"threshold": 1.0, "microbatch_size": 2, "clip_at": "micro-batch"}
    step = build(linen_loss if build is linen_train_step else nnx_loss, **options)
    own = nnx_pair(optax.sgd(0.1)) if build is nnx_train_step else (linen_state(optax.sgd(0.1)),)
    with pytest.raises(ValueError, match="no use for them: leave them out"):
        step(*own, X, Y, positions=np.arange(1, 5))


def test_what_is_trained_comes_first_and_in_order():
    with pytest.raises(TypeError, match=r"flax.training.train_state.TrainState, got a dict"):
        linen_train_step(linen_loss)({"w": X}, X, Y)
    model, optimizer = nnx_pair(clipped_sgd())
    with pytest.raises(TypeError, match="got a Optimizer and a NNXRegressor"):
        nnx_train_step(nnx_loss)(optimizer, model, X, Y)
    with pytest.raises(TypeError, match=r"got a NNXRegressor and float32\[4, 3\]"):
        nnx_train_step(nnx_loss)(model, X, Y)


def call_linen(loss, *batch, tx=None, gradients: Any = "per_sample", has_aux=False, **options):
    step = linen_train_step(loss, gradients=gradients, has_aux=has_aux)
    return step(linen_state(clipped_sgd() if tx is None else tx), *batch, **options)


def call_nnx(loss, *batch, tx=None, gradients: Any = "per_sample", has_aux=False, **options):
    step = nnx_train_step(loss, gradients=gradients, has_aux=has_aux)
    return step(*nnx_pair(clipped_sgd() if tx is None else tx), *batch, **options)


@pytest.mark.parametrize("call", [call_linen, call_nnx])
@pytest.mark.parametrize(
    ("batch", "options", "expected"),
    [
        ((X, Y[:3]), {}, r"first axis of each, got shapes \[\[4, 3\], \[3\]\]"),
        ((X, 1.0), {}, r"got shapes \[\[4, 3\], \[\]\].*jax.random.split"),
        ((), {}, r"got shapes \[\]"),
        ((X, Y), {"sample_mask": np.ones(3, bool)}, r"sample_mask has shape \[4\].*got bool\[3\]"),
        ((X, Y), {"positions": np.arange(1, 4)}, r"positions has shape \[4\].*got int32\[3\]"),
        (
            (X, Y),
            {"tx": optax.sgd(0.1)},
            "holds 0 PerSampleClipState. For any optimizer pass threshold=…",
        ),
        ((X, Y), {"gradients": "mean"}, "take their first axis for samples"),
        (
            (X, Y),
            {"tx": optax.sgd(0.1), "gradients": "mean", "positions": np.arange(1, 5)},
            "no use for them: leave them out",
        ),
    ],
)
def test_what_a_step_refuses(call, batch, options, expected):
    with pytest.raises(ValueError, match=expected):
        call(lambda *example: jnp.array(0.0), *batch, **options)


@pytest.mark.parametrize("call", [call_linen, call_nnx])
@pytest.mark.parametrize(
    ("result", "has_aux", "expected"),
    [
        (lambda x, y: x * y, False, r"ONE example and returns a scalar, got float32\[3\]"),
        (lambda x, y: (y, y), False, r"got \(float32\[\], float32\[\]\).*has_aux=True"),
        (lambda x, y: None, False, "returns a scalar, got None"),
        (lambda x, y: "loss", False, "returns a scalar, got a str"),
        (lambda x, y: jnp.int32(y), False, r"real floating-point scalar, got int32\[\]"),
        (lambda x, y: y * 1j, False, r"real floating-point scalar, got complex64\[\]"),
        (lambda x, y: y, True, r"returns \(loss, aux\), got float32\[\]; return the pair"),
        (lambda x, y: (y, {"x": x}), True, r"aux\['x'\] is float32\[3\], but expected a scalar"),
        (lambda x, y: (y, {"x": "x"}), True, r"aux\['x'\] is a str, but expected an array"),
    ],
)
def test_losses_that_are_no_real_scalars_are_refused(call, result, has_aux, expected):
    with pytest.raises(TypeError, match=expected):
        call(lambda _, x, y: result(x, y), X, Y, has_aux=has_aux)
