"""Retrace a loss without axes of size 1.

A loss written for batches gets a batch of one, so every array has an axis of size 1 after that of
the samples. An accelerator stores arrays in tiles over their last axes, and with such axes between
them compilers find worse layouts, or copy. Operations without a rule here get their original axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.engine.analysis.equations import (
    CALLS,
    CHECKPOINTS,
    checkpointed,
    inner_jaxpr,
    parted,
    scan_counts,
)
from psclip_optax.engine.analysis.operations import ELEMENTWISE
from psclip_optax.engine.analysis.views import Path, aval, run_equation
from psclip_optax.engine.analysis.walk import walk

# Operations that read arrays in tiles, and so determine layouts.
_TILED = ("dot_general", "conv_general_dilated")
_ELEMENTWISE = {
    *ELEMENTWISE,
    *("acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "cosh", "digamma"),
    *("eq", "erf_inv", "erfc", "floor", "ge", "gt", "is_finite", "le", "lgamma", "lt", "ne"),
    *("nextafter", "not", "or", "reduce_precision", "rem", "round", "sinh", "stop_gradient", "tan"),
    "xor",
}


class _Value:
    """An array with and without its axes of size 1; each form is made from the other when needed.

    Parameters are passed with all their axes, so operations that use them directly see them
    unchanged.
    """

    def __init__(self, *, full: Any = None, bare: Any = None, shape: Sequence[int]):
        self._full, self._bare, self.shape = full, bare, tuple(shape)

    @property
    def full(self) -> Any:
        if self._full is None:
            self._full = lax.expand_dims(self._bare, _units(self.shape))
        return self._full

    @property
    def bare(self) -> Any:
        if self._bare is None:
            self._bare = _bare(self._full)
        return self._bare

    @property
    def is_full_alone(self) -> bool:
        """Tell whether the array has axes of size 1 and is not needed without them."""
        return self._bare is None and 1 in self.shape

    @property
    def given(self) -> Any:
        """Return the form that exists already."""
        return self._bare if self._full is None else self._full

    def like(self, array: Any) -> _Value:
        """Return another array in the form of `given`."""
        if self._full is None:
            return _Value(bare=array, shape=self.shape)
        return _Value(full=array, shape=self.shape)


def _of(array: Any) -> _Value:
    return _Value(full=array, shape=jnp.shape(array))


def _bare(array: Any) -> Any:
    units = _units(jnp.shape(array))
    return lax.squeeze(array, units) if units else array


def without_unit_axes(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Retrace a loss without axes of size 1, if products or convolutions have any."""
    if closed.effects or not _has_occasion(closed.jaxpr):
        return closed

    def run(*inputs: Any) -> list[Any]:
        outs = _traced(closed.jaxpr, closed.consts, [_of(array) for array in inputs])
        return [out.full for out in outs]

    return jax.make_jaxpr(run)(*(meshes.shape_of_type(aval(v)) for v in closed.jaxpr.invars))


def _has_occasion(jaxpr: core.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _TILED and 1 in aval(eqn.outvars[0]).shape:
            return True
        if eqn.primitive.name in _NESTED and _has_occasion(inner_jaxpr(eqn)[0]):
            return True
    return False


def _traced(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
    return walk(jaxpr, [_of(const) for const in consts], inputs, _of, _equation)


def _equation(eqn: core.JaxprEqn, inputs: list[_Value], path: Path) -> list[_Value]:
    del path
    name, shapes = eqn.primitive.name, [aval(atom).shape for atom in (*eqn.invars, *eqn.outvars)]
    has_units = any(1 in shape for shape in shapes)
    if name in _NESTED and (has_units or _has_occasion(inner_jaxpr(eqn)[0])):
        return _NESTED[name](eqn, inputs)
    if has_units and len(eqn.outvars) == 1:
        out = _by_rule(eqn, inputs)
        if out is not None:
            return [_Value(bare=_bare(out), shape=shapes[-1])]
    outs = run_equation(eqn, [value.full for value in inputs])
    return [_of(out) for out in outs]


def _by_rule(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    name = eqn.primitive.name
    follows = name in _ELEMENTWISE or name in _FOLLOWING
    # Between operations without rules, as in a convolutional net, arrays keep their axes.
    if follows and max(inputs, key=lambda value: math.prod(value.shape)).is_full_alone:
        return None
    rule = _elementwise if name in _ELEMENTWISE else _RULES.get(name)
    return rule and rule(eqn, inputs)


# Operations that contain a jaxpr


def _call(eqn: core.JaxprEqn, inputs: list[_Value]) -> list[_Value]:
    return _traced(*inner_jaxpr(eqn), inputs)


def _checkpoint(eqn: core.JaxprEqn, inputs: list[_Value]) -> list[_Value]:
    shapes = [aval(v).shape for v in eqn.outvars]

    def call(given: list[Any], _: tuple[()]) -> list[Any]:
        within = [value.like(array) for value, array in zip(inputs, given, strict=True)]
        return [out.bare for out in _call(eqn, within)]

    outs = checkpointed(eqn, call)([value.given for value in inputs], ())
    return [_Value(bare=out, shape=shape) for out, shape in zip(outs, shapes, strict=True)]


def _scan(eqn: core.JaxprEqn, inputs: list[_Value]) -> list[_Value]:
    num_consts, num_carry = scan_counts(eqn)
    consts, init, xs = parted(inputs, num_consts, num_carry)
    body, _ = inner_jaxpr(eqn)
    shapes = [aval(v).shape for v in body.invars]
    _, shapes_of_carry, shapes_of_xs = parted(shapes, num_consts, num_carry)

    def step(carry: list[Any], of_step: list[Any]) -> tuple[list[Any], list[Any]]:
        within = [
            # Made again, because variables made here must not be read outside.
            *(value.like(value.given) for value in consts),
            *(_Value(bare=one, shape=s) for one, s in zip(carry, shapes_of_carry, strict=True)),
            *(_Value(full=one, shape=s) for one, s in zip(of_step, shapes_of_xs, strict=True)),
        ]
        outs = [out.bare for out in _traced(*inner_jaxpr(eqn), within)]
        return outs[:num_carry], outs[num_carry:]

    carry, ys = lax.scan(
        step,
        [value.bare for value in init],
        [value.full for value in xs],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    outs = [*carry, *map(_bare, ys)]
    return [_Value(bare=o, shape=aval(v).shape) for o, v in zip(outs, eqn.outvars, strict=True)]


_NESTED: dict[str, Callable[..., list[_Value]]] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(CHECKPOINTS, _checkpoint),
    "scan": _scan,
}


# Rules: the operation on the arrays without their axes of size 1, or None if there is none.


def _places(shape: Sequence[int]) -> dict[int, int]:
    """Number the remaining axes."""
    left = (axis for axis, size in enumerate(shape) if size != 1)
    return {axis: place for place, axis in enumerate(left)}


def _elementwise(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    shape = aval(eqn.outvars[0]).shape
    if any(value.shape and len(value.shape) != len(shape) for value in inputs):
        return None
    places = _places(shape)

    def beside(value: _Value) -> Any:
        repeated = [
            place for axis, place in places.items() if value.shape and value.shape[axis] == 1
        ]
        return lax.expand_dims(value.bare, repeated) if repeated else value.bare

    return run_equation(eqn, [beside(value) for value in inputs])[0]


def _changed(eqn: core.JaxprEqn, inputs: list[_Value], **params: Any) -> Any:
    changed = eqn.replace(params=eqn.params | params)
    return run_equation(changed, [value.bare for value in inputs])[0]


def _same(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    del eqn
    return inputs[0].bare


def _reshape(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    if eqn.params["dimensions"] is not None or eqn.params.get("sharding") is not None:
        return None
    shape = tuple(size for size in eqn.params["new_sizes"] if size != 1)
    bare = inputs[0].bare
    return bare if jnp.shape(bare) == shape else _changed(eqn, inputs, new_sizes=shape)


def _broadcast_in_dim(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if eqn.params.get("sharding") is not None or len(inputs) > 1:
        return None
    places, bare = _places(shape), inputs[0].bare
    left = tuple(size for size in shape if size != 1)
    if jnp.shape(bare) == left:
        return bare
    axes = [places[dims[axis]] for axis, size in enumerate(inputs[0].shape) if size != 1]
    return _changed(eqn, inputs, shape=left, broadcast_dimensions=tuple(axes))


def _transpose(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    places = _places(inputs[0].shape)
    order = [places[axis] for axis in eqn.params["permutation"] if axis in places]
    return _changed(eqn, inputs, permutation=tuple(order))


def _reduce(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    if eqn.params.get("out_sharding") is not None:
        return None
    places = _places(inputs[0].shape)
    axes = tuple(places[axis] for axis in eqn.params["axes"] if axis in places)
    return _changed(eqn, inputs, axes=axes) if axes else inputs[0].bare


def _dot_general(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    if eqn.params.get("out_sharding") is not None:
        return None
    both = [_places(value.shape) for value in inputs]

    def left(axes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        # Axes that are contracted with an axis of size 1, or batched with it, have size 1 too.
        return tuple(
            tuple(places[axis] for axis in of_side if axis in places)
            for places, of_side in zip(both, axes, strict=True)
        )

    contracted, blocks = eqn.params["dimension_numbers"]
    return _changed(eqn, inputs, dimension_numbers=(left(contracted), left(blocks)))


def _slice(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    places, shape = _places(inputs[0].shape), aval(eqn.outvars[0]).shape
    if any(shape[axis] != 1 for axis in range(len(shape)) if axis not in places):
        return None
    given = {name: eqn.params[name] for name in ("start_indices", "limit_indices", "strides")}
    left = {name: each and tuple(each[axis] for axis in places) for name, each in given.items()}
    return _changed(eqn, inputs, **left)


def _concatenate(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    axis = eqn.params["dimension"]
    if any(value.shape[axis] == 1 for value in inputs):
        return None
    return _changed(eqn, inputs, dimension=_places(inputs[0].shape)[axis])


def _gather(eqn: core.JaxprEqn, inputs: list[_Value]) -> Any:
    """Look up without axes of size 1, except the operand's indexed axes."""
    operand, indices = inputs
    dims, ndim = eqn.params["dimension_numbers"], aval(eqn.outvars[0]).ndim
    beside, collapsed = dims.operand_batching_dims, dims.collapsed_slice_dims
    from_operand = [axis for axis in _units(operand.shape) if axis not in dims.start_index_map]
    from_indices = _units(indices.shape[:-1])
    if beside and math.prod(eqn.params["slice_sizes"]) == 1:
        # Compilers turn picks along an axis into a comparison if the axis is kept.
        from_indices = _without_last(from_indices, dims.start_indices_batching_dims)
    if not (from_operand or from_indices):
        return None
    sliced = (axis for axis in range(len(operand.shape)) if axis not in (*beside, *collapsed))
    out_of_slice = dict(zip(sliced, dims.offset_dims, strict=True))
    looked_up = [axis for axis in range(ndim) if axis not in dims.offset_dims]
    from_out = [looked_up[axis] for axis in from_indices]
    from_out += [out_of_slice[axis] for axis in from_operand if axis in out_of_slice]
    in_operand = _renumbered(len(operand.shape), from_operand)
    in_indices = _renumbered(len(indices.shape), from_indices)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=_renumbered(ndim, from_out)(dims.offset_dims),
        collapsed_slice_dims=in_operand(collapsed),
        start_index_map=in_operand(dims.start_index_map),
        operand_batching_dims=in_operand(beside),
        start_indices_batching_dims=in_indices(dims.start_indices_batching_dims),
    )
    sizes = [s for axis, s in enumerate(eqn.params["slice_sizes"]) if axis not in from_operand]
    params = eqn.params | {"dimension_numbers": numbers, "slice_sizes": tuple(sizes)}
    given = [
        lax.squeeze(value.full, axes) if axes else value.full
        for value, axes in ((operand, from_operand), (indices, from_indices))
    ]
    return run_equation(eqn.replace(params=params), given)[0]


def _without_last(axes: Sequence[int], beside: Sequence[int]) -> list[int]:
    """Remove the last of the axes that do not correspond to an axis of the operand."""
    kept = max((axis for axis in axes if axis not in beside), default=None)
    return [axis for axis in axes if axis != kept]


def _units(shape: Sequence[int]) -> list[int]:
    return [axis for axis, size in enumerate(shape) if size == 1]


def _renumbered(ndim: int, removed: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """Return a function that drops removed axes from a list and renumbers the others."""
    places = {axis: i for i, axis in enumerate(a for a in range(ndim) if a not in removed)}
    return lambda axes: tuple(places[axis] for axis in axes if axis in places)


_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
# These run on the form that their operand has.
_FOLLOWING = {"broadcast_in_dim", *_REDUCTIONS}
_RULES: dict[str, Callable[[core.JaxprEqn, list[_Value]], Any]] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "expand_dims": _same,
    "gather": _gather,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _same,
    "transpose": _transpose,
}
