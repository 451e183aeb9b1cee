"""Takes layers of JAXopt that are differentiated implicitly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jaxopt

from benchmarks.third_party.common import NUM_SAMPLES, Case, Model


def data(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (NUM_SAMPLES, *shape))


def ridge() -> Case:
    """Learns the penalties and the features of a regression solved within."""

    def inner(w: jax.Array, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        residual = jnp.tanh(x @ params["features"]) @ w - y
        return jnp.square(residual).mean() + jnp.square(w * params["penalty"]).sum()

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        solver = jaxopt.LBFGS(inner, tol=1e-10, maxiter=200, implicit_diff=True)
        found = solver.run(jnp.zeros(3), params, x, y).params
        return jnp.square(jnp.tanh(x[:2] @ params["features"]) @ found - y[:2]).sum()

    params = {"features": data(4, 3)[0], "penalty": jnp.full(3, 0.7)}
    return Case(loss, params, (data(6, 4), data(6)))


def quadratic() -> Case:
    """Solves a quadratic program with equalities as a layer."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        program = jaxopt.EqualityConstrainedQP()
        matrix = params["w"] @ params["w"].T + jnp.eye(3)
        found = program.run(
            params_obj=(matrix, params["c"] @ x), params_eq=(params["a"], jnp.ones(1))
        ).params
        return jnp.square(found.primal).sum()

    params = {"w": data(3, 3)[0], "c": data(3, 2)[1], "a": data(1, 3)[2]}
    return Case(loss, params, (data(2),))


def projected() -> Case:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        share = jaxopt.projection.projection_simplex(params["w"] @ x + params["b"])
        return -(share * params["value"]).sum() + jaxopt.loss.multiclass_sparsemax_loss(
            jnp.asarray(1), params["w"] @ x
        )

    params = {"w": data(4, 3)[0], "b": jnp.zeros(4), "value": jnp.arange(4.0)}
    return Case(loss, params, (data(3),))


MODELS = {
    "regression within": Model(ridge),
    "quadratic program": Model(quadratic),
    "simplex and sparsemax": Model(projected),
}
