"""Takes wave functions of NetKet: log-amplitudes of a configuration of spins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import netket as nk

from benchmarks.third_party.building import KEY
from benchmarks.third_party.common import NUM_SAMPLES, Case, Model

SITES = 6


def spins() -> jax.Array:
    draws = jax.random.bernoulli(jax.random.key(1), shape=(NUM_SAMPLES, SITES))
    return 2.0 * draws - 1


def amplitude(module: Any) -> Case:
    """Computes the real part, and the phase if there is one."""
    params = jax.jit(module.init)(KEY, spins())["params"]

    def loss(params: Any, spins: jax.Array) -> jax.Array:
        found = module.apply({"params": params}, spins[None])[0]
        return jnp.square(found.real - 1) + jnp.imag(found)

    return Case(loss, params, (spins(),))


def equivariant() -> Any:
    graph = nk.graph.Chain(SITES)
    return nk.models.GCNN(symmetries=graph, layers=2, features=3, param_dtype=float)


def autoregressive() -> Any:
    space = nk.hilbert.Spin(0.5, SITES)
    return nk.models.ARNNDense(hilbert=space, layers=2, features=4, param_dtype=float)


MODELS = {
    "RBM": Model(lambda: amplitude(nk.models.RBM(alpha=2, param_dtype=float))),
    "RBM, modulus and phase": Model(
        lambda: amplitude(nk.models.RBMModPhase(alpha=2, param_dtype=float))
    ),
    "Jastrow": Model(lambda: amplitude(nk.models.Jastrow(param_dtype=float))),
    "group convolutions": Model(lambda: amplitude(equivariant())),
    "autoregressive": Model(lambda: amplitude(autoregressive())),
}
