"""Stores finished runs, one per line of a text file, so that none is repeated.

A line is JSON in ASCII: `{"digest": …, "run": the settings, "found": the result}`. If several lines
have the same digest, for example after a merge of branches, the first counts.
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
    """Computes a run's digest from all its settings, whatever their order."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


class RunsCache:
    """The finished runs of one file; processes may add to it at the same time.

    A run and its result are dicts of JSON values, including NaN and ∞.

    Attributes:
      path: the path of the file, which may be missing.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self._size = 0  # bytes read so far, up to the end of a line

    def __contains__(self, run: dict[str, Any]) -> bool:
        self._read()
        return digest(run) in self._lines

    def __getitem__(self, run: dict[str, Any]) -> dict[str, Any]:
        self._read()
        return self._lines[digest(run)]["found"]

    def once(self, run: dict[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of a run, which is executed if it is not stored."""
        if run not in self:
            self.add(run, find())
        return self[run]

    def add(self, run: dict[str, Any], found: dict[str, Any]) -> None:
        """Appends a line, unless another process has stored the same run meanwhile."""
        line = json.dumps({"digest": digest(run), "run": run, "found": found})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self.path}.lock"), self.path.open("ab") as file:
            if run in self:
                return
            # The rest of an interrupted line would corrupt this one.
            file.truncate(self._size)
            file.write(f"{line}\n".encode("ascii"))
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Lists all runs with their results, in the order of the file."""
        self._read()
        return [line["run"] | line["found"] for line in self._lines.values()]

    def _read(self) -> None:
        """Reads the new lines; a line without its end is ignored."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._size)
            lines, end, _ = file.read().rpartition(b"\n")
        for line in map(json.loads, lines.splitlines()):
            self._lines.setdefault(line["digest"], line)
        self._size += len(lines) + len(end)
