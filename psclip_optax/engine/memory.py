"""Estimate the memory of a plan from shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.engine.analysis.equations import without_debugging
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.plan import LeafPlan, Plans

# A number of samples that no other axis has as its size.
_MARK = 7919


# JAX raises these if it can differentiate a loss but not the loss under vmap, as with a custom_vjp
# within a custom_jvp.
NO_GRADIENT_OF_VMAP = (TypeError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Estimates the bytes that a batch needs, besides parameters and their gradients.

    The saved bytes are found by tracing the loss again, only when requested.

    Attributes:
      closed: the loss for one example.
      num_leaves: how many of its inputs are parameters.
      plans: the plans made for it.
      num_samples: how many samples the batch has.
      entering: the bytes of the sites' inputs. `saved` does not include them if the loss is
        rematerialised.
      kept: for each weight, the bytes that "one_pass" stores until the norms are known.
    """

    closed: core.ClosedJaxpr
    num_leaves: int
    plans: Plans
    num_samples: int
    entering: int
    kept: dict[int, int]

    @functools.cached_property
    def saved(self) -> int | None:
        """Sum the bytes that a plain gradient stores between its forward and its backward pass.

        None if JAX cannot differentiate the loss under vmap.
        """
        return _saved_bytes(self.closed, self.num_leaves, self.num_samples)

    @functools.cached_property
    def saved_rewritten(self) -> int | None:
        """Sum these bytes for the rewritten loss, which has fewer computed weights."""
        if self.plans.closed is self.closed:
            return self.saved
        return _saved_bytes(self.plans.closed, self.plans.num_leaves, self.num_samples)

    @property
    def of_one_pass(self) -> int:
        """Bound the bytes of one pass: a scan's loop frees nothing before it ends."""
        return max(self.saved_rewritten or 0, self.entering) + sum(self.kept.values())

    def of_fused(self, rest: Iterable[int]) -> int:
        """Sum the bytes of a pass that stores arrays for these weights only."""
        kept = [self.kept[weight] for weight in rest]
        return max(self.saved_rewritten or 0, self.entering if kept else 0) + sum(kept)


def estimated_bytes(
    closed: core.ClosedJaxpr, plans: Plans, leaves: Sequence[Any], num_samples: int
) -> Bytes:
    """Estimate bytes from shapes, as if XLA did not free, fuse or recompute anything.

    Args:
      closed: the loss for one example.
      plans: the plans made for it.
      leaves: the parameters.
      num_samples: how many samples the batch has.
    """
    sites = [site for plan in plans.all for site in plan.sites]
    # An array that is the input of several sites is stored once.
    entered = {atom: site for site in sites for atom in site.entering}
    return Bytes(
        closed,
        len(leaves),
        plans,
        num_samples,
        num_bytes(batched(site, aval(x), num_samples) for x, site in entered.items()),
        {
            plan.weight: kept_bytes_of(plan, shaped, num_samples)
            for plan, shaped in zip(plans.all, plans.avals, strict=True)
        },
    )


def _saved_bytes(closed: core.ClosedJaxpr, num_leaves: int, num_samples: int) -> int | None:
    # Under vmap a callback of jax.debug becomes one for each sample.
    run = core.jaxpr_as_fun(without_debugging(closed) if closed.effects else closed)
    inputs = [aval(variable) for variable in closed.jaxpr.invars]
    leaves = [meshes.shape_of_type(one) for one in inputs[:num_leaves]]
    batch = [meshes.shape_of_type(one, (_MARK, *one.shape)) for one in inputs[num_leaves:]]

    def pull_back(leaves: list[Any], batch: list[Any]) -> Any:
        losses = jax.vmap(lambda leaves, example: run(*leaves, *example)[0], in_axes=(None, 0))
        return jax.vjp(lambda leaves: losses(leaves, batch), leaves)[1]

    try:
        saved = jax.tree.leaves(jax.eval_shape(pull_back, leaves, batch))
    except NO_GRADIENT_OF_VMAP:
        return None
    of_samples = [array for array in saved if _MARK in array.shape]
    return num_bytes(of_samples) * num_samples // _MARK


def kept_bytes_of(plan: LeafPlan, shaped: Any, num_samples: int) -> int:
    if plan.is_direct:
        return num_samples * shaped.size * shaped.dtype.itemsize
    # A separable norm needs y = op(W, x) or y = op(D, x) as well.
    times = 2 if plan.norm == "separable" else 1
    return times * num_bytes(leaving(plan, num_samples).values())


def entering(plan: LeafPlan, num_samples: int) -> dict[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Return the shapes and dtypes of the inputs of each site, for a batch."""
    return {
        site.path: tuple(batched(site, aval(atom), num_samples) for atom in site.entering)
        for site in plan.sites
    }


def leaving(plan: LeafPlan, num_samples: int) -> dict[Any, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of the output of each site, for a batch."""
    return {site.path: batched(site, aval(site.leaving), num_samples) for site in plan.sites}


def batched(site: Site, shaped: Any, num_samples: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*site.scans, num_samples, *shaped.shape), shaped.dtype)


def num_bytes(arrays: Iterable[Any]) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
