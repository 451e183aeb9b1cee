"""Takes graph networks of Jraph, a graph a sample."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jraph

from benchmarks.third_party.building import normal, of_haiku
from benchmarks.third_party.common import NUM_SAMPLES, Case, Model

NODES, EDGES = 5, 8


def edges() -> tuple[jax.Array, jax.Array]:
    ends = jax.random.randint(jax.random.key(3), (2, NUM_SAMPLES, EDGES), 0, NODES)
    return ends[0], ends[1]


def graph(nodes: Any, links: Any, senders: Any, receivers: Any) -> Any:
    counts = jnp.array([NODES]), jnp.array([EDGES])
    return jraph.GraphsTuple(nodes, links, receivers, senders, jnp.ones((1, 2)), *counts)


def mlp(*parts: Any) -> jax.Array:
    return hk.nets.MLP((6, 4), activation=jax.nn.tanh)(jnp.concatenate(parts, -1))


def graph_network(*example: Any) -> Any:
    net = jraph.GraphNetwork(jraph.concatenated_args(mlp), jraph.concatenated_args(mlp), mlp)
    return net(graph(*example)).globals


def convolution(*example: Any) -> Any:
    nodes, links, *ends = example
    del links
    net = jraph.GraphConvolution(lambda x: hk.Linear(4)(x), add_self_edges=True)
    return net(graph(nodes, None, *ends)).nodes


def attention(*example: Any) -> Any:
    nodes, links, *ends = example
    del links

    def logit(sent, received, _):
        return jax.nn.leaky_relu(hk.Linear(1)(jnp.concatenate([sent, received], -1)))

    net = jraph.GAT(lambda x: hk.Linear(4)(x), logit, lambda x: jax.nn.tanh(x))
    return net(graph(nodes, None, *ends)).nodes


def of(net: Any) -> Model:
    return Model(lambda: build(net))


def build(net: Any) -> Case:
    return of_haiku(net, normal(NODES, 3), normal(EDGES, 2, seed=2), *edges())


MODELS = {
    "graph network": of(graph_network),
    "graph convolution": of(convolution),
    "graph attention": of(attention),
}
