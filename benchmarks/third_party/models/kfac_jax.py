"""Takes a loss whose layers are tagged by KFAC-JAX's primitives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax

from benchmarks.third_party.building import normal, squared
from benchmarks.third_party.common import Case, Model


def tagged() -> Case:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        hidden = x[None]
        for w, b in params:
            y = hidden @ w + b
            hidden = jnp.tanh(kfac_jax.register_dense(y, hidden, w, b))
        kfac_jax.register_normal_predictive_distribution(hidden, jnp.ones_like(hidden))
        return squared(hidden)

    params = [(normal(4, 5)[0], jnp.zeros(5)), (normal(5, 2)[0], jnp.zeros(2))]
    return Case(loss, params, (normal(4),))


MODELS = {"tagged layers": Model(tagged)}
