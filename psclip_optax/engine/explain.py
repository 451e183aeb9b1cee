"""Print a plan as a table with a row for each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from psclip_optax.engine import norms
from psclip_optax.engine.analysis.computed import compute
from psclip_optax.engine.flops import count_flops
from psclip_optax.engine.fusion import Fusion
from psclip_optax.engine.memory import entering, kept_bytes_of, leaving
from psclip_optax.engine.plan import LeafPlan, Plans
from psclip_optax.groups import Groups
from psclip_optax.table import table

# Maps fields of a row to columns that only some plans have.
_BY_GROUP = {"group": "group", "is_fused": "fused"}
_COLUMNS = ("parameter", "shape", "route", "sites", "extra FLOPs", "extra bytes", "reason")


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Describes how one parameter's per-sample gradients are clipped.

    Attributes:
      parameter: the path in the tree of parameters.
      shape: the dtype and shape.
      route: "direct" (its gradient is made for each sample by automatic differentiation), "dense",
        "conv", "embedding", "tied", "ragged" or "custom" (norms from each site's inputs and
        cotangents); "plain" if micro-batches are clipped.
      num_sites: how often the loss uses the parameter; the steps of a scan count once.
      extra_flops: floating-point operations for the norms of a batch, as XLA counts them.
      extra_bytes: the bytes stored for a batch until the norms are known, beyond a plain gradient;
        0 if the group is fused, because it is clipped during the backward pass.
      reason: why the route was chosen. For a fallback it has the operation and the user's line; if
        other groups are fused, it says why this one is not.
      group: when clipping by group, the parameter's column of norms and scales, from 0; a range of
        columns if each slice has one.
      is_fused: in mode "fused", whether the parameter's group is clipped within the backward pass.
    """

    parameter: str
    shape: str
    route: str
    num_sites: int
    extra_flops: float
    extra_bytes: int
    reason: str
    group: int | range | None = None
    is_fused: bool | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan that `explain` returns; printed as a table.

    Attributes:
      rows: a row for each parameter, in the order of the tree's leaves.
      mode: the mode of the call; "micro-batch" if micro-batches are clipped.
      num_samples: the batch size for which the plan was made.
      num_slices: for "two_pass" the number of slices of one pass; None for two passes over the
        whole batch.
      note: why "two_pass" cannot make two passes, if the loss prevents it.
    """

    rows: tuple[PlanRow, ...]
    mode: str
    num_samples: int
    num_slices: int | None
    note: str = ""

    def __str__(self) -> str:
        has = [
            name for name in _BY_GROUP if any(getattr(row, name) is not None for row in self.rows)
        ]
        columns = (_COLUMNS[0], *(_BY_GROUP[name] for name in has), *_COLUMNS[1:])
        cells = [columns, *(_cells(row, has) for row in self.rows)]
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


def _cells(row: PlanRow, by_group: Sequence[str]) -> tuple[str, ...]:
    numbers = _short(row.extra_flops), _short(row.extra_bytes)
    some = [_in_words(getattr(row, name)) for name in by_group]
    return (row.parameter, *some, row.shape, row.route, str(row.num_sites), *numbers, row.reason)


def _in_words(value: bool | int | range) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value[0]}-{value[-1]}"


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
    num_slices: int | None = 1,
    note: str = "",
    fusion: Fusion | None = None,
) -> Plan:
    """Make the rows of a plan, one for each parameter, from the plans of all weights."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    costs = _Costs(plans, num_samples, dtype)
    of_piece: dict[int, list[_Costed]] = {plan.weight: [(costs, plan)] for plan in plans.leaves}
    obstacles: dict[int, str | None] = {}
    if fusion is not None:
        of_piece |= _fused(fusion, num_samples, dtype)
        obstacles = {plan.weight: fusion.obstacles.get(plan.weight) for plan in plans.leaves}
    pieces: dict[int, list[int]] = {}
    for plan, leaf in zip(plans.leaves, plans.pieces.leaf_of, strict=True):
        pieces.setdefault(leaf, []).append(plan.weight)
    rows = [
        _row(
            [one for piece in pieces[i] for one in of_piece[piece]],
            jax.tree_util.keystr(path),
            jnp.asarray(leaf),
            None if fusion is None else [obstacles[piece] for piece in pieces[i]],
        )
        for i, (path, leaf) in enumerate(paths)
    ]
    return Plan(tuple(rows), mode, num_samples, num_slices, note)


def _fused(fusion: Fusion, num_samples: int, dtype: Any) -> dict[int, list[_Costed]]:
    """Find the plans of each fused parameter's views within its segment."""
    found: dict[int, list[_Costed]] = {}
    for one in fusion.fused:
        costs = _Costs(one.plans, num_samples, dtype, len(one.columns), is_kept=False)
        for parameter, plan in zip(one.segment.parameters, one.plans.leaves, strict=True):
            found.setdefault(parameter, []).append((costs, plan))
    return found


def explained_microbatches(params: Any, num_samples: int) -> Plan:
    """Explain a call that clips micro-batches: each has a plain gradient."""
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


def _row(
    pieces: Sequence[_Costed],
    path: str,
    leaf: jax.Array,
    obstacles: Sequence[str | None] | None,
) -> PlanRow:
    """Describe a parameter, from the plans of its pieces and the obstacles to fusing each."""
    through = [other for costs, plan in pieces for other in costs.through(plan)]
    plans = [*(plan for _, plan in pieces), *through]
    both = [(costs, one) for costs, plan in pieces for one in (plan, *costs.accounted_to(plan))]
    routes = dict.fromkeys(group.route.name for plan in plans for group in plan.groups)
    reasons = [reason for costs, plan in pieces for reason in costs.reasons(plan)]
    reasons += [f"not fused: {obstacle}" for obstacle in obstacles or () if obstacle]
    return PlanRow(
        parameter=path,
        shape=_described(leaf),
        route=", ".join(routes) or "direct",
        num_sites=sum(len(plan.sites) for plan in plans),
        extra_flops=sum(costs.flops(plan) for costs, plan in both),
        extra_bytes=sum(costs.kept_bytes(plan) for costs, plan in both),
        reason="; ".join(dict.fromkeys(reason for reason in reasons if reason)),
        is_fused=None if obstacles is None else not any(obstacles),
    )


class _Costs(NamedTuple):
    """Computes the costs of the plans of all weights, for a batch, in the steps of scans."""

    plans: Plans
    num_samples: int
    dtype: Any
    num_steps: int = 1
    is_kept: bool = True

    def through(self, plan: LeafPlan) -> list[LeafPlan]:
        return [other for other in self.plans.others if other.weight in plan.through]

    def accounted_to(self, plan: LeafPlan) -> list[LeafPlan]:
        """Find the computed weights whose first parameter is this one."""
        first = {weight: p.weight for p in reversed(self.plans.leaves) for weight in p.through}
        return [other for other in self.through(plan) if first[other.weight] == plan.weight]

    def reasons(self, plan: LeafPlan) -> list[str]:
        how = {"none": "joined to", "separable": "scales", "pulled back": "pulled back from"}
        computed = [f"{how[plan.norm]} what {_reason(other)}" for other in self.through(plan)]
        return [_reason(plan), *computed]

    def aval(self, plan: LeafPlan) -> Any:
        """Return the shape and dtype of a plan's weight, which varies over no axes of a mesh."""
        both = zip(self.plans.all, self.plans.avals, strict=True)
        kind = next(aval for one, aval in both if one.weight == plan.weight)
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype)

    def kept_bytes(self, plan: LeafPlan) -> int:
        if not self.is_kept:
            return 0
        return kept_bytes_of(plan, self.aval(plan), self.num_samples)

    def flops(self, plan: LeafPlan) -> float:
        return self.num_steps * self._flops_of_a_step(plan)

    def _flops_of_a_step(self, plan: LeafPlan) -> float:
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
        """Count the operations for one parameter's share in the norms, including its gradients."""
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


_Costed: TypeAlias = tuple[_Costs, LeafPlan]


def _reason(plan: LeafPlan) -> str:
    if plan.groups:
        names = dict.fromkeys(site.eqn.primitive.name for site in plan.sites)
        return "enters " + ", ".join(names)
    if not plan.is_used:
        return "" if plan.through else "does not reach the loss"
    if plan.escape is None:
        return "no larger than what its sites would store"
    source = f" at {plan.escape.source}" if plan.escape.source else ""
    return plan.escape.reason + source
