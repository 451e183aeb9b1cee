"""Takes learnt energies of JAX MD, a configuration of particles a sample."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax_md import energy, space

from benchmarks.third_party.building import KEY, normal
from benchmarks.third_party.common import Case, Model


def potential(model: Any) -> Case:
    """Fits an energy and its forces."""
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, positions: jax.Array) -> jax.Array:
        run = lambda positions: nnx.merge(graph, params, others)(positions)
        value, forces = jax.value_and_grad(run)(positions)
        return jnp.square(value - 1) + jnp.square(forces).sum()

    return Case(loss, params, (normal(4, 3),))


def graph_network() -> Case:
    displacement, _ = space.free()
    model = energy.graph_network(displacement, 3.0, key=KEY, mlp_sizes=(5, 5)).model
    return potential(model)


def behler_parrinello() -> Case:
    displacement, _ = space.free()
    species = jnp.array([0, 0, 1, 1])
    run = energy.behler_parrinello(displacement, key=KEY, species=species, mlp_sizes=(5, 5))
    return potential(run.model)


MODELS = {
    "graph network, energy and forces": Model(graph_network),
    "Behler–Parrinello, energy and forces": Model(behler_parrinello),
}
