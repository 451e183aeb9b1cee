"""Takes Gaussian processes of tinygp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import tinygp

from benchmarks.third_party.common import NUM_SAMPLES, Case, Model


def series() -> tuple[jax.Array, jax.Array]:
    x = jnp.sort(jax.random.uniform(jax.random.key(1), (NUM_SAMPLES, 7)), 1)
    return x, jnp.sin(7 * x) + 0.1 * jax.random.normal(jax.random.key(2), x.shape)


def dense() -> Case:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        scale = jnp.exp(params["log_scale"])
        kernel = jnp.exp(params["log_height"]) * tinygp.kernels.Matern52(scale)
        process = tinygp.GaussianProcess(kernel, x, diag=0.1, mean=params["mean"])
        return -process.log_probability(y)

    return Case(
        loss, {name: jnp.zeros(()) for name in ("log_scale", "log_height", "mean")}, series()
    )


def deep() -> Case:
    """Builds a kernel on the output of a layer."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        features = jnp.tanh(x[:, None] @ params["w"] + params["b"])
        kernel = tinygp.transforms.Linear(params["scales"], tinygp.kernels.ExpSquared())
        return -tinygp.GaussianProcess(kernel, features, diag=0.1).log_probability(y)

    params = {"w": jnp.ones((1, 3)), "b": jnp.arange(3.0), "scales": jnp.ones(3)}
    return Case(loss, params, series())


def quasiseparable() -> Case:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        kernel = tinygp.kernels.quasisep.Matern32(jnp.exp(params["log_scale"]))
        process = tinygp.GaussianProcess(kernel, x, diag=jnp.exp(params["log_noise"]))
        return -process.log_probability(y)

    return Case(loss, {name: jnp.zeros(()) for name in ("log_scale", "log_noise")}, series())


MODELS = {
    "Matérn kernel": Model(dense),
    "deep kernel": Model(deep),
    "quasiseparable kernel": Model(quasiseparable),
}
