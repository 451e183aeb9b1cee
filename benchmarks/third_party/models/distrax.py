"""Takes densities of Distrax."""

from __future__ import annotations

from typing import Any

import distrax
import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.third_party.building import normal, of_haiku
from benchmarks.third_party.common import Case, Model


def conditioner(outputs: int) -> Any:
    return lambda x: hk.nets.MLP((6, 3 * outputs))(x).reshape(3, outputs)


def spline_flow(x: jax.Array) -> jax.Array:
    """Builds couplings by rational-quadratic splines, with alternating masks."""
    layers = [
        distrax.MaskedCoupling(
            jnp.arange(3) % 2 == parity,
            conditioner(3 * 4 + 1),
            lambda params: distrax.RationalQuadraticSpline(params, -3.0, 3.0),
        )
        for parity in (0, 1)
    ]
    base = distrax.MultivariateNormalDiag(jnp.zeros(3), jnp.ones(3))
    return distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers))).log_prob(x)


def hidden_markov() -> Case:
    def loss(params: Any, ys: jax.Array) -> jax.Array:
        model = distrax.HMM(
            distrax.Categorical(params["start"]),
            distrax.Categorical(params["transition"]),
            distrax.Normal(params["mean"], jnp.exp(params["log_scale"])),
        )
        return -model.forward(ys)[1].sum()

    params = {"start": jnp.zeros(3), "transition": jnp.eye(3), "mean": jnp.arange(3.0)}
    return Case(loss, params | {"log_scale": jnp.zeros(3)}, (normal(6),))


def mixture() -> Case:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        parts = distrax.MultivariateNormalTri(params["mean"], params["scale"])
        mixed = distrax.MixtureSameFamily(distrax.Categorical(params["logits"]), parts)
        return -mixed.log_prob(x)

    params = {"logits": jnp.zeros(2), "mean": jnp.eye(2, 3), "scale": jnp.stack([jnp.eye(3)] * 2)}
    return Case(loss, params, (normal(3),))


MODELS = {
    "spline flow": Model(lambda: of_haiku(spline_flow, normal(3))),
    "hidden Markov model": Model(hidden_markov),
    "mixture of Gaussians": Model(mixture),
}
