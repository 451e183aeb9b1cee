"""Compute samples one by one where one that is not finite may have made others so."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from psclip_optax.engine.analysis.spreading import has_convolution, is_filter
from psclip_optax.engine.modes.micro_batches import MICRO_BATCHES
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples, in_slices
from psclip_optax.engine.modes.stacked import STACKED
from psclip_optax.engine.modes.weighing import changed_if_any
from psclip_optax.meshes import explicit_mesh


def run_mode(mode: Mode, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """Run a mode, and again one by one if a sample is not finite and may have spread."""
    result = mode.run(problem, leaves, samples)
    is_one = mode is MICRO_BATCHES or samples.number < 2
    # A loop cannot take samples one by one from an axis with an explicit sharding.
    if is_one or explicit_mesh(samples.examples) is not None or not _may_spread(mode, problem):
        return result

    def one_by_one(before: Result, leaves: list[Any], samples: Samples) -> Result:
        run = functools.partial(STACKED.run, problem, leaves)
        after = in_slices(run, samples, 1, has_convolutions=False)
        return jax.tree.map(_alike, before, after)

    return changed_if_any(~result.finite, one_by_one, result, list(leaves), samples)


def _alike(old: jax.Array, new: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else new.astype(old.dtype)  # keys have no `astype`


def _may_spread(mode: Mode, problem: Problem) -> bool:
    plans = problem.plans
    jaxpr = plans.closed.jaxpr
    convolves = has_convolution(jaxpr)
    if mode is STACKED or not convolves:
        return convolves
    by_weight = {plan.weight: plan for plan in plans.all}
    pulled_back = [
        site
        for plan in plans.all
        if plan.norm == "pulled back"
        for weight in (plan.weight, *plan.through)
        for site in by_weight[weight].sites
    ]
    if any(site.route.is_slow_in_loops for site in pulled_back):
        return True
    stacked = [plan.is_direct for plan in plans.leaves]
    differ = [*stacked, *[True] * (len(jaxpr.invars) - len(stacked))]
    return any(plan.is_direct for plan in plans.others) or is_filter(jaxpr, differ)
