"""List calls of JAX's primitives, in a table for each pattern of operands.

`rules.py` draws the operands; these tables have the operations. Operands are mapped into an
operation's domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Run: TypeAlias = Callable[..., Any]


def within(x: Any, low: float, high: float) -> Any:
    """Map the entries of x into an interval, smoothly."""
    return (low + high) / 2 + (high - low) / 2 * lax.sin(x)


def positive(x: Any) -> Any:
    return within(x, 0.4, 2.0)


def unit(x: Any) -> Any:
    return within(x, -0.8, 0.8)


def share(x: Any) -> Any:
    return within(x, 0.1, 0.9)


def real_parts(z: Any) -> Any:
    """Return a real array from a complex one."""
    return jnp.real(z) + 0.5 * jnp.imag(z)


ONE_DEVICE = jax.sharding.NamedSharding(
    jax.sharding.Mesh(jax.devices()[:1], ("i",)), jax.sharding.PartitionSpec()
)

# Functions of one array of any shape.
ELEMENTWISE: dict[str, Run] = {
    "abs": lax.abs,
    "acos": lambda x: lax.acos(unit(x)),
    "acosh": lambda x: lax.acosh(1 + positive(x)),
    "asin": lambda x: lax.asin(unit(x)),
    "asinh": lax.asinh,
    "atan": lax.atan,
    "atanh": lambda x: lax.atanh(unit(x)),
    "bessel_i0e": lax.bessel_i0e,
    "bessel_i1e": lax.bessel_i1e,
    "bitcast": lambda x: x * (lax.bitcast_convert_type(x, jnp.int64) > 0),
    "cbrt": lambda x: lax.cbrt(positive(x)),
    "ceil": lambda x: x * lax.ceil(2 * x),
    "clamp": lambda x: lax.clamp(-0.5, x, 0.7),
    "complex": lambda x: jnp.abs(lax.complex(x, 0.3 - x)),
    "conj": lambda x: real_parts(lax.conj(lax.complex(x, lax.sin(x)))),
    "copy": jnp.copy,
    "cos": lax.cos,
    "cosh": lambda x: lax.cosh(unit(x)),
    "device_put": lambda x: jax.device_put(x),
    "digamma": lambda x: lax.digamma(positive(x)),
    "erf": lax.erf,
    "erf_inv": lambda x: lax.erf_inv(unit(x)),
    "erfc": lax.erfc,
    "exp": lambda x: lax.exp(unit(x)),
    "exp2": lambda x: lax.exp2(unit(x)),
    "expm1": lambda x: lax.expm1(unit(x)),
    "floor": lambda x: x * lax.floor(2 * x),
    "integer_pow": lambda x: lax.integer_pow(x, 3) / 4,
    "is_finite": lambda x: jnp.where(lax.is_finite(x), x, 0.0),
    "lgamma": lambda x: lax.lgamma(positive(x)),
    "log": lambda x: lax.log(positive(x)),
    "log1p": lambda x: lax.log1p(positive(x)),
    "logistic": lax.logistic,
    "neg": lax.neg,
    "nextafter": lambda x: x * lax.nextafter(*map(lax.stop_gradient, (x, x + 1))),
    "not": lambda x: jnp.where(~(x > 0), x, 0.5 * x),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(x, ONE_DEVICE),
    "optimization_barrier": lax.optimization_barrier,
    "polygamma": lambda x: lax.polygamma(jnp.ones_like(x), 1 + positive(x)),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 23),
    "round": lambda x: x * lax.round(3 * x),
    "rsqrt": lambda x: lax.rsqrt(positive(x)),
    "sign": lambda x: x * lax.sign(x),
    "sin": lax.sin,
    "sinh": lambda x: lax.sinh(unit(x)),
    "sqrt": lambda x: lax.sqrt(positive(x)),
    "square": lambda x: lax.square(x) / 2,
    "stop_gradient": lambda x: x + lax.stop_gradient(x),
    "tan": lambda x: lax.tan(unit(x)),
    "tanh": lax.tanh,
    "while": lambda x: lax.while_loop(lambda i: i < 3, lambda i: i + 1, 1) * x / 3,
    "zeta": lambda x: x * lax.zeta(*map(lax.stop_gradient, (1 + positive(x), positive(x)))),
}

# Functions of two arrays of the same shape.
PAIRS: dict[str, Run] = {
    "add": lax.add,
    "and, or, xor": lambda x, y: jnp.where((x > 0) & (y > 0) | ((x < -1) ^ (y < -1)), x, y),
    "atan2": lambda x, y: lax.atan2(x, positive(y)),
    "clamp to": lambda x, y: lax.clamp(-positive(y), x, positive(y)),
    "compare": lambda x, y: jnp.where((x <= y) | (x == y), x, 2 * y) * (x != y) * (x >= -y),
    "complex product": lambda x, y: real_parts(lax.complex(x, y) * lax.complex(y, x)) / 2,
    "div": lambda x, y: x / positive(y),
    "igamma": lambda x, y: lax.igamma(positive(x), positive(y)),
    "igammac": lambda x, y: lax.igammac(positive(x), positive(y)),
    "max": lax.max,
    "min": lax.min,
    "mul": lax.mul,
    "pow": lambda x, y: lax.pow(positive(x), unit(y)),
    "regularized_incomplete_beta": lambda x, y: lax.betainc(1.5, 0.7, share(x)) * y,
    "rem": lambda x, y: lax.rem(x, positive(y)),
    "select_n": lambda x, y: lax.select(x > 0, y, x),
    "sub": lax.sub,
    "total order": lambda x, y: jnp.where(
        lax.le_to_p.bind(x, y) & ~lax.eq_to_p.bind(x, lax.sin(x)), x, y
    ),
}


def _halves(x: Any, axis: int) -> Any:
    first, second = lax.split(x, (1, x.shape[axis] - 1), axis)
    return jnp.concatenate([second, 2 * first], axis)


def _pooled(x: Any, axis: int, operation: Callable[..., Any], start: float) -> Any:
    window = tuple(2 if a == axis else 1 for a in range(x.ndim))
    return lax.reduce_window(x, start, operation, window, (1,) * x.ndim, "SAME")


# Functions of one array and one of its axes.
ALONG: dict[str, Run] = {
    "all_gather of vmap": lambda x, axis: jax.vmap(
        lambda row: lax.all_gather(row, "i").sum(0) * row, axis, axis, axis_name="i"
    )(x),
    "approx_max_k": lambda x, axis: lax.approx_max_k(x, 1, axis)[0],
    "argmax": lambda x, axis: x * jnp.expand_dims(lax.argmax(x, axis, jnp.int32), axis),
    "argmin": lambda x, axis: x * jnp.expand_dims(lax.argmin(x, axis, jnp.int32), axis),
    "broadcast_in_dim": lambda x, axis: jnp.repeat(jnp.expand_dims(x, axis), 2, axis),
    "concatenate": lambda x, axis: lax.concatenate([x, -x], axis),
    "cumlogsumexp": lambda x, axis: lax.cumlogsumexp(x, axis),
    "cummax": lambda x, axis: lax.cummax(x, axis),
    "cummin": lambda x, axis: lax.cummin(x, axis, reverse=True),
    "cumprod": lambda x, axis: lax.cumprod(positive(x), axis),
    "cumsum": lambda x, axis: lax.cumsum(x, axis) / 2,
    "dynamic_slice": lambda x, axis: lax.dynamic_slice_in_dim(x, 1, x.shape[axis] // 2, axis),
    "expand_dims": lambda x, axis: lax.expand_dims(x, (axis,)),
    "fft": lambda x, axis: real_parts(jnp.fft.fft(x, axis=axis)) / 2,
    "irfft": lambda x, axis: jnp.fft.irfft(x, 4, axis),
    "rfft": lambda x, axis: jnp.abs(jnp.fft.rfft(x, axis=axis) + 2),
    "iota": lambda x, axis: x * lax.broadcasted_iota(x.dtype, x.shape, axis),
    "pad": lambda x, axis: lax.pad(x, 0.5, [(int(a == axis), 0, 1) for a in range(x.ndim)]),
    "psum of vmap": lambda x, axis: jax.vmap(
        lambda row: row - lax.pmean(row, "i"), axis, axis, axis_name="i"
    )(x),
    "reduce": lambda x, axis: lax.reduce(x, 1.0, lambda a, b: lax.add(lax.mul(a, 1.0), b), (axis,)),
    "reduce_max": lambda x, axis: jnp.max(x, axis, initial=-9.0),
    "reduce_min": lambda x, axis: jnp.min(x, axis, initial=9.0),
    "reduce_prod": lambda x, axis: jnp.prod(positive(x), axis),
    "reduce_sum": lambda x, axis: jnp.sum(x, axis),
    "reduce_and, reduce_or": lambda x, axis: jnp.where(
        jnp.all(x > -1, axis) | jnp.any(x > 1, axis), jnp.sum(x, axis), 0.5
    ),
    "reduce_window_max": lambda x, axis: _pooled(x, axis, lax.max, -jnp.inf),
    "reduce_window_min": lambda x, axis: _pooled(x, axis, lax.min, jnp.inf),
    "reduce_window": lambda x, axis: (
        x * _pooled(lax.stop_gradient(x), axis, lambda a, b: lax.add(lax.mul(a, 1.0), b), 0.0)
    ),
    "reduce_window_sum": lambda x, axis: _pooled(x, axis, lax.add, 0.0),
    "gradient of pooling": lambda x, axis: jax.grad(
        lambda x: jnp.sum(jnp.square(_pooled(x, axis, lax.max, -jnp.inf)))
    )(x),
    "tangent of pooling": lambda x, axis: jax.jvp(
        lambda x: _pooled(x, axis, lax.max, -jnp.inf), (x,), (lax.sin(x),)
    )[1],
    "rev": lambda x, axis: lax.rev(x, (axis,)),
    "slice": lambda x, axis: lax.slice_in_dim(x, 0, None, 2, axis),
    "sort": lambda x, axis: lax.sort(x, axis),
    "sort of two": lambda x, axis: lax.sort((x, lax.sin(x)), axis, num_keys=1)[1],
    "split": _halves,
    "squeeze": lambda x, axis: lax.squeeze(x[(slice(None),) * axis + (slice(0, 1),)], (axis,)),
    "stack": lambda x, axis: jnp.stack([x, x * x], axis),
    "tile": lambda x, axis: jnp.tile(x, [2 if a == axis else 1 for a in range(x.ndim)]),
    "top_k": lambda x, axis: lax.top_k(jnp.moveaxis(x, axis, -1), 1)[0],
    "transpose": lambda x, axis: jnp.moveaxis(x, axis, 0),
    "unstack": lambda x, axis: jnp.unstack(x, axis=axis)[-1],
    "associative_scan": lambda x, axis: lax.associative_scan(
        lambda a, b: a * 0.5 + b, x, axis=axis
    ),
    "scan": lambda x, axis: lax.scan(
        lambda c, row: (lax.tanh(c + row), c * row),
        jnp.zeros_like(jnp.moveaxis(x, axis, 0)[:1].sum(0)),
        jnp.moveaxis(x, axis, 0),
    )[1],
    "reshape": lambda x, axis: jnp.reshape(
        x, (*x.shape[:axis], 1, x.shape[axis], *x.shape[axis + 1 :])
    ),
}

# Functions of an array with at least one axis, another of its shape, and integers of any shape.
INDEXED: dict[str, Run] = {
    "gather": lambda x, y, i: jnp.take(x, i, 0, mode="clip"),
    "gather, filled": lambda x, y, i: x.at[i].get(mode="fill", fill_value=0.5),
    "gather of two": lambda x, y, i: jnp.take(x, i, 0, mode="wrap")
    * jnp.take(y, i, 0, mode="wrap"),
    "scatter": lambda x, y, i: x.at[jnp.min(i)].set(y[0], mode="drop"),
    "scatter_add": lambda x, y, i: x.at[i].add(y[0], mode="drop"),
    "scatter_sub": lambda x, y, i: x.at[i].subtract(y[-1], mode="clip"),
    "scatter_mul": lambda x, y, i: x.at[jnp.min(i)].multiply(y[0], unique_indices=True),
    "scatter_max": lambda x, y, i: x.at[i].max(y[0], mode="drop"),
    "scatter_min": lambda x, y, i: x.at[i].min(y[0], mode="drop"),
    "dynamic_slice": lambda x, y, i: lax.dynamic_index_in_dim(x, jnp.max(i), 0),
    "dynamic_slice of an integer sum": lambda x, y, i: lax.dynamic_slice_in_dim(
        x, jnp.sum(i), (x.shape[0] + 1) // 2
    ),
    "dynamic_update_slice": lambda x, y, i: lax.dynamic_update_index_in_dim(
        x, y[-1], jnp.max(i), 0
    ),
    "segment_sum": lambda x, y, i: jax.ops.segment_sum(x, jnp.resize(i, x.shape[:1]), 3),
    "one_hot": lambda x, y, i: jnp.tensordot(jax.nn.one_hot(i, x.shape[0], dtype=x.dtype), x, 1),
    "shifts": lambda x, y, i: x * jnp.sum(
        (i << 1) + (i >> 1) + lax.shift_right_logical(i, jnp.full_like(i, 28)) + lax.population_count(i) + lax.clz(i)
    ) / 100,
    "mulhi": lambda x, y, i: x + jnp.sum(lax.mulhi(i, i + 9) % 5),
    "reduce_xor": lambda x, y, i: x * lax.reduce_xor(i.ravel(), (0,)) / 9,
    "roll": lambda x, y, i: jnp.roll(x, jnp.max(i), 0) * y,
    "switch": lambda x, y, i: lax.switch(
        jnp.max(i), [lambda x, y: x, lambda x, y: x * y, lambda x, y: lax.sin(y)], x, y
    ),
    "cond": lambda x, y, i: lax.cond(jnp.min(i) > 0, lambda x, y: x + y, lax.mul, x, y),
    "fori_loop": lambda x, y, i: lax.fori_loop(
        0, 3, lambda k, v: lax.tanh(v + y * lax.dynamic_index_in_dim(x, k, 0, False)), 0.5 * x
    ),
    "repeated": lambda x, y, i: jnp.repeat(x, jnp.clip(jnp.resize(i, x.shape[:1]), 0, 2), 0,
                                           total_repeat_length=4),
}  # fmt: skip
