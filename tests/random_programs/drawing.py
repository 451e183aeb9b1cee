"""Draw whole programs."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.numerics import enable_x64
from tests.random_programs.draft import Draft, Rule
from tests.random_programs.products import PRODUCTS
from tests.random_programs.program import (
    FREE,
    LEAST_OPERATIONS,
    MIXTURES,
    MOST_OPERATIONS,
    Program,
    Step,
)
from tests.random_programs.uses import DATA_STEPS, FREE_STEPS, WEIGHTS
from tests.random_programs.wrappers import WRAPPERS


def drawn(d: Draft, shares: dict[Any, float]) -> Any:
    total = sum(shares.values())
    return d.rng.choice(np.array([*shares], object), p=[s / total for s in shares.values()])


def wrapped(d: Draft) -> Step:
    """Draw a product with up to three wrappers around it."""
    step = drawn(d, PRODUCTS)(d)
    for probability in (0.35, 0.35, 0.2):
        if not d.chance(probability):
            break
        step = drawn(d, WRAPPERS)(d, step)
    return step


def any_data(d: Draft) -> Step:
    return drawn(d, DATA_STEPS)(d)


def free(d: Draft) -> Step:
    return drawn(d, FREE_STEPS)(d)


def any_weight(d: Draft) -> Step:
    return drawn(d, WEIGHTS)(d)


PARTS: dict[Rule, float] = {wrapped: 3.5, any_weight: 2.5, any_data: 2.5, free: 0.5}


def draw_program(seed: int) -> Program:
    """Return the program of a seed, which is always the same."""
    with enable_x64(MIXTURES[Draft(seed).mixture].has_float64):
        d = Draft(seed)
        target = d.integer(LEAST_OPERATIONS, MOST_OPERATIONS)
        while len(d.operations) < target:
            part = drawn(d, PARTS)
            d.add(part(d), "weight" if part is any_weight else "data")
        d.parameter(d.shape(2), FREE)  # one that nothing uses
        return d.program()
