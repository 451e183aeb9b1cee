"""What a plan is in words and numbers: a row for each parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.bookkeeping import contract
from psclip_optax.bookkeeping.plan import LeafPlan, Plans
from psclip_optax.bookkeeping.sites import Site
from psclip_optax.bookkeeping.views import aval

_COLUMNS = ("parameter", "shape", "route", "sites", "extra FLOPs", "extra bytes", "reason")


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """How one parameter's per-sample gradients are treated.

    Attributes:
      parameter: its path in the tree of parameters.
      shape: its dtype and shape.
      route: "direct" (its gradient is made for each sample by automatic differentiation), "dense",
        "conv", "embedding" or "tied" (norms from what enters and leaves each site).
      num_sites: how many times it enters the loss, the steps of a scan counted once.
      extra_flops: floating-point operations for the norms of a batch, as XLA counts them.
      extra_bytes: what a batch keeps until the norms are known, beyond a plain gradient.
      reason: why the route was taken; for a fallback the operation and the user's line.
    """

    parameter: str
    shape: str
    route: str
    num_sites: int
    extra_flops: float
    extra_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `explain` returns; printed as a table.

    Attributes:
      rows: one for each parameter, in the order of the tree's leaves.
      mode: which the call takes.
      num_samples: of the batch that it was made for.
    """

    rows: tuple[PlanRow, ...]
    mode: str
    num_samples: int

    def __str__(self) -> str:
        cells = [_COLUMNS, *(_cells(row) for row in self.rows)]
        flops, extra = (
            _short(sum(getattr(row, name) for row in self.rows))
            for name in ("extra_flops", "extra_bytes")
        )
        cells.append(("total", "", "", "", flops, extra, ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        rule = "-" * max(map(len, lines))
        title = f"mode {self.mode}, {self.num_samples} samples"
        return "\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _cells(row: PlanRow) -> tuple[str, ...]:
    numbers = _short(row.extra_flops), _short(row.extra_bytes)
    return (row.parameter, row.shape, row.route, str(row.num_sites), *numbers, row.reason)


def _short(number: float) -> str:
    for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {prefix}"
    return f"{number:.0f}"


def explained(plans: Plans, params: Any, num_samples: int, mode: str, dtype: Any) -> Plan:
    """The plan of a call, from what was planned for each weight."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    rows = [
        _row(plans, plan, jax.tree_util.keystr(path), jnp.asarray(leaf), num_samples, dtype)
        for plan, (path, leaf) in zip(plans.leaves, paths, strict=True)
    ]
    return Plan(tuple(rows), mode, num_samples)


def kept_bytes(plans: Plans, leaves: Sequence[jax.Array], num_samples: int) -> int:
    """What "one_pass" keeps of a batch until the norms are known."""
    kinds = [*leaves, *(one.aval for one in plans.computed)]
    both = zip(plans.all, kinds, strict=True)
    return sum(_kept_bytes(plan, kind, num_samples) for plan, kind in both)


def plain_bytes(closed: core.ClosedJaxpr, leaves: Sequence[jax.Array], num_samples: int) -> int:
    """About what a plain gradient of a batch takes: parameters, their gradients, what is saved.

    Args:
      closed: the loss for one example.
      leaves: the parameters.
      num_samples: in the batch.
    """
    loss = core.jaxpr_as_fun(closed)
    example = [
        jax.ShapeDtypeStruct(aval(variable).shape, aval(variable).dtype)
        for variable in closed.jaxpr.invars[len(leaves) :]
    ]

    def pull_back(leaves: list[Any], example: list[Any]) -> Any:
        return jax.vjp(lambda leaves: loss(*leaves, *example)[0], leaves)[1]

    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    saved = jax.tree.leaves(jax.eval_shape(pull_back, list(leaves), example))
    # Parameters are saved as well, once for all samples.
    of_one = sum(array.size * array.dtype.itemsize for array in saved) - parameters
    return 2 * parameters + num_samples * max(of_one, 0)


def _kept_bytes(plan: LeafPlan, kind: Any, num_samples: int) -> int:
    if plan.is_direct:
        return num_samples * kind.size * kind.dtype.itemsize
    leaving = _leaving(plan, num_samples).values()
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in leaving)


def _row(
    plans: Plans, plan: LeafPlan, path: str, leaf: jax.Array, num_samples: int, dtype: Any
) -> PlanRow:
    # What is computed from several parameters is accounted to the first.
    first = {weight: p.weight for p in reversed(plans.leaves) for weight in p.through}
    computed = dict(zip([p.weight for p in plans.others], plans.computed, strict=True))
    through = [other for other in plans.others if other.weight in plan.through]
    own = [other for other in through if first[other.weight] == plan.weight]
    kinds = {plan.weight: leaf} | {weight: one.aval for weight, one in computed.items()}
    both = [plan, *own]
    routes = dict.fromkeys(group.route for p in [plan, *through] for group in p.groups)
    return PlanRow(
        parameter=path,
        shape=f"{leaf.dtype}{list(leaf.shape)}",
        route=", ".join(routes) or "direct",
        num_sites=sum(len(p.sites) for p in [plan, *through]),
        extra_flops=sum(_flops(p, kinds[p.weight], num_samples, dtype) for p in both),
        extra_bytes=sum(_kept_bytes(p, kinds[p.weight], num_samples) for p in both),
        reason="; ".join([_reason(plan), *(_reason_computed(plan, p) for p in through)]).strip(
            "; "
        ),
    )


def _reason_computed(plan: LeafPlan, other: LeafPlan) -> str:
    how = {"none": "joined to", "separable": "scales", "pulled back": "pulled back from"}
    return f"{how[plan.norm]} what {_reason(other)}"


def _reason(plan: LeafPlan) -> str:
    if plan.groups:
        names = dict.fromkeys(site.eqn.primitive.name for site in plan.sites)
        return "enters " + ", ".join(names)
    if not plan.is_used:
        return "" if plan.through else "does not reach the loss"
    if plan.escape is None:
        return "no larger than what leaves its sites"
    source = f" at {plan.escape.source}" if plan.escape.source else ""
    return plan.escape.reason + source


def _batched(site: Site, shaped: Any, num_samples: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*site.scans, num_samples, *shaped.shape), shaped.dtype)


def _leaving(plan: LeafPlan, num_samples: int) -> dict[Any, jax.ShapeDtypeStruct]:
    return {site.path: _batched(site, site.y_aval, num_samples) for site in plan.sites}


def _flops(plan: LeafPlan, kind: Any, num_samples: int, dtype: Any) -> float:
    if not plan.groups:
        return 2.0 * num_samples * kind.size if plan.is_used else 0.0
    entering = {
        site.path: _batched(site, aval(site.eqn.invars[1 - site.operand]), num_samples)
        for site in plan.sites
    }
    norms = jax.jit(lambda x, dy: contract.squared_norms(plan, x, dy, dtype))
    analysis: Any = norms.lower(entering, _leaving(plan, num_samples)).cost_analysis()
    return float(analysis["flops"])
