"""Register the modes: each computes Σ γ_k g_k / N of a batch, at once or slice by slice.

Each mode is a file with a subclass of `mode.Mode`, and is listed here.
"""

from __future__ import annotations

from psclip_optax.engine.modes.fused import FUSED
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.one_pass import ONE_PASS
from psclip_optax.engine.modes.stacked import STACKED
from psclip_optax.engine.modes.two_pass import TWO_PASS

MODES: dict[str, Mode] = {mode.name: mode for mode in (FUSED, ONE_PASS, TWO_PASS, STACKED)}
