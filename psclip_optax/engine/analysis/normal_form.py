"""Retrace a loss in a form in which parameters meet data in sites.

- A scan that takes layers by index becomes a scan over these layers, if the indices are known.
- A branch chosen by data becomes a selection between the branches' results, as under `jax.vmap`.
  Then each branch is analysed.
- A slice or look-up of a parameter at known indices becomes a static slice.

Anything that is not known for certain does not change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from psclip_optax.engine.analysis.followed import (
    Source,
    Value,
    as_it_is,
    carry_within,
    const_within,
    constant,
    layer_within,
    source_of,
    with_traced,
)
from psclip_optax.engine.analysis.views import Path, aval
from psclip_optax.engine.analysis.walk import walk


class _Layers(NamedTuple):
    """Slices of size 1 along one axis of a scan's constant, one in each step."""

    const: int
    axis: int
    start: int
    step: int
    number: int


def normal_form(closed: core.ClosedJaxpr, num_leaves: int) -> core.ClosedJaxpr:
    """Retrace a loss in a form with more sites, if there is something to change.

    Args:
      closed: the loss for one example.
      num_leaves: how many of its inputs are parameters; the others are the example.
    """
    sources = [Source.PARAMETERS] * num_leaves
    sources += [Source.DATA] * (len(closed.jaxpr.invars) - num_leaves)
    if closed.effects or not _has_occasion(closed.jaxpr, sources):
        return closed

    def run(*inputs: Any) -> list[Any]:
        values = [Value(*both) for both in zip(inputs, sources, strict=True)]
        outs = _Tracer(None, {}).jaxpr(closed.jaxpr, closed.consts, values)
        return [out.traced for out in outs]

    shapes = [meshes.shape_of_type(aval(v)) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(run)(*shapes)


def _has_occasion(jaxpr: core.Jaxpr, sources: Sequence[Source]) -> bool:
    """Tell whether there may be something to change; checking costs less than tracing.

    An integer in a scan's carry may be a counter, and is treated as a constant.
    """
    found: list[core.JaxprEqn] = []

    def equation(eqn: core.JaxprEqn, inputs: list[Source], path: Path) -> list[Source]:
        del path
        if Source.PARAMETERS in inputs and _is_occasion(eqn, inputs):
            found.append(eqn)
        return [source_of(inputs)] * len(eqn.outvars)

    consts = [Source.CONSTANTS] * len(jaxpr.constvars)
    walk(jaxpr, consts, sources, lambda _: Source.CONSTANTS, equation)
    return bool(found)


def _is_occasion(eqn: core.JaxprEqn, sources: list[Source]) -> bool:
    name = eqn.primitive.name
    if name in ("dynamic_slice", "gather"):
        return Source.DATA not in sources
    if name in CALLS:
        return _has_occasion(inner_jaxpr(eqn)[0], sources)
    if name == "scan":
        body, (num_consts, num_carry) = inner_jaxpr(eqn)[0], scan_counts(eqn)
        consts, _, xs = parted(sources, num_consts, num_carry)
        carry = [
            Source.CONSTANTS if jnp.issubdtype(aval(v).dtype, jnp.integer) else Source.DATA
            for v in body.invars[num_consts : num_consts + num_carry]
        ]
        return _has_occasion(body, [*consts, *carry, *xs])
    return name == "cond"


class _Tracer(NamedTuple):
    """Traces jaxprs into the normal form.

    Attributes:
      found: a dict to fill with the places in a scan's body where layers are taken; None outside
        scans.
      given: the layers that the scan provides at these places.
    """

    found: dict[Path, _Layers] | None
    given: dict[Path, Any]

    def jaxpr(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Value],
        path: Path = (),
    ) -> list[Value]:
        return walk(jaxpr, [*map(constant, consts)], inputs, constant, self.eqn, path)

    def eqn(self, eqn: core.JaxprEqn, inputs: list[Value], path: Path) -> Sequence[Value]:
        rule = _RULES.get(eqn.primitive.name)
        outs = None
        if rule is not None and any(value.source is Source.PARAMETERS for value in inputs):
            outs = rule(self, eqn, inputs, path)
        return as_it_is(eqn, inputs) if outs is None else outs

    def call(self, eqn: core.JaxprEqn, inputs: list[Value], path: Path) -> Sequence[Value] | None:
        jaxpr, consts = inner_jaxpr(eqn)
        if not _has_occasion(jaxpr, [value.source for value in inputs]):
            return None
        return self.jaxpr(jaxpr, consts, inputs, path)

    def checkpoint(
        self, eqn: core.JaxprEqn, inputs: list[Value], path: Path
    ) -> Sequence[Value] | None:
        if not _has_occasion(inner_jaxpr(eqn)[0], [value.source for value in inputs]):
            return None
        sources: list[Source] = []

        def call(traced: list[Any], _: tuple[()]) -> list[Any]:
            outs = self.call(eqn, with_traced(inputs, traced), path) or ()
            sources[:] = [out.source for out in outs]
            return [out.traced for out in outs]

        outs = checkpointed(eqn, call)([value.traced for value in inputs], ())
        return [Value(*both) for both in zip(outs, sources, strict=True)]

    def cond(self, eqn: core.JaxprEqn, inputs: list[Value], path: Path) -> Sequence[Value] | None:
        index, *operands = inputs
        if index.source is not Source.DATA or eqn.effects:
            return None
        branches = eqn.params["branches"]
        results = [
            self.jaxpr(branch.jaxpr, branch.consts, operands, (*path, i))
            for i, branch in enumerate(branches)
        ]
        is_last = index.traced > 0
        which = is_last if len(branches) == 2 else jnp.clip(index.traced, 0, len(branches) - 1)
        return [
            Value(lax.select_n(which, *(out.traced for out in outs)), Source.DATA)
            for outs in zip(*results, strict=True)
        ]

    def dynamic_slice(
        self, eqn: core.JaxprEqn, inputs: list[Value], path: Path
    ) -> Sequence[Value] | None:
        if path in self.given:
            return [Value(self.given[path], Source.PARAMETERS)]
        operand, *starts = inputs
        known = [start for start in starts if start.number is not None]
        if len(known) < len(starts):
            return None
        shape, sizes = aval(eqn.invars[0]).shape, eqn.params["slice_sizes"]
        most = np.subtract(shape, sizes)
        first = [np.clip(start.number, 0, m) for start, m in zip(known, most, strict=True)]
        if any(start.is_stepped for start in known):
            layers = _layers(operand.const, first, sizes, shape)
            if layers is not None and self.found is not None:
                self.found[path] = layers
            return None
        stops = np.add(first, sizes)
        out = lax.slice(operand.traced, [*map(int, first)], [*map(int, stops)])
        return [Value(out, Source.PARAMETERS)]

    def gather(self, eqn: core.JaxprEqn, inputs: list[Value], path: Path) -> Sequence[Value] | None:
        del path
        operand, indices = inputs
        if indices.number is None or indices.is_stepped:
            return None
        rows = _rows(eqn, indices.number)
        if rows is None:
            return None
        out = lax.slice_in_dim(operand.traced, rows.start, rows.stop, rows.step)
        return [Value(out.reshape(aval(eqn.outvars[0]).shape), Source.PARAMETERS)]

    def scan(self, eqn: core.JaxprEqn, inputs: list[Value], path: Path) -> Sequence[Value] | None:
        del path
        body = inner_jaxpr(eqn)[0]
        if not eqn.params["length"] or not _is_occasion(eqn, [value.source for value in inputs]):
            return None
        num_consts, num_carry = scan_counts(eqn)
        consts, init, xs = parted(inputs, num_consts, num_carry)
        within = [*map(const_within, consts, range(num_consts)), *carry_within(eqn, inputs)]
        within += map(layer_within, xs)

        def step(tracer: _Tracer, carry: list[Any], of_step: list[Any]) -> Any:
            traced = [*(value.traced for value in consts), *carry, *of_step]
            outs = tracer.jaxpr(*inner_jaxpr(eqn), with_traced(within, traced))
            traced = [out.traced for out in outs]
            return traced[:num_carry], traced[num_carry:]

        found: dict[Path, _Layers] = {}
        shapes = [meshes.shape_of_type(aval(v)) for v in body.invars[num_consts:]]
        jax.eval_shape(
            functools.partial(step, _Tracer(found, {})), shapes[:num_carry], shapes[num_carry:]
        )
        taken = {at: _taken(consts[one.const].traced, one) for at, one in found.items()}

        def run(carry: list[Any], both: tuple[list[Any], dict[Path, Any]]) -> Any:
            of_step, layers = both
            given = {at: jnp.expand_dims(one, found[at].axis) for at, one in layers.items()}
            return step(_Tracer({}, given), carry, of_step)

        carry, ys = lax.scan(
            run,
            [value.traced for value in init],
            ([value.traced for value in xs], taken),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [Value(out, Source.DATA) for out in [*carry, *ys]]


_RULES = {
    **dict.fromkeys(CALLS, _Tracer.call),
    **dict.fromkeys(CHECKPOINTS, _Tracer.checkpoint),
    "cond": _Tracer.cond,
    "dynamic_slice": _Tracer.dynamic_slice,
    "gather": _Tracer.gather,
    "scan": _Tracer.scan,
}


def _layers(
    const: int | None, first: Sequence[Any], sizes: Sequence[int], shape: Sequence[int]
) -> _Layers | None:
    """Find which layers of a constant slices are, if each is one layer and all evenly spaced."""
    moving = [axis for axis, start in enumerate(first) if np.ndim(start)]
    others = [axis for axis in range(len(shape)) if axis not in moving]
    is_whole = all(first[axis] == 0 and sizes[axis] == shape[axis] for axis in others)
    if const is None or len(moving) != 1 or not is_whole or sizes[moving[0]] != 1:
        return None
    places = first[moving[0]]
    steps = set(np.diff(places).tolist()) or {1}
    if len(steps) > 1 or steps == {0}:
        return None
    return _Layers(const, moving[0], int(places[0]), steps.pop(), len(places))


def _taken(array: Any, layers: _Layers) -> Any:
    """Move the layers of a constant to the first axis, for a scan to run over."""
    ends = sorted((layers.start, layers.start + (layers.number - 1) * layers.step))
    if (*ends, abs(layers.step)) != (0, array.shape[layers.axis] - 1, 1):
        array = lax.slice_in_dim(array, ends[0], ends[1] + 1, abs(layers.step), layers.axis)
    if layers.step < 0:
        array = lax.rev(array, (layers.axis,))
    return jnp.moveaxis(array, layers.axis, 0) if layers.axis else array


def _rows(eqn: core.JaxprEqn, indices: np.ndarray) -> range | None:
    """Find the rows that a look-up takes, if they are whole and evenly spaced."""
    dims, shape = eqn.params["dimension_numbers"], aval(eqn.invars[0]).shape
    whole = (1, *shape[1:])
    flat = indices.reshape(-1).astype(np.int64)  # differences of unsigned numbers would wrap
    is_of_rows = (
        tuple(dims.start_index_map) == (0,)
        and tuple(dims.collapsed_slice_dims) == (0,)
        and not dims.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == whole
        and tuple(dims.offset_dims) == tuple(range(indices.ndim - 1, indices.ndim + len(shape) - 2))
    )
    if not is_of_rows or not flat.size or flat.min() < 0 or flat.max() >= shape[0]:
        return None
    steps = set(np.diff(flat).tolist()) or {1}
    if len(steps) > 1 or min(steps) < 1:
        return None
    return range(int(flat[0]), int(flat[-1]) + 1, steps.pop())
