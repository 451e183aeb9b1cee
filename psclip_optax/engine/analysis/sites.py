"""Describe how a jaxpr uses its parameters: sites, escapes, and computed weights.

A *site* is an equation y = op(W, x), linear in W, that combines a view of one parameter with data.
A *view* is a chain of operations that move a parameter's entries without changing them (reshape,
transpose, slice, cast). A parameter that is used in any other way *escapes*: automatic
differentiation makes its gradient for each sample, which is always right.
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
    """The role of a variable that depends only on parameters.

    Attributes:
      leaves: the parameters on which it depends.
      view: the variable as a view of a weight, which is a parameter or a computed weight; None if
        it is computed in each step of a scan.
      is_stepped: whether it differs between the steps of a scan around it.
      computed_from: if it is computed in each step, the weights from which it is computed.
    """

    leaves: frozenset[int]
    view: View | None = None
    is_stepped: bool = False
    computed_from: frozenset[int] = frozenset()

    @property
    def weights(self) -> frozenset[int]:
        """Return the weights to which its gradient is passed on."""
        return frozenset([self.view.weight]) if self.view else self.computed_from


class Other(enum.Enum):
    """The role of a variable that is neither a weight nor a view of one: data, or a constant.

    Data depend on the example, or on parameters in a way that needs automatic differentiation for
    each sample. Constants pass no cotangent to parameters.
    """

    DATA = enum.auto()
    CONSTANT = enum.auto()
    CONSTANT_OF_A_STEP = enum.auto()


Role: TypeAlias = OfParameters | Other


class Computed(NamedTuple):
    """A weight that is computed only from parameters, so it is the same for all samples.

    Attributes:
      path: the path of the equation that computes it, as in `Site`.
      output: its index among the equation's outputs.
      aval: its shape and dtype.
      leaves: the parameters from which it is computed.
      is_joined: whether it only concatenates their entries, each once.
    """

    path: Path
    output: int
    aval: Any
    leaves: frozenset[int]
    is_joined: bool


class Site(NamedTuple):
    """An equation y = op(W, x) that combines a view of a parameter with data.

    Attributes:
      path: the equation's index in its jaxpr, preceded by those of the equations that contain the
        jaxpr.
      eqn: the equation.
      operand: the index of the equation's input that is W.
      route: the route that the site would have alone.
      view: W as a view of a weight.
      scans: the lengths of the scans around it, outermost first.
      layered: for each of these scans, whether W is a different layer in each step.
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
        """Return the axis of samples in inputs and outputs, which follows those of the scans."""
        return len(self.scans)

    @property
    def scan_axes(self) -> tuple[list[int], list[int]]:
        """Return the axes of scans over layers, and those of scans whose steps share W."""
        layered = [axis for axis, is_layered in enumerate(self.layered) if is_layered]
        return layered, [axis for axis in range(len(self.scans)) if axis not in layered]

    @property
    def entering(self) -> list[Any]:
        """Return the equation's other inputs."""
        return [atom for i, atom in enumerate(self.eqn.invars) if i != self.operand]

    @property
    def leaving(self) -> core.Var:
        return self.eqn.outvars[0]


class Escape(NamedTuple):
    """Says why a weight has no fast route: the operation that uses it, and the user's line."""

    reason: str
    source: str


@dataclasses.dataclass
class Usage:
    """Describes how a loss uses its weights: the parameters and the computed weights.

    Attributes:
      num_leaves: the number of parameters; weight `num_leaves + i` is `computed[i]`.
      computed: the weights computed only from parameters.
      sites: the equations that are linear in a weight that they combine with data.
      escapes: the weights that meet data in other ways.
      to_rewrite: by the path of an equation that may have a better form, the operand that is the
        weight. Such an equation is linear in a computed weight, or takes a slice at an index that
        depends on data.
      roles: the role of each variable, by the path of the equation that contains its jaxpr.
      meetings: the path of each equation in which weights meet data or escape, and the parameters
        on which these weights depend.
      is_computed_in_steps: whether data meet values that steps of a scan compute from parameters.
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
        """Record an equation in which the parameters among these roles meet data or escape."""
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
        """Make each output of an equation that has a gradient a computed weight."""
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
        """Tell whether all are parameters or concatenations of them, with no entry twice."""
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
    """Map function(W, *x) of one step over the steps of all scans, given the parameter."""
    *outer, last = segments(site.view)
    whole, axes = after(last, function), (0,) * len(site.entering)
    for is_layered in reversed(site.layered):
        whole = jax.vmap(whole, in_axes=(0 if is_layered else None, *axes))
        whole = after(outer.pop(), whole) if is_layered else whole
    return whole


def viewed(site: Site) -> Callable[[Any], Any]:
    """Return a function from the parameter to W, with a leading axis for each scan over layers."""
    *outer, last = segments(site.view)
    whole = after(last, lambda w: w)
    for steps in reversed(outer):
        whole = after(steps, jax.vmap(whole))
    return whole


def weight_of(weight: int, leaves: frozenset[int], ndim: int) -> OfParameters:
    return OfParameters(leaves, View(weight, (), (), tuple(range(ndim))))
