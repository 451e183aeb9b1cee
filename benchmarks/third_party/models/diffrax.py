"""Takes neural differential equations of Diffrax."""

from __future__ import annotations

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.third_party.common import NUM_SAMPLES, Case, Model

KEY = jax.random.key(0)
TIMES = (0.0, 0.4, 1.0)
ADAPTIVE = dfx.PIDController(rtol=1e-4, atol=1e-6)


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t: Any, y: jax.Array, args: Any) -> jax.Array:
        del args
        return self.mlp(jnp.append(y, t))


def field() -> tuple[Any, Any]:
    mlp = eqx.nn.MLP(3, 2, 6, 1, activation=jax.nn.tanh, key=KEY)
    return eqx.partition(Field(mlp), eqx.is_inexact_array)


def data(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (NUM_SAMPLES, *shape))


def ordinary(adjoint: Any, solver: Any) -> Case:
    params, static = field()

    def loss(params: Any, y0: jax.Array) -> jax.Array:
        term = dfx.ODETerm(eqx.combine(params, static))
        saved = dfx.SaveAt(ts=jnp.array(TIMES))
        solution = dfx.diffeqsolve(
            term,
            solver,
            0.0,
            1.0,
            0.25,
            y0,
            saveat=saved,
            adjoint=adjoint,
            stepsize_controller=ADAPTIVE,
            max_steps=64,
        )
        return jnp.square(solution.ys - 1).sum()

    return Case(loss, params, (data(2),))


def controlled() -> Case:
    """Builds a neural controlled equation, driven by an interpolated series."""
    mlp = eqx.nn.MLP(4, 8, 6, 1, activation=jax.nn.tanh, key=KEY)
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    ts = jnp.linspace(0.0, 1.0, 6)

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        mlp = eqx.combine(params, static)
        control = dfx.CubicInterpolation(ts, dfx.backward_hermite_coefficients(ts, xs))
        term = dfx.ControlTerm(lambda t, y, args: mlp(y).reshape(4, 2), control).to_ode()
        solution = dfx.diffeqsolve(term, dfx.Heun(), 0.0, 1.0, 0.2, jnp.ones(4), max_steps=16)
        return jnp.square(solution.ys).sum()

    return Case(loss, params, (data(6, 2),))


def stochastic() -> Case:
    """Builds a neural equation with noise, with one key for each sample."""
    params, static = field()

    def loss(params: Any, y0: jax.Array, key: jax.Array) -> jax.Array:
        path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-2, (2,), key)
        noise = dfx.ControlTerm(lambda t, y, args: 0.3 * jnp.diag(y), path)
        terms = dfx.MultiTerm(dfx.ODETerm(eqx.combine(params, static)), noise)
        solution = dfx.diffeqsolve(terms, dfx.Euler(), 0.0, 1.0, 0.2, y0, max_steps=16)
        return jnp.square(solution.ys).sum()

    return Case(loss, params, (data(2), jax.random.split(KEY, NUM_SAMPLES)))


CHECKPOINTS = dfx.RecursiveCheckpointAdjoint()
MODELS = {
    "neural ODE, adaptive": Model(lambda: ordinary(CHECKPOINTS, dfx.Tsit5())),
    "neural ODE, direct adjoint": Model(lambda: ordinary(dfx.DirectAdjoint(), dfx.Tsit5())),
    "neural ODE, implicit": Model(lambda: ordinary(CHECKPOINTS, dfx.Kvaerno3())),
    "neural CDE": Model(controlled),
    "neural SDE": Model(stochastic),
}
