"""Define a traced loss with the properties that all modes need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import core

from psclip_optax.clipping import OnNonfinite
from psclip_optax.engine.analysis.linearity import unproven_rule
from psclip_optax.engine.fusion import Fusion
from psclip_optax.engine.plan import Plans
from psclip_optax.groups import Groups


class Problem(NamedTuple):
    """A traced loss, and the plans for its parameters' gradients.

    Attributes:
      closed: the loss for one example, from the parameters' and the example's leaves.
      plans: the plans for parameters and for weights computed from them.
      groups: which parameters are clipped together.
      on_nonfinite: "drop" or "propagate".
      dtype: the dtype of norms and scales.
      axis_name: the mesh axes over which the batch is sharded, under shard_map.
      spmd_axis_name: the name of the axis of samples, for constraints inside the loss.
      may_be_padded: whether some samples may be masked.
      fusion: which groups may be clipped in the backward pass; None if that is not requested.
      norm_precision: the precision of the products for norms; None for JAX's default.
      num_devices: the number of devices that may share the samples; 1 if none can.
    """

    closed: core.ClosedJaxpr
    plans: Plans
    groups: Groups
    on_nonfinite: OnNonfinite
    dtype: Any
    axis_name: Any
    spmd_axis_name: Any
    may_be_padded: bool
    fusion: Fusion | None
    norm_precision: lax.Precision | None
    num_devices: int

    @property
    def has_convolutions(self) -> bool:
        sites = (site for plan in self.plans.all for site in plan.sites)
        return any(site.route.is_slow_in_loops for site in sites)

    def part(self, of_samples: Any, weight: int) -> Any:
        """Select the columns of a weight's group, or groups, from an array [n] or [n, groups]."""
        if self.groups.of_leaf is None:
            return of_samples
        columns = self.plans.columns(weight, self.groups)
        return (
            of_samples[:, columns[0]]
            if len(columns) == 1
            else of_samples[:, np.array(columns, int)]
        )

    def unproven_rule(self) -> core.JaxprEqn | None:
        """Find an equation for which linearity in the losses' cotangents is not proven."""
        jaxpr, num_leaves = self.plans.closed.jaxpr, self.plans.num_leaves
        varied = [i < num_leaves for i in range(len(jaxpr.invars))]
        return unproven_rule(jaxpr, varied, [i == 0 for i in range(len(jaxpr.outvars))])

    def making_norms(self) -> contextlib.AbstractContextManager[Any]:
        """Set the precision of the products for norms while they are traced."""
        if self.norm_precision is None:
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.norm_precision.name.lower())

    def over_samples(
        self, function: Callable[..., Any], in_axes: Any = (None, None, 0), out_axes: Any = 0
    ) -> Callable[..., Any]:
        name = self.spmd_axis_name
        return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, spmd_axis_name=name)


def outs_of(closed: core.ClosedJaxpr) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
    run = core.jaxpr_as_fun(closed)

    def outs(leaves: Sequence[Any], _: None, example: list[jax.Array]) -> Any:
        outs = run(*leaves, *example)
        return outs[0], outs

    return outs
