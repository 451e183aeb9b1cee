"""Lay out tables in plain text, as `explain` and `verify` print them."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, has_total: bool = False) -> list[str]:
    """Lay out rows in columns, with a line under the header and above a last row of totals.

    Args:
      rows: the header, then the other rows, all of the same length.
      has_total: whether the last row holds totals.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, [head, *lines]))
    return [head, rule, *lines[:-1], rule, lines[-1]] if has_total else [head, rule, *lines]
