"""The modes: each gives Σ γ_k g_k / N of a batch, or of one slice of it after the other.

A mode is a file with a subclass of `mode.Mode`, and has its place in this register.
"""

from __future__ import annotations

from psclip_optax.engine.modes.fused import FUSED
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.one_pass import ONE_PASS
from psclip_optax.engine.modes.stacked import STACKED
from psclip_optax.engine.modes.two_pass import TWO_PASS

MODES: dict[str, Mode] = {mode.name: mode for mode in (FUSED, ONE_PASS, TWO_PASS, STACKED)}
