"""Take about a plain gradient's memory: one pass over a few slices, else two passes over all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax.engine import norms as norms_of
from psclip_optax.engine import taps
from psclip_optax.engine.analysis.linearity import described_rule
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.memory import NO_GRADIENT_OF_VMAP, estimated_bytes
from psclip_optax.engine.modes.mode import Course, Mode
from psclip_optax.engine.modes.one_pass import ONE_PASS
from psclip_optax.engine.modes.problem import Problem, outs_of
from psclip_optax.engine.modes.slices import Result, Samples, even_slices, in_slices, may_be_shared
from psclip_optax.engine.modes.tapped import all_weights, squared_norms, tapped
from psclip_optax.engine.modes.weighing import changed_if_any, weigh, weights_of_sum
from psclip_optax.engine.plan import LeafPlan

# The memory that one pass over a whole batch may keep, relative to that of a plain gradient.
MOST_KEPT = 0.15
# With more slices than these, one pass would run too few samples at a time to be fast.
MOST_SLICES = 4


class TwoPass(Mode):
    """About a plain gradient's memory: one pass over a few slices, else two passes over all."""

    name = "two_pass"

    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        num_samples = samples.number
        slices = _num_slices(problem, leaves, num_samples)
        if slices is None:
            try:
                return _in_two_passes(problem, leaves, samples)
            except NO_GRADIENT_OF_VMAP:
                return ONE_PASS.run(problem, leaves, samples)
        return in_slices(
            functools.partial(ONE_PASS.run, problem, leaves),
            samples,
            -(-num_samples // slices),
            has_convolutions=problem.has_convolutions,
        )

    def course(self, problem: Problem, leaves: Sequence[Any], num_samples: int) -> Course:
        slices, why = _num_slices(problem, leaves, num_samples), _why_never_weighted(problem)
        return Course(slices, f"one pass over slices, never two passes: {why}" if why else "")


TWO_PASS = TwoPass()


def _why_never_weighted(problem: Problem) -> str:
    """Say why a backward pass of weighted losses is not the weighted sum; "" where it is."""
    if problem.groups.of_leaf is not None:
        return "a backward pass has one weight for each sample, not one for each group"
    rule = problem.unproven_rule()
    return "" if rule is None else f"the loss passes {described_rule(rule)}"


def _num_slices(problem: Problem, leaves: Sequence[Any], num_samples: int) -> int | None:
    """Say in how many slices one pass takes a plain gradient's memory; None: take two passes."""
    plans = problem.plans
    # Behind a rule that is not linear, weighted cotangents give no weighted sum.
    is_weighted = not _why_never_weighted(problem)
    others = [plan.weight for plan in plans.all if not (is_weighted and _may_be_probed(plan))]
    if problem.axis_name is not None:  # an estimate would have to know what varies over the mesh
        return None if len(others) < len(plans.all) else 1
    estimate = estimated_bytes(problem.closed, plans, leaves, 1)
    if estimate.saved is None:
        return 1
    most_kept = MOST_KEPT * estimate.saved
    fits = sum(estimate.kept.values()) <= most_kept
    wanted = 1 if fits else max(1, -(-estimate.of_one_pass // max(estimate.saved, 1)))
    few = even_slices(range(wanted, MOST_SLICES + 1), num_samples)
    # Devices that share the batch would sum up each slice's gradient.
    if few and (few[0] == 1 or not may_be_shared(num_samples)):
        return few[0]
    would_keep = sum(estimate.kept[weight] for weight in others)
    if is_weighted and would_keep <= most_kept:
        return None
    return few[0] if few else even_slices(range(1, wanted + 1), num_samples)[-1]


def _in_two_passes(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """Make one forward pass and two backward: for the norms, then for the weighted sum."""
    plans, params = problem.plans.all, leaves
    leaves = problem.plans.pieces.of(params)
    probed = [plan for plan in plans if _may_be_probed(plan)]
    others = [plan for plan in plans if not _may_be_probed(plan)]
    weights, pull_back = all_weights(problem, leaves)

    def norm(site: Site, entered: tuple[jax.Array, ...], dy: jax.Array) -> jax.Array:
        with problem.making_norms():
            return norms_of.site_squared_norm(site, entered, dy, problem.dtype)

    actions = {
        site.path: taps.tap(site, keeps_y=plan.is_radial) for plan in others for site in plan.sites
    }
    for site in (site for plan in probed for site in plan.sites):
        actions[site.path] = taps.probe(site, norm, problem.dtype)
    seen = tapped(problem, leaves, weights, samples, actions)
    squares = squared_norms(problem, others, pull_back, weights, seen)
    for site in (site for plan in probed for site in plan.sites):
        probed_squares = seen.cotangents[site.path]
        squares += jnp.sum(probed_squares, axis=tuple(range(site.sample_axis)))
    norms, scales, finite, kept = weigh(problem, samples, seen.outs[0], squares)

    of_samples, bad = weights_of_sum(samples.taus, samples.shares, norms, scales), ~finite & ~kept
    sums = _backward(problem, list(leaves), samples.examples, of_samples, kept, bad)
    sums = problem.plans.pieces.together(sums, params)
    return Result(sums, seen.outs, norms, scales, finite)


def _backward(
    problem: Problem,
    leaves: list[jax.Array],
    examples: list[jax.Array],
    of_samples: jax.Array,
    kept: jax.Array,
    bad: jax.Array,
) -> list[jax.Array]:
    """Sum of_samples_k g_k by a plain backward pass, and by another if samples must be left out."""
    # The same forward pass as in the first pass, so that both share it.
    closed = problem.plans.closed

    def of(consts: list[Any], leaves: list[Any], examples: list[Any], of_samples: Any) -> list[Any]:
        run = outs_of(closed.replace(consts=consts))

        def losses(leaves: list[Any]) -> jax.Array:
            return problem.over_samples(lambda *inputs: run(*inputs)[0])(leaves, None, examples)

        value, pull_back = jax.vjp(losses, leaves)
        return pull_back(of_samples.astype(value.dtype))[0]

    def without_dropped(
        _: Any,
        consts: list[Any],
        leaves: list[Any],
        examples: list[Any],
        of_samples: Any,
        kept: Any,
    ) -> list[Any]:
        # Padding and dropped samples may hold NaN, which weight 0 would not keep out.
        index = jnp.where(kept, jnp.arange(kept.size), jnp.argmax(kept))
        sums = of(consts, leaves, [example[index] for example in examples], of_samples)
        return [jnp.where(jnp.any(kept), total, 0) for total in sums]

    consts = list(closed.consts)
    sums = of(consts, leaves, examples, of_samples)
    return changed_if_any(bad, without_dropped, sums, consts, leaves, examples, of_samples, kept)


def _may_be_probed(plan: LeafPlan) -> bool:
    # Cotangents of probes add up: right for one use, and for the layers of a scan, but the steps
    # of a scan that share a parameter, and sites whose gradients overlap, have cross terms.
    once = all(len(group.sites) == 1 and all(group.sites[0].layered) for group in plan.groups)
    return bool(plan.groups) and plan.norm == "own" and once
