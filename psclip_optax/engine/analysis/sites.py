"""Describe where parameters enter a jaxpr: sites, and what else becomes of each parameter.

A *site* is an equation in which a view of one parameter meets data in an operation linear in it,
y = op(W, x). A *view* is a chain of operations that move a parameter's entries without changing
them (reshape, transpose, slice, cast). A parameter that is used in any other way *escapes*: its
gradient is taken for each sample by automatic differentiation, which is always right.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
from jax.extend import core, source_info_util

from psclip_optax.engine.analysis.linearity import (
    has_gradient,
)
from psclip_optax.engine.analysis.views import (
    Path,
    View,
    after,
    aval,
    segments,
)

if TYPE_CHECKING:
    from psclip_optax.engine.routes.route import Route


@dataclasses.dataclass(frozen=True)
class OfParameters:
    """The role of a variable that depends on parameters alone.

    Attributes:
      leaves: the parameters that it depends on.
      view: the view that it is of a weight, which is a parameter or computed from parameters; None
        if it is computed anew in each step of a scan.
      is_stepped: whether it is another in each step of a scan around it.
      computed_from: if it is computed anew in each step, the weights that it is computed from.
    """

    leaves: frozenset[int]
    view: View | None = None
    is_stepped: bool = False
    computed_from: frozenset[int] = frozenset()

    @property
    def weights(self) -> frozenset[int]:
        """Return the weights that its gradient is passed on to."""
        return frozenset([self.view.weight]) if self.view else self.computed_from


class Other(enum.Enum):
    """The role of a variable that no gradient of a weight is taken at: data, or a constant.

    Data depend on the example, or on parameters in a way that automatic differentiation has to
    follow for each sample. Constants pass no cotangent on to parameters.
    """

    DATA = enum.auto()
    CONSTANT = enum.auto()
    CONSTANT_OF_A_STEP = enum.auto()


Role: TypeAlias = OfParameters | Other


class Computed(NamedTuple):
    """A weight that is computed from parameters alone, and so is the same for all samples.

    Attributes:
      path: the path of the equation that makes it, as in `Site`.
      output: the index of the equation's output that it is.
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
      operand: the index of the equation's input that is W.
      route: the route that the site would take by itself.
      view: the view of a weight that W is.
      scans: the lengths of the scans around it, outermost first.
      layered: whether W is another layer in each step, for each of these scans.
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
        """Return the axis of samples in inputs and outputs, which is after those of the scans."""
        return len(self.scans)

    @property
    def scan_axes(self) -> tuple[list[int], list[int]]:
        """Return the axes of scans over layers, and those of scans whose steps share W."""
        layered = [axis for axis, is_layered in enumerate(self.layered) if is_layered]
        return layered, [axis for axis in range(len(self.scans)) if axis not in layered]

    @property
    def entering(self) -> list[Any]:
        """Return the equation's other inputs, which meet W."""
        return [atom for i, atom in enumerate(self.eqn.invars) if i != self.operand]

    @property
    def leaving(self) -> core.Var:
        return self.eqn.outvars[0]


class Escape(NamedTuple):
    """The reason why a weight has no fast route: the operation it entered, and the user's line."""

    reason: str
    source: str


@dataclasses.dataclass
class Usage:
    """The use that a loss makes of its weights: its parameters, and what is computed from these.

    Attributes:
      num_leaves: how many parameters there are; weight `num_leaves + i` is `computed[i]`.
      computed: all that is computed from parameters alone.
      sites: the equations where weights meet data in operations linear in them.
      escapes: the weights that meet data in other ways.
      to_rewrite: the operand that is the weight, by the path of an equation that may have a better
        form. Such an equation is linear in a computed weight, or takes a slice where data tell.
      roles: the role of each variable, by the path of the equation that holds its jaxpr.
      meetings: the path of each equation where weights meet data or escape, and the parameters that
        these depend on.
      is_computed_in_steps: whether data meet what steps of a scan compute from parameters.
    """

    num_leaves: int
    computed: list[Computed] = dataclasses.field(default_factory=list)
    sites: list[Site] = dataclasses.field(default_factory=list)
    escapes: dict[int, Escape] = dataclasses.field(default_factory=dict)
    to_rewrite: dict[Path, int] = dataclasses.field(default_factory=dict)
    roles: dict[Path, dict[core.Var, Role]] = dataclasses.field(default_factory=dict)
    meetings: list[tuple[Path, frozenset[int]]] = dataclasses.field(default_factory=list)
    is_computed_in_steps: bool = False

    def meet(self, roles: Iterable[Role], path: Path) -> None:
        """Note that the parameters among these roles are followed no further than an equation."""
        leaves = [role.leaves for role in roles if isinstance(role, OfParameters)]
        if leaves:
            self.meetings.append((path, frozenset().union(*leaves)))

    def escape(
        self, roles: Sequence[Role], reason: str, eqn: core.JaxprEqn | None, path: Path
    ) -> None:
        self.meet(roles, path)
        source = "" if eqn is None else source_info_util.summarize(eqn.source_info)
        for role in roles:
            if isinstance(role, OfParameters):
                for weight in role.weights:
                    self.escapes.setdefault(weight, Escape(reason, source))

    def compute(
        self, eqn: core.JaxprEqn, roles: Sequence[Role], leaves: frozenset[int], path: Path
    ) -> list[Role]:
        """Make a weight of each output of an equation that has a gradient."""
        is_joined = eqn.primitive.name in ("concatenate", "stack") and self._are_apart(
            roles, leaves
        )
        outs: list[Role] = []
        for output, variable in enumerate(eqn.outvars):
            if not has_gradient(variable):
                outs.append(Other.CONSTANT)
                continue
            weight, shaped = self.num_leaves + len(self.computed), aval(variable)
            self.computed.append(Computed(path, output, shaped, leaves, is_joined))
            outs.append(weight_of(weight, leaves, shaped.ndim))
        return outs

    def _are_apart(self, roles: Sequence[Role], leaves: frozenset[int]) -> bool:
        """Tell whether all are parameters, or these side by side, with each entry once at most."""
        weights = [role for role in roles if isinstance(role, OfParameters)]
        is_each_once = sum(len(role.leaves) for role in weights) == len(leaves)
        return is_each_once and len(weights) == len(roles) and all(map(self._is_once, weights))

    def _is_once(self, role: OfParameters) -> bool:
        view = role.view
        if view is None or view.is_repeated:
            return False
        return (
            view.weight < self.num_leaves or self.computed[view.weight - self.num_leaves].is_joined
        )


def of_parameter(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn function(W, *x) of one step into one of the parameter and the x of all scans' steps."""
    *outer, last = segments(site.view)
    whole, axes = after(last, function), (0,) * len(site.entering)
    for is_layered in reversed(site.layered):
        whole = jax.vmap(whole, in_axes=(0 if is_layered else None, *axes))
        whole = after(outer.pop(), whole) if is_layered else whole
    return whole


def viewed(site: Site) -> Callable[[Any], Any]:
    """Return a function from the parameter to W, with an axis in front per scan over layers."""
    *outer, last = segments(site.view)
    whole = after(last, lambda w: w)
    for steps in reversed(outer):
        whole = after(steps, jax.vmap(whole))
    return whole


def weight_of(weight: int, leaves: frozenset[int], ndim: int) -> OfParameters:
    return OfParameters(leaves, View(weight, (), (), tuple(range(ndim))))
