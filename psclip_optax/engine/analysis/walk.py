"""Propagate a property of variables through a jaxpr, one equation after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.engine.analysis.equations import CALLS, inner_jaxpr
from psclip_optax.engine.analysis.views import Path, run_equation

Known = TypeVar("Known")


def walk(
    jaxpr: core.Jaxpr,
    consts: Sequence[Known],
    inputs: Sequence[Known],
    literal: Callable[[Any], Known],
    equation: Callable[[core.JaxprEqn, list[Known], Path], Sequence[Known]],
    path: Path = (),
) -> list[Known]:
    """Propagate a property of variables to a jaxpr's outputs.

    Args:
      jaxpr: the jaxpr to walk through.
      consts: the properties of its constants.
      inputs: the properties of its inputs.
      literal: a function from a literal's value to its property.
      equation: a function from an equation, the properties of its inputs, and its path to the
        properties of its outputs.
      path: the path of the equation that contains the jaxpr.
    """
    known: dict[Any, Known] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Known:
        return literal(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        outs = equation(eqn, [read(atom) for atom in eqn.invars], (*path, i))
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def inlined(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Retrace a jaxpr with all calls inlined."""

    def equation(eqn: core.JaxprEqn, inputs: list[Any], path: Any) -> Sequence[Any]:
        if eqn.primitive.name in CALLS:
            jaxpr, consts = inner_jaxpr(eqn)
            return walk(jaxpr, consts, inputs, lambda value: value, equation, path)
        return run_equation(eqn, inputs)

    def run(*inputs: Any) -> list[Any]:
        return walk(closed.jaxpr, closed.consts, inputs, lambda value: value, equation)

    return jax.make_jaxpr(run)(*(meshes.shape_of_type(v.aval) for v in closed.jaxpr.invars))
