"""Find what becomes of parameters in a loss: where they meet data, and in which ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jax.extend import core

from psclip_optax.arrays import is_narrow
from psclip_optax.engine.analysis.equations import CALLS, CUSTOM_RULES, inner_jaxpr, scan_counts
from psclip_optax.engine.analysis.linearity import (
    described_rule,
    has_gradient,
    passes_cotangent_on,
    unproven_equation,
    with_cotangents,
)
from psclip_optax.engine.analysis.sites import Kind, OfParameters, Other, Site, Usage, weight_of
from psclip_optax.engine.analysis.views import Layer, Path, View, aval, layer_of, views_after
from psclip_optax.engine.analysis.walk import walk

if TYPE_CHECKING:
    from psclip_optax.engine.routes.route import Route


class _Scope(NamedTuple):
    """Where in the nest of jaxprs the walk is."""

    path: Path
    scans: tuple[tuple[Path, int], ...]


RouteOf: TypeAlias = Callable[[core.JaxprEqn, int], "Route | None"]


def find_usage(closed: core.ClosedJaxpr, num_leaves: int, route_of: RouteOf) -> Usage:
    """What becomes of the first `num_leaves` inputs of a loss, the others being one example.

    Args:
      closed: the loss for one example; its first output is the loss.
      num_leaves: how many of its inputs are parameters.
      route_of: the route of an equation whose operand of that index is the parameter, if there is
        one.

    Returns:
      Every site, and the weights that escape. A weight may have both.
    """
    jaxpr, usage = closed.jaxpr, Usage(num_leaves)
    kinds: list[Kind] = [
        weight_of(i, frozenset([i]), aval(v).ndim) for i, v in enumerate(jaxpr.invars[:num_leaves])
    ]
    kinds += [Other.DATA] * (len(jaxpr.invars) - num_leaves)
    walk = _Walk(usage, route_of)
    # The loss comes first; aux has no cotangent.
    wanted = [i == 0 for i in range(len(jaxpr.outvars))]
    out = walk.jaxpr(jaxpr, kinds, _Scope((), ()), wanted)
    usage.escape(out[:1], "is the loss itself, without data", None)
    return usage


class _Walk(NamedTuple):
    usage: Usage
    route_of: RouteOf

    def jaxpr(
        self, jaxpr: core.Jaxpr, kinds: Sequence[Kind], scope: _Scope, wanted: Sequence[bool]
    ) -> list[Kind]:
        known: dict[core.Var, Kind] = dict(zip(jaxpr.invars, kinds, strict=True))
        self.usage.kinds[scope.path] = known
        live = with_cotangents(jaxpr, wanted)

        def equation(eqn: core.JaxprEqn, own: list[Kind], path: Path) -> Sequence[Kind]:
            reached = [v in live and has_gradient(v) for v in eqn.outvars]
            outs = self.eqn(eqn, own, scope._replace(path=path), reached)
            known.update(zip(eqn.outvars, outs, strict=True))
            return outs

        consts = [Other.CONSTANT] * len(jaxpr.constvars)
        return walk(jaxpr, consts, kinds, lambda _: Other.CONSTANT, equation, scope.path)

    def eqn(
        self, eqn: core.JaxprEqn, kinds: list[Kind], scope: _Scope, wanted: Sequence[bool]
    ) -> Sequence[Kind]:
        parameters = [kind for kind in kinds if isinstance(kind, OfParameters)]
        if not parameters or not any(wanted) or eqn.primitive.name == "stop_gradient":
            return [_without_gradient(kinds)] * len(eqn.outvars)
        if eqn.primitive.name in CALLS:
            return self.jaxpr(inner_jaxpr(eqn)[0], kinds, scope, wanted)
        if eqn.primitive.name == "optimization_barrier":
            return kinds
        if Other.DATA not in kinds:
            return self.of_parameters(eqn, kinds, parameters, scope)
        if eqn.primitive.name == "scan":
            return self.scan(eqn, kinds, scope, wanted)
        self.meeting(eqn, kinds, scope)
        return [Other.DATA] * len(eqn.outvars)

    def of_parameters(
        self,
        eqn: core.JaxprEqn,
        kinds: list[Kind],
        parameters: list[OfParameters],
        scope: _Scope,
    ) -> Sequence[Kind]:
        is_stepped = Other.CONSTANT_OF_A_STEP in kinds or any(k.is_stepped for k in parameters)
        views = _views(eqn, kinds) if len(parameters) == 1 else None
        if views:
            own = dataclasses.replace(parameters[0], is_stepped=is_stepped)
            return [dataclasses.replace(own, view=view) for view in views]
        leaves = frozenset().union(*(kind.leaves for kind in parameters))
        if is_stepped:
            weights = frozenset().union(*(kind.weights for kind in parameters))
            computed, constant = OfParameters(leaves, None, True, weights), Other.CONSTANT_OF_A_STEP
            return [computed if has_gradient(v) else constant for v in eqn.outvars]
        varied = [isinstance(kind, OfParameters) for kind in kinds]
        unproven = unproven_equation(eqn, varied, [has_gradient(v) for v in eqn.outvars])
        if unproven is not None:
            # A weight of its own would have the weighted sum pulled back, not each cotangent.
            self.usage.escape(kinds, f"passes {described_rule(unproven)}", None)
            return [Other.DATA] * len(eqn.outvars)
        return self.usage.compute(eqn, kinds, leaves, scope.path)

    def meeting(self, eqn: core.JaxprEqn, kinds: list[Kind], scope: _Scope) -> None:
        operands = [i for i, kind in enumerate(kinds) if isinstance(kind, OfParameters)]
        if any(isinstance(kind, OfParameters) and kind.view is None for kind in kinds):
            self.usage.is_computed_in_steps = True
        weight, name = kinds[operands[0]], eqn.primitive.name
        route = self.route_of(eqn, operands[0]) if len(operands) == 1 else None
        if _has_no_entries(eqn, operands, is_product=route is not None):
            return
        if name == "dynamic_slice" and operands == [0]:
            self.usage.to_rewrite[scope.path] = 0
        is_rounded = any(is_narrow(aval(v).dtype) for v in eqn.outvars)
        if route is None or is_rounded:
            self.usage.escape(kinds, f"enters {name}", eqn)
            return
        if not isinstance(weight, OfParameters):
            return
        if weight.view is None or weight.view.weight >= self.usage.num_leaves:
            self.usage.to_rewrite[scope.path] = operands[0]
        if weight.view is not None and weight.view.is_repeated:
            self.usage.escape(kinds, f"is repeated before it enters {name}", eqn)
            return
        if weight.view is None:
            reason = f"is computed with in each step of a scan before it enters {name}"
            self.usage.escape(kinds, reason, eqn)
            return
        view = weight.view
        layers = {step.path for step in view.steps if isinstance(step, Layer)}
        self.usage.sites.append(
            Site(
                path=scope.path,
                eqn=eqn,
                operand=operands[0],
                route=route,
                view=view,
                scans=tuple(length for _, length in scope.scans),
                layered=tuple(path in layers for path, _ in scope.scans),
            )
        )

    def scan(
        self, eqn: core.JaxprEqn, kinds: list[Kind], scope: _Scope, wanted: Sequence[bool]
    ) -> Sequence[Kind]:
        num_consts, num_carry = scan_counts(eqn)
        (body, _), length = inner_jaxpr(eqn), eqn.params["length"]
        consts, carry = kinds[:num_consts], kinds[num_consts : num_consts + num_carry]
        self.usage.escape(carry, "is the initial state of a scan", eqn)
        if length == 0:
            return [Other.DATA] * len(eqn.outvars)
        xs = [_layer(kind, scope.path) for kind in kinds[num_consts + num_carry :]]
        inner: list[Kind] = [*consts, *[Other.DATA] * num_carry, *xs]
        inner_scope = _Scope(scope.path, (*scope.scans, (scope.path, length)))
        wanted = [*[True] * num_carry, *wanted[num_carry:]]
        outs = self.jaxpr(body, inner, inner_scope, wanted)
        self.usage.escape(outs, "leaves a scan as it is", eqn)
        return [Other.DATA] * len(eqn.outvars)


def _views(eqn: core.JaxprEqn, kinds: Sequence[Kind]) -> list[View] | None:
    """The views that the outputs of an equation on one parameter are, if they are."""
    ((which, kind),) = [(i, k) for i, k in enumerate(kinds) if isinstance(k, OfParameters)]
    if kind.view is None:
        return None
    views = views_after(eqn, kind.view)
    if views is None and _passes_cotangent_on(eqn, which):
        views = [dataclasses.replace(kind.view, is_shifted=True)]
    return views


def _passes_cotangent_on(eqn: core.JaxprEqn, which: int) -> bool:
    """Whether the cotangent of the one output is that of this input, as of w + constant."""
    outs = [aval(v) for v in eqn.outvars if has_gradient(v)]
    own = aval(eqn.invars[which])
    if len(eqn.outvars) != 1 or len(outs) != 1 or outs[0].shape != own.shape:
        return False
    if eqn.primitive.name in CUSTOM_RULES:
        return passes_cotangent_on(eqn, which)
    return eqn.primitive.name in ("add", "add_any") or (eqn.primitive.name == "sub" and which == 0)


def _without_gradient(kinds: Sequence[Kind]) -> Other:
    """What an equation gives that passes no cotangent on to parameters."""
    if Other.DATA in kinds:
        return Other.DATA
    is_stepped = any(
        kind is Other.CONSTANT_OF_A_STEP or (isinstance(kind, OfParameters) and kind.is_stepped)
        for kind in kinds
    )
    return Other.CONSTANT_OF_A_STEP if is_stepped else Other.CONSTANT


def _has_no_entries(eqn: core.JaxprEqn, operands: Sequence[int], *, is_product: bool) -> bool:
    """Whether a factor of a product, all its parameters or all that leaves have no entries."""
    sizes = [aval(v).size for v in eqn.invars]
    is_factor_empty = is_product and 0 in sizes
    has_gradient = any(sizes[i] for i in operands) and any(aval(v).size for v in eqn.outvars)
    return is_factor_empty or not has_gradient


def _layer(kind: Kind, path: Path) -> Kind:
    if kind is Other.CONSTANT:
        return Other.CONSTANT_OF_A_STEP
    if not isinstance(kind, OfParameters):
        return kind
    view = kind.view and layer_of(kind.view, path)
    return OfParameters(kind.leaves, view, True, kind.weights)
