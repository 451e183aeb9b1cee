"""Takes quantum circuits of PennyLane."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pennylane as qml

from benchmarks.third_party.building import normal
from benchmarks.third_party.common import Case, Model

WIRES = 3


def circuit(interface: str) -> Case:
    @qml.qnode(qml.device("default.qubit", wires=WIRES), interface="jax", diff_method=interface)
    def run(weights: jax.Array, x: jax.Array) -> Any:
        qml.AngleEmbedding(x, wires=range(WIRES))
        qml.StronglyEntanglingLayers(weights, wires=range(WIRES))
        return [qml.expval(qml.PauliZ(wire)) for wire in range(WIRES)]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        found = jnp.stack(run(params["weights"], jnp.tanh(x @ params["w"])))
        return jnp.square(found @ params["out"] - 1)

    params = {"weights": normal(2, WIRES, 3)[0], "w": normal(4, WIRES)[1], "out": jnp.ones(WIRES)}
    return Case(loss, params, (normal(4),))


MODELS = {"circuit within a network": Model(lambda: circuit("backprop"))}
