"""List computations on parameters alone, and custom derivative rules and casts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.fuzz.lax_tables import Run, positive


def _mean(x: Any) -> Any:
    return jnp.sum(x) / max(x.size, 1)


def _matrix(w: Any) -> Any:
    return w.reshape(w.shape[0], -1)


def _largest_singular_value(w: Any) -> Any:
    w = _matrix(w)
    u = jnp.ones(w.shape[0])
    for _ in range(2):
        v = w.T @ u + 0.1
        u = w @ (v / jnp.linalg.norm(v)) + 0.1
        u = lax.stop_gradient(u / jnp.linalg.norm(u))
    return u @ w @ lax.stop_gradient(v / jnp.linalg.norm(v))


# Scalars computed from one array.
REGULARISERS: dict[str, Run] = {
    "L2": lambda w: _mean(w * w),
    "L2-SP": lambda w: _mean(jnp.square(w - 0.3)),
    "L1": lambda w: _mean(jnp.abs(w)),
    "group lasso": lambda w: jnp.sum(jnp.sqrt(jnp.sum(jnp.square(_matrix(w)), 1) + 0.1)) / 3,
    "elastic net": lambda w: _mean(jnp.abs(w)) + _mean(w * w),
    "variance": lambda w: jnp.var(w),
    "entropy": lambda w: -jnp.sum(jax.nn.softmax(w, 0) * jax.nn.log_softmax(w, 0)) / 3,
    "orthogonality": lambda w: _mean(jnp.square(_matrix(w) @ _matrix(w).T - jnp.eye(w.shape[0]))),
    "nuclear": lambda w: _mean(jnp.sqrt(jnp.sum(w * w, 0) + 0.2)),
    "log barrier": lambda w: -_mean(jnp.log(positive(w))),
    "global norm": lambda w: optax.tree.norm({"w": w, "one": jnp.ones(2)}),
    "Huber": lambda w: _mean(optax.huber_loss(w, delta=0.5)),
    "total variation": lambda w: _mean(jnp.abs(jnp.diff(w, axis=0))),
    "determinant": lambda w: jnp.linalg.slogdet(
        _matrix(w).T @ _matrix(w) + jnp.eye(w.size // w.shape[0])
    )[1] / 4,
}  # fmt: skip

# Arrays computed from one array.
COMPUTED: dict[str, Run] = {
    "w / std(w)": lambda w: w / jnp.sqrt(jnp.var(w) + 0.1),
    "standardised rows": lambda w: (
        (w - w.mean(-1, keepdims=True)) / jnp.sqrt(w.var(-1, keepdims=True) + 0.2)
    ),
    "weight norm": lambda w: w / jnp.sqrt(jnp.sum(w * w, 0, keepdims=True) + 0.1),
    "weight norm of all": lambda w: w / jnp.sqrt(jnp.sum(w * w) + 0.1),
    "weight norm, L1": lambda w: w / (jnp.sum(jnp.abs(w), 0, keepdims=True) + 0.3),
    "its fourth powers": lambda w: w / (jnp.sum(w**4, 0, keepdims=True) + 0.5),
    "its sum of products with a roll": lambda w: (
        w / (jnp.sum(jnp.square(w * jnp.roll(w, 1, 0)), 0, keepdims=True) + 0.5)
    ),
    "square of a sum": lambda w: w / (jnp.square(jnp.sum(w, 0, keepdims=True)) + 0.5),
    "spectral norm": lambda w: w / (1 + jnp.abs(_largest_singular_value(w))),
    "softmax": lambda w: jax.nn.softmax(w, -1),
    "sigmoid": jax.nn.sigmoid,
    "exp": lambda w: jnp.exp(0.3 * w),
    "softplus": jax.nn.softplus,
    "symmetric": lambda w: _square(w) + _square(w).T,
    "antisymmetric": lambda w: _skew(w),
    "triangular": lambda w: jnp.tril(_matrix(w)),
    "product with itself": lambda w: _matrix(w) @ _matrix(w).T / 2,
    "soft threshold": lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - 0.3, 0),
    "half detached": lambda w: w + lax.stop_gradient(0.5 * w),
    "its larger part": lambda w: w * (jnp.abs(w) >= jnp.median(jnp.abs(w))),
    "normal noise": lambda w: w + 0.1 * jax.random.normal(jax.random.key(0), w.shape, w.dtype),
    "drop connect": lambda w: w * jax.random.bernoulli(jax.random.key(1), 0.7, w.shape),
    "circulant": lambda w: jax.vmap(lambda k: jnp.roll(w.ravel()[:5], k))(jnp.arange(4)),
    "Cayley": lambda w: jnp.linalg.solve(
        jnp.eye(w.shape[0]) + _skew(w) / 4, jnp.eye(w.shape[0]) - _skew(w) / 4
    ),
    "a mutable reference": lambda w: _through_reference(w),
    "its own gradient": lambda w: jax.grad(lambda w: jnp.sum(lax.sin(w) * w))(w),
    "its own Jacobian": lambda w: jax.jacfwd(lambda w: jnp.sum(jnp.cos(w) * w))(w),
    "its tangent": lambda w: jax.jvp(lax.sin, (w,), (w,))[1],
}


def _square(w: Any) -> Any:
    return jnp.resize(w, (w.shape[0], w.shape[0]))


def _skew(w: Any) -> Any:
    return _square(w) - _square(w).T


def _through_reference(w: Any) -> Any:
    ref = jax.new_ref(w)
    ref[...] = ref[...] * 0.5 + 0.1
    ref[0] = lax.sin(ref[0])
    return ref[...]


# Arrays computed from two arrays of the same shape.
DIFFERENCES: dict[str, Run] = {
    "w1 - w0": lambda v, w: v - w,
    "w1 w2": lambda v, w: v * w,
    "w1 w2ᵀ": lambda v, w: _matrix(v) @ _matrix(w).T / 2,
    "weight norm of the other": lambda v, w: v * w / jnp.sqrt(jnp.sum(w * w) + 0.2),
    "FedProx": lambda v, w: _mean(jnp.square(v - w)) * v,
    "interpolation": lambda v, w: 0.25 * v + 0.75 * w,
    "moving average": lambda v, w: 0.9 * lax.stop_gradient(v) + 0.1 * w,
    "gated": lambda v, w: v * jax.nn.sigmoid(w),
    "task vector": lambda v, w: w + 0.4 * (v - w),
    "reparametrised": lambda v, w: (
        v + jnp.exp(0.3 * w) * jax.random.normal(jax.random.key(2), v.shape, v.dtype)
    ),
    "KL": lambda v, w: _mean(v * v + jnp.exp(0.5 * w) - 0.5 * w) * v,
    "cosine": lambda v, w: (
        jnp.sum(v * w) / jnp.sqrt((jnp.sum(v * v) + 0.1) * (jnp.sum(w * w) + 0.1))
    ),
    "stacked": lambda v, w: jnp.stack([v, w - v]),
    "the larger": jnp.maximum,
}


def with_backward(run: Run, backward: Run) -> Run:
    """Return a function of one array whose backward rule is `backward(x, cotangent)`."""

    @jax.custom_vjp
    def ruled(x: Any) -> Any:
        return run(x)

    ruled.defvjp(lambda x: (run(x), x), lambda x, dy: (backward(x, dy),))
    return ruled


@functools.partial(jax.custom_jvp)
def _jvp_not_of_itself(x: Any) -> Any:
    return lax.sin(x)


_jvp_not_of_itself.defjvp(lambda x, dx: (lax.sin(x[0]), 1.3 * dx[0]))

# Functions of one array: with rules linear in the cotangent, and others.
RULES: dict[str, Run] = {
    "reversal": with_backward(lambda x: x, lambda x, dy: -0.5 * dy),
    "rounding straight through": with_backward(lambda x: lax.round(4 * x) / 4, lambda x, dy: dy),
    "rounding by detaching": lambda x: x + lax.stop_gradient(lax.round(4 * x) / 4 - x),
    "binarised": with_backward(jnp.sign, lambda x, dy: jnp.where(jnp.abs(x) < 1, dy, 0)),
    "scaled by the values": with_backward(lax.sin, lambda x, dy: dy * x),
    "flipped": with_backward(lambda x: x, lambda x, dy: jnp.flip(dy)),
    "another derivative": _jvp_not_of_itself,
    "stopped": with_backward(lambda x: x, lambda x, dy: jnp.zeros_like(dy)),
    "cotangent clipped": with_backward(lambda x: x, lambda x, dy: jnp.clip(dy, -0.05, 0.05)),
    "cotangent's sign": with_backward(lambda x: x, lambda x, dy: 0.1 * jnp.tanh(10 * dy)),
    "cotangent normalised": with_backward(
        lambda x: x, lambda x, dy: dy / jnp.sqrt(jnp.sum(dy * dy) + 0.1)
    ),
    "cotangent clipped by norm": with_backward(
        lambda x: x, lambda x, dy: dy * jnp.minimum(1, 0.1 / (jnp.linalg.norm(dy) + 1e-3))
    ),
    "cotangent squared": with_backward(lambda x: x, lambda x, dy: dy * dy),
    "cotangent shifted": with_backward(lambda x: x, lambda x, dy: dy + 0.1 * x),
    "cotangent's positive part": with_backward(lambda x: x, lambda x, dy: jnp.maximum(dy, 0)),
}


def _through(name: str) -> Run:
    return lambda x: x.astype(name).astype(x.dtype)


# Functions of one array: those that round it and its cotangent.
CASTS: dict[str, Run] = {
    **{
        f"through {name}": _through(name)
        for name in ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
    },
    "reduce_precision 8, 7": lambda x: lax.reduce_precision(x, 8, 7),
    "reduce_precision 5, 10": lambda x: lax.reduce_precision(x, 5, 10),
    "reduce_precision 8, 3": lambda x: lax.reduce_precision(x, 8, 3),
    "reduce_precision 11, 52": lambda x: lax.reduce_precision(x, 11, 52),
    "computed in float32": lambda x: lax.sin(x.astype("float32")).astype(x.dtype),
    "as a quantised integer": lambda x: (
        lax.stop_gradient((8 * x).astype("int8")).astype(x.dtype) * x
    ),
}
