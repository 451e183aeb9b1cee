"""Compute weights that depend only on parameters: g v / ‖v‖, concatenated or masked kernels.

They are computed once for all samples. Gradients with respect to them are pulled back through that
computation: the weighted sum once, and the norms in the cheapest of three ways.

- *Joined*: the computation concatenates parameters, so norms are the same before and after it.
- *Separable* along some axes, such as a norm of each column: a cotangent c is pulled back to D ⊙ c,
  with one D for all samples. If the computation uses only sums of squares of the parameter
  (*radial*), D is a multiple of the parameter. `norms.separable_squared_norms` derives the norm.
- *Pulled back*: all others. Gradients are computed and pulled back for a few samples at a time.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.engine.analysis.equations import CALLS, inner_jaxpr, scan_counts
from psclip_optax.engine.analysis.operations import ELEMENTWISE, product_axes
from psclip_optax.engine.analysis.sites import Computed
from psclip_optax.engine.analysis.views import Path, aval, run_equation
from psclip_optax.engine.analysis.walk import walk

_UNKNOWN: Any = object()
# The state of a variable that does not depend on the parameter in question.
_FREE: Any = object()


def compute(
    closed: core.ClosedJaxpr, wanted: Sequence[Computed]
) -> Callable[[Sequence[Any]], list[Any]]:
    """Return a function from the parameters' leaves to computed weights.

    Args:
      closed: the loss for one example, whose first inputs are the parameters.
      wanted: the weights to compute.
    """

    def values(leaves: Sequence[Any]) -> list[Any]:
        found: dict[tuple[Path, int], Any] = {}
        inputs = [*leaves, *[_UNKNOWN] * (len(closed.jaxpr.invars) - len(leaves))]
        _run_known(closed.jaxpr, closed.consts, inputs, (), found)
        return [found[one.path, one.output] for one in wanted]

    return values


def _run_known(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    path: Path,
    found: dict[tuple[Path, int], Any],
) -> list[Any]:
    """Run the equations whose inputs are known; the outputs of the others remain unknown."""

    def equation(eqn: core.JaxprEqn, inputs: list[Any], path: Path) -> Sequence[Any]:
        outs = _equation(eqn, inputs, path, found)
        found.update({(path, output): value for output, value in enumerate(outs)})
        return outs

    return walk(jaxpr, consts, inputs, lambda value: value, equation, path)


def _equation(
    eqn: core.JaxprEqn, inputs: list[Any], path: Path, found: dict[tuple[Path, int], Any]
) -> list[Any]:
    if eqn.primitive.name in CALLS:
        jaxpr, consts = inner_jaxpr(eqn)
        return _run_known(jaxpr, consts, inputs, path, found)
    if not any(value is _UNKNOWN for value in inputs) and not eqn.effects:
        return run_equation(eqn, inputs)
    if eqn.primitive.name == "optimization_barrier":
        return inputs
    if eqn.primitive.name == "scan":
        # The constants that its steps share may be known, although its data are not.
        jaxpr, consts = inner_jaxpr(eqn)
        num_consts = scan_counts(eqn).consts
        of_a_step = [_UNKNOWN] * (len(inputs) - num_consts)
        _run_known(jaxpr, consts, [*inputs[:num_consts], *of_a_step], path, found)
    return [_UNKNOWN] * len(eqn.outvars)


# Find the axes along which a computation is separable


class _Spread(NamedTuple):
    """Describes how a variable depends on a parameter.

    Attributes:
      axes: for each axis of the variable, the parameter's axis whose index it shares, or None.
      separable: the parameter's axes along which entry i depends only on the parameter's entries i.
    """

    axes: tuple[int | None, ...]
    separable: frozenset[int]


def separable_axes(
    function: Callable[[Sequence[Any]], Any], parameters: Sequence[Any], which: int
) -> tuple[int, ...] | None:
    """Find the parameter's axes that a computed array has and along which it is separable.

    Args:
      function: a function from the parameters to the array.
      parameters: the parameters' shapes and dtypes.
      which: the index of the parameter in question.

    Returns:
      The parameter's axis for each axis of the array whose size is above 1, in order. None if the
      array has other axes, or an entry depends on other entries of the parameter.
    """
    jaxpr = jax.make_jaxpr(function)(parameters).jaxpr
    if aval(jaxpr.outvars[0]).size == 1:  # a single number has no such axis
        return ()
    shape = aval(jaxpr.invars[which]).shape
    whole = tuple(axis if size > 1 else None for axis, size in enumerate(shape))
    start = _Spread(whole, frozenset(axis for axis in whole if axis is not None))
    inputs = [start if i == which else _FREE for i in range(len(jaxpr.invars))]
    (spread,) = walk(jaxpr, _free(jaxpr), inputs, lambda _: _FREE, _spread_after)
    if not isinstance(spread, _Spread):
        return None
    out = jaxpr.outvars[0]
    over = [a for a, size in zip(spread.axes, aval(out).shape, strict=True) if size > 1]
    axes = tuple(axis for axis in over if axis is not None)
    is_over_them = len(axes) == len(over) and frozenset(axes) == spread.separable
    return axes if is_over_them else None


def _free(jaxpr: core.Jaxpr) -> list[Any]:
    return [_FREE] * len(jaxpr.constvars)


def _spread_after(eqn: core.JaxprEqn, inputs: list[Any], path: Path) -> list[Any]:
    del path
    known = [(v, one) for v, one in zip(eqn.invars, inputs, strict=True) if one is not _FREE]
    if not known or eqn.primitive.name == "stop_gradient":
        return [_FREE] * len(eqn.outvars)
    rule = _SPREAD_RULES.get(eqn.primitive.name)
    is_known = rule is not None and all(spread is not None for _, spread in known)
    return [rule(eqn, dict(known).items()) if rule and is_known else None] * len(eqn.outvars)


class _Power(enum.Enum):
    """A form in which a variable contains a parameter.

    It contains the entries up to sign, their squares, or a function of sums of the squares.
    """

    ENTRIES = enum.auto()
    SQUARES = enum.auto()
    SUMS = enum.auto()


def is_radial(
    function: Callable[[Sequence[Any]], Any],
    parameters: Sequence[Any],
    which: int,
    axes: Sequence[int],
) -> bool:
    """Tell whether an array depends on a parameter only through sums of squares over other axes.

    Args:
      function: a function from the parameters to an array.
      parameters: the parameters' shapes and dtypes.
      which: the index of the parameter in question.
      axes: the axes of that parameter that are not summed.
    """
    jaxpr = jax.make_jaxpr(function)(parameters).jaxpr
    others = tuple(a for a in range(aval(jaxpr.invars[which]).ndim) if a not in axes)

    def equation(eqn: core.JaxprEqn, inputs: list[Any], path: Path) -> list[Any]:
        del path
        depends = [power for power in inputs if power is not _FREE]
        return [_power(eqn, set(depends), others) if depends else _FREE] * len(eqn.outvars)

    inputs = [_Power.ENTRIES if i == which else _FREE for i in range(len(jaxpr.invars))]
    outs = walk(jaxpr, _free(jaxpr), inputs, lambda _: _FREE, equation)
    return all(out is _FREE or out is _Power.SUMS for out in outs)


def _power(
    eqn: core.JaxprEqn, inputs: set[_Power | None], others: tuple[int, ...]
) -> _Power | None:
    name, params = eqn.primitive.name, eqn.params
    if inputs == {_Power.SUMS}:
        return _Power.SUMS
    # A product of two variables may be v |v|, whose gradient is not a multiple of v.
    if None in inputs or any(v is not eqn.invars[0] for v in eqn.invars):
        return None
    (power,) = inputs
    if not all(jnp.issubdtype(aval(v).dtype, jnp.floating) for v in eqn.outvars):
        return None
    if name in ("convert_element_type", "copy", "abs"):
        return power
    if power is _Power.SQUARES:
        is_all = name == "reduce_sum" and sorted(params["axes"]) == sorted(others)
        return _Power.SUMS if is_all else None
    is_square = name in ("mul", "square") or (name == "integer_pow" and params["y"] == 2)
    return _Power.SQUARES if is_square else None


_Known: TypeAlias = Collection[tuple[Any, Any]]


def _spread(axes: Sequence[int | None], separable: frozenset[int]) -> _Spread:
    separable = separable & frozenset(axis for axis in axes if axis is not None)
    return _Spread(tuple(a if a in separable else None for a in axes), separable)


def _elementwise(eqn: core.JaxprEqn, known: _Known) -> _Spread | None:
    shape = aval(eqn.outvars[0]).shape
    if any(aval(v).ndim != len(shape) for v, _ in known):
        return None
    separable = frozenset.intersection(*(spread.separable for _, spread in known))
    found = [{spread.axes[i] for _, spread in known} & separable for i in range(len(shape))]
    # Separable along an axis of the parameter only if all inputs share one index, on one axis.
    places = collections.Counter(axis for axes in found for axis in axes)
    mixed = {axis for axes in found for axis in axes if len(axes) > 1 or places[axis] > 1}
    return _spread([next(iter(axes - mixed), None) for axes in found], separable - mixed)


def _reduced(eqn: core.JaxprEqn, known: _Known) -> _Spread:
    ((_, spread),) = known
    axes = [axis for i, axis in enumerate(spread.axes) if i not in eqn.params["axes"]]
    return _spread(axes, spread.separable)


def _broadcast(eqn: core.JaxprEqn, known: _Known) -> _Spread:
    ((_, spread),) = known
    axes: list[int | None] = [None] * aval(eqn.outvars[0]).ndim
    for axis, to in zip(spread.axes, eqn.params["broadcast_dimensions"], strict=True):
        axes[to] = axis
    return _spread(axes, spread.separable)


def _transposed(eqn: core.JaxprEqn, known: _Known) -> _Spread:
    ((_, spread),) = known
    return _spread([spread.axes[axis] for axis in eqn.params["permutation"]], spread.separable)


def _reshaped(eqn: core.JaxprEqn, known: _Known) -> _Spread | None:
    ((variable, spread),) = known
    before, after = aval(variable).shape, aval(eqn.outvars[0]).shape
    if [size for size in before if size > 1] != [size for size in after if size > 1]:
        return None
    over = iter([axis for axis, size in zip(spread.axes, before, strict=True) if size > 1])
    return _spread([next(over) if size > 1 else None for size in after], spread.separable)


def _multiplied(eqn: core.JaxprEqn, known: _Known) -> _Spread | None:
    found: list[list[int | None]] = []
    for operand, variable in enumerate(eqn.invars):
        for spread in (spread for v, spread in known if v is variable):
            axes: list[int | None] = [None] * aval(eqn.outvars[0]).ndim
            for in_w, in_y in product_axes(eqn, operand).leaving.items():
                axes[in_y] = spread.axes[in_w]
            found.append(axes)
            break
    separable = frozenset.intersection(*(spread.separable for _, spread in known))
    shared = [axes[0] if len(set(axes)) == 1 else None for axes in zip(*found, strict=True)]
    return _spread(shared, separable)


_SPREAD_RULES: dict[str, Callable[[Any, _Known], _Spread | None]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduced),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshaped),
    "broadcast_in_dim": _broadcast,
    "dot_general": _multiplied,
    "transpose": _transposed,
}
