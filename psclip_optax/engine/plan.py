"""Choose the route of each parameter's gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from jax.extend import core

from psclip_optax.engine.analysis.computed import compute, is_radial, separable_axes
from psclip_optax.engine.analysis.equations import has_references
from psclip_optax.engine.analysis.hoisting import hoisted
from psclip_optax.engine.analysis.normal_form import normal_form
from psclip_optax.engine.analysis.pieces import Pieces, in_pieces
from psclip_optax.engine.analysis.rewrites import rewritten
from psclip_optax.engine.analysis.segments import Segment
from psclip_optax.engine.analysis.sites import Computed, Escape, Site, Usage
from psclip_optax.engine.analysis.slices_in_bounds import slices_in_bounds
from psclip_optax.engine.analysis.unit_axes import without_unit_axes
from psclip_optax.engine.analysis.usage import find_usage
from psclip_optax.engine.analysis.views import are_disjoint, aval
from psclip_optax.engine.routes import route_of, route_of_all
from psclip_optax.engine.routes.route import Route
from psclip_optax.engine.small import is_small
from psclip_optax.groups import ALL_TOGETHER, Groups


class Group(NamedTuple):
    """The sites of one weight whose gradients overlap, and the route to the norm of their sum."""

    route: Route
    sites: tuple[Site, ...]


class LeafPlan(NamedTuple):
    """The plan for the per-sample gradients with respect to one weight.

    Attributes:
      weight: the number of the parameter or computed weight.
      groups: its sites, grouped by overlap; empty if automatic differentiation gives each sample's
        gradient.
      escape: why automatic differentiation is used, unless because the weight is small.
      norm: how its share in the norm of a sample's gradient is computed. "own": from its sites, or
        from its gradients by automatic differentiation. "separable": from these and a separable
        computation. "pulled back": from gradients that are pulled back through any computation.
        "none": the share is included in that of weights computed from it, or of the parameters from
        which it is computed.
      through: the weights computed from it.
      axes: for each of these weights, the axes along which it is separable.
      is_radial: whether these weights depend on its entries only through sums of their squares over
        the other axes, so that their gradients with respect to it are multiples of itself.
      is_used: whether the weight itself meets data.
    """

    weight: int
    groups: tuple[Group, ...] = ()
    escape: Escape | None = None
    norm: Literal["own", "separable", "pulled back", "none"] = "own"
    through: tuple[int, ...] = ()
    axes: tuple[tuple[int, ...], ...] = ()
    is_radial: bool = False
    is_used: bool = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def is_direct(self) -> bool:
        """Tell whether automatic differentiation makes each sample's gradient."""
        return not self.groups and self.is_used


class Plans(NamedTuple):
    """The plans for all per-sample gradients.

    Attributes:
      leaves: a plan for each piece of a parameter.
      others: a plan for each computed weight that meets data.
      computed: these computed weights.
      closed: the loss for one example, rewritten so that few weights are computed. Its first inputs
        are the parameters' pieces.
      pieces: the pieces into which parameters are split.
      usage: how `closed` uses them.
    """

    leaves: list[LeafPlan]
    others: list[LeafPlan]
    computed: list[Computed]
    closed: core.ClosedJaxpr
    pieces: Pieces
    usage: Usage

    @property
    def avals(self) -> list[Any]:
        """Return the shapes and dtypes of all weights."""
        leaves = [aval(variable) for variable in self.closed.jaxpr.invars[: self.num_leaves]]
        return [*leaves, *(one.aval for one in self.computed)]

    @property
    def num_leaves(self) -> int:
        return len(self.leaves)

    @property
    def all(self) -> list[LeafPlan]:
        return [*self.leaves, *self.others]

    def columns(self, weight: int, groups: Groups) -> range:
        """Return a weight's columns of norms and scales by group."""
        leaf = self.parameter_of(weight)
        columns = groups.columns(leaf)
        box = self.pieces.box_of(weight) if len(columns) > 1 else None
        return columns if box is None else columns[slice(*box[0])]

    def parameter_of(self, weight: int) -> int:
        """Find a parameter that a weight is, is a piece of, or is computed from."""
        leaf_of = self.pieces.leaf_of
        if weight < self.num_leaves:
            return leaf_of[weight]
        computed = zip(self.others, self.computed, strict=True)
        return next(leaf_of[min(one.leaves)] for plan, one in computed if plan.weight == weight)


_Family: TypeAlias = dict[int, Computed]


def plan_weights(
    closed: core.ClosedJaxpr,
    num_leaves: int,
    together: Groups = ALL_TOGETHER,
    *,
    are_shared: bool = False,
) -> Plans:
    """Plan the gradients of the first `num_leaves` inputs of the loss for one example.

    Args:
      closed: the loss.
      num_leaves: the number of parameters.
      together: which of them are clipped together.
      are_shared: whether devices may share the samples.
    """
    if has_references(closed.effects):
        escape = Escape("is in a loss with mutable references", "")
        leaves = [LeafPlan(i, escape=escape) for i in range(num_leaves)]
        return Plans(leaves, [], [], closed, Pieces((None,) * num_leaves), Usage(num_leaves))
    closed = without_unit_axes(slices_in_bounds(normal_form(closed, num_leaves)))
    usage = find_usage(closed, num_leaves, route_of)
    is_of_one_norm = math.prod(together.shape) == 1
    hoist = functools.partial(_hoisted, may_move_casts=is_of_one_norm, are_shared=are_shared)
    for improved in (rewritten, hoist):
        better = improved(closed, usage)
        if better is not closed:
            closed, usage = better, find_usage(better, num_leaves, route_of)
    by_slice = [leaf for leaf in range(num_leaves) if len(together.columns(leaf)) > 1]
    closed, pieces = in_pieces(closed, usage, by_slice)
    if any(pieces.boxes):
        num_leaves = len(pieces.leaf_of)
        usage = find_usage(closed, num_leaves, route_of)
    return _planned(closed, pieces, usage, together, are_shared=are_shared)


def plan_segment(segment: Segment) -> Plans:
    """Plan the gradients of the weights of a segment, which are clipped together."""
    closed, num_weights = segment.closed, len(segment.weights)
    usage = find_usage(closed, num_weights, route_of, segment.num_cotangents)
    pieces = Pieces((None,) * num_weights)
    return _planned(closed, pieces, usage, ALL_TOGETHER, are_small_direct=False)


def without_small(plans: Plans, together: Groups) -> Plans:
    """Plan again, so that no weight that has sites is direct because it is small."""
    return _planned(plans.closed, plans.pieces, plans.usage, together, are_small_direct=False)


def _planned(
    closed: core.ClosedJaxpr,
    pieces: Pieces,
    usage: Usage,
    together: Groups,
    *,
    are_small_direct: bool = True,
    are_shared: bool = False,
) -> Plans:
    avals = [aval(variable) for variable in closed.jaxpr.invars[: usage.num_leaves]]
    plan_one = functools.partial(
        _plan_weight, usage=usage, may_be_small=are_small_direct, are_shared=are_shared
    )
    leaves = [plan_one(i, shaped) for i, shaped in enumerate(avals)]
    plans = Plans(leaves, [], [], closed, pieces, usage)
    for plan in plans.leaves:
        if len(plans.columns(plan.weight, together)) > 1 and plan.is_used:
            leaves[plan.weight] = LeafPlan(plan.weight, escape=plan.escape or _BY_SLICE)
    for family in _families(usage):
        if _is_of_one_group(plans, family, together):
            _add_family(plans, family, plan_one, avals)
        else:
            _differentiate(plans, family, _OF_SEVERAL_GROUPS)
    return plans


_OF_SEVERAL_GROUPS = Escape("enters weights computed from parameters of several groups", "")
_BY_SLICE = Escape("is clipped by slices", "")


def _is_of_one_group(plans: Plans, family: _Family, together: Groups) -> bool:
    """Tell whether all weights of a family are clipped together, by one norm for each sample."""
    columns = {plans.columns(leaf, together) for leaf in _relatives(family)}
    return len(columns) == 1 and len(*columns) == 1


def _relatives(family: _Family) -> list[int]:
    """Find the parameters from which a family is computed."""
    return sorted(frozenset().union(*(one.leaves for one in family.values())))


def _differentiate(plans: Plans, family: _Family, escape: Escape | None) -> None:
    """Use automatic differentiation for a family's parameters."""
    for leaf in _relatives(family):
        plans.leaves[leaf] = LeafPlan(leaf, escape=escape)


def _hoisted(
    closed: core.ClosedJaxpr, usage: Usage, *, may_move_casts: bool, are_shared: bool
) -> core.ClosedJaxpr:
    with_casts = may_move_casts and _stacks_cast_layers(closed, usage, are_shared)
    if not (usage.is_computed_in_steps or with_casts):
        return closed
    return hoisted(closed, usage.num_leaves, with_casts=with_casts)


def _stacks_cast_layers(closed: core.ClosedJaxpr, usage: Usage, are_shared: bool) -> bool:
    """Tell whether gradients of layers will be stacked that a scan casts to a narrower dtype."""
    avals = [aval(variable) for variable in closed.jaxpr.invars[: usage.num_leaves]]
    layers: dict[int, list[Site]] = {}
    for site in usage.sites:
        if site.scans and site.view.weight < usage.num_leaves:
            layers.setdefault(site.view.weight, []).append(site)

    def is_cast(shaped: Any, site: Site) -> bool:
        return aval(site.eqn.invars[site.operand]).dtype.itemsize < shaped.dtype.itemsize

    return any(
        is_small(avals[weight], sites, are_shared)
        and any(is_cast(avals[weight], site) for site in sites)
        for weight, sites in layers.items()
    )


def _add_family(
    plans: Plans, family: _Family, plan_one: Callable[[int, Any], LeafPlan], avals: Sequence[Any]
) -> None:
    """Plan computed weights, and plan again the parameters from which they are computed."""
    others = [plan_one(weight, one.aval) for weight, one in family.items()]
    parents = [plans.leaves[leaf] for leaf in _relatives(family)]
    if _is_better_differentiated(parents, others, avals, family):
        _differentiate(plans, family, next((p.escape for p in others if p.escape), None))
        return
    is_joined = _is_joined(parents, family)
    for plan in parents:
        through = tuple(weight for weight, one in family.items() if plan.weight in one.leaves)
        plan = plan._replace(through=through)
        axes = None if is_joined else _separable(plan, plans.closed, avals, others, family)
        if is_joined:
            plan = plan._replace(norm="none")
        elif axes is not None:
            functions = [compute(plans.closed, [family[weight]]) for weight in through]
            radial = all(is_radial(f, avals, plan.weight, axes[0]) for f in functions)
            radial = radial and not any(site.view.is_shifted for site in plan.sites)
            plan = plan._replace(norm="separable", axes=axes, is_radial=radial)
        else:
            plan = plan._replace(norm="pulled back")
        plans.leaves[plan.weight] = plan
    plans.others.extend(plan._replace(norm="own" if is_joined else "none") for plan in others)
    plans.computed.extend(family.values())


def _families(usage: Usage) -> list[_Family]:
    """Split the computed weights that meet data into families that share no parameter."""
    meet_data = usage.escapes.keys() | {site.view.weight for site in usage.sites}
    families: list[_Family] = []
    for weight in sorted(meet_data - set(range(usage.num_leaves))):
        one = usage.computed[weight - usage.num_leaves]
        near = [f for f in families if any(one.leaves & other.leaves for other in f.values())]
        merged = {w: other for family in near for w, other in family.items()}
        families = [f for f in families if f not in near] + [merged | {weight: one}]
    return families


def _is_better_differentiated(
    parents: Sequence[LeafPlan], others: Sequence[LeafPlan], avals: Sequence[Any], family: _Family
) -> bool:
    """Tell whether automatic differentiation of a family's parameters themselves is better.

    It is better if they are small, or if the weights computed from them are far larger and have no
    site.
    """
    num_entries = sum(avals[plan.weight].size for plan in parents)
    num_direct = sum(family[plan.weight].aval.size for plan in others if not plan.groups)
    has_sites = any(plan.groups for plan in [*parents, *others])
    is_small = not has_sites and num_entries <= 4 * num_direct
    return is_small or num_direct > 2 * num_entries


def _is_joined(parents: Sequence[LeafPlan], family: _Family) -> bool:
    """Tell whether parameters are used only in weights that contain each of their entries once."""
    num_uses = sum(len(one.leaves) for one in family.values())
    is_each_once = num_uses == len(parents) and not any(plan.is_used for plan in parents)
    return is_each_once and all(one.is_joined for one in family.values())


def _separable(
    plan: LeafPlan,
    closed: core.ClosedJaxpr,
    avals: Sequence[Any],
    others: Sequence[LeafPlan],
    family: _Family,
) -> tuple[tuple[int, ...], ...] | None:
    """Find the parameter's axes along which each weight computed from it is separable.

    Returns:
      The axes for each of these weights, in its order. None unless all have the same axes, and
      scaling the parameter along them scales the output at each of its sites.
    """
    is_direct = not any(other.groups for other in others if other.weight in plan.through)
    if not plan.groups or not is_direct:
        return None
    found: list[tuple[int, ...]] = []
    for weight in plan.through:
        axes = separable_axes(compute(closed, [family[weight]]), avals, plan.weight)
        if axes is None or set(axes) != set((found or [axes])[0]):
            return None
        found.append(axes)
    scales = all(leaving_axes(site, found[0]) is not None for site in plan.sites)
    return tuple(found) if scales else None


def leaving_axes(site: Site, axes: Sequence[int]) -> list[int] | None:
    """Find the axes of a site's output, [scans…, n, …], that correspond to axes of the weight.

    Returns:
      The output's axes, in the order of the weight's. None if an axis has no counterpart, or if it
      is not known.
    """
    layered, _ = site.scan_axes
    layers = [step for step in site.view.frame if step[1:2] == ("layer",)]
    if len(layers) < len(site.view.frame) or len(layers) != len(layered):
        return None
    of_site = site.route.leaving_axes(site)
    if of_site is None:
        return None
    in_y = dict(enumerate(layered))
    for axis, leaving in of_site.items():
        in_y[len(layered) + site.view.axes[axis]] = site.sample_axis + 1 + leaving
    return [in_y[axis] for axis in axes] if all(axis in in_y for axis in axes) else None


def _plan_weight(
    weight: int, shaped: Any, usage: Usage, may_be_small: bool, are_shared: bool
) -> LeafPlan:
    """Plan a weight without the weights computed from it."""
    sites = [site for site in usage.sites if site.view.weight == weight]
    escape = usage.escapes.get(weight)
    is_used = bool(sites) or escape is not None
    if escape is not None or (may_be_small and is_small(shaped, sites, are_shared)):
        return LeafPlan(weight, escape=escape, is_used=is_used)
    frames: dict[Any, list[Site]] = {}
    for site in sites:
        frames.setdefault(site.view.frame, []).append(site)
    groups = [_group(tuple(members)) for members in frames.values()]
    apart = all(
        are_disjoint(one[0].view, other[0].view)
        for i, one in enumerate(frames.values())
        for other in list(frames.values())[:i]
    )
    if None in groups or not apart:
        return LeafPlan(weight, escape=_mixed(sites))
    return LeafPlan(weight, tuple(group for group in groups if group), is_used=is_used)


def _mixed(sites: Sequence[Site]) -> Escape:
    names = sorted({site.eqn.primitive.name for site in sites})
    return Escape(f"enters {' and '.join(names)} in ways that overlap", "")


def _group(sites: tuple[Site, ...]) -> Group | None:
    route = route_of_all(sites)
    return None if route is None else Group(route, sites)
