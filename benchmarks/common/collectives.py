"""Reads the collectives of a compiled program from its text."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

_OPERATION = re.compile(
    r" = (?P<shapes>.*?) (?P<name>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter|collective-broadcast)(-start)?\("
)
_MOVING = ("all-gather", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """An operation in which all devices take part.

    Attributes:
      name: the operation, such as "all-reduce".
      num_elements: the elements of its larger side on each device, for each execution.
      num_bytes: the bytes of these elements.
      times: how often it runs.
      line: its line in the program.
    """

    name: str
    num_elements: int
    num_bytes: int
    times: int
    line: str


def collectives(text: str) -> list[Collective]:
    """Lists the collectives of a program that run if no sample is dropped.

    The body of a loop without a known number of steps, and all branches but the first, run only if
    there are samples to drop.
    """
    times = _times_run(text)
    found = []
    for computation, lines in _computations(text).items():
        for line in lines if times(computation) else []:
            operation = _OPERATION.search(line)
            if operation:
                sizes = _sizes(operation, line)
                found.append(Collective(operation["name"], *sizes, times(computation), line))
    return found


def num_elements(text: str) -> int:
    """Counts the elements that a program sends between devices if no sample is dropped."""
    return sum(one.num_elements * one.times for one in collectives(text))


def num_bytes(text: str) -> int:
    """Counts the bytes that a program sends between devices if no sample is dropped."""
    return sum(one.num_bytes * one.times for one in collectives(text))


def moving_operations(text: str) -> list[str]:
    """Lists the operations that move samples between devices if no sample is dropped.

    Sums over devices move none, nor does the count of a mask's samples, which gives positions.
    """
    return [
        one.line for one in collectives(text) if one.name in _MOVING and "cumsum" not in one.line
    ]


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            words = line.split()
            name = words[1] if words[0] == "ENTRY" else words[0]
        found.setdefault(name, []).append(line.strip())
    return found


def _times_run(text: str) -> Callable[[str], int]:
    """Maps the name of each computation to how often it runs."""
    calls: dict[str, list[tuple[str, int]]] = {}
    for caller, lines in _computations(text).items():
        for line in lines:
            for called, number in _calls(line):
                calls.setdefault(called, []).append((caller, number))

    @functools.cache
    def times(name: str) -> int:
        if name not in calls:
            return 1
        return sum(number * times(caller) for caller, number in calls[name])

    return times


def _calls(line: str) -> list[tuple[str, int]]:
    found = [(name, 1) for name in re.findall(r"(?:to_apply|calls)=([\w.%-]+)", line)]
    known = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
    steps = int(known[1]) if known else 0
    found += [(name, steps) for name in re.findall(r" while\(.* body=([\w.%-]+)", line)]
    found += [(name, 0) for name in re.findall(r"true_computation=([\w.%-]+)", line)]
    found += [(name, 1) for name in re.findall(r"false_computation=([\w.%-]+)", line)]
    for branches in re.findall(r"branch_computations={([^}]*)}", line):
        taken, *others = (name.strip() for name in branches.split(","))
        found += [(taken, 1), *((name, 0) for name in others)]
    return found


def _sizes(operation: re.Match[str], line: str) -> tuple[int, int]:
    """Returns elements and bytes."""
    arrays = re.findall(r"(?:pred|[a-z]+(\d+))\w*\[([\d,]*)\]", operation["shapes"])
    sizes = [math.prod(int(d) for d in shape.split(",") if d) for _, shape in arrays]
    widths = [int(bits or 8) // 8 for bits, _ in arrays]
    # Before a scatter, each device has the whole array.
    times = group_size(line) if operation["name"] == "reduce-scatter" else 1
    return times * sum(sizes), times * sum(s * w for s, w in zip(sizes, widths, strict=True))


def group_size(line: str) -> int:
    """Reads the number of devices in a collective's group."""
    listed = re.search(r"replica_groups={{([\d,]+)}", line)
    if listed:
        return len(listed[1].split(","))
    folded = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if folded:
        return int(folded[1])
    of_mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if of_mesh is None:
        raise ValueError(f"no groups of devices in {line}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", of_mesh[2]))
