"""Make one forward and one backward pass that store each site's inputs and cotangents."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax.engine import taps
from psclip_optax.engine.memory import estimated_bytes, num_bytes
from psclip_optax.engine.modes.mode import Course, Mode
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples, even_slices, in_slices
from psclip_optax.engine.modes.tapped import (
    Seen,
    all_weights,
    squared_norms,
    tapped,
    weighted_sums,
)
from psclip_optax.engine.modes.weighing import changed_if_any, weigh, weights_of_sum
from psclip_optax.engine.routes.route import Entered
from psclip_optax.platforms import by_platform

# Stacked gradients of parameters without a route may need this many times the memory of a plain
# gradient.
_MOST_STACKED = 2
# Smaller stacks need no limit.
_FEW_BYTES = 2**24


class OnePass(Mode):
    """Makes one pass over all samples, or over some at a time if gradients have to be stacked."""

    name = "one_pass"

    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        return in_slices(
            functools.partial(_of_slice, problem, leaves),
            samples,
            _samples_at_a_time(problem, leaves, samples.number),
            has_convolutions=problem.has_convolutions,
        )

    def course(self, problem: Problem, leaves: Sequence[Any], num_samples: int) -> Course:
        number = _samples_at_a_time(problem, leaves, num_samples)
        if number is None:
            return Course()
        why = "for parameters without a route have a stack of gradients"
        return Course(-(-num_samples // number), f"{number} samples at a time, {why}")


ONE_PASS = OnePass()


def _samples_at_a_time(problem: Problem, leaves: Sequence[Any], num_samples: int) -> int | None:
    """Return how many samples' gradients to stack, for parameters without a route; None: all."""
    plans = problem.plans
    kinds = zip(plans.all, plans.avals, strict=True)
    escaping = [kind for plan, kind in kinds if plan.is_direct and plan.escape is not None]
    stacked = num_samples * num_bytes(escaping)
    if stacked <= _FEW_BYTES or problem.axis_name is not None:
        return None
    plain = estimated_bytes(problem.closed, plans, leaves, num_samples).saved or 0
    most = max(_FEW_BYTES, _MOST_STACKED * (plain + num_bytes(leaves)))
    wanted = min(num_samples, -(-stacked // most))
    numbers = even_slices(range(1, num_samples + 1), num_samples, problem.num_devices)
    number = next((number for number in numbers if number >= wanted), numbers[-1])
    return None if number == 1 else -(-num_samples // number)


def _of_slice(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """Make one forward and one backward pass that store each site's inputs and cotangents."""
    plans, params = problem.plans.all, leaves
    leaves = problem.plans.pieces.of(params)
    weights, pull_back = all_weights(problem, leaves)
    actions = {
        site.path: taps.tap(site, keeps_y=plan.is_radial) for plan in plans for site in plan.sites
    }
    seen = tapped(problem, leaves, weights, samples, actions)
    squares = squared_norms(problem, plans, pull_back, weights, seen)
    norms, scales, finite, kept = weigh(problem, samples, seen.outs[0], squares)

    of_samples = weights_of_sum(samples.taus, samples.shares, norms, scales)
    axes = {site.path: site.sample_axis for plan in plans for site in plan.sites}
    stacked, entered = _without_dropped(seen, axes, ~finite & ~kept, kept)

    seen = seen._replace(stacked=stacked, entered=entered)
    sums = weighted_sums(problem, plans, pull_back, weights, seen, of_samples)
    sums = problem.plans.pieces.together(sums, params)
    return Result(sums, seen.outs, norms, scales, finite)


def _without_dropped(
    seen: Seen, axes: taps.Axes, dropped: jax.Array, kept: jax.Array
) -> tuple[dict[int, jax.Array], Entered]:
    """Zero the stacked gradients and the sites' inputs of dropped samples.

    A weight of 0 would not exclude NaN.
    """

    def zeroed(both: tuple[dict[int, jax.Array], Entered], kept: jax.Array) -> Any:
        def where_kept(array: jax.Array, axis: int) -> jax.Array:
            flags = kept.reshape(-1, *[1] * (array.ndim - 1 - axis))
            return jnp.where(flags, array, jnp.zeros((), array.dtype))

        stacked, entered = both
        return (
            {weight: where_kept(array, 0) for weight, array in stacked.items()},
            {
                path: tuple(where_kept(array, axes[path]) for array in arrays)
                for path, arrays in entered.items()
            },
        )

    both = seen.stacked, seen.entered
    # An accelerator fuses the zeros into the next read of the arrays, but copies a loop's carry; a
    # CPU would rewrite all arrays.
    return by_platform(
        dropped,
        both,
        kept,
        cpu=lambda dropped, both, kept: changed_if_any(dropped, zeroed, both, kept),
        elsewhere=lambda _, both, kept: zeroed(both, kept),
    )
