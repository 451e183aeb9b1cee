"""Write and read metrics.jsonl: a line of JSON for each record, truncated on resuming."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.output.files import to_json, write_atomically


def append_record(file: TextIO, record: dict[str, Any]) -> None:
    """Writes one record as a complete line.

    Args:
      file: opened for appending text.
      record: names and numbers, including "step"; NaN and ∞ become null.

    Examples:
      >>> import sys
      >>> append_record(sys.stdout, {"kind": "train", "step": 1, "loss": float("inf")})
      {"kind": "train", "step": 1, "loss": null}
    """
    file.write(to_json(record) + "\n")
    file.flush()


def commit(file: TextIO) -> None:
    """Flushes all records to disk before a checkpoint of the same step is saved.

    Args:
      file: a regular file opened for appending text.

    Examples:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile("a") as file:
      ...     commit(file)
    """
    file.flush()
    os.fsync(file.fileno())


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    r"""Reads the records up to the first incomplete line.

    Args:
      path: a file that `append_record` wrote; may be missing.

    Returns:
      The records.

    Examples:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"step": 1}\n{"step": 2}\n{"st')
      >>> read_records(path)
      [{'step': 1}, {'step': 2}]
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(_whole_records(lines))


def read_intact_records(path: pathlib.Path) -> list[dict[str, Any]]:
    r"""Reads the records of a run that may still be writing or may have been killed.

    Args:
      path: a file that `append_record` wrote; may be missing.

    Returns:
      The records, without the last line if it is incomplete.

    Raises:
      UsageError: a line before the last is damaged.

    Examples:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train"}\n')
      >>> read_intact_records(path)
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: ...metrics.jsonl, line 2: expected ...
    """
    records = list(itertools.takewhile(_is_record, read_records(path)))
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) > len(records) + 1:
        raise UsageError(
            f"{path}, line {len(records) + 1}: expected a record with kind and step, got "
            f"{lines[len(records)][:40]!r}; remove the line, or let psclip train --resume go on "
            "from the last checkpoint before it"
        )
    return records


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and {"kind", "step"} <= record.keys()


def cut_back(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    r"""Removes the records after a step.

    Args:
      path: a file that `append_record` wrote; created if missing.
      step: the last step to keep, that of a checkpoint.

    Returns:
      The remaining records.

    Examples:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
      >>> cut_back(path, 2)
      [{'step': 1}, {'step': 2}]
      >>> path.read_text()
      '{"step": 1}\n{"step": 2}\n'
    """
    kept = list(itertools.takewhile(lambda record: record["step"] <= step, read_records(path)))
    write_atomically(path, "".join(to_json(record) + "\n" for record in kept).encode())
    return kept


def _whole_records(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if not line.endswith("\n"):
            return
        yield record
