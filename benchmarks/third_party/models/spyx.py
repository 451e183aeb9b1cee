"""Takes spiking networks of Spyx, whose spikes have surrogate gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import spyx
from flax import nnx

from benchmarks.third_party.building import normal, of_nnx, squared
from benchmarks.third_party.common import Case, Model


class Spiking(nnx.Module):
    def __init__(self, cell: Any, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 6, rngs=rngs)
        self.spikes = cell((6,), rngs=rngs)
        self.second = nnx.Linear(6, 2, rngs=rngs)
        self.leaky = spyx.nn.LI((2,), rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        hidden, voltage = self.spikes.initial_state(1), self.leaky.initial_state(1)
        outputs = []
        for x in xs:
            spikes, hidden = self.spikes(self.first(x[None]), hidden)
            out, voltage = self.leaky(self.second(spikes), voltage)
            outputs.append(out)
        return jnp.stack(outputs)


def network(cell: Any) -> Case:
    module = Spiking(cell, nnx.Rngs(0))
    return of_nnx(module, 3 * normal(5, 3), call=lambda module, xs: squared(module(xs)))


MODELS = {
    "leaky integrate and fire": Model(lambda: network(spyx.nn.LIF)),
    "adaptive threshold": Model(lambda: network(spyx.nn.ALIF)),
}
