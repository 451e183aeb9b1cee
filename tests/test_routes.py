"""Check routes of rare operations: mixtures of experts, layers with custom rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from psclip_optax.engine.routes import tied
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, in_all_modes

N, T, D, Q, E = 6, 8, 4, 5, 3


def clipped_one_by_one(loss, p, x, tau):
    """Clip each sample by the formula, if `vmap` has no gradient."""
    of_one = jax.jit(jax.value_and_grad(loss))
    losses, grads = zip(*[of_one(p, one) for one in np.asarray(x)], strict=True)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    norms = np.sqrt(sum(np.square(g).reshape(len(x), -1).sum(1) for g in stacked.values()))
    return np.mean(losses), clipped_mean(stacked, np.full(len(x), tau)), norms


def arguments():
    random = np.random.default_rng(0)
    shapes = {"r": (D, E), "v": (2, E, Q, D), "w": (2, E, D, Q), "k": (2, D, D)}
    p = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    return p, jnp.asarray(random.normal(size=(N, T, D)))


# Mixtures of experts


def experts(x, r, w, v):
    chosen = jnp.argmax(x @ r, axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=E)
    y = lax.ragged_dot(jnp.tanh(lax.ragged_dot(x[order], w, sizes)), v, sizes)
    gates = jnp.take_along_axis(jax.nn.softmax(x @ r), chosen[:, None], axis=-1)
    return x + jnp.zeros_like(x).at[order].set(y) * gates


def scanned_experts(p, x):
    step = lambda x, own: (experts(x, p["r"], *own), None)
    return lax.scan(jax.checkpoint(step), x, (p["w"], p["v"]))[0]


def shared_experts(p, x):
    step = lambda x, _: (experts(x, p["r"], p["w"][0], p["v"][0]), None)
    return lax.scan(step, x, None, length=2)[0]


def rows_without_expert(p, x):
    return x @ p["k"][0] + lax.ragged_dot(x, p["w"][0], jnp.array([2, 0, 3]))[:, :D]


def cast_experts(p, x):
    w, v = (w[0].astype(jnp.float32).swapaxes(1, 2).swapaxes(1, 2) for w in (p["w"], p["v"]))
    return experts(x.astype(jnp.float32), p["r"].astype(jnp.float32), w, v)


EXPERTS = {
    "one layer": lambda p, x: experts(x, p["r"], p["w"][0], p["v"][0]),
    "scanned": scanned_experts,
    "shared by steps": shared_experts,
    "rows without expert": rows_without_expert,
    "in float32": cast_experts,
    "one expert": lambda p, x: lax.ragged_dot(x, p["w"][0, :1], jnp.array([T])),
}


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("name", "mode"), slow.diagonal(EXPERTS, ["one_pass", "two_pass"]))
def test_experts(name, mode):
    loss = lambda p, x: jnp.sum(jnp.sin(EXPERTS[name](p, x))).astype(float)
    with enable_x64(True):
        p, x = arguments()
        f = psc.clipped_value_and_grad(loss, 2.0, mode=mode, return_stats=True)
        value, grads, stats = jax.jit(f)(p, x)
        wanted = clipped_one_by_one(loss, p, x, 2.0)
        tolerance = 1e-5 if "float32" in name else 1e-12
        assert_close((value, grads, stats.norms), wanted, tolerance)
        rows = [row for row in f.explain(p, x).rows if row.parameter in ("['v']", "['w']")]
        assert {row.route for row in rows if "reach" not in row.reason} == {"ragged"}


def test_experts_are_verified():
    loss = lambda p, x: jnp.sum(jnp.sin(shared_experts(p, x)))
    with enable_x64(True):
        assert psc.clipped_grad(loss, 2.0, mode="one_pass").verify(*arguments()).ok


def test_experts_over_seeds_with_masked_samples():
    loss = lambda p, x: jnp.sum(jnp.sin(scanned_experts(p, x)))
    with enable_x64(True):
        p, x = arguments()
        f = jax.jit(psc.clipped_grad(loss, 2.0))
        both = jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), p)
        mask = np.arange(N) % 2 == 0
        padded = np.where(mask[:, None, None], x, np.nan)
        masked = lambda p: f(p, padded, sample_mask=mask)
        of_seeds = jax.jit(jax.vmap(masked))(both)
        for i in range(2):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], both)
            assert_close(jax.tree.map(lambda g, i=i: g[i], of_seeds), f(one, x[::2]), 1e-12)


# Users' rules


def ruled(forward, backward):
    """Return a layer with a custom_vjp."""
    layer = jax.custom_vjp(forward)
    layer.defvjp(lambda *inputs: (forward(*inputs), inputs), lambda saved, g: backward(*saved, g))
    return layer


def quantised(w):
    scale = jnp.max(jnp.abs(w), axis=0) / 127
    return jnp.round(w / scale) * scale


linear = ruled(lambda x, w: x @ w, lambda x, w, g: (g @ w.T, x.T @ g))
linear_of_transposed = ruled(lambda x, w: x @ w.T, lambda x, w, g: (g @ w, g.T @ x))
fake_quantised = ruled(lambda x, w: x @ quantised(w), lambda x, w, g: (g @ w.T, x.T @ g))
activated = ruled(
    lambda x, w: jnp.tanh(x) @ w,
    lambda x, w, g: ((g @ w.T) * (1 - jnp.tanh(x) ** 2), (jnp.tanh(x).T @ (3 * g)).astype(w.dtype)),
)
by_heads = ruled(
    lambda x, w: jnp.einsum("htd,hdq->htq", x, w),
    lambda x, w, g: (jnp.einsum("htq,hdq->htd", g, w), jnp.einsum("htd,htq->hdq", x, g)),
)
sided = ruled(lambda w, x: x @ w, lambda w, x, g: (jnp.einsum("td,tq->dq", x, g), g @ w.T))
# These have no route.
gated_by_weight = ruled(lambda x, w: x @ w, lambda x, w, g: (g @ w.T, (x.T @ g) * (w > 0)))
clipped_backwards = ruled(
    lambda x, w: x @ w, lambda x, w, g: (g @ w.T, x.T @ jnp.clip(g, -0.1, 0.1))
)
noisy = ruled(lambda x, w: x @ w, lambda x, w, g: (g @ w.T, x.T @ g + 0.01))
uses_weight = ruled(lambda x, w: x @ w, lambda x, w, g: (g @ w.T, x.T @ (g * jnp.sum(w))))


@jax.custom_jvp
def tangent_of_its_own(x, w):
    return x @ w


@tangent_of_its_own.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * (dx @ w) + x @ dw


def layers(layer):
    return lambda p, x: layer(jnp.tanh(layer(x, p["k"][0])), p["k"][1])


def scanned(layer):
    step = lambda x, w: (x + jnp.tanh(layer(x, w)), None)
    return lambda p, x: lax.scan(jax.checkpoint(step), x, p["k"])[0]


def recurrent(layer):
    return lambda p, x: lax.scan(
        lambda x, _: (jnp.tanh(layer(x, p["k"][0])), None), x, None, length=3
    )[0]


RULED = {
    "linear": layers(linear),
    "linear, scanned": scanned(linear),
    "linear, recurrent": recurrent(linear),
    "of the transposed": layers(linear_of_transposed),
    "of the transposed, scanned": scanned(lambda x, w: linear_of_transposed(x, w.T)),
    "fake quantised": layers(fake_quantised),
    "activated": scanned(activated),
    "by heads": lambda p, x: by_heads(x.reshape(2, T // 2, D), p["k"]),
    "weight first": layers(lambda x, w: sided(w, x)),
    "in jit": layers(jax.jit(linear)),
    "custom_jvp": layers(tangent_of_its_own),
}
NOT_CLAIMED = {
    "gated by the weight": layers(gated_by_weight),
    "clipped": layers(clipped_backwards),
    "clipped, scanned": scanned(clipped_backwards),
    "noisy": layers(noisy),
    "uses the weight": layers(uses_weight),
    "twice": lambda p, x: linear(jnp.tanh(linear(x, p["k"][0])), p["k"][0]),
    "and a number of it": lambda p, x: activated(x, p["k"][0]) + jnp.sum(p["k"][0]),
    "and used otherwise": lambda p, x: linear(x, p["k"][0]) + x @ jnp.tanh(p["k"][0]),
}


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("name", slow.but([*RULED, *NOT_CLAIMED][::3], [*RULED, *NOT_CLAIMED]))
def test_rules_of_the_users(name):
    net = (RULED | NOT_CLAIMED)[name]
    loss = lambda p, x: jnp.sum(jnp.sin(net(p, x)))
    with enable_x64(True):
        p, x = arguments()
        p = {"k": p["k"]}
        results = in_all_modes(loss, 2.0)(p, x)
        for mode in ("one_pass", "two_pass"):
            assert_close(results[mode], results["vmap"], 1e-12)
            plan = psc.clipped_grad(loss, 2.0, mode=mode).explain(p, x)
            assert {row.route for row in plan.rows} == {"custom"} or name not in RULED


def test_a_rule_that_is_not_known_does_not_stack_all_samples():
    loss = lambda w, x: jnp.sum(jnp.square(clipped_backwards(x, w)))
    w, x = jnp.ones((512, 512)), jnp.asarray(np.random.default_rng(0).normal(size=(64, 1, 512)))
    f = psc.clipped_grad(loss, 1.0, mode="one_pass")
    compiled = jax.jit(f).lower(w, x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    share = 0.3 if jax.__version_info__ >= (0, 8) else 0.6  # JAX 0.7 holds two parts
    assert memory.temp_size_in_bytes < share * len(x) * w.nbytes
    assert "samples at a time" in str(f.explain(w, x))
    stacked = jax.jit(psc.clipped_grad(loss, 1.0, mode="vmap"))
    assert_close(compiled(w, x), stacked(w, x), 1e-5)


# Look-ups


def look_up(table, indices, collapsed=(0,), mode="clip"):
    """Look up rows, with a gather that keeps their axis if it is not collapsed."""
    kept = tuple(range(1, 1 + table.ndim - len(collapsed)))
    numbers = lax.GatherDimensionNumbers(kept, collapsed, (0,))
    return lax.gather(table, indices[:, None], numbers, (1, *table.shape[1:]), mode=mode)


TWICE = {
    "rows": (lambda p, i: jnp.sum(jnp.sin(look_up(p, i, ()))) + jnp.sum(look_up(p, i) ** 2), (9, 2)),
    "columns": (lambda p, i: jnp.sum(jnp.sin(look_up(p.T, i, ()))) + jnp.sum(p[:, i] ** 2), (2, 9)),
    "entries": (lambda p, i: jnp.sum(jnp.sin(p[i])) + jnp.sum(look_up(p, i, ()) ** 2), (9,)),
}  # fmt: skip


@pytest.mark.parametrize("name", slow.but(["columns"], TWICE))
def test_look_ups_that_keep_the_axis_of_rows_join_those_that_do_not(name):
    loss, shape = TWICE[name]
    with enable_x64(True):
        random = np.random.default_rng(0)
        p, i = random.normal(size=shape), random.integers(0, 9, (N, 3))
        results = in_all_modes(loss, 1.0, ["one_pass", "vmap"])(p, i)
        assert_close(results["one_pass"], results["vmap"], 1e-12)
        assert psc.clipped_grad(loss, 1.0).explain(p, i).rows[0].route == "embedding"


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_indices_may_be_narrower_than_the_number_of_rows(mode):
    loss = lambda p, i, j: jnp.sum(jnp.sin(look_up(p, i, mode=mode))) + jnp.sum(p[j] ** 2)
    with enable_x64(True), jax.numpy_dtype_promotion("strict"):
        random = np.random.default_rng(0)
        p, i = random.normal(size=(300, 2)), random.integers(0, 256, (N, 3))
        j = i[:, ::-1].astype(np.int32)
        wanted = in_all_modes(loss, 1.0, ["vmap"])(p, i, j)["vmap"]
        found = in_all_modes(loss, 1.0, ["one_pass"])(p, i.astype(np.uint8), j)["one_pass"]
        # With the tests' flags XLA adds gradients to wrong rows at such indices.
        assert_close(found[2].norms, wanted[2].norms, 1e-12)


def test_entries_are_looked_up_alike_on_all_platforms():
    over_rows = jax.random.normal(jax.random.key(0), (N, 2, T, 9))
    indices = jax.random.randint(jax.random.key(1), (N, 2, 4), 0, 9)
    looked_up, selected = (f(over_rows, indices) for f in (tied._looked_up, tied._selected))
    assert_close(selected, looked_up, 1e-6)
