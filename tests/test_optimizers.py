import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psclip_optax as psc
from tests.numerics import assert_close, clipped_mean, enable_x64, growing, heavy_tailed

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.1)}


def batch_grads(params, step, n=6):
    x = heavy_tailed(step, (n, 3))
    loss = lambda p, x: jnp.square(jnp.dot(p["w"], x) + p["b"] - x[0])
    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, x)


def run(tx, steps=4):
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(steps):
        updates, state = jax.jit(tx.update)(batch_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_a_loop_by_hand(momentum, nesterov):
    with enable_x64(True):
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
        tx = psc.ps_clip_sgd(lambda step: 0.1 / (1 + step), 2.0, 1.5, momentum, nesterov)
        got, state = dict(params), tx.init(params)
        decay, trace = momentum or 0.0, jax.tree.map(np.zeros_like, params)
        for step in range(4):
            updates, state = tx.update(batch_grads(got, step), state)
            got = optax.apply_updates(got, updates)
            g = clipped_mean(batch_grads(params, step), growing(2.0, 1.5, 6))
            trace = jax.tree.map(lambda g, t: g + decay * t, g, trace)
            move = jax.tree.map(lambda g, t: g + decay * t, g, trace) if nesterov else trace
            rate = 0.1 / (1 + step)
            params = jax.tree.map(lambda p, m, rate=rate: p - rate * m, params, move)
        assert_close(got, params, 1e-13)


def test_a_tree_without_leaves_gives_one_without_leaves():
    for momentum in (None, 0.9):
        tx = psc.ps_clip_sgd(0.1, 1.0, 2.0, momentum)
        assert tx.update({}, tx.init({}), {})[0] == {}


def test_injected_hyperparameters_may_be_scheduled_or_set_by_hand():
    schedule = optax.linear_schedule(0.5, 4.0, 4)
    tx = optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=0.1, alpha=schedule, beta=1.5)
    params, state = run(tx)
    reference, reference_state = PARAMS, None
    for step in range(4):
        fixed = psc.ps_clip_sgd(0.1, float(schedule(step)), 1.5)
        reference_state = reference_state or fixed.init(PARAMS)
        updates, reference_state = fixed.update(batch_grads(reference, step), reference_state)
        reference = optax.apply_updates(reference, updates)
    assert_close(params, reference, 1e-5)

    state.hyperparams["beta"] = jnp.float32(1e9)
    _, state = tx.update(batch_grads(params, 4), state, params)
    assert float(state.hyperparams["alpha"]) == 4.0
    assert int(optax.tree.get(state, "num_samples")) == 6


def test_injected_set_by_hand_changes_the_clipping():
    tx = optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=1.0, alpha=1e9, beta=2.0)
    state = tx.init(PARAMS)
    grads = batch_grads(PARAMS, 0)
    plain, _ = tx.update(grads, state, PARAMS)
    assert_close(plain, jax.tree.map(lambda g: -g.mean(0), grads), 1e-5)
    state.hyperparams["alpha"] = jnp.float32(0.5)
    clipped, _ = tx.update(grads, state, PARAMS)
    expected = clipped_mean(grads, growing(0.5, 2.0, 6))
    assert_close(clipped, jax.tree.map(lambda g: -g, expected), 1e-5)


def test_threshold_number_can_be_injected_into_per_sample_clip():
    tx = optax.inject_hyperparams(psc.per_sample_clip, static_args=("sample_axis",))(
        threshold=optax.linear_schedule(1.0, 2.0, 1)
    )
    state, grads = tx.init(PARAMS), batch_grads(PARAMS, 0)
    for tau in (1.0, 2.0):
        updates, state = jax.jit(tx.update)(grads, state, PARAMS)
        assert_close(updates, clipped_mean(grads, np.full(6, tau)), 1e-5)


def test_schedules_outside_inject_hyperparams_are_refused():
    with pytest.raises(TypeError, match="expects a real number as `alpha`, got <function"):
        psc.ps_clip_sgd(0.1, optax.linear_schedule(1.0, 2.0, 3), 2.0)
