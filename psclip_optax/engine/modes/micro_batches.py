"""Clip the plain mean gradient of each micro-batch before adding it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.clipped_sums import clipped_alone
from psclip_optax.engine.analysis.slices_in_bounds import slices_in_bounds
from psclip_optax.engine.explain import Plan, explained_microbatches
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples
from psclip_optax.engine.modes.weighing import changed_if_any


class MicroBatches(Mode):
    """Clips a micro-batch's mean gradient at its first sample's τ, and scales it by its share."""

    name = "micro-batch"

    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        return _clipped(problem, leaves, samples)

    def explain(
        self, problem: Problem, leaves: Sequence[Any], params: Any, num_samples: int, note: str
    ) -> Plan:
        del problem, leaves, note
        return explained_microbatches(params, num_samples)


MICRO_BATCHES = MicroBatches()


def _clipped(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    counts, number = samples.counts, jnp.sum(samples.counts)
    examples = samples.examples
    if problem.may_be_padded:
        # Padding that is not finite would not vanish with a weight of 0.
        index = jnp.where(counts, jnp.arange(counts.size), jnp.argmax(counts))
        examples = [example[index] for example in examples]
    run = core.jaxpr_as_fun(slices_in_bounds(problem.closed))

    def one(leaves: list[Any], _: None, example: list[Any]) -> list[Any]:
        return run(*leaves, *example)

    def losses(leaves: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
        outs = problem.over_samples(one)(leaves, None, examples)
        return outs[0], outs

    values, pull_back, outs = jax.vjp(losses, list(leaves), has_aux=True)
    if problem.may_be_padded and len(outs) > 1:  # padding needs its own aux too

        def own_outs(_: list[jax.Array], leaves: list[Any], examples: list[Any]) -> list[jax.Array]:
            return problem.over_samples(one)(leaves, None, examples)

        outs = changed_if_any(~counts, own_outs, outs, list(leaves), samples.examples)
    of_samples = jnp.where(counts, 1 / jnp.maximum(number, 1).astype(problem.dtype), 0)
    gradients = pull_back(of_samples.astype(values.dtype))[0]

    clipped, norm, scale = clipped_alone(gradients, samples.taus[0], problem.groups)
    finite = problem.groups.in_all(jnp.isfinite(norm)) & jnp.all(jnp.isfinite(values))
    kept = finite | (problem.on_nonfinite == "propagate")
    share = jnp.sum(jnp.where(counts, samples.shares, 0))
    sums = [
        jnp.where(kept & (number > 0), total * share.astype(total.dtype), 0) for total in clipped
    ]
    return Result(sums, outs, norm[None], scale[None], finite[None] | (number == 0))
