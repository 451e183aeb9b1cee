"""Track views: which entries of a parameter a variable consists of.

A view is a chain of operations that move a parameter's entries without changing them (reshape,
transpose, slice, cast), so norms of gradients are the same on both sides of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from psclip_optax.arrays import is_narrow

Path: TypeAlias = tuple[int, ...]


def aval(atom: Any) -> Any:
    """Return the shape and dtype of a variable or literal."""
    return atom.aval


class Layer(NamedTuple):
    """A step of a view: takes one layer of stacked parameters, in the scan at `path`."""

    path: Path


class Equation(NamedTuple):
    """A step of a view: an equation with one input, to one of its outputs."""

    eqn: core.JaxprEqn
    output: core.Var


Step: TypeAlias = "Equation | Layer"


@dataclasses.dataclass(frozen=True)
class View:
    """Describes which entries of a weight a variable consists of.

    Attributes:
      weight: the number of the parameter or computed weight.
      steps: the equations from the weight to the variable, in order.
      frame: the same without transpositions, as values that compare equal if the entries agree.
      axes: for each axis of the variable, the axis of the frame.
      is_repeated: whether entries of the weight occur several times.
      is_shifted: whether something without a gradient is added.
    """

    weight: int
    steps: tuple[Step, ...]
    frame: tuple[Any, ...]
    axes: tuple[int, ...]
    is_repeated: bool = False
    is_shifted: bool = False


def views_after(eqn: core.JaxprEqn, view: View | None) -> list[View] | None:
    """Describe the outputs of an equation on a view as views; None if they are no views."""
    if view is None or len(eqn.invars) != 1:
        return None
    rule = _VIEW_RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, view)


def shifted(view: View, before: Any, after: Any) -> View:
    """Return the view after adding something without a gradient, maybe with a cast."""
    view = dataclasses.replace(view, is_shifted=True)
    if after.dtype == before.dtype:
        return view
    shape = jax.ShapeDtypeStruct(before.shape, before.dtype)
    (cast,) = jax.make_jaxpr(lambda w: lax.convert_element_type(w, after.dtype))(shape).eqns
    (same,) = _moved(cast, view, view.axes)
    return same


def is_view(eqn: core.JaxprEqn) -> bool:
    """Tell whether an equation only moves entries, so that it makes a view of a view."""
    return len(eqn.invars) == 1 and eqn.primitive.name in _VIEW_RULES


def _moved(eqn: core.JaxprEqn, view: View, axes: tuple[int, ...]) -> list[View]:
    steps = (*view.steps, Equation(eqn, eqn.outvars[0]))
    return [dataclasses.replace(view, steps=steps, axes=axes)]


def _reframed(eqn: core.JaxprEqn, output: core.Var, view: View, *what: Any) -> View:
    """Begin a new frame for a view whose axes are no longer those of the old frame."""
    frame = (*view.frame, (view.axes, *what))
    steps = (*view.steps, Equation(eqn, output))
    axes = tuple(range(aval(output).ndim))
    return dataclasses.replace(view, steps=steps, frame=frame, axes=axes)


def _cast(eqn: core.JaxprEqn, view: View) -> list[View] | None:
    dtype = aval(eqn.outvars[0]).dtype
    # A cast through float8 rounds its cotangent, so it is no view.
    is_view = jnp.issubdtype(dtype, jnp.floating) and not is_narrow(dtype)
    return _moved(eqn, view, view.axes) if is_view else None


def _transposed(eqn: core.JaxprEqn, view: View) -> list[View]:
    return _moved(eqn, view, tuple(view.axes[axis] for axis in eqn.params["permutation"]))


def _reshaped(eqn: core.JaxprEqn, view: View) -> list[View]:
    return [_reframed(eqn, eqn.outvars[0], view, "reshape", aval(eqn.outvars[0]).shape)]


def _broadcast(eqn: core.JaxprEqn, view: View) -> list[View]:
    repeats = aval(eqn.outvars[0]).size != aval(eqn.invars[0]).size
    (new,) = _reshaped(eqn, view)
    return [dataclasses.replace(new, is_repeated=view.is_repeated or repeats)]


def _sliced(eqn: core.JaxprEqn, view: View) -> list[View]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    return [
        _reframed(
            eqn,
            eqn.outvars[0],
            view,
            "box",
            tuple(zip(start, limit, strict=True)),
            eqn.params["strides"],
        )
    ]


def _split(eqn: core.JaxprEqn, view: View) -> list[View]:
    axis, shape = eqn.params["axis"], aval(eqn.invars[0]).shape
    bounds = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    views = []
    for output, interval in zip(eqn.outvars, itertools.pairwise(bounds), strict=True):
        box = tuple(interval if a == axis else (0, size) for a, size in enumerate(shape))
        views.append(_reframed(eqn, output, view, "box", box, None))
    return views


def _unstacked(eqn: core.JaxprEqn, view: View) -> list[View]:
    axis, shape = eqn.params["axis"], aval(eqn.invars[0]).shape
    boxes = [
        tuple((i, i + 1) if a == axis else (0, size) for a, size in enumerate(shape))
        for i in range(shape[axis])
    ]
    both = zip(eqn.outvars, boxes, strict=True)
    return [_reframed(eqn, output, view, "box", box, None) for output, box in both]


def _same(eqn: core.JaxprEqn, view: View) -> list[View]:
    return _moved(eqn, view, view.axes)


def _reversed(eqn: core.JaxprEqn, view: View) -> list[View]:
    return [_reframed(eqn, eqn.outvars[0], view, "reverse", eqn.params["dimensions"])]


_VIEW_RULES: dict[str, Callable[[Any, View], list[View] | None]] = {
    "convert_element_type": _cast,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _broadcast,
    "tile": _broadcast,
    "slice": _sliced,
    "split": _split,
    "unstack": _unstacked,
    "rev": _reversed,
    "copy": _same,
    "sharding_constraint": _same,
}


def are_disjoint(one: View, other: View) -> bool:
    """Tell whether two views are known to share no entry of their parameter."""
    if one.is_repeated or other.is_repeated:  # parts of copies may share entries
        return False
    for mine, theirs in zip(one.frame, other.frame, strict=False):
        if mine == theirs:
            continue
        same_axes = mine[0] == theirs[0] and mine[1] == theirs[1] == "box"
        return same_axes and any(
            a_stop <= b_start or b_stop <= a_start
            for (a_start, a_stop), (b_start, b_stop) in zip(mine[2], theirs[2], strict=True)
        )
    return False


def layer_of(view: View, path: Path) -> View | None:
    """Take one layer of stacked parameters, in the scan at `path`."""
    if not view.axes or view.axes[0] != 0:
        # The layer's axis was moved to the front. This is rare, and the frame would need a name for
        # it.
        return None
    axes = tuple(axis - 1 for axis in view.axes[1:])
    frame = (*view.frame, ((), "layer", path))
    return dataclasses.replace(view, steps=(*view.steps, Layer(path)), frame=frame, axes=axes)


def as_function(
    eqns: Sequence[core.JaxprEqn], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Make a function from equations, from some of their variables to others."""
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    jaxpr = empty.replace(invars=list(inputs), outvars=list(outputs), eqns=list(eqns))
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))


def run_equation(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Compute an equation's outputs from the values of all its inputs, including literals."""
    values = {
        atom: value
        for atom, value in zip(eqn.invars, inputs, strict=True)
        if not isinstance(atom, core.Literal)
    }
    return as_function([eqn], list(values), eqn.outvars)(*values.values())


def segments(view: View) -> list[list[Equation]]:
    """Split a view's equations where it takes one layer."""
    segments: list[list[Equation]] = [[]]
    for step in view.steps:
        segments.append([]) if isinstance(step, Layer) else segments[-1].append(step)
    return segments


def after(steps: list[Equation], function: Callable[..., Any]) -> Callable[..., Any]:
    def whole(value: Any, *entered: Any) -> Any:
        for step in steps:
            (value,) = as_function([step.eqn], step.eqn.invars, [step.output])(value)
        return function(value, *entered)

    return whole
