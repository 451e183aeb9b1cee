"""Need about a plain gradient's memory: one pass over a few slices, or else two over all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psclip_optax import meshes
from psclip_optax.engine import norms as norms_of
from psclip_optax.engine import taps
from psclip_optax.engine.analysis.computed import compute
from psclip_optax.engine.analysis.equations import has_dtype
from psclip_optax.engine.analysis.linearity import described_rule
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.memory import NO_GRADIENT_OF_VMAP, estimated_bytes
from psclip_optax.engine.modes.mode import Course, Mode
from psclip_optax.engine.modes.one_pass import ONE_PASS
from psclip_optax.engine.modes.problem import Problem, outs_of
from psclip_optax.engine.modes.slices import Result, Samples, even_slices, in_slices, may_be_shared
from psclip_optax.engine.modes.tapped import Seen, all_weights, seen_of, squared_norms
from psclip_optax.engine.modes.weighing import changed_if_any, weigh, weights_of_sum
from psclip_optax.engine.plan import LeafPlan, Plans, without_small

# The memory that one pass over a whole batch may use, relative to that of a plain gradient.
MOST_KEPT = 0.15
# The same if devices may share the batch: then each slice gathers sharded parameters again, and
# sums its gradient over the devices.
MOST_KEPT_OF_SHARED = 0.5
# With more slices than these, one pass would run too few samples at a time to be fast.
MOST_SLICES = 4


class TwoPass(Mode):
    """Needs about a plain gradient's memory: one pass over a few slices, or else two over all."""

    name = "two_pass"

    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        num_samples = samples.number
        probing = _probing(problem)
        slices = _num_slices(problem, probing, leaves, num_samples)
        if slices is None:
            try:
                return _in_two_passes(problem._replace(plans=probing), leaves, samples)
            except NO_GRADIENT_OF_VMAP:
                return ONE_PASS.run(problem, leaves, samples)
        return in_slices(
            functools.partial(ONE_PASS.run, problem, leaves),
            samples,
            -(-num_samples // slices),
            has_convolutions=problem.has_convolutions,
        )

    def course(self, problem: Problem, leaves: Sequence[Any], num_samples: int) -> Course:
        probing, why = _probing(problem), _why_never_weighted(problem)
        slices = _num_slices(problem, probing, leaves, num_samples)
        note = f"one pass over slices, never two passes: {why}" if why else ""
        return Course(slices, note, probing if slices is None else None)


TWO_PASS = TwoPass()


def _why_never_weighted(problem: Problem) -> str:
    """Say why a backward pass of weighted losses is not the weighted sum; "" if it is."""
    if problem.groups.of_leaf is not None:
        return "a backward pass has one weight for each sample, not one for each group"
    rule = problem.unproven_rule()
    return "" if rule is None else f"the loss passes {described_rule(rule)}"


def _num_slices(
    problem: Problem, probing: Plans, leaves: Sequence[Any], num_samples: int
) -> int | None:
    """Return the number of slices that fits a plain gradient's memory; None: make two passes."""
    plans = problem.plans
    # Through a rule that is not linear, weighted cotangents do not give the weighted sum.
    is_weighted = not _why_never_weighted(problem)
    others = [plan.weight for plan in probing.all if not (is_weighted and _may_be_probed(plan))]
    if problem.axis_name is not None:  # the estimate ignores what varies over the mesh
        return None if len(others) < len(plans.all) else 1
    estimate = estimated_bytes(problem.closed, plans, leaves, 1)
    if estimate.saved is None:
        return 1
    most_kept = MOST_KEPT * estimate.saved
    fits = sum(estimate.kept.values()) <= most_kept
    wanted = 1 if fits else max(1, -(-estimate.of_one_pass // max(estimate.saved, 1)))
    devices = problem.num_devices
    is_shared = may_be_shared(num_samples, devices)
    few = even_slices(range(wanted, MOST_SLICES + 1), num_samples, devices)
    if few and (few[0] == 1 or not is_shared):
        return few[0]
    would_keep = sum(estimate.kept[weight] for weight in others)
    most_kept = MOST_KEPT_OF_SHARED * estimate.saved if is_shared else most_kept
    if is_weighted and would_keep <= most_kept:
        return None
    return few[0] if few else even_slices(range(1, wanted + 1), num_samples, devices)[-1]


def _in_two_passes(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """Make one forward pass and two backward passes: for norms, then for the weighted sum."""
    plans, params = problem.plans.all, leaves
    leaves = problem.plans.pieces.of(params)
    probed = [plan for plan in plans if _may_be_probed(plan)]
    others = [plan for plan in plans if not _may_be_probed(plan)]

    def norm(site: Site, entered: tuple[jax.Array, ...], dy: jax.Array) -> jax.Array:
        with problem.making_norms():
            return norms_of.site_squared_norm(site, entered, dy, problem.dtype)

    actions = {
        site.path: taps.tap(site, keeps_y=plan.is_radial) for plan in others for site in plan.sites
    }
    for site in (site for plan in probed for site in plan.sites):
        actions[site.path] = taps.probe(site, norm, problem.dtype)
    passes = _forward(problem, list(leaves), samples, actions)
    seen = passes.seen()
    weights, pull_back = all_weights(problem, leaves)
    squares = squared_norms(problem, others, pull_back, weights, seen)
    for site in (site for plan in probed for site in plan.sites):
        probed_squares = seen.cotangents[site.path]
        squares += jnp.sum(probed_squares, axis=tuple(range(site.sample_axis)))
    norms, scales, finite, kept = weigh(problem, samples, seen.outs[0], squares)

    of_samples, bad = weights_of_sum(samples.taus, samples.shares, norms, scales), ~finite & ~kept

    def summed(weights: jax.Array) -> list[jax.Array]:
        return _backward(problem, passes, list(leaves), samples.examples, weights, kept, bad)

    has_half = has_dtype(problem.plans.closed.jaxpr, jnp.float16)
    sums = norms_of.by_shares(summed, of_samples) if has_half else summed(of_samples)
    sums = problem.plans.pieces.together(sums, params)
    return Result(sums, seen.outs, norms, scales, finite)


class _Passes(NamedTuple):
    """Holds a forward pass that two backward passes share.

    Attributes:
      pull_back: a function from cotangents of the losses to those of the zeros added to direct
        weights for each sample, of the actions' zeros, and of the parameters' leaves.
      losses: the losses of the samples.
      outs: the results of the loss.
      kept: the arrays that the actions store.
    """

    pull_back: Callable[[jax.Array], tuple[dict[int, jax.Array], taps.Taps, list[jax.Array]]]
    losses: jax.Array
    outs: list[jax.Array]
    kept: taps.Kept

    def seen(self) -> Seen:
        stacked, cotangents, _ = self.pull_back(jnp.ones_like(self.losses))
        return seen_of(stacked, cotangents, self.outs, self.kept)

    def sums(self, of_samples: jax.Array) -> list[jax.Array]:
        return self.pull_back(of_samples.astype(self.losses.dtype))[2]


def _forward(
    problem: Problem, leaves: list[Any], samples: Samples, actions: dict[taps.Path, taps.Action]
) -> _Passes:
    """Run the loss on all samples, with the derivative of the batch."""
    plans, n = problem.plans, samples.number
    axes_of_loss = meshes.axes_of_type(problem.closed.out_avals[0])
    places = {
        plan.weight: (one.path, one.output)
        for plan, one in zip(plans.others, plans.computed, strict=True)
    }

    def of_batch(own: dict[int, Any], zeros: taps.Taps, leaves: list[Any]) -> Any:
        # Not by `all_weights`: its vjp would hide custom derivative rules from this vjp.
        computed = compute(plans.closed, plans.computed)(list(leaves)) if places else []
        weights = dict(enumerate(leaves)) | dict(zip(places, computed, strict=True))

        def of_sample(own: dict[int, Any], zeros: taps.Taps, example: list[Any]) -> Any:
            used = {i: weight + own[i] if i in own else weight for i, weight in weights.items()}
            inputs = [*(used[i] for i in range(plans.num_leaves)), *example]
            given = {place: used[i] for i, place in places.items()}
            outs, kept = taps.run_with(plans.closed, inputs, zeros, actions, given)
            return outs[0], (outs, kept)

        axes = {path: action.num_scans for path, action in actions.items()}
        axes_kept = {(path, side): axes[path] for path in actions for side in actions[path].keeps}
        run = problem.over_samples(of_sample, in_axes=(0, axes, 0), out_axes=(0, (0, axes_kept)))
        return run(own, zeros, samples.examples)

    def zeros(shaped: Any, axis: int) -> jax.Array:
        shape = (*shaped.shape[:axis], n, *shaped.shape[axis:])
        return meshes.varying(jnp.zeros(shape, shaped.dtype), axes_of_loss)

    kinds = zip(plans.all, plans.avals, strict=True)
    own = {plan.weight: zeros(shaped, 0) for plan, shaped in kinds if plan.is_direct}
    at_sites = {path: zeros(action.zero, action.num_scans) for path, action in actions.items()}
    losses, pull_back, (outs, kept) = jax.vjp(of_batch, own, at_sites, leaves, has_aux=True)
    return _Passes(pull_back, losses, outs, kept)


def _backward(
    problem: Problem,
    passes: _Passes,
    leaves: list[jax.Array],
    examples: list[jax.Array],
    of_samples: jax.Array,
    kept: jax.Array,
    bad: jax.Array,
) -> list[jax.Array]:
    """Sum of_samples_k g_k by the second backward pass; repeat it if samples must be left out."""
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
        # Padding and dropped samples may contain NaN, which weight 0 would not exclude.
        index = jnp.where(kept, jnp.arange(kept.size), jnp.argmax(kept))
        sums = of(consts, leaves, [example[index] for example in examples], of_samples)
        return [jnp.where(jnp.any(kept), total, 0) for total in sums]

    consts = list(closed.consts)
    sums = passes.sums(of_samples)
    return changed_if_any(bad, without_dropped, sums, consts, leaves, examples, of_samples, kept)


def _probing(problem: Problem) -> Plans:
    """Plan small direct weights again, because a probe needs no stack of gradients."""
    plans = problem.plans
    both = zip(plans.leaves, without_small(plans, problem.groups).leaves, strict=True)
    leaves = [new if old.is_direct and _may_be_probed(new) else old for old, new in both]
    return plans._replace(leaves=leaves)


def _may_be_probed(plan: LeafPlan) -> bool:
    # Cotangents of probes add up. This is right for a single use and for the layers of a scan.
    # Steps of a scan that share a parameter, and sites whose gradients overlap, have cross terms.
    once = all(len(group.sites) == 1 and all(group.sites[0].layered) for group in plan.groups)
    return bool(plan.groups) and plan.norm == "own" and once
