"""Makes axes look alike in all figures."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

TICKS = (0.01, 0.1, 0.2, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def show_ticks(axis: Any, limits: tuple[float, float]) -> None:
    shown = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    # In a wide range the labels of minor ticks would overlap.
    width = limits[1] / limits[0]
    if width > 1000:
        shown = [tick for tick in shown if tick in (0.01, 0.1, 1, 10, 100, 1000)]
    elif width > 30:
        shown = [tick for tick in shown if tick not in (0.7, 1.2, 1.5, 3)]
    axis.set_ticks(shown)
    axis.set_major_formatter("{x:g}")
    axis.set_ticks([], minor=True)


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
