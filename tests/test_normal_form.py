"""Check losses whose parameters meet data only after the loss is rewritten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, enable_x64, in_all_modes

L, D, N, T = 4, 6, 5, 3


def block(w, x):
    return x + jnp.tanh(x @ w)


def over_indices(indices, index=lambda i: i, **options):
    def net(p, x):
        step = lambda x, i: (block(p["w"][index(i)], x), None)
        return lax.scan(step, x, indices, **options)[0]

    return net


def by_counter(first, index):
    def net(p, x):
        step = lambda both, _: ((both[0] + first, block(p["w"][index(both[0])], both[1])), None)
        return lax.scan(step, (jnp.int32(0), x), None, length=L)[0][1]

    return net


def in_a_checkpoint(p, x):
    step = jax.checkpoint(lambda x, i: (block(p["w"][i], x), None))
    return lax.scan(step, x, jnp.arange(L))[0]


def in_a_checkpoint_with_a_flag_for_each_input(p, x):
    step = lambda x, w: jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0)))
    checkpointed = jax.checkpoint(step, prevent_cse=(True, False))
    take = lambda x, i: (checkpointed(x, p["w"][i]), None)
    return lax.scan(take, lax.scan(take, x, jnp.arange(L))[0] + choice(p, x), jnp.arange(L))[0]


def along_the_last_axis(p, x):
    w = jnp.moveaxis(p["w"], 0, 2)
    take = functools.partial(lax.dynamic_index_in_dim, w, axis=2, keepdims=False)
    return lax.scan(lambda x, i: (block(take(i), x), None), x, jnp.arange(L))[0]


def nested(p, x):
    def outer(x, i):
        inner = lambda x, j: (block(p["w"][2 * i + j], x), None)
        return lax.scan(inner, block(p["w"][i], x), jnp.arange(2))[0], None

    return lax.scan(outer, x, jnp.arange(2))[0]


def nested_by_the_inner_index(p, x):
    def outer(x, _):
        return lax.scan(lambda x, j: (block(p["w"][j], x), None), x, jnp.arange(L))[0], None

    return lax.scan(outer, x, None, length=2)[0]


def beside_layers(p, x):
    step = lambda x, both: (block(both[0], x) @ p["w"][both[1]], None)
    return lax.scan(step, x, (p["v"], jnp.arange(L)))[0]


def two_at_a_time(p, x):
    step = lambda x, i: (block(p["w"][i], x) @ p["w"][i + 1], None)
    return lax.scan(step, x, jnp.arange(L - 1))[0]


def with_keys(p, x):
    key = jax.random.key(3)
    noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)
    return lax.scan(lambda x, i: (block(p["w"][i], x) + noise(i), None), x, jnp.arange(L))[0]


def choice(p, x):
    return lax.cond(x[0, 0] > 0, block, lambda w, x: x, p["w"][0], x)


def choice_of_three(p, x):
    index = jnp.int32(3 * x[0, 0])  # also outside 0 to 2
    return lax.switch(index, [lambda x, i=i: block(p["w"][i], x) for i in range(3)], x)


def choice_in_a_scan(p, x):
    step = lambda x, w: (lax.cond(x[0, 0] > 0, block, lambda w, x: x @ w, w, x), None)
    return lax.scan(step, x, p["w"])[0]


def choice_in_a_checkpoint(p, x):
    return jax.checkpoint(choice)(p, x)


def choice_by_step(p, x):
    def step(x, both):
        w, i = both
        return lax.cond(i % 2 == 0, block, lambda w, x: x @ w, w, x), None

    return lax.scan(step, x, (p["w"], jnp.arange(L)))[0]


def choice_within_a_choice(p, x):
    inner = lambda w, x: lax.cond(x[1, 0] > 0, block, lambda w, x: x @ w, w, x)
    return lax.cond(x[0, 0] > 0, inner, lambda w, x: x, p["w"][0], x)


def choice_that_shares_a_parameter(p, x):
    return choice(p, x) @ p["w"][0]


FAST = {
    "by index": over_indices(jnp.arange(L)),
    "by index, reversed": over_indices(jnp.arange(L), reverse=True),
    "by index, unrolled": over_indices(jnp.arange(L), unroll=2),
    "by index from the last": over_indices(jnp.arange(L), lambda i: L - 1 - i),
    "by negative index": over_indices(jnp.arange(L), lambda i: i - L),
    "every second": over_indices(jnp.arange(0, L, 2)),
    "from the second on": over_indices(jnp.arange(1, L)),
    "one": over_indices(jnp.arange(1)),
    "by indices of their own": over_indices(jnp.array([2, 1, 0])),
    "by counter": by_counter(1, lambda i: i),
    "by counter that counts by two": by_counter(2, lambda i: i // 2),
    "fori_loop": lambda p, x: lax.fori_loop(0, L, lambda i, x: block(p["w"][i], x), x),
    "fori_loop from one": lambda p, x: lax.fori_loop(1, L, lambda i, x: block(p["w"][i], x), x),
    "in a checkpoint": in_a_checkpoint,
    "nested by the inner index": nested_by_the_inner_index,
    "beside layers": beside_layers,
    "with keys": with_keys,
    "choice": choice,
    "choice of three": choice_of_three,
    "choice in a scan": choice_in_a_scan,
    "choice in a checkpoint": choice_in_a_checkpoint,
    "choice within a choice": choice_within_a_choice,
    "choice that shares a parameter": choice_that_shares_a_parameter,
}
EXACT = {
    "by index, repeated": over_indices(jnp.arange(2 * L), lambda i: i // 2),
    "by index that is held inside": over_indices(jnp.arange(L + 2)),
    "by indices in no order": over_indices(jnp.array([2, 0, 1])),
    "a flag for each input": in_a_checkpoint_with_a_flag_for_each_input,
    "along the last axis": along_the_last_axis,
    "nested": nested,
    "two at a time": two_at_a_time,
    "choice by step": choice_by_step,
    "no step": over_indices(jnp.arange(0)),
}


def loss_of(net):
    return lambda p, x: jnp.mean(jnp.square(net(p, x) - 1))


def arguments():
    random = np.random.default_rng(0)
    dtype = jnp.zeros(()).dtype
    p = {name: random.normal(size=(L, D, D)).astype(dtype) / 3 for name in "wv"}
    return jax.device_put((p, random.normal(size=(N, T, D)).astype(dtype)))


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("name", slow.but([*FAST, *EXACT][::4], [*FAST, *EXACT]))
def test_gradients_are_those_of_vmap_of_grad(name):
    with enable_x64(True):
        results = in_all_modes(loss_of((FAST | EXACT)[name]), 0.05)(*arguments())
        for mode in ("one_pass", "two_pass"):
            assert_close(results[mode], results["vmap"], 1e-12)


@pytest.mark.parametrize("name", FAST)
def test_no_gradient_is_stacked(name):
    p, x = arguments()
    p = jax.tree.map(lambda w: jnp.tile(w, (1, 8, 8)), p)
    x = jnp.tile(x, (1, 1, 8))
    plan = psc.clipped_value_and_grad(loss_of(FAST[name]), 0.05).explain(p, x)
    assert plan.rows[-1].route == "dense", plan


def unsigned(table, positions):
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    positions = jnp.array(positions, jnp.uint32)[:, None]
    return lax.gather(table, positions, numbers, (1, table.shape[1]))


TABLES = {
    "slice": lambda table: table[:T],
    "slice from an index": lambda table: lax.dynamic_slice_in_dim(table, 2, T),
    "rows at positions": lambda table: table[jnp.arange(T)],
    "take": lambda table: jnp.take(table, jnp.arange(T), axis=0),
    "rows at unsigned positions from the last": lambda table: unsigned(table, range(T)[::-1]),
    "every second row": lambda table: table[jnp.arange(0, 2 * T, 2)],
    "a batch axis": lambda table: table[None, :T][0],
}


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("name", TABLES)
def test_of_a_table_of_positions_only_what_is_added_is_stacked(name):
    loss = lambda p, x: jnp.sum(jnp.sin(x + TABLES[name](p["w"])))
    with enable_x64(True):
        p = {"w": jax.random.normal(jax.random.key(1), (512, D))}
        x = jax.random.normal(jax.random.key(2), (N, T, D))
        results = in_all_modes(loss, 0.5)(p, x)
        for mode in ("one_pass", "two_pass"):
            assert_close(results[mode], results["vmap"], 1e-12)
            plan = psc.clipped_grad(loss, 0.5, mode=mode).explain(p, x)
            assert plan.rows[0].extra_bytes <= N * T * D * 8


@jax.custom_vjp
def rounded(w):
    return jnp.round(4 * w) / 4


rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


@jax.custom_jvp
def clipped_to_one(w):
    return jnp.clip(w, -1, 1)


clipped_to_one.defjvp(lambda w, t: (clipped_to_one(*w), *t))


@jax.custom_vjp
def doubled_backwards(w):
    return w


doubled_backwards.defvjp(lambda w: (w, None), lambda _, g: (2 * g,))


@jax.custom_vjp
def rounded_to_float32(w):
    return (jnp.round(4 * w) / 4).astype(jnp.float32)


rounded_to_float32.defvjp(
    lambda w: (rounded_to_float32(w), None), lambda _, g: (g.astype(jnp.float64),)
)


@jax.custom_vjp
def clipped_backwards(w):
    return w


clipped_backwards.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


def straight_through(w):
    scale = jnp.max(jnp.abs(w), axis=0) / 127
    return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)


def spectral_norm(w):
    direction = jnp.ones(w.shape[1]) / w.shape[1] ** 0.5
    for _ in range(2):
        direction = w @ direction
        direction = lax.stop_gradient(direction / jnp.linalg.norm(direction))
    return w / jnp.linalg.norm(w @ direction)


def low_rank(w, v):
    return w + 0.5 * (v[:, :2] @ v[:2])


def decomposed(w, v):
    whole = lax.stop_gradient(w) + v[:, :2] @ v[:2]
    return v[0] * whole / jnp.linalg.norm(whole, axis=0)


def barrier_with_data(w, x):
    return lax.optimization_barrier((w, x))[0]


WEIGHTS = {
    "weight norm": lambda w, v, x: v[0] * w / jnp.linalg.norm(w, axis=0),
    "weight norm of rows": lambda w, v, x: w / jnp.linalg.norm(w, axis=1, keepdims=True),
    "straight-through": lambda w, v, x: straight_through(w),
    "a constant on the left": lambda w, v, x: jnp.ones((D, D)) + w,
    "less a constant": lambda w, v, x: w - jnp.ones((D, D)),
    "a constant less it": lambda w, v, x: jnp.ones((D, D)) - w,
    "barrier": lambda w, v, x: lax.optimization_barrier(w),
    "barrier with data": lambda w, v, x: barrier_with_data(w, x),
    "computed of a barrier with data": lambda w, v, x: jnp.tanh(barrier_with_data(w, x)),
    "custom_vjp": lambda w, v, x: rounded(w),
    "custom_jvp": lambda w, v, x: clipped_to_one(w),
    "custom_vjp that doubles": lambda w, v, x: doubled_backwards(w),
    "custom_vjp to float32": lambda w, v, x: rounded_to_float32(w),
    "custom_vjp that clips": lambda w, v, x: clipped_backwards(w),
    "custom_vjp in jit": lambda w, v, x: jax.jit(rounded)(w),
    "weight norm of what is rounded": lambda w, v, x: rounded(w) / jnp.linalg.norm(w, axis=0),
    "spectral norm": lambda w, v, x: spectral_norm(w),
    "softmax": lambda w, v, x: jax.nn.softmax(w, axis=0),
    "low rank": lambda w, v, x: low_rank(w, v),
    "decomposed": lambda w, v, x: decomposed(w, v),
    "scale": lambda w, v, x: w * jax.nn.softplus(v[0]),
    "tanh": lambda w, v, x: jnp.tanh(w),
    "a part and the whole": lambda w, v, x: w.at[0].add(jnp.tanh(w[1])),
    "view of what is computed": lambda w, v, x: jnp.tanh(w).T,
    "both": lambda w, v, x: jnp.where(w > 0, w, v),
}


def in_scan(make):
    def net(p, x):
        step = lambda x, both: (block(make(*both, x), x), None)
        return lax.scan(step, x, (p["w"], p["v"]))[0]

    return net


def in_nested_scan(make):
    def net(p, x):
        layers = jax.tree.map(lambda w: w.reshape(2, 2, D, D), (p["w"], p["v"]))
        step = jax.checkpoint(jax.jit(lambda x, both: (block(make(*both, x), x), None)))
        outer = lambda x, own: (lax.scan(step, x, own)[0], None)
        return lax.scan(outer, x, layers)[0]

    return net


def in_steps_that_share(make):
    def net(p, x):
        step = lambda x, c: (c * block(make(p["w"][0], p["v"][0], x), x), None)
        return lax.scan(step, x, jnp.arange(1.0, 4.0))[0]

    return net


def unrolled(make):
    def net(p, x):
        for i in range(L):
            x = block(make(p["w"][i], p["v"][i], x), x)
        return x

    return net


def twice(make):
    def net(p, x):
        x = block(make(p["w"][0], p["v"][0], x), x)
        return block(p["w"][0], block(make(p["w"][0], p["v"][1], x), x))

    return net


NETS = {
    "one_pass": [in_nested_scan, in_steps_that_share, unrolled, twice],
    "two_pass": [in_scan, unrolled],
}


@pytest.mark.parametrize(("name", "mode"), slow.diagonal(WEIGHTS, NETS, every=3))
def test_weights_that_are_computed_anywhere(name, mode):
    with enable_x64(True):
        p, x = arguments()
        losses = [loss_of(net(WEIGHTS[name])) for net in NETS[mode]]
        run = lambda mode: [
            psc.clipped_value_and_grad(loss, 0.05, mode=mode, return_stats=True) for loss in losses
        ]
        all_of = lambda mode: jax.jit(lambda p, x: [f(p, x) for f in run(mode)])
        tolerance = 1e-6 if "float32" in name else 1e-12
        assert_close(all_of(mode)(p, x), all_of("vmap")(p, x), tolerance)


IN_SCAN_FAST = [
    *("weight norm", "straight-through", "barrier", "custom_vjp", "custom_jvp", "spectral norm"),
    "custom_vjp to float32",
    *("low rank", "scale", "a constant on the left", "less a constant", "barrier with data"),
]


@pytest.mark.parametrize("net", [in_scan, unrolled])
@pytest.mark.parametrize("name", IN_SCAN_FAST)
def test_weights_that_are_computed_in_steps_have_a_route(name, net):
    with enable_x64(True):
        p, x = arguments()
        plan = psc.clipped_value_and_grad(loss_of(net(WEIGHTS[name])), 0.05).explain(p, x[:, :1])
    row = plan.rows[-1]
    assert row.route == "dense", plan
    assert "pulled back" not in row.reason, plan
