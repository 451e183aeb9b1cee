"""Takes policy networks of Brax, on observations and through its spring dynamics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from brax import math
from brax.training import distribution, networks

from benchmarks.third_party.building import KEY, normal, of_linen
from benchmarks.third_party.common import Case, Model


def policy() -> Case:
    """Computes the log-probability of an action under a squashed Gaussian."""
    actions = distribution.NormalTanhDistribution(event_size=2)
    net = networks.make_policy_network(actions.param_size, 4, hidden_layer_sizes=(6, 5))

    def loss(params: Any, x: jax.Array, action: jax.Array) -> jax.Array:
        found = net.apply(None, params, x)
        return -actions.log_prob(found, action) - 0.1 * actions.entropy(found, KEY).sum()

    return Case(loss, net.init(KEY), (normal(4), normal(2, seed=2)))


def controlled() -> Case:
    """Turns a body by a network's torque, for some steps."""
    net = networks.MLP((6, 3), activation=jnp.tanh)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        def step(turn: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
            torque = net.apply(params, turn)
            turned = math.quat_mul(turn, math.euler_to_quat(10 * torque))
            return turned / math.safe_norm(turned), torque

        turn, torques = jax.lax.scan(step, x / math.safe_norm(x), None, length=4)
        return jnp.square(turn - 1).sum() + jnp.square(torques).sum()

    return Case(loss, net.init(KEY, jnp.ones(4)), (normal(4),))


MODELS = {
    "policy": Model(policy),
    "control of a rotation": Model(controlled),
    "convolutional encoder": Model(
        lambda: of_linen(networks.CNN([4, 6], [(3, 3), (3, 3)], [(2, 2), (1, 1)]), normal(8, 8, 2))
    ),
}
