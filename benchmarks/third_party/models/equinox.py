"""Takes networks of Equinox."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.third_party.building import KEY, normal, of_equinox, squared
from benchmarks.third_party.common import Case, Model


def squared_output(module: Any, x: jax.Array) -> jax.Array:
    return squared(module(x))


def mlp() -> Case:
    module = eqx.nn.MLP(3, 2, 6, 2, activation=jax.nn.tanh, key=KEY)
    return of_equinox(module, normal(3), call=squared_output)


def spectral() -> Case:
    """Divides by a spectral norm whose vectors are a fixed state."""
    linear, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        eqx.nn.Linear(4, 3, key=KEY), "weight", key=KEY
    )

    def run(module, x):
        return squared(module(x, state, inference=True)[0])

    return of_equinox(linear, normal(4), call=run)


def convolutional() -> Case:
    keys = jax.random.split(KEY, 3)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.elu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.ConvTranspose2d(4, 3, 3, stride=2, key=keys[1]),
            eqx.nn.GroupNorm(3, 3),
            eqx.nn.AdaptiveAvgPool2d(2),
        ]
    )
    return of_equinox(module, normal(2, 6, 6), call=squared_output)


class Rotary(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    rotary: eqx.nn.RotaryPositionalEmbedding
    norm: eqx.nn.RMSNorm
    weighted: eqx.nn.WeightNorm

    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(q, k, v):
            return (jax.vmap(self.rotary, 1, 1)(q), jax.vmap(self.rotary, 1, 1)(k), v)

        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y, process_heads=heads)
        return jax.vmap(self.weighted)(x)


def rotary() -> Case:
    keys = jax.random.split(KEY, 2)
    module = Rotary(
        eqx.nn.MultiheadAttention(2, 8, key=keys[0]),
        eqx.nn.RotaryPositionalEmbedding(4),
        eqx.nn.RMSNorm(8),
        eqx.nn.WeightNorm(eqx.nn.Linear(8, 3, key=keys[1])),
    )
    return of_equinox(module, normal(5, 8), call=squared_output)


def recurrent() -> Case:
    module = eqx.nn.LSTMCell(3, 4, key=KEY)

    def run(module: Any, xs: jax.Array) -> jax.Array:
        zeros = jnp.zeros(4, xs.dtype)
        return squared(jax.lax.scan(lambda c, x: (module(x, c), None), (zeros, zeros), xs)[0][0])

    return of_equinox(module, normal(5, 3), call=run)


def stacked_layers() -> Case:
    """Scans over layers whose weights are stacked."""

    def make(key):
        return eqx.nn.MLP(4, 4, 5, 1, activation=jax.nn.tanh, key=key)

    module = eqx.filter_vmap(make)(jax.random.split(KEY, 3))

    def run(module: Any, x: jax.Array) -> jax.Array:
        arrays, static = eqx.partition(module, eqx.is_array)
        return squared(jax.lax.scan(lambda x, a: (eqx.combine(a, static)(x), None), x, arrays)[0])

    return of_equinox(module, normal(4), call=run)


MODELS = {
    "MLP": Model(mlp),
    "spectral norm": Model(spectral),
    "convolutions": Model(convolutional),
    "rotary attention, weight norm": Model(rotary),
    "LSTM": Model(recurrent),
    "scan over layers": Model(stacked_layers),
}
