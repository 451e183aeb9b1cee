"""Make one forward and one backward pass with taps at the sites, and norms from the taps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax import meshes, stacks
from psclip_optax.engine import in_place, norms, taps
from psclip_optax.engine.analysis.computed import compute
from psclip_optax.engine.analysis.layers import layers_of_scans
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Samples
from psclip_optax.engine.plan import LeafPlan, Plans
from psclip_optax.engine.routes.route import Entered

PullBack: TypeAlias = Callable[[list[jax.Array]], dict[int, jax.Array]]


def all_weights(problem: Problem, leaves: Sequence[Any]) -> tuple[dict[int, Any], PullBack]:
    """Return all weights, and the pull-back from gradients of computed weights to parameters."""
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


class Seen(NamedTuple):
    """Holds the arrays of each sample from one forward and one backward pass.

    Attributes:
      stacked: the gradients of the weights without sites.
      cotangents: the cotangents of each action's zeros.
      outs: the results of the loss.
      entered: the inputs of the sites whose actions store them.
      left: the outputs of the sites whose actions store them.
    """

    stacked: dict[int, jax.Array]
    cotangents: taps.Taps
    outs: list[jax.Array]
    entered: Entered
    left: taps.Taps


def tapped(
    problem: Problem,
    leaves: Sequence[Any],
    weights: dict[int, Any],
    samples: Samples,
    actions: dict[Any, taps.Action],
) -> Seen:
    plans = problem.plans
    direct = {plan.weight: weights[plan.weight] for plan in plans.all if plan.is_direct}
    places = {
        plan.weight: (one.path, one.output)
        for plan, one in zip(plans.others, plans.computed, strict=True)
    }
    layers = layers_of_scans(plans.closed.jaxpr, _by_variable(plans, direct, places))
    layers = {key: layer for key, layer in layers.items() if in_place.is_possible(layer)}

    def outs(direct: dict[int, Any], zeros: taps.Taps, example: list[jax.Array]) -> Any:
        inputs = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
        given = {place: direct.get(i, weights[i]) for i, place in places.items()}
        inputs += example
        outs, kept = taps.run_with(plans.closed, inputs, zeros, actions, given, layers)
        return outs[0], (outs, kept)

    grad = jax.grad(outs, argnums=(0, 1), has_aux=True)
    # Cotangents differ between devices, like the loss.
    axes_of_loss = meshes.axes_of_type(problem.closed.out_avals[0])
    zeros = {path: meshes.varying(a.zero, axes_of_loss) for path, a in actions.items()}
    # The axis of samples comes after those of scans, as they run, so nothing is transposed.
    axes = {path: action.num_scans for path, action in actions.items()}
    axes_kept = {(path, side): axes[path] for path in actions for side in actions[path].keeps}
    run = problem.over_samples(grad, out_axes=((0, axes), (0, axes_kept)))
    (stacked, cotangents), (outs_, kept) = run(direct, zeros, samples.examples)
    return seen_of(stacked, cotangents, outs_, kept)


def _by_variable(
    plans: Plans, weights: dict[int, Any], places: dict[int, tuple[taps.Path, int]]
) -> dict[core.Var, Any]:
    """Map the variables of the loss that are weights to their values."""
    jaxpr = plans.closed.jaxpr
    found = {jaxpr.invars[i]: value for i, value in weights.items() if i < plans.num_leaves}
    for i, (path, output) in places.items():
        if i in weights and len(path) == 1:
            found[jaxpr.eqns[path[0]].outvars[output]] = weights[i]
    return found


def seen_of(
    stacked: dict[int, jax.Array], cotangents: taps.Taps, outs: list[jax.Array], kept: taps.Kept
) -> Seen:
    """Collect the arrays for norms and sums."""
    entered = {path: arrays for (path, side), arrays in kept.items() if side == "entering"}
    left = {path: y for (path, side), (y, *_) in kept.items() if side == "leaving"}
    return Seen(stacked, cotangents, outs, entered, left)


def squared_norms(
    problem: Problem,
    plans: Sequence[LeafPlan],
    pull_back: PullBack,
    weights: dict[int, Any],
    seen: Seen,
) -> Any:
    """Sum ‖g_k‖² over the parameters of these plans, [n], or over each group's, [n, groups]."""
    columns = {p.weight: problem.plans.columns(p.weight, problem.groups) for p in plans}
    by_slice = [plan for plan in plans if plan.is_used and len(columns[plan.weight]) > 1]

    def over(column: int) -> Any:
        own = [plan for plan in plans if columns[plan.weight] == range(column, column + 1)]
        squares = _squares_together(problem, own, pull_back, weights, seen)
        for weight in (p.weight for p in by_slice if column in columns[p.weight]):
            slices = seen.stacked[weight][:, columns[weight].index(column)]
            squares += _stacked_squares([slices], problem.dtype)
        return squares

    with problem.making_norms():
        return problem.groups.stacked(map(over, range(math.prod(problem.groups.shape))))


def weighted_sums(
    problem: Problem,
    plans: Sequence[LeafPlan],
    pull_back: PullBack,
    weights: dict[int, Any],
    seen: Seen,
    of_samples: jax.Array,
) -> list[Any]:
    """Sum of_samples_k g_k for each parameter or piece; None for those without a plan."""

    def contracted(plan: LeafPlan) -> jax.Array:
        weight = weights[plan.weight]
        own = problem.part(of_samples, plan.weight)
        if plan.is_direct:
            summed = stacks.weighted_sum if own.ndim == 1 else _sums_by_slice
            return summed(seen.stacked[plan.weight], 0, own)
        if not plan.groups:
            return jnp.zeros_like(weight)
        return norms.weighted_sum(plan, weight, seen.entered, seen.cotangents, own)

    sums = {plan.weight: contracted(plan) for plan in plans}
    others = [plan.weight for plan in problem.plans.others]
    given = [sums[i] if i in sums else jnp.zeros_like(weights[i]) for i in others]
    pulled = pull_back(given)
    leaves = range(problem.plans.num_leaves)
    return [norms.added(sums[i], pulled.get(i)) if i in sums else None for i in leaves]


_sums_by_slice = jax.vmap(stacks.weighted_sum, (1, None, 1))


def _squares_together(
    problem: Problem,
    plans: Sequence[LeafPlan],
    pull_back: PullBack,
    weights: dict[int, Any],
    seen: Seen,
) -> Any:
    own = [plan for plan in plans if plan.norm == "own"]
    squares = _stacked_squares([seen.stacked[p.weight] for p in own if p.is_direct], problem.dtype)
    for plan in (plan for plan in own if plan.groups):
        squares += norms.squared_norms(plan, seen.entered, seen.cotangents, problem.dtype)
    for plan in (plan for plan in plans if plan.norm == "separable"):
        squares += _separable_squares(problem, plan, pull_back, weights, seen)
    pulled = [plan for plan in plans if plan.norm == "pulled back"]
    if pulled:
        squares += norms.pulled_back_squared_norms(
            pull_back,
            [(plan, weights[plan.weight]) for plan in pulled],
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
    pull_back: PullBack,
    weights: dict[int, Any],
    seen: Seen,
) -> jax.Array:
    def slope(through: int) -> jax.Array:
        cotangents = [
            (jnp.ones_like if other.weight == through else jnp.zeros_like)(weights[other.weight])
            for other in problem.plans.others
        ]
        return pull_back(cotangents)[plan.weight]

    return norms.separable_squared_norms(
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
