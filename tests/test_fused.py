"""Check groups clipped within one backward pass: which are, and their numbers against a stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, enable_x64, in_float64

N = 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def squared(hidden, y):
    return jnp.square(jnp.sum(hidden) - y)


# Losses for one example, x [4, 3] and y


def dense(params, x, y):
    return squared(jnp.tanh(x @ params["w"] + params["b"]) @ params["v"], y)


def two_layers(params, x, y):
    hidden = x
    for layer in params:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return squared(hidden, y)


def convolved(params, x, y):
    image = lax.conv_general_dilated(
        x[None, :, :, None], params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return squared(jnp.tanh(image + params["b"]) @ params["v"], y)


def looked_up(params, x, y):
    tokens = jnp.abs(3 * x[:, 0]).astype(int) % 5
    hidden = params["table"][tokens] * params["scale"] + params["positions"]
    return squared(jnp.tanh(hidden) @ params["v"], y)


def called(params, x, y):
    layer = jax.jit(lambda own, h: jnp.tanh(h @ own["w"].astype(h.dtype) + own["b"]))
    return squared(layer(params[1], layer(params[0], x)), y)


def checkpointed(params, x, y):
    layer = jax.checkpoint(lambda own, h: jnp.tanh(h @ own["w"] + own["b"]))
    return squared(layer(params[1], layer(params[0], x)), y)


def normalised(params, x, y):
    """Use a weight that is computed from two parameters of one group, and one that is cast."""
    v = params["a"]["v"]
    hidden = jnp.tanh(x @ (params["a"]["g"] * v / jnp.sqrt(jnp.sum(v**2, 0))))
    return squared(hidden @ params["b"].T.astype(hidden.dtype), y)


def recurrent(params, x, y):
    step = lambda h, own: (jnp.tanh(h @ params["h"] + own @ params["x"]), None)
    hidden, _ = lax.scan(step, jnp.zeros(3, x.dtype), x)
    return squared(hidden @ params["v"], y)


def tied(params, x, y):
    tokens = jnp.abs(3 * x[:, 0]).astype(int) % 5
    hidden = jnp.tanh(params["table"][tokens] @ params["w"])
    return squared(jnp.sin(hidden @ params["table"].T), y)


def crossed(params, x, y):
    """Use the second group between the sites of the first, and both in a product."""
    hidden = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
    return squared(jnp.tanh(hidden @ params["a"]) @ (params["c"] @ params["d"]), y)


def twice(params, x, y):
    """Use one weight at two consecutive sites, whose gradients have cross terms."""
    return squared(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"]) @ params["b"], y)


def ruled(params, x, y):
    """Use a derivative that is not linear in its cotangent, before a weight and on a weight."""

    @jax.custom_vjp
    def bounded(h):
        return h

    bounded.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    return squared(jnp.tanh(bounded(jnp.tanh(x @ params["a"]))) @ bounded(params["b"]), y)


LAYER = {"w": normal(0, 3, 3), "b": normal(1, 3)}
LAYERS = [LAYER, {"w": normal(2, 3, 3), "b": normal(3, 3)}]
# The loss, its parameters, the groups, and which are fused.
LOSSES = {
    "by leaf": (
        dense,
        {"w": normal(0, 3, 3), "b": normal(1, 3), "v": normal(2, 3, 2)},
        {"w": 0.3, "b": 0.2, "v": psc.growing_threshold(0.2, 1.5)},
        {"w", "b", "v"},
    ),
    "by layer": (two_layers, LAYERS, [0.3, 0.2], {0, 1}),
    "convolution": (
        convolved,
        {"k": normal(0, 2, 2, 1, 3), "b": normal(1, 3), "v": normal(2, 3, 2)},
        {"k": 0.3, "b": 0.2, "v": 0.1},
        {"k", "b", "v"},
    ),
    "look-up": (
        looked_up,
        {
            "table": normal(0, 5, 3),
            "scale": normal(1, 3),
            "positions": normal(2, 4, 3),
            "v": normal(3, 3),
        },
        {"table": 0.3, "scale": 0.2, "positions": 0.3, "v": 0.1},
        {"table", "scale", "positions", "v"},
    ),
    "calls": (called, LAYERS, [0.3, 0.2], {0, 1}),
    "checkpoints": (checkpointed, LAYERS, [{"w": 0.3, "b": 0.1}, 0.2], {0, 1}),
    "computed": (
        normalised,
        {"a": {"v": normal(0, 3, 4), "g": normal(1, 4)}, "b": normal(2, 2, 4)},
        {"a": 0.3, "b": 0.2},
        {"a", "b"},
    ),
    "steps that share": (
        recurrent,
        {"h": normal(0, 3, 3), "x": normal(1, 3, 3), "v": normal(2, 3)},
        {"h": 0.3, "x": 0.2, "v": 0.1},
        {"v"},
    ),
    "tied": (
        tied,
        {"table": normal(0, 5, 3), "w": normal(1, 3, 3)},
        {"table": 0.4, "w": 0.2},
        {"w"},
    ),
    "crossed": (
        crossed,
        {"a": normal(0, 3, 3), "b": normal(1, 3, 3), "c": normal(2, 3, 2), "d": normal(3, 2, 3)},
        {"a": 0.3, "b": 0.2, "c": 0.1, "d": 0.4},
        {"b"},
    ),
    "several sites": (
        twice,
        {"a": normal(0, 3, 3), "b": normal(1, 3)},
        {"a": 0.3, "b": 0.2},
        {"a", "b"},
    ),
    "rules": (
        ruled,
        {"a": normal(0, 3, 3), "b": normal(1, 3)},
        {"a": 0.3, "b": 0.2},
        {"a", "b"},
    ),
}


def batch_of(n=N):
    random = np.random.default_rng(5)
    x, y = random.standard_t(1.5, (n, 4, 3)), random.standard_t(1.5, n)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def results_of(loss, prefix, params, batch, jit=True, **options):
    call = {name: options.pop(name) for name in ("sample_mask",) if name in options}
    f = psc.clipped_value_and_grad(loss, prefix, return_stats=True, **options)
    return (jax.jit(f) if jit else f)(params, *batch, **call)


def fused_of(loss, prefix, params, batch):
    plan = psc.clipped_grad(loss, prefix).explain(params, *batch)
    paths = [path[0] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [getattr(path, "key", getattr(path, "idx", None)) for path in paths]
    return plan, {name for name, row in zip(names, plan.rows, strict=True) if row.is_fused}


@pytest.mark.parametrize("name", slow.but([*LOSSES][1::2], LOSSES))
def test_fused_groups_equal_a_stack(name):
    loss, params, prefix, fused = LOSSES[name]
    with enable_x64(True):
        params, batch = in_float64(params), in_float64(batch_of())
        plan, found = fused_of(loss, prefix, params, batch)
        assert plan.mode == "fused"
        assert found == fused
        assert all(row.extra_bytes == 0 for row in plan.rows if row.is_fused)
        assert all("not fused" in row.reason for row in plan.rows if not row.is_fused)
        expected = results_of(loss, prefix, params, batch, mode="vmap")
        assert_close(results_of(loss, prefix, params, batch), expected, 1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    slow.diagonal(
        ["by layer", "tied", "computed"],
        [{"jit": False}, {"microbatch_size": 2}, {"on_nonfinite": "propagate"}],
    ),
    ids=str,
)
def test_fused_groups_in_other_ways(name, options):
    loss, params, prefix, _ = LOSSES[name]
    with enable_x64(True):
        params, batch = in_float64(params), in_float64(batch_of())
        expected = results_of(loss, prefix, params, batch, mode="vmap")
        assert_close(results_of(loss, prefix, params, batch, **options), expected, 1e-10)


def test_one_group_is_not_fused():
    loss, params, _, _ = LOSSES["by layer"]
    assert psc.clipped_grad(loss, 1.0).explain(params, *batch_of()).mode == "one_pass"
    f = psc.clipped_grad(lambda p, x, y: loss(p["all"], x, y), {"all": 1.0})
    assert f.explain({"all": params}, *batch_of()).mode == "one_pass"


def test_a_loss_with_side_effects_is_not_fused():
    def printing(params, x, y):
        jax.debug.callback(lambda _: None, y)
        return two_layers(params, x, y)

    plan, fused = fused_of(printing, [0.3, 0.2], LAYERS, batch_of())
    assert (plan.mode, fused) == ("one_pass", set())


def test_a_loss_whose_batch_has_no_gradient_is_not_fused():
    """Check a custom_vjp within a custom_jvp, which JAX can differentiate only for one sample."""

    @jax.custom_vjp
    def inner(h):
        return jnp.sin(h)

    inner.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (g * jnp.cos(h),))

    @jax.custom_jvp
    def outer(h):
        return inner(h)

    outer.defjvp(lambda primals, tangents: (outer(*primals), jnp.cos(*primals) * tangents[0]))

    def loss(params, x, y):
        layer = jax.checkpoint(lambda h, own: (outer(h @ own), None))
        return squared(lax.scan(layer, x, params["w"])[0] + params["b"], y)

    params, prefix = {"w": normal(0, 2, 3, 3), "b": normal(1, 3)}, {"w": 0.3, "b": 0.2}
    expected = results_of(loss, prefix, params, batch_of(), mode="vmap")
    assert_close(results_of(loss, prefix, params, batch_of()), expected, 1e-5)


def test_memory_is_estimated_of_weights_that_fusion_alone_computes():
    def loss(params, x):  # for a sequence, so that exp(a) is smaller than the products' outputs
        table = jnp.exp(params["a"])
        return (jnp.tanh(x @ table) @ params["b"] @ table.T).sum()

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4))}
    f = psc.clipped_grad(loss, {"a": 1.0, "b": 1.0}, memory_limit_bytes=10**9)
    assert f.explain(params, jnp.ones((5, 50, 3))).mode == "fused"


def test_what_does_not_fit_into_memory_is_not_fused():
    loss, params, prefix, _ = LOSSES["by layer"]
    f = psc.clipped_grad(loss, prefix, memory_limit_bytes=1)
    assert f.explain(params, *batch_of()).mode == "two_pass"


def test_nothing_of_a_fused_layer_is_kept_beyond_its_step():
    params = {"w": normal(0, 16, 64, 64), "b": normal(1, 16, 64)}
    batch = jnp.zeros((32, 16, 64)), jnp.zeros(32)

    def loss(params, x, y):
        layer = jax.checkpoint(lambda h, own: (jnp.tanh(h @ own["w"] + own["b"]), None))
        return squared(lax.scan(layer, x, params)[0], y)

    def temporary(prefix):
        f = jax.jit(psc.clipped_grad(loss, prefix))
        return f.lower(params, *batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(psc.each_slice([1.0] * 16)) < 0.6 * temporary(1.0)


def test_a_pass_that_may_be_made_again_is_compiled_once():
    loss, params, prefix, _ = LOSSES["by layer"]

    def products(on_nonfinite):
        f = psc.clipped_grad(loss, prefix, on_nonfinite=on_nonfinite)
        return str(jax.make_jaxpr(f)(params, *batch_of())).count("dot_general")

    assert products("drop") == products("propagate")


# Samples that are not finite


def rooted(params, x, y):
    """Return a loss that is finite at x = 0 with a non-finite gradient in the first layer only."""
    first = jnp.sqrt(jnp.abs(jnp.sum(x @ params["a"])))
    return squared(jnp.tanh(first * params["b"]), y) + 0 * jnp.sum(params["c"])


ROOTED = {"a": normal(0, 3, 3), "b": normal(1, 3), "c": normal(2, 3)}
ROOTS = {"a": 0.3, "b": 0.2, "c": 0.1}


@pytest.mark.parametrize(("loss", "jit"), slow.diagonal([rooted, dense], [True, False], every=2))
def test_a_sample_that_is_not_finite_is_dropped_from_all_groups(loss, jit):
    params, prefix = LOSSES["by leaf"][1:3] if loss is dense else (ROOTED, ROOTS)
    x, y = batch_of()
    x = x.at[2].set(0.0 if loss is rooted else jnp.nan)
    mask = np.array([0, 1, 1, 1, 1], bool)
    run = functools.partial(results_of, loss, prefix, params, sample_mask=mask, jit=jit)
    expected = run((x, y), mode="vmap", jit=True)
    value, grads, stats = run((x, y))
    assert int(stats.num_nonfinite) == 1
    assert_close((value, grads, stats.scales), (expected[0], expected[1], expected[2].scales), 1e-5)
    kept = np.arange(N) != 2
    assert_close(stats.norms[kept], expected[2].norms[kept], 1e-5)
    assert not np.isfinite(stats.norms[2]).all()


@pytest.mark.parametrize("jit", [False, True])
def test_padding_may_hold_anything(jit):
    loss, params, prefix, _ = LOSSES["by layer"]
    x, y = batch_of()
    mask = np.array([1, 0, 1, 1, 0], bool)
    run = functools.partial(results_of, loss, prefix, params, sample_mask=mask, jit=jit)
    expected = run((x, y))
    value, grads, _ = run((x.at[1].set(jnp.nan), y.at[4].set(jnp.inf)))
    assert_close((value, grads), expected[:2], 1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_where_all_are_dropped_the_gradient_is_zero(jit):
    loss, params, prefix, _ = LOSSES["by layer"]
    x, y = batch_of()
    _, grads, stats = results_of(loss, prefix, params, (x * jnp.nan, y), jit=jit)
    assert int(stats.num_nonfinite) == N
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_aux_is_of_each_sample_also_where_a_pass_is_made_again():
    loss, params, prefix, _ = LOSSES["by layer"]
    x, y = batch_of()
    x = x.at[1].set(jnp.nan)
    f = psc.clipped_value_and_grad(lambda p, x, y: (loss(p, x, y), {"y": y}), prefix, has_aux=True)
    (_, aux), grads = jax.jit(f)(params, x, y)
    np.testing.assert_array_equal(aux["y"], y)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_propagated_samples_make_the_sums_of_their_groups_not_finite():
    loss, params, prefix, _ = LOSSES["by leaf"]
    x, y = batch_of()
    _, grads, _ = results_of(
        loss, prefix, params, (x.at[1].set(jnp.nan), y), on_nonfinite="propagate"
    )
    assert not any(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# Transformations of the whole


@pytest.mark.parametrize(
    "name", slow.but(["checkpoints", "tied"], ["by layer", "checkpoints", "tied", "computed"])
)
def test_derivatives_through_fused_clipping(name):
    loss, params, prefix, _ = LOSSES[name]

    def outer(params, tau, mode):
        grads = psc.clipped_grad(loss, prefix, mode=mode)(params, *batch, threshold=tau)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(grads))

    with enable_x64(True):
        params, batch = in_float64(params), in_float64(batch_of())
        of = lambda mode: jax.jit(jax.grad(functools.partial(outer, mode=mode), (0, 1)))
        expected = of("vmap")(params, 0.3)
        assert_close(of("auto")(params, 0.3), expected, 1e-8)
        along = lambda tau: jax.jvp(lambda tau: outer(params, tau, "auto"), (tau,), (1.0,))
        _, forwards = jax.jit(along)(0.3)
        np.testing.assert_allclose(forwards, expected[1], rtol=1e-8)


def test_many_models_at_once():
    (loss, params, prefix, _), (x, y) = LOSSES["by layer"], batch_of()
    models = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    of = lambda mode: jax.jit(jax.vmap(psc.clipped_grad(loss, prefix, mode=mode), (0, None, None)))
    # Dropped in all models at once.
    for own in (x, x.at[1].set(jnp.nan)):
        assert_close(of("auto")(models, own, y), of("vmap")(models, own, y), 1e-5)
