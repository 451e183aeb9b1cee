"""Which route each parameter's gradient takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from jax.extend import core

from psclip_optax.bookkeeping.norms import conv, dense, embedding
from psclip_optax.bookkeeping.sites import Escape, Site, Usage, find_usage
from psclip_optax.bookkeeping.views import are_disjoint, aval

RouteName: TypeAlias = Literal["direct", "dense", "conv", "embedding", "tied"]

_ROUTES: dict[str, RouteName] = {
    "dot_general": "dense",
    "conv_general_dilated": "conv",
    "gather": "embedding",
}
_RULES = {
    "dot_general": dense.supports,
    "conv_general_dilated": conv.supports,
    "gather": embedding.supports,
}


def route_of(site: Site) -> RouteName:
    """The route of a site alone."""
    return _ROUTES[site.eqn.primitive.name]


def _with_primitive(sites: Sequence[Site], name: str) -> tuple[Site, ...]:
    return tuple(site for site in sites if site.eqn.primitive.name == name)


class Group(NamedTuple):
    """Sites of one parameter whose gradients overlap, and the route to the norm of their sum."""

    route: RouteName
    sites: tuple[Site, ...]

    @property
    def gathers(self) -> tuple[Site, ...]:
        return _with_primitive(self.sites, "gather")

    @property
    def products(self) -> tuple[Site, ...]:
        return _with_primitive(self.sites, "dot_general")


class LeafPlan(NamedTuple):
    """How one parameter's per-sample gradients are treated.

    Attributes:
      leaf: which parameter.
      groups: its sites by overlap; empty where automatic differentiation gives the gradient of
        each sample.
      escape: why it does, where that is not for its size.
    """

    leaf: int
    groups: tuple[Group, ...] = ()
    escape: Escape | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def is_convolution(self) -> bool:
        return any(group.route == "conv" for group in self.groups)


def plan_leaves(closed: core.ClosedJaxpr, num_leaves: int) -> list[LeafPlan]:
    """A plan for each of the first `num_leaves` inputs of the loss for one example."""
    usage = find_usage(closed, num_leaves, _RULES)
    avals = [aval(variable) for variable in closed.jaxpr.invars[:num_leaves]]
    return [_plan_leaf(leaf, parameter, usage) for leaf, parameter in enumerate(avals)]


def _plan_leaf(leaf: int, parameter: Any, usage: Usage) -> LeafPlan:
    if leaf in usage.escapes:
        return LeafPlan(leaf, escape=usage.escapes[leaf])
    sites = [site for site in usage.sites if site.view.leaf == leaf]
    if _is_small(parameter, sites):
        return LeafPlan(leaf)
    frames: dict[Any, list[Site]] = {}
    for site in sites:
        frames.setdefault(site.view.frame, []).append(site)
    groups = [_group(members) for members in frames.values()]
    apart = all(
        are_disjoint(one[0].view, other[0].view)
        for i, one in enumerate(frames.values())
        for other in list(frames.values())[:i]
    )
    if None in groups or not apart:
        return LeafPlan(leaf, escape=_mixed(sites))
    return LeafPlan(leaf, tuple(group for group in groups if group))


def _mixed(sites: Sequence[Site]) -> Escape:
    names = sorted({site.eqn.primitive.name for site in sites})
    return Escape(f"enters {' and '.join(names)} in ways that overlap", "")


def _is_small(parameter: Any, sites: Sequence[Site]) -> bool:
    """Whether all samples' gradients take no more memory than what leaves the sites.

    Inside a scan they would be accumulated step by step, which is slower than one product; and
    for convolutions automatic differentiation makes slow grouped ones.
    """
    if any(site.eqn.primitive.name != "dot_general" or not all(site.layered) for site in sites):
        return False
    return parameter.size <= sum(math.prod(site.scans) * site.y_aval.size for site in sites)


def _group(sites: list[Site]) -> Group | None:
    names = {site.eqn.primitive.name for site in sites}
    gathers, products = (_with_primitive(sites, name) for name in ("gather", "dot_general"))
    if len({embedding.row_axis(site) for site in gathers}) > 1:
        return None
    forms = [dense.form(site) for site in products]
    if not all(dense.may_join(forms[0], form) for form in forms):
        return None
    if names == {"gather", "dot_general"} and _is_tied(forms[0], gathers[0]):
        return Group("tied", (*gathers, *products))
    alike = names != {"conv_general_dilated"} or all(conv.may_join(sites[0], s) for s in sites)
    return Group(route_of(sites[0]), tuple(sites)) if len(names) == 1 and alike else None


def _is_tied(form: dense.Form, gather: Site) -> bool:
    return not form.blocks and (embedding.row_axis(gather),) in (form.left, form.right)
