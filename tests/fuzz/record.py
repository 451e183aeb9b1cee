"""Write down which program runs, so that a process that dies names it."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def noted(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Keeps a file that says what runs, for as long as it does."""
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
    """What ran in processes that died, and forgets it."""
    notes = sorted(folder.glob("*.txt"))
    found = [note.read_text() for note in notes]
    for note in notes:
        note.unlink()
    return found
