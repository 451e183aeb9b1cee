"""Check the batch of a step, map its loss over the samples, and collect logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from psclip_optax.arrays import array_leaves, described
from psclip_optax.clipping import check_positions, check_sample_mask
from psclip_optax.engine.calls import value_and_aux
from psclip_optax.typing import Params, PyTree

Metrics: TypeAlias = dict[str, PyTree]
Loss: TypeAlias = Callable[..., PyTree]


class Batch(NamedTuple):
    """Holds the batch arguments, n samples on the first axis of every leaf, and the mask."""

    examples: tuple[PyTree, ...]
    sample_mask: jax.Array | None
    positions: jax.Array | None

    def counts(self) -> jax.Array:
        number = len(jax.tree.leaves(self.examples)[0])
        return jnp.ones(number, bool) if self.sample_mask is None else self.sample_mask


def checked_batch(
    examples: tuple[PyTree, ...],
    sample_mask: jax.typing.ArrayLike | None,
    positions: jax.typing.ArrayLike | None,
) -> Batch:
    shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(examples)]
    if not shapes or [] in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "the batch arguments are arrays (or pytrees of them) with the n samples on the first "
            f"axis of each, got shapes {shapes}; give each sample its own entry, e.g. "
            "jax.random.split(key, n) for a key, and close over what all samples share"
        )
    n = shapes[0][0]
    return Batch(
        examples,
        None if sample_mask is None else check_sample_mask(sample_mask, n),
        None if positions is None else check_positions(positions, n),
    )


def logged(loss: Loss, has_aux: bool) -> Loss:
    """Wraps a loss so that it returns its value and aux as aux, even if it has no aux."""

    def logged(params: Params, *example: PyTree) -> tuple[jax.Array, Metrics]:
        result = loss(params, *example)
        value, aux = value_and_aux(result, has_aux, "take [0] of what model(x[None]) returns")
        _check_logs(aux)
        return value, {"loss": value} | ({"aux": aux} if has_aux else {})

    return logged


def _check_logs(aux: PyTree) -> None:
    advice = "aux is averaged over the samples, so leave out, or reduce, what is no number"
    for name, leaf in array_leaves("aux", aux, advice):
        if jnp.shape(leaf):
            raise TypeError(
                f"{name} is {described(leaf)}, but expected a scalar of one example, for its mean "
                "over the samples is logged; reduce it, for instance by .mean()"
            )


def over_samples(function: Loss, params: Params, examples: tuple[PyTree, ...]) -> PyTree:
    return jax.vmap(function, in_axes=(None, *[0] * len(examples)))(params, *examples)


def with_samples_for_padding(batch: Batch) -> tuple[PyTree, ...]:
    # Padding may contain anything, and weight 0 does not help: the gradient of 0 · ∞ is NaN.
    if batch.sample_mask is None:
        return batch.examples
    own = jnp.arange(batch.sample_mask.size)
    index = jnp.where(batch.sample_mask, own, jnp.argmax(batch.sample_mask))
    return jax.tree.map(lambda leaf: leaf[index], batch.examples)


def which_count(losses: jax.Array, sample_mask: jax.Array | None) -> jax.Array:
    return jnp.ones(losses.shape, bool) if sample_mask is None else sample_mask


def sum_over(values: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(counts, values, 0))


def at_least_one(counts: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(counts), 1)


def mean_logs(logs: Metrics, sample_mask: jax.Array | None) -> Metrics:
    counts = which_count(logs["loss"], sample_mask) & jnp.isfinite(logs["loss"])
    return jax.tree.map(lambda values: sum_over(values, counts) / at_least_one(counts), logs)
