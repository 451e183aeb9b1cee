"""Reads a program's cost on a device from its compiled text, without the device.

The text is XLA's optimized HLO. A loop's body counts once for each step. If the number of steps is
not known, the body does not count, and of branches only the first counts: the others run only if
there are samples to drop.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.common.collectives import group_size

_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\([^=]*?\)|\S+) "
    r"(?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)"
)
_COLLECTIVE = re.compile(
    "(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
    "(?:-start)?"
)
_CHAIN = re.compile(r'channel_id=\d+,.*chain_id="\d+"')
# Instructions that a GPU launches as kernels; the others cost nothing.
_KERNELS = {"fusion", "custom-call", "copy", "copy-start", "sort", "reduce"} | {
    "convolution",
    "dot",
    "scatter",
}

_KNOWN_STEPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLS = {
    "call": "to_apply=",
    "async-start": "calls=",
    "conditional": r"(?:branch_computations=\{|false_computation=)",
}


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion".
      shape: the shape as text; for a tuple the shapes of all its arrays.
      operands: the shapes of its operands, as text.
      times: how often it runs.
      waits: whether a GPU's host decides on it: a branch, or a loop without a known number of
      steps.
      line: its whole text.
      computation: the name of its computation.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    times: int
    waits: bool
    line: str
    computation: str


class GpuCost(NamedTuple):
    """The work of a program on a GPU.

    Attributes:
      kernels: the number of kernels launched.
      bytes: the bytes that these read and write.
      waits: conditionals and loops whose condition the host must read.
    """

    kernels: int
    bytes: int
    waits: int


class Sent(NamedTuple):
    """The traffic of all executions of a collective.

    Attributes:
      kind: such as "all-gather".
      elements: the elements at the larger end on a device.
      bytes: the bytes of these elements.
    """

    kind: str
    elements: int
    bytes: int


def instructions(text: str, *, with_fusions: bool = False) -> Iterator[Instruction]:
    """Yields the instructions that run: of the entry, of loops and calls, maybe of fusions."""
    computations = _computations(re.sub(r"/\*.*?\*/", "", text))
    entry = next(name for name, lines in computations.items() if lines[0].startswith("ENTRY"))
    calls = _CALLS | ({"fusion": "calls="} if with_fusions else {})
    return _run(computations, calls, entry, 1)


def tpu_cycles(text: str) -> int:
    """Sums the compiler's estimates of each instruction's cycles."""
    estimate = re.compile(r'"estimated_cycles":"(\d+)"')
    found = ((one.times, estimate.search(one.line)) for one in instructions(text))
    return sum(times * int(cycles[1]) for times, cycles in found if cycles)


def gpu_cost(text: str) -> GpuCost:
    """Counts a GPU's kernel launches, bytes and waits."""
    kernels = moved = waits = 0
    for one in instructions(text):
        if one.opcode in _KERNELS:
            kernels += one.times
            moved += one.times * sum(map(num_bytes, (one.shape, *one.operands)))
        waits += one.times * one.waits
    return GpuCost(kernels, moved, waits)


def elements_sent(text: str) -> dict[str, int]:
    """Counts, by kind of collective, the elements at the larger end on a device."""
    found: collections.Counter[str] = collections.Counter()
    for one in sent(text):
        found[one.kind] += one.elements
    return dict(found)


def sent(text: str) -> Iterator[Sent]:
    """Yields the traffic of each collective.

    On a TPU, collectives also occur within fusions: as a reduce-scatter, and as a collective that
    is sent in steps during products, where each step is a fusion with the same chain.
    """
    chains: set[str] = set()
    for one in instructions(text, with_fusions=True):
        kind, chain = _COLLECTIVE.fullmatch(one.opcode), _CHAIN.search(one.line)
        if kind is None or (chain and chain[0] in chains):
            continue
        if chain:
            chains.add(chain[0])
        is_scattered = one.computation.startswith("all-reduce-scatter")
        sizes = [one.times * size for size in _sizes_sent(one, kind[1])]
        yield Sent("reduce-scatter" if is_scattered else kind[1], *sizes)


def num_bytes(shape: str) -> int:
    """Counts the bytes of the arrays in the text of a shape."""
    return sum(size * max(bits // 8, 1) for size, bits in _arrays(shape))


def _sizes_sent(one: Instruction, kind: str) -> tuple[int, int]:
    """Counts elements and bytes."""
    # The start of a permutation also returns two numbers that its end needs.
    shape = one.shape.replace("u32[]", "") if kind == "collective-permute" else one.shape
    arrays = list(_arrays(shape))
    if one.opcode == f"{kind}-start" and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # operands come before results
    # Before a scatter, each device has the whole.
    times = group_size(one.line) if kind == "reduce-scatter" else 1
    elements = sum(size for size, _ in arrays)
    return times * elements, times * sum(size * max(bits // 8, 1) for size, bits in arrays)


def _arrays(shape: str) -> Iterator[tuple[int, int]]:
    """Yields the number of elements and the bits of each array."""
    for bits, dims in re.findall(r"\b(?:pred|[a-z]+(\d+))\w*\[([\d,]*)\]", shape):
        yield math.prod(int(d) for d in dims.split(",") if d), int(bits or 8)


def _computations(text: str) -> dict[str, list[str]]:
    """Splits the program into its computations, each with its header as the first line."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            lines = found.setdefault(head[1], [])
        lines.append(line)
    return found


def _run(
    computations: dict[str, list[str]], calls: dict[str, str], name: str, times: int
) -> Iterator[Instruction]:
    shapes: dict[str, str] = {}
    for line in computations[name][1:]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        shapes[match["name"]] = match["shape"]
        read = re.findall(r"%([\w.\-]+)", match["rest"].split("), ")[0])
        operands = tuple(shapes.get(operand, "") for operand in read)
        called = _called(line, match["opcode"], computations, calls)
        waits = match["opcode"] == "conditional" or (
            match["opcode"] == "while" and _KNOWN_STEPS.search(line) is None
        )
        yield Instruction(
            match["name"], match["opcode"], match["shape"], operands, times, waits, line, name
        )
        for body, number in called:
            if number:
                yield from _run(computations, calls, body, times * number)


def _called(
    line: str, opcode: str, computations: dict[str, list[str]], calls: dict[str, str]
) -> list[tuple[str, int]]:
    """Lists the computations that an instruction runs, and how often each runs."""
    if opcode == "while":
        return [(_named(line, "body="), _steps(line, computations))]
    attribute = calls.get(opcode)
    return [(_named(line, attribute), 1)] if attribute else []


def _named(line: str, attribute: str) -> str:
    found = re.search(attribute + r"%?([\w.\-]+)", line)
    if found is None:
        raise ValueError(f"expected {attribute} in {line}")
    return found[1]


def _steps(line: str, computations: dict[str, list[str]]) -> int:
    """Returns the number of a loop's steps, 0 if it is not known.

    If the compiler does not state it, it is the constant that the loop's counter is compared with,
    divided by what a step adds to the counter.
    """
    known = _KNOWN_STEPS.search(line)
    if known:
        return int(known[1])
    condition = computations[_named(line, "condition=")]
    fused = re.findall(r"calls=%?([\w.\-]+)", "\n".join(condition))
    lines = condition + [line for name in fused for line in computations[name]]
    end = max(_constants(lines).values(), default=0)
    return math.ceil(end / _increment(condition, computations[_named(line, "body=")]))


def _increment(condition: list[str], body: list[str]) -> int:
    """Returns what a loop's step adds to its counter, 1 if it is not known."""
    text = "\n".join(body)
    counter = re.search(r"get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    root = re.search(r"ROOT .* tuple\((.*?)\)", text)
    if counter is None or root is None:
        return 1
    name = root[1].split(", ")[int(counter[1])]
    added = re.search(re.escape(name) + r" = .* add\(\S+, (%[\w.\-]+)\)", text)
    return _constants(body).get(added[1], 1) if added else 1


def _constants(lines: list[str]) -> dict[str, int]:
    """Finds the whole numbers among a computation's constants."""
    found = re.findall(r"(%[\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    return {name: int(value) for name, value in found}
