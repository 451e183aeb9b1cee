"""Compare adaptive thresholds with NumPy, and stacked gradients with the engine."""

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
from psclip_optax.meshes import varying
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, heavy_tailed

RULES = {
    "moment": psc.moment_threshold(1.5, scale=0.5),
    "moment of estimated order": psc.moment_threshold(decay=0.9),
    "quantile": psc.quantile_threshold(0.7, decay=0.9),
    "min-norm": psc.min_norm_threshold(decay=0.5),
}
ALL_RULES = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
# These tests of states include the automatic threshold; it clips the first batch by its own norms.
WITH_AUTO = RULES | {"automatic": psc.auto_threshold()}
ALL_STATES = pytest.mark.parametrize("rule", WITH_AUTO.values(), ids=WITH_AUTO.keys())
K = np.arange(1, 9)


def pareto(index, shape, seed=0):
    return np.random.default_rng(seed).pareto(index, shape) + 1


def weights(batches, decay):
    """Return the weight of each norm of each batch, in order."""
    ages = range(len(batches) - 1, -1, -1)
    return np.concatenate(
        [np.full(len(b), decay**age) for b, age in zip(batches, ages, strict=True)]
    )


def after(rule, batches, **kwargs):
    state = rule.init()
    for norms in batches:
        state = rule.update(state, norms, **kwargs)
    return state


def padded(batches):
    """Pad batches to one shape with NaN, which is ignored, so that little is compiled."""
    return [np.pad(b, (0, 64 - len(b)), constant_values=np.nan) for b in batches]


def scanned(rule, batches):
    """Return the state after all batches [T, n]."""
    step = lambda state, norms: (rule.update(state, norms), None)
    return jax.jit(lambda batches: jax.lax.scan(step, rule.init(), batches)[0])(batches)


def taus(rule, state, positions=K):
    return np.asarray(rule.threshold(state)(jnp.asarray(positions)))


# The moment


def numpy_moment(batches, p, decay):
    powers = np.concatenate(batches).astype(np.float64) ** p
    return np.average(powers, weights=weights(batches, decay)) ** (1 / p)


BATCHES = [pareto(1.6, n, seed) for seed, n in enumerate([5, 1, 8, 3])]


@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_moment_is_that_of_numpy(p, decay):
    rule = psc.moment_threshold(p, scale=3.0, decay=decay)
    expected = 3 * numpy_moment(BATCHES, p, decay) * K ** (1 / p)
    assert_close(taus(rule, after(rule, padded(BATCHES))), expected, 1e-6)


def test_moment_comes_to_that_of_the_distribution():
    index, p = 5.0, 1.5
    rule = psc.moment_threshold(p, decay=1.0)
    state = scanned(rule, pareto(index, (200, 256)))
    assert_close(taus(rule, state), (index / (index - p)) ** (1 / p) * K ** (1 / p), 0.02)


def test_moment_follows_the_norms_to_another_scale():
    rule = psc.moment_threshold(2.0, decay=0.9)
    state = scanned(rule, np.repeat([3.0, 1e-3], [50, 200])[:, None])
    assert_close(taus(rule, state)[0], 1e-3, 0.01)


@pytest.mark.parametrize("p", [1.5, 2.0, None])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_moment_of_norms_whose_powers_leave_float32(p, size):
    ordinary, extreme = (
        after(psc.moment_threshold(p), padded([b * np.float32(s) for b in BATCHES]))
        for s in (1, size)
    )
    assert_close(extreme.moment.root / np.float32(size), ordinary.moment.root, 1e-5)


def test_moment_of_everything_does_not_drift():
    # Steps that are each smaller than the rounding of the sum of all.
    rule = psc.moment_threshold(1.5, decay=1.0)
    state = scanned(rule, np.tile(pareto(3.0, (20, 4)), (1000, 1)).astype(np.float32))
    assert_close(state.moment.root, numpy_moment([pareto(3.0, (20, 4)).ravel()], 1.5, 1), 1e-3)


def test_zero_norms_give_a_zero_threshold_and_no_more():
    rule = psc.moment_threshold(1.5, scale=jnp.inf, decay=0.5)
    state = rule.update(rule.init(), jnp.zeros(3))
    assert not taus(rule, state).any()
    assert np.isinf(taus(rule, rule.update(state, jnp.ones(3)))).all()


# Its order


def multivariate_t(df, shape, dim=10):
    random = np.random.default_rng(0)
    normal = np.linalg.norm(random.standard_normal((*shape, dim)), axis=-1)
    return normal / np.sqrt(random.chisquare(df, shape) / df)


@pytest.mark.parametrize("index", [1.3, 1.6, 1.9])
def test_order_is_found_below_known_indices(index):
    rule = psc.moment_threshold(decay=1.0)
    order = lambda norms: float(rule.threshold(scanned(rule, norms)).beta)
    assert abs(order(pareto(index, (1600, 64))) - (index - 0.1)) < 0.05
    # Not a pure power law: Hill's estimate is then biased, here to the safe side.
    assert -0.13 < order(multivariate_t(index, (1600, 64))) - (index - 0.1) < 0.05


def test_order_is_within_its_limits():
    rule = psc.moment_threshold()
    order = lambda norms: float(rule.threshold(scanned(rule, norms)).beta)
    random = np.random.default_rng(0)
    assert order(pareto(0.8, (50, 32))) == pytest.approx(1.05)
    assert order(multivariate_t(1e6, (50, 32))) == 2
    assert order(random.lognormal(size=(300, 128))) == 2
    assert order(np.ones((2, 8))) == order(np.ones((2, 1))) == order(np.zeros((2, 8))) == 2


def test_drifting_scale_does_not_pass_for_a_heavy_tail():
    norms = pareto(1.5, (200, 64))
    scales = np.exp(np.random.default_rng(1).normal(scale=2, size=(200, 1)))
    rule = psc.moment_threshold()
    steady, drifting = (scanned(rule, n).tail.mean for n in (norms, scales * norms))
    assert_close(drifting, steady, 1e-4)


def numpy_hill(norms):
    ordered = np.sort(norms[norms > 0])[::-1]
    k = min(int(np.ceil(0.05 * len(ordered))), len(ordered) - 1)
    return np.log(ordered[:k] / ordered[k]).sum(), k


def test_order_and_moment_are_those_of_numpy():
    batches = [np.append(pareto(1.4, n, n), [0.0] * (n % 3)) for n in (40, 25, 3, 1, 61)]
    decay = 0.7
    excess, number = np.array([numpy_hill(b) if len(b) > 1 else (0, 0) for b in batches]).T
    discounts = decay ** np.arange(len(batches))[::-1]
    p = np.clip((discounts @ number) / (discounts @ excess) - 0.1, 1.05, 2)
    grid = np.linspace(1.05, 2, 20)
    sigma = np.interp(p, grid, [numpy_moment(batches, order, decay) for order in grid])
    rule = psc.moment_threshold(decay=decay)
    assert_close(taus(rule, after(rule, padded(batches))), sigma * K ** (1 / p), 1e-5)
    assert 1.1 < p < 1.9, "neither limit"
    assert_close(sigma, numpy_moment(batches, p, decay), 1e-3)


# The quantile


def numpy_quantile(batches, q, decay):
    norms, w = np.concatenate(batches), weights(batches, decay)
    order = np.argsort(norms)
    reached = np.cumsum(w[order]) >= q * w.sum() * (1 - 1e-6)
    return norms[order][np.argmax(reached)]


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("q", [0.05, 0.5, 0.93, 0.999])
def test_quantile_is_that_of_numpy_to_its_resolution(q, decay):
    batches = [b * 10.0**seed for seed in range(-2, 3) for b in BATCHES]
    rule = psc.quantile_threshold(q, decay=decay)
    expected = np.full(len(K), numpy_quantile(batches, q, decay))
    assert_close(taus(rule, after(rule, padded(batches))), expected, 2 ** (1 / 64) - 1 + 1e-5)


@pytest.mark.parametrize("norm", [1.0, 2.0, 0.25, 3e-19, 1e19])
def test_quantile_of_equal_norms_is_that_norm(norm):
    rule = psc.quantile_threshold(0.5)
    assert_close(taus(rule, after(rule, [np.full(3, norm)])), np.full(len(K), norm), 0.011)


def test_quantile_of_norms_out_of_range_is_at_its_ends():
    rule = psc.quantile_threshold(0.5)
    assert_close(taus(rule, after(rule, [np.array([0.0, 1e-30, 1.0])]))[0], 2.0**-64, 1e-5)
    assert_close(taus(rule, after(rule, [np.array([1.0, 1e30, 1e38])]))[0], 2.0**64, 0.03)


def test_quantile_is_what_share_is_not_clipped_though_the_scale_falls():
    norms = pareto(1.5, (300, 64)) * 0.99 ** np.arange(300)[:, None]
    rule = psc.quantile_threshold(0.8, decay=0.9)

    def step(state, batch):
        clipped = jnp.mean(batch > rule.threshold(state)(jnp.array([1])))
        return rule.update(state, batch), clipped

    _, clipped = jax.lax.scan(step, rule.init(), jnp.asarray(norms))
    assert_close(clipped[20:].mean(), 0.2, 0.15)


# The smallest norm


def test_min_norm_is_the_papers_rule_on_the_batch_before():
    rule = psc.min_norm_threshold()
    tx = psc.per_sample_clip(rule)
    means = jnp.asarray(heavy_tailed(0, (3, 4, 5)))  # 4 micro-batches, 3 times
    norms = np.linalg.norm(means, axis=-1)
    state = tx.init(means[0, 0])
    for step in range(3):
        update, state = tx.update(means[step], state)
        rho = norms[step - 1].min() if step else 0
        assert_close(update, clipped_mean(means[step], np.full(4, rho)), 1e-6)
    # The same batch twice: all of them are scaled to its smallest, as in the paper.
    update, _ = tx.update(means[2], state)
    directions = means[2] / norms[2][:, None]
    assert_close(update, norms[2].min() * np.mean(directions, axis=0), 1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_min_norm_averages_the_minima(decay):
    rule = psc.min_norm_threshold(decay=decay)
    smallest = [b.min() for b in BATCHES]
    expected = np.average(smallest, weights=decay ** np.arange(len(BATCHES))[::-1])
    assert_close(taus(rule, after(rule, padded(BATCHES))), np.full(len(K), expected), 1e-6)


# Common to all


@ALL_RULES
def test_before_any_norm_it_is_the_initial_one(rule):
    assert not taus(rule, rule.init()).any()
    for build in (psc.moment_threshold, psc.quantile_threshold, psc.min_norm_threshold):
        for initial in (2.0, np.inf):
            rule = build(initial=initial)
            np.testing.assert_array_equal(taus(rule, rule.init()), np.full(len(K), initial))


@ALL_STATES
def test_masked_and_nonfinite_norms_have_no_say(rule):
    norms = jnp.asarray(pareto(1.5, 12))
    bad = norms.at[:4].set(jnp.array([jnp.nan, jnp.inf, 1e9, -jnp.inf]))
    mask = jnp.arange(12) != 2
    state = rule.update(rule.update(rule.init(), bad, mask), norms)
    expected = rule.update(rule.update(rule.init(), norms[4:]), norms)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), state, expected)


@ALL_STATES
@pytest.mark.parametrize("seen", [False, True])
def test_batch_of_which_nothing_counts_leaves_the_state(rule, seen):
    before = after(rule, padded(BATCHES) if seen else [])
    for norms, mask in [
        (jnp.full(3, jnp.nan), None),
        (jnp.ones(3), jnp.zeros(3, bool)),
        (jnp.array([1.0, jnp.inf]), jnp.array([False, True])),
        (jnp.zeros(0), None),
    ]:
        chex.assert_trees_all_equal(rule.update(before, norms, mask), before)


@ALL_STATES
def test_state_keeps_its_types_and_nothing_is_traced_again(rule):
    avals = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    traces = 0

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, norms):
        nonlocal traces
        traces += 1
        return rule.update(state, norms), rule.threshold(state)(K)

    state = rule.init()
    expected = avals(state)
    for norms in np.ones((3, 4), np.float32):
        state, _ = step(state, norms)
        assert avals(state) == expected
    assert traces == 1


@ALL_STATES
def test_scan_and_vmap_are_the_loop(rule):
    batches = pareto(1.5, (2, 6, 10)).astype(np.float32)  # two runs of six steps
    expected = [after(rule, run) for run in batches]
    together = jax.jit(jax.vmap(lambda run: scanned(rule, run)))(batches)
    for i, state in enumerate(expected):
        got = jax.tree.map(lambda leaf: leaf[i], together)  # noqa: B023
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), got, state)
        got_taus = jax.vmap(lambda state: rule.threshold(state)(K))(together)[i]
        assert_close(got_taus, taus(rule, state), 1e-5)


def test_numbers_may_be_traced():
    norms = jnp.asarray(BATCHES[0])

    def of(build):
        rule = build()
        return rule.threshold(rule.update(rule.init(), norms))(K)

    for traced, plain in [
        (lambda a, b: psc.moment_threshold(1 + a, scale=b), psc.moment_threshold(1.5, scale=0.25)),
        (lambda a, b: psc.quantile_threshold(a, decay=b), psc.quantile_threshold(0.5, decay=0.25)),
        (lambda a, b: psc.min_norm_threshold(decay=a, initial=b), psc.min_norm_threshold()),
    ]:
        got = jax.jit(lambda a, b: of(lambda: traced(a, b)))(0.5, 0.25)  # noqa: B023
        assert_close(got, of(lambda: plain), 1e-6)  # noqa: B023
    slope = jax.grad(lambda c: of(lambda: psc.moment_threshold(1.5, scale=c))[0])(1.0)
    assert_close(slope, numpy_moment(BATCHES[:1], 1.5, 1), 1e-6)


def test_tracking_beside_a_tree_without_leaves():
    tx = psc.track_norms(RULES["moment"])
    updates, state = tx.update({}, tx.init({}), {}, norms=jnp.ones(3))
    assert updates == {}
    assert float(state.threshold_state.moment.weight) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: psc.moment_threshold(3.0), ValueError, "`p` >= 1 and <= 2, got 3"),
        (lambda: psc.moment_threshold("2"), TypeError, "real number as `p`, got '2'"),
        (lambda: psc.moment_threshold(scale=-1), ValueError, "`scale` >= 0, got -1"),
        (lambda: psc.moment_threshold(decay=1.1), ValueError, "`decay` >= 0 and <= 1, got 1.1"),
        (lambda: psc.moment_threshold(initial=np.nan), ValueError, "`initial` >= 0, got nan"),
        (lambda: psc.quantile_threshold(0), ValueError, "`quantile` > 0 and < 1, got 0"),
        (lambda: psc.quantile_threshold(1.0), ValueError, "`quantile` > 0 and < 1, got 1"),
        (lambda: psc.min_norm_threshold(decay=[0.5]), TypeError, "real number as `decay`"),
        (lambda: after(RULES["moment"], [1.0]), ValueError, r"shape \[n\].*got float32\[\]"),
        (lambda: after(RULES["moment"], [np.arange(3)]), ValueError, r"got int32\[3\]"),
        (
            lambda: after(RULES["moment"], [np.ones(3)], sample_mask=np.ones(2, bool)),
            ValueError,
            r"sample_mask has shape \[3\].*got bool\[2\]",
        ),
        (
            lambda: psc.clipped_value_and_grad(lambda w, x: w * x, RULES["moment"]),
            TypeError,
            r"has a state.*threshold=rule.threshold\(state\).*rule.update\(state, stats.norms",
        ),
        (
            lambda: psc.clipped_grad(lambda w, x: w * x, 1.0)(
                1.0, jnp.ones(2), threshold=RULES["moment"]
            ),
            TypeError,
            "has a state",
        ),
        (
            lambda: psc.accumulate_clipped(optax.sgd(1.0), 2, RULES["moment"]),
            TypeError,
            "has a state",
        ),
        (lambda: psc.track_norms(psc.constant_threshold(1.0)), TypeError, "which has none"),
        (
            lambda: psc.track_norms(RULES["moment"]).update(
                {}, psc.track_norms(RULES["moment"]).init({})
            ),
            TypeError,
            r"expects the norms.*norms=stats\.norms",
        ),
    ],
)
def test_errors_say_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


# With stacked gradients and with the engine


def loss(params, x, y):
    return jnp.square(jnp.tanh(x @ params["w"]).sum() + params["b"] - y)


PARAMS = {"w": np.linspace(-1, 1, 6).reshape(3, 2), "b": np.float64(0.1)}
N, NUM_STEPS = 24, 20


def regression(num_steps=NUM_STEPS, n=N):
    """Draw steps of x, y and mask: heavy tails, padding with arbitrary values, NaN samples."""
    random = np.random.default_rng(0)
    for step in range(num_steps):
        x, y = random.standard_normal((n, 3)), random.standard_t(1.5, n)
        mask = random.random(n) < 0.8
        y[step % n] = np.nan
        if step == 5:
            mask[:] = False
        if step == 6:
            y[:] = np.inf
        yield x, y, mask


gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))


def float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def stacked_run(rule, steps, params):
    tx = optax.chain(psc.per_sample_clip(rule), optax.sgd(0.05, momentum=0.9))
    update = jax.jit(lambda g, s, mask: tx.update(g, s, sample_mask=mask), donate_argnums=1)
    state = tx.init(params)
    for x, y, mask in steps:
        updates, state = update(gradient(params, x, y), state, mask)
        params = optax.apply_updates(params, updates)
    return params, optax.tree.get(state, "threshold_state")


def engine_run(rule, steps, params):
    f = psc.clipped_value_and_grad(loss, 0.0, return_stats=True)
    tx = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(params, opt_state, state, x, y, mask):
        threshold = rule.threshold(state)
        _, grads, stats = f(params, x, y, sample_mask=mask, threshold=threshold)
        updates, opt_state = tx.update(grads, opt_state)
        state = rule.update(state, stats.norms, mask)
        return optax.apply_updates(params, updates), opt_state, state

    state, opt_state = rule.init(), tx.init(params)
    for x, y, mask in steps:
        params, opt_state, state = step(params, opt_state, state, x, y, mask)
    return params, state


def numpy_run(rule, steps, params):
    """Run NumPy's clipping with the rule itself, which is compared with NumPy above."""
    state, velocity = rule.init(), jax.tree.map(np.zeros_like, params)
    for x, y, mask in steps:
        grads = gradient(params, x, y)
        norms = np.sqrt(np.square(grads["w"]).sum((1, 2)) + np.square(grads["b"]))
        at = rule.threshold(state)(np.maximum(np.cumsum(mask), 1))
        mean = clipped_mean(grads, at, mask)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, mean)
        params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
        state = rule.update(state, norms, mask)
    return params, state


@ALL_RULES
def test_faces_are_identical_over_twenty_steps(rule):
    with enable_x64(True):
        params, steps = float64(PARAMS), list(regression())
        by_stack, by_engine, by_numpy = (
            run(rule, steps, params) for run in (stacked_run, engine_run, numpy_run)
        )
        assert_close(by_stack, by_numpy, 1e-10)
        assert_close(by_engine, by_numpy, 1e-10)
        assert by_numpy[0]["b"].dtype == by_engine[0]["w"].dtype == np.float64
        moved = np.abs(by_numpy[0]["w"] - PARAMS["w"])
        assert moved.max() > 0.1, "thresholds left something of the gradients"


def test_micro_batches_are_clipped_by_their_own_norms():
    rule, size = psc.min_norm_threshold(), 4
    f = psc.clipped_value_and_grad(
        loss, 0.0, microbatch_size=size, clip_at="micro-batch", return_stats=True
    )
    tx = psc.per_sample_clip(rule)

    @jax.jit
    def both(state, clip_state, params, x, y):
        _, grads, stats = f(params, x, y, threshold=rule.threshold(state))
        means = jax.tree.map(
            lambda g: g.reshape(-1, size, *g.shape[1:]).mean(1), gradient(params, x, y)
        )
        updates, clip_state = tx.update(means, clip_state)
        return (grads, rule.update(state, stats.norms)), (updates, clip_state)

    with enable_x64(True):
        params, state = float64(PARAMS), rule.init()
        clip_state = tx.init(params)
        for x, y, _ in regression(3):
            y = np.nan_to_num(y, nan=1.0)
            (grads, state), (updates, clip_state) = both(state, clip_state, params, x, y)
            assert_close((grads, state), (updates, clip_state.threshold_state), 1e-10)
        assert abs(grads["b"]) > 0


@ALL_RULES
def test_first_batch_only_measures(rule):
    grads = jnp.asarray(heavy_tailed(0, (4, 5)))
    tx = psc.per_sample_clip(rule)
    updates, state = tx.update(grads, tx.init(grads[0]))
    assert not updates.any()
    assert int(state.num_clipped) == 4
    assert tx.update(grads, state)[0].any()


def test_positions_are_those_that_are_given():
    grads = jnp.asarray(heavy_tailed(0, (4, 5)))
    tx = psc.per_sample_clip(psc.moment_threshold(1.5, scale=0.1))
    _, state = tx.update(grads, tx.init(grads[0]))
    updates, _ = tx.update(grads, state, positions=np.arange(4, 0, -1))
    expected, _ = tx.update(grads[::-1], state)
    assert_close(updates, expected, 1e-6)


def test_other_thresholds_have_a_state_without_more_arrays():
    state = psc.per_sample_clip(psc.growing_threshold(1.0, 1.5)).init(jnp.zeros(3))
    assert state.threshold_state == ()
    assert len(jax.tree.leaves(state)) == 8


def test_chain_is_scanned_and_mapped_over_seeds():
    rule = RULES["moment of estimated order"]
    tx = optax.chain(psc.per_sample_clip(rule), optax.sgd(0.1))

    def run(key):
        def step(carry, key):
            w, state = carry
            updates, state = tx.update(w + jax.random.t(key, 1.5, (6, 3)), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (jnp.ones(3), tx.init(jnp.ones(3))), jax.random.split(key, 5))[0]

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(run))(keys)
    assert_close(jax.tree.map(lambda leaf: leaf[1], together), jax.jit(run)(keys[1]), 1e-5)


def test_restored_in_the_midst_it_goes_on_with_the_same_bits(tmp_path: pathlib.Path):
    rule = RULES["moment of estimated order"]
    tx = optax.chain(psc.per_sample_clip(rule), optax.sgd(0.1))
    update = jax.jit(tx.update)
    batches = heavy_tailed(0, (6, 8, 3))

    def run(state, batches):
        for grads in batches:
            updates, state = update(grads, state)
        return updates, state

    start = tx.init(jnp.zeros(3))
    expected = run(start, batches)
    _, midst = run(start, batches[:3])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "midst", midst)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "midst", start)
    chex.assert_trees_all_equal(run(restored, batches[3:]), expected)


# On many devices

MANY = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices, which tests/conftest.py makes of a CPU alone"
)


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def norms_and_mask():
    norms = pareto(1.5, N)
    norms[3] = np.nan
    return norms, np.arange(N) % 5 != 2


@MANY
@pytest.mark.parametrize(
    ("name", "axis_type"),
    slow.diagonal(WITH_AUTO, [AxisType.Auto, AxisType.Explicit]),
    ids=str,
)
def test_sharded_norms_are_those_of_the_whole_batch(name, axis_type):
    rule = WITH_AUTO[name]
    norms, mask = norms_and_mask()
    expected = rule.update(rule.update(rule.init(), norms, mask), norms)
    sharding = NamedSharding(mesh_of(axis_type), P("data"))
    norms, mask = jax.device_put((norms, mask), sharding)
    update = jax.jit(rule.update)
    got = update(update(rule.init(), norms, mask), norms)
    assert_close(got, expected, 1e-5)
    assert_close(jax.jit(rule.threshold)(got)(K), rule.threshold(expected)(K), 1e-5)


@MANY
@pytest.mark.parametrize(("name", "check_vma"), slow.diagonal(WITH_AUTO, [True, False]))
def test_norms_under_shard_map_are_those_of_the_whole_batch(name, check_vma):
    rule = WITH_AUTO[name]
    norms, mask = norms_and_mask()
    update = jax.shard_map(
        functools.partial(rule.update, axis_name="data"),
        mesh=mesh_of(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    expected = rule.update(rule.init(), norms, mask)
    assert_close(jax.jit(update)(rule.init(), norms, mask), expected, 1e-5)


@functools.cache
def on_one_device(run):
    return run(RULES["moment of estimated order"], list(regression(3)), float64(PARAMS))


@MANY
@pytest.mark.parametrize(
    ("run", "axis_type"),
    slow.diagonal([stacked_run, engine_run], [AxisType.Auto, AxisType.Explicit]),
)
def test_sharded_batches_give_what_one_device_does(run, axis_type):
    rule = RULES["moment of estimated order"]
    with enable_x64(True):
        place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh_of(axis_type), spec))
        sharded = [place(step, P("data")) for step in regression(3)]
        got = run(rule, sharded, place(float64(PARAMS), P()))
        assert_close(got, on_one_device(run), 1e-10)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got))


@MANY
def test_both_faces_under_shard_map_give_what_one_device_does():
    rule = RULES["moment of estimated order"]

    def steps(axis_name):
        f = psc.clipped_value_and_grad(loss, 0.0, return_stats=True, axis_name=axis_name)
        tx = psc.per_sample_clip(rule, axis_name=axis_name)
        own = functools.partial(jax.tree.map, lambda leaf: varying(leaf, axis_name))

        def two_steps(params, x, y, mask):
            state, clip_state = rule.init(), tx.init(params)
            for _ in range(2):
                threshold = rule.threshold(state)
                _, grads, stats = f(params, x, y, sample_mask=mask, threshold=threshold)
                state = rule.update(state, stats.norms, mask, axis_name=axis_name)
                updates, clip_state = tx.update(
                    jax.vmap(jax.grad(loss), (None, 0, 0))(own(params), x, y),
                    clip_state,
                    sample_mask=mask,
                )
            return (grads, state), (updates, clip_state.threshold_state)

        return two_steps

    with enable_x64(True):
        (arguments,) = regression(1)
        sharded = jax.shard_map(
            steps("data"),
            mesh=mesh_of(),
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=P(),
        )
        params = float64(PARAMS)
        by_engine, by_stack = jax.jit(sharded)(params, *arguments)
        expected, _ = jax.jit(steps(None))(params, *arguments)
        assert_close(by_engine, expected, 1e-10)
        assert_close(by_stack, expected, 1e-10)
        assert abs(expected[0]["b"]) > 0
