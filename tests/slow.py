"""Mark rows of large tables as `slow`, for `.ci/run` and nightly runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark all cases except the quick ones as slow."""
    cases, quick = list(cases), list(quick)
    assert all(case in cases for case in quick), f"not all of {quick} are among {cases}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def diagonal(*axes: Iterable[Any], every: int = 1) -> list[Any]:
    """Combine all values of the axes; mark all but a set that covers each value as slow.

    The quick case of the i-th value of the longest axis has the i-th value of every other axis,
    cyclically. With `every` only each such value of the longest axis has a quick case.
    """
    values: list[Sequence[Any]] = [list(axis) for axis in axes]
    longest = max(map(len, values))
    quick = {
        tuple(i * every if len(axis) == longest else i % len(axis) for axis in values)
        for i in range(-(-longest // every))
    }
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(values, indices, strict=True)),
            marks=[] if indices in quick else [pytest.mark.slow],
        )
        for indices in itertools.product(*(range(len(axis)) for axis in values))
    ]
