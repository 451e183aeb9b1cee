"""Print estimates: names beside values, and values with their intervals."""

from __future__ import annotations

import math


def table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def with_interval(value: float, lower: float, upper: float, confidence: float | None = None) -> str:
    share = "" if confidence is None else f"{100 * confidence:.4g}%: "
    value_, lower_, upper_ = ("∞" if math.isinf(x) else f"{x:.3g}" for x in (value, lower, upper))
    return f"{value_} ({share}{lower_} to {upper_})"
