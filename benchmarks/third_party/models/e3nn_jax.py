"""Takes equivariant layers of e3nn."""

from __future__ import annotations

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.third_party.building import normal, of_linen
from benchmarks.third_party.common import Model


class Convolution(nn.Module):
    """Messages between points, weighted by their distances."""

    @nn.compact
    def __call__(self, positions: jax.Array) -> jax.Array:
        away = positions[:, None] - positions[None] + 0.1
        features = e3nn.flax.Linear("4x0e + 2x1o")(
            e3nn.spherical_harmonics([0, 1, 2], e3nn.IrrepsArray("1o", away), True)
        )
        radial = e3nn.soft_one_hot_linspace(
            jnp.linalg.norm(away, axis=-1),
            start=0.0,
            end=3.0,
            number=4,
            basis="gaussian",
            cutoff=False,
        )
        weights = e3nn.flax.MultiLayerPerceptron((6, 3), jax.nn.gelu)(radial)
        messages = e3nn.tensor_product(features, features, filter_ir_out=["0e", "1o"])
        messages = e3nn.flax.Linear("3x0e + 3x1o")(messages)
        return (
            e3nn.gate(e3nn.flax.Linear("6x0e + 3x1o")(e3nn.sum(messages, axis=1))).array
            * weights.sum()
        )


class TensorSquare(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = e3nn.IrrepsArray("2x0e + 2x1o", x)
        squared = e3nn.tensor_square(e3nn.flax.Linear("3x0e + 3x1o")(x))
        x = e3nn.norm_activation(
            e3nn.flax.Linear("2x0e + 2x1o + 2e")(squared), [jnp.tanh, None, None]
        )
        return x.array


MODELS = {
    "convolution of points": Model(lambda: of_linen(Convolution(), normal(4, 3))),
    "tensor square": Model(lambda: of_linen(TensorSquare(), normal(5, 8))),
}
