"""Note which program runs, so that a crash can be attributed."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def noted(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Keep a file that says what is running, as long as it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{os.getpid()}.txt"
    note.write_text(what)
    try:
        yield
    except Exception:
        note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)


def left_behind(folder: pathlib.Path) -> list[str]:
    """Return what ran in processes that died, and remove the notes."""
    notes = sorted(folder.glob("*.txt"))
    found = [note.read_text() for note in notes]
    for note in notes:
        note.unlink()
    return found
