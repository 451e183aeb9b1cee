"""Explain a plan in words and numbers: a row for each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psclip_optax.engine import norms
from psclip_optax.engine.analysis.computed import compute
from psclip_optax.engine.flops import count_flops
from psclip_optax.engine.memory import entering, kept_bytes_of, leaving
from psclip_optax.engine.plan import LeafPlan, Plans
from psclip_optax.groups import Groups
from psclip_optax.table import table

_COLUMNS = ("parameter", "shape", "route", "sites", "extra FLOPs", "extra bytes", "reason")


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """The treatment of one parameter's per-sample gradients.

    Attributes:
      parameter: its path in the tree of parameters.
      shape: its dtype and shape.
      route: "direct" (its gradient is made for each sample by automatic differentiation), "dense",
        "conv", "embedding", "tied", "ragged" or "custom" (norms from what enters and leaves each
        site); "plain" where micro-batches are clipped.
      num_sites: how many times it enters the loss, the steps of a scan counted once.
      extra_flops: floating-point operations for the norms of a batch, as XLA counts them.
      extra_bytes: what a batch keeps until the norms are known, beyond a plain gradient.
      reason: why the route was taken; for a fallback the operation and the user's line.
      group: where gradients are clipped by group, the column of norms and scales that is of the
        parameter's, from 0 on; their range where it has one for each slice.
    """

    parameter: str
    shape: str
    route: str
    num_sites: int
    extra_flops: float
    extra_bytes: int
    reason: str
    group: int | range | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan that `explain` returns; printed as a table.

    Attributes:
      rows: one for each parameter, in the order of the tree's leaves.
      mode: which the call takes; "micro-batch" where that is what is clipped.
      num_samples: of the batch that it was made for.
      num_slices: of "two_pass": over how many slices of the batch one pass runs, None for two
        passes over all of it.
      note: why "two_pass" does not take two passes, where the loss keeps it from that.
    """

    rows: tuple[PlanRow, ...]
    mode: str
    num_samples: int
    num_slices: int | None
    note: str = ""

    def __str__(self) -> str:
        by_group = any(row.group is not None for row in self.rows)
        columns = (_COLUMNS[0], "group", *_COLUMNS[1:]) if by_group else _COLUMNS
        cells = [columns, *(_cells(row) for row in self.rows)]
        flops, extra = (
            _short(sum(getattr(row, name) for row in self.rows))
            for name in ("extra_flops", "extra_bytes")
        )
        cells.append(("total", *[""] * (len(columns) - 4), flops, extra, ""))
        title = f"mode {self.mode}{self._how()}, {self.num_samples} samples"
        notes = [self.note] if self.note else []
        return "\n".join([title, *notes, *table(cells, has_total=True)])

    def of_groups(self, groups: Groups) -> Plan:
        """Name each parameter's group."""
        if groups.of_leaf is None:
            return self
        rows = tuple(
            dataclasses.replace(row, group=columns[0] if len(columns) == 1 else columns)
            for row, columns in ((row, groups.columns(i)) for i, row in enumerate(self.rows))
        )
        return dataclasses.replace(self, rows=rows)

    def _how(self) -> str:
        if self.mode != "two_pass":
            return ""
        if self.num_slices is None:
            return " (two passes)"
        return " (one pass)" if self.num_slices == 1 else f" (one pass in {self.num_slices} slices)"


def _cells(row: PlanRow) -> tuple[str, ...]:
    numbers = _short(row.extra_flops), _short(row.extra_bytes)
    group = [] if row.group is None else [_described_group(row.group)]
    return (row.parameter, *group, row.shape, row.route, str(row.num_sites), *numbers, row.reason)


def _described_group(group: int | range) -> str:
    return str(group) if isinstance(group, int) else f"{group[0]}-{group[-1]}"


def _short(number: float) -> str:
    for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {prefix}"
    return f"{number:.0f}"


def explained(
    plans: Plans,
    params: Any,
    num_samples: int,
    dtype: Any,
    *,
    mode: str,
    num_slices: int | None,
    note: str,
) -> Plan:
    """Explain the plans of all weights to the caller, a row for each parameter."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    costs = _Costs(plans, num_samples, dtype)
    by_leaf: dict[int, list[LeafPlan]] = {}
    for plan, leaf in zip(plans.leaves, plans.pieces.leaf_of, strict=True):
        by_leaf.setdefault(leaf, []).append(plan)
    rows = [
        _row(costs, by_leaf[i], jax.tree_util.keystr(path), jnp.asarray(leaf))
        for i, (path, leaf) in enumerate(paths)
    ]
    return Plan(tuple(rows), mode, num_samples, num_slices, note)


def explained_microbatches(params: Any, num_samples: int) -> Plan:
    """Explain a call that clips micro-batches of so many samples: plain gradients of each."""
    rows = [
        PlanRow(
            parameter=jax.tree_util.keystr(path),
            shape=_described(leaf),
            route="plain",
            num_sites=0,
            extra_flops=2.0 * jnp.size(leaf),
            extra_bytes=0,
            reason="the norm of the gradient of the micro-batch's mean loss",
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return Plan(tuple(rows), "micro-batch", num_samples, 1)


def _described(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _row(costs: _Costs, pieces: Sequence[LeafPlan], path: str, leaf: jax.Array) -> PlanRow:
    through = [other for plan in pieces for other in costs.through(plan)]
    both = [*pieces, *(other for plan in pieces for other in costs.accounted_to(plan))]
    routes = dict.fromkeys(group.route.name for p in [*pieces, *through] for group in p.groups)
    reasons = [reason for plan in pieces for reason in costs.reasons(plan)]
    return PlanRow(
        parameter=path,
        shape=_described(leaf),
        route=", ".join(routes) or "direct",
        num_sites=sum(len(p.sites) for p in [*pieces, *through]),
        extra_flops=sum(map(costs.flops, both)),
        extra_bytes=sum(map(costs.kept_bytes, both)),
        reason="; ".join(dict.fromkeys(reason for reason in reasons if reason)),
    )


class _Costs(NamedTuple):
    """The costs of the plans of all weights, for so many samples."""

    plans: Plans
    num_samples: int
    dtype: Any

    def through(self, plan: LeafPlan) -> list[LeafPlan]:
        return [other for other in self.plans.others if other.weight in plan.through]

    def accounted_to(self, plan: LeafPlan) -> list[LeafPlan]:
        """Find the weights computed from a parameter that is the first of theirs."""
        first = {weight: p.weight for p in reversed(self.plans.leaves) for weight in p.through}
        return [other for other in self.through(plan) if first[other.weight] == plan.weight]

    def reasons(self, plan: LeafPlan) -> list[str]:
        how = {"none": "joined to", "separable": "scales", "pulled back": "pulled back from"}
        computed = [f"{how[plan.norm]} what {_reason(other)}" for other in self.through(plan)]
        return [_reason(plan), *computed]

    def aval(self, plan: LeafPlan) -> Any:
        """Return the shape and dtype of a plan's weight."""
        both = zip(self.plans.all, self.plans.avals, strict=True)
        return next(aval for one, aval in both if one.weight == plan.weight)

    def kept_bytes(self, plan: LeafPlan) -> int:
        return kept_bytes_of(plan, self.aval(plan), self.num_samples)

    def flops(self, plan: LeafPlan) -> float:
        if plan.norm == "pulled back":
            return self._flops_of_pulling_back(plan)
        aval = self.aval(plan)
        if not plan.groups:
            return 2.0 * self.num_samples * aval.size if plan.is_used else 0.0
        both = entering(plan, self.num_samples), leaving(plan, self.num_samples)

        def squared_norms(x: Any, dy: Any) -> Any:
            return norms.squared_norms(plan, x, dy, self.dtype)

        def gradients(x: Any, dy: Any) -> Any:
            weights = jnp.ones(self.num_samples, self.dtype)
            return norms.weighted_sum(plan, aval, x, dy, weights)

        if plan.is_radial:
            return count_flops(squared_norms, both)
        made = {
            "own": [squared_norms],
            "separable": [squared_norms, gradients],
            "none": [gradients],
        }[plan.norm]
        return sum(count_flops(function, both) for function in made)

    def _flops_of_pulling_back(self, plan: LeafPlan) -> float:
        """Count the operations for one parameter's share in the norms, its gradients included."""
        needed = [plan, *self.through(plan)]
        stacks = {
            one.weight: jax.ShapeDtypeStruct(
                (self.num_samples, *self.aval(one).shape), self.aval(one).dtype
            )
            for one in needed
            if one.is_direct
        }
        entered, left = {}, {}
        for one in needed:
            entered |= entering(one, self.num_samples)
            left |= leaving(one, self.num_samples)
        num_leaves = self.plans.num_leaves

        def squared_norms(parameters: Any, stacked: Any, x: Any, dy: Any) -> Any:
            values = compute(self.plans.closed, self.plans.computed)
            _, pull_back = jax.vjp(values, parameters)
            return norms.pulled_back_squared_norms(
                lambda cotangents: dict(enumerate(pull_back(cotangents)[0])),
                [(plan, self.aval(plan))],
                [(other, self.aval(other)) for other in self.plans.others],
                stacked,
                x,
                dy,
                self.dtype,
            )

        parameters = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.plans.avals[:num_leaves]
        ]
        return count_flops(squared_norms, (parameters, stacks, entered, left))


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
