"""Stack gradients by vmap, then clip them like `per_sample_clip`: the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax import clipped_sums
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.problem import Problem, outs_of
from psclip_optax.engine.modes.slices import Result, Samples


class Stacked(Mode):
    """Stacks gradients by `vmap`, then clips them like `per_sample_clip`: the reference."""

    name = "vmap"

    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        grad = jax.value_and_grad(outs_of(problem.closed), has_aux=True)
        (_, outs), stacked = problem.over_samples(grad)(list(leaves), None, samples.examples)
        # A loss that is not finite drops its sample even if the gradient is finite.
        finite_loss = jnp.isfinite(outs[0])
        dropped = ~finite_loss & (problem.on_nonfinite == "drop")
        sums, stats, kept = clipped_sums.clip_and_sum(
            stacked,
            clipped_sums.Batch(samples.taus, samples.counts & ~dropped),
            axes=(0,) * len(stacked),
            groups=problem.groups,
            masked=True,
            on_nonfinite=problem.on_nonfinite,
        )
        finite = jnp.where(samples.counts, kept & finite_loss, True)
        share = jnp.max(samples.shares, initial=0)  # the same for all
        sums = [total * share.astype(total.dtype) for total in sums]
        return Result(sums, outs, stats.norms, stats.scales, finite)


STACKED = Stacked()
