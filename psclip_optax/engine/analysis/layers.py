"""Find the scans that take weights layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.extend import core

from psclip_optax.engine.analysis.equations import scan_counts
from psclip_optax.engine.analysis.linearity import has_gradient
from psclip_optax.engine.analysis.views import Path, is_view, run_equation


def layers_of_scans(
    jaxpr: core.Jaxpr, weights: Mapping[core.Var, jax.Array]
) -> dict[tuple[Path, int], jax.Array]:
    """Compute the weights, or views of them, of which scans take a slice in each step.

    Scans within other equations are left out, as is what is no longer differentiable.

    Args:
      jaxpr: the jaxpr.
      weights: the values of its variables that are weights.

    Returns:
      The arrays, by the scan's path and the index among its xs.
    """
    views, found = dict(weights), {}
    for at, eqn in enumerate(jaxpr.eqns):
        read = [views.get(v) if isinstance(v, core.Var) else None for v in eqn.invars]
        if is_view(eqn) and read[0] is not None and all(map(has_gradient, eqn.outvars)):
            views.update(zip(eqn.outvars, run_equation(eqn, read), strict=True))
        elif eqn.primitive.name == "scan":
            xs = enumerate(read[sum(scan_counts(eqn)) :])
            found |= {((at,), place): one for place, one in xs if one is not None}
    return found
