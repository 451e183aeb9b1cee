"""Plain mean gradients of micro-batches, each clipped before it is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples
from psclip_optax.engine.modes.weighing import changed_if_any
from psclip_optax.transforms import clipped_alone


def counting(counts: jax.Array, size: int) -> jax.Array:
    """Which micro-batches of `size` consecutive samples hold one that counts, from bool [n]."""
    if size == 1:
        return counts
    number = -(-counts.size // size)
    return jnp.any(jnp.pad(counts, (0, number * size - counts.size)).reshape(number, size), axis=1)


def of_each_sample(values: jax.Array, size: int, num_samples: int) -> jax.Array:
    """What its micro-batch has, for each sample: [number of micro-batches] → [n]."""
    return values if size == 1 else jnp.repeat(values, size)[:num_samples]


def clip_microbatch(
    problem: Problem, leaves: Sequence[Any], samples: Samples, *, is_padded: bool
) -> Result:
    """One micro-batch: its mean gradient, clipped to its first sample's τ, times its share.

    Args:
      problem: the traced loss.
      leaves: of the parameters.
      samples: of the micro-batch.
      is_padded: whether some may not count. They are replaced, for what they hold would get past a
        weight of 0 if it is not finite.
    """
    counts, number = samples.counts, jnp.sum(samples.counts)
    examples = samples.examples
    if is_padded:
        index = jnp.where(counts, jnp.arange(counts.size), jnp.argmax(counts))
        examples = [example[index] for example in examples]
    run = core.jaxpr_as_fun(problem.closed)

    def one(leaves: list[Any], _: None, example: list[Any]) -> list[Any]:
        return run(*leaves, *example)

    def losses(leaves: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
        outs = problem.over_samples(one)(leaves, None, examples)
        return outs[0], outs

    values, pull_back, outs = jax.vjp(losses, list(leaves), has_aux=True)
    if is_padded and len(outs) > 1:  # the aux of padding is its own too

        def own_outs(_: list[jax.Array], leaves: list[Any], examples: list[Any]) -> list[jax.Array]:
            return problem.over_samples(one)(leaves, None, examples)

        outs = changed_if_any(~counts, own_outs, outs, list(leaves), samples.examples)
    of_samples = jnp.where(counts, 1 / jnp.maximum(number, 1).astype(problem.dtype), 0)
    gradients = pull_back(of_samples.astype(values.dtype))[0]

    clipped, norm, scale = clipped_alone(gradients, samples.taus[0])
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(values))
    kept = finite | (problem.on_nonfinite == "propagate")
    share = jnp.sum(jnp.where(counts, samples.shares, 0))
    sums = [
        jnp.where(kept & (number > 0), total * share.astype(total.dtype), 0) for total in clipped
    ]
    return Result(sums, outs, norm[None], scale[None], finite[None] | (number == 0))
