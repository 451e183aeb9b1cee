"""Move computations on parameters alone from the steps of a scan before it, for all steps at once.

If a weight is computed in each step (a scale for each layer, a quantised kernel), its gradient has
to be pulled back through the steps for each sample. If it is computed before the scan, it is a
layer of a computed weight, with the routes of computed weights.

Casts of parameters to a narrower dtype may be moved as well. Then a scan stacks the gradients of
its layers in that dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.engine.analysis.equations import (
    CALLS,
    CHECKPOINTS,
    checkpointed,
    inner_jaxpr,
    needed_equations,
    parted,
    scan_counts,
)
from psclip_optax.engine.analysis.linearity import has_gradient
from psclip_optax.engine.analysis.views import as_function, aval, is_view, run_equation
from psclip_optax.engine.analysis.walk import walk


class _Known(NamedTuple):
    """Holds the known properties of a variable.

    Attributes:
      is_fixed: whether it is the same for all samples, like parameters and constants.
      is_parameter: whether its cotangent reaches parameters.
      is_made: whether it is computed, not a view of a parameter.
      is_stepped: whether it differs from step to step.
      with_casts: whether a cast of it to a narrower dtype counts as computed.
    """

    is_fixed: bool
    is_parameter: bool = False
    is_made: bool = False
    is_stepped: bool = False
    with_casts: bool = False


_CONSTANT, _DATA = _Known(True), _Known(False)
_PARAMETER = _Known(True, True)


def hoisted(
    closed: core.ClosedJaxpr, num_leaves: int, *, with_casts: bool = False
) -> core.ClosedJaxpr:
    """Retrace a loss, so that the steps of scans compute nothing from parameters alone.

    Args:
      closed: the loss for one example.
      num_leaves: how many of its inputs are parameters; the others are the example.
      with_casts: whether to move casts to a narrower dtype, which are views.
    """
    parameter = _PARAMETER._replace(with_casts=with_casts)
    known = [parameter] * num_leaves + [_DATA] * (len(closed.jaxpr.invars) - num_leaves)
    return _retraced(closed, known)


def _retraced(closed: core.ClosedJaxpr, known: Sequence[_Known]) -> core.ClosedJaxpr:
    def run(*inputs: Any) -> list[Any]:
        return _run(closed.jaxpr, closed.consts, inputs, known)[0]

    shapes = [meshes.shape_of_type(aval(v)) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(run)(*shapes)


def _run(
    jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], known: Sequence[_Known]
) -> tuple[list[Any], list[_Known]]:
    """Retrace a jaxpr, and return the properties of its outputs."""
    values = zip(inputs, known, strict=True)
    outs = walk(
        jaxpr,
        [(one, _CONSTANT) for one in consts],
        list(values),
        lambda value: (value, _CONSTANT),
        lambda eqn, inputs, _: _equation(eqn, inputs),
    )
    return [value for value, _ in outs], [one for _, one in outs]


def _equation(
    eqn: core.JaxprEqn, inputs: Sequence[tuple[Any, _Known]]
) -> Sequence[tuple[Any, _Known]]:
    values, known = [value for value, _ in inputs], [one for _, one in inputs]
    outs_known = _after(eqn, known)
    name = eqn.primitive.name
    if _DATA not in outs_known or not any(one.is_parameter for one in known):
        return list(zip(run_equation(eqn, values), outs_known, strict=True))
    if name in CALLS and name not in CHECKPOINTS:
        outs, of_outs = _run(*inner_jaxpr(eqn), values, known)
        return list(zip(outs, of_outs, strict=True))
    rule = {"scan": _scan, **dict.fromkeys(CHECKPOINTS, _checkpoint)}.get(name)
    outs = run_equation(eqn, values) if rule is None else rule(eqn, values, known)
    return list(zip(outs, outs_known, strict=True))


def _after(eqn: core.JaxprEqn, known: Sequence[_Known]) -> list[_Known]:
    """Return the properties of an equation's outputs."""
    if not all(one.is_fixed for one in known) or eqn.effects:
        return [_DATA] * len(eqn.outvars)
    has_parameter = any(one.is_parameter for one in known)
    is_parameter = has_parameter and eqn.primitive.name != "stop_gradient"
    is_made = is_parameter and (not _stays(eqn, known) or any(one.is_made for one in known))
    is_stepped = any(one.is_stepped for one in known)
    with_casts = any(one.with_casts for one in known)
    return [
        _Known(
            True,
            is_parameter and has_gradient(v),
            is_made and has_gradient(v),
            is_stepped,
            with_casts,
        )
        for v in eqn.outvars
    ]


def _stays(eqn: core.JaxprEqn, known: Sequence[_Known]) -> bool:
    """Tell whether an equation makes a view that is not to be moved."""
    return is_view(eqn) and not (known[0].with_casts and _narrows(eqn))


def _narrows(eqn: core.JaxprEqn) -> bool:
    """Tell whether an equation is a cast to a narrower dtype."""
    if eqn.primitive.name != "convert_element_type":
        return False
    return aval(eqn.outvars[0]).dtype.itemsize < aval(eqn.invars[0]).dtype.itemsize


class _Parts(NamedTuple):
    """A jaxpr in two parts; the first depends only on parameters.

    Attributes:
      inputs: the indices of the jaxpr's inputs that the first part reads.
      first: a function from these inputs to the results of the first part.
      second: a function from these results and the jaxpr's inputs to its outputs; inputs that it
        does not read may be None.
      is_read: whether the second part reads an input, for each.
    """

    inputs: list[int]
    first: Callable[..., list[Any]]
    second: Callable[[Sequence[Any], Sequence[Any]], list[Any]]
    is_read: list[bool]

    def only_read(self, inputs: Sequence[Any]) -> list[Any]:
        """Replace the last inputs by None where the second part does not read them."""
        flags = self.is_read[len(self.is_read) - len(inputs) :]
        return [one if is_read else None for one, is_read in zip(inputs, flags, strict=True)]


def _in_parts(closed: core.ClosedJaxpr, known: Sequence[_Known]) -> _Parts:
    """Split a jaxpr before the data meet what it computes from parameters alone, if anything."""
    jaxpr = closed.jaxpr
    made = [] if jaxpr.constvars else _frontier(jaxpr, known)
    if not made:
        run_all = core.jaxpr_as_fun(closed)
        return _Parts([], list, lambda _, inputs: run_all(*inputs), [True] * len(known))
    first = needed_equations(jaxpr, made)
    read = {v for eqn in first for v in eqn.invars if isinstance(v, core.Var)}
    inputs = [i for i, v in enumerate(jaxpr.invars) if v in read]
    rest = [eqn for eqn in jaxpr.eqns if not set(made).issuperset(eqn.outvars)]
    rest = _without_unread(rest, jaxpr)
    atoms = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in rest))
    read = {atom for atom in atoms if isinstance(atom, core.Var)}
    is_read = [v in read for v in jaxpr.invars]
    run = as_function(rest, [*made, *itertools.compress(jaxpr.invars, is_read)], jaxpr.outvars)

    def second(made: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        return run(*made, *itertools.compress(inputs, is_read))

    first_run = as_function(first, [jaxpr.invars[i] for i in inputs], made)
    return _Parts(inputs, first_run, second, is_read)


def _frontier(jaxpr: core.Jaxpr, known: Sequence[_Known]) -> list[core.Var]:
    """Find the variables that depend only on parameters and that data meet, maybe through views."""
    of = dict(zip(jaxpr.invars, known, strict=True))
    read = lambda v: _CONSTANT if isinstance(v, core.Literal) else of.get(v, _CONSTANT)  # noqa: E731
    stays: dict[int, bool] = {}
    for eqn in jaxpr.eqns:
        inputs = [*map(read, eqn.invars)]
        stays[id(eqn)] = _stays(eqn, inputs)
        of.update(zip(eqn.outvars, _after(eqn, inputs), strict=True))
    met = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    frontier: dict[core.Var, None] = {}
    for eqn in reversed(jaxpr.eqns):
        reached = [v for v in eqn.outvars if v in met and of[v].is_made]
        if not all(of[v].is_fixed for v in eqn.outvars) or (reached and stays[id(eqn)]):
            met.update(v for v in eqn.invars if isinstance(v, core.Var))
        elif reached and all(of[v].is_stepped for v in eqn.outvars):
            frontier.update(dict.fromkeys(eqn.outvars))
    return list(frontier)


def _without_unread(eqns: Sequence[core.JaxprEqn], jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    needed = needed_equations(jaxpr.replace(eqns=list(eqns)), jaxpr.outvars)
    read = {id(eqn) for eqn in needed}
    return [eqn for eqn in eqns if id(eqn) in read or eqn.effects]


def _scan(eqn: core.JaxprEqn, values: list[Any], known: Sequence[_Known]) -> list[Any]:
    num_consts, num_carry = scan_counts(eqn)
    consts, init, xs = parted(values, num_consts, num_carry)
    known_consts, _, known_xs = parted(known, num_consts, num_carry)
    within = [one._replace(is_stepped=False) for one in known_consts]
    within += [_DATA] * num_carry
    within += [one._replace(is_stepped=one.is_fixed) for one in known_xs]
    body = _retraced(core.ClosedJaxpr(*inner_jaxpr(eqn)), within)
    parts = _in_parts(body, within)
    made: list[Any] = []
    if parts.inputs:
        axes = [0 if within[i].is_stepped else None for i in parts.inputs]
        made = jax.vmap(parts.first, in_axes=axes)(*(values[i] for i in parts.inputs))

    def step(carry: list[Any], both: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        made, of_step = both
        outs = parts.second(made, [*consts, *carry, *of_step])
        return outs[:num_carry], outs[num_carry:]

    carry, ys = lax.scan(
        step,
        list(init),
        (made, parts.only_read(xs)),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *ys]


def _checkpoint(eqn: core.JaxprEqn, values: list[Any], known: Sequence[_Known]) -> list[Any]:
    body = _retraced(core.ClosedJaxpr(*inner_jaxpr(eqn)), known)
    parts = _in_parts(body, known)
    made = parts.first(*(values[i] for i in parts.inputs))
    run = checkpointed(eqn, lambda inputs, made: parts.second(made, inputs))
    return run(parts.only_read(values), made)
