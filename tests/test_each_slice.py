"""Check clipping by slice: layers that are stacked in one array, each a group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, enable_x64, in_float64

N, L = 6, 3


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "layers": {"w": normal(0, L, 3, 3), "b": normal(1, L, 3)},
    "out": normal(2, 3),
}
THRESHOLDS = [0.3, psc.growing_threshold(0.1, 1.5), 0.2]
PREFIX = {"layers": psc.each_slice(THRESHOLDS), "out": 0.2}
# Each leaf's columns of norms and scales.
COLUMNS = {"layers": {"w": [0, 1, 2], "b": [0, 1, 2]}, "out": 3}
APART = {
    "layers": {"w": psc.each_slice(THRESHOLDS), "b": 0.1},
    "out": 0.2,
}
COLUMNS_APART = {"layers": {"w": [1, 2, 3], "b": 0}, "out": 4}


def layer(h, own):
    return jnp.tanh(h @ own["w"] + own["b"]), None


def scanned(params, x, y):
    hidden, _ = lax.scan(layer, x, params["layers"])
    return jnp.square(jnp.dot(hidden, params["out"]) - y)


def rematerialised(params, x, y):
    hidden, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jnp.square(jnp.dot(hidden, params["out"]) - y)


def backwards(params, x, y):
    hidden, _ = lax.scan(layer, x, params["layers"], reverse=True)
    return jnp.square(jnp.dot(hidden, params["out"]) - y)


def cast(params, x, y):
    """Cast and transpose parameters before the scan, without moving the axis of layers."""
    layers = {
        "w": params["layers"]["w"].swapaxes(1, 2).astype(x.dtype).swapaxes(1, 2),
        "b": params["layers"]["b"],
    }
    return scanned({**params, "layers": layers}, x, y)


def unrolled(params, x, y):
    for i in range(L):
        x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]))
    return jnp.square(jnp.dot(x, params["out"]) - y)


def nested(params, x, y):
    """Apply each layer twice, by a scan within its step."""

    def twice(h, own):
        return lax.scan(lambda h, _: layer(h, own), h, None, length=2)[0], None

    return jnp.square(jnp.dot(lax.scan(twice, x, params["layers"])[0], params["out"]) - y)


def shared(params, x, y):
    """Use one layer outside the scan as well."""
    own = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    return scanned(params, layer(x, own)[0], y)


def flipped(params, x, y):
    """Flip layers before the scan, so that a step has another slice."""
    layers = jax.tree.map(lambda leaf: leaf[::-1], params["layers"])
    return scanned({**params, "layers": layers}, x, y)


# The loss, and whether its layers are fused.
LOSSES = {
    scanned: True,
    rematerialised: True,
    backwards: True,
    cast: True,
    unrolled: True,
    nested: True,
    shared: False,
    flipped: False,
}


def batch_of():
    random = np.random.default_rng(5)
    x, y = random.standard_t(1.5, (N, 3)), random.standard_t(1.5, N)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def stacked_of(loss, params, batch):
    return jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, *batch)


def taus_of(prefix):
    flat = jax.tree.leaves(prefix, is_leaf=callable)
    positions = jnp.arange(1, N + 1)
    taus = [one(positions) if callable(one) else np.full(N, one) for one in flat]
    return np.stack([np.asarray(tau, np.float64) for tau in taus], 1)


def expected_of(stacked, columns, taus):
    """Compute the clipped mean and the norms [n, groups], slice by slice."""
    squares = np.zeros(taus.shape)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    of_leaves = jax.tree.leaves(columns, is_leaf=lambda node: isinstance(node, list))
    for leaf, own in zip(leaves, of_leaves, strict=True):
        for i, column in enumerate(own if isinstance(own, list) else [own]):
            part = leaf[:, i] if isinstance(own, list) else leaf
            squares[:, column] += np.sum(part.reshape(N, -1) ** 2, 1)
    norms = np.sqrt(squares)
    scales = np.minimum(1, taus / norms) / N
    means = [
        np.einsum("nl,nl...->l...", scales[:, own], leaf)
        if isinstance(own, list)
        else np.tensordot(scales[:, own], leaf, 1)
        for leaf, own in zip(leaves, of_leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(stacked), means), norms


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("loss", "mode"), slow.diagonal(LOSSES, ["auto", "one_pass", "two_pass", "vmap"], every=2)
)
def test_slices_equal_the_formula_on_both_faces(loss, mode):
    with enable_x64(True):
        params, batch = in_float64(PARAMS), in_float64(batch_of())
        stacked = stacked_of(loss, params, batch)
        for prefix, columns in ((PREFIX, COLUMNS), (APART, COLUMNS_APART)):
            expected, norms = expected_of(stacked, columns, taus_of(prefix))
            f = psc.clipped_value_and_grad(loss, prefix, mode=mode, return_stats=True)
            _, grads, stats = jax.jit(f)(params, *batch)
            assert_close(grads, expected, 1e-10)
            np.testing.assert_allclose(stats.norms, norms, rtol=1e-9)
            np.testing.assert_array_equal(stats.num_clipped, (norms > taus_of(prefix)).sum(0))
        if mode == "vmap":
            tx = psc.per_sample_clip(prefix)
            updates, state = tx.update(stacked, tx.init(params), params)
            assert_close(updates, expected, 1e-10)
            np.testing.assert_allclose(state.max_norm, norms.max(0), rtol=1e-9)


@pytest.mark.parametrize("loss", slow.but([*LOSSES][1::2], LOSSES), ids=lambda loss: loss.__name__)
def test_layers_are_fused_in_their_step(loss):
    plan = psc.clipped_grad(loss, PREFIX).explain(PARAMS, *batch_of())
    assert plan.mode == "fused"
    assert [row.is_fused for row in plan.rows] == [LOSSES[loss], LOSSES[loss], True]
    assert [row.group for row in plan.rows] == [range(3), range(3), 3]
    assert "0-2" in str(plan)
    assert psc.clipped_grad(loss, PREFIX).verify(PARAMS, *batch_of()).ok


def test_slices_of_a_stack_whose_samples_are_elsewhere():
    stacked = stacked_of(scanned, PARAMS, batch_of())
    expected, _ = expected_of(stacked, COLUMNS, taus_of(PREFIX))
    for axis in (1, -1):
        moved = jax.tree.map(lambda leaf, axis=axis: jnp.moveaxis(leaf, 0, axis), stacked)
        moved["out"] = stacked["out"].T
        tx = psc.per_sample_clip(PREFIX, sample_axis=axis)
        updates, _ = tx.update(moved, tx.init(PARAMS))
        assert_close(updates, expected, 1e-5)


def test_micro_batches_are_clipped_by_slice():
    batch = batch_of()
    options = {"clip_at": "micro-batch", "microbatch_size": 2}
    f = psc.clipped_grad(scanned, {"layers": psc.each_slice([0.3] * L), "out": 0.2}, **options)
    grads = jax.jit(f)(PARAMS, *batch)

    @jax.jit
    @jax.grad
    def gradient(params, x, y):
        return jnp.mean(jax.vmap(scanned, (None, 0, 0))(params, x, y))

    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), PARAMS)
    for i in range(0, N, 2):
        g = jax.tree.map(np.asarray, gradient(PARAMS, *(one[i : i + 2] for one in batch)))
        for j in range(L):
            norm = np.sqrt(sum(np.sum(np.square(leaf[j])) for leaf in g["layers"].values()))
            for name, leaf in g["layers"].items():
                total["layers"][name][j] += min(1, 0.3 / norm) / 3 * leaf[j]
        total["out"] += min(1, 0.2 / np.linalg.norm(g["out"])) / 3 * g["out"]
    assert_close(grads, total, 1e-5)


def test_rules_by_slice_follow_the_norms_of_their_slices():
    batch = batch_of()
    stacked = stacked_of(scanned, PARAMS, batch)
    rules = {"layers": psc.each_slice([psc.quantile_threshold(0.5)] * L), "out": 0.2}
    tx = psc.per_sample_clip(rules)
    _, state = tx.update(stacked, tx.init(PARAMS), PARAMS)
    updates, _ = tx.update(stacked, state, PARAMS)
    _, norms = expected_of(stacked, COLUMNS, np.ones((N, L + 1)))
    rule = psc.quantile_threshold(0.5)
    own = [rule.threshold(rule.update(rule.init(), jnp.float32(norms[:, i]))) for i in range(L)]
    prefix = {"layers": psc.each_slice(own), "out": 0.2}
    expected, _ = expected_of(stacked, COLUMNS, taus_of(prefix))
    assert_close(updates, expected, 1e-5)
    assert state.threshold_state["layers"].thresholds[0] is not None


def test_a_call_replaces_the_thresholds_of_all_slices():
    batch = batch_of()
    f = jax.jit(psc.clipped_grad(scanned, PREFIX))
    for threshold in (0.1, {"layers": psc.each_slice([0.1] * L), "out": 0.1}):
        grads = f(PARAMS, *batch, threshold=threshold)
        taus = np.full((N, L + 1), 0.1)
        expected, _ = expected_of(stacked_of(scanned, PARAMS, batch), COLUMNS, taus)
        assert_close(grads, expected, 1e-5)


def test_all_parameters_may_be_slices():
    params, (x, y) = PARAMS["layers"], batch_of()
    loss = functools.partial(lambda params, x, y: jnp.sum(lax.scan(layer, x, params)[0]) - y)
    f = psc.clipped_value_and_grad(loss, psc.each_slice([0.1] * L), return_stats=True)
    _, grads, stats = jax.jit(f)(params, x, y)
    columns = {"w": [0, 1, 2], "b": [0, 1, 2]}
    expected, norms = expected_of(stacked_of(loss, params, (x, y)), columns, np.full((N, L), 0.1))
    assert_close(grads, expected, 1e-5)
    np.testing.assert_allclose(stats.norms, norms, rtol=1e-5)


@pytest.mark.parametrize("number", [L - 1, L + 1])
def test_as_many_thresholds_as_slices(number):
    prefix = {"layers": psc.each_slice([0.1] * number), "out": 0.2}
    with pytest.raises(ValueError, match=f"has {number} thresholds"):
        psc.clipped_grad(scanned, prefix)(PARAMS, *batch_of())
    with pytest.raises(ValueError, match=f"has {number} thresholds"):
        psc.per_sample_clip(prefix).init(PARAMS)
    with pytest.raises(ValueError, match="leading axis"):
        psc.per_sample_clip(psc.each_slice([0.1])).init({"scalar": jnp.ones(())})


@pytest.mark.parametrize("mode", ["one_pass", "two_pass", "auto"])
@pytest.mark.parametrize(
    "use",
    [
        lambda slices, x: 0.0,
        lambda slices, x: jnp.sum(lax.stop_gradient(slices)),
        lambda slices, x: jnp.sum(slices[:0]),
        lambda slices, x: jnp.sum(x @ slices[:0].sum(0)),
        lambda slices, x: jnp.sum(slices[:0]) + jnp.sum(x * slices[1] ** 2),
    ],
    ids=["unused", "no gradient", "no entries", "no entries of a product", "one slice"],
)
def test_slices_without_a_gradient(use, mode):
    random = np.random.default_rng(0)
    shapes = {"slices": (3, 2), "v": (2,)}
    params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    x = jnp.asarray(random.normal(size=(4, 2)))
    thresholds = {"slices": psc.each_slice([0.1, 0.2, 0.3]), "v": 0.3}

    def loss(params, x):
        return jnp.sum(x * params["v"]) + use(params["slices"], x)

    grads, expected = (
        psc.clipped_grad(loss, thresholds, mode=m)(params, x) for m in (mode, "vmap")
    )
    assert_close(grads, expected, 1e-5)
