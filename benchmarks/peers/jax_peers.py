"""Runs the libraries for JAX; a step returns (value, clipped mean gradient)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import psclip_optax as psc
from benchmarks.peers.common import Inputs, Steps
from benchmarks.zoo.models import ZOO, Model, Size

# The fastest setting for both models. With whole batches, XLA's CPU backend fuses jax_privacy's
# scaling and sum over samples in such a way that time grows about with the square of the number of
# parameters; an `optimization_barrier` as its `pre_clipping_transform` does not help.
MICROBATCH_SIZE = 1


def build(peer: str, inputs: Inputs, with_plain: bool) -> Steps:
    loss = loss_of(inputs.model, inputs.size)
    arguments = (as_tree(inputs.params), *map(jnp.asarray, inputs.batch))
    clipped, clipped_bytes = ready(PEERS[peer](loss, inputs), arguments)
    steps = Steps(
        None, clipped, lambda result: float(result[0]), lambda result: as_names(result[1])
    )
    if not with_plain:
        return steps
    plain_step, plain_bytes = ready(plain(loss), arguments)
    return steps._replace(plain=plain_step, temp_bytes=(plain_bytes, clipped_bytes))


def ready(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[[], Any], int]:
    """Compiles a step, and returns it with its temporary memory."""
    program: Any = jax.jit(function).lower(*arguments).compile()
    temp_bytes = program.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(program(*arguments)), temp_bytes


def loss_of(model: str, size: Size) -> Callable[..., Any]:
    built: list[Model] = []

    def params() -> Any:
        built.append(ZOO[model](size))
        return built[0].params

    # Only traced: the weights come from the inputs, and computing them takes seconds.
    jax.eval_shape(params)
    return built[0].loss


def as_tree(named: dict[str, np.ndarray]) -> Any:
    arrays = {name: jnp.asarray(array) for name, array in named.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def as_names(tree: Any) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()
    }


def plain(loss: Callable[..., Any]) -> Callable[..., Any]:
    def mean_loss(params: Any, *batch: Any) -> jax.Array:
        return jax.vmap(lambda *example: loss(params, *example))(*batch).mean()

    return jax.value_and_grad(mean_loss)


def ours(loss: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    return psc.clipped_value_and_grad(loss, inputs.threshold, mode="one_pass")


def jax_privacy(
    loss: Callable[..., Any], inputs: Inputs, microbatch_size: int | None = None
) -> Callable[..., Any]:
    from jax_privacy import clipping  # pyright: ignore[reportMissingImports]

    summed = clipping.clipped_grad(
        loss,
        l2_clip_norm=inputs.threshold,
        normalize_by=inputs.num_samples,
        batch_argnums=tuple(range(1, 1 + len(inputs.batch))),
        keep_batch_dim=False,
        return_values=True,
        microbatch_size=microbatch_size,
    )

    def step(*arguments: Any) -> Any:
        grads, aux = summed(*arguments)
        return aux.values.mean(), grads

    return step


def jax_privacy_sliced(loss: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    return jax_privacy(loss, inputs, MICROBATCH_SIZE)


def optax_stacked(loss: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    def step(params: Any, *batch: Any) -> Any:
        def of_one(*example: Any) -> Any:
            return jax.value_and_grad(loss)(params, *example)

        values, stacked = jax.vmap(of_one)(*batch)
        leaves, structure = jax.tree.flatten(stacked)
        sums, _ = optax.per_example_global_norm_clip(leaves, inputs.threshold)
        means = jax.tree.map(lambda leaf: leaf / inputs.num_samples, sums)
        return values.mean(), jax.tree.unflatten(structure, jax.tree.leaves(means))

    return step


PEERS: dict[str, Callable[[Any, Inputs], Callable[..., Any]]] = {
    "ours": ours,
    "jax_privacy": jax_privacy,
    "jax_privacy_sliced": jax_privacy_sliced,
    "optax": optax_stacked,
}
