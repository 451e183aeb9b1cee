"""Searches a lattice of learning rates and thresholds, which extends towards the best point.

A fixed grid has edges, and a winner at an edge may not be the optimum. A lattice has no edges; each
method has the same maximum number of trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

# The learning rate and, if the method has one, the threshold, in quarters of a coarse step.
Point: TypeAlias = tuple[int, ...]
COARSE = 4
AXES = ("learning rate", "threshold")


def rate(index: int) -> float:
    """Returns a learning rate; a coarse step doubles it."""
    return rounded(0.01 * 2 ** (index / COARSE))


def threshold(index: int) -> float:
    """Returns a threshold; two coarse steps are a decade."""
    return rounded(10 ** (index / (2 * COARSE)))


def rounded(value: float) -> float:
    """Rounds a number, so that digests of runs agree across platforms."""
    return float(f"{value:.6g}")


def search(start: Point, trials: int, score: Callable[[Point], float]) -> dict[Point, float]:
    """Scores the start and then, one at a time, new neighbours of the best point so far.

    When all neighbours have a score, the step is halved, down to a quarter of a coarse step.

    Args:
      start: the first point.
      trials: the largest number of points.
      score: point → score; larger is better.

    Returns:
      The points with their scores, in the order of the trials.
    """
    found = {start: score(start)}
    step = COARSE
    while step and len(found) < trials:
        new = next((p for p in neighbours(best(found), step) if p not in found), None)
        if new is None:
            step //= 2
        else:
            found[new] = score(new)
    return found


def best(found: dict[Point, float]) -> Point:
    """Returns the point with the best score, the lowest point of a tie."""
    return min(found, key=lambda point: (-found[point], point))


def neighbours(point: Point, step: int) -> Iterator[Point]:
    for axis in range(len(point)):
        for way in (step, -step):
            yield (*point[:axis], point[axis] + way, *point[axis + 1 :])


def open_sides(found: dict[Point, float]) -> list[str]:
    """Lists the directions from the best point in which no point was tried."""
    here = best(found)
    return [
        f"{'larger' if way > 0 else 'smaller'} {AXES[axis]}"
        for axis in range(len(here))
        for way in (1, -1)
        if not any(_is_beyond(point, here, axis, way) for point in found)
    ]


def _is_beyond(point: Point, here: Point, axis: int, way: int) -> bool:
    """Checks whether a point differs along this axis only, in this direction."""
    others = [(a, b) for i, (a, b) in enumerate(zip(point, here, strict=True)) if i != axis]
    return all(a == b for a, b in others) and way * (point[axis] - here[axis]) > 0
