"""Register the routes: each computes norms of one weight's per-sample gradients.

Each route is a file with a subclass of `route.Route`, and is listed here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend import core

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes.convolution.route import CONVOLUTION
from psclip_optax.engine.routes.custom import CUSTOM
from psclip_optax.engine.routes.dense import DENSE
from psclip_optax.engine.routes.embedding import EMBEDDING
from psclip_optax.engine.routes.ragged import RAGGED
from psclip_optax.engine.routes.route import Route
from psclip_optax.engine.routes.tied import TIED

ROUTES: tuple[Route, ...] = (DENSE, CONVOLUTION, EMBEDDING, TIED, RAGGED, CUSTOM)


def route_of(eqn: core.JaxprEqn, operand: int) -> Route | None:
    """Find the route of an equation, given the index of the operand that is the weight."""
    if any(jnp.issubdtype(aval(v).dtype, jnp.complexfloating) for v in (*eqn.invars, *eqn.outvars)):
        return None  # the norms would be those of real parts
    return next((route for route in ROUTES if route.takes(eqn, operand)), None)


def route_of_all(sites: Sequence[Site]) -> Route | None:
    """Find the route of sites in one frame, whose gradients overlap."""
    return next((route for route in ROUTES if route.joins(sites)), None)
