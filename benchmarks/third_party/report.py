"""Renders the results on the models of other libraries."""

from __future__ import annotations

import collections
from typing import Any

from benchmarks.third_party.common import MODES
from benchmarks.third_party.libraries import NOT_TRIED

HEAD = """| library | JAX | model | parameters | routes | dtype | norms | gradients | |
|---|---|---|---|---|---|---|---|---|
"""


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts libraries and models, and the models by their result."""
    rows = [row for record in records for row in record["rows"]]
    return {
        "libraries": len({record["library"] for record in records if record["rows"]}),
        "models": len(rows),
        "outcomes": dict(collections.Counter(row["outcome"] for row in rows)),
        "largest_error": {
            dtype: max(
                (error for row in rows if row["dtype"] == dtype for error in errors_of(row)),
                default=0.0,
            )
            for dtype in ("float64", "float32")
        },
    }


def errors_of(row: dict[str, Any]) -> list[float]:
    if row["outcome"] == "failed":
        return []
    return [error for mode in MODES for error in row["errors"][mode].values()]


def to_markdown(records: list[dict[str, Any]]) -> str:
    lines = [line_of(record, row) for record in records for row in record["rows"]]
    lines += [
        f"| {record['library']} | – | – | – | – | – | – | – | not tried: {record['failed']} |"
        for record in records
        if "failed" in record
    ]
    return HEAD + "\n".join(lines) + "\n"


def exceptions(records: list[dict[str, Any]]) -> str:
    """Writes a bullet for each library that is not the newest or cannot be installed."""
    older = [
        f"- {record['library']} {record['version']} with JAX {record['jax']}: {record['why']}.\n"
        for record in records
        if "why" in record and "version" in record
    ]
    absent = [
        f"- {library} is not among them: {reason}.\n" for library, reason in NOT_TRIED.items()
    ]
    return "".join([*older, *absent])


def line_of(record: dict[str, Any], row: dict[str, Any]) -> str:
    cells = [
        f"{record['library']} {record['version']}",
        record["jax"],
        row["model"],
        f"{row['parameters']:,}" if "parameters" in row else "–",
        routes(row.get("share_of_routes", {})),
        row.get("dtype", "–"),
        largest(row, "norms"),
        largest(row, "gradients"),
        row["outcome"] if row["outcome"] != "failed" else failure(row),
    ]
    return "| " + " | ".join(cells) + " |"


def routes(shares: dict[str, float]) -> str:
    return ", ".join(f"{route} {share:.0%}" for route, share in shares.items()) or "–"


def largest(row: dict[str, Any], what: str) -> str:
    """Returns the larger error of the two modes."""
    if row["outcome"] == "failed":
        return "–"
    return f"{max(row['errors'][mode][what] for mode in MODES):.0e}"


def failure(row: dict[str, Any]) -> str:
    said = row["message"].replace("|", "\\|")
    return f"{row['stage']} fails: {said}"
