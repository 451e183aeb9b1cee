"""Compare every method's chain with NumPy, and set its numbers without recompiling."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psclip_optax as psc
from psclip_optax.clipped_grad import Mode
from psclip_optax.thresholds.tracking import state_for_batch
from psclip_optax.training.config.commands import EngineName, MethodName, TaskConfig
from psclip_optax.training.run.methods import (
    METHODS,
    Hyperparams,
    build_gradients,
    build_optimizer,
    gradient_figures,
    learning_rate_schedule,
    with_hyperparams,
)
from tests import numerics

MOMENTUM, NUM_STEPS, NUM_SAMPLES = 0.9, 4, 6
POINT = Hyperparams(learning_rate=0.5, threshold=0.8, beta=1.5)


def per_sample_gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_t(1.5, [NUM_SAMPLES, 3]).astype(np.float32) for _ in range(NUM_STEPS)]


def numpy_moment(before: list[np.ndarray], p: float) -> float:
    """Compute the moment of the norms of earlier steps, the newest counting most; 0 without any."""
    powers = [np.linalg.norm(g.astype(np.float64), axis=1) ** p for g in before]
    weights = [np.full(len(g), 0.99**age) for age, g in enumerate(reversed(before))]
    if not before:
        return 0.0
    return np.average(np.concatenate(powers), weights=np.concatenate(weights[::-1])) ** (1 / p)


def numpy_median_clip(gradients: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
    """Clip by the rule itself, which test_auto_threshold.py compares with NumPy."""
    rule, norms = psc.auto_threshold(), lambda g: jnp.linalg.norm(g, axis=1)
    state = rule.init()
    for own in before or [gradients]:
        state = rule.update(state, norms(own))
    tau = rule.threshold(state)(jnp.arange(1, NUM_SAMPLES + 1))
    return numerics.clipped_mean(gradients, np.asarray(tau))


def numpy_direction(
    name: str, gradients: np.ndarray, before: list[np.ndarray], point: Hyperparams
) -> np.ndarray:
    mean = gradients.astype(np.float64).mean(axis=0)
    if name == "batch-clip":
        return mean * min(1, point.threshold / np.linalg.norm(mean))
    if name == "ps-clip-median":
        return numpy_median_clip(gradients, before)
    if name.startswith("ps-clip"):
        beta = np.inf if name == "ps-clip-constant" else point.beta
        sigma = numpy_moment(before, beta) if name == "ps-clip-auto" else 1
        return numerics.clipped_mean(
            gradients, numerics.growing(point.threshold * sigma, beta, NUM_SAMPLES)
        )
    return mean


def numpy_params(name: str, point: Hyperparams) -> np.ndarray:
    params, velocity = np.zeros(3), np.zeros(3)
    momentum = 0 if name == "sgd" else MOMENTUM
    all_gradients = per_sample_gradients()
    for step, gradients in enumerate(all_gradients):
        direction = numpy_direction(name, gradients, all_gradients[:step], point)
        velocity = momentum * velocity + direction
        factor = (1 + np.cos(np.pi * step / NUM_STEPS)) / 2
        params -= point.learning_rate * factor * velocity
    return params


def optimizer(name: MethodName, point: Hyperparams) -> optax.GradientTransformationExtraArgs:
    schedule = learning_rate_schedule("cosine", NUM_STEPS)
    return build_optimizer(name, point, momentum=MOMENTUM, schedule=schedule)


def mean_gradient(name: MethodName, gradients, opt_state):
    options = build_gradients(name, TaskConfig())
    if options["gradients"] == "mean":
        return gradients.mean(axis=0)
    threshold = options["threshold_from"](opt_state)
    if isinstance(threshold, psc.AdaptiveThreshold):
        threshold = threshold.threshold(
            state_for_batch(
                threshold,
                optax.tree.get(opt_state, "threshold_state"),
                lambda: jnp.linalg.norm(gradients, axis=1),
            )
        )
    clip = psc.per_sample_clip(threshold)
    return clip.update(gradients, clip.init(gradients[0]))[0]


def train(name: MethodName, update, state) -> np.ndarray:
    params = jnp.zeros(3)
    for gradients in per_sample_gradients():
        updates, state = update(gradients, state)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def updating(name: MethodName, tx):
    return lambda gradients, state: tx.update(
        mean_gradient(name, gradients, state), state, norms=jnp.linalg.norm(gradients, axis=1)
    )


@pytest.mark.parametrize("name", METHODS)
def test_chain_is_that_of_numpy(name: MethodName):
    tx = optimizer(name, POINT)
    params = train(name, updating(name, tx), tx.init(jnp.zeros(3)))
    numerics.assert_close(params, numpy_params(name, POINT), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_all_trials_share_one_compiled_update(name: MethodName):
    tx = optimizer(name, POINT)
    traces = 0

    @jax.jit
    def update(gradients, state):
        nonlocal traces
        traces += 1
        return updating(name, tx)(gradients, state)

    points = [POINT, Hyperparams(0.1, 3.0, 1.5), Hyperparams(1, 2, 2)]
    for point in points:
        params = train(name, update, with_hyperparams(tx.init(jnp.zeros(3)), point))
        numerics.assert_close(params, numpy_params(name, point), rtol=1e-5)
    assert traces == 1


def test_methods_are_those_of_the_command():
    assert set(METHODS) == set(get_args(MethodName))
    assert get_args(EngineName) == get_args(Mode)


@pytest.mark.parametrize(
    ("name", "gradient", "figures"),
    [
        ("momentum", [3.0, 4.0], (5.0, 0.0, 0)),
        ("batch-clip", [3.0, 4.0], (5.0, 1.0, 0)),
        ("batch-clip", [0.3, 0.4], (0.5, 0.0, 0)),
        ("batch-clip", [np.nan, 1.0], (np.nan, 0.0, 1)),
    ],
)
def test_figures_of_a_mean_gradient(name: MethodName, gradient, figures):
    tx = optimizer(name, POINT)
    _, state = tx.update(jnp.array(gradient), tx.init(jnp.zeros(2)))
    got = gradient_figures(state)
    names = ("gradient_norm", "clipped_share", "num_nonfinite")
    np.testing.assert_allclose([got[name] for name in names], figures, rtol=1e-6)


def test_constant_schedule_leaves_the_learning_rate():
    factor = learning_rate_schedule("constant", 10)
    assert [factor(step) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]
