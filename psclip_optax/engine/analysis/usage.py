"""Find how a loss uses its parameters: where, and in which operations, they meet data."""

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
from psclip_optax.engine.analysis.sites import OfParameters, Other, Role, Site, Usage, weight_of
from psclip_optax.engine.analysis.views import (
    Layer,
    Path,
    View,
    aval,
    layer_of,
    shifted,
    views_after,
)
from psclip_optax.engine.analysis.walk import walk

if TYPE_CHECKING:
    from psclip_optax.engine.routes.route import Route


class _Scope(NamedTuple):
    """The place of an equation in nested jaxprs: its path, and the scans around it."""

    path: Path
    scans: tuple[tuple[Path, int], ...]


RouteOf: TypeAlias = Callable[[core.JaxprEqn, int], "Route | None"]


def find_usage(
    closed: core.ClosedJaxpr, num_leaves: int, route_of: RouteOf, num_outputs: int = 1
) -> Usage:
    """Find how a loss uses its first `num_leaves` inputs; the others are the example.

    Args:
      closed: the loss for one example; its first output is the loss.
      num_leaves: how many of its inputs are parameters.
      route_of: a function from an equation and the index of the operand that is the parameter to
        the route, or None.
      num_outputs: the first so many outputs have a cotangent: 1 for a loss, because aux has none.

    Returns:
      All sites, and the weights that escape. A weight may do both.
    """
    jaxpr, usage = closed.jaxpr, Usage(num_leaves)
    roles: list[Role] = [
        weight_of(i, frozenset([i]), aval(v).ndim) for i, v in enumerate(jaxpr.invars[:num_leaves])
    ]
    roles += [Other.DATA] * (len(jaxpr.invars) - num_leaves)
    walk = _Walk(usage, route_of)
    wanted = [i < num_outputs for i in range(len(jaxpr.outvars))]
    outs = walk.jaxpr(jaxpr, roles, _Scope((), ()), wanted)
    usage.escape(outs[:num_outputs], "is the loss itself, without data", None, ())
    return usage


class _Walk(NamedTuple):
    usage: Usage
    route_of: RouteOf

    def jaxpr(
        self, jaxpr: core.Jaxpr, roles: Sequence[Role], scope: _Scope, wanted: Sequence[bool]
    ) -> list[Role]:
        known: dict[core.Var, Role] = dict(zip(jaxpr.invars, roles, strict=True))
        self.usage.roles[scope.path] = known
        live = with_cotangents(jaxpr, wanted)

        def equation(eqn: core.JaxprEqn, inputs: list[Role], path: Path) -> Sequence[Role]:
            reached = [v in live and has_gradient(v) for v in eqn.outvars]
            outs = self.eqn(eqn, inputs, scope._replace(path=path), reached)
            known.update(zip(eqn.outvars, outs, strict=True))
            return outs

        consts = [Other.CONSTANT] * len(jaxpr.constvars)
        return walk(jaxpr, consts, roles, lambda _: Other.CONSTANT, equation, scope.path)

    def eqn(
        self, eqn: core.JaxprEqn, roles: list[Role], scope: _Scope, wanted: Sequence[bool]
    ) -> Sequence[Role]:
        parameters = [role for role in roles if isinstance(role, OfParameters)]
        if not parameters or not any(wanted) or eqn.primitive.name == "stop_gradient":
            return [_without_gradient(roles)] * len(eqn.outvars)
        if eqn.primitive.name in CALLS:
            return self.jaxpr(inner_jaxpr(eqn)[0], roles, scope, wanted)
        if eqn.primitive.name == "optimization_barrier":
            return roles
        if Other.DATA not in roles:
            return self.of_parameters(eqn, roles, parameters, scope)
        if eqn.primitive.name == "scan":
            return self.scan(eqn, roles, scope, wanted)
        self.meeting(eqn, roles, scope)
        return [Other.DATA] * len(eqn.outvars)

    def of_parameters(
        self,
        eqn: core.JaxprEqn,
        roles: list[Role],
        parameters: list[OfParameters],
        scope: _Scope,
    ) -> Sequence[Role]:
        is_stepped = Other.CONSTANT_OF_A_STEP in roles or any(p.is_stepped for p in parameters)
        views = _views(eqn, roles) if len(parameters) == 1 else None
        if views:
            role = dataclasses.replace(parameters[0], is_stepped=is_stepped)
            return [dataclasses.replace(role, view=view) for view in views]
        leaves = frozenset().union(*(role.leaves for role in parameters))
        if is_stepped:
            weights = frozenset().union(*(role.weights for role in parameters))
            computed, constant = OfParameters(leaves, None, True, weights), Other.CONSTANT_OF_A_STEP
            return [computed if has_gradient(v) else constant for v in eqn.outvars]
        varied = [isinstance(role, OfParameters) for role in roles]
        unproven = unproven_equation(eqn, varied, [has_gradient(v) for v in eqn.outvars])
        if unproven is not None:
            # Not each cotangent, but the weighted sum would be pulled back to a computed weight.
            self.usage.escape(roles, f"passes {described_rule(unproven)}", None, scope.path)
            return [Other.DATA] * len(eqn.outvars)
        return self.usage.compute(eqn, roles, leaves, scope.path)

    def meeting(self, eqn: core.JaxprEqn, roles: list[Role], scope: _Scope) -> None:
        operands = [i for i, role in enumerate(roles) if isinstance(role, OfParameters)]
        if any(isinstance(role, OfParameters) and role.view is None for role in roles):
            self.usage.is_computed_in_steps = True
        weight, name = roles[operands[0]], eqn.primitive.name
        route = self.route_of(eqn, operands[0]) if len(operands) == 1 else None
        if _has_no_entries(eqn, operands, is_product=route is not None):
            return
        if name == "dynamic_slice" and operands == [0]:
            self.usage.to_rewrite[scope.path] = 0
        is_rounded = any(is_narrow(aval(v).dtype) for v in eqn.outvars)
        if route is None or is_rounded:
            self.usage.escape(roles, f"enters {name}", eqn, scope.path)
            return
        if not isinstance(weight, OfParameters):
            return
        if weight.view is None or weight.view.weight >= self.usage.num_leaves:
            self.usage.to_rewrite[scope.path] = operands[0]
        if weight.view is not None and weight.view.is_repeated:
            self.usage.escape(roles, f"is repeated before it enters {name}", eqn, scope.path)
            return
        if weight.view is None:
            reason = f"is used in each step of a scan before it enters {name}"
            self.usage.escape(roles, reason, eqn, scope.path)
            return
        self.usage.meet(roles, scope.path)
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
        self, eqn: core.JaxprEqn, roles: list[Role], scope: _Scope, wanted: Sequence[bool]
    ) -> Sequence[Role]:
        num_consts, num_carry = scan_counts(eqn)
        (body, _), length = inner_jaxpr(eqn), eqn.params["length"]
        consts, carry = roles[:num_consts], roles[num_consts : num_consts + num_carry]
        self.usage.escape(carry, "is the initial state of a scan", eqn, scope.path)
        if length == 0:
            return [Other.DATA] * len(eqn.outvars)
        xs = [_layer(role, scope.path) for role in roles[num_consts + num_carry :]]
        inner: list[Role] = [*consts, *[Other.DATA] * num_carry, *xs]
        inner_scope = _Scope(scope.path, (*scope.scans, (scope.path, length)))
        wanted = [*[True] * num_carry, *wanted[num_carry:]]
        outs = self.jaxpr(body, inner, inner_scope, wanted)
        self.usage.escape(outs, "leaves a scan as it is", eqn, scope.path)
        return [Other.DATA] * len(eqn.outvars)


def _views(eqn: core.JaxprEqn, roles: Sequence[Role]) -> list[View] | None:
    """Describe the outputs of an equation on one parameter as views, if they are views."""
    ((which, role),) = [(i, r) for i, r in enumerate(roles) if isinstance(r, OfParameters)]
    if role.view is None:
        return None
    views = views_after(eqn, role.view)
    if views is None and _passes_cotangent_on(eqn, which):
        views = [shifted(role.view, aval(eqn.invars[which]), aval(eqn.outvars[0]))]
    return views


def _passes_cotangent_on(eqn: core.JaxprEqn, which: int) -> bool:
    """Tell whether an input has the same cotangent as the one output, as in w + constant."""
    outs = [aval(v) for v in eqn.outvars if has_gradient(v)]
    shape = aval(eqn.invars[which]).shape
    if len(eqn.outvars) != 1 or len(outs) != 1 or outs[0].shape != shape:
        return False
    if is_narrow(outs[0].dtype):
        return False
    if eqn.primitive.name in CUSTOM_RULES:
        return passes_cotangent_on(eqn, which)
    return eqn.primitive.name in ("add", "add_any") or (eqn.primitive.name == "sub" and which == 0)


def _without_gradient(roles: Sequence[Role]) -> Other:
    """Return the role of an equation's outputs that pass no cotangent to parameters."""
    if Other.DATA in roles:
        return Other.DATA
    is_stepped = any(
        role is Other.CONSTANT_OF_A_STEP or (isinstance(role, OfParameters) and role.is_stepped)
        for role in roles
    )
    return Other.CONSTANT_OF_A_STEP if is_stepped else Other.CONSTANT


def _has_no_entries(eqn: core.JaxprEqn, operands: Sequence[int], *, is_product: bool) -> bool:
    """Tell whether a factor of a product (parameters, or the output) has no entries."""
    sizes = [aval(v).size for v in eqn.invars]
    is_factor_empty = is_product and 0 in sizes
    has_gradient = any(sizes[i] for i in operands) and any(aval(v).size for v in eqn.outvars)
    return is_factor_empty or not has_gradient


def _layer(role: Role, path: Path) -> Role:
    if role is Other.CONSTANT:
        return Other.CONSTANT_OF_A_STEP
    if not isinstance(role, OfParameters):
        return role
    view = role.view and layer_of(role.view, path)
    return OfParameters(role.leaves, view, True, role.weights)
