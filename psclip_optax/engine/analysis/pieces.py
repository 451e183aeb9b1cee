"""Split a parameter that is used only through slices without overlap into several parameters.

Examples are layers in one array that are taken by index, and the first rows of a table of
positions. Each slice then has a separate plan, and unused entries cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.arrays import promoted
from psclip_optax.engine.analysis.sites import Usage
from psclip_optax.engine.analysis.views import aval, run_equation
from psclip_optax.engine.analysis.walk import walk

# A slice: start, end and step along each axis.
Box: TypeAlias = tuple[tuple[int, int, int], ...]


class Pieces(NamedTuple):
    """Holds the pieces of each parameter; None if it is used whole."""

    boxes: tuple[tuple[Box, ...] | None, ...]

    @property
    def leaf_of(self) -> list[int]:
        """Return, for each piece, the index of its parameter."""
        return [leaf for leaf, boxes in enumerate(self.boxes) for _ in boxes or (None,)]

    def box_of(self, piece: int) -> Box | None:
        """Return the slice of its parameter that a piece is; None if it is the whole parameter."""
        return [box for boxes in self.boxes for box in boxes or (None,)][piece]

    def of(self, leaves: Sequence[Any]) -> list[Any]:
        """Split the parameters into their pieces."""
        return [
            leaf if box is None else _cut(leaf, box)
            for leaf, boxes in zip(leaves, self.boxes, strict=True)
            for box in boxes or (None,)
        ]

    def together(self, pieces: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        """Assemble pieces into arrays like the parameters, 0 where there is no piece."""
        rest = iter(pieces)
        return [
            next(rest) if boxes is None else _filled(leaf, boxes, [next(rest) for _ in boxes])
            for leaf, boxes in zip(leaves, self.boxes, strict=True)
        ]


def _cut(leaf: Any, box: Box) -> jax.Array:
    return lax.squeeze(lax.slice(leaf, *zip(*box, strict=True)), _of_one(box))


def _of_one(box: Box) -> tuple[int, ...]:
    return tuple(axis for axis, (start, stop, _) in enumerate(box) if stop - start == 1)


def _filled(leaf: Any, boxes: Sequence[Box], pieces: Sequence[jax.Array]) -> jax.Array:
    whole = jnp.zeros(leaf.shape, promoted(*(piece.dtype for piece in pieces)))
    whole = meshes.varying(whole, meshes.axes_of(pieces[0]))
    for box, piece in zip(boxes, pieces, strict=True):
        expanded = jnp.expand_dims(piece.astype(whole.dtype), _of_one(box))
        whole = _with_box(whole, box, expanded)
    return whole


def _with_box(whole: jax.Array, box: Box, piece: jax.Array) -> jax.Array:
    if all(step == 1 for *_, step in box):
        return lax.dynamic_update_slice(whole, piece, [start for start, *_ in box])
    return whole.at[tuple(slice(*along) for along in box)].set(piece)


def in_pieces(
    closed: core.ClosedJaxpr, usage: Usage, by_slice: Iterable[int] = ()
) -> tuple[core.ClosedJaxpr, Pieces]:
    """Retrace a loss as a function of pieces, if a plan for each of them may be better.

    Args:
      closed: the loss for one example.
      usage: how it uses its parameters.
      by_slice: the parameters whose slices are clipped separately.
    """
    wanted = _without_route(usage).union(by_slice)
    leaves = range(usage.num_leaves)
    boxes = tuple(_boxes(closed.jaxpr, leaf) if leaf in wanted else None for leaf in leaves)
    pieces = Pieces(boxes)
    if not any(boxes):
        return closed, pieces
    num_pieces = len(pieces.leaf_of)

    def run(*inputs: Any) -> list[Any]:
        rest = iter(inputs[:num_pieces])
        given = [
            next(rest) if of_leaf is None else {box: next(rest) for box in of_leaf}
            for of_leaf in pieces.boxes
        ]
        values = [*given, *inputs[num_pieces:]]
        outs = walk(closed.jaxpr, closed.consts, values, lambda value: value, _equation)
        return [*map(_whole, outs)]

    shapes = [meshes.shape_of_type(aval(v)) for v in closed.jaxpr.invars]
    cut = jax.make_jaxpr(pieces.of)(shapes[: usage.num_leaves]).out_avals
    return jax.make_jaxpr(run)(*cut, *shapes[usage.num_leaves :]), pieces


def _equation(eqn: core.JaxprEqn, inputs: list[Any], path: Any) -> Sequence[Any]:
    del path
    first = inputs[0] if inputs else None
    if isinstance(first, dict):
        box = _box(eqn)
        return [_Taken(first[box], _of_one(box or ()))]
    is_reshaped = eqn.primitive.name in ("squeeze", "reshape")
    if is_reshaped and isinstance(first, _Taken) and _has_shape_of(eqn, first.piece):
        return [first.piece]
    return run_equation(eqn, [*map(_whole, inputs)])


class _Taken(NamedTuple):
    """A slice without its axes of size 1, and the numbers of these axes."""

    piece: Any
    axes: tuple[int, ...]


def _has_shape_of(eqn: core.JaxprEqn, piece: Any) -> bool:
    return aval(eqn.outvars[0]).shape == piece.shape


def _whole(value: Any) -> Any:
    return jnp.expand_dims(value.piece, value.axes) if isinstance(value, _Taken) else value


def _without_route(usage: Usage) -> set[int]:
    """Find the parameters that escape, or from which weights that meet data are computed."""
    meet_data = usage.escapes.keys() | {site.view.weight for site in usage.sites}
    computed = [one for i, one in enumerate(usage.computed, usage.num_leaves) if i in meet_data]
    return set(usage.escapes) | {leaf for one in computed for leaf in one.leaves}


def _boxes(jaxpr: core.Jaxpr, leaf: int) -> tuple[Box, ...] | None:
    """Find the slices through which a parameter is used, if it is used in no other way."""
    variable = jaxpr.invars[leaf]
    readers = [eqn for eqn in jaxpr.eqns if any(v is variable for v in eqn.invars)]
    found = dict.fromkeys(_box(eqn) for eqn in readers)
    boxes = tuple(box for box in found if box is not None)
    if not boxes or None in found or any(v is variable for v in jaxpr.outvars):
        return None
    pairs = itertools.combinations(boxes, 2)
    return boxes if all(_are_apart(*pair) for pair in pairs) else None


def _box(eqn: core.JaxprEqn) -> Box | None:
    if eqn.primitive.name != "slice":
        return None
    params = eqn.params
    steps = params["strides"] or (1,) * len(params["start_indices"])
    return tuple(zip(params["start_indices"], params["limit_indices"], steps, strict=True))


def _are_apart(one: Box, other: Box) -> bool:
    both = zip(one, other, strict=True)
    return any(stop <= first or last <= start for (start, stop, _), (first, last, _) in both)
