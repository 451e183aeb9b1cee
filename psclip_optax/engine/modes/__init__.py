"""The modes: each gives Σ γ_k g_k / N of a batch, or of one slice of it after the other.

A mode is a file with a function of problem, parameters' leaves and samples, and has its place in
this register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psclip_optax.engine.modes import one_pass, stacked, two_pass
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples

MODES: dict[str, Callable[[Problem, Sequence[Any], Samples], Result]] = {
    "one_pass": one_pass.run,
    "two_pass": two_pass.run,
    "vmap": stacked.run,
}
