"""Times compiled programs in turn, so that disturbances of the machine affect all of them."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import jax


class Case(NamedTuple):
    """A compiled program, and the arguments for timing it."""

    program: Any
    arguments: tuple[Any, ...]


def time_interleaved(cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call, after a warm-up call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(case.program(*case.arguments))
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")
