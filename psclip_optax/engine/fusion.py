"""Plan which groups are fused: clipped in the backward pass, as soon as cotangents are known."""

from __future__ import annotations

from typing import NamedTuple

from psclip_optax.engine.analysis.segments import Members, Obstacle, Segment, find_segment
from psclip_optax.engine.plan import LeafPlan, Plans, plan_segment, without_small
from psclip_optax.groups import Groups


class Fused(NamedTuple):
    """A group that is clipped in the backward pass, or one for each step of a scan.

    Attributes:
      columns: its columns of norms and scales; one for each step.
      segment: the part of the loss where it meets data.
      plans: the plans of the segment's weights.
    """

    columns: range
    segment: Segment
    plans: Plans


class Fusion(NamedTuple):
    """Says which groups are fused, and why the others are not.

    Attributes:
      fused: the fused groups.
      plans: the plans of all weights.
      obstacles: why the others are not fused, by the number of each of their weights.
    """

    fused: tuple[Fused, ...]
    plans: Plans
    obstacles: dict[int, str]

    @property
    def rest(self) -> list[LeafPlan]:
        """Return the plans of the weights of groups that are not fused."""
        plans = self.plans
        others = zip(plans.others, plans.computed, strict=True)
        leaves = [plan for plan in plans.leaves if plan.weight in self.obstacles]
        return [*leaves, *(plan for plan, one in others if one.leaves & self.obstacles.keys())]


def plan_fusion(plans: Plans, groups: Groups) -> Fusion:
    """Find the groups that may be fused.

    Args:
      plans: of the loss.
      groups: which parameters are clipped together.
    """
    if plans.closed.effects:  # an operation with a custom derivative may not have effects
        reasons = {plan.weight: "are of a loss with side effects" for plan in plans.leaves}
        return Fusion((), plans, reasons)
    columns: dict[range, set[int]] = {}
    for plan in plans.leaves:
        columns.setdefault(plans.columns(plan.weight, groups), set()).add(plan.weight)
    fused: list[Fused] = []
    obstacles: dict[int, str] = {}
    obstacles |= dict.fromkeys(columns.pop(range(0), ()), "have no entries")
    for own, leaves in columns.items():
        segment = find_segment(plans.closed, plans.usage, Members(frozenset(leaves), len(own) > 1))
        if isinstance(segment, Obstacle):
            obstacles |= dict.fromkeys(leaves, segment.reason)
        else:
            fused.append(Fused(own, segment, plan_segment(segment)))
    return Fusion(tuple(fused), without_small(plans, groups), obstacles)
