"""Bring a loss into a form in which parameters meet data in sites: the same function, traced anew.

- Layers that are taken by index in a scan, whose indices are known, are what the scan runs over.
- A choice between branches that data make, as `jax.vmap` would make it, is one between their
  results, so that each branch is walked through.
- A slice or look-up of a parameter at places that are known is a static slice.

What is not known for certain stays as it is.
"""

from __future__ import annotations

import enum
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
    inner_jaxprs,
    needed_equations,
    parted,
    scan_counts,
)
from psclip_optax.engine.analysis.views import Path, as_function, aval, run_equation
from psclip_optax.engine.analysis.walk import walk
from psclip_optax.thresholds import concrete

# Indices are followed up to this size.
_MOST_FOLLOWED = 2**14


class _Source(enum.Enum):
    """What a value depends on; of what depends on both, data."""

    CONSTANTS = enum.auto()
    PARAMETERS = enum.auto()
    DATA = enum.auto()


class _Value(NamedTuple):
    """A value of the new trace.

    Attributes:
      traced: it.
      source: what it depends on.
      number: what it is, if that is known: an array, with an axis in front for the steps of the
        scan around it if `is_stepped`.
      is_stepped: whether it is another in each step.
      const: of which of the scan's constants it is the whole.
    """

    traced: Any
    source: _Source
    number: Any = None
    is_stepped: bool = False
    const: int | None = None


class _Layers(NamedTuple):
    """Slices of size 1 along one axis of a scan's constant, one in each step."""

    const: int
    axis: int
    start: int
    step: int
    number: int


def normal_form(closed: core.ClosedJaxpr, num_leaves: int) -> core.ClosedJaxpr:
    """Trace a loss anew in a form with more sites, if there is something to bring into it.

    Args:
      closed: the loss for one example.
      num_leaves: how many of its inputs are parameters; the others are the example.
    """
    if closed.effects or not _has_occasion(closed.jaxpr):
        return closed
    sources = [_Source.PARAMETERS] * num_leaves
    sources += [_Source.DATA] * (len(closed.jaxpr.invars) - num_leaves)

    def run(*inputs: Any) -> list[Any]:
        values = [_Value(*both) for both in zip(inputs, sources, strict=True)]
        outs = _Tracer(None, {}).jaxpr(closed.jaxpr, closed.consts, values)
        return [out.traced for out in outs]

    kinds = [meshes.shape_of_type(aval(v)) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(run)(*kinds)


def _has_occasion(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in ("dynamic_slice", "gather", "cond")
        or any(map(_has_occasion, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


class _Tracer(NamedTuple):
    """Traces a jaxpr anew.

    Attributes:
      found: where in a scan's body layers are taken, to be filled; None outside of scans.
      given: what the scan gives there instead.
    """

    found: dict[Path, _Layers] | None
    given: dict[Path, Any]

    def jaxpr(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[_Value],
        path: Path = (),
    ) -> list[_Value]:
        return walk(jaxpr, [*map(_constant, consts)], inputs, _constant, self.eqn, path)

    def eqn(self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path) -> Sequence[_Value]:
        rule = _RULES.get(eqn.primitive.name)
        outs = None
        if rule is not None and any(value.source is _Source.PARAMETERS for value in inputs):
            outs = rule(self, eqn, inputs, path)
        return _as_it_is(eqn, inputs) if outs is None else outs

    def call(self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path) -> Sequence[_Value] | None:
        jaxpr, consts = inner_jaxpr(eqn)
        return self.jaxpr(jaxpr, consts, inputs, path) if _has_occasion(jaxpr) else None

    def checkpoint(
        self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path
    ) -> Sequence[_Value] | None:
        if not _has_occasion(inner_jaxpr(eqn)[0]):
            return None
        sources: list[_Source] = []

        def call(traced: list[Any]) -> list[Any]:
            outs = self.call(eqn, _with_traced(inputs, traced), path) or ()
            sources[:] = [out.source for out in outs]
            return [out.traced for out in outs]

        outs = checkpointed(eqn, call)([value.traced for value in inputs])
        return [_Value(*both) for both in zip(outs, sources, strict=True)]

    def cond(self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path) -> Sequence[_Value] | None:
        index, *operands = inputs
        if index.source is not _Source.DATA or eqn.effects:
            return None
        branches = eqn.params["branches"]
        results = [
            self.jaxpr(branch.jaxpr, branch.consts, operands, (*path, i))
            for i, branch in enumerate(branches)
        ]
        is_last = index.traced > 0
        which = is_last if len(branches) == 2 else jnp.clip(index.traced, 0, len(branches) - 1)
        return [
            _Value(lax.select_n(which, *(out.traced for out in outs)), _Source.DATA)
            for outs in zip(*results, strict=True)
        ]

    def dynamic_slice(
        self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path
    ) -> Sequence[_Value] | None:
        if path in self.given:
            return [_Value(self.given[path], _Source.PARAMETERS)]
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
        return [_Value(out, _Source.PARAMETERS)]

    def gather(
        self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path
    ) -> Sequence[_Value] | None:
        del path
        operand, indices = inputs
        is_known = indices.number is not None and not indices.is_stepped
        rows = _rows(eqn, indices.number) if is_known else None
        if rows is None:
            return None
        out = lax.slice_in_dim(operand.traced, rows.start, rows.stop, rows.step)
        return [_Value(out.reshape(aval(eqn.outvars[0]).shape), _Source.PARAMETERS)]

    def scan(self, eqn: core.JaxprEqn, inputs: list[_Value], path: Path) -> Sequence[_Value] | None:
        del path
        body = inner_jaxpr(eqn)[0]
        if not eqn.params["length"] or not _has_occasion(body):
            return None
        num_consts, num_carry = scan_counts(eqn)
        consts, init, xs = parted(inputs, num_consts, num_carry)
        within = [*map(_const_within, consts, range(num_consts)), *_carry_within(eqn, inputs)]
        within += map(_layer_within, xs)

        def step(tracer: _Tracer, carry: list[Any], own: list[Any]) -> Any:
            traced = [*(value.traced for value in consts), *carry, *own]
            outs = tracer.jaxpr(*inner_jaxpr(eqn), _with_traced(within, traced))
            traced = [out.traced for out in outs]
            return traced[:num_carry], traced[num_carry:]

        found: dict[Path, _Layers] = {}
        kinds = [meshes.shape_of_type(aval(v)) for v in body.invars[num_consts:]]
        jax.eval_shape(
            functools.partial(step, _Tracer(found, {})), kinds[:num_carry], kinds[num_carry:]
        )
        taken = {at: _taken(consts[own.const].traced, own) for at, own in found.items()}

        def run(carry: list[Any], both: tuple[list[Any], dict[Path, Any]]) -> Any:
            own, layers = both
            given = {at: jnp.expand_dims(one, found[at].axis) for at, one in layers.items()}
            return step(_Tracer({}, given), carry, own)

        carry, ys = lax.scan(
            run,
            [value.traced for value in init],
            ([value.traced for value in xs], taken),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [_Value(out, _Source.DATA) for out in [*carry, *ys]]


_RULES = {
    **dict.fromkeys(CALLS, _Tracer.call),
    **dict.fromkeys(CHECKPOINTS, _Tracer.checkpoint),
    "cond": _Tracer.cond,
    "dynamic_slice": _Tracer.dynamic_slice,
    "gather": _Tracer.gather,
    "scan": _Tracer.scan,
}


def _as_it_is(eqn: core.JaxprEqn, inputs: Sequence[_Value]) -> Sequence[_Value]:
    source = max([value.source for value in inputs], key=_order, default=_Source.CONSTANTS)
    traced = run_equation(eqn, [value.traced for value in inputs])
    numbers, is_stepped = _numbers(eqn, inputs), any(value.is_stepped for value in inputs)
    return [_Value(out, source, n, is_stepped) for out, n in zip(traced, numbers, strict=True)]


def _order(source: _Source) -> int:
    return source.value


def _constant(value: Any) -> _Value:
    known = concrete(value)
    return _Value(value, _Source.CONSTANTS, known if known is None or _is_index(known) else None)


def _with_traced(values: Sequence[_Value], traced: Sequence[Any]) -> list[_Value]:
    return [value._replace(traced=one) for value, one in zip(values, traced, strict=True)]


# Indices


def _is_index(kind: Any) -> bool:
    is_whole = jnp.issubdtype(kind.dtype, jnp.integer) or kind.dtype == bool
    return is_whole and kind.size <= _MOST_FOLLOWED


def _numbers(eqn: core.JaxprEqn, inputs: Sequence[_Value]) -> Sequence[Any]:
    """What an equation's outputs are, of those that are indices."""
    is_known = all(value.number is not None for value in inputs) and not eqn.effects
    if not is_known or not all(_is_index(aval(v)) for v in eqn.outvars):
        return [None] * len(eqn.outvars)
    function: Any = functools.partial(_run, eqn)
    axes = [0 if value.is_stepped else None for value in inputs]
    with jax.ensure_compile_time_eval():
        if 0 in axes:
            function = jax.vmap(function, in_axes=axes)
        return [np.asarray(out) for out in function(*(value.number for value in inputs))]


def _run(eqn: core.JaxprEqn, *inputs: Any) -> list[Any]:
    return run_equation(eqn, inputs)


def _const_within(value: _Value, const: int) -> _Value:
    return (_forgotten(value) if value.is_stepped else value)._replace(const=const)


def _layer_within(value: _Value) -> _Value:
    return _forgotten(value) if value.is_stepped else value._replace(is_stepped=True)


def _forgotten(value: _Value) -> _Value:
    """The value without its number: that of each step of the scan further out."""
    return _Value(value.traced, value.source)


def _carry_within(eqn: core.JaxprEqn, inputs: Sequence[_Value]) -> list[_Value]:
    """The carry of a scan: data, or counters whose number in each step is known."""
    body, consts = inner_jaxpr(eqn)
    num_consts, num_carry = scan_counts(eqn)
    is_known = [value.number is not None and not value.is_stepped for value in inputs]
    is_known = is_known if not consts else [False] * len(inputs)
    carry = range(num_consts, num_consts + num_carry)
    while True:
        told = walk(body, (), is_known, lambda _: True, lambda e, own, _: _told(e, own))
        lost = [i for i in carry if is_known[i] and not told[i - num_consts]]
        if not lost:
            break
        for i in lost:
            is_known[i] = False
    counters = [i for i in carry if is_known[i]]
    sequences = _sequences(eqn, inputs, is_known, counters)
    data = _Value(None, _Source.DATA)
    by_index = dict(zip(counters, sequences, strict=True))
    return [
        _Value(None, _Source.CONSTANTS, by_index[i], True) if i in by_index else data for i in carry
    ]


def _told(eqn: core.JaxprEqn, inputs: list[bool]) -> list[bool]:
    is_told = all(inputs) and not eqn.effects and all(_is_index(aval(v)) for v in eqn.outvars)
    return [is_told] * len(eqn.outvars)


def _sequences(
    eqn: core.JaxprEqn, inputs: Sequence[_Value], is_known: list[bool], counters: list[int]
) -> list[np.ndarray]:
    """The numbers that counters are in each step, in the order of what the scan runs over."""
    if not counters:
        return []
    body, _ = inner_jaxpr(eqn)
    num_consts, num_carry = scan_counts(eqn)
    known = [i for i in range(len(inputs)) if is_known[i]]
    outputs = [body.outvars[i - num_consts] for i in counters]
    needed = needed_equations(body, outputs)
    step = as_function(needed, [body.invars[i] for i in known], outputs)
    now = {i: inputs[i].number for i in known}
    steps = range(eqn.params["length"])
    sequence: list[list[Any]] = []
    with jax.ensure_compile_time_eval():
        for at in reversed(steps) if eqn.params["reverse"] else steps:
            sequence.append([now[i] for i in counters])
            own = [now[i][at] if i >= num_consts + num_carry else now[i] for i in known]
            now |= dict(zip(counters, step(*own), strict=True))
    ordered = reversed(sequence) if eqn.params["reverse"] else sequence
    return [np.stack(numbers) for numbers in zip(*ordered, strict=True)]


# Layers and rows


def _layers(
    const: int | None, first: Sequence[Any], sizes: Sequence[int], shape: Sequence[int]
) -> _Layers | None:
    """Tell which layers of a constant the slices are, if they are a layer each, evenly spaced."""
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
    """The layers of a constant, in front, for a scan to run over."""
    ends = sorted((layers.start, layers.start + (layers.number - 1) * layers.step))
    if (*ends, abs(layers.step)) != (0, array.shape[layers.axis] - 1, 1):
        array = lax.slice_in_dim(array, ends[0], ends[1] + 1, abs(layers.step), layers.axis)
    if layers.step < 0:
        array = lax.rev(array, (layers.axis,))
    return jnp.moveaxis(array, layers.axis, 0) if layers.axis else array


def _rows(eqn: core.JaxprEqn, indices: np.ndarray) -> range | None:
    """Tell which rows a look-up takes, if they are whole and evenly spaced."""
    dims, shape = eqn.params["dimension_numbers"], aval(eqn.invars[0]).shape
    whole = (1, *shape[1:])
    own = indices.reshape(-1)
    is_of_rows = (
        tuple(dims.start_index_map) == (0,)
        and tuple(dims.collapsed_slice_dims) == (0,)
        and not dims.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == whole
        and tuple(dims.offset_dims) == tuple(range(indices.ndim - 1, indices.ndim + len(shape) - 2))
    )
    if not is_of_rows or not own.size or own.min() < 0 or own.max() >= shape[0]:
        return None
    steps = set(np.diff(own).tolist()) or {1}
    if len(steps) > 1 or min(steps) < 1:
        return None
    return range(int(own[0]), int(own[-1]) + 1, steps.pop())
