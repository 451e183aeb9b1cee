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
            outs.append(weight_of(weight, leaves, kind.ndim))
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


def weight_of(weight: int, leaves: frozenset[int], ndim: int) -> OfParameters:
    return OfParameters(leaves, View(weight, (), (), tuple(range(ndim))))
