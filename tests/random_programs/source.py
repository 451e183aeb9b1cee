"""Define the source of the command's programs."""

from __future__ import annotations

import jax

from tests.fuzz.command import Outcome, Source, shower
from tests.numerics import enable_x64
from tests.random_programs.checks import check, checks_of, reduced, reference_of, shortened
from tests.random_programs.drawing import draw_program
from tests.random_programs.program import CLEAR_EVERY, MIXTURES


def _checked(seed: int) -> Outcome:
    if seed % CLEAR_EVERY == 0:
        jax.clear_caches()
    return check(draw_program(seed), with_routes=True)


def _run_reference(seed: int) -> None:
    program = draw_program(seed)
    with enable_x64(MIXTURES[program.mixture].has_float64):
        for how in checks_of(seed):
            reference_of(program if how.jitted else shortened(program))


SOURCE = Source(draw_program, _checked, _run_reference, shower(draw_program, check, reduced))
