"""Keeps finished runs, a line of a text file each, so that none is done again.

A line is JSON in ASCII: `{"digest": …, "run": what was run, "found": what came out}`. Of lines with
the same digest, as two branches that are merged may have, the first counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import filelock


def digest(run: dict[str, Any]) -> str:
    """Names a run by all that decides how it ends, whatever the order of the names in it."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


class RunsCache:
    """The finished runs of one file; processes may add to it at the same time.

    A run and what was found are dicts of what JSON holds, NaN and ∞ included.

    Attributes:
      path: the path of the file, which may be missing.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self._size = 0  # bytes that were read, up to the end of a line

    def __contains__(self, run: dict[str, Any]) -> bool:
        self._read()
        return digest(run) in self._lines

    def __getitem__(self, run: dict[str, Any]) -> dict[str, Any]:
        self._read()
        return self._lines[digest(run)]["found"]

    def once(self, run: dict[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Gives what was found of a run, which is done if it has not been."""
        if run not in self:
            self.add(run, find())
        return self[run]

    def add(self, run: dict[str, Any], found: dict[str, Any]) -> None:
        """Appends a line, unless another process has meanwhile done the same run."""
        line = json.dumps({"digest": digest(run), "run": run, "found": found})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self.path}.lock"), self.path.open("ab") as file:
            if run in self:
                return
            # The rest of an interrupted line would spoil this one.
            file.truncate(self._size)
            file.write(f"{line}\n".encode("ascii"))
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Lists all runs, each with what was found, in the order of the file."""
        self._read()
        return [line["run"] | line["found"] for line in self._lines.values()]

    def _read(self) -> None:
        """Reads the lines that were added; one without its end is not finished."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._size)
            lines, end, _ = file.read().rpartition(b"\n")
        for line in map(json.loads, lines.splitlines()):
            self._lines.setdefault(line["digest"], line)
        self._size += len(lines) + len(end)
