"""Prints, writes and reads results."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from psclip_optax.training.output.files import to_json

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def publish(
    out: pathlib.Path,
    name: str,
    result: dict[str, Any],
    tables: list[Table],
    figure: Figure,
    width: int,
) -> None:
    """Prints the tables at full width, and writes the result and the figure."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    console.print(*tables)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(to_json(result, indent=2) + "\n")
    figure.savefig(out / f"{name}.png", dpi=160)


def markdown_table(rows: list[list[str]]) -> str:
    """Lays out rows; the first is the header."""
    header, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *body))


def load(path: pathlib.Path, settings: dict[str, Any], rerun: bool) -> list[dict[str, Any]]:
    """Reads the rows of an earlier run with these settings."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if without_date(earlier["settings"]) == without_date(settings):
        return earlier["rows"]
    if rerun:
        return []
    raise SystemExit(
        f"{path} was measured with other settings or on another machine. Choose another --out, or "
        f"--rerun to begin anew.\nThere: {earlier['settings']}\nHere:  {settings}"
    )


def without_date(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"machine": {k: v for k, v in settings["machine"].items() if k != "date"}}
