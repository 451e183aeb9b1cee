"""Takes ranking losses of Rax, a list a sample."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import rax

from benchmarks.third_party.building import normal, tokens
from benchmarks.third_party.common import Case, Model


def ranked(criterion: Any) -> Case:
    def loss(params: Any, items: jax.Array, relevance: jax.Array) -> jax.Array:
        scores = jnp.tanh(items @ params["w"] + params["b"]) @ params["v"]
        return criterion(scores, relevance.astype(scores.dtype), where=jnp.arange(6) < 5)

    params = {"w": normal(3, 8)[0], "b": jnp.zeros(8), "v": jnp.ones(8)}
    return Case(loss, params, (normal(6, 3), tokens(6, 4)))


MODELS = {
    "softmax": Model(lambda: ranked(rax.softmax_loss)),
    "ListMLE": Model(lambda: ranked(rax.listmle_loss)),
    "pairwise logistic": Model(lambda: ranked(rax.pairwise_logistic_loss)),
}
