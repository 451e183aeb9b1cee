"""Track the values of a new trace: what they depend on, and their numbers if known.

The number of an index is known if constants alone determine it, also in each step of a scan.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from psclip_optax.engine.analysis.equations import CALLS, inner_jaxpr, needed_equations, scan_counts
from psclip_optax.engine.analysis.views import as_function, aval, run_equation
from psclip_optax.engine.analysis.walk import walk
from psclip_optax.thresholds import concrete

# Arrays of indices are tracked up to this size.
_MOST_FOLLOWED = 2**14


class Source(enum.Enum):
    """The source of a value: data if it depends on any, else parameters if it depends on any."""

    CONSTANTS = enum.auto()
    PARAMETERS = enum.auto()
    DATA = enum.auto()


class Value(NamedTuple):
    """A value of the new trace.

    Attributes:
      traced: its tracer.
      source: what it depends on.
      number: its array, if known. If `is_stepped`, a leading axis has the steps of the scan around
        it.
      is_stepped: whether it differs from step to step.
      const: the index of the scan's constant that it equals, if it does.
    """

    traced: Any
    source: Source
    number: Any = None
    is_stepped: bool = False
    const: int | None = None


def as_it_is(eqn: core.JaxprEqn, inputs: Sequence[Value]) -> Sequence[Value]:
    source = source_of([value.source for value in inputs])
    traced = run_equation(eqn, [value.traced for value in inputs])
    numbers, is_stepped = _numbers(eqn, inputs), any(value.is_stepped for value in inputs)
    return [Value(out, source, n, is_stepped) for out, n in zip(traced, numbers, strict=True)]


def source_of(inputs: Sequence[Source]) -> Source:
    """Return the source of an output from the sources of its inputs."""
    return max(inputs, key=lambda source: source.value, default=Source.CONSTANTS)


def constant(value: Any) -> Value:
    is_index = _is_index(jax.typeof(value))
    return Value(value, Source.CONSTANTS, concrete(value) if is_index else None)


def with_traced(values: Sequence[Value], traced: Sequence[Any]) -> list[Value]:
    return [value._replace(traced=one) for value, one in zip(values, traced, strict=True)]


def _is_index(shaped: Any) -> bool:
    is_whole = jnp.issubdtype(shaped.dtype, jnp.integer) or shaped.dtype == bool
    return is_whole and shaped.size <= _MOST_FOLLOWED


def _is_of_indices(eqn: core.JaxprEqn) -> bool:
    """Tell whether an equation computes indices, by operations that need only integers."""
    if eqn.primitive.name in CALLS:
        return all(map(_is_of_indices, inner_jaxpr(eqn)[0].eqns))
    is_known = eqn.primitive.name in _ON_INDICES and not eqn.effects
    return is_known and all(_is_index(aval(v)) for v in eqn.outvars)


_ON_INDICES = (
    *("add", "and", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy"),
    *("div", "eq", "expand_dims", "ge", "gt", "integer_pow", "iota", "le", "lt", "max", "min"),
    *("mul", "ne", "neg", "not", "or", "rem", "reshape", "rev", "select_n", "sign", "slice"),
    *("squeeze", "stop_gradient", "sub", "transpose"),
)


def _numbers(eqn: core.JaxprEqn, inputs: Sequence[Value]) -> Sequence[Any]:
    """Compute the numbers of an equation's outputs; None if not known."""
    if eqn.primitive.name in ("pvary", "pcast"):  # the number is the same on all devices
        return [inputs[0].number]
    is_known = all(value.number is not None for value in inputs)
    if not is_known or not _is_of_indices(eqn):
        return [None] * len(eqn.outvars)
    function: Any = functools.partial(_run, eqn)
    axes = [0 if value.is_stepped else None for value in inputs]
    with jax.ensure_compile_time_eval():
        if 0 in axes:
            function = jax.vmap(function, in_axes=axes)
        return [np.asarray(out) for out in function(*(value.number for value in inputs))]


def _run(eqn: core.JaxprEqn, *inputs: Any) -> list[Any]:
    return run_equation(eqn, inputs)


def const_within(value: Value, const: int) -> Value:
    return (_forgotten(value) if value.is_stepped else value)._replace(const=const)


def layer_within(value: Value) -> Value:
    return _forgotten(value) if value.is_stepped else value._replace(is_stepped=True)


def _forgotten(value: Value) -> Value:
    """Drop a value's number, which differs in each step of the outer scan."""
    return Value(value.traced, value.source)


def carry_within(eqn: core.JaxprEqn, inputs: Sequence[Value]) -> list[Value]:
    """Classify the carry of a scan: data, or counters whose number in each step is known."""
    body, consts = inner_jaxpr(eqn)
    num_consts, num_carry = scan_counts(eqn)
    is_known = [value.number is not None and not value.is_stepped for value in inputs]
    is_known = is_known if not consts else [False] * len(inputs)
    carry = range(num_consts, num_consts + num_carry)
    while True:
        told = walk(body, (), is_known, lambda _: True, lambda e, flags, _: _told(e, flags))
        lost = [i for i in carry if is_known[i] and not told[i - num_consts]]
        if not lost:
            break
        for i in lost:
            is_known[i] = False
    counters = [i for i in carry if is_known[i]]
    sequences = _sequences(eqn, inputs, is_known, counters)
    data = Value(None, Source.DATA)
    by_index = dict(zip(counters, sequences, strict=True))
    return [
        Value(None, Source.CONSTANTS, by_index[i], True) if i in by_index else data for i in carry
    ]


def _told(eqn: core.JaxprEqn, inputs: list[bool]) -> list[bool]:
    return [all(inputs) and _is_of_indices(eqn)] * len(eqn.outvars)


def _sequences(
    eqn: core.JaxprEqn, inputs: Sequence[Value], is_known: list[bool], counters: list[int]
) -> list[np.ndarray]:
    """Compute the number of each counter in each step, in the scan's order."""
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
            numbers = [now[i][at] if i >= num_consts + num_carry else now[i] for i in known]
            now |= dict(zip(counters, step(*numbers), strict=True))
    ordered = reversed(sequence) if eqn.params["reverse"] else sequence
    return [np.stack(numbers) for numbers in zip(*ordered, strict=True)]
