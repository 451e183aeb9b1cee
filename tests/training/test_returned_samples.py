"""Compare the train steps' values of single samples with stacked gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import psclip_optax as psc
from psclip_optax.training.steps import linen_train_step, nnx_train_step

NUM_SAMPLES = 6
X = np.random.default_rng(0).normal(size=(NUM_SAMPLES, 3)).astype(np.float32)
Y = np.array([0.0, 1.0, 2.0, 3.0, 50.0, -1.0], np.float32)
MASK = np.array([True, True, False, True, True, True])
# NumPy arrays, because a step donates JAX arrays.
PARAMS = {"w": np.float32([0.1, -0.2, 0.3]), "b": np.float32(0.5)}


def linen_loss(params, x, y):
    return (jnp.dot(x, params["w"]) + params["b"] - y) ** 2


def linen_state():
    return TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))


def step_of_linen(x, y, threshold, mask=None, **options):
    step = linen_train_step(linen_loss, threshold=threshold, return_samples=True, **options)
    return step(linen_state(), x, y, sample_mask=mask)[1]


class Line(nnx.Module):
    def __init__(self):
        self.w, self.b = (nnx.Param(jnp.array(PARAMS[name])) for name in ("w", "b"))


def step_of_nnx(x, y, threshold, mask=None, **options):
    model = Line()
    loss = lambda model, x, y: (jnp.dot(x, model.w[...]) + model.b[...] - y) ** 2
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    step = nnx_train_step(loss, threshold=threshold, return_samples=True, **options)
    return step(model, optimizer, x, y, sample_mask=mask)


def stacked(x, y):
    losses, grads = jax.vmap(jax.value_and_grad(linen_loss), (None, 0, 0))(PARAMS, x, y)
    return losses, grads


@pytest.mark.parametrize("step", [step_of_linen, step_of_nnx])
@pytest.mark.parametrize("mode", ["one_pass", "two_pass", "vmap"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_samples_are_those_of_stacked_gradients(step, mode, mask):
    samples = step(X, Y, psc.growing_threshold(1.0, 2.0), mask, mode=mode)["samples"]
    losses, grads = stacked(X, Y)
    norms = np.sqrt(np.sum(grads["w"] ** 2, axis=1) + grads["b"] ** 2)
    counts = np.ones(NUM_SAMPLES, bool) if mask is None else mask
    scales = np.minimum(1, np.sqrt(np.maximum(np.cumsum(counts), 1)) / norms)
    for name, expected in (("loss", losses), ("norm", norms), ("scale", scales)):
        wanted = np.where(counts, expected, np.nan)
        np.testing.assert_allclose(samples[name], wanted, rtol=1e-5, err_msg=name)


def test_by_group_they_are_of_the_whole_gradient():
    thresholds = {"w": 0.5, "b": 2.0}
    # Groups whose squares overflow together, a gradient of 0, and one that is dropped.
    x, y = X.copy(), Y.copy()
    y[0], y[1], y[2] = 8e18, jnp.dot(x[1], PARAMS["w"]) + PARAMS["b"], np.inf
    samples = step_of_linen(x, y, thresholds)["samples"]
    _, grads = stacked(x.astype(np.float64), y.astype(np.float64))
    by_group = np.stack(
        [np.abs(grads["b"]), np.linalg.norm(np.asarray(grads["w"], np.float64), axis=1)], axis=1
    )
    limits = np.array([2.0, 0.5])
    with np.errstate(all="ignore"):
        left = np.minimum(by_group, limits)
        norms, after = (np.linalg.norm(values, axis=1) for values in (by_group, left))
        scales = np.where(norms > 0, after / norms, 1)
    own = np.array([0, 3, 4, 5])
    np.testing.assert_allclose(np.asarray(samples["norm"])[own], norms[own], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(samples["scale"])[own], scales[own], rtol=1e-5)
    assert samples["norm"][1] < 1e-5
    assert samples["scale"][1] == 1
    assert not np.isfinite(samples["norm"][2])
    assert samples["scale"][2] == 0


def test_they_rank_the_sample_that_is_wrong_first():
    samples = step_of_linen(X, Y, 1.0, MASK)["samples"]
    found = psc.tails.most_clipped(np.arange(NUM_SAMPLES), **samples)
    assert found.index[0] == 4
    assert sorted(found.index) == np.flatnonzero(MASK).tolist()


def test_they_change_nothing_of_the_step():
    with_samples = step_of_linen(X, Y, 1.0)
    samples = with_samples.pop("samples")
    _, metrics = linen_train_step(linen_loss, threshold=1.0)(linen_state(), X, Y)
    assert with_samples.keys() == metrics.keys()
    for name in metrics:
        np.testing.assert_array_equal(with_samples[name], metrics[name])
    np.testing.assert_allclose(np.mean(samples["loss"]), metrics["loss"], rtol=1e-6)


def test_a_built_function_and_slices_have_them_too():
    built = psc.clipped_value_and_grad(linen_loss, 1.0, microbatch_size=2)
    _, metrics = linen_train_step(built, return_samples=True)(linen_state(), X, Y)
    np.testing.assert_allclose(metrics["samples"]["loss"], stacked(X, Y)[0], rtol=1e-6)


@pytest.mark.parametrize("gradients", ["per_sample", "mean"])
def test_they_are_of_clipped_gradients_alone(gradients):
    with pytest.raises(ValueError, match=f"return_samples is of .*, got gradients='{gradients}'"):
        linen_train_step(linen_loss, gradients=gradients, return_samples=True)


def test_micro_batches_have_none():
    with pytest.raises(ValueError, match="clip_at='micro-batch', which clips no samples"):
        step_of_linen(X, Y, 1.0, microbatch_size=2, clip_at="micro-batch")
