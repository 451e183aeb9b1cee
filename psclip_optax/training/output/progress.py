"""Show the progress of a command: a bar on a terminal, else a line for every 10 %."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_TENTHS = 10


class Report(Protocol):
    """Reports the progress."""

    def __call__(self, completed: int, doing: str, loss: float, clipped_share: float) -> None: ...


@contextlib.contextmanager
def reporting_progress(total: int, console: Console) -> Generator[Report]:
    """Shows the current work, with the loss and the clipped share.

    Args:
      total: the number of units of work, such as steps.
      console: the console to print to.

    Yields:
      `report(completed, doing, loss, clipped_share)`, cheap enough for every few steps.

    Examples:
      >>> import sys
      >>> with reporting_progress(200, Console(file=sys.stdout, width=80)) as report:
      ...     report(10, "momentum SGD", loss=2.31, clipped_share=0.0)
      ...     report(20, "momentum SGD", loss=2.25, clipped_share=0.0)
       10%  momentum SGD  loss 2.250  clipped 0%
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total)
    tenths = 0

    def report(completed: int, doing: str, loss: float, clipped_share: float) -> None:
        nonlocal tenths
        shown = f"loss {loss:.3f}" if math.isfinite(loss) else "loss not finite"
        description = f"{doing}  {shown}  clipped {clipped_share:.0%}"
        bar.update(task, completed=completed, description=description)
        if not console.is_terminal and completed * _TENTHS // total > tenths:
            tenths = completed * _TENTHS // total
            console.print(f"{tenths / _TENTHS:4.0%}  {description}", highlight=False)

    with bar:
        yield report
