"""Find the segment of each group of parameters: the part of a loss that contains all its sites.

A segment is within one body: that of the loss, of a call, of a checkpoint or of a step of a scan.
Its inputs are the group's parameters and data from before it. It contains the equations between the
first and the last one in which the group meets data, except those that do not depend on data. So
after its backward pass, everything needed for its parameters' gradients is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax.extend import core

from psclip_optax.engine.analysis.equations import inner_jaxpr, scan_counts
from psclip_optax.engine.analysis.linearity import has_gradient
from psclip_optax.engine.analysis.sites import OfParameters, Other, Role, Usage
from psclip_optax.engine.analysis.views import Path, View, are_disjoint


class Members(NamedTuple):
    """The parameters that are clipped together.

    Attributes:
      leaves: the numbers of the parameters.
      by_slice: whether each slice along their leading axis is clipped separately.
    """

    leaves: frozenset[int]
    by_slice: bool = False


class Segment(NamedTuple):
    """The part of a loss that contains all sites of a group.

    Attributes:
      path: the path of its last equation, at which it runs.
      equations: the indices of the equations of that body that belong only to it.
      weights: the variables of the body that are the group's parameters, or views of them.
      parameters: the number of each weight's parameter.
      data: the variables from before the segment that get a cotangent.
      others: the variables from before the segment that get none.
      outputs: the variables that later equations read; those with a gradient come first.
      closed: its equations as a jaxpr, from weights, data and others to the outputs.
    """

    path: Path
    equations: frozenset[int]
    weights: tuple[core.Var, ...]
    parameters: tuple[int, ...]
    data: tuple[core.Var, ...]
    others: tuple[core.Var, ...]
    outputs: tuple[core.Var, ...]
    closed: core.ClosedJaxpr

    @property
    def inputs(self) -> tuple[core.Var, ...]:
        return (*self.weights, *self.data, *self.others)

    @property
    def num_cotangents(self) -> int:
        """Count the outputs that have a gradient."""
        return sum(map(has_gradient, self.outputs))


class Obstacle(NamedTuple):
    """The reason why a group has no segment, as a text about its parameters."""

    reason: str


def find_segment(closed: core.ClosedJaxpr, usage: Usage, members: Members) -> Segment | Obstacle:
    """Find the segment of some parameters of a loss for one example.

    Args:
      closed: the loss.
      usage: how it uses its parameters.
      members: the parameters that are clipped together.
    """
    meetings = [path for path, leaves in usage.meetings if leaves & members.leaves]
    if not meetings:
        return Obstacle("do not reach the loss")
    if () in meetings:
        return Obstacle("are the loss itself, without data")
    varied = set(closed.jaxpr.invars[: usage.num_leaves])
    bodies = list(_bodies(closed.jaxpr, varied, _common([path[:-1] for path in meetings])))
    steps = [i for i, body in enumerate(bodies) if body.is_step]
    # Steps that share parameters have one gradient together.
    first, crossed = 0, steps[: 1 if members.by_slice else 0]
    if members.by_slice:
        if not steps:
            return Obstacle(
                "are clipped by slices, but do not meet data in steps of one scan alone"
            )
        first = steps[0]
    stop = steps[len(crossed)] if len(steps) > len(crossed) else len(bodies)
    scans = [bodies[i].path for i in crossed]
    found: Segment | Obstacle = Obstacle("")
    for body in reversed(bodies[first:stop]):
        found = _in_body(body, usage, members, meetings, scans)
        if isinstance(found, Segment):
            return found
    return found


class _Body(NamedTuple):
    """The jaxpr that an equation runs, or the loss itself.

    Attributes:
      path: the path of the equation.
      jaxpr: the jaxpr that it runs.
      is_step: whether the body is a step of a scan.
      varied: the variables that depend on parameters.
    """

    path: Path
    jaxpr: core.Jaxpr
    is_step: bool
    varied: set[core.Var]


def _common(paths: Sequence[Path]) -> Path:
    alike = itertools.takewhile(lambda own: len(set(own)) == 1, zip(*paths, strict=False))
    return tuple(own[0] for own in alike)


def _bodies(jaxpr: core.Jaxpr, varied: set[core.Var], path: Path) -> Iterator[_Body]:
    """Return the bodies that contain an equation, outermost first."""
    varied = _all_varied(jaxpr, varied)
    yield _Body((), jaxpr, False, varied)
    for depth, i in enumerate(path, 1):
        eqn = jaxpr.eqns[i]
        is_step = eqn.primitive.name == "scan"
        flags = [isinstance(v, core.Var) and v in varied for v in eqn.invars]
        jaxpr, _ = inner_jaxpr(eqn)
        if is_step:
            consts, carry = scan_counts(eqn)
            flags[consts : consts + carry] = [any(flags)] * carry
        of_inputs = zip(jaxpr.invars, flags, strict=True)
        varied = _all_varied(jaxpr, {v for v, is_varied in of_inputs if is_varied})
        yield _Body(path[:depth], jaxpr, is_step, varied)


def _all_varied(jaxpr: core.Jaxpr, varied: set[core.Var]) -> set[core.Var]:
    """Add the variables that may depend on these and pass a cotangent to them."""
    varied = set(varied)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "stop_gradient" and not varied.isdisjoint(_read([eqn])):
            varied.update(v for v in eqn.outvars if has_gradient(v))
    return varied


def _in_body(
    body: _Body, usage: Usage, members: Members, meetings: Sequence[Path], scans: Sequence[Path]
) -> Segment | Obstacle:
    depth, eqns, roles = len(body.path), body.jaxpr.eqns, usage.roles[body.path]
    places = [path[depth] for path in meetings]
    between = range(min(places), max(places) + 1)
    inner = [i for i in between if any(roles.get(v) is Other.DATA for v in eqns[i].outvars)]
    for path, leaves in usage.meetings:
        is_inside = path[:depth] == body.path and len(path) > depth and path[depth] in inner
        if is_inside and not leaves <= members.leaves:
            return Obstacle("meet data where, or between where, parameters of other groups do")
    before = _before(body.jaxpr, inner, roles, members)
    weights = [v for v in before.inputs if _is_of(roles.get(v), members)]
    views = [_view(roles[v], members, scans) for v in weights]
    if None in views or not _are_apart(views):
        return Obstacle("are computed with before they come to where they meet data")
    rest = [v for v in before.inputs if v not in set(weights)]
    is_data = {v for v in rest if roles.get(v) is Other.DATA and v in body.varied}
    read = _read([eqn for i, eqn in enumerate(eqns) if i not in inner])
    read |= dict.fromkeys(v for v in body.jaxpr.outvars if isinstance(v, core.Var))
    outputs = [v for i in inner for v in eqns[i].outvars if v in read]
    if any(isinstance(roles.get(v), OfParameters) for v in outputs):
        return Obstacle("meet data where other parameters pass by")
    outputs.sort(key=lambda v: not has_gradient(v))
    data, others = [v for v in rest if v in is_data], [v for v in rest if v not in is_data]
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    jaxpr = empty.replace(
        invars=[*weights, *data, *others],
        outvars=outputs,
        eqns=[eqns[i] for i in sorted({*inner, *before.equations})],
    )
    return Segment(
        path=(*body.path, inner[-1]),
        equations=frozenset(inner),
        weights=tuple(weights),
        parameters=tuple(view.weight for view in views if view),
        data=tuple(data),
        others=tuple(others),
        outputs=tuple(outputs),
        closed=core.ClosedJaxpr(jaxpr, ()),
    )


class _Before(NamedTuple):
    """Holds the inputs of equations, and the equations that need only the group's parameters."""

    equations: list[int]
    inputs: list[core.Var]


def _before(
    jaxpr: core.Jaxpr, inner: Sequence[int], roles: dict[core.Var, Role], members: Members
) -> _Before:
    made = {v for i in inner for v in jaxpr.eqns[i].outvars}
    wanted = dict.fromkeys(v for v in _read([jaxpr.eqns[i] for i in inner]) if v not in made)
    equations: list[int] = []
    for i in reversed(range(inner[-1])):
        eqn = jaxpr.eqns[i]
        if i in inner or not any(
            v in wanted and _is_of(roles.get(v), members) for v in eqn.outvars
        ):
            continue
        equations.append(i)
        wanted.update(dict.fromkeys(_read([eqn])))
        made.update(eqn.outvars)
    return _Before(equations, [v for v in wanted if v not in made])


def _read(eqns: Sequence[core.JaxprEqn]) -> dict[core.Var, None]:
    return dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, core.Var))


def _is_of(role: Role | None, members: Members) -> bool:
    return isinstance(role, OfParameters) and bool(role.leaves & members.leaves)


def _view(role: Role, members: Members, scans: Sequence[Path]) -> View | None:
    """Return a parameter's view that contains each entry once, and one slice in each step."""
    view = role.view if isinstance(role, OfParameters) else None
    if view is None or view.is_repeated or view.weight not in members.leaves:
        return None
    # If slicing comes first, the slices are those along its leading axis.
    is_sliced = view.frame[: len(scans)] == tuple(((), "layer", path) for path in scans)
    return view if is_sliced else None


def _are_apart(views: Sequence[View | None]) -> bool:
    pairs = itertools.combinations([view for view in views if view], 2)
    return all(one.weight != other.weight or are_disjoint(one, other) for one, other in pairs)
