"""What a plan is in words and numbers: a row for each parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax.bookkeeping import contract
from psclip_optax.bookkeeping.plan import LeafPlan
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


def explained(
    plans: Sequence[LeafPlan], params: Any, num_samples: int, mode: str, dtype: Any
) -> Plan:
    """The plan of a call, from what was planned for each leaf of its parameters."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    rows = [
        _row(plan, jax.tree_util.keystr(path), jnp.asarray(leaf), num_samples, dtype)
        for plan, (path, leaf) in zip(plans, paths, strict=True)
    ]
    return Plan(tuple(rows), mode, num_samples)


def kept_bytes(plan: LeafPlan, leaf: jax.Array, num_samples: int) -> int:
    """What "one_pass" keeps of one parameter until the norms are known."""
    if not plan.groups:
        return num_samples * leaf.size * leaf.dtype.itemsize
    leaving = _leaving(plan, num_samples).values()
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in leaving)


def _row(plan: LeafPlan, path: str, leaf: jax.Array, num_samples: int, dtype: Any) -> PlanRow:
    routes = dict.fromkeys(group.route for group in plan.groups)
    return PlanRow(
        parameter=path,
        shape=f"{leaf.dtype}{list(leaf.shape)}",
        route=", ".join(routes) or "direct",
        num_sites=len(plan.sites),
        extra_flops=_flops(plan, num_samples, dtype) if routes else 2.0 * num_samples * leaf.size,
        extra_bytes=kept_bytes(plan, leaf, num_samples),
        reason=_reason(plan),
    )


def _reason(plan: LeafPlan) -> str:
    if plan.groups:
        names = dict.fromkeys(site.eqn.primitive.name for site in plan.sites)
        return "enters " + ", ".join(names)
    if plan.escape is None:
        return "no larger than what leaves its sites"
    source = f" at {plan.escape.source}" if plan.escape.source else ""
    return plan.escape.reason + source


def _batched(site: Site, shaped: Any, num_samples: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_samples, *site.scans, *shaped.shape), shaped.dtype)


def _leaving(plan: LeafPlan, num_samples: int) -> dict[Any, jax.ShapeDtypeStruct]:
    return {site.path: _batched(site, site.y_aval, num_samples) for site in plan.sites}


def _flops(plan: LeafPlan, num_samples: int, dtype: Any) -> float:
    entering = {
        site.path: _batched(site, aval(site.eqn.invars[1 - site.operand]), num_samples)
        for site in plan.sites
    }
    norms = jax.jit(lambda x, dy: contract.squared_norms(plan, x, dy, dtype))
    analysis: Any = norms.lower(entering, _leaving(plan, num_samples)).cost_analysis()
    return float(analysis["flops"])
