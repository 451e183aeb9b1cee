"""List functions of jax.numpy, jax.nn, jax.scipy and linear algebra by pattern of operands."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.fuzz.lax_tables import Run, positive, share, unit, within

# Functions of one array of any shape.
ELEMENTWISE: dict[str, Run] = {
    "nn.celu": jax.nn.celu,
    "nn.elu": jax.nn.elu,
    "nn.gelu": jax.nn.gelu,
    "nn.gelu, exact": lambda x: jax.nn.gelu(x, approximate=False),
    "nn.hard_sigmoid": jax.nn.hard_sigmoid,
    "nn.hard_swish": jax.nn.hard_swish,
    "nn.hard_tanh": jax.nn.hard_tanh,
    "nn.leaky_relu": jax.nn.leaky_relu,
    "nn.log_sigmoid": jax.nn.log_sigmoid,
    "nn.mish": jax.nn.mish,
    "nn.relu": jax.nn.relu,
    "nn.relu6": jax.nn.relu6,
    "nn.selu": jax.nn.selu,
    "nn.sigmoid": jax.nn.sigmoid,
    "nn.silu": jax.nn.silu,
    "nn.soft_sign": jax.nn.soft_sign,
    "nn.softplus": jax.nn.softplus,
    "nn.sparse_plus": jax.nn.sparse_plus,
    "nn.squareplus": jax.nn.squareplus,
    "special.entr": lambda x: jsp.special.entr(positive(x)),
    "special.erfcx of erf": lambda x: jsp.special.erf(x) * jsp.special.erfc(x),
    "special.expi": lambda x: jsp.special.expi(positive(x)),
    "special.gammaln": lambda x: jsp.special.gammaln(positive(x)),
    "special.gamma": lambda x: jsp.special.gamma(1 + positive(x)),
    "special.i0": lambda x: jsp.special.i0(unit(x)),
    "special.i1": lambda x: jsp.special.i1(unit(x)),
    "special.log_ndtr": jsp.special.log_ndtr,
    "special.logit": lambda x: jsp.special.logit(share(x)),
    "special.ndtr": jsp.special.ndtr,
    "special.ndtri": lambda x: jsp.special.ndtri(share(x)),
    "special.multigammaln": lambda x: jsp.special.multigammaln(2 + positive(x), 2) / 4,
    "special.xlogy": lambda x: jsp.special.xlogy(positive(x), positive(2 * x)),
    "special.xlog1py": lambda x: jsp.special.xlog1py(x, positive(x)),
    "stats.norm.logpdf": lambda x: jsp.stats.norm.logpdf(x),
    "stats.t.logpdf": lambda x: jsp.stats.t.logpdf(x, 3.0),
    "stats.gamma.logpdf": lambda x: jsp.stats.gamma.logpdf(positive(x), 1.5),
    "jnp.clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "jnp.float_power": lambda x: jnp.float_power(positive(x), 1.5),
    "jnp.i0": lambda x: jnp.i0(unit(x)),
    "jnp.interp": lambda x: jnp.interp(x, jnp.array([-1.0, 0.2, 1.5]), jnp.array([0.0, 1.0, -1.0])),
    "jnp.mod": lambda x: jnp.mod(x, 0.7),
    "jnp.nan_to_num": jnp.nan_to_num,
    "jnp.piecewise": lambda x: jnp.piecewise(x, [x < 0, x > 1], [lax.sin, lax.square, lax.neg]),
    "jnp.polyval": lambda x: jnp.polyval(jnp.array([0.2, -0.5, 1.0]), x),
    "jnp.rint": lambda x: x * jnp.rint(2 * x),
    "jnp.sinc": jnp.sinc,
    "jnp.trunc": lambda x: x - jnp.trunc(2 * x),
    "jnp.where": lambda x: jnp.where(x > 0.2, x, jnp.exp(jnp.minimum(x, 0.2))),
    "jnp.mean": lambda x: x - jnp.mean(x),
    "jnp.size": lambda x: x * x.size / 5,
}

# Functions of two arrays of the same shape.
PAIRS: dict[str, Run] = {
    "jnp.copysign": jnp.copysign,
    "jnp.fmod": lambda x, y: jnp.fmod(x, positive(y)),
    "jnp.heaviside": lambda x, y: x * jnp.heaviside(x, y),
    "jnp.hypot": lambda x, y: jnp.hypot(x, positive(y)),
    "jnp.logaddexp": jnp.logaddexp,
    "jnp.logaddexp2": jnp.logaddexp2,
    "jnp.select": lambda x, y: jnp.select([x > 1, y > 0], [x, x * y], 0.5),
    "jnp.vdot": lambda x, y: jnp.vdot(x, y) / max(x.size, 1),
    "jnp.outer": lambda x, y: jnp.outer(x.ravel()[:6], y.ravel()[:5]),
    "special.beta": lambda x, y: jsp.special.beta(positive(x), positive(y)) / 4,
    "special.betaln": lambda x, y: jsp.special.betaln(positive(x), positive(y)),
    "special.kl_div": lambda x, y: jsp.special.kl_div(positive(x), positive(y)),
    "special.rel_entr": lambda x, y: jsp.special.rel_entr(share(x), share(y)),
    "special.betainc": lambda x, y: jsp.special.betainc(1.2, 2.0, share(x * y)),
    "stats.beta.logpdf": lambda x, y: jsp.stats.beta.logpdf(share(x), 1.5, positive(y)),
    "random.gamma": lambda x, y: jax.random.gamma(jax.random.key(3), 1 + positive(x)) * y / 4,
    "checkpoint_name": lambda x, y: checkpoint_name(x * y, "kept"),
}

# Functions of one array and one of its axes, which has at least one entry.
ALONG: dict[str, Run] = {
    "jnp.argsort": lambda x, axis: x * jnp.argsort(x, axis),
    "jnp.average": lambda x, axis: jnp.average(x, axis, positive(x)),
    "jnp.cumulative_sum": lambda x, axis: jnp.cumulative_sum(x, axis=axis, include_initial=True),
    "jnp.delete": lambda x, axis: jnp.delete(x, 0, axis),
    "jnp.diff": lambda x, axis: jnp.diff(x, axis=axis, prepend=0.3),
    "jnp.flip": jnp.flip,
    "jnp.gradient of a pad": lambda x, axis: jnp.gradient(
        jnp.pad(x, [(int(a == axis),) * 2 for a in range(x.ndim)]), axis=axis
    ),
    "jnp.insert": lambda x, axis: jnp.insert(x, 0, 0.5, axis),
    "jnp.linalg.norm": lambda x, axis: jnp.linalg.norm(1 + positive(x), axis=axis),
    "jnp.linalg.norm 1": lambda x, axis: jnp.linalg.norm(x, 1, axis),
    "jnp.median": lambda x, axis: jnp.median(x, axis),
    "jnp.ptp": lambda x, axis: jnp.ptp(x, axis),
    "jnp.quantile": lambda x, axis: jnp.quantile(x, jnp.array([0.3, 0.6]), axis),
    "jnp.roll": lambda x, axis: jnp.roll(x, 1, axis),
    "jnp.std": lambda x, axis: jnp.sqrt(jnp.var(x, axis, keepdims=True) + 0.3) * x,
    "jnp.take_along_axis": lambda x, axis: jnp.take_along_axis(x, jnp.argsort(x, axis), axis),
    "jnp.trapezoid": lambda x, axis: jnp.trapezoid(x, axis=axis),
    "jnp.unwrap": lambda x, axis: jnp.unwrap(3 * x, axis=axis),
    "nn.glu": lambda x, axis: jax.nn.glu(jnp.concatenate([x, 2 * x], axis), axis),
    "nn.logsumexp": lambda x, axis: jax.nn.logsumexp(x, axis, keepdims=True),
    "nn.log_softmax": jax.nn.log_softmax,
    "nn.logmeanexp": lambda x, axis: jax.nn.logmeanexp(x, axis),
    "nn.softmax": jax.nn.softmax,
    "nn.standardize": lambda x, axis: jax.nn.standardize(x, axis, epsilon=0.1),
}


def spd(x: Any) -> Any:
    """Return a symmetric matrix, well conditioned and with distinct eigenvalues."""
    size = x.shape[0]
    return lax.tanh(x @ x.T) / 8 / max(size, 1) + jnp.diag(1.0 + jnp.arange(size))


def regular(x: Any) -> Any:
    """Return a regular matrix with distinct singular values."""
    size = x.shape[0]
    return lax.sin(x) / 4 / max(size, 1) + jnp.diag(1.0 + jnp.arange(size))


def _tridiagonal(x: Any, y: Any) -> Any:
    lower, upper = unit(jnp.diag(x)) / 2, unit(x[0]) / 2
    return lax.linalg.tridiagonal_solve(
        lower.at[0].set(0), 2 + positive(y[0]), upper.at[-1].set(0), y
    )


def _custom_solve(x: Any, y: Any) -> Any:
    matrix = regular(x)
    solve = lambda matvec, b: jnp.linalg.solve(matrix, b)
    back = lambda vecmat, b: jnp.linalg.solve(matrix.T, b)
    return lax.custom_linear_solve(lambda v: matrix @ v, y[0], solve, back)


def _custom_root(x: Any, y: Any) -> Any:
    function = lambda v: v + 0.3 * lax.sin(v) - x * y / 4
    newton = lambda f, v: lax.fori_loop(0, 30, lambda _, v: v - f(v) / 1.3, v)
    tangent = lambda g, b: b / g(jnp.ones_like(b))
    return lax.custom_root(function, jnp.zeros_like(x), newton, tangent)


def _signed(q: Any) -> Any:
    """Remove the arbitrary sign of columns."""
    return jnp.square(q)


# Functions of two square matrices.
MATRICES: dict[str, Run] = {
    "cholesky": lambda x, y: jnp.linalg.cholesky(spd(x)) + y,
    "cho_solve": lambda x, y: jsp.linalg.cho_solve(jsp.linalg.cho_factor(spd(x)), y),
    "custom_linear_solve": _custom_solve,
    "custom_root": _custom_root,
    "det": lambda x, y: jnp.linalg.det(regular(x) / 2) * y / 3,
    "eigh": lambda x, y: jnp.sum(_signed(jnp.linalg.eigh(spd(x))[1]) * y, 0),
    "eigvalsh": lambda x, y: jnp.linalg.eigvalsh(spd(x)) * y / 3,
    "eigvals": lambda x, y: real_sum_of_eigenvalues(x) * y,
    "expm": lambda x, y: jsp.linalg.expm(x / 4) @ y / 2,
    "inv": lambda x, y: jnp.linalg.inv(regular(x)) @ y,
    "kron": lambda x, y: jnp.kron(x[:2], y[:2, :2]),
    "linalg.cond by svd": lambda x, y: jnp.linalg.svd(regular(x), compute_uv=False) * y / 3,
    "lu": lambda x, y: jsp.linalg.lu(regular(x), permute_l=True)[1] * y / 3,
    "lstsq": lambda x, y: jnp.linalg.lstsq(regular(x), y)[0],
    "matrix_power": lambda x, y: jnp.linalg.matrix_power(lax.sin(x) / 2, 3) + y,
    "matrix_norm": lambda x, y: jnp.linalg.matrix_norm(1 + positive(x)) * y / 3,
    "multi_dot": lambda x, y: lax.sin(jnp.linalg.multi_dot([x, y, x]) / 4),
    "nuclear norm": lambda x, y: jnp.linalg.norm(regular(x), "nuc") * y / 3,
    "pinv": lambda x, y: jnp.linalg.pinv(regular(x)) @ y,
    "polar": lambda x, y: jsp.linalg.polar(regular(x), method="svd")[0] * y,
    "qr": lambda x, y: _signed(jnp.linalg.qr(regular(x))[0]) @ y,
    "r of qr": lambda x, y: _signed(jnp.linalg.qr(regular(x), "r")) * y / 9,
    "slogdet": lambda x, y: jnp.linalg.slogdet(regular(x))[1] * y / 2,
    "solve": lambda x, y: jnp.linalg.solve(regular(x), y),
    "solve_triangular": lambda x, y: jsp.linalg.solve_triangular(regular(x), y, lower=True),
    "spectral norm": lambda x, y: jnp.linalg.norm(regular(x), 2) * y / 3,
    "sqrtm": lambda x, y: jnp.linalg.cholesky(spd(x) @ spd(x)) * y / 6,
    "svd": lambda x, y: _signed(jnp.linalg.svd(regular(x))[0]) @ y,
    "tensorsolve": lambda x, y: jnp.linalg.tensorsolve(regular(x), y[0]),
    "trace": lambda x, y: jnp.trace(x @ y) / 3 + x,
    "tridiagonal_solve": _tridiagonal,
    "tril": lambda x, y: jnp.tril(x) @ jnp.triu(y) / 2,
    "toeplitz": lambda x, y: jsp.linalg.toeplitz(x[0], y[0]) / 2,
    "vander": lambda x, y: jnp.vander(unit(x[0])) + y,
    "cov": lambda x, y: jnp.cov(x, y)[0] / 2 if x.shape[0] > 1 else x,
    "cross": lambda x, y: jnp.cross(jnp.resize(x, (3,)), jnp.resize(y, (3,))),
    "convolve": lambda x, y: jnp.convolve(x.ravel(), y[0]) / 2,
    "convolve2d": lambda x, y: jsp.signal.convolve2d(x, y[:2, :2]) / 2,
    "fftconvolve": lambda x, y: jsp.signal.fftconvolve(x, y[:2], "same") / 2,
    "map_coordinates": lambda x, y: jsp.ndimage.map_coordinates(
        x, [within(y, 0.1, 0.9), within(y, 0.1, 0.7)], 1, "nearest"
    ),
    "resize": lambda x, y: jax.image.resize(x, (3, 4), "bilinear"),
    "dot_product_attention": lambda x, y: jax.nn.dot_product_attention(
        x[:, None, :], y[:, None, :], lax.sin(x + y)[:, None, :]
    ),
    "einsum of three": lambda x, y: jnp.einsum("ij,jk,ki->ik", x, y, x) / 2,
    "sum of a batched product": lambda x, y: jnp.einsum("ij,ij->i", x, y),
}


def real_sum_of_eigenvalues(x: Any) -> Any:
    return jnp.sum(jnp.square(jnp.linalg.eigvals(regular(x)))).real / 9
