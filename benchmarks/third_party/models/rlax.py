"""Takes losses of RLax, a trajectory a sample."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import rlax

from benchmarks.third_party.building import KEY, first, normal, tokens
from benchmarks.third_party.common import Case, Model

STEPS, ACTIONS = 5, 3


def network(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(hk.Linear(6)(x))
    return hk.Linear(ACTIONS)(hidden), hk.Linear(1)(hidden)[..., 0]


def of_losses(losses: Any) -> Case:
    net = hk.without_apply_rng(hk.transform(network))
    batch = normal(STEPS + 1, 4), tokens(STEPS, ACTIONS), normal(STEPS, seed=2)
    params = net.init(KEY, first(batch)[0])

    def run(params, x, *others):
        return losses(*net.apply(params, x), *others)

    return Case(run, params, batch)


def actor_critic(logits: Any, values: Any, actions: Any, rewards: Any) -> jax.Array:
    discounts = jnp.full(STEPS, 0.9)
    ratios = rlax.categorical_importance_sampling_ratios(
        logits[:-1], jax.lax.stop_gradient(logits[:-1]), actions
    )
    targets = rlax.vtrace_td_error_and_advantage(
        jax.lax.stop_gradient(values[:-1]), values[1:], rewards, discounts, ratios
    )
    policy = rlax.policy_gradient_loss(logits[:-1], actions, targets.pg_advantage, jnp.ones(STEPS))
    entropy = rlax.entropy_loss(logits[:-1], jnp.ones(STEPS))
    return policy + 0.1 * entropy + jnp.square(targets.errors + values[:-1]).sum()


def q_learning(q: Any, values: Any, actions: Any, rewards: Any) -> jax.Array:
    del values
    td = jax.vmap(rlax.double_q_learning)(
        q[:-1], actions, rewards, jnp.full(STEPS, 0.9), q[1:], q[1:]
    )
    return rlax.huber_loss(td, 0.7).sum()


MODELS = {
    "actor and critic, V-trace": Model(lambda: of_losses(actor_critic)),
    "double Q-learning": Model(lambda: of_losses(q_learning)),
}
