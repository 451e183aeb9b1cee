"""Check clipping by group: a threshold and a norm for each subtree of the parameters."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, growing, in_all_modes, in_float64

MODES = ["auto", "one_pass", "two_pass", "vmap"]
N = 7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Losses for one example, with parameters that prefixes group in different ways


def dense(params, x, y):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return jnp.square(jnp.dot(hidden, params["out"]) - y)


def scanned(params, x, y):
    """Scan over layers in one array, and biases in another."""

    def layer(h, own):
        return jnp.tanh(h @ own["w"] + own["b"]), None

    hidden, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.square(jnp.dot(hidden, params["out"]) - y)


def tied(params, x, y):
    """Use a table for look-ups and in a product, around layers of another group."""
    tokens = jnp.abs(x * 3).astype(int) % 5
    hidden = jnp.tanh(params["table"][tokens] @ params["w"])
    return jax.nn.logsumexp(hidden @ params["table"].T) - y * hidden.sum()


def shared(params, x, y):
    """Use the same weight in three places, and in slices: pieces of one parameter."""
    hidden = jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"])
    for layer in range(2):
        hidden = jnp.tanh(hidden @ params["stack"][layer])
    return jnp.square(hidden.sum() - y)


def normalised(params, x, y):
    """Use weight normalisation and a penalty: computed weights, each within a group."""
    v = params["a"]["v"]
    hidden = jnp.tanh(x @ (params["a"]["g"] * v / jnp.sqrt(jnp.sum(v**2, 0))))
    return jnp.square(jnp.dot(hidden, jnp.exp(params["b"])) - y)


def joined(params, x, y):
    """Use concatenated kernels, and a product of two: weights computed from several groups."""
    q, k = jnp.split(x @ jnp.concatenate([params["q"], params["k"]], 1), 2)
    low = jnp.tanh(params["u"] @ params["v"]) @ x
    return jnp.sum(q * k) + jnp.square(low.sum() - y)


LOSSES = {
    "dense": (
        dense,
        {"in": {"w": normal(0, 3, 4), "b": normal(1, 4)}, "out": normal(2, 4)},
        {"in": 0.3, "out": 0.2},
    ),
    "dense, each": (
        dense,
        {"in": {"w": normal(0, 3, 4), "b": normal(1, 4)}, "out": normal(2, 4)},
        {"in": {"w": 0.3, "b": psc.growing_threshold(0.1, 2.0)}, "out": 0.2},
    ),
    "scan": (
        scanned,
        {"layers": {"w": normal(0, 2, 3, 3), "b": normal(1, 2, 3)}, "out": normal(2, 3)},
        {"layers": {"w": 0.3, "b": 0.1}, "out": psc.growing_threshold(0.1, 1.5)},
    ),
    "tied": (tied, {"table": normal(0, 5, 4), "w": normal(1, 4, 4)}, {"table": 0.4, "w": 0.2}),
    "shared": (
        shared,
        {"w": normal(0, 3, 3), "stack": normal(1, 2, 3, 3)},
        {"w": 0.3, "stack": 0.2},
    ),
    "computed": (
        normalised,
        {"a": {"v": normal(0, 3, 4), "g": normal(1, 4)}, "b": normal(2, 4)},
        {"a": 0.3, "b": 0.5},
    ),
    "computed across": (
        normalised,
        {"a": {"v": normal(0, 3, 4), "g": normal(1, 4)}, "b": normal(2, 4)},
        {"a": {"v": 0.3, "g": 0.2}, "b": 0.5},
    ),
    "joined across": (
        joined,
        {"q": normal(0, 3, 2), "k": normal(1, 3, 2), "u": normal(2, 3, 2), "v": normal(3, 2, 3)},
        {"q": 0.5, "k": 0.7, "u": 0.3, "v": 0.1},
    ),
}
LOSS, PARAMS, PREFIX = LOSSES["dense"]


def batch_of(n=N):
    random = np.random.default_rng(5)
    x, y = random.standard_t(1.5, (n, 3)), random.standard_t(1.5, n)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def stacked_of(loss, params, batch):
    return jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, *batch)


def is_threshold(node):
    return callable(node) or isinstance(node, float)


def parts_of(prefix, stacked):
    """Return the thresholds of the prefix's leaves, with their subtrees."""
    leaves, treedef = jax.tree.flatten(prefix, is_leaf=is_threshold)
    return leaves, treedef.flatten_up_to(stacked), treedef


def taus_of(threshold, positions):
    if callable(threshold):
        return np.asarray(threshold(jnp.asarray(positions)), np.float64)
    return np.full(len(positions), threshold)


def expected_of(prefix, stacked, mask=None, positions=None):
    """Compute each group's clipped mean; a sample that is not finite in one is left out of all."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(stacked)]
    n = len(leaves[0])
    counts = np.ones(n, bool) if mask is None else mask
    finite = np.all([np.isfinite(leaf.reshape(n, -1)).all(1) for leaf in leaves], axis=0)
    positions = np.maximum(np.cumsum(counts), 1) if positions is None else positions
    thresholds, parts, treedef = parts_of(prefix, stacked)
    share = (counts & finite).sum() / max(counts.sum(), 1)
    means = [
        clipped_mean(part, taus_of(one, positions), counts & finite)
        for one, part in zip(thresholds, parts, strict=True)
    ]
    means = [jax.tree.map(lambda leaf: leaf * share, mean) for mean in means]
    return treedef.unflatten(means)


def norms_of(prefix, stacked):
    _, parts, _ = parts_of(prefix, stacked)
    squares = [
        sum((np.asarray(leaf, np.float64).reshape(len(leaf), -1) ** 2).sum(1) for leaf in leaves)
        for leaves in map(jax.tree.leaves, parts)
    ]
    return np.sqrt(np.stack(squares, axis=1))


def by_stacking(prefix, stacked, params, **call):
    tx = psc.per_sample_clip(prefix)
    return tx.update(stacked, tx.init(params), params, **call)


# Stacked gradients and the engine against the formula


@pytest.mark.parametrize(
    "name", slow.but(["dense, each", "scan", "tied", "computed", "joined across"], LOSSES)
)
def test_groups_equal_the_formula_in_float64(name):
    loss, params, prefix = LOSSES[name]
    with enable_x64(True):
        params, batch = in_float64(params), in_float64(batch_of())
        stacked = stacked_of(loss, params, batch)
        losses = jax.jit(jax.vmap(loss, (None, 0, 0)))(params, *batch)
        expected, norms = expected_of(prefix, stacked), norms_of(prefix, stacked)
        thresholds, *_ = parts_of(prefix, stacked)
        taus = np.stack([taus_of(one, np.arange(1, N + 1)) for one in thresholds], axis=1)
        for value, grads, stats in in_all_modes(loss, prefix, MODES)(params, *batch).values():
            assert_close(grads, expected, 1e-10)
            np.testing.assert_allclose(stats.norms, norms, rtol=1e-9)
            np.testing.assert_allclose(stats.scales, np.minimum(1, taus / norms), rtol=1e-9)
            np.testing.assert_array_equal(stats.num_clipped, (norms > taus).sum(0))
            assert stats.num_nonfinite.shape == ()
            np.testing.assert_allclose(value, np.mean(losses))
        updates, state = by_stacking(prefix, stacked, params)
        assert_close(updates, expected, 1e-10)
        np.testing.assert_array_equal(state.num_clipped, (norms > taus).sum(0))
        np.testing.assert_allclose(state.median_norm, np.median(norms, 0), rtol=1e-9)
        np.testing.assert_allclose(state.max_norm, norms.max(0), rtol=1e-9)


@pytest.mark.parametrize(("mode", "jit"), slow.diagonal(MODES, [True, False]))
def test_masks_positions_and_slices(mode, jit):
    batch, mask = batch_of(), np.array([1, 0, 1, 1, 0, 1, 1], bool)
    prefix = {"in": psc.growing_threshold(0.2, 1.5), "out": psc.growing_threshold(0.1, 3.0)}
    stacked = stacked_of(LOSS, PARAMS, batch)
    for options in ({}, {"microbatch_size": 3}):
        f = psc.clipped_grad(LOSS, prefix, mode=mode, return_stats=True, **options)
        f = jax.jit(f) if jit else f
        grads, stats = f(PARAMS, *batch, sample_mask=mask)
        assert_close(grads, expected_of(prefix, stacked, mask), 1e-5)
        assert (np.asarray(stats.scales)[~mask] == 0).all()
        positions = np.arange(N, 0, -1)
        grads, _ = f(PARAMS, *batch, positions=positions)
        assert_close(grads, expected_of(prefix, stacked, None, positions), 1e-5)
    updates, _ = by_stacking(prefix, stacked, PARAMS, sample_mask=mask)
    assert_close(updates, expected_of(prefix, stacked, mask), 1e-5)


def of_one_group(params, x, y):
    """Return a loss whose gradient of "out" only is not finite if y is huge."""
    return LOSS(params | {"out": jax.lax.stop_gradient(params["out"])}, x, 0.0) + jnp.sum(
        params["out"] * y
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_is_not_finite_in_one_group_is_dropped_from_all(mode):
    x, y = batch_of()
    batch = x, y.at[2].set(jnp.nan)
    losses = lambda params, x, y: of_one_group(params, x, jnp.where(jnp.isnan(y), jnp.inf, y))
    stacked = stacked_of(losses, PARAMS, batch)
    assert np.isfinite(stacked["in"]["w"]).all()
    f = psc.clipped_grad(losses, PREFIX, mode=mode, return_stats=True)
    grads, stats = jax.jit(f)(PARAMS, *batch)
    expected = expected_of(PREFIX, stacked)
    assert_close(grads, expected, 1e-5)
    assert int(stats.num_nonfinite) == 1
    np.testing.assert_array_equal(stats.scales[2], 0)
    updates, state = by_stacking(PREFIX, stacked, PARAMS)
    assert_close(updates, expected, 1e-5)
    assert int(state.num_nonfinite) == 1
    assert not state.all_finite

    propagating = psc.clipped_grad(losses, PREFIX, mode=mode, on_nonfinite="propagate")
    grads = jax.jit(propagating)(PARAMS, *batch)
    assert not np.isfinite(grads["out"]).any()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_norms_beyond_the_range_of_their_squares_are_clipped_in_a_stack(scale):
    stacked = {"a": normal(0, N, 3) * scale, "b": normal(1, N, 2)}
    prefix = {"a": 0.1 * scale, "b": 0.1}
    params = jax.tree.map(lambda leaf: leaf[0], stacked)
    updates, _ = by_stacking(prefix, stacked, params)
    assert_close(updates, expected_of(prefix, stacked), 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_thresholds_of_a_call_replace_those_given_before(mode):
    f = psc.clipped_grad(LOSS, PREFIX, mode=mode, return_stats=True)
    with enable_x64(True):
        params, batch = in_float64(PARAMS), in_float64(batch_of())
        stacked = stacked_of(LOSS, params, batch)

        other = {"in": psc.growing_threshold(0.1, 2.0), "out": 0.7}
        finer = {"in": {"w": 0.1, "b": 0.2}, "out": 0.3}
        of_one = psc.clipped_grad(LOSS, 1.0, mode=mode, return_stats=True)

        @jax.jit
        def calls(*thresholds):
            given = [f(params, *batch, threshold=threshold) for threshold in thresholds]
            return [*given, of_one(params, *batch, threshold=thresholds[0])]

        results = calls(other, 0.25, finer)
        for_all = {"in": 0.25, "out": 0.25}
        for (grads, _), threshold in zip(results, (other, for_all, finer, other), strict=True):
            assert_close(grads, expected_of(threshold, stacked), 1e-10)
        assert results[1][1].norms.shape == (N, 2)


def test_micro_batches_are_clipped_by_group():
    batch, size = batch_of(), 3
    mean = jax.jit(jax.grad(lambda p, x, y: jnp.mean(jax.vmap(LOSS, (None, 0, 0))(p, x, y))))
    means = [mean(PARAMS, *(leaf[i : i + size] for leaf in batch)) for i in range(0, N, size)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *means)
    numbers = np.array([3, 3, 1])
    prefix = {"in": psc.growing_threshold(0.1, 2.0), "out": 0.1}
    weighted = jax.tree.map(
        lambda leaf: leaf * numbers.reshape(-1, *[1] * (leaf.ndim - 1)) * 3 / N, stacked
    )
    norms = norms_of(prefix, stacked)
    taus = np.stack([taus_of(prefix[name], np.arange(1, 4)) for name in ("in", "out")], 1)
    f = psc.clipped_grad(
        LOSS, prefix, clip_at="micro-batch", microbatch_size=size, return_stats=True
    )
    grads, stats = jax.jit(f)(PARAMS, *batch)
    np.testing.assert_allclose(stats.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(stats.scales, np.minimum(1, taus / norms), rtol=1e-5)
    scaled = {
        name: lambda k, own=own: own * numbers * 3 / N
        for name, own in zip(("in", "out"), taus.T, strict=True)
    }
    assert_close(grads, expected_of(scaled, weighted), 1e-5)
    assert f.verify(PARAMS, *batch).ok
    assert [row.group for row in f.explain(PARAMS, *batch).rows] == [0, 0, 1]


# One group, and layers


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_one_threshold_is_one_group_bit_by_bit(mode):
    batch, threshold = batch_of(), psc.growing_threshold(0.2, 2.0)
    stacked = stacked_of(LOSS, PARAMS, batch)
    f = functools.partial(psc.clipped_value_and_grad, LOSS, mode=mode, return_stats=True)
    _, grads, stats = jax.jit(f(threshold))(PARAMS, *batch)
    assert stats.norms.shape == stats.scales.shape == (N,)
    assert stats.num_clipped.shape == ()
    listed = lambda params, x, y: LOSS(params[0], x, y)
    f = functools.partial(psc.clipped_value_and_grad, listed, mode=mode, return_stats=True)
    of_one = jax.jit(f([threshold]))([PARAMS], *batch)
    assert of_one[2].norms.shape == (N, 1)
    assert_close(of_one[1], [grads], 1e-6)
    np.testing.assert_allclose(of_one[2].norms[:, 0], stats.norms, rtol=1e-6)
    updates, state = by_stacking(threshold, stacked, PARAMS)
    in_a_list, other = by_stacking([threshold], [stacked], [PARAMS])
    assert jax.tree.all(jax.tree.map(np.array_equal, in_a_list, [updates]))
    np.testing.assert_array_equal(other.max_norm, [state.max_norm])


def test_layers_share_a_threshold():
    made = psc.by_layer(PARAMS, 3.0)
    assert jax.tree.structure(made, is_leaf=callable) == jax.tree.structure({"in": 0, "out": 0})
    np.testing.assert_allclose(made["in"].value, 3 / np.sqrt(2))
    growing_ones = psc.by_layer(PARAMS, psc.growing_threshold(3.0, 1.5), depth=2)
    assert set(growing_ones["in"]) == {"w", "b"}
    np.testing.assert_allclose(growing_ones["out"].alpha, 3 / np.sqrt(3))
    assert growing_ones["out"].beta == 1.5
    wrapped = psc.by_layer({"a": jnp.ones(1), "b": {}, "c": None}, lambda k: 2.0 * k)
    np.testing.assert_allclose(wrapped["a"](jnp.arange(1, 4)), [2, 4, 6])
    assert (wrapped["b"], wrapped["c"]) == ({}, None)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_sample_clipped_by_layer_is_no_longer_than_the_threshold(depth):
    x, y = batch_of()
    f = jax.jit(psc.clipped_grad(LOSS, psc.by_layer(PARAMS, 0.5, depth)))
    for k in range(N):
        assert optax.tree.norm(f(PARAMS, x[k : k + 1], y[k : k + 1])) <= 0.5 + 1e-6


def test_subtrees_without_leaves_have_no_group():
    params = {"w": normal(0, 3), "state": {}, "none": None}
    loss = lambda params, x: jnp.dot(params["w"], x)
    f = psc.clipped_grad(loss, {"w": 0.5, "state": {}, "none": None}, return_stats=True)
    grads, stats = f(params, batch_of()[0])
    assert stats.norms.shape == (N, 1)
    assert grads["none"] is None


@jax.tree_util.register_pytree_node_class
class Layer:
    """Parameters whose node is callable, like a module of Equinox."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        return jnp.tanh(x @ self.w + self.b).sum()

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_prefix_may_be_of_callable_nodes():
    layer, (x, y) = Layer(normal(0, 3, 4), normal(1, 4)), batch_of()
    loss = lambda layer, x, y: jnp.square(layer(x) - y)
    prefix = psc.by_layer(layer, 0.3)
    assert isinstance(prefix, Layer)
    grads, stats = jax.jit(psc.clipped_grad(loss, prefix, return_stats=True))(layer, x, y)
    assert stats.norms.shape == (N, 2)
    stacked = stacked_of(loss, layer, (x, y))
    share = 0.3 / 2**0.5
    wanted = expected_of({"w": share, "b": share}, {"w": stacked.w, "b": stacked.b})
    assert_close({"w": grads.w, "b": grads.b}, wanted, 1e-5)
    updates, _ = by_stacking(prefix, stacked, layer)
    assert_close(updates, grads, 1e-5)


# Plans


def test_a_plan_tells_groups_and_why_weights_across_them_have_no_route():
    loss, params, prefix = LOSSES["joined across"]
    batch = batch_of()
    plan = psc.clipped_grad(loss, prefix, mode="two_pass").explain(params, *batch)
    assert [row.group for row in plan.rows] == [0, 1, 2, 3]
    by_name = {row.parameter: row for row in plan.rows}
    assert "of several groups" in by_name["['u']"].reason
    assert by_name["['u']"].route == "direct"
    assert "not one for each group" in plan.note
    assert "group" in str(plan).splitlines()[2]
    assert plan.num_slices is not None
    alone = psc.clipped_grad(loss, 1.0).explain(params, *batch)
    assert {row.group for row in alone.rows} == {None}
    assert "group" not in str(alone)


@pytest.mark.parametrize(("name", "mode"), slow.diagonal(LOSSES, MODES, every=2))
def test_verify_knows_groups(name, mode):
    loss, params, prefix = LOSSES[name]
    assert psc.clipped_grad(loss, prefix, mode=mode).verify(params, *batch_of()).ok


def test_verify_finds_groups_that_are_taken_for_one(monkeypatch):
    from psclip_optax.engine.modes import tapped

    def of_the_first(*arguments):
        squares = original(*arguments)
        return jnp.broadcast_to(squares[:, :1], squares.shape)

    original = tapped.squared_norms
    monkeypatch.setattr("psclip_optax.engine.modes.one_pass.squared_norms", of_the_first)
    result = psc.clipped_grad(LOSS, PREFIX, mode="one_pass").verify(PARAMS, *batch_of())
    assert not result.ok


# Transformations of JAX


def test_seeds_are_mapped_over():
    batch = batch_of()
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), PARAMS)
    alphas = jnp.array([0.1, 0.2, 0.4])

    def call(params, alpha):
        prefix = {"in": psc.growing_threshold(alpha, 2.0), "out": alpha}
        return psc.clipped_grad(LOSS, prefix, return_stats=True)(params, *batch)

    grads, stats = jax.jit(jax.vmap(call))(seeds, alphas)
    assert stats.norms.shape == (3, N, 2)
    for i, alpha in enumerate(alphas):
        params = jax.tree.map(operator.itemgetter(i), seeds)
        prefix = {"in": psc.growing_threshold(float(alpha), 2.0), "out": float(alpha)}
        expected = expected_of(prefix, stacked_of(LOSS, params, batch))
        assert_close(jax.tree.map(operator.itemgetter(i), grads), expected, 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_seed_without_a_sample_leaves_the_others_alone(mode, masked):
    batch = batch_of()
    last = 1.0 if masked else jnp.nan
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, last * leaf]), PARAMS)
    masks = jnp.ones((3, N), bool).at[2].set(not masked)

    def call(params, mask):
        return psc.clipped_grad(LOSS, PREFIX, mode=mode)(params, *batch, sample_mask=mask)

    grads = jax.jit(jax.vmap(call))(seeds, masks)
    for i in range(3):
        own = jax.tree.map(operator.itemgetter(i), grads)
        expected = jax.jit(call)(jax.tree.map(operator.itemgetter(i), seeds), masks[i])
        assert_close(own, expected, 1e-5)
        assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(own)) == (i < 2)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("mode", MODES)
def test_groups_on_many_devices(mode):
    n = 8
    batch, mask = batch_of(n), np.arange(n) % 5 != 2
    prefix = {"in": psc.growing_threshold(0.1, 2.0), "out": 0.2}
    expected = expected_of(prefix, stacked_of(LOSS, PARAMS, batch), mask)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    by_sample = P("data")
    f = psc.clipped_value_and_grad(LOSS, prefix, mode=mode, axis_name="data", return_stats=True)

    def call(params, x, y, mask):
        return f(params, x, y, sample_mask=mask)

    stats_specs = psc.ClipStats(by_sample, by_sample, P(), P())
    sharded = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(P(), by_sample, by_sample, by_sample),
        out_specs=(P(), P(), stats_specs),
    )
    _, grads, stats = jax.jit(sharded)(PARAMS, *batch, mask)
    assert_close(grads, expected, 1e-5)
    assert stats.norms.shape == (n, 2)
    assert stats.num_clipped.shape == (2,)

    tx = psc.per_sample_clip(prefix, axis_name="data")

    def update(params, x, y, mask):
        own = jax.lax.pcast(params, "data", to="varying") if hasattr(jax.lax, "pcast") else params
        stacked = jax.vmap(jax.grad(LOSS), (None, 0, 0))(own, x, y)
        return tx.update(stacked, tx.init(params), sample_mask=mask)

    sharded = jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(P(), by_sample, by_sample, by_sample),
        out_specs=P(),
        check_vma=hasattr(jax.lax, "pcast"),
    )
    updates, state = jax.jit(sharded)(PARAMS, *batch, mask)
    assert_close(updates, expected, 1e-5)
    np.testing.assert_array_equal(state.num_clipped, stats.num_clipped)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_groups_on_a_mesh_of_explicit_axes():
    batch = batch_of(8)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    placed = jax.device_put(batch, jax.sharding.NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, P()))
    f = jax.jit(psc.clipped_value_and_grad(LOSS, PREFIX, return_stats=True))
    _, grads, stats = f(params, *placed)
    assert_close(grads, expected_of(PREFIX, stacked_of(LOSS, PARAMS, batch)), 1e-5)
    assert stats.norms.shape == (8, 2)


def test_the_state_of_a_stack_keeps_its_shapes():
    stacked = stacked_of(LOSS, PARAMS, batch_of())
    tx = psc.per_sample_clip(PREFIX)
    state = tx.init(PARAMS)
    _, after = jax.jit(tx.update)(stacked, state, PARAMS)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert after.num_clipped.shape == after.max_norm.shape == (2,)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_samples_gives_zeros(mode):
    f = psc.clipped_value_and_grad(LOSS, PREFIX, mode=mode, return_stats=True)
    _, grads, stats = f(PARAMS, jnp.zeros((0, 3)), jnp.zeros(0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    assert stats.norms.shape == (0, 2)


# Adaptive thresholds


def test_rules_follow_the_norms_of_their_groups():
    batch = batch_of()
    rules = {"in": psc.moment_threshold(1.5), "out": psc.quantile_threshold(0.5)}
    stacked = stacked_of(LOSS, PARAMS, batch)
    norms = norms_of({"in": 1.0, "out": 1.0}, stacked)
    tx = psc.per_sample_clip(rules)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    zeros, state = update(stacked, state, PARAMS)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(zeros))
    updates, state = update(stacked, state, PARAMS)
    own = [
        rule.threshold(rule.update(rule.init(), jnp.asarray(norms[:, i], jnp.float32)))
        for i, rule in enumerate(rules.values())
    ]
    expected = expected_of(dict(zip(rules, own, strict=True)), stacked)
    assert_close(updates, expected, 1e-5)

    f = psc.clipped_value_and_grad(LOSS, {"in": 0.0, "out": 0.0}, return_stats=True)
    tracking = psc.track_norms(rules)
    tracked = tracking.init(PARAMS)
    for _ in range(2):
        thresholds = jax.tree.map(
            lambda rule, own: rule.threshold(own),
            rules,
            tracked.threshold_state,
            is_leaf=lambda node: isinstance(node, psc.AdaptiveThreshold),
        )
        _, grads, stats = jax.jit(f)(PARAMS, *batch, threshold=thresholds)
        grads, tracked = tracking.update(grads, tracked, norms=stats.norms)
    assert_close(grads, expected, 1e-4)


def test_a_fixed_threshold_stands_beside_a_rule():
    stacked = stacked_of(LOSS, PARAMS, batch_of())
    rule = psc.min_norm_threshold(initial=0.2)
    updates, state = by_stacking({"in": rule, "out": 0.3}, stacked, PARAMS)
    assert_close(updates, expected_of({"in": 0.2, "out": 0.3}, stacked), 1e-5)
    assert state.threshold_state["out"] == ()


# Sums


@pytest.mark.parametrize(("mode", "threshold"), slow.diagonal(MODES, [PREFIX, 0.3]), ids=str)
def test_a_sum_is_not_divided(mode, threshold):
    batch, mask = batch_of(), np.array([1, 0, 1, 1, 0, 1, 1], bool)
    prefix = threshold if isinstance(threshold, dict) else [threshold]
    stacked = stacked_of(LOSS, PARAMS, batch)
    stack = stacked if isinstance(threshold, dict) else [stacked]
    mean = expected_of(prefix, stack, mask)
    expected = jax.tree.map(lambda leaf: leaf * mask.sum(), mean)
    expected = expected if isinstance(threshold, dict) else expected[0]
    f = functools.partial(psc.clipped_value_and_grad, LOSS, threshold, mode=mode)
    mean_loss, _ = f()(PARAMS, *batch, sample_mask=mask)
    for options in ({}, {"microbatch_size": 2}):
        value, grads = jax.jit(f(reduction="sum", **options))(PARAMS, *batch, sample_mask=mask)
        assert_close(grads, expected, 1e-5)
        np.testing.assert_allclose(value, mean_loss, rtol=1e-6)
    assert f(reduction="sum").verify(PARAMS, *batch).ok
    _, none = jax.jit(f(reduction="sum"))(PARAMS, *batch, sample_mask=np.zeros(N, bool))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none))


def test_a_sum_of_micro_batches_is_the_number_of_samples_times_their_mean():
    batch = batch_of()
    f = functools.partial(psc.clipped_grad, LOSS, PREFIX, clip_at="micro-batch", microbatch_size=3)
    expected = jax.tree.map(lambda leaf: N * np.asarray(leaf), jax.jit(f())(PARAMS, *batch))
    assert_close(jax.jit(f(reduction="sum"))(PARAMS, *batch), expected, 1e-5)


@pytest.mark.parametrize(
    ("mode", "threshold"), slow.diagonal(MODES, [psc.by_layer(PARAMS, 0.3), 0.3]), ids=str
)
def test_a_sample_moves_a_sum_by_at_most_its_threshold(mode, threshold):
    x, y = batch_of()
    f = jax.jit(psc.clipped_grad(LOSS, threshold, mode=mode, reduction="sum", return_stats=True))
    (whole, stats), (fewer, _) = f(PARAMS, x, y), f(PARAMS, x[1:], y[1:])
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, whole, fewer))
    assert moved == pytest.approx(0.3, abs=1e-6)
    assert (stats.scales[0] < 1).all()  # the dropped sample, in each group
    replaced = f(PARAMS, x.at[0].set(-x[0]), y.at[0].set(-y[0]))[0]
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, whole, replaced))
    assert moved <= 2 * 0.3 + 1e-6


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_a_sum_over_devices():
    batch = batch_of(8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    f = psc.clipped_grad(LOSS, 0.3, axis_name="data", reduction="sum")
    run = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    expected = jax.jit(psc.clipped_grad(LOSS, 0.3, reduction="sum"))(PARAMS, *batch)
    assert_close(jax.jit(run)(PARAMS, *batch), expected, 1e-5)


# Mistakes; their words are in tests/messages


@pytest.mark.parametrize(
    "prefix",
    [{"in": 1.0}, [1.0, 1.0], {"in": 1.0, "out": 1.0, "more": 1.0}, {"in": [1.0, 2.0], "out": 1.0}],
)
def test_a_prefix_that_does_not_fit_is_refused_before_the_loss_runs(prefix):
    def never(params, x, y):
        raise AssertionError

    with pytest.raises(ValueError, match="prefix of the parameters' tree"):
        psc.clipped_grad(never, prefix)(PARAMS, *batch_of())
    with pytest.raises(ValueError, match="prefix of the parameters' tree"):
        psc.per_sample_clip(prefix).init(PARAMS)


@pytest.mark.parametrize("leaf", ["much", 1j, -1.0, np.ones(3)])
def test_what_is_no_threshold_is_refused_at_once(leaf):
    with pytest.raises((TypeError, ValueError)) as error:
        psc.clipped_grad(LOSS, {"in": 1.0, "out": leaf})
    assert "threshold['out']" in error.value.__notes__[0]
    with pytest.raises((TypeError, ValueError)):
        psc.per_sample_clip({"in": 1.0, "out": leaf})


def test_growing_thresholds_by_layer_grow():
    stacked = stacked_of(LOSS, PARAMS, batch_of())
    prefix = psc.by_layer(PARAMS, psc.growing_threshold(0.5, 1.5))
    by_hand = {name: lambda k: growing(0.5 / 2**0.5, 1.5, len(k)) for name in PARAMS}
    updates, _ = by_stacking(prefix, stacked, PARAMS)
    assert_close(updates, expected_of(by_hand, stacked), 1e-5)


def test_the_automatic_threshold_for_a_group_begins_with_the_first_batch():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    stacked = {"a": normal(0, N, 3), "b": 100 * normal(1, N, 2)}
    by_group = psc.per_sample_clip({"a": psc.auto_threshold(), "b": psc.constant_threshold(1.0)})
    grads, state = by_group.update(stacked, by_group.init(params))
    for name, threshold in (("a", psc.auto_threshold()), ("b", 1.0)):
        alone = psc.per_sample_clip(threshold)
        own = {name: stacked[name]}
        wanted, _ = alone.update(own, alone.init({name: params[name]}))
        assert_close(grads[name], wanted[name], 1e-6)
    assert int(state.num_updates) == 1
