"""Check weights computed only from parameters: their numbers and their routes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psclip_optax as psc
from psclip_optax.engine.analysis.computed import is_radial
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, in_all_modes

N = 5
SHAPES = {
    "w": (12, 10),
    "v": (12, 10),
    "square": (10, 10),
    "a": (12, 2),
    "b": (2, 10),
    "s": (10,),
    "table": (30, 6),
    "kernel": (3, 3, 2, 8),
    "layers_a": (3, 10, 2),
    "layers_b": (3, 2, 10),
    "layers": (3, 10, 10),
    "gain": (8,),
}


def make_params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: jax.random.normal(key, shape, jnp.float64)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def make_batch():
    keys = jax.random.split(jax.random.key(1), 3)
    scale = jnp.arange(1.0, N + 1)
    x = jax.random.normal(keys[0], (N, 12)) * scale[:, None]
    rows = jax.random.normal(keys[1], (N, 4, 10)) * scale[:, None, None]
    image = jax.random.normal(keys[2], (N, 6, 5, 2)) * scale[:, None, None, None]
    return x, rows, image


def end(y):
    return (jnp.tanh(0.1 * y) * jnp.arange(1.0, y.size + 1).reshape(y.shape)).sum()


def normed(w, axis=0):
    return w / jnp.sqrt(jnp.square(w).sum(axis, keepdims=True))


def standardised(w, axes):
    return (w - w.mean(axes, keepdims=True)) / jnp.std(w, axes, keepdims=True)


def conv(image, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        image[None],
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )[0]


def mask():
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, (12, 10)), jnp.float64)


def recurrent(p, rows):
    def step(h, x):
        # Computed in each step from values that all steps share.
        return jnp.tanh(0.1 * (x @ normed(p["square"]) + h @ (p["square"] * 0.5))), h

    return end(jax.lax.scan(step, jnp.zeros(10), rows)[1])


def side_by_side(p, rows):
    kernel = jnp.concatenate([p["square"], p["layers"][0]], axis=1)
    return end(rows @ kernel)


def joined_in_scan(p, rows):
    def step(h, x):
        return jnp.tanh(0.1 * h @ jnp.concatenate([p["w"].T, p["b"].T], axis=1)[:, :10]), x.sum()

    return end(jax.lax.scan(step, rows[0], rows)[0])


# name: (loss of (params, x, rows, image), parameter, words of the reason in `explain`)
USES = {
    "two matrices": (lambda p, x, r, i: end(x @ (p["a"] @ p["b"])), "a", "enters dot_general"),
    "two matrices, transposed": (lambda p, x, r, i: end(r[0] @ (p["a"] @ p["b"]).T), "b", "enters dot_general"),
    "frozen and scaled low rank": (
        lambda p, x, r, i: end(x @ (mask() + 0.3 * (p["a"] @ p["b"]))), "a", "enters dot_general"),
    "matrices, larger than their product": (
        lambda p, x, r, i: end(x @ (p["w"] @ p["square"])), "w", "pulled back"),
    "sum": (lambda p, x, r, i: end(x @ (p["w"] - p["v"])), "v", "enters dot_general"),
    "scaled by a number, nothing contracted": (
        lambda p, x, r, i: end(jnp.einsum("i,ij->ij", x, 0.5 * (p["w"] * p["s"]))), "w", "no larger"),
    "scaled columns": (lambda p, x, r, i: end(x @ (p["w"] * p["s"])), "w", "enters dot_general"),
    "scaled rows": (lambda p, x, r, i: end(r @ (p["w"] * p["s"]).T), "w", "pulled back"),
    "divided by a norm": (lambda p, x, r, i: end(x @ (p["w"] / jnp.linalg.norm(p["w"]))), "w", "scales"),
    "weight norm": (lambda p, x, r, i: end(x @ (p["s"] * normed(p["w"]))), "w", "scales"),
    "weight norm of rows": (lambda p, x, r, i: end(r @ (p["s"] * normed(p["w"])).T), "w", "pulled back"),
    "weight norm at many positions": (
        lambda p, x, r, i: end(r @ (p["s"] * normed(p["square"]))), "square", "scales"),
    "weight norm, other operand": (
        lambda p, x, r, i: end(jnp.einsum("oi,i->o", normed(p["w"].T, 1), x)), "w", "scales"),
    "two norms": (
        lambda p, x, r, i: end(x @ (p["w"] / jnp.abs(p["w"]).sum(0) / jnp.square(p["w"]).sum(0))), "w", "scales"),
    "signed squares": (
        lambda p, x, r, i: end(x @ (p["w"] / (p["w"] * jnp.abs(p["w"]) + 9).sum(0))), "w", "scales"),
    "a norm and its parameter": (
        lambda p, x, r, i: end(x @ p["w"]) + end(jnp.linalg.norm(p["w"], axis=0) * x.sum()), "w", "scales"),
    "decay": (lambda p, x, r, i: end(x @ p["w"]) + 0.1 * (p["w"] ** 2).sum(), "w", "scales"),
    "standardised": (lambda p, x, r, i: end(x @ standardised(p["w"], 0)), "w", "pulled back"),
    "masked": (lambda p, x, r, i: end(x @ (p["w"] * mask())), "w", "pulled back"),
    "masked by itself": (lambda p, x, r, i: end(x @ jnp.where(p["w"] > 0, p["w"], 0)), "w", "pulled back"),
    "itself and masked": (
        lambda p, x, r, i: end(x @ (p["w"] * mask())) + end(x @ p["w"]), "w", "pulled back"),
    "computed, at two sites": (
        lambda p, x, r, i: end(jnp.tanh(x @ (p["w"] * mask())) @ (p["w"] * mask()).T), "w", "pulled back"),
    "computed once, at two sites": (
        lambda p, x, r, i: (lambda w: end(jnp.tanh(x @ w) @ w.T))(p["w"] * mask()), "w", "pulled back"),
    "positive": (lambda p, x, r, i: end(x @ jax.nn.softplus(p["w"])), "w", "pulled back"),
    "mixed layers": (
        lambda p, x, r, i: end(r @ jnp.einsum("l,lij->ij", jax.nn.softmax(p["s"][:3]), p["layers"])),
        "layers", "pulled back"),
    "stacked": (
        lambda p, x, r, i: end(jnp.einsum("i,kij->kj", x, jnp.stack([p["w"], p["v"]]))), "v", "joined"),
    "side by side": (lambda p, x, r, i: side_by_side(p, r), "square", "joined"),
    "side by side, one more use": (
        lambda p, x, r, i: side_by_side(p, r) + end(r @ p["square"]), "square", "pulled back"),
    "side by side with itself": (
        lambda p, x, r, i: end(x @ jnp.concatenate([p["w"], p["w"]], 1)), "w", "pulled back"),
    "side by side with zeros": (
        lambda p, x, r, i: end(x @ jnp.concatenate([p["w"], jnp.zeros((12, 3))], 1)), "w", "pulled back"),
    "side by side, in a scan": (lambda p, x, r, i: joined_in_scan(p, r), "w", "joined"),
    "computed in a scan": (lambda p, x, r, i: recurrent(p, r), "square", "scales"),
    "layers of low rank": (
        lambda p, x, r, i: end(jax.lax.scan(
            lambda h, ab: (jnp.tanh(h @ (jnp.eye(10) + ab[0] @ ab[1])), None),
            0.1 * r, (p["layers_a"], p["layers_b"]))[0]),
        "layers_a", "dot_general"),
    "layers computed in the scan": (
        lambda p, x, r, i: end(jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ jnp.tanh(w)), None), 0.1 * r, p["layers"])[0]),
        "layers", "pulled back"),
    "layers of what is computed, computed in the scan": (
        lambda p, x, r, i: (lambda w: end(x @ w[0]) + end(jax.lax.scan(
            lambda h, w: (jnp.tanh(h + x @ jnp.tanh(w)), None), jnp.zeros(10), w)[0])
        )(jnp.stack([p["w"], p["v"]])),
        "w", "pulled back"),
    "layers computed before the scan": (
        lambda p, x, r, i: end(jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), 0.1 * r, jnp.tanh(p["layers"]))[0]),
        "layers", "pulled back"),
    "normed table": (
        lambda p, x, r, i: end(normed(p["table"], 1)[jnp.abs(x).astype(int)]), "table", "pulled back"),
    "normed and tied table": (
        lambda p, x, r, i: (lambda t: end(t[jnp.abs(x).astype(int)] @ t.T))(normed(p["table"], 1)),
        "table", "pulled back"),
    "kernel with weight norm": (
        lambda p, x, r, i: end(conv(i, p["gain"] * normed(p["kernel"], (0, 1, 2)))), "kernel", "scales"),
    "standardised kernel": (
        lambda p, x, r, i: end(conv(i, standardised(p["kernel"], (0, 1, 2)))), "kernel", "pulled back"),
    "in a checkpoint": (
        lambda p, x, r, i: jax.checkpoint(lambda w: end(x @ (w * mask())))(p["w"]), "w", "pulled back"),
    "in a nested jit": (
        lambda p, x, r, i: jax.jit(lambda w: end(x @ jax.jit(normed)(w)))(p["w"]), "w", "pulled back"),
    "by a rule of its own": (
        lambda p, x, r, i: end(x @ jax.nn.relu(p["w"])), "w", "pulled back"),
    "all of it constant": (
        lambda p, x, r, i: end(x @ (p["v"] * jax.lax.stop_gradient(p["w"]))), "v", "pulled back"),
}  # fmt: skip


def stacked_gradients(loss, params, batch):
    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0))(params, *batch)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("use", slow.but([*USES][::3], USES))
def test_computed_weights_are_exact(use):
    loss, parameter, words = USES[use]
    with enable_x64(True):
        params, batch = make_params(), make_batch()
        stacked = jax.jit(lambda p, *b: stacked_gradients(loss, p, b))(params, *batch)
        squares = [np.sum(np.square(g), axis=tuple(range(1, g.ndim))) for g in stacked.values()]
        tau = float(np.sqrt(np.median(sum(squares))))
        results = in_all_modes(loss, tau, ("one_pass", "two_pass"))(params, *batch)
        for _, grads, _ in results.values():
            assert_close(grads, clipped_mean(stacked, np.full(N, tau)), 1e-10)
        plan = psc.clipped_grad(loss, tau, mode="one_pass").explain(params, *batch)
        rows = {row.parameter: row for row in plan.rows}
        assert words in rows[f"['{parameter}']"].reason


@pytest.mark.parametrize(
    ("divisor", "radial"),
    [
        (lambda w: jnp.sqrt((w * w).sum(0)), True),
        (lambda w: jnp.sqrt(jnp.square(w).sum(0) + 1e-6), True),
        (lambda w: (jnp.abs(w) ** 2).sum(0), True),
        (lambda w: jnp.sqrt((w * w).sum()), False),  # of all columns, not a norm of each column
        (lambda w: jnp.abs(w).sum(0), False),
        (lambda w: (w * jnp.abs(w)).sum(0), False),
        (lambda w: (w**3).sum(0), False),
        (lambda w: jnp.square(w).sum(0) + w[0], False),
    ],
)
def test_sums_of_squares_are_told_from_other_divisors(divisor, radial):
    kinds = [jax.ShapeDtypeStruct((12, 10), jnp.float32)]
    assert is_radial(lambda leaves: divisor(leaves[0]), kinds, 0, (1,)) is radial


def test_micro_batches_seeds_and_bad_samples_do_not_matter():
    loss = USES["masked"][0]
    with enable_x64(True):
        params, batch = make_params(), make_batch()
        f = jax.jit(psc.clipped_grad(loss, 0.5))
        wanted = f(params, *batch)
        in_slices = psc.clipped_grad(loss, 0.5, microbatch_size=2)
        assert_close(jax.jit(in_slices)(params, *batch), wanted, 1e-10)
        seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
        over_seeds = jax.jit(jax.vmap(f, in_axes=(0, None, None, None)))
        first = jax.tree.map(lambda leaf: leaf[0], over_seeds(seeds, *batch))
        assert_close(first, wanted, 1e-10)
        bad = tuple(array.at[1].set(jnp.nan) for array in batch)
        others = np.array([0, 2, 3, 4])
        without = f(params, *(array[others] for array in batch))
        dropped = f(params, *bad)
        assert_close(dropped, jax.tree.map(lambda leaf: leaf * 4 / 5, without), 1e-10)
