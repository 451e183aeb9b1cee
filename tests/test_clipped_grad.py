import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import psclip_optax as psc
from benchmarks.zoo.models import ZOO
from psclip_optax.engine.modes import one_pass, slices, two_pass
from psclip_optax.engine.routes import route
from tests import slow
from tests.numerics import (
    assert_close,
    clipped_mean,
    enable_x64,
    growing,
    heavy_tailed,
    in_all_modes,
    in_float64,
)
from tests.passes import two_passes
from tests.small_zoo import small

MODES = ["one_pass", "two_pass", "vmap"]
PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]]), "b": jnp.array([0.1, -0.2])}


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.square(hidden.sum() - y)


def heavy_batch(n, seed=0):
    x, y = heavy_tailed(seed, (n, 3)), heavy_tailed(seed + 100, (n,))
    return jnp.asarray(x), jnp.asarray(3 * y)


def stacked_gradients(loss, params, batch):
    in_axes = (None, *[0] * len(batch))
    return jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=in_axes))(params, *batch)


def norms_of(stacked):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    return np.sqrt(sum((leaf.reshape(len(leaf), -1) ** 2).sum(1) for leaf in leaves))


def expected_of(params, batch, taus, mask=None):
    losses, stacked = stacked_gradients(loss, params, batch)
    return np.asarray(losses), clipped_mean(stacked, taus, mask)


# The zoo

# One model for each kind of layer; the others take long.
QUICK = [*("alexnet", "gpt_tied", "lora", "lstm", "mixture_of_experts", "recommender", "unet")]


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("name", slow.but(QUICK, ZOO))
def test_zoo_equals_vmap_of_grad_in_float64(name):
    n = 5
    with enable_x64(True):
        model = small(name)
        params, batch = in_float64(model.params), in_float64(model.batch(n))
        losses, stacked = stacked_gradients(model.loss, params, batch)
        norms = norms_of(stacked)
        taus = norms * np.array([1.5, 0.3, 0.7, 1.1, 0.01])
        expected = clipped_mean(stacked, taus)
        threshold = lambda k: jnp.asarray(taus)[k - 1]
        results = in_all_modes(model.loss, threshold, ("one_pass", "two_pass"))(params, *batch)
        for value, grads, stats in results.values():
            assert_close(grads, expected, 1e-10, floor=1e-3)
            np.testing.assert_allclose(stats.norms, norms, rtol=1e-10)
            np.testing.assert_allclose(value, np.mean(losses), rtol=1e-12)
            np.testing.assert_allclose(stats.scales, np.minimum(1, taus / norms), rtol=1e-9)
            assert int(stats.num_clipped) == 3


@pytest.mark.parametrize(
    "name", slow.but(["lstm"], ["alexnet", "gpt_tied", "lstm", "recommender", "unet"])
)
def test_zoo_in_float32(name):
    n = 6
    model = small(name)
    batch = model.batch(n)
    losses, stacked = stacked_gradients(model.loss, model.params, batch)
    alpha = 0.8 * float(np.median(norms_of(stacked)))
    f = psc.clipped_value_and_grad(model.loss, psc.growing_threshold(alpha, 8.0), mode="two_pass")
    value, grads = jax.jit(f)(model.params, *batch)
    assert_close(grads, clipped_mean(stacked, growing(alpha, 8.0, n)), 1e-5, floor=1e-2)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)


# Semantics, in every mode


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("mode", "jit"), slow.diagonal(MODES, [False, True]))
def test_masks_positions_and_the_mean_loss(mode, jit):
    n, batch = 7, heavy_batch(7)
    mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    f = psc.clipped_value_and_grad(loss, psc.growing_threshold(0.5, 1.5), mode=mode)
    f = jax.jit(f) if jit else f
    taus = 0.5 * np.maximum(np.cumsum(mask), 1) ** (1 / 1.5)
    losses, expected = expected_of(PARAMS, batch, taus, mask)
    value, grads = f(PARAMS, *batch, sample_mask=mask)
    assert_close(grads, expected, 1e-5)
    np.testing.assert_allclose(value, losses[mask].mean(), rtol=1e-5)

    positions = np.arange(n, 0, -1)
    _, grads = f(PARAMS, *batch, positions=positions)
    assert_close(grads, expected_of(PARAMS, batch, 0.5 * positions ** (1 / 1.5))[1], 1e-5)


def hinge(params, x, y):
    return jax.nn.relu(1 - y * jnp.tanh(x @ params["w"] + params["b"]).sum())


def clipped_by_stacking(params, batch, alpha):
    tx = psc.per_sample_clip(psc.growing_threshold(alpha, 1.5))
    stacked = jax.vmap(jax.grad(hinge), in_axes=(None, 0, 0))(params, *batch)
    return tx.update(stacked, tx.init(params), params)[0]


def clipped_by_formula(params, batch, alpha):
    stacked = jax.vmap(jax.grad(hinge), in_axes=(None, 0, 0))(params, *batch)
    squares = sum(jnp.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in stacked.values())
    taus = alpha * jnp.arange(1.0, len(squares) + 1) ** (1 / 1.5)
    scales = jnp.minimum(1, taus / jnp.sqrt(jnp.maximum(squares, 1e-100)))
    return {name: jnp.tensordot(scales, leaf, 1) / len(leaf) for name, leaf in stacked.items()}


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("face", [*MODES, "stack"])
def test_clipped_gradients_have_derivatives(face):
    """Differentiate by the parameters and α, as in meta-learning; also where a gradient is 0."""

    def clipped(params, batch, alpha):
        f = psc.clipped_grad(hinge, psc.growing_threshold(alpha, 1.5), mode=face)
        return f(params, *batch)

    def after_a_step(params, alpha, clip):
        grads = clip(params, batch, alpha)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        return jnp.mean(jax.vmap(hinge, in_axes=(None, 0, 0))(params, *batch))

    with enable_x64(True):
        params, (x, y) = in_float64(PARAMS), in_float64(heavy_batch(7))
        batch = x, y.at[2].set(0)  # its gradient is 0
        derivatives = jax.jit(jax.grad(after_a_step, argnums=(0, 1)), static_argnums=2)
        alpha = jnp.asarray(0.7)
        expected = derivatives(params, alpha, clipped_by_formula)
        assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(expected))
        clip = clipped_by_stacking if face == "stack" else clipped
        assert_close(derivatives(params, alpha, clip), expected, 1e-10)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_samples_that_are_not_finite_are_dropped(mode, masked):
    n = 6
    x, y = heavy_batch(n)
    x = x.at[1].set(jnp.nan).at[4, 0].set(jnp.inf)
    y = y.at[3].set(jnp.nan)  # a loss that is not finite
    mask = np.arange(n) != 4 if masked else np.ones(n, bool)
    f = psc.clipped_value_and_grad(
        loss, psc.growing_threshold(0.5, 1.5), mode=mode, return_stats=True
    )
    value, grads, stats = jax.jit(f)(PARAMS, x, y, sample_mask=mask)
    losses, stacked = stacked_gradients(loss, PARAMS, (x, y))
    finite = np.isfinite(losses) & np.isfinite(norms_of(stacked))
    taus = 0.5 * np.maximum(np.cumsum(mask), 1) ** (1 / 1.5)
    assert_close(grads, clipped_mean(stacked, taus, mask), 1e-5)
    np.testing.assert_allclose(value, np.asarray(losses)[mask & finite].mean(), rtol=1e-5)
    assert int(stats.num_nonfinite) == (mask & ~finite).sum()
    assert not np.asarray(stats.scales)[~(mask & finite)].any()


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", slow.but(["one_pass"], ["one_pass", "two_pass"]))
def test_a_dropped_image_leaves_the_others_alone(mode):
    # Not compared with vmap(grad): in float64 XLA's CPU backend computes the convolutions'
    # gradients of all samples in one, so that a NaN in one image spreads to the others.
    model = small("unet")
    with enable_x64(True):
        params, (images,) = in_float64(model.params), in_float64(model.batch(4))
        f = jax.jit(psc.clipped_grad(model.loss, 0.05, mode=mode))
        expected = f(params, images, sample_mask=jnp.arange(4) != 2)
        grads = f(params, images.at[2].set(jnp.nan))
        assert_close(jax.tree.map(lambda g: g * 4 / 3, grads), expected, 1e-10, floor=1e-3)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_all_samples_dropped_or_masked_give_zeros(mode):
    x, y = heavy_batch(3)
    f = jax.jit(psc.clipped_value_and_grad(loss, 1.0, mode=mode))
    for arguments in ({}, {"sample_mask": jnp.zeros(3, bool)}):
        value, grads = f(PARAMS, x * jnp.nan, y, **arguments)
        assert_close(grads, jax.tree.map(jnp.zeros_like, PARAMS), 0)
        assert value == 0


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_propagate_lets_it_through(mode):
    x, y = heavy_batch(4)
    f = jax.jit(psc.clipped_value_and_grad(loss, 1.0, mode=mode, on_nonfinite="propagate"))
    assert_close(f(PARAMS, x, y)[1], expected_of(PARAMS, (x, y), np.ones(4))[1], 1e-5)
    value, grads = f(PARAMS, x.at[1].set(jnp.nan), y)
    assert jnp.isnan(value)
    assert jnp.isnan(grads["b"]).all()


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("mode", "size", "bad"), slow.diagonal(MODES, [1, 3, 4, 10, 99], [False, True])
)
def test_micro_batches_do_not_change_the_result(mode, size, bad):
    x, y = heavy_batch(10)
    x = x.at[6].set(jnp.nan) if bad else x
    mask = jnp.arange(10) != 2
    options = {"mode": mode, "return_stats": True, "has_aux": True}
    with_aux = lambda params, x, y: (loss(params, x, y), {"y": y})
    whole = psc.clipped_value_and_grad(with_aux, psc.growing_threshold(0.5, 2.0), **options)
    sliced = psc.clipped_value_and_grad(
        with_aux, psc.growing_threshold(0.5, 2.0), microbatch_size=size, **options
    )
    (value, aux), grads, stats = jax.jit(whole)(PARAMS, x, y, sample_mask=mask)
    (value_, aux_), grads_, stats_ = jax.jit(sliced)(PARAMS, x, y, sample_mask=mask)
    assert_close(grads_, grads, 1e-5)
    np.testing.assert_allclose(value_, value, rtol=1e-5)
    np.testing.assert_array_equal(aux_["y"], aux["y"])
    # The losses of some samples cancel, and so do their norms.
    np.testing.assert_allclose(stats_.norms, stats.norms, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert int(stats_.num_nonfinite) == int(stats.num_nonfinite) == bad


def test_threshold_of_the_call_replaces_the_constructors_without_a_recompile():
    batch, traces = heavy_batch(5), []

    def counted(params, x, y):
        traces.append(1)
        return loss(params, x, y)

    f = jax.jit(psc.clipped_value_and_grad(counted, 1.0))
    for alpha in (0.3, 2.0):
        _, grads = f(PARAMS, *batch, threshold=psc.growing_threshold(jnp.float32(alpha), 2.0))
        assert_close(grads, expected_of(PARAMS, batch, growing(alpha, 2.0, 5))[1], 1e-5)
    assert len(traces) == 1


def test_both_faces_agree_in_a_chain():
    threshold = psc.growing_threshold(0.5, 1.5)
    tx = optax.chain(psc.per_sample_clip(threshold), optax.sgd(0.1))
    with enable_x64(True):
        params, batch = in_float64(PARAMS), in_float64(heavy_batch(6))
        updates, _ = jax.jit(tx.update)(stacked_gradients(loss, params, batch)[1], tx.init(params))
        grads = jax.jit(psc.clipped_grad(loss, threshold))(params, *batch)
        assert_close(jax.tree.map(lambda g: -0.1 * g, grads), updates, 1e-12)


def test_infinite_threshold_is_the_plain_gradient_and_twice_a_sample_is_no_change():
    x, y = heavy_batch(4)
    mean_loss = lambda p: jax.vmap(loss, in_axes=(None, 0, 0))(p, x, y).mean()
    f = jax.jit(psc.clipped_grad(loss, jnp.inf))
    assert_close(f(PARAMS, x, y), jax.jit(jax.grad(mean_loss))(PARAMS), 1e-6)
    f = jax.jit(psc.clipped_grad(loss, 0.7))
    once = f(PARAMS, x, y)
    twice = f(PARAMS, np.repeat(x, 2, 0), np.repeat(y, 2))
    assert_close(twice, once, 1e-6)
    reverse = f(PARAMS, x[::-1], y[::-1])
    assert_close(reverse, once, 1e-6)


# How a loss may be called


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_in_axes_shared_arguments_and_trees(mode):
    x, y = heavy_batch(5)

    def nested(params, data, shift):
        return loss(params, data["x"], data["y"] + shift)

    f = psc.clipped_value_and_grad(nested, 0.7, in_axes=({"x": -1, "y": 0}, None), mode=mode)
    value, grads = jax.jit(f)(PARAMS, {"x": x.T, "y": y}, 2.0)
    losses, expected = expected_of(PARAMS, (x, y + 2.0), np.full(5, 0.7))
    assert_close(grads, expected, 1e-5)
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-6)


def test_keep_batch_dim_takes_a_loss_of_batches():
    x, y = heavy_batch(5)

    def batched(params, x, y):
        assert x.shape == (1, 3)
        return jnp.square(jnp.tanh(x @ params["w"] + params["b"]).sum(axis=1) - y).mean()

    f = jax.jit(psc.clipped_value_and_grad(batched, 0.7, keep_batch_dim=True))
    assert_close(f(PARAMS, x, y)[1], expected_of(PARAMS, (x, y), np.full(5, 0.7))[1], 1e-5)


def test_aux_and_statistics_of_clipped_grad():
    x, y = heavy_batch(5)
    with_aux = lambda params, x, y: (loss(params, x, y), (x.sum(), {"y": y}))
    grads, (sums, rest), stats = psc.clipped_grad(with_aux, 0.7, has_aux=True, return_stats=True)(
        PARAMS, x, y
    )
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(rest["y"], y)
    assert isinstance(stats, psc.ClipStats)
    assert_close(grads, expected_of(PARAMS, (x, y), np.full(5, 0.7))[1], 1e-5)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_seeds(mode):
    batches = [heavy_batch(4, seed) for seed in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    shifted = jax.tree.map(lambda p: jnp.stack([p, p + 0.1, p - 0.1]), PARAMS)
    f = psc.clipped_grad(loss, 0.7, mode=mode)
    grads = jax.jit(jax.vmap(f))(shifted, *many)
    for i, batch in enumerate(batches):
        params = jax.tree.map(lambda p, i=i: p[i], shifted)
        expected = expected_of(params, batch, np.full(4, 0.7))[1]
        assert_close(jax.tree.map(lambda g, i=i: g[i], grads), expected, 1e-5)


def test_dropout_keys_are_a_batch_argument():
    x, _ = heavy_batch(4)
    keys = jax.random.split(jax.random.key(3), 4)

    def noisy(params, x, key):
        kept = jax.random.bernoulli(key, 0.5, (2,))
        return jnp.square((x @ params["w"] * kept).sum() - 1)

    losses, stacked = stacked_gradients(noisy, PARAMS, (x, keys))
    value, grads = jax.jit(psc.clipped_value_and_grad(noisy, 0.7))(PARAMS, x, keys)
    assert_close(grads, clipped_mean(stacked, np.full(4, 0.7)), 1e-5)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)


def test_mixed_precision_gives_gradients_in_the_parameters_dtypes():
    x, y = heavy_batch(5)
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}

    def half(params, x, y):
        hidden = jnp.tanh(x.astype(jnp.bfloat16) @ params["w"]) + params["b"]
        return jnp.square(hidden.sum() - y)

    grads = jax.jit(psc.clipped_grad(half, 0.7))(params, x, y)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)
    _, stacked = stacked_gradients(half, params, (x, y))
    assert_close(grads, clipped_mean(stacked, np.full(5, 0.7)), 2e-2)


# Uses of parameters that need care


def with_custom_jvp(params, x):
    @jax.custom_jvp
    def doubled(w):
        return w

    doubled.defjvps(lambda tangent, out, w: 2 * tangent)  # a rule that is not the derivative
    return jnp.sin(x @ doubled(params["w"])).sum()


def gradient_through_a_rematerialised_scan(params, x):
    @jax.checkpoint
    def recurrent(h):
        w = jnp.sin(params["w"])
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w @ w.T), None), h, None, length=3)[0]

    return jnp.square(jax.grad(lambda h: recurrent(h).sum())(x)).sum()  # traced as a closed_call


USES = {
    "custom_jvp": with_custom_jvp,
    "gradient through a rematerialised scan": gradient_through_a_rematerialised_scan,
    "relu of the parameter": lambda p, x: (x @ jax.nn.relu(p["w"])).sum() ** 2,
    "stop_gradient": lambda p, x: ((x @ jax.lax.stop_gradient(p["w"])) * p["b"]).sum(),
    "regulariser": lambda p, x: jnp.sin(x @ p["w"]).sum() + (p["w"] ** 2).sum(),
    "both operands": lambda p, x: (x @ (p["w"] @ p["w"].T) @ x),
    "scaled": lambda p, x: jnp.sin(x @ (0.5 * p["w"])).sum(),
    "twice": lambda p, x: jnp.sin(jnp.sin(x @ p["w"]) @ p["w"].T).sum(),
    "twice, overlapping slices": lambda p, x: (x[:2] @ p["w"][:2] * (x[1:] @ p["w"][1:])).sum(),
    "disjoint slices": lambda p, x: (x @ p["w"][:, :1] * (x @ p["w"][:, 1:])).sum() ** 2,
    "reshaped": lambda p, x: jnp.sin(jnp.outer(x, x)[:2] @ p["w"].reshape(3, 2)).sum(),
    "gathered and multiplied": lambda p, x: jnp.sin(p["w"][(x > 0).astype(int)]).sum() * x.sum(),
    "in a branch": lambda p, x: jax.lax.cond(
        x[0] > 0, lambda: (x @ p["w"]).sum(), lambda: jnp.sin(x @ p["w"]).sum()
    ),
    "in a loop": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda _, y: jnp.tanh(y @ p["w"] @ p["w"].T), x
    ).sum(),
    "initial state": lambda p, x: jax.lax.scan(
        lambda c, xi: (jnp.sin(c * xi), None), p["b"], x
    )[0].sum(),
    "layers": lambda p, x: jax.lax.scan(lambda c, w: (jnp.sin(c * w.sum()), None), x, p["w"])[0].sum(),
    "layers backwards": lambda p, x: jax.lax.scan(
        lambda c, w: (jnp.sin(jnp.outer(c, x) @ w[:, None])[:, 0], None),
        x,
        jnp.concatenate([p["w"].T, p["w"].T[:1]]),
        reverse=True,
    )[0].sum(),
    "unused": lambda p, x: jnp.sin(x @ p["w"]).sum(),
    "one-hot": lambda p, x: jnp.sin(jax.nn.one_hot(jnp.argmax(x), 3) @ p["w"]).sum() * x.sum(),
    "vmap inside": lambda p, x: jax.vmap(lambda xi: jnp.sin(xi * (x @ p["w"])))(x).sum(),
    "checkpoint": lambda p, x: jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w) @ w.T).sum())(p["w"]),
    "nested jit": lambda p, x: jax.jit(lambda w: jax.jit(jnp.dot)(x, jax.jit(jnp.negative)(w)).sum())(p["w"]) ** 2,
}  # fmt: skip


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("use", slow.but([*USES][::3], USES))
def test_any_use_of_a_parameter_is_exact(use):
    with enable_x64(True):
        params = in_float64(PARAMS)
        x = in_float64(heavy_batch(5))[0]
        _, stacked = stacked_gradients(USES[use], params, (x,))
        tau = float(np.median(norms_of(stacked)))
        expected = clipped_mean(stacked, np.full(5, tau))
        for _, grads, _ in in_all_modes(USES[use], tau)(params, x).values():
            assert_close(grads, expected, 1e-10)


@given(
    spatial=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    data=st.data(),
)
@settings(max_examples=15)
def test_convolutions_of_any_kind(spatial, groups, channels, data):
    draw = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(spatial))
    size, stride, dilation, lhs_dilation = draw(1, 3), draw(1, 2), draw(1, 2), draw(1, 2)
    padding = [(data.draw(st.integers(-1, 2)), data.draw(st.integers(2, 3))) for _ in size]
    num_in, num_out = channels[0] * groups, channels[1] * groups

    def conv_loss(w, x):
        y = jax.lax.conv_general_dilated(
            x[None], w, stride, padding, lhs_dilation, dilation, feature_group_count=groups
        )
        return jnp.sin(y).sum()

    with enable_x64(True):
        random = np.random.default_rng(0)
        w = random.normal(size=(num_out, channels[0], *size))
        x = random.normal(size=(3, num_in, *[5] * spatial))
        _, stacked = stacked_gradients(conv_loss, w, (x,))
        tau = float(np.median(norms_of(stacked)))
        with two_passes():
            results = in_all_modes(conv_loss, tau)(w, x)
        for _, grads, _ in results.values():
            assert_close(grads, clipped_mean(stacked, np.full(3, tau)), 1e-10)


@given(
    indices=hnp.arrays(int, (3, 5), elements=st.integers(-8, 8)), length=st.sampled_from([5, 300])
)
@settings(max_examples=15)
def test_embeddings_with_repeated_and_outside_indices(indices, length):
    # A longer sequence takes the route that sorts.
    indices = np.tile(indices, (1, length // 5))

    def look_up(table, i):
        rows = jnp.take(table, i, axis=0, mode="clip") + jnp.take(table, i, axis=0, fill_value=0)
        return (jnp.sin(rows) * jnp.arange(1.0, 3.0)).sum()

    with enable_x64(True):
        table = np.random.default_rng(0).normal(size=(6, 2))
        _, stacked = stacked_gradients(look_up, table, (indices,))
        tau = float(np.median(norms_of(stacked)))
        grads = jax.jit(psc.clipped_grad(look_up, tau))(table, indices)
        assert_close(grads, clipped_mean(stacked, np.full(3, tau)), 1e-10)


# Plans


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_do_not_reach_the_loss_have_zero_gradients(mode):
    f = psc.clipped_value_and_grad(
        lambda p, x: (0 * x).sum() + 1, 0.5, mode=mode, return_stats=True
    )
    value, grads, stats = f(PARAMS, jnp.ones((5, 3)))
    assert value == 1
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(grads))
    assert stats.norms.shape == stats.scales.shape == (5,)


def scan_of(step, state, *xs):
    return jnp.square(jax.lax.scan(lambda h, x: (step(h, *x), None), state, xs)[0]).sum()


def conv_same(image, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    window = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": dims}
    return jnp.tanh(0.3 * jax.lax.conv_general_dilated(image[None], kernel, **window)[0])


IN_SCANS = {
    "one kernel for all steps": lambda p, x, i: scan_of(
        lambda h, j: conv_same(h, p["kernel"]) + j[0], x, i),
    "a kernel a step": lambda p, x, i: scan_of(conv_same, x, p["kernels"]),
    "look-ups in one table": lambda p, x, i: scan_of(
        lambda h, j: jnp.tanh(h + p["table"][j].sum(0)), x[0, 0], i),
    "look-ups in a table a step": lambda p, x, i: scan_of(
        lambda h, t, j: jnp.tanh(h + t[j].sum(0)), x[0, 0], p["tables"], i),
    "one row": lambda p, x, i: scan_of(lambda h, j: jnp.tanh(h + p["table"][j[0]]), x[0, 0], i),
    "rows by vmap": lambda p, x, i: jnp.square(jax.vmap(lambda j: p["table"][j])(i[0]) * x[0, 0]).sum(),
}  # fmt: skip


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    "use", slow.but([use for use in IN_SCANS if "one" not in use or "kernel" in use], IN_SCANS)
)
def test_convolutions_and_look_ups_in_scans(use):
    with enable_x64(True):
        shapes = {
            "kernel": (3, 3, 4, 4),
            "kernels": (3, 3, 3, 4, 4),
            "table": (9, 4),
            "tables": (3, 9, 4),
        }
        random = np.random.default_rng(0)
        params = {name: random.normal(size=shape) for name, shape in shapes.items()}
        x = random.normal(size=(5, 4, 3, 4)) * np.arange(1.0, 6)[:, None, None, None]
        indices = random.integers(-2, 11, (5, 3, 6))
        loss = IN_SCANS[use]
        _, stacked = stacked_gradients(loss, params, (x, indices))
        tau = float(np.median(norms_of(stacked)))
        for mode, (_, grads, _) in in_all_modes(loss, tau)(params, x, indices).items():
            assert_close(grads, clipped_mean(stacked, np.full(5, tau)), 1e-10)
            plan = psc.clipped_grad(loss, tau, mode=mode).explain(params, x, indices)
            routes = [row.route for row in plan.rows if row.num_sites]
            assert mode == "vmap" or routes in (["conv"], ["embedding"])


def layers(params, x):
    return functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x)


def narrow_layer(params, x):
    return functools.reduce(lambda y, _: jnp.sin(jnp.cos(y)), range(9), x @ params[0])


def rule_within_a_rule(params, x):
    """Return a loss that JAX can differentiate, but not under vmap."""
    inner = jax.custom_vjp(jnp.sin)
    inner.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.cos(x),))
    outer = jax.custom_jvp(lambda x: inner(x))
    outer.defjvp(lambda x, dx: (outer(*x), jax.jvp(inner, x, dx)[1]))
    return outer(layers(params, x))


MEMORY = {  # the numbers of slices and of second passes
    "keeps about as much as is saved": (layers, 2, 0, "(one pass in 2 slices)"),
    "keeps little of what is saved": (narrow_layer, 1, 0, "(one pass)"),
    "keeps much of what is computed again": (jax.checkpoint(layers), 1, 1, "two passes"),
    "has no second pass": (jax.checkpoint(rule_within_a_rule), 1, 0, "(one pass)"),
}


@pytest.mark.parametrize("what", MEMORY)
def test_two_pass_takes_slices_or_a_second_pass_by_what_is_saved(what, monkeypatch):
    outputs, num_slices, num_passes, words = MEMORY[what]
    loss = lambda params, x: outputs(params, x).sum()
    sizes, ran = [], []
    run, backward = one_pass._of_slice, two_pass._backward
    monkeypatch.setattr(two_pass, "_backward", lambda *args: [*backward(*args), ran.append(1)][:-1])
    monkeypatch.setattr(
        one_pass, "_of_slice", lambda *args: sizes.append(args[-1].taus.size) or run(*args)
    )
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(9, 30, 30)) / 30**0.5, jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 20, 30)), jnp.float32)
    function = psc.clipped_grad(loss, 1.0, mode="two_pass")
    assert words in str(function.explain(params, x))
    grads = jax.jit(function)(params, x)
    assert len(ran) == num_passes
    assert set(sizes) == (set() if num_passes else {4 // num_slices})
    stacked = jax.jit(psc.clipped_grad(loss, 1.0, mode="vmap"))
    assert_close(grads, stacked(params, x), 1e-5)


@pytest.mark.parametrize(
    ("num_devices", "num_samples", "numbers"),
    [(1, 6, [1, 2, 3, 4, 5, 6]), (4, 24, [1, 2, 3, 6]), (4, 4, [1]), (4, 6, [1, 2, 3, 4, 5, 6])],
)
def test_slices_leave_each_device_as_many_samples(num_devices, num_samples, numbers):
    assert slices.even_slices(range(1, 9), num_samples, num_devices) == numbers


def test_explain_counts_every_layer_of_a_scan_and_every_part_of_a_batch(monkeypatch):
    def flops(name):
        model = small(name)
        plan = psc.clipped_value_and_grad(model.loss, 1.0).explain(model.params, *model.batch(4))
        return sum(row.extra_flops for row in plan.rows if "kernel" in row.parameter)

    once = flops("gpt_tied")
    assert flops("gpt_scanned") == pytest.approx(once, rel=0.01)
    monkeypatch.setattr(route, "_MOST_READ_ON_CPU", 1)
    assert flops("gpt_tied") == pytest.approx(once, rel=0.05)


def test_explain_names_routes_and_the_line_that_made_a_fallback():
    model = small("gpt_scanned")
    plan = psc.clipped_value_and_grad(model.loss, 1.0).explain(model.params, *model.batch(2))
    routes = {row.parameter: row.route for row in plan.rows}
    assert routes["['Embed_0']['embedding']"] == "tied"
    assert routes["['CheckpointBlock_0']['Dense_0']['kernel']"] == "dense"
    position = next(row for row in plan.rows if row.parameter == "['position']")
    assert position.route == "direct"
    assert "enters add" in position.reason
    assert "models.py" in position.reason
    assert "tied" in str(plan)
    assert "total" in str(plan)


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_norms_alone_have_the_precision_that_is_asked_for(mode):
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    w, x = jnp.ones((40, 30)), jnp.ones((4, 5, 40))

    def count(precision):
        f = psc.clipped_grad(loss, 1.0, mode=mode, norm_precision=precision)
        return str(jax.make_jaxpr(f)(w, x)).count("HIGHEST")

    assert count(None) == 0
    assert count(jax.lax.Precision.HIGHEST) > 0


def test_auto_takes_two_passes_when_memory_is_short():
    x, y = heavy_batch(5)
    for limit, mode in ((1, "two_pass"), (10**9, "one_pass")):
        f = psc.clipped_value_and_grad(loss, 0.7, memory_limit_bytes=limit)
        assert f.explain(PARAMS, x, y).mode == mode
        assert_close(
            jax.jit(f)(PARAMS, x, y)[1], expected_of(PARAMS, (x, y), np.full(5, 0.7))[1], 1e-5
        )


def test_one_pass_never_makes_an_array_of_all_samples_gradients():
    w = jnp.ones((300, 200))
    n, x = 16, jnp.ones((16, 300))
    f = psc.clipped_grad(lambda w, x: jnp.sin(x @ w).sum(), 1.0, mode="one_pass")
    sizes = [
        variable.aval.size for eqn in jax.make_jaxpr(f)(w, x).jaxpr.eqns for variable in eqn.outvars
    ]
    assert max(sizes) < n * w.size


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psc.clipped_grad(loss, 1.0, mode="fast"), "mode is one of 'auto', 'one_pass'.*'fast'"),
        (lambda: psc.clipped_grad(loss, 1.0, microbatch_size=0), "microbatch_size is a positive int.*0"),
        (lambda: psc.clipped_grad(loss, 1.0, on_nonfinite="zero"), "got 'zero'"),
        (lambda: psc.clipped_grad(loss, -1.0), "`value` >= 0, got -1"),
        (lambda: psc.clipped_grad(loss, 1.0)(PARAMS, jnp.ones((3, 3)), jnp.ones(4)), r"batch\[0\]: float32\[3, 3\] \(axis 0\), batch\[1\]: float32\[4\]"),
        (lambda: psc.clipped_grad(loss, 1.0)(PARAMS, jnp.ones((3, 3)), 1.0), r"batch\[1\]: float32\[\]"),
        (lambda: psc.clipped_grad(loss, 1.0, in_axes=(0, 0, 0))(PARAMS, jnp.ones((3, 3)), jnp.ones(3)), r"each of the 2 arguments.*\(0, 0, 0\)"),
        (lambda: psc.clipped_grad(loss, 1.0, in_axes=None)(PARAMS, jnp.ones(3), 1.0), "in_axes names"),
        (lambda: psc.clipped_grad(lambda p, x: x @ p["w"], 1.0)(PARAMS, jnp.ones((4, 3))), r"returns a scalar, got float32\[2\]"),
        (lambda: psc.clipped_grad(lambda p, x: (p["b"].sum(), x), 1.0)(PARAMS, jnp.ones((4, 3))), "has_aux=True if it returns"),
        (lambda: psc.clipped_grad(lambda p, x: p["b"].sum(), 1.0, has_aux=True)(PARAMS, jnp.ones((4, 3))), "has_aux=True the loss returns"),
        (lambda: psc.clipped_grad(lambda p, x: jnp.sum(x > 0), 1.0)(PARAMS, jnp.ones((4, 3))), "real floating-point scalar, got int32"),
        (lambda: psc.clipped_grad(loss, 1.0)({"w": jnp.ones(3, int)}, jnp.ones((4, 3)), jnp.ones(4)), r"params\['w'\] is int32\[3\]"),
        (lambda: psc.clipped_grad(loss, 1.0)({"w": jnp.ones(3) * 1j}, jnp.ones((4, 3)), jnp.ones(4)), r"params\['w'\] is complex64\[3\]"),
        (lambda: psc.clipped_grad(loss, 1.0)({}, jnp.ones((4, 3)), jnp.ones(4)), "params has no arrays to take gradients of, got {}"),
        (lambda: psc.clipped_grad(loss, 1.0)(PARAMS, jnp.ones((4, 3)), jnp.ones(4), sample_mask=jnp.ones(3, bool)), r"shape \[4\].*got bool\[3\]"),
        (lambda: psc.clipped_grad(loss, 1.0)(PARAMS, jnp.ones((4, 3)), jnp.ones(4), positions=jnp.ones(3, int)), r"shape \[4\].*got int32\[3\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_loss_with_effects_is_refused():
    def printing(params, x):
        jax.debug.print("{}", x, ordered=True)
        return (x @ params["w"]).sum()

    with pytest.raises(ValueError, match=r"the loss has effects .*an ordered jax\.debug\.print"):
        psc.clipped_grad(printing, 1.0)(PARAMS, jnp.ones((2, 3)))


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_debug_effects_run_as_under_vmap_of_grad(mode):
    seen = []

    def checked(params, x):
        jax.debug.callback(seen.append, jnp.sum(params["w"]))
        jax.debug.callback(lambda x: seen.append(x), x)
        return jnp.sum(jnp.tanh(x @ params["w"]))

    p, x = {"w": jnp.ones((3, 2))}, jnp.arange(6.0).reshape(2, 3)
    f = psc.clipped_value_and_grad(checked, 1e9, mode=mode)
    grads = jax.jit(f)(p, x)[1]
    jax.effects_barrier()
    assert any(np.array_equal(one, x[1]) for one in seen)
    expected = jax.tree.map(lambda g: g.mean(0), stacked_gradients(checked, p, (x,))[1])
    assert_close(grads, expected, 1e-6)
    (row,) = f.explain(p, x).rows
    assert row.route == "dense"


def test_explain_takes_shapes():
    f = psc.clipped_value_and_grad(lambda w, x: jnp.dot(w, x), 1.0)
    w, x = jnp.ones(3), jnp.ones((5, 3))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (w, x))
    assert f.explain(*shapes) == f.explain(w, x) == f.explain(w, shapes[1])


def test_a_symbolic_number_of_samples_is_refused():
    (n,) = jax.export.symbolic_shape("n")
    run = jax.jit(lambda x: psc.clipped_grad(lambda w, x: jnp.dot(w, x), 1.0)(jnp.zeros(3), x))
    with pytest.raises(
        ValueError, match=r"lays out its work by the number of samples, got float32\[n, 3\]"
    ):
        jax.export.export(run)(jax.ShapeDtypeStruct((n, 3), jnp.float32))


@pytest.mark.usefixtures("two_passes")
def test_a_float8_product_has_the_gradients_of_vmap_of_grad():
    def loss(w, x):
        narrow = [a.astype(jnp.float8_e4m3fn) for a in (x, w)]
        y = jax.lax.dot_general(
            *narrow, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jnp.sum(jnp.square(y)) + jnp.sum(jnp.tanh(x @ w) ** 2)

    def of_data(w, x):
        y = jax.lax.dot_general(
            x.astype(jnp.float8_e4m3fn),
            w,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return jnp.sum(jnp.sin(y))

    w, x = (
        jax.random.normal(jax.random.key(1), (4, 3)),
        jax.random.normal(jax.random.key(3), (5, 4)),
    )
    for one in (loss, of_data):
        expected = jax.jit(psc.clipped_grad(one, 1.0, mode="vmap"))(w, x)
        for mode in ("one_pass", "two_pass"):
            assert_close(jax.jit(psc.clipped_grad(one, 1.0, mode=mode))(w, x), expected, 1e-5)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="JAX before 0.8 has no mutable references")
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_may_keep_a_mutable_reference_to_itself(mode):
    def loss(w, x):
        ref = jax.new_ref(w)
        ref[...] = ref[...] * 0.5
        return jnp.sum(jnp.sin(x @ ref[...])) + jnp.sum(x @ w)

    w, x = jnp.arange(6.0).reshape(2, 3) / 5, jnp.arange(8.0).reshape(4, 2) / 7
    _, stack = stacked_gradients(loss, w, (x,))
    f = psc.clipped_grad(loss, 1.0, mode=mode)
    assert_close(jax.jit(f)(w, x), clipped_mean(stack, [1.0] * 4), 1e-5)
    (row,) = f.explain(w, x).rows
    assert row.reason == "is in a loss with mutable references"

    def stopped(w, x):
        ref = jax.new_ref(jnp.sin(w))
        ref[...] = jax.nn.relu(ref[...])
        return jnp.sum(jnp.sin(x @ w)) * jax.lax.stop_gradient(jnp.sum(ref[...]))

    _, stack = stacked_gradients(stopped, w, (x,))
    f = jax.jit(psc.clipped_grad(stopped, 1.0, mode=mode))
    assert_close(f(w, x), clipped_mean(stack, [1.0] * 4), 1e-5)


def test_the_plan_says_why_a_tiny_threshold_stacks_gradients():
    plan = psc.clipped_value_and_grad(lambda w, x: jnp.dot(w, x), 1e-20).explain(
        jnp.ones(3), jnp.ones((5, 3))
    )
    assert plan.mode == "vmap"
    assert "the threshold is too small" in str(plan)
