"""Which cases of a wide table every run tests; the others are `slow`, for `.ci/run` and at night."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark as slow all cases but the quick ones."""
    cases, quick = list(cases), list(quick)
    assert all(case in cases for case in quick), f"not all of {quick} are among {cases}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def diagonal(*axes: Iterable[Any]) -> list[Any]:
    """Combine all values of the axes, and mark as slow all but those that meet each value once.

    Of the i-th value of the longest axis the quick case has the i-th of every other axis, which
    begins anew at its end.
    """
    values: list[Sequence[Any]] = [list(axis) for axis in axes]
    quick = {
        tuple(i % len(axis) for axis in values) for i in range(max(len(axis) for axis in values))
    }
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(values, indices, strict=True)),
            marks=[] if indices in quick else [pytest.mark.slow],
        )
        for indices in itertools.product(*(range(len(axis)) for axis in values))
    ]
