"""Compare accumulate_clipped with NumPy and MultiSteps, and clip_at="micro-batch" with both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psclip_optax as psc
from tests.numerics import assert_close, enable_x64

K = 4
THRESHOLD = psc.growing_threshold(0.5, 1.5)


def numpy_clipped(gradient, tau):
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradient.values()))
    scale = min(1.0, tau / norm) if norm > 0 else 1.0
    return {name: scale * leaf for name, leaf in gradient.items()}


def numpy_window(gradients, taus, *, mean=True):
    clipped = [numpy_clipped(gradient, tau) for gradient, tau in zip(gradients, taus, strict=True)]
    divisor = len(gradients) if mean else 1
    return {name: sum(one[name] for one in clipped) / divisor for name in clipped[0]}


def taus_of(number):
    return 0.5 * np.arange(1, number + 1) ** (1 / 1.5)


def heavy_tailed_gradients(number, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "w": random.standard_t(1.5, (3, 2)).astype(dtype),
            "b": random.standard_t(1.5, 2).astype(dtype),
        }
        for _ in range(number)
    ]


def zeros(dtype=jnp.float64):
    return {"w": jnp.zeros((3, 2), dtype), "b": jnp.zeros(2, dtype)}


def all_updates(tx, gradients, params):
    state = tx.init(params)
    seen = []
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params)
        seen.append(updates)
    return seen, state


def in_double(**options):
    return functools.partial(psc.accumulate_clipped, accumulator_dtype=jnp.float64, **options)


@pytest.mark.parametrize("mean", [True, False])
def test_two_windows_against_numpy(mean):
    with enable_x64(True):
        gradients = heavy_tailed_gradients(2 * K)
        tx = in_double(use_grad_mean=mean)(optax.sgd(1.0), K, THRESHOLD)
        seen, state = all_updates(tx, gradients, zeros())
        for step, updates in enumerate(seen, 1):
            expected = zeros()
            if step % K == 0:
                window = numpy_window(gradients[step - K : step], taus_of(K), mean=mean)
                expected = jax.tree.map(jnp.negative, window)
            assert_close(updates, expected, 1e-14)
        assert int(state.gradient_step) == 2
        assert int(state.mini_step) == 0


def test_a_gradient_of_zero_has_a_derivative():
    def update(gradient):
        tx = psc.accumulate_clipped(optax.sgd(1.0), 1, 0.3)
        return tx.update(gradient, tx.init(gradient))[0].sum()

    np.testing.assert_array_equal(jax.grad(update)(jnp.zeros(3)), -np.ones(3))


def test_clipping_after_accumulation_is_another_thing():
    with enable_x64(True):
        gradients = heavy_tailed_gradients(K)
        before, _ = all_updates(in_double()(optax.sgd(1.0), K, 1.0), gradients, zeros())
        after = optax.MultiSteps(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
            K,
            accumulator_dtype=jnp.float64,
        )
        clipped_after, _ = all_updates(after, gradients, zeros())
        difference = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b))), before, clipped_after
        )
        assert max(difference[-1].values()) > 0.1


def test_the_window_may_grow_by_a_schedule():
    with enable_x64(True):
        gradients = heavy_tailed_gradients(2 + 3)
        tx = in_double()(optax.sgd(1.0), lambda updates: 2 + updates, THRESHOLD)
        seen, state = all_updates(tx, gradients, zeros())
        for first, last in ((0, 2), (2, 5)):
            window = numpy_window(gradients[first:last], taus_of(last - first))
            assert_close(seen[last - 1], jax.tree.map(jnp.negative, window), 1e-14)
        assert int(state.gradient_step) == 2


@pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)])
def test_an_infinite_threshold_is_multisteps(inner):
    gradients = heavy_tailed_gradients(3 * K, np.float32)
    params = zeros(jnp.float32)
    ours, theirs = psc.accumulate_clipped(inner, K, jnp.inf), optax.MultiSteps(inner, K)
    one, other = (all_updates(tx, gradients, params) for tx in (ours, theirs))
    # XLA may fuse a multiplication and an addition, or not.
    assert_close(one, other, 3e-7)
    with jax.disable_jit():
        one, other = (all_updates(tx, gradients, params) for tx in (ours, theirs))
        assert_close(one, other, 0)


def test_a_skipped_micro_batch_has_no_position():
    with enable_x64(True):
        first, second = heavy_tailed_gradients(2)
        poisoned = {"w": np.full((3, 2), np.nan), "b": np.zeros(2)}
        tx = in_double(should_skip_update_fn=optax.skip_not_finite)(optax.sgd(1.0), 2, THRESHOLD)
        seen, state = all_updates(tx, [first, poisoned, second], zeros())
        assert_close(seen[1], zeros(), 0)
        window = numpy_window([first, second], taus_of(2))
        assert_close(seen[2], jax.tree.map(jnp.negative, window), 1e-14)
        assert int(state.gradient_step) == 1


def test_the_rule_for_skipping_sees_the_gradient_before_clipping():
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=100.0)
    tx = psc.accumulate_clipped(optax.sgd(1.0), 1, 1.0, should_skip_update_fn=skip)
    large = jnp.array([30.0, 40.0])
    updates, state = tx.update(large, tx.init(large))
    assert_close(updates, jnp.zeros(2), 0)
    assert bool(state.skip_state["should_skip"])
    assert float(state.skip_state["norm_squared"]) == 2500.0


def test_a_gradient_that_is_not_finite_does_not_pass_for_one_that_is():
    tx = psc.accumulate_clipped(optax.sgd(1.0), 1, 1.0)
    for bad in (jnp.inf, jnp.nan):
        gradient = {"a": jnp.array([bad, 1.0]), "b": jnp.ones(2)}
        updates, _ = tx.update(gradient, tx.init(gradient))
        assert all(jnp.all(jnp.isnan(leaf)) for leaf in updates.values())


@pytest.mark.parametrize(
    ("dtype", "entry"),
    [
        (jnp.float32, 1e30),
        (jnp.float32, 3e38),
        (jnp.float32, 1e-30),
        (jnp.float16, 6e4),
        (jnp.bfloat16, 1e38),
        (jnp.bfloat16, 1.0),
    ],
)
def test_norms_at_the_edge_of_their_range(dtype, entry):
    # Sums in the other dtypes would overflow, vanish or saturate.
    gradient = jnp.full(2048, entry, dtype)
    tau = float(min(entry, 1.0))
    tx = psc.accumulate_clipped(optax.sgd(1.0), 1, tau)
    updates, _ = tx.update(gradient, tx.init(gradient))
    assert updates.dtype == dtype
    expected = np.full(2048, -tau / np.sqrt(2048))
    np.testing.assert_allclose(
        np.asarray(updates, np.float64), expected, 4 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize(("tau", "expected"), [(0.0, 0.0), (jnp.inf, -1.0)])
def test_thresholds_at_their_ends(tau, expected):
    tx = psc.accumulate_clipped(optax.sgd(1.0), 1, tau)
    updates, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    np.testing.assert_array_equal(updates, jnp.full(3, expected))


@pytest.mark.parametrize("tau", [0.0, 1.0, jnp.inf])
def test_a_zero_gradient_stays_zero(tau):
    tx = psc.accumulate_clipped(optax.sgd(1.0), 1, tau)
    updates, _ = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
    np.testing.assert_array_equal(updates, jnp.zeros(3))


def test_behind_per_sample_clip():
    with enable_x64(True):
        stacked = [np.random.default_rng(i).standard_t(1.5, (8, 3)) for i in range(2)]
        tx = optax.chain(psc.per_sample_clip(1.0), in_double()(optax.sgd(1.0), 2, THRESHOLD))
        state = tx.init(jnp.zeros(3))
        means = []
        for gradients in stacked:
            updates, state = tx.update(gradients, state, jnp.zeros(3))
            scales = np.minimum(1, 1 / np.linalg.norm(gradients, axis=1))
            means.append({"": np.mean(scales[:, None] * gradients, axis=0)})
        assert_close(updates, -numpy_window(means, taus_of(2))[""], 1e-14)


def test_in_a_scan_with_numbers_injected():
    build = lambda learning_rate, alpha: psc.accumulate_clipped(
        optax.sgd(learning_rate), 2, psc.growing_threshold(alpha, 1.0)
    )
    tx = optax.inject_hyperparams(build)(learning_rate=1.0, alpha=lambda step: 1.0 + step)

    @jax.jit
    def run(gradients):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(2)), gradients)[1]

    # α is 1, 2, 3, 4 and τ_k = α k.
    updates = run(jnp.array([[100.0, 0.0], [0.0, 100.0], [100.0, 0.0], [0.0, 100.0]]))
    np.testing.assert_allclose(updates, [[0, 0], [-0.5, -2.0], [0, 0], [-1.5, -4.0]], 1e-6)


@pytest.mark.parametrize("static", [(), "every_k_schedule"])
@pytest.mark.parametrize("x64", [False, True])
def test_injected_itself_it_takes_a_threshold_on_a_schedule(static, x64):
    with enable_x64(x64):
        tx = optax.inject_hyperparams(psc.accumulate_clipped, static_args=static)(
            optax.sgd(1.0), 2, lambda call: 1.0 + call
        )
        state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
        for gradient in ([100.0, 0.0], [0.0, 100.0], [100.0, 0.0], [0.0, 100.0]):
            updates, state = update(jnp.array(gradient), state, jnp.zeros(2))
        np.testing.assert_allclose(updates, [-1.5, -2.0], 1e-6)  # clipped at 3 and at 4


def test_injected_a_callable_that_is_no_schedule_is_static():
    static = ("threshold", "should_skip_update_fn", "accumulator_dtype")
    tx = optax.inject_hyperparams(psc.accumulate_clipped, static_args=static)(
        optax.sgd(1.0),
        1,
        psc.growing_threshold(2.0, 1.0),
        should_skip_update_fn=optax.skip_not_finite,
        accumulator_dtype=jnp.bfloat16,
    )
    updates, state = tx.update(jnp.array([100.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    assert float(updates[0]) == -2
    updates, _ = tx.update(jnp.array([jnp.nan]), state, jnp.zeros(1))
    assert float(updates[0]) == 0


@pytest.mark.parametrize("skip", [None, optax.skip_not_finite])
def test_a_tree_without_leaves_gives_one_without_leaves(skip):
    tx = psc.accumulate_clipped(optax.adam(0.1), 2, 1.0, should_skip_update_fn=skip)
    for tree in ({}, None, {"a": ()}):
        seen, state = all_updates(tx, [tree] * 3, tree)
        assert jax.tree.structure(seen) == jax.tree.structure([tree] * 3)
        assert int(state.gradient_step) == 1


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: psc.accumulate_clipped(0.1, 2, 1.0), TypeError, r"optax\.sgd\(0\.1\), got 0\.1"),
        (lambda: psc.accumulate_clipped(optax.sgd(1), 2.0, 1.0), TypeError, "got 2.0"),
        (lambda: psc.accumulate_clipped(optax.sgd(1), 0, 1.0), ValueError, "at least 1, got 0"),
        (lambda: psc.accumulate_clipped(optax.sgd(1), True, 1.0), ValueError, "got True"),
        (lambda: psc.accumulate_clipped(optax.sgd(1), 2, "1"), TypeError, "'1'"),
        (lambda: psc.accumulate_clipped(optax.sgd(1), 2, -1.0), ValueError, "got -1"),
        (
            lambda: updated(jnp.zeros(3), jnp.zeros((8, 3))),
            ValueError,
            r"grads is float32\[8, 3\], but its parameter has shape \[3\]: .*per_sample_clip",
        ),
        (lambda: updated({"a": jnp.zeros(3)}, {"b": jnp.zeros(3)}), ValueError, "structure"),
        (
            lambda: updated({"a": jnp.zeros(3)}, {"a": jnp.zeros(3, jnp.int32)}),
            TypeError,
            r"grads\['a'\] is int32\[3\]",
        ),
        (lambda: updated(jnp.zeros(3), jnp.zeros(3, jnp.complex64)), TypeError, "complex64"),
    ],
)
def test_what_is_refused(call, error, expected):
    with pytest.raises(error, match=expected):
        call()


def updated(params, gradients):
    tx = psc.accumulate_clipped(optax.sgd(1.0), 2, 1.0)
    return tx.update(gradients, tx.init(params), params)


# Within one step


def loss(params, x, y):
    return jnp.square(jnp.tanh(x @ params["w"]).sum() + params["b"].sum() - y)


@jax.jit
def mean_gradient(params, x, y):
    return jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, x, y)))(params)


def batch(n=12, seed=0):
    random = np.random.default_rng(seed)
    params = {"w": jnp.asarray(random.normal(size=(3, 2))), "b": jnp.zeros(2)}
    return params, jnp.asarray(random.normal(size=(n, 3))), jnp.asarray(random.standard_t(1.2, n))


def in_microbatches(size, **options):
    return psc.clipped_value_and_grad(
        loss, THRESHOLD, microbatch_size=size, clip_at="micro-batch", return_stats=True, **options
    )


mean_loss = jax.jit(lambda params, x, y: jnp.mean(jax.vmap(loss, (None, 0, 0))(params, x, y)))


@pytest.mark.parametrize("jit", [True, False])
def test_one_step_is_accumulate_clipped_over_several(jit):
    with enable_x64(True):
        params, x, y = batch()
        f = jax.jit(in_microbatches(3)) if jit else in_microbatches(3)
        value, grads, stats = f(params, x, y)
        parts = [mean_gradient(params, x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
        updates, _ = all_updates(in_double()(optax.sgd(1.0), 4, THRESHOLD), parts, params)
        assert_close(grads, jax.tree.map(jnp.negative, updates[-1]), 1e-12)
        assert_close(value, mean_loss(params, x, y), 1e-12)
        norms = jnp.stack([optax.tree.norm(part) for part in parts])
        assert_close(stats.norms, norms, 1e-12)
        assert_close(stats.scales, jnp.minimum(1, taus_of(4) / norms), 1e-12)
        assert int(stats.num_clipped) == int(jnp.sum(norms > taus_of(4))) > 0


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_an_infinite_threshold_is_the_plain_mean_gradient(size):
    # For slices of any size: a shorter last slice has the share of its samples.
    with enable_x64(True):
        params, x, y = batch()
        value, grads, _ = jax.jit(in_microbatches(size))(params, x, y, threshold=jnp.inf)
        assert_close(grads, mean_gradient(params, x, y), 1e-12)
        assert_close(value, mean_loss(params, x, y), 1e-12)


def test_micro_batches_of_one_sample_are_samples():
    with enable_x64(True):
        arguments = batch()
        per_sample = psc.clipped_value_and_grad(loss, THRESHOLD, return_stats=True)
        assert_close(
            jax.jit(in_microbatches(1))(*arguments), jax.jit(per_sample)(*arguments), 1e-12
        )


def test_padding_has_no_share_and_empty_micro_batches_no_position():
    with enable_x64(True):
        params, x, y = batch(9)
        keep = np.array([0, 2, 6, 7, 8])  # with micro-batches of 3, the second is all padding
        mask = np.isin(np.arange(9), keep)
        padded = jnp.where(mask[:, None], x, jnp.nan)
        f = jax.jit(in_microbatches(3))
        _, grads, stats = f(params, padded, y, sample_mask=mask)
        expected = zeros()
        for k, part in ((1, keep[:2]), (2, keep[2:])):
            clipped = numpy_clipped(mean_gradient(params, x[part], y[part]), taus_of(k)[-1])
            expected = jax.tree.map(
                lambda a, b, part=part: a + b * len(part) / 5, expected, clipped
            )
        assert_close(grads, expected, 1e-12)
        assert stats.norms.shape == (3,)
        assert int(stats.num_nonfinite) == 0
        _, grads, _ = f(params, padded, y, sample_mask=np.zeros(9, bool))
        assert_close(grads, zeros(), 0)


@pytest.mark.parametrize("where", ["input", "label"])
def test_a_poisoned_micro_batch_is_dropped_whole(where):
    with enable_x64(True):
        params, x, y = batch(9)
        bad_x = x.at[4].set(jnp.inf) if where == "input" else x
        bad_y = y.at[4].set(jnp.nan) if where == "label" else y
        value, grads, stats = jax.jit(in_microbatches(3))(params, bad_x, bad_y)
        parts = [mean_gradient(params, x[i : i + 3], y[i : i + 3]) for i in (0, 6)]
        clipped = [
            numpy_clipped(part, tau) for part, tau in zip(parts, taus_of(3)[[0, 2]], strict=True)
        ]
        assert_close(grads, jax.tree.map(lambda a, b: (a + b) / 3, *clipped), 1e-12)
        left = np.r_[:3, 6:9]
        assert_close(value, mean_loss(params, x[left], y[left]), 1e-12)
        assert int(stats.num_nonfinite) == 1
        assert float(stats.scales[1]) == 0
        propagating = jax.jit(in_microbatches(3, on_nonfinite="propagate"))
        _, grads, _ = propagating(params, bad_x, bad_y)
        assert all(jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(grads))


def test_positions_are_of_the_micro_batches():
    with enable_x64(True):
        params, x, y = batch(6)
        f = jax.jit(in_microbatches(3))
        _, grads, _ = f(params, x, y, positions=jnp.array([2, 1]))
        order = np.r_[3:6, :3]
        assert_close(grads, f(params, x[order], y[order])[1], 1e-12)
        with pytest.raises(ValueError, match=r"shape \[2\]"):
            in_microbatches(3)(params, x, y, positions=jnp.arange(6) + 1)


def test_aux_is_of_every_sample():
    with enable_x64(True):
        params, x, y = batch(7)
        f = psc.clipped_value_and_grad(
            lambda p, x, y: (loss(p, x, y), y),
            THRESHOLD,
            microbatch_size=3,
            clip_at="micro-batch",
            has_aux=True,
        )
        (_, aux), _ = jax.jit(f)(params, x, y)
        np.testing.assert_array_equal(aux, y)


@pytest.mark.parametrize("jit", [True, False])
def test_aux_of_padding_is_its_own(jit):
    x, mask = jnp.arange(15.0).reshape(5, 3), jnp.array([False, True, True, False, True])
    f = psc.clipped_value_and_grad(
        lambda w, x: (jnp.dot(w, x), x[0]),
        1.0,
        has_aux=True,
        microbatch_size=2,
        clip_at="micro-batch",
    )
    f = jax.jit(f) if jit else f
    (_, aux), grads = f(jnp.ones(3), x, sample_mask=mask)
    np.testing.assert_array_equal(aux, [0, 3, 6, 9, 12])
    poisoned = x.at[0].set(jnp.nan)
    (_, aux), same = f(jnp.ones(3), poisoned, sample_mask=mask)
    np.testing.assert_array_equal(aux, [jnp.nan, 3, 6, 9, 12])
    np.testing.assert_array_equal(same, grads)


def test_its_plan_is_plain():
    params, x, y = batch(6)
    plan = in_microbatches(3).explain(params, x, y)
    assert str(plan).startswith("mode micro-batch, 3 samples\n")
    assert [row.route for row in plan.rows] == ["plain", "plain"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip_at": "micro-batch"}, "needs microbatch_size"),
        ({"clip_at": "batch"}, '"sample" or "micro-batch", got \'batch\''),
    ],
)
def test_what_clip_at_refuses(options, expected):
    with pytest.raises(ValueError, match=expected):
        psc.clipped_value_and_grad(loss, 1.0, **options)
