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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
from jax.extend import core, source_info_util

from psclip_optax.arrays import is_narrow
from psclip_optax.engine.analysis.equations import CALLS, CUSTOM_RULES, inner_jaxpr, scan_counts
from psclip_optax.engine.analysis.linearity import (
    described_rule,
    has_gradient,
    passes_cotangent_on,
    unproven_equation,
    with_cotangents,
)
from psclip_optax.engine.analysis.views import (
    Layer,
    Path,
    View,
    after,
    aval,
    layer_of,
    segments,
    views_after,
)

if TYPE_CHECKING:
    from psclip_optax.engine.routes.route import Route


@dataclasses.dataclass(frozen=True)
class OfParameters:
    """A variable that depends on parameters alone.

    Attributes:
      leaves: on which.
      view: as which view of a weight: a parameter, or what is computed from parameters; None if it
        is computed anew in each step of a scan.
      is_stepped: whether it is another in each step of a scan around it.
      computed_from: the weights that what is computed anew in each step is computed from.
    """

    leaves: frozenset[int]
    view: View | None = None
    is_stepped: bool = False
    computed_from: frozenset[int] = frozenset()

    @property
    def weights(self) -> frozenset[int]:
        """The weights that its gradient is passed on to."""
        return frozenset([self.view.weight]) if self.view else self.computed_from


class Other(enum.Enum):
    """A variable that is treated alike for what it is: data, or without any gradient.

    Data depend on the example, or on parameters in a way that automatic differentiation has to
    follow for each sample.
    """

    DATA = enum.auto()
    CONSTANT = enum.auto()
    CONSTANT_OF_A_STEP = enum.auto()


Kind: TypeAlias = OfParameters | Other


class Computed(NamedTuple):
    """A weight that is computed from parameters alone, and so is the same for all samples.

    Attributes:
      path: of the equation that makes it, as in `Site`.
      output: which of the equation's outputs it is.
      aval: its shape and dtype.
      leaves: the parameters that it is computed from.
      is_joined: whether it is nothing but their entries side by side, each once.
    """

    path: Path
    output: int
    aval: Any
    leaves: frozenset[int]
    is_joined: bool


class Site(NamedTuple):
    """One equation y = op(W, x) in which a view of a parameter meets data.

    Attributes:
      path: the equation's index in its jaxpr, after those of the equations that hold the jaxpr.
      eqn: the equation.
      operand: which of its inputs is W.
      route: which it would take by itself.
      view: what W is of which parameter.
      scans: the lengths of the scans around it, outermost first.
      layered: for each of them, whether W is another layer in each of its steps.
    """

    path: Path
    eqn: core.JaxprEqn
    operand: int
    route: Route
    view: View
    scans: tuple[int, ...]
    layered: tuple[bool, ...]

    @property
    def sample_axis(self) -> int:
        """The axis of samples in what enters and leaves: behind those of the scans, as they run."""
        return len(self.scans)

    @property
    def scan_axes(self) -> tuple[list[int], list[int]]:
        """The axes of scans over layers and of those that share W."""
        layered = [axis for axis, is_layered in enumerate(self.layered) if is_layered]
        return layered, [axis for axis in range(len(self.scans)) if axis not in layered]

    @property
    def entering(self) -> list[Any]:
        """What meets W: the equation's other inputs."""
        return [atom for i, atom in enumerate(self.eqn.invars) if i != self.operand]

    @property
    def leaving(self) -> core.Var:
        return self.eqn.outvars[0]


class Escape(NamedTuple):
    """Why a parameter has no fast route: the operation it entered, and the user's line."""

    reason: str
    source: str


@dataclasses.dataclass
class Usage:
    """What becomes of the weights in a loss: of its parameters, then of what is computed of them.

    Attributes:
      num_leaves: how many parameters there are; weight `num_leaves + i` is `computed[i]`.
      computed: all that is computed from parameters alone.
      sites: where weights meet data in operations linear in them.
      escapes: the weights that meet data in other ways.
      to_rewrite: the paths of equations that may have a better form, as they are linear in a weight
        that is computed or take a slice where data tell, and which operand is the weight.
      kinds: what each variable is, by the path of the equation that holds its jaxpr.
      is_computed_in_steps: whether data meet what steps of a scan compute from parameters.
    """

    num_leaves: int
    computed: list[Computed] = dataclasses.field(default_factory=list)
    sites: list[Site] = dataclasses.field(default_factory=list)
    escapes: dict[int, Escape] = dataclasses.field(default_factory=dict)
    to_rewrite: dict[Path, int] = dataclasses.field(default_factory=dict)
    kinds: dict[Path, dict[core.Var, Kind]] = dataclasses.field(default_factory=dict)
    is_computed_in_steps: bool = False

    def escape(self, kinds: Iterable[Kind], reason: str, eqn: core.JaxprEqn | None) -> None:
        source = "" if eqn is None else source_info_util.summarize(eqn.source_info)
        for kind in kinds:
            if isinstance(kind, OfParameters):
                for weight in kind.weights:
                    self.escapes.setdefault(weight, Escape(reason, source))

    def compute(
        self, eqn: core.JaxprEqn, kinds: Sequence[Kind], leaves: frozenset[int], path: Path
    ) -> list[Kind]:
        """Each output of an equation as a weight of its own; integers have no gradient."""
        is_joined = eqn.primitive.name in ("concatenate", "stack") and self._are_apart(
            kinds, leaves
        )
        outs: list[Kind] = []
        for output, variable in enumerate(eqn.outvars):
            if not has_gradient(variable):
                outs.append(Other.CONSTANT)
                continue
            weight, kind = self.num_leaves + len(self.computed), aval(variable)
            self.computed.append(Computed(path, output, kind, leaves, is_joined))
            outs.append(_weight(weight, leaves, kind.ndim))
        return outs

    def _are_apart(self, kinds: Sequence[Kind], leaves: frozenset[int]) -> bool:
        """Whether they are parameters, or these side by side, and each entry comes once at most."""
        weights = [kind for kind in kinds if isinstance(kind, OfParameters)]
        is_each_once = sum(len(kind.leaves) for kind in weights) == len(leaves)
        return is_each_once and len(weights) == len(kinds) and all(map(self._is_once, weights))

    def _is_once(self, kind: OfParameters) -> bool:
        view = kind.view
        if view is None or view.is_repeated:
            return False
        return (
            view.weight < self.num_leaves or self.computed[view.weight - self.num_leaves].is_joined
        )


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
        _weight(i, frozenset([i]), aval(v).ndim) for i, v in enumerate(jaxpr.invars[:num_leaves])
    ]
    kinds += [Other.DATA] * (len(jaxpr.invars) - num_leaves)
    walk = _Walk(usage, route_of)
    # The loss comes first; aux has no cotangent.
    wanted = [i == 0 for i in range(len(jaxpr.outvars))]
    out = walk.jaxpr(jaxpr, kinds, _Scope((), ()), wanted)
    usage.escape(out[:1], "is the loss itself, without data", None)
    return usage


def _weight(weight: int, leaves: frozenset[int], ndim: int) -> OfParameters:
    return OfParameters(leaves, View(weight, (), (), tuple(range(ndim))))


class _Walk(NamedTuple):
    usage: Usage
    route_of: RouteOf

    def jaxpr(
        self, jaxpr: core.Jaxpr, kinds: Sequence[Kind], scope: _Scope, wanted: Sequence[bool]
    ) -> list[Kind]:
        known: dict[core.Var, Kind] = dict(zip(jaxpr.invars, kinds, strict=True))
        self.usage.kinds[scope.path] = known
        live = with_cotangents(jaxpr, wanted)

        def read(atom: Any) -> Kind:
            return (
                Other.CONSTANT
                if isinstance(atom, core.Literal)
                else known.get(atom, Other.CONSTANT)
            )

        for i, eqn in enumerate(jaxpr.eqns):
            inner_scope = scope._replace(path=(*scope.path, i))
            wanted = [v in live and has_gradient(v) for v in eqn.outvars]
            outs = self.eqn(eqn, [read(atom) for atom in eqn.invars], inner_scope, wanted)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

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


def of_parameter(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
    """From function(W, *x) of one step to one of the parameter and the x of all scans' steps."""
    *outer, last = segments(site.view)
    whole, axes = after(last, function), (0,) * len(site.entering)
    for is_layered in reversed(site.layered):
        whole = jax.vmap(whole, in_axes=(0 if is_layered else None, *axes))
        whole = after(outer.pop(), whole) if is_layered else whole
    return whole


def viewed(site: Site) -> Callable[[Any], Any]:
    """From the parameter to W, with an axis in front for each scan of which it is the layers."""
    *outer, last = segments(site.view)
    whole = after(last, lambda w: w)
    for steps in reversed(outer):
        whole = after(steps, jax.vmap(whole))
    return whole
