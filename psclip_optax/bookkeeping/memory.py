"""What a plan holds in memory, by the shapes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from psclip_optax.bookkeeping.plan import LeafPlan, Plans
from psclip_optax.bookkeeping.sites import Site
from psclip_optax.bookkeeping.views import aval

# A number of samples that is the size of no other axis.
_MARK = 7919


def kept_bytes(plans: Plans, leaves: Sequence[jax.Array], num_samples: int) -> int:
    """What "one_pass" keeps of a batch until the norms are known, beyond a plain gradient."""
    kinds = [*leaves, *(one.aval for one in plans.computed)]
    both = zip(plans.all, kinds, strict=True)
    return sum(kept_bytes_of(plan, kind, num_samples) for plan, kind in both)


def saved_bytes(closed: core.ClosedJaxpr, num_leaves: int, num_samples: int) -> int:
    """What a plain gradient of a batch saves between its forward and its backward pass.

    Args:
      closed: the loss for one example.
      num_leaves: how many of its inputs are parameters.
      num_samples: in the batch.
    """
    run = core.jaxpr_as_fun(closed)
    kinds = [(aval(variable).shape, aval(variable).dtype) for variable in closed.jaxpr.invars]
    leaves = [jax.ShapeDtypeStruct(*kind) for kind in kinds[:num_leaves]]
    batch = [jax.ShapeDtypeStruct((_MARK, *shape), dtype) for shape, dtype in kinds[num_leaves:]]

    def pull_back(leaves: list[Any], batch: list[Any]) -> Any:
        losses = jax.vmap(lambda leaves, example: run(*leaves, *example)[0], in_axes=(None, 0))
        return jax.vjp(lambda leaves: losses(leaves, batch), leaves)[1]

    saved = jax.tree.leaves(jax.eval_shape(pull_back, leaves, batch))
    of_samples = [array for array in saved if _MARK in array.shape]
    return _bytes(of_samples) * num_samples // _MARK


def held_bytes(plans: Plans, leaves: Sequence[Any], num_samples: int) -> int:
    """What "one_pass" holds of a batch as the norms are known: what is kept and what entered."""
    sites = [site for plan in plans.all for site in plan.sites]
    # What enters several sites is held once.
    entered = {site.eqn.invars[1 - site.operand]: site for site in sites}
    inputs = [batched(site, aval(x), num_samples) for x, site in entered.items()]
    return kept_bytes(plans, leaves, num_samples) + _bytes(inputs)


def kept_bytes_of(plan: LeafPlan, kind: Any, num_samples: int) -> int:
    if plan.is_direct:
        return num_samples * kind.size * kind.dtype.itemsize
    return _bytes(leaving(plan, num_samples).values())


def entering(plan: LeafPlan, num_samples: int) -> dict[Any, jax.ShapeDtypeStruct]:
    """What enters each site of a batch."""
    return {
        site.path: batched(site, aval(site.eqn.invars[1 - site.operand]), num_samples)
        for site in plan.sites
    }


def leaving(plan: LeafPlan, num_samples: int) -> dict[Any, jax.ShapeDtypeStruct]:
    """What leaves each site of a batch."""
    return {site.path: batched(site, site.y_aval, num_samples) for site in plan.sites}


def batched(site: Site, shaped: Any, num_samples: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*site.scans, num_samples, *shaped.shape), shaped.dtype)


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
