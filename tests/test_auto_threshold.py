"""Check the automatic threshold: against NumPy, under scaling, and in every first batch."""

from __future__ import annotations

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests.numerics import assert_close, clipped_mean

RULE = psc.auto_threshold()
BIN = 2 ** (1 / 64) - 1  # half a bin of the histogram
MANY = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices, which tests/conftest.py makes of a CPU alone"
)


def gradients(num_steps=5, n=24, size=6, seed=0):
    """Draw heavy tails, with outliers a million times as large in the first batch and later."""
    random = np.random.default_rng(seed)
    steps = random.standard_t(3.0, (num_steps, n, size)).astype(np.float32)
    steps[[0, 3], 5] *= 1e6
    return steps


AUTOMATIC = psc.per_sample_clip()
COMPILED = jax.jit(AUTOMATIC.update)


def run(steps, tx=None, masks=None):
    """Return the clipped means and the last state."""
    update = jax.jit(tx.update) if tx else COMPILED
    tx = tx or AUTOMATIC
    state, means = tx.init(jnp.zeros(steps.shape[2:], steps.dtype)), []
    for index, grads in enumerate(steps):
        mask = None if masks is None else masks[index]
        mean, state = update(grads, state, sample_mask=mask)
        means.append(mean)
    return jnp.stack(means), state


def numpy_tau(batches):
    """Compute the threshold from the norms of the batches, oldest first."""
    medians = []
    for last in range(1, len(batches) + 1):
        seen = np.concatenate(batches[:last])
        weights = np.concatenate(
            [np.full(len(b), 0.99 ** (last - 1 - i)) for i, b in enumerate(batches[:last])]
        )
        order = np.argsort(seen)
        up_to = np.cumsum(weights[order])
        medians.append(seen[order][np.searchsorted(up_to, up_to[-1] / 2)])
    return max(medians[-1], max(medians) / 2) / 2


def tau(state):
    return float(RULE.threshold(state)(np.array([1]))[0])


def after(*batches):
    state = RULE.init()
    for norms in batches:
        state = RULE.update(state, jnp.asarray(norms, jnp.float32))
    return state


# The rule


def test_is_half_of_numpys_running_median_or_of_half_its_largest():
    random = np.random.default_rng(0)
    batches = [scale * random.pareto(1.5, 40) for scale in (1.0, 3.0, 2.0, 0.1, 0.1, 0.01, 0.001)]
    for last in range(1, len(batches) + 1):
        assert_close(tau(after(*batches[:last])), numpy_tau(batches[:last]), 2 * BIN)
    assert tau(after(*batches, *[np.full(40, 1e-6)] * 50)) > 0.2


@pytest.mark.parametrize("norm", [1.0, 3.7e-12, 2e15])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_equal_norms_are_all_halved(norm, n):
    steps = np.full((3, n, 1), norm, np.float32)
    means, state = run(steps)
    assert_close(means, steps[:, 0] / 2, 1e-6)
    assert_close(state.mean_scale, 0.5, 1e-6)


def test_zero_gradients_are_left_and_what_comes_after_them_is_not_lost():
    steps = gradients()
    steps[:2] = 0
    means, _ = run(steps)
    assert not means[:2].any()
    expected, _ = run(steps[2:])
    assert_close(means[2:], expected, 1e-6)
    assert expected[0].any()


def test_norms_of_zero_have_no_say():
    norms = np.random.default_rng(0).pareto(1.5, 40)
    chex.assert_trees_all_equal(
        after(np.concatenate([norms, np.zeros(100)])), after(np.concatenate([norms, np.zeros(1)]))
    )


def test_single_samples_are_clipped_at_about_half_their_median():
    steps = np.ones((40, 1, 1), np.float32)
    steps[[0, 30]] = 1e6  # the first cannot be recognised as an outlier
    means, state = run(steps)
    assert means[0] == 5e5
    np.testing.assert_allclose(means[3:], 0.5, rtol=2 * BIN)
    assert tau(state.threshold_state) < 0.51


@pytest.mark.parametrize("step", [0, 3])
def test_outliers_are_clipped_to_about_the_size_of_the_others(step):
    steps = gradients()
    means, _ = run(steps)
    norms = np.linalg.norm(steps[step], axis=-1)
    clipped = np.linalg.norm(means[step] * len(norms))
    assert norms.max() > 1e5 * np.median(norms)
    assert clipped < len(norms) * np.median(norms)


def test_first_batch_is_clipped_at_half_its_own_median():
    grads = gradients()[0]
    norms = np.linalg.norm(grads, axis=-1)
    expected = clipped_mean(grads, np.full(len(norms), np.sort(norms)[11] / 2))
    assert_close(run(grads[None])[0][0], expected, 2 * BIN)


# Invariances


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("bfloat16", 0.04)])
@pytest.mark.parametrize("scale", [1000.0, 1e-3])
def test_scale_of_the_loss_changes_no_clip_factor(dtype, rtol, scale):
    steps = gradients()
    steps[2, 7] = np.nan
    masks = np.random.default_rng(0).random(steps.shape[:2]) < 0.8
    means, state = run(jnp.asarray(steps, dtype), masks=masks)
    scaled, scaled_state = run(jnp.asarray(steps * scale, dtype), masks=masks)
    unit = jnp.abs(means).astype(jnp.float32).max()
    assert_close(scaled.astype(jnp.float32) / scale / unit, means.astype(jnp.float32) / unit, rtol)
    assert_close(scaled_state.mean_scale, state.mean_scale, rtol)


@pytest.mark.parametrize("first", [0, 2])
def test_padding_and_samples_that_are_not_finite_have_no_say(first):
    steps = gradients()[first:]
    padded = np.pad(steps, [(0, 0), (0, 4), (0, 0)], constant_values=1e9)
    padded[:, -1] = np.nan
    masks = np.broadcast_to(np.arange(padded.shape[1]) < steps.shape[1], padded.shape[:2])
    means, state = run(steps)
    chex.assert_trees_all_equal(run(padded, masks=masks)[1].threshold_state, state.threshold_state)
    assert_close(run(padded, masks=masks)[0], means, 1e-6)
    padded[:, -4:] = np.nan  # dropped instead, which keeps their share in N
    dropped, dropped_state = run(padded)
    assert_close(dropped * padded.shape[1] / steps.shape[1], means, 1e-6)
    chex.assert_trees_all_equal(dropped_state.threshold_state, state.threshold_state)


def test_first_batch_of_which_nothing_counts_leaves_the_next_one_the_first():
    steps = gradients()
    steps[0] = np.nan
    means, _ = run(steps)
    assert not means[0].any()
    assert_close(means[1:], run(steps[1:])[0], 1e-6)


# Where it runs


def test_scan_vmap_and_eager_updates_are_the_loop():
    steps = gradients()
    tx = psc.per_sample_clip()
    expected, last = run(steps)

    def scanned(steps):
        def step(state, grads):
            mean, state = tx.update(grads, state)
            return state, mean

        return jax.lax.scan(step, tx.init(steps[0, 0]), steps)

    state, means = jax.jit(scanned)(steps)
    assert_close((means, state), (expected, last), 1e-5)
    two = np.stack([steps, gradients(seed=1)])
    assert_close(jax.jit(jax.vmap(scanned))(two)[1][0], expected, 1e-5)
    state = tx.init(steps[0, 0])
    for grads, mean in zip(steps[:2], expected[:2], strict=True):
        got, state = tx.update(grads, state)
        assert_close(got, mean, 1e-5)


def test_restored_before_or_after_its_first_batch_it_goes_on_with_the_same_bits(
    tmp_path: pathlib.Path,
):
    tx, steps = psc.per_sample_clip(), gradients()
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(6))
    with ocp.StandardCheckpointer() as checkpointer:
        for index, grads in enumerate(steps[:2]):
            checkpointer.save(tmp_path / str(index), state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / str(index), state)
            expected = update(grads, state)
            chex.assert_trees_all_equal(update(grads, restored), expected)
            state = expected[1]


@MANY
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_batches_give_what_one_device_does(axis_type):
    steps = gradients()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharded = jax.device_put(steps, NamedSharding(mesh, P(None, "data")))
    tx = psc.per_sample_clip()
    state = jax.device_put(tx.init(jnp.zeros(6)), NamedSharding(mesh, P()))
    for grads, expected in zip(sharded, run(steps)[0], strict=True):
        mean, state = jax.jit(tx.update)(grads, state)
        assert_close(mean, expected, 1e-5)


@MANY
@pytest.mark.parametrize("check_vma", [True, False])
def test_batches_under_shard_map_give_what_one_device_does(check_vma):
    steps = gradients()
    tx = psc.per_sample_clip(axis_name="data")
    update = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    state = tx.init(jnp.zeros(6))
    for grads, expected in zip(steps, run(steps)[0], strict=True):
        mean, state = update(grads, state)
        assert_close(mean, expected, 1e-5)


# Where it is the default


def test_it_is_what_is_taken_where_no_threshold_is_given():
    steps = gradients()
    expected, state = run(steps, psc.per_sample_clip(psc.auto_threshold()))
    chex.assert_trees_all_equal(run(steps), (expected, state))
    for tx in (psc.ps_clip_sgd(1.0), optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=1.0)):
        assert_close(-run(steps, tx)[0], expected, 1e-6)
    tracked = psc.track_norms()
    norms = jnp.linalg.norm(steps[0], axis=-1)
    _, state = tracked.update({}, tracked.init({}), norms=norms)
    chex.assert_trees_all_equal(state.threshold_state, after(norms))


@pytest.mark.parametrize("numbers", [{"alpha": 1.0}, {"beta": 2.0}])
def test_half_a_growing_threshold_is_none(numbers):
    with pytest.raises(TypeError, match=r"both alpha and beta, or neither .* got alpha=.*beta="):
        psc.ps_clip_sgd(0.1, **numbers)


def test_in_a_loop_of_ones_own_the_first_batch_is_measured_first():
    """Follow the guide: two calls for the first batch, and one for each other."""
    steps = gradients()
    f = jax.jit(
        functools.partial(
            psc.clipped_value_and_grad(lambda w, x: jnp.dot(w, x), jnp.inf, return_stats=True),
            jnp.zeros(6),
        )
    )
    state = RULE.init()
    for grads, expected in zip(steps, run(steps)[0], strict=True):
        own = RULE.update(state, f(grads)[-1].norms) if RULE.is_new(state) else state
        _, mean, stats = f(grads, threshold=RULE.threshold(own))
        state = RULE.update(state, stats.norms)
        assert_close(mean, expected, 1e-5)
