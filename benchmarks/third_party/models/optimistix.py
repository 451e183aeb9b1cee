"""Takes implicit layers: fixed points, roots and minima of Optimistix, systems of Lineax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx

from benchmarks.third_party.common import NUM_SAMPLES, Case, Model


def data(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (NUM_SAMPLES, *shape))


def weights() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    w, u = (0.3 * jax.random.normal(key, (4, 4)) for key in keys)
    return {"w": w, "u": u, "b": jnp.ones(4)}


def layer(z: jax.Array, args: Any) -> jax.Array:
    params, x = args
    return jnp.tanh(0.5 * params["w"] @ z + params["u"] @ x + params["b"])


def fixed_point() -> Case:
    solver = optx.FixedPointIteration(rtol=1e-10, atol=1e-10)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        found = optx.fixed_point(layer, solver, jnp.zeros(4), args=(params, x), max_steps=200)
        return jnp.square(found.value).sum()

    return Case(loss, weights(), (data(4),), spread=0)


def root() -> Case:
    solver = optx.Newton(rtol=1e-10, atol=1e-10)

    def residual(z, args):
        return z - layer(z, args)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        found = optx.root_find(residual, solver, jnp.zeros(4), args=(params, x), max_steps=50)
        return jnp.square(found.value).sum()

    return Case(loss, weights(), (data(4),), spread=0)


def least_squares() -> Case:
    solver = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)

    def residual(z, args):
        return (z - layer(z, args), 0.1 * z)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        found = optx.least_squares(residual, solver, jnp.zeros(4), args=(params, x), max_steps=99)
        return jnp.square(found.value).sum()

    return Case(loss, weights(), (data(4),), spread=0)


def linear_system(solver: Any) -> Case:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        matrix = params["w"] @ params["w"].T + jnp.diag(jnp.square(params["u"] @ x) + 1)
        operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
        return jnp.square(lx.linear_solve(operator, params["b"] + x, solver).value).sum()

    return Case(loss, weights(), (data(4),))


MODELS = {
    "fixed point (deep equilibrium)": Model(fixed_point),
    "root": Model(root),
    "least squares": Model(least_squares),
    "linear system, Cholesky": Model(lambda: linear_system(lx.Cholesky())),
    "linear system, CG": Model(lambda: linear_system(lx.CG(rtol=1e-12, atol=1e-12))),
}
