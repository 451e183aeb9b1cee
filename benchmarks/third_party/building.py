"""Makes cases of modules, framework by framework.

A framework is imported where it is used, because a library's environment has only its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.third_party.common import NUM_SAMPLES, Case

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (NUM_SAMPLES, *shape))


def tokens(length: int, vocabulary: int, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (NUM_SAMPLES, length), 1, vocabulary)


def squared(outputs: Any) -> jax.Array:
    """Builds a loss from any result of a model."""
    return sum((jnp.square(leaf - 1).sum() for leaf in jax.tree.leaves(outputs)), jnp.zeros(()))


def next_token(logits: jax.Array, words: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs[:-1], words[1:, None], axis=-1).mean()


def first(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda leaf: leaf[0], argument) for argument in batch)


def of_linen(module: Any, *batch: Any, call: Callable[..., Any] | None = None) -> Case:
    """Makes a case of a Flax module's squared result; only the parameters are trained."""
    call = call or (lambda variables, *example: squared(module.apply(variables, *example)))
    variables = dict(jax.jit(module.init)(KEY, *first(batch)))
    params = variables.pop("params")
    return Case(
        lambda params, *example: call({"params": params} | variables, *example), params, batch
    )


def of_nnx(module: Any, *batch: Any, call: Callable[..., Any]) -> Case:
    """Makes a case of a call of an NNX module; only its parameters are trained."""
    from flax import nnx

    graph, params, others = nnx.split(module, nnx.Param, ...)

    def loss(params: Any, *example: Any) -> jax.Array:
        return call(nnx.merge(graph, params, jax.tree.map(jnp.asarray, others)), *example)

    return Case(loss, params, batch)


def of_haiku(function: Callable[..., Any], *batch: Any) -> Case:
    """Makes a case of a function over Haiku's modules, squared; its state, if any, is fixed."""
    import haiku as hk

    net = hk.transform_with_state(function)
    params, state = jax.jit(net.init)(KEY, *first(batch))

    def call(params: Any, *example: Any) -> Any:
        return squared(net.apply(params, state, KEY, *example)[0])

    return Case(call, params, batch)


def of_equinox(module: Any, *batch: Any, call: Callable[..., Any], spread: float = 0.1) -> Case:
    """Makes a case of a call of an Equinox module; its floating-point arrays are trained."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)

    def run(params: Any, *example: Any) -> Any:
        return call(eqx.combine(params, static), *example)

    return Case(run, params, batch, spread=spread)
