"""The modes: each gives Σ γ_k g_k / N of a batch, or of one slice of it after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax import clipping, meshes, stacks, transforms
from psclip_optax.clipping import OnNonfinite
from psclip_optax.engine import norms as norms_of
from psclip_optax.engine import taps
from psclip_optax.engine.analysis.computed import compute
from psclip_optax.engine.analysis.linearity import unproven_rule
from psclip_optax.engine.memory import NO_GRADIENT_OF_VMAP, estimated_bytes
from psclip_optax.engine.modes.slices import Result, Samples, in_slices
from psclip_optax.engine.plan import LeafPlan, Plans
from psclip_optax.engine.routes.route import Entered
from psclip_optax.thresholds import concrete

# What one pass may keep, relative to what a plain gradient saves, of a batch that is not sliced.
MOST_KEPT = 0.15
# In more slices than these one pass would run too few samples at a time to be fast.
MOST_SLICES = 4

_Values = TypeVar("_Values")
_PullBack: TypeAlias = Callable[[list[jax.Array]], dict[int, jax.Array]]


class Problem(NamedTuple):
    """A traced loss, and what its parameters' gradients take.

    Attributes:
      closed: the loss for one example, from the parameters' and the example's leaves.
      plans: for each parameter, and for weights that are computed from them.
      on_nonfinite: "drop" or "propagate".
      dtype: of norms and scales.
      axis_name: of the mesh axes that the batch is sharded over, under shard_map.
      spmd_axis_name: of the axis of samples, for constraints inside the loss.
    """

    closed: core.ClosedJaxpr
    plans: Plans
    on_nonfinite: OnNonfinite
    dtype: Any
    axis_name: Any
    spmd_axis_name: Any

    @property
    def has_convolutions(self) -> bool:
        sites = (site for plan in self.plans.all for site in plan.sites)
        return any(site.route.is_slow_in_loops for site in sites)

    def unproven_rule(self) -> core.JaxprEqn | None:
        """Find what keeps the backward pass from being proven linear in the losses' cotangents."""
        jaxpr, num_leaves = self.closed.jaxpr, self.plans.num_leaves
        varied = [i < num_leaves for i in range(len(jaxpr.invars))]
        return unproven_rule(jaxpr, varied, [i == 0 for i in range(len(jaxpr.outvars))])

    def over_samples(self, function: Callable[..., Any], out_axes: Any = 0) -> Callable[..., Any]:
        in_axes, name = (None, None, 0), self.spmd_axis_name
        return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, spmd_axis_name=name)


# The modes


def _one_pass(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """One forward and one backward pass, keeping what enters and leaves each site."""
    plans = problem.plans.all
    weights, pull_back = _weights(problem, leaves)
    actions = {
        site.path: taps.tap(site, keeps_y=plan.is_radial) for plan in plans for site in plan.sites
    }
    seen = _tapped(problem, leaves, weights, samples, actions)
    squares = _squared_norms(problem, plans, pull_back, weights, seen)
    norms, scales, finite, kept = _weigh(problem, samples, seen.outs[0], squares)

    of_samples = _weights_of_sum(samples, norms, scales)
    axes = {site.path: site.sample_axis for plan in plans for site in plan.sites}
    stacked, entered = _without_dropped(seen, axes, ~finite & ~kept, kept)

    def contracted(plan: LeafPlan) -> jax.Array:
        weight = weights[plan.weight]
        if plan.is_direct:
            return stacks.weighted_sum(stacked[plan.weight], 0, of_samples)
        if not plan.groups:
            return jnp.zeros_like(weight)
        return norms_of.weighted_sum(plan, weight, entered, seen.cotangents, of_samples)

    sums = {plan.weight: contracted(plan) for plan in plans}
    pulled = pull_back([sums[plan.weight] for plan in problem.plans.others])
    sums = [norms_of.added(sums[leaf], pulled.get(leaf)) for leaf in range(len(leaves))]
    return Result(sums, seen.outs, norms, scales, finite)


def _two_pass(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """About a plain gradient's memory: one pass over a few slices, else two passes over all."""
    num_samples = samples.taus.size
    slices = num_slices(problem, leaves, num_samples)
    if slices is None:
        try:
            return _in_two_passes(problem, leaves, samples)
        except NO_GRADIENT_OF_VMAP:
            return _one_pass(problem, leaves, samples)
    return in_slices(
        functools.partial(_one_pass, problem, leaves),
        samples,
        -(-num_samples // slices),
        has_convolutions=problem.has_convolutions,
    )


def num_slices(problem: Problem, leaves: Sequence[Any], num_samples: int) -> int | None:
    """In how many slices one pass takes a plain gradient's memory; None: better in two passes."""
    plans = problem.plans
    # Behind a rule that is not linear, weighted cotangents give no weighted sum.
    is_linear = problem.unproven_rule() is None
    others = [plan.weight for plan in plans.all if not (is_linear and _may_be_probed(plan))]
    if problem.axis_name is not None:  # an estimate would have to know what varies over the mesh
        return None if len(others) < len(plans.all) else 1
    estimate = estimated_bytes(problem.closed, plans, leaves, 1)
    if estimate.saved is None:
        return 1
    most_kept = MOST_KEPT * estimate.saved
    fits = sum(estimate.kept.values()) <= most_kept
    wanted = 1 if fits else max(1, -(-estimate.of_one_pass // max(estimate.saved, 1)))
    few = _even_slices(range(wanted, MOST_SLICES + 1), num_samples)
    # Devices that share the batch would sum up each slice's gradient.
    if few and (few[0] == 1 or not _may_be_shared(num_samples)):
        return few[0]
    would_keep = sum(estimate.kept[weight] for weight in others)
    if is_linear and would_keep <= most_kept:
        return None
    return few[0] if few else _even_slices(range(1, wanted + 1), num_samples)[-1]


def _even_slices(numbers: Iterable[int], num_samples: int) -> list[int]:
    """Those numbers of slices that leave samples where they are, should devices share them."""
    if not _may_be_shared(num_samples):
        return [number for number in numbers if number <= num_samples]
    return [number for number in numbers if num_samples % (number * jax.device_count()) == 0]


def _may_be_shared(num_samples: int) -> bool:
    return jax.device_count() > 1 and num_samples % jax.device_count() == 0


def _in_two_passes(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """One forward pass and two backward: for the norms, then for the weighted sum."""
    plans = problem.plans.all
    probed = [plan for plan in plans if _may_be_probed(plan)]
    others = [plan for plan in plans if not _may_be_probed(plan)]
    weights, pull_back = _weights(problem, leaves)
    norm = functools.partial(norms_of.site_squared_norm, dtype=problem.dtype)
    actions = {
        site.path: taps.tap(site, keeps_y=plan.is_radial) for plan in others for site in plan.sites
    }
    for site in (site for plan in probed for site in plan.sites):
        actions[site.path] = taps.probe(site, norm, problem.dtype)
    seen = _tapped(problem, leaves, weights, samples, actions)
    squares = _squared_norms(problem, others, pull_back, weights, seen)
    for site in (site for plan in probed for site in plan.sites):
        probed_squares = seen.cotangents[site.path]
        squares += jnp.sum(probed_squares, axis=tuple(range(site.sample_axis)))
    norms, scales, finite, kept = _weigh(problem, samples, seen.outs[0], squares)

    of_samples, bad = _weights_of_sum(samples, norms, scales), ~finite & ~kept
    sums = _backward(problem, list(leaves), samples.examples, of_samples, kept, bad)
    return Result(sums, seen.outs, norms, scales, finite)


def _backward(
    problem: Problem,
    leaves: list[jax.Array],
    examples: list[jax.Array],
    of_samples: jax.Array,
    kept: jax.Array,
    bad: jax.Array,
) -> list[jax.Array]:
    """Σ of_samples_k g_k by a plain backward pass, and by another if samples must be left out."""
    # As the first pass has it, so that both share one forward pass.
    closed = problem.plans.closed

    def of(consts: list[Any], leaves: list[Any], examples: list[Any], of_samples: Any) -> list[Any]:
        run = _outs_of(closed.replace(consts=consts))

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


def changed_if_any(
    flags: jax.Array, change: Callable[..., _Values], values: _Values, *operands: Any
) -> _Values:
    """change(values, *operands) where any flag is set, else the values as they are."""
    any_flag = clipping.any_of(lax.stop_gradient(flags))
    known = concrete(any_flag)
    if known is not None:  # un-jitted: a loop would be compiled, anew in each call
        return change(values, *operands) if known else values

    # A loop of no step or one and not a branch, which would hold the values twice: a loop changes
    # them where they are.
    @jax.custom_jvp
    def changed(flag: jax.Array, values: _Values, operands: tuple[Any, ...]) -> _Values:
        def once(state: tuple[jax.Array, _Values]) -> tuple[jax.Array, _Values]:
            return jnp.zeros_like(flag), change(state[1], *operands)

        return lax.while_loop(lambda state: state[0], once, (flag, values))[1]

    @changed.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def branch(flag: jax.Array, values: _Values, operands: tuple[Any, ...]) -> _Values:
            return lax.cond(flag, lambda: change(values, *operands), lambda: values)

        return jax.jvp(branch, primals, tangents)

    return changed(any_flag, values, operands)


def _without_dropped(
    seen: _Seen, axes: taps.Axes, dropped: jax.Array, kept: jax.Array
) -> tuple[dict[int, jax.Array], Entered]:
    """Stacked gradients and what enters sites, 0 for dropped samples: weight 0 keeps no NaN out."""

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

    return changed_if_any(dropped, zeroed, (seen.stacked, seen.entered), kept)


def _may_be_probed(plan: LeafPlan) -> bool:
    # Cotangents of probes add up: right for one use, and for the layers of a scan, but the steps
    # of a scan that share a parameter, and sites whose gradients overlap, have cross terms.
    once = all(len(group.sites) == 1 and all(group.sites[0].layered) for group in plan.groups)
    return bool(plan.groups) and plan.norm == "own" and once


def _by_vmap(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """The reference: gradients stacked by vmap, then clipped as the other face does."""
    grad = jax.value_and_grad(_outs_of(problem.closed), has_aux=True)
    (_, outs), stacked = problem.over_samples(grad)(list(leaves), None, samples.examples)
    # A loss that is not finite drops its sample also where its gradient is finite.
    finite_loss = jnp.isfinite(outs[0])
    dropped = ~finite_loss & (problem.on_nonfinite == "drop")
    sums, stats, kept = transforms.clip_and_sum(
        stacked,
        transforms.Batch(samples.taus, samples.counts & ~dropped),
        axes=(0,) * len(stacked),
        masked=True,
        on_nonfinite=problem.on_nonfinite,
    )
    finite = jnp.where(samples.counts, kept & finite_loss, True)
    share = jnp.max(samples.shares, initial=0)  # the same of all
    sums = [total * share.astype(total.dtype) for total in sums]
    return Result(sums, outs, stats.norms, stats.scales, finite)


MODES: dict[str, Callable[[Problem, Sequence[Any], Samples], Result]] = {
    "one_pass": _one_pass,
    "two_pass": _two_pass,
    "vmap": _by_vmap,
}


def _outs_of(closed: core.ClosedJaxpr) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
    run = core.jaxpr_as_fun(closed)

    def outs(leaves: Sequence[Any], _: None, example: list[jax.Array]) -> Any:
        outs = run(*leaves, *example)
        return outs[0], outs

    return outs


def _weights(problem: Problem, leaves: Sequence[Any]) -> tuple[dict[int, Any], _PullBack]:
    """All weights, and from gradients of the computed ones to those of the parameters."""
    weights: dict[int, Any] = dict(enumerate(leaves))
    others = [plan.weight for plan in problem.plans.others]
    if not others:
        return weights, lambda _: {}
    computed, pull_back = jax.vjp(
        compute(problem.plans.closed, problem.plans.computed), list(leaves)
    )
    weights.update(zip(others, computed, strict=True))

    def pulled(gradients: list[jax.Array]) -> dict[int, jax.Array]:
        alike = [g.astype(c.dtype) for g, c in zip(gradients, computed, strict=True)]
        return dict(enumerate(pull_back(alike)[0]))

    return weights, pulled


class _Seen(NamedTuple):
    """What one forward and one backward pass show of each sample.

    Attributes:
      stacked: gradients of the weights without sites.
      cotangents: those of each action's zeros.
      outs: what the loss returns.
      entered: what entered the sites whose actions keep it.
      left: what left them, alike.
    """

    stacked: dict[int, jax.Array]
    cotangents: taps.Taps
    outs: list[jax.Array]
    entered: Entered
    left: taps.Taps


def _tapped(
    problem: Problem,
    leaves: Sequence[Any],
    weights: dict[int, Any],
    samples: Samples,
    actions: dict[Any, taps.Action],
) -> _Seen:
    plans = problem.plans
    direct = {plan.weight: weights[plan.weight] for plan in plans.all if plan.is_direct}
    places = {
        plan.weight: (one.path, one.output)
        for plan, one in zip(plans.others, plans.computed, strict=True)
    }

    def outs(direct: dict[int, Any], zeros: taps.Taps, example: list[jax.Array]) -> Any:
        inputs = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
        given = {place: direct.get(i, weights[i]) for i, place in places.items()}
        outs, kept = taps.run_with(plans.closed, [*inputs, *example], zeros, actions, given)
        return outs[0], (outs, kept)

    grad = jax.grad(outs, argnums=(0, 1), has_aux=True)
    # Cotangents are each device's own, as the loss is.
    axes_of_loss = meshes.axes_of_type(problem.closed.out_avals[0])
    zeros = {path: meshes.varying(a.zero, axes_of_loss) for path, a in actions.items()}
    # Samples behind the steps of scans, as they run, so that nothing need be transposed.
    axes = {path: action.num_scans for path, action in actions.items()}
    axes_kept = {(path, side): axes[path] for path in actions for side in actions[path].keeps}
    run = problem.over_samples(grad, out_axes=((0, axes), (0, axes_kept)))
    (stacked, cotangents), (outs_, kept) = run(direct, zeros, samples.examples)
    entered = {path: arrays for (path, side), arrays in kept.items() if side == "entering"}
    left = {path: y for (path, side), (y, *_) in kept.items() if side == "leaving"}
    return _Seen(stacked, cotangents, outs_, entered, left)


def _squared_norms(
    problem: Problem,
    plans: Sequence[LeafPlan],
    pull_back: _PullBack,
    weights: dict[int, Any],
    seen: _Seen,
) -> Any:
    """‖g_k‖² over the parameters of these plans, [n]."""
    own = [plan for plan in plans if plan.norm == "own"]
    squares = _stacked_squares([seen.stacked[p.weight] for p in own if p.is_direct], problem.dtype)
    for plan in (plan for plan in own if plan.groups):
        squares += norms_of.squared_norms(plan, seen.entered, seen.cotangents, problem.dtype)
    for plan in (plan for plan in plans if plan.norm == "separable"):
        squares += _separable_squares(problem, plan, pull_back, weights, seen)
    pulled = [plan for plan in plans if plan.norm == "pulled back"]
    if pulled:
        squares += norms_of.pulled_back_squared_norms(
            pull_back,
            pulled,
            [(plan, weights[plan.weight]) for plan in problem.plans.others],
            seen.stacked,
            seen.entered,
            seen.cotangents,
            problem.dtype,
        )
    return squares


def _separable_squares(
    problem: Problem,
    plan: LeafPlan,
    pull_back: _PullBack,
    weights: dict[int, Any],
    seen: _Seen,
) -> jax.Array:
    def slope(through: int) -> jax.Array:
        cotangents = [
            (jnp.ones_like if other.weight == through else jnp.zeros_like)(weights[other.weight])
            for other in problem.plans.others
        ]
        return pull_back(cotangents)[plan.weight]

    return norms_of.separable_squared_norms(
        plan,
        weights[plan.weight],
        seen.entered,
        seen.left,
        seen.cotangents,
        [slope(weight) for weight in plan.through],
        [seen.stacked[weight] for weight in plan.through],
        problem.dtype,
    )


def _stacked_squares(stacked: Sequence[jax.Array], dtype: Any) -> Any:
    if not stacked:
        return jnp.zeros((), dtype)
    return stacks.squared_norms(stacks.Stack(list(stacked), (0,) * len(stacked)), dtype)


def _weigh(
    problem: Problem, samples: Samples, losses: jax.Array, squares: jax.Array
) -> tuple[jax.Array, ...]:
    """Norms, scales (0 for what is not kept), which samples are finite, and which are kept."""
    # No number of samples is in it where no parameter reaches the loss.
    norms = clipping.norms_of(jnp.broadcast_to(squares, losses.shape))
    is_told = jnp.isfinite(norms) & ~clipping.may_exceed(norms, samples.taus)
    finite = is_told & jnp.isfinite(losses)
    kept = samples.counts & finite if problem.on_nonfinite == "drop" else samples.counts
    scales = clipping.clip_scales(norms, samples.taus)
    scales = jnp.where(is_told, scales, jnp.nan)
    return norms, jnp.where(kept, scales, 0), finite, kept


def _weights_of_sum(samples: Samples, norms: jax.Array, scales: jax.Array) -> jax.Array:
    """γ_k / N; 0 at τ_k = 0, also where a norm that is not 0 has underflowed."""
    return jnp.where((samples.taus > 0) | (norms > 0), scales * samples.shares, 0)
