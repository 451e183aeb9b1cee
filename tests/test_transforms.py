import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import export

import psclip_optax as psc
from psclip_optax.transforms import PerSampleClipState
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, growing, heavy_tailed

PARAMS = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
JAX_ON_BRANCHES = "(identical|equal output) types"
WRITE_INSTEAD = r"optax\.chain\(psc\.per_sample_clip\(…\), optax\.MultiSteps"


def stack(n, seed=0, dtype=jnp.float32, scale=3.0):
    return {
        name: jnp.asarray(scale * heavy_tailed(seed + 100 * i, (n, *p.shape)), dtype)
        for i, (name, p) in enumerate(PARAMS.items())
    }


def clip(grads, threshold, **kwargs):
    update_kwargs = {
        name: kwargs.pop(name) for name in ("sample_mask", "positions", "params") if name in kwargs
    }
    tx = psc.per_sample_clip(threshold, **kwargs)
    return tx.update(grads, tx.init(PARAMS), **update_kwargs)


# The rule


@pytest.mark.parametrize(
    ("n", "on_nonfinite", "jit"),
    slow.diagonal([1, 7, 64], ["drop", "propagate"], [False, True]),
)
def test_is_the_mean_of_the_clipped_gradients(n, on_nonfinite, jit):
    grads = stack(n)
    tx = psc.per_sample_clip(psc.growing_threshold(4.0, 1.5), on_nonfinite=on_nonfinite)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(grads, tx.init(PARAMS))
    assert_close(updates, clipped_mean(grads, growing(4.0, 1.5, n)), 1e-5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
    assert int(state.num_updates) == 1
    assert int(state.num_samples) == n


def test_float64_to_the_last_digits():
    with enable_x64(True):
        grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), stack(33))
        updates, _ = clip(grads, psc.growing_threshold(4.0, 1.5))
        assert_close(updates, clipped_mean(grads, growing(4.0, 1.5, 33)), 1e-14)


def test_infinite_threshold_is_the_plain_mean_and_zero_gives_zero():
    grads = stack(9)
    assert_close(clip(grads, jnp.inf)[0], jax.tree.map(lambda g: g.mean(0), grads), 1e-5)
    updates, state = clip(grads, 0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert int(state.num_clipped) == 9


def test_zero_gradients_are_not_clipped_even_at_zero():
    updates, state = clip(jax.tree.map(jnp.zeros_like, stack(5)), 0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert (int(state.num_clipped), float(state.mean_scale)) == (0, 1.0)


def test_norm_is_over_the_whole_tree():
    grads = {"a": jnp.array([[3.0]]), "b": (jnp.array([4.0]), None)}
    updates, state = clip(grads, 1.0)
    assert_close(updates, {"a": np.array([0.6]), "b": (np.array(0.8), None)}, 1e-6)
    assert float(state.max_norm) == 5.0


@pytest.mark.parametrize("axis", [1, -1, -2])
def test_sample_axis(axis):
    grads = stack(6)
    grads["b"] = jnp.stack([grads["b"], grads["b"]], 1)  # [6, 2, 3]: every axis exists
    moved = jax.tree.map(lambda g: jnp.moveaxis(g, 0, axis), grads)
    expected, _ = clip(grads, psc.growing_threshold(2.0, 2.0))
    updates, _ = clip(moved, psc.growing_threshold(2.0, 2.0), sample_axis=axis)
    assert_close(updates, expected, 1e-6)
    moved["w"] = moved["w"].at[(slice(None),) * (axis % 3) + (2,)].set(jnp.nan)
    grads["w"] = grads["w"].at[2].set(jnp.nan)
    updates, _ = clip(moved, psc.growing_threshold(2.0, 2.0), sample_axis=axis)
    assert_close(updates, clipped_mean(grads, growing(2.0, 2.0, 6)), 1e-5)


@given(data=st.data())
@settings(max_examples=100, phases=(Phase.explicit, Phase.generate))
def test_equals_the_reference_on_any_stack(data):
    n = data.draw(st.integers(1, 6))
    numbers = st.one_of(
        st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, np.nan, np.inf, 1e30, -1e30])
    )
    grads = {
        "w": data.draw(hnp.arrays(np.float32, (n, 2), elements=numbers)),
        "b": data.draw(hnp.arrays(np.float32, (n,), elements=numbers)),
    }
    mask = data.draw(hnp.arrays(bool, n))
    alpha, beta = (
        data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4, np.inf])),
        data.draw(st.floats(1, 2, width=32)),
    )
    updates, state = clip(grads, psc.growing_threshold(alpha, beta), sample_mask=mask)
    positions = np.maximum(np.cumsum(mask), 1)
    assert_close(updates, clipped_mean(grads, alpha * positions ** (1 / beta), mask), 1e-4)
    finite = np.isfinite(grads["w"]).all(1) & np.isfinite(grads["b"])
    assert int(state.num_samples) == mask.sum()
    assert int(state.num_nonfinite) == (mask & ~finite).sum()


# Masks and positions


def test_masked_samples_have_no_position_no_weight_and_no_share():
    grads = stack(8)
    mask = jnp.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
    padded = jax.tree.map(
        lambda g: jnp.where(mask.reshape(-1, *[1] * (g.ndim - 1)), g, jnp.nan), grads
    )
    compact = jax.tree.map(lambda g: g[mask], grads)
    expected, expected_state = clip(compact, psc.growing_threshold(2.0, 1.5))
    for on_nonfinite, stacked in itertools.product(["drop", "propagate"], [grads, padded]):
        updates, state = clip(
            stacked, psc.growing_threshold(2.0, 1.5), sample_mask=mask, on_nonfinite=on_nonfinite
        )
        assert_close(updates, expected, 1e-6)
        assert_close(state, expected_state, 1e-6)


def test_positions_replace_the_count():
    grads = stack(5)
    positions = jnp.array([9, 2, 30, 1, 4])
    taus = 2.0 * np.asarray(positions) ** (1 / 1.5)
    updates, _ = clip(grads, psc.growing_threshold(2.0, 1.5), positions=positions)
    assert_close(updates, clipped_mean(grads, taus), 1e-5)


def test_slices_with_running_positions_add_up_to_the_batch():
    grads = stack(10)
    whole, _ = clip(grads, psc.growing_threshold(2.0, 1.5))
    parts = [
        clip(
            jax.tree.map(lambda g, rows=rows: g[rows], grads),
            psc.growing_threshold(2.0, 1.5),
            positions=rows + 1,
        )[0]
        for rows in (np.arange(0, 4), np.arange(4, 10))
    ]
    assert_close(jax.tree.map(lambda a, b: 0.4 * a + 0.6 * b, *parts), whole, 1e-6)


@pytest.mark.parametrize("tree", [{}, None, {"a": {}, "b": []}])
@pytest.mark.parametrize("rule", [1.0, psc.moment_threshold()], ids=["fixed", "adaptive"])
def test_a_tree_without_leaves_gives_one_without_leaves(rule, tree):
    tx = psc.per_sample_clip(rule)
    state = tx.init(tree)
    for params in (None, tree):
        updates, state = jax.jit(tx.update)(tree, state, params, sample_mask=jnp.ones(3, bool))
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert (int(state.num_updates), int(state.num_samples)) == (2, 0)


@pytest.mark.parametrize("n", [0, 4])
def test_no_sample_that_counts_gives_zeros(n):
    updates, state = clip(
        jax.tree.map(lambda g: g * jnp.nan, stack(n)), 1.0, sample_mask=jnp.zeros(n, bool)
    )
    assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS), 0)
    assert state.all_finite
    assert_close(state[1:-2], tuple(map(jnp.zeros_like, state[1:-2])), 0)


# Numbers that are not finite, or at the edge of the range


def test_dropped_samples_keep_position_and_share():
    grads = stack(6)
    grads["w"] = grads["w"].at[1, 0, 0].set(jnp.nan).at[4, 2, 1].set(-jnp.inf)
    updates, state = clip(grads, psc.growing_threshold(2.0, 1.5))
    assert_close(updates, clipped_mean(grads, growing(2.0, 1.5, 6)), 1e-6)
    assert (int(state.num_nonfinite), int(state.num_samples)) == (2, 6)
    finite = np.array([0, 2, 3, 5])
    norms = np.sqrt(sum((np.asarray(g)[finite].reshape(4, -1) ** 2).sum(1) for g in grads.values()))
    np.testing.assert_allclose(state.median_norm, np.median(norms), rtol=1e-6)
    np.testing.assert_allclose(state.max_norm, norms.max(), rtol=1e-6)
    scales = np.minimum(1, growing(2.0, 1.5, 6)[finite] / norms)
    np.testing.assert_allclose(state.mean_scale, scales.mean(), rtol=1e-6)
    assert int(state.num_clipped) == (scales < 1).sum()


def test_all_dropped_gives_zeros():
    updates, state = clip(jax.tree.map(lambda g: g * jnp.nan, stack(3)), 1.0)
    assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS), 0)
    assert (int(state.num_nonfinite), float(state.mean_scale)) == (3, 0.0)


@pytest.mark.parametrize("mask", [None, jnp.array([True, False, True, True])])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_infinite_threshold_drops_what_is_not_finite(bad, mask):
    grads = stack(4)
    grads["w"] = grads["w"].at[1].set(bad)
    updates, state = clip(grads, jnp.inf, sample_mask=mask)
    assert_close(updates, clipped_mean(grads, np.full(4, np.inf), mask), 1e-6)
    assert (int(state.num_nonfinite), float(state.mean_scale)) == (int(mask is None), 1.0)
    some = jnp.array([1.0, jnp.inf, jnp.inf, 2.0])
    updates, _ = clip(grads, lambda k: some, sample_mask=mask)
    assert_close(updates, clipped_mean(grads, some, mask), 1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("mask", [None, jnp.ones(4, bool)])
def test_propagate_lets_it_through(bad, mask):
    grads = stack(4)
    grads["b"] = grads["b"].at[2].set(bad)
    updates, state = clip(grads, 1.0, on_nonfinite="propagate", sample_mask=mask)
    assert not jnp.isfinite(updates["b"]).any()
    assert int(state.num_nonfinite) == 1


@pytest.mark.parametrize(
    ("size", "tau"),
    [
        *itertools.product([1e-30, 1e-20, 1e18, 1e25, 3e38], [0.0, 1.0, 1e30]),
        (1e-20, 1e-25),
        (1e-30, 1e-25),
    ],
)
def test_norms_whose_squares_leave_float32(size, tau):
    grads = {"w": jnp.array([[size, -size, size], [1e-3, 0, 0], [0, 0, 0]])}
    updates, state = clip(grads, tau)
    assert_close(updates, clipped_mean(grads, np.full(3, tau)), 1e-5)
    assert int(state.num_nonfinite) == 0


def test_propagate_never_zeroes_a_sample_whose_square_overflows():
    updates, _ = clip({"w": jnp.full((2, 3), 1e25)}, 1.0, on_nonfinite="propagate")
    assert jnp.isnan(updates["w"]).all()


def test_float16_norms_do_not_overflow():
    grads = {"w": jnp.full((4, 100), 300.0, jnp.float16)}  # norm 3000, its square 9e6
    updates, state = clip(grads, 1500.0)
    assert updates["w"].dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(updates["w"], np.float64), 150.0, rtol=1e-3)
    assert float(state.max_norm) == 3000.0


def test_bfloat16_sums_do_not_saturate():
    grads = {"w": jnp.ones((1024, 3), jnp.bfloat16)}
    updates, _ = clip(grads, jnp.inf)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(updates["w"], np.float32), 1.0)
    long = {"w": jnp.ones((2, 65536), jnp.bfloat16)}
    assert float(clip(long, jnp.inf)[1].max_norm) == 256.0


@pytest.mark.parametrize("bad", [False, True])
def test_mixed_dtypes(bad):
    with enable_x64(True):
        grads = {
            "f64": jnp.linspace(1, 2, 6).reshape(3, 2),
            "f32": jnp.ones((3, 4), jnp.float32),
            "bf16": jnp.full((3,), 2, jnp.bfloat16),
        }
        grads["f32"] = grads["f32"].at[1, 1].set(jnp.nan if bad else 3.0)
        updates, state = clip(grads, psc.growing_threshold(1.0, 2.0))
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grads)
        expected = clipped_mean(grads, growing(1.0, 2.0, 3))
        assert_close(updates["f64"], expected["f64"], 1e-13)
        assert_close(updates["f32"], expected["f32"], 1e-6)
        assert_close(updates["bf16"], expected["bf16"], 1e-2)
        assert int(state.num_nonfinite) == bad


# Under JAX's transformations


@pytest.mark.parametrize("bad", [False, True])
def test_vmap_over_seeds(bad):
    seeds = [stack(5, seed) for seed in range(3)]
    if bad:
        seeds[1]["w"] = seeds[1]["w"].at[2].set(jnp.inf)
    tx = psc.per_sample_clip(psc.growing_threshold(2.0, 1.5))
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    updates, states = jax.jit(jax.vmap(tx.update, in_axes=(0, None)))(many, tx.init(PARAMS))
    for i, grads in enumerate(seeds):
        expected = clipped_mean(grads, growing(2.0, 1.5, 5))
        assert_close(jax.tree.map(lambda u, i=i: u[i], updates), expected, 1e-5)
    np.testing.assert_array_equal(states.num_nonfinite, [0, int(bad), 0])


def test_vmap_keeps_the_careful_path_behind_a_branch():
    tx = psc.per_sample_clip(1.0)
    many = jax.tree.map(lambda g: jnp.stack([g, g]), stack(5))
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(tx.update, in_axes=(0, None)), in_axes=(0, None)))(
        jax.tree.map(lambda g: g[None], many), tx.init(PARAMS)
    )
    assert " cond[" in str(jaxpr)


@pytest.mark.parametrize("bad", [False, True])
def test_derivative_with_respect_to_the_threshold(bad):
    grads = stack(4)
    if bad:
        grads["w"] = grads["w"].at[2].set(jnp.nan)

    def squared(alpha):
        updates, _ = clip(grads, psc.growing_threshold(alpha, 2.0))
        return optax.tree.norm(updates, squared=True)

    def by_hand(alpha):
        mean = clipped_mean(grads, growing(alpha, 2.0, 4))
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(mean))

    slope = (by_hand(1.5 + 1e-6) - by_hand(1.5 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(squared)(1.5), slope, rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(jax.grad(squared))(jnp.array([1.5]))[0], slope, rtol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("on_nonfinite", ["drop", "propagate"])
def test_lowers_for_every_platform(platform, on_nonfinite):
    tx = psc.ps_clip_sgd(0.1, 1.0, 2.0, momentum=0.9)
    tx = optax.chain(
        psc.per_sample_clip(psc.growing_threshold(1.0, 2.0), on_nonfinite=on_nonfinite),
        optax.adam(0.1),
    )
    update = jax.jit(lambda g, s, m: tx.update(g, s, PARAMS, sample_mask=m))
    exported = export.export(update, platforms=[platform])(
        stack(8), tx.init(PARAMS), jnp.ones(8, bool)
    )
    assert exported.platforms == (platform,)


@pytest.mark.parametrize(
    ("axis", "rule"),
    slow.diagonal([0, 1], [psc.growing_threshold(1.0, 1.5), psc.quantile_threshold(initial=1.0)]),
)
def test_exports_for_any_number_of_samples(axis, rule):
    tx = psc.per_sample_clip(rule, sample_axis=axis)
    update = lambda grads, mask: tx.update(grads, tx.init(w), w, sample_mask=mask)
    w, (n,) = jnp.zeros((4, 3)), export.symbolic_shape("n")
    shape = (*w.shape[:axis], n, *w.shape[axis:])
    kinds = [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((n,), jnp.bool_)]
    exported = export.export(jax.jit(lambda *arguments: update(*arguments)[0]))(*kinds)
    for size in (1, 5, 16):
        grads = jnp.moveaxis(stack(size)["w"], 0, axis)
        grads = grads.at[(slice(None),) * axis + (0,)].set(jnp.inf)  # the careful path too
        mask = jnp.arange(size) < max(size - 1, 1)
        assert_close(exported.call(grads, mask), update(grads, mask)[0], 1e-5)


def test_traced_threshold_mask_and_positions_compile_once():
    tx_of = lambda alpha: psc.per_sample_clip(psc.growing_threshold(alpha, 2.0))
    traces = []

    @jax.jit
    def update(alpha, grads, mask, positions):
        traces.append(1)
        tx = tx_of(alpha)
        return tx.update(grads, tx.init(PARAMS), sample_mask=mask, positions=positions)[0]

    for alpha in (1.0, 2.0):
        grads, mask, positions = stack(4), jnp.array([1, 1, 0, 1], bool), jnp.array([4, 3, 2, 1])
        expected = clipped_mean(grads, alpha * np.asarray(positions) ** 0.5, mask)
        assert_close(update(alpha, grads, mask, positions), expected, 1e-5)
    assert len(traces) == 1


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="XLA for CPU does not yet fuse a square into its sum, but writes it out",
)
def test_bytes_accessed_for_propagate_are_two_stacks():
    n = 64
    params = {"w": jnp.zeros((256, 256)), "b": jnp.zeros(256)}
    grads = jax.tree.map(lambda p: jnp.ones((n, *p.shape)), params)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(grads))

    def reads(on_nonfinite):
        tx = psc.per_sample_clip(psc.growing_threshold(1.0, 2.0), on_nonfinite=on_nonfinite)
        return (
            jax.jit(tx.update)
            .lower(grads, tx.init(params))
            .compile()
            .cost_analysis()["bytes accessed"]
            / nbytes
        )

    # The result, 1/64 of the stack, is written, read and written again.
    assert reads("propagate") < 2 + 4 / n
    # "drop" reads as often if all is finite. XLA counts the more expensive side of its branch, and
    # one step of that side's loop over eight slices.
    assert reads("drop") < 3


# In Optax's chains


def freeze_bias(params):
    return {name: name != "b" for name in params}


FOLLOWERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.1),
    "masked": lambda: optax.masked(optax.sgd(0.1), freeze_bias),
    "partition": lambda: optax.partition(
        {True: optax.adam(0.1), False: optax.set_to_zero()}, freeze_bias
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "muon": lambda: optax.contrib.muon(0.1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(
        optax.linear_schedule(0.1, 0.0, 10)
    ),
}


@pytest.mark.parametrize(("name", "jit"), slow.diagonal(FOLLOWERS, [False, True]))
def test_in_front_of_any_optimizer(name, jit):
    follower = FOLLOWERS[name]()
    tx = optax.chain(psc.per_sample_clip(psc.growing_threshold(2.0, 1.5)), follower)
    update = jax.jit(tx.update) if jit else tx.update
    state, follower_state = tx.init(PARAMS), follower.init(PARAMS)
    for seed in range(3):
        grads, mask = stack(6, seed), jnp.arange(6) < 5
        updates, state = update(grads, state, PARAMS, sample_mask=mask)
        mean = clipped_mean(grads, growing(2.0, 1.5, 6), mask)
        mean = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), mean)
        expected, follower_state = follower.update(mean, follower_state, PARAMS)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
        assert_close(updates, expected, 2e-3 if name in ("muon", "adamw", "partition") else 1e-4)
    assert int(optax.tree.get(state, "num_samples")) == 5


def test_the_count_of_an_optimizer_behind_is_found_by_its_name():
    for rule in (1.0, psc.moment_threshold(), psc.quantile_threshold(), psc.min_norm_threshold()):
        tx = optax.chain(psc.per_sample_clip(rule), optax.adam(0.1))
        _, state = tx.update(stack(3), tx.init(PARAMS), PARAMS)
        assert int(optax.tree.get(state, "count")) == 1
    tx = optax.chain(psc.track_norms(rule), psc.accumulate_clipped(optax.adam(0.1), 2, 1.0))
    assert int(optax.tree.get(tx.init(PARAMS), "count")) == 0


def test_in_front_of_reduce_on_plateau():
    tx = optax.chain(
        psc.per_sample_clip(1.0), optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1)
    )
    state = tx.init(PARAMS)
    for _ in range(4):
        _, state = tx.update(stack(4), state, PARAMS, value=1.0)
    assert float(optax.tree.get(state, "scale")) < 1


@pytest.mark.parametrize("pass_params", [True, False])
def test_inside_multi_steps_fails_and_says_what_to_write(pass_params):
    tx = optax.MultiSteps(optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)), 2)
    params = PARAMS if pass_params else None
    with pytest.raises(ValueError, match=WRITE_INSTEAD):
        tx.update(stack(4), tx.init(PARAMS), params)


def test_inside_multi_steps_with_one_parameter_fails_too():
    tx = optax.MultiSteps(optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)), 2)
    params = {"w": jnp.zeros((4, 3))}
    with pytest.raises(ValueError, match=WRITE_INSTEAD):
        tx.update({"w": jnp.ones((4, 4, 3))}, tx.init(params), params)
    with pytest.raises(TypeError, match=JAX_ON_BRANCHES):  # without params
        tx.update({"w": jnp.ones((4, 4, 3))}, tx.init(params))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.masked(inner, freeze_bias),
        lambda inner: optax.partition({True: inner, False: optax.set_to_zero()}, freeze_bias),
    ],
)
def test_inside_masked_or_partition_fails_and_says_what_to_write(wrap):
    tx = wrap(optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=f"MaskedNode.*{WRITE_INSTEAD}"):
        tx.init(PARAMS)
    bare = psc.per_sample_clip(1.0)
    with pytest.raises(ValueError, match=f"MaskedNode.*{WRITE_INSTEAD}"):
        bare.update({"w": jnp.ones((3, 2)), "b": optax.MaskedNode()}, bare.init(PARAMS))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.apply_if_finite(inner, 3),
        lambda inner: optax.conditionally_transform(inner, lambda step: True),
        lambda inner: optax.conditionally_mask(inner, lambda step: True),
    ],
)
def test_inside_what_skips_updates_jax_fails(wrap):
    tx = wrap(optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)))
    with pytest.raises(TypeError, match=JAX_ON_BRANCHES):
        tx.update(stack(4), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.contrib.sam(inner, optax.sgd(0.1)),
        lambda inner: optax.contrib.sam(optax.sgd(0.1), inner),
    ],
)
def test_inside_sam_the_first_update_fails_and_says_what_to_write(wrap, jit):
    tx = wrap(optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)))
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=r"contrib\.sam.*" + WRITE_INSTEAD):
        update(stack(4), tx.init(PARAMS), PARAMS)


def test_in_front_of_sam():
    clip_alone = psc.per_sample_clip(1.0)
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05))
    tx = optax.chain(clip_alone, sam)
    state, sam_state = tx.init(PARAMS), sam.init(PARAMS)
    for seed in range(2):
        updates, state = tx.update(stack(4, seed), state, PARAMS)
        mean, _ = clip_alone.update(stack(4, seed), clip_alone.init(PARAMS))
        expected, sam_state = sam.update(mean, sam_state, PARAMS)
        assert_close(updates, expected, 1e-6)


def test_a_state_goes_through_what_trees_go_through():
    tx = psc.per_sample_clip(1.0)
    _, state = tx.update(stack(3), tx.init(PARAMS), PARAMS)
    assert pickle.loads(pickle.dumps(state)) == state
    cast = optax.tree.cast(state, jnp.bfloat16)
    axes = jax.tree.map(lambda _: 0, state)
    shapes = jax.eval_shape(lambda: state)
    assert {type(tree) for tree in (cast, axes, shapes)} == {PerSampleClipState}
    assert bool(state.all_finite)
    grads = jax.tree.map(lambda g: g.at[0].set(jnp.nan), stack(3))
    assert not bool(tx.update(grads, state, PARAMS)[1].all_finite)


def test_state_keeps_its_types_over_steps():
    with enable_x64(True):
        tx = psc.per_sample_clip(1.0)
        state = tx.init(PARAMS)
        _, after = jax.lax.scan(
            lambda state, grads: tx.update(grads, state)[::-1],
            state,
            jax.tree.map(lambda g: g[None], stack(4)),
        )
        _, state64 = tx.update(jax.tree.map(lambda g: g.astype(jnp.float64), stack(4)), state)
    assert isinstance(state, PerSampleClipState)
    assert jax.tree.map(lambda x: x.dtype, state64) == jax.tree.map(lambda x: x.dtype, state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(lambda p: (1, *p.shape), PARAMS)


def test_state_may_be_donated():
    tx = psc.per_sample_clip(1.0)
    skip = lambda grads, state: jax.tree.map(
        lambda old, new: old, state, tx.update(grads, state)[1]
    )
    state = jax.jit(skip, donate_argnums=1)(stack(3), tx.init(PARAMS))
    assert int(state.num_updates) == 0


# Errors


@pytest.mark.parametrize(
    ("grads", "kwargs", "message"),
    [
        ({}, {"params": PARAMS}, "got a tree without leaves, {}"),
        ({"w": jnp.ones((3, 2)), "b": jnp.float32(1)}, {}, r"\['b'\] has no sample axis 0.*float32\[\]"),
        ({"w": jnp.ones((3, 2))}, {"sample_axis": 2}, r"\['w'\] has no sample axis 2.*float32\[3, 2\]"),
        ({"w": jnp.ones((3, 2)), "b": jnp.ones((4,))}, {}, r"\[3, 4\]: .*\['b'\]: float32\[4\].*\['w'\]: float32\[3, 2\]"),
        ({"w": jnp.ones((3, 2), jnp.int32)}, {}, r"\['w'\] is int32\[3, 2\]"),
        ({"w": jnp.ones((3, 2), jnp.complex64)}, {}, r"\['w'\] is complex64\[3, 2\].*imaginary"),
        ({"w": jnp.ones((3, 2), bool)}, {}, r"\['w'\] is bool\[3, 2\]"),
        ({"w": jnp.ones((3, 2))}, {"sample_mask": jnp.ones(4, bool)}, r"shape \[3\].*got bool\[4\]"),
        ({"w": jnp.ones((3, 2))}, {"sample_mask": jnp.ones(3)}, r"dtype bool, got float32\[3\]"),
        ({"w": jnp.ones((3, 2))}, {"positions": jnp.arange(1, 3)}, r"shape \[3\].*got int32\[2\]"),
        ({"w": jnp.ones((3, 2))}, {"positions": jnp.arange(3)}, "the smallest that came is 0"),
        ({"w": jnp.ones((3, 2))}, {"params": {"w": jnp.ones(5)}}, r"\[2\], but the parameter has shape \[5\]"),
    ],
)  # fmt: skip
def test_bad_gradients_are_refused(grads, kwargs, message):
    threshold = psc.growing_threshold(1.0, 2.0)
    with pytest.raises((TypeError, ValueError), match=message):
        clip(grads, threshold, **kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: psc.per_sample_clip(-1.0), "`value` >= 0, got -1"),
        (lambda: psc.per_sample_clip("big"), r"a number or a callable .*, got 'big'"),
        (lambda: psc.per_sample_clip(1.0, on_nonfinite="zero"), "\"propagate\", got 'zero'"),
        (lambda: psc.per_sample_clip(1.0, sample_axis=jnp.array(0)), "static_args="),
        (lambda: psc.per_sample_clip(1.0, sample_axis=0.5), "sample_axis is a Python int, got 0.5"),
        (lambda: clip(stack(3), lambda k: k[:2] * 1.0), r"one real norm per position, \[3\].*float32\[2\]"),
        (lambda: clip(stack(3), lambda k: 1.0), r"one real norm per position, \[3\].*\[\]"),
        (lambda: clip(stack(3), lambda k: k * 1j), r"one real norm.*complex64\[3\]"),
        (lambda: clip(stack(3), lambda k: 1.5 - k), "not NaN, but .* gave -0.5"),
        (lambda: clip(stack(3), lambda k: k * jnp.nan), "not NaN, but .* gave nan"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
