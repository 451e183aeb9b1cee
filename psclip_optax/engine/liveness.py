"""Estimate the peak of a traced program's temporary memory, as XLA's compilers hold arrays.

- An elementwise result is fused into the operation that reads it, and recomputed there from its
  inputs. It is stored if several operations read it and it is smaller than these inputs.
- If the only reader of a product or a convolution is elementwise, the result of the reader is
written in its place.
- A loop or a branch reads arrays from memory. An array that only it reads is written just before.
- A loop's carry and an elementwise result reuse the memory of an array of the same size that is
  read for the last time.

Arguments and results are not temporary.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from psclip_optax.engine.analysis.equations import (
    CALLS,
    CUSTOM_RULES,
    inner_jaxprs,
    parted,
    scan_counts,
)
from psclip_optax.engine.analysis.operations import ELEMENTWISE
from psclip_optax.engine.analysis.walk import walk

_INLINED = (*CALLS, *CUSTOM_RULES, "custom_vmap_call")
_WITH_BODIES = ("scan", "while", "cond", "shard_map")
_READING_MEMORY = (*_WITH_BODIES, "sort", "dynamic_update_slice")
_PRODUCTS = ("dot_general", "conv_general_dilated")
_SCATTERS = ("scatter", "scatter-add")
# The same array in memory, or in a layout that the writing operation may choose.
_SAME_ARRAY = (
    *("copy", "copy_p", "expand_dims", "name", "optimization_barrier", "pcast", "pvary"),
    *("reshape", "sharding_constraint", "squeeze", "stop_gradient", "transpose"),
)
_FUSED = (
    *ELEMENTWISE,
    *_SAME_ARRAY,
    *("and", "atan2", "bitcast_convert_type", "broadcast_in_dim", "ceil", "concatenate"),
    *("dynamic_slice", "eq", "erf_inv", "erfc", "floor", "ge", "gt", "imag", "iota", "is_finite"),
    *("le", "lt", "ne", "nextafter", "not", "or", "pad", "population_count", "random_bits"),
    *("random_unwrap", "random_wrap", "real", "reduce_precision", "rem", "rev", "round"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical", "slice", "split", "stack"),
    "xor",
)
# XLA recomputes a result that is not much smaller than its inputs.
_WORTH_HOLDING = 1.25
# A product's reader may be written in its place if it converts bfloat16 to float32, not if it grows
# more.
_WIDENED = 2


class _Step(NamedTuple):
    """An equation of a program whose calls are inlined.

    Attributes:
      eqn: the equation.
      reads: the numbers of the values that it reads; None for a literal.
      writes: the numbers of its results.
      inside: the peak within the body of a loop or the branches of a condition.
    """

    eqn: core.JaxprEqn
    reads: Sequence[int | None]
    writes: Sequence[int]
    inside: int

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


def peak_bytes(jaxpr: core.Jaxpr, *, is_tpu: bool) -> int:
    """Estimate the peak of temporary memory.

    Args:
      jaxpr: the traced program.
      is_tpu: whether the program is compiled for a TPU, where a scatter of single entries becomes
        an elementwise comparison of indices.
    """
    return _peak(_Program(jaxpr, is_tpu=is_tpu))


class _Program:
    """The steps of a jaxpr in order, and the sizes of their values.

    Attributes:
      sizes: the bytes of each value, by its number.
      steps: the steps on which results depend.
      given: the arguments and results.
      results: the results.
      readers: the numbers of the steps that read a value.
      widened: the casts to a wider dtype, which XLA makes as it reads the narrow array.
    """

    def __init__(self, jaxpr: core.Jaxpr, *, is_tpu: bool) -> None:
        self.is_tpu = is_tpu
        self.sizes: list[int] = []
        self.steps: list[_Step] = []
        self.widened: set[int] = set()
        arguments = self._new(jaxpr.constvars), self._new(jaxpr.invars)
        outs = walk(jaxpr, *arguments, _no_value, self._equation)
        self.results = {value for value in outs if value is not None}
        self.given = {value for part in arguments for value in part if value is not None}
        self.given |= self.results
        self.steps = _needed(self.steps, self.results)
        self.readers: dict[int, list[int]] = collections.defaultdict(list)
        for number, step in enumerate(self.steps):
            for value in {value for value in step.reads if value is not None}:
                self.readers[value].append(number)

    def is_fused(self, step: _Step) -> bool:
        if step.name in _SCATTERS:
            dimensions = step.eqn.params["dimension_numbers"]
            return self.is_tpu and not dimensions.update_window_dims
        return step.name in _FUSED

    def _new(self, variables: Iterable[Any]) -> list[int | None]:
        numbers: list[int | None] = []
        for variable in variables:
            numbers.append(len(self.sizes))
            self.sizes.append(_num_bytes(variable.aval))
        return numbers

    def _equation(
        self, eqn: core.JaxprEqn, reads: list[int | None], _: Any
    ) -> Sequence[int | None]:
        bodies = list(inner_jaxprs(eqn))
        if eqn.primitive.name in _INLINED and len(bodies[0].invars) == len(reads):
            consts = self._new(bodies[0].constvars)
            return walk(bodies[0], consts, reads, _no_value, self._equation)
        chosen = self._branch_of_platform(eqn)
        if chosen is not None and self._reads_narrow(reads) and _is_elementwise(chosen):
            consts = self._new(chosen.constvars)
            return walk(chosen, consts, reads[1:], _no_value, self._equation)
        writes = self._new(eqn.outvars)
        inside = 0
        if eqn.primitive.name in _WITH_BODIES:
            inside = max(peak_bytes(body, is_tpu=self.is_tpu) for body in bodies)
        written = [one for one in writes if one is not None]
        if _widens(eqn) or (eqn.primitive.name in _SAME_ARRAY and self.widened.intersection(reads)):
            self.widened.update(written)
        self.steps.append(_Step(eqn, reads, written, inside))
        return writes

    def _reads_narrow(self, reads: Iterable[int | None]) -> bool:
        """Tell whether most of what is read are narrow arrays that are widened as they are read."""
        values = {value for value in reads if value is not None}
        widened = sum(self.sizes[value] for value in values & self.widened)
        return 2 * widened > sum(self.sizes[value] for value in values)

    def _branch_of_platform(self, eqn: core.JaxprEqn) -> core.Jaxpr | None:
        """Find the branch that is compiled, if the platform decides: a TPU's, or the default."""
        platforms = eqn.params.get("branches_platforms")
        if platforms is None:
            return None
        wanted = "tpu" if self.is_tpu else None
        number = next((i for i, one in enumerate(platforms) if one and wanted in one), -1)
        return eqn.params["branches"][number].jaxpr


def _widens(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    return _num_bytes(eqn.outvars[0].aval) > _num_bytes(eqn.invars[0].aval)


def _is_elementwise(jaxpr: core.Jaxpr) -> bool:
    """Tell whether all equations are fused into what reads their results."""
    return all(
        all(map(_is_elementwise, inner_jaxprs(eqn)))
        if eqn.primitive.name in _INLINED
        else eqn.primitive.name in _FUSED
        for eqn in jaxpr.eqns
    )


def _no_value(literal: Any) -> None:
    """Return no number for a literal, which takes no memory."""


def _num_bytes(kind: Any) -> int:
    dtype: Any = getattr(kind, "dtype", None)
    return math.prod(kind.shape) * dtype.itemsize if hasattr(dtype, "itemsize") else 0


def _needed(steps: Sequence[_Step], results: set[int]) -> list[_Step]:
    """Find the steps on which results depend."""
    wanted, needed = set(results), []
    for step in reversed(steps):
        if not wanted.isdisjoint(step.writes):
            wanted.update(value for value in step.reads if value is not None)
            needed.append(step)
    return needed[::-1]


class _Holding:
    """Says which values are stored, and from which values the others are recomputed.

    Attributes:
      sources: for each value, the stored values from which it is recomputed, or itself.
      held: the values that are written by the step that computes them.
      written_by_reader: products in whose place the result of their only reader is written.
      written_late: values that are written just before the step of this number reads them.
    """

    def __init__(self, program: _Program) -> None:
        self.program = program
        self.sources: dict[int, frozenset[int]] = {v: frozenset([v]) for v in program.given}
        self.held: set[int] = set(program.given)
        self.written_by_reader: set[int] = set()
        self.written_late: dict[int, int] = {}
        for step in program.steps:
            if program.is_fused(step):
                self._add_fused(step)
            else:
                self._add_written(step)

    def sources_of(self, values: Iterable[int | None]) -> frozenset[int]:
        known = (self.sources.get(v, frozenset[int]()) for v in values if v is not None)
        return frozenset[int]().union(*known)

    def _hold(self, value: int) -> None:
        self.held.add(value)
        self.sources[value] = frozenset([value])

    def _add_written(self, step: _Step) -> None:
        program = self.program
        for value in step.writes:
            self._hold(value)
            readers = program.readers[value]
            if step.name not in _PRODUCTS or value in program.results or len(readers) != 1:
                continue
            reader = program.steps[readers[0]]
            made = sum(program.sizes[one] for one in reader.writes)
            if program.is_fused(reader) and made <= _WIDENED * program.sizes[value]:
                self.written_by_reader.add(value)

    def _add_fused(self, step: _Step) -> None:
        program = self.program
        sources = self.sources_of(step.reads)
        cost = sum(program.sizes[one] for one in sources - program.given)
        products = sorted(self.written_by_reader.intersection(step.reads))
        self.written_by_reader.difference_update(products[:-1])  # it is written in one place
        is_behind_product = bool(products)
        for value in step.writes:
            readers, size = program.readers[value], program.sizes[value]
            memory = [n for n in readers if program.steps[n].name in _READING_MEMORY]
            is_same = step.name in _SAME_ARRAY
            is_worth_holding = len(readers) > 1 and cost > _WORTH_HOLDING * size > 0
            if value in program.results or (is_behind_product and not is_same and size):
                self._hold(value)
                continue
            if is_same:
                self._pass_on(value, is_behind_product)
            elif is_worth_holding:
                self._hold(value)
                continue
            elif memory:
                self.written_late[value] = memory[0]
            self.sources[value] = sources

    def _pass_on(self, value: int, is_behind_product: bool) -> None:
        """Treat the reader of a reshaped product as the reader of the product."""
        readers = [self.program.steps[n] for n in self.program.readers[value]]
        if is_behind_product and len(readers) == 1 and self.program.is_fused(readers[0]):
            self.written_by_reader.add(value)


def _peak(program: _Program) -> int:
    holding = _Holding(program)
    ends, late_ends = _last_reads(program, holding)
    size_of = {value: program.sizes[value] for value in holding.held}
    size_of |= dict.fromkeys((*program.given, *holding.written_by_reader), 0)
    carried = _carried(program, holding, ends, late_ends, size_of)
    starting: dict[int, list[int]] = collections.defaultdict(list)
    for value, number in holding.written_late.items():
        if value in late_ends:
            size_of[value] = program.sizes[value]
            starting[number].append(value)
    ending: dict[int, list[int]] = collections.defaultdict(list)
    for value, number in (ends | late_ends).items():
        ending[number].append(value)

    alive: dict[int, int] = {}
    peak = now = 0
    for number, step in enumerate(program.steps):
        written = [v for v in step.writes if v in holding.held and v in ends]
        replaced = _replaced(program, step, written, ending[number], alive, size_of, carried)
        for value in replaced:
            now -= alive[value]
            alive[value] = 0
        for value in (*starting[number], *written):
            alive[value] = size_of[value]
            now += size_of[value]
        peak = max(peak, now + step.inside)
        for value in ending[number]:
            now -= alive.pop(value, 0)
    return peak


def _last_reads(program: _Program, holding: _Holding) -> tuple[dict[int, int], dict[int, int]]:
    """Find the last step that reads each stored value, and each value that is written late."""
    ends: dict[int, int] = {}
    late_ends: dict[int, int] = {}
    late = holding.written_late
    for number, step in enumerate(program.steps):
        if program.is_fused(step) and holding.held.isdisjoint(step.writes):
            continue
        if step.name in _WITH_BODIES:
            ends.update(dict.fromkeys(step.writes, number))  # also a carry that nothing reads later
        for value in (value for value in step.reads if value is not None):
            if value in late and step.name in _READING_MEMORY:
                late_ends[value] = number
                if number > late[value]:
                    continue
            ends.update(dict.fromkeys(holding.sources_of([value]), number))
    return ends | dict.fromkeys(program.results, len(program.steps)), late_ends


def _carried(
    program: _Program,
    holding: _Holding,
    ends: dict[int, int],
    late_ends: dict[int, int],
    size_of: dict[int, int],
) -> dict[int, int]:
    """Find the memory that a loop's carry reuses: its first value, if nothing reads that later.

    The first value of a carry that is a result takes no temporary memory.
    """
    carried: dict[int, int] = {}
    for number, step in reversed(list(enumerate(program.steps))):
        for first, last in _carry(step):
            if first is None or last not in ends:
                continue
            if holding.written_late.get(first) == late_ends.get(first, -1) == number:
                del holding.written_late[first], late_ends[first]
                continue
            for source in holding.sources_of([first]) - program.given:
                is_last_read = ends.get(source) == number
                if is_last_read and program.sizes[source] == program.sizes[last]:
                    carried[last] = source
                    if not size_of[last]:
                        size_of[source] = 0
    return carried


def _carry(step: _Step) -> list[tuple[int | None, int]]:
    """Pair the first and the last values of a loop's carry."""
    if step.name == "while":
        return list(zip(step.reads[-len(step.writes) :], step.writes, strict=True))
    if step.name != "scan":
        return []
    counts = scan_counts(step.eqn)
    _, first, _ = parted(step.reads, *counts)
    return list(zip(first, step.writes[: counts.carry], strict=True))


def _replaced(
    program: _Program,
    step: _Step,
    written: Iterable[int],
    ending: Iterable[int],
    alive: dict[int, int],
    size_of: dict[int, int],
    carried: dict[int, int],
) -> list[int]:
    """Find arrays whose memory a step reuses for its results."""
    is_in_place = program.is_fused(step) or step.name in (*_SCATTERS, "dynamic_update_slice")
    free = [value for value in ending if alive.get(value)] if is_in_place else []
    replaced = []
    for value in written:
        size = size_of[value]
        place = carried.get(value) or next((v for v in free if alive[v] == size), None)
        if place is not None and alive.get(place) and size:
            replaced.append(place)
            free = [one for one in free if one != place]
    return replaced
