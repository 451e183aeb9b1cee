"""Draw other uses of a weight, weights from weights and data from data."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.random_programs.derivatives import with_other_jvp, with_other_vjp
from tests.random_programs.draft import Draft, Rule
from tests.random_programs.program import COMPUTED, FREE, MOVED, Run, Shape, Step, fitted, mixed

BROADCASTS: dict[str, Run] = {
    "x + w": lambda x, w: x + w,
    "x w": lambda x, w: x * w,
    "w - x": lambda x, w: w - x,
    "x / (1 + w²)": lambda x, w: x / (1 + w * w),
    "sin(x w)": lambda x, w: lax.sin(x * w),
    "logaddexp(x, w)": jnp.logaddexp,
    "x w + w": lambda x, w: x * w + w,
    "(x - w)²": lambda x, w: jnp.square(x - w) / 4,
    "x where w > 0": lambda x, w: jnp.where(w > 0, x, w),
}


def broadcast(d: Draft) -> Step:
    x = d.data(1)
    shape = d.shape_of(x)[d.integer(0, len(d.shape_of(x))) :]
    w = d.weight(tuple(1 if d.chance(0.2) else size for size in shape), FREE)
    name, run = d.choose([*BROADCASTS.items()])
    return Step("broadcast", (x, w), lambda x, w: lax.tanh(run(x, w)), name)


# Functions of data x of any shape, resized as needed, and a weight of rank 1 or more.
FREE_USES: dict[str, Run] = {
    "penalty": lambda x, w: lax.sin(jnp.mean(x)) + jnp.mean(w * w),
    "scattered into": lambda x, w: w.at[0].add(jnp.mean(x).astype(w.dtype)),
    "written over": lambda x, w: lax.dynamic_update_slice_in_dim(w, fitted(x, w[:1]), 0, 0),
    "concatenated": lambda x, w: jnp.concatenate([w, fitted(x, w)]),
    "quadratic": lambda x, w: lax.tanh(jnp.sum(fitted(x, w) * w) * w),
    "softmax of the sum": lambda x, w: jax.nn.softmax(fitted(x, w) + w),
    "layer norm": lambda x, w: w * jax.nn.standardize(fitted(x, w), epsilon=0.1),
    "its sign": lambda x, w: jnp.sign(w) * fitted(x, w),
    "chosen by its largest": lambda x, w: lax.sin(jnp.ravel(x)[jnp.argmax(w) % x.size]) + w[0],
    "left of a convolution": lambda x, w: lax.conv_general_dilated(
        jnp.reshape(w, (1, 1, -1)), fitted(x, jnp.zeros((1, 1, 2), w.dtype)), (1,), "SAME"
    ),
    "cumulated": lambda x, w: lax.tanh(jnp.cumsum(w * fitted(x, w), 0)),
}


def free_use(d: Draft) -> Step:
    x = d.data()
    w, (name, run) = d.some_weight(FREE), d.choose([*FREE_USES.items()])
    return Step("free_use", (x, w), run, name)


FREE_STEPS: dict[Rule, float] = {broadcast: 2, free_use: 1}


# Weights from weights


def _some_slice(d: Draft, size: int) -> slice:
    start = d.integer(0, size - 1)
    return d.choose([slice(start, None), slice(start, None, 2), slice(None, None, -1)])


def _move_one(d: Draft, shape: Shape) -> tuple[str, Run]:
    """Draw an operation that moves, removes or repeats entries of one array."""
    rank, axis = len(shape), d.integer(0, len(shape) - 1)
    order, slices = d.shuffled(range(rank)), tuple(_some_slice(d, size) for size in shape)
    index, picked = d.integer(0, shape[axis] - 1), [d.integer(0, shape[axis] - 1) for _ in range(3)]
    parts, piece = [d.integer(0, shape[axis])], d.integer(0, 1)
    piece = piece if 0 < parts[0] < shape[axis] else int(parts[0] == 0)
    half = (shape[axis] + 1) // 2
    target = _regrouped(d, shape)
    ways: dict[str, Run] = {
        f"transpose {order}": lambda w: w.transpose(order),
        f"reshape {target}": lambda w: w.reshape(target),
        f"{slices}": lambda w: w[slices],
        f"reverse {axis}": lambda w: jnp.flip(w, axis),
        f"dynamic_slice {index} of {axis}": lambda w: lax.dynamic_slice_in_dim(
            w, index, half, axis
        ),
        f"split {parts} of {axis}, {piece}": lambda w: jnp.split(w, parts, axis)[piece],
        f"expand {axis}": lambda w: jnp.expand_dims(w, axis),
        f"index {index} of {axis}": lambda w: lax.index_in_dim(w, index, axis, keepdims=False),
        f"take {picked} of {axis}": lambda w: jnp.take(w, jnp.array(picked), axis),
        f"tile {axis}": lambda w: jnp.concatenate([w, w], axis),
        f"roll {axis}": lambda w: jnp.roll(w, 1, axis),
        f"pad {axis}": lambda w: jnp.pad(w, [(a == axis, 0) for a in range(rank)]),
        "broadcast": lambda w: jnp.broadcast_to(w, (2, *w.shape)),
        "jit, checkpoint": jax.jit(
            lambda w: jax.checkpoint(jnp.swapaxes, static_argnums=(1, 2))(w, 0, axis)
        ),
    }
    return d.choose([*ways.items()])


def _regrouped(d: Draft, shape: Shape) -> Shape:
    """Draw another shape with equally many entries."""
    size, target = math.prod(shape), []
    while size > 1 and len(target) < 3:
        target.append(d.choose([k for k in range(1, size + 1) if size % k == 0]))
        size //= target[-1]
    return (*target, size) if size > 1 or not target else tuple(target)


def moved(d: Draft) -> Step:
    w = d.some_weight(MOVED)
    name, run = _move_one(d, d.shape_of(w))
    return Step("moved", (w,), run, name)


def cast(d: Draft) -> Step:
    w = d.some_weight(MOVED)
    dtype = d.choose(d.dtypes.params + d.dtypes.data)
    return Step("cast", (w,), lambda w: w.astype(dtype), dtype)


def joined(d: Draft) -> Step:
    """Draw a stack or concatenation of several weights, or a slice of it."""
    first = d.some_weight(MOVED, 1, 3)
    others = [d.weight(d.shape_of(first)) for _ in range(d.integer(1, 2))]
    axis, way = (
        d.integer(0, len(d.shape_of(first)) - 1),
        d.choose(["stack", "concatenate", "piece"]),
    )
    ways: dict[str, Run] = {
        "stack": lambda *w: jnp.stack(w, axis),
        "concatenate": lambda *w: jnp.concatenate(w, axis),
        "piece": lambda *w: jnp.stack(w)[1],
    }
    return Step("joined", (first, *others), ways[way], f"{way} {axis}")


def _square(w: Any) -> Any:
    return w.T @ w if w.ndim == 2 else w * w


COMPUTATIONS: dict[str, Run] = {
    "scaled": lambda w: 0.5 * w,
    "negative": jnp.negative,
    "tanh": lax.tanh,
    "square": lambda w: _square(w) / math.sqrt(w.shape[0]),
    "standardised": lambda w: (w - w.mean(0)) / jnp.sqrt(w.var(0) + 0.3),
    "normed": lambda w: w / jnp.sqrt(jnp.sum(w * w, -1, keepdims=True) + 0.3),
    "softmax": lambda w: jax.nn.softmax(w, axis=0),
    "lower part": lambda w: jnp.tril(w) if w.ndim == 2 else jnp.cumsum(w, 0) / w.shape[0],
    "times its stopped self": lambda w: w * lax.stop_gradient(w),
    "stopped": lax.stop_gradient,
    "half stopped": lambda w: w.at[0].set(lax.stop_gradient(w[0])),
    "its positive part": lambda w: w * (w > 0),
    "rounded straight through": lambda w: w + lax.stop_gradient(jnp.round(2 * w) / 2 - w),
    "summed": lambda w: w.sum(0) / math.sqrt(w.shape[0]),
    "diagonal matrix": lambda w: jnp.diag(jnp.ravel(w)[:4]),
    "scanned alone": lambda w: lax.scan(lambda c, row: (lax.tanh(c + row), c * row), w[0], w)[1],
    "custom vjp": lambda w: with_other_vjp(lax.sin)(w),
    "custom jvp": lambda w: with_other_jvp(lax.sin)(w),
    "jit": jax.jit(lambda w: jax.jit(jnp.sin)(w) * 0.8),
    "checkpoint": lambda w: jax.checkpoint(lambda w: lax.sin(w) * w)(w),
    "cond": lambda w: lax.cond(jnp.mean(w) > 0, lax.sin, lax.tanh, w),
    "while": lambda w: w * lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0) / 3,
}


def computed(d: Draft) -> Step:
    w = d.some_weight(COMPUTED)
    name, run = d.choose([*COMPUTATIONS.items()])
    return Step("computed", (w,), run, name)


def masked(d: Draft) -> Step:
    w = d.some_weight(COMPUTED)
    mask = d.rng.random(d.shape_of(w)) < 0.6
    return Step("masked", (w,), lambda w: w * mask)


# Functions of weights with equal shapes.
COMBINATIONS: dict[str, Run] = {
    "sum": lambda v, w: v + w,
    "product": lambda v, w: v * w,
    "weight norm": lambda v, w: w * v / jnp.sqrt(jnp.sum(v * v) / v.size + 0.3),
    "A Bᵀ": lambda v, w: jnp.tensordot(v, w, ([-1], [-1])) / math.sqrt(v.shape[-1]),
    "frozen + A Bᵀ": lambda v, w: 0.5 + jnp.tensordot(v, w, ([0], [0])) / math.sqrt(v.shape[0]),
    "outer": lambda v, w: jnp.outer(v[..., 0], w[..., 0]),
    "chosen by the other": lambda v, w: jnp.where(v > 0, v, w),
    "interpolated": lambda v, w: 0.3 * v + 0.7 * lax.sin(w),
    "stacked": lambda v, w: jnp.stack([v, 2 * w]),
}


def combined(d: Draft) -> Step:
    v = d.some_weight(COMPUTED, 1, 3)
    w = d.weight(d.shape_of(v), COMPUTED)
    name, run = d.choose([*COMBINATIONS.items()])
    return Step("combined", (v, w), run, name)


WEIGHTS: dict[Rule, float] = {
    moved: 4,
    cast: 0.7,
    joined: 1.2,
    computed: 1.5,
    masked: 0.5,
    combined: 1.2,
}


# Data from data


DATA: dict[str, Run] = {
    "tanh": lax.tanh,
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "standardised": lambda x: jax.nn.standardize(x, epsilon=0.1),
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(-1) / math.sqrt(x.shape[-1]),
    "transpose": jnp.transpose,
    "flat": jnp.ravel,
    "outer": lambda x: lax.sin(jnp.outer(x.ravel()[:5], x.ravel()[:4])),
    "image": lambda x: fitted(x, jnp.zeros((2, 5, 4), x.dtype)),
    "sequence": lambda x: fitted(x, jnp.zeros((5, 3), x.dtype)),
    "Gram matrix": lambda x: lax.tanh(x @ x.T) if x.ndim == 2 else lax.cos(x),
    "cumulated": lambda x: jnp.cumsum(x, 0) / x.shape[0],
    "every other": lambda x: x[::2],
    "reversed": lambda x: x[::-1],
    "stopped": lax.stop_gradient,
    "half stopped": lambda x: x + lax.stop_gradient(x),
    "custom jvp": lambda x: with_other_jvp(lax.sin)(x),
    "custom vjp": lambda x: with_other_vjp(lax.sin)(x),
    "gelu": jax.nn.gelu,
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
}


def data_alone(d: Draft) -> Step:
    x = d.data(1)
    name, run = d.choose([*DATA.items()])
    return Step("data_alone", (x,), run, name)


def data_joined(d: Draft) -> Step:
    x, y = d.data(1, 3), d.data()
    ways: dict[str, Run] = {
        "product": lambda x, y: lax.mul(x, lax.tanh(fitted(y, x))),
        "residual": mixed,
        "concatenated": lambda x, y: jnp.concatenate([x.ravel()[:12], y.ravel()[:8]]),
    }
    name, run = d.choose([*ways.items()])
    return Step("data_joined", (x, y), run, name)


def data_cast(d: Draft) -> Step:
    x, dtype = d.data(), d.choose(d.dtypes.params + d.dtypes.data)
    return Step("data_cast", (x,), lambda x: x.astype(dtype), dtype)


DATA_STEPS: dict[Rule, float] = {data_alone: 2, data_joined: 1, data_cast: 0.4}
