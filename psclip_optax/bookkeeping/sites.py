"""Find where parameters enter a jaxpr: sites, and what else becomes of each parameter.

A *site* is an equation in which a view of one parameter meets data in an operation linear in it,
y = op(W, x). A *view* is a chain of operations that move a parameter's entries without changing
them (reshape, transpose, slice, cast). Where a parameter is used in any other way it *escapes*:
its gradient is then taken for each sample by automatic differentiation, which is always right.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core, source_info_util

from psclip_optax.bookkeeping.views import (
    Layer,
    Path,
    View,
    after,
    as_function,
    aval,
    layer_of,
    segments,
    views_after,
)


@dataclasses.dataclass(frozen=True)
class OfParameters:
    """A variable that depends on parameters alone: on which, and as which view of a single one."""

    leaves: frozenset[int]
    view: View | None = None


class Other(enum.Enum):
    """A variable that depends on the example, or neither on it nor on parameters."""

    DATA = enum.auto()
    CONSTANT = enum.auto()


Kind: TypeAlias = OfParameters | Other


class Site(NamedTuple):
    """One equation y = op(W, x) in which a view of a parameter meets data.

    Attributes:
      path: the equation's index in its jaxpr, after those of the equations that hold the jaxpr.
      eqn: the equation.
      operand: which of its inputs is W.
      view: what W is of which parameter.
      scans: the lengths of the scans around it, outermost first.
      layered: for each of them, whether W is another layer in each of its steps.
    """

    path: Path
    eqn: core.JaxprEqn
    operand: int
    view: View
    scans: tuple[int, ...]
    layered: tuple[bool, ...]

    @property
    def scan_axes(self) -> tuple[list[int], list[int]]:
        """Axes, behind that of the samples, of scans over layers and of those that share W."""
        axes = range(1, 1 + len(self.scans))
        layered = [axis for axis, is_layered in zip(axes, self.layered, strict=True) if is_layered]
        return layered, [axis for axis in axes if axis not in layered]

    @property
    def y_aval(self) -> Any:
        return aval(self.eqn.outvars[0])


class Escape(NamedTuple):
    """Why a parameter has no fast route: the operation it entered, and the user's line."""

    reason: str
    source: str


@dataclasses.dataclass
class Usage:
    """What becomes of the parameters in a loss."""

    sites: list[Site] = dataclasses.field(default_factory=list)
    escapes: dict[int, Escape] = dataclasses.field(default_factory=dict)

    def escape(self, kinds: Iterable[Kind], reason: str, eqn: core.JaxprEqn | None) -> None:
        source = "" if eqn is None else source_info_util.summarize(eqn.source_info)
        for kind in kinds:
            if isinstance(kind, OfParameters):
                for leaf in kind.leaves:
                    self.escapes.setdefault(leaf, Escape(reason, source))


class _Scope(NamedTuple):
    """Where in the nest of jaxprs the walk is."""

    path: Path
    scans: tuple[tuple[Path, int], ...]


SiteRule: TypeAlias = Callable[[core.JaxprEqn, int], bool]


def find_usage(closed: core.ClosedJaxpr, num_leaves: int, rules: dict[str, SiteRule]) -> Usage:
    """What becomes of the first `num_leaves` inputs of a loss, the others being one example.

    Args:
      closed: the loss for one example; its first output is the loss.
      num_leaves: how many of its inputs are parameters.
      rules: for each primitive with fast routes, whether it has one for an equation whose
        operand of that index is the parameter.

    Returns:
      Every site, and the parameters that escape. A parameter may have both.
    """
    jaxpr, usage = closed.jaxpr, Usage()
    kinds: list[Kind] = [
        _parameter(i, aval(v).ndim) for i, v in enumerate(jaxpr.invars[:num_leaves])
    ]
    kinds += [Other.DATA] * (len(jaxpr.invars) - num_leaves)
    walk = _Walk(usage, rules)
    out = walk.jaxpr(jaxpr, kinds, _Scope((), ()))
    usage.escape(out[:1], "is the loss itself, without data", None)
    return usage


def _parameter(leaf: int, ndim: int) -> OfParameters:
    return OfParameters(frozenset([leaf]), View(leaf, (), (), tuple(range(ndim))))


_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "remat")


def inner_jaxpr(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The jaxpr, with its constants, that an equation calls with its own inputs."""
    inner = eqn.params["jaxpr"]
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


class _Walk(NamedTuple):
    usage: Usage
    rules: dict[str, SiteRule]

    def jaxpr(self, jaxpr: core.Jaxpr, kinds: Sequence[Kind], scope: _Scope) -> list[Kind]:
        known: dict[core.Var, Kind] = dict(zip(jaxpr.invars, kinds, strict=True))

        def read(atom: Any) -> Kind:
            return (
                Other.CONSTANT
                if isinstance(atom, core.Literal)
                else known.get(atom, Other.CONSTANT)
            )

        for i, eqn in enumerate(jaxpr.eqns):
            inner_scope = scope._replace(path=(*scope.path, i))
            outs = self.eqn(eqn, [read(atom) for atom in eqn.invars], inner_scope)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def eqn(self, eqn: core.JaxprEqn, kinds: list[Kind], scope: _Scope) -> Sequence[Kind]:
        parameters = [kind for kind in kinds if isinstance(kind, OfParameters)]
        has_data = Other.DATA in kinds
        if not parameters:
            return [Other.DATA if has_data else Other.CONSTANT] * len(eqn.outvars)
        if eqn.primitive.name in _CALLS:
            return self.jaxpr(inner_jaxpr(eqn)[0], kinds, scope)
        if not has_data:
            leaves = frozenset().union(*(kind.leaves for kind in parameters))
            views = views_after(eqn, parameters[0].view) if len(parameters) == 1 else None
            views = views or [None] * len(eqn.outvars)
            return [OfParameters(leaves, view) for view in views]
        if eqn.primitive.name == "scan":
            return self.scan(eqn, kinds, scope)
        self.meeting(eqn, kinds, scope)
        return [Other.DATA] * len(eqn.outvars)

    def meeting(self, eqn: core.JaxprEqn, kinds: list[Kind], scope: _Scope) -> None:
        operands = [i for i, kind in enumerate(kinds) if isinstance(kind, OfParameters)]
        weight, name = kinds[operands[0]], eqn.primitive.name
        rule = self.rules.get(name)
        if len(operands) > 1 or rule is None or not rule(eqn, operands[0]):
            self.usage.escape(kinds, f"enters {name}", eqn)
            return
        if not isinstance(weight, OfParameters) or weight.view is None:
            self.usage.escape(kinds, f"is computed with before it enters {name}", eqn)
            return
        view = weight.view
        layers = {step.path for step in view.steps if isinstance(step, Layer)}
        self.usage.sites.append(
            Site(
                path=scope.path,
                eqn=eqn,
                operand=operands[0],
                view=view,
                scans=tuple(length for _, length in scope.scans),
                layered=tuple(path in layers for path, _ in scope.scans),
            )
        )

    def scan(self, eqn: core.JaxprEqn, kinds: list[Kind], scope: _Scope) -> Sequence[Kind]:
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
        consts, carry = kinds[:num_consts], kinds[num_consts : num_consts + num_carry]
        self.usage.escape(carry, "is the initial state of a scan", eqn)
        xs = [_layer(kind, scope.path) for kind in kinds[num_consts + num_carry :]]
        inner: list[Kind] = [*consts, *[Other.DATA] * num_carry, *xs]
        inner_scope = _Scope(scope.path, (*scope.scans, (scope.path, length)))
        outs = self.jaxpr(body, inner, inner_scope)
        self.usage.escape(outs, "leaves a scan as it is", eqn)
        return [Other.DATA] * len(eqn.outvars)


def _layer(kind: Kind, path: Path) -> Kind:
    if not isinstance(kind, OfParameters) or kind.view is None:
        return kind
    return OfParameters(kind.leaves, layer_of(kind.view, path))


def operate(site: Site) -> Callable[[Any, Any], Any]:
    """The site's operation (W, x) -> y, for one step of the scans around it."""
    w, x = site.eqn.invars[site.operand], site.eqn.invars[1 - site.operand]
    run = as_function([site.eqn], [w, x], site.eqn.outvars)
    return lambda w, x: run(w, x)[0]


def of_parameter(site: Site, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """From function(W, x) of one step to one of the parameter and the x of all scans' steps."""
    *outer, last = segments(site.view)
    whole = after(last, function)
    for is_layered in reversed(site.layered):
        whole = jax.vmap(whole, in_axes=(0 if is_layered else None, 0))
        whole = after(outer.pop(), whole) if is_layered else whole
    return whole


def viewed(site: Site) -> Callable[[Any], Any]:
    """From the parameter to W, with an axis in front for each scan of which it is the layers."""
    *outer, last = segments(site.view)
    whole = after(last, lambda w, _: w)
    for steps in reversed(outer):
        whole = after(steps, jax.vmap(whole, in_axes=(0, None)))
    return lambda parameter: whole(parameter, None)
