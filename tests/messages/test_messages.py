"""Check every error, warning and printed message of the package.

A row has a call that provokes a message, the message's kind, and its whole text; ⟨…⟩ marks parts
that vary. The last tests compare the table with the source: every message has a row.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

import psclip_optax as psc
from tests.messages import (
    engine,
    losses,
    samples,
    thresholds,
    training_command,
    training_data,
    training_runs,
    training_steps,
    transforms,
)
from tests.messages.rows import Row

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(psc.__file__).parent
TABLES = (
    thresholds,
    engine,
    losses,
    transforms,
    samples,
    training_steps,
    training_data,
    training_runs,
    training_command,
)
ROWS = [row for table in TABLES for row in table.ROWS]


@functools.cache
def seen(row: Row) -> tuple[str, frozenset[tuple[str, int]]]:
    """Return the message of a row's call, and the lines of the package that it ran."""
    lines = set()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        del event, argument
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    printed, tracer_before = io.StringIO(), sys.gettrace()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(printed):
        warnings.simplefilter("always")
        sys.settrace(trace)
        try:
            row.provoke()
            told = printed.getvalue()
        except row.kind as error:
            told = message_of(error)
        finally:
            sys.settrace(tracer_before)
    if issubclass(row.kind, Warning):
        told = "\n".join(str(one.message) for one in warned if one.category is row.kind)
    return told, frozenset(lines)


def message_of(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return "\n".join([str(error), *(note for note in notes if not note.startswith(JAX_NOTE))])


JAX_NOTE = "-----"  # JAX's note that it omitted its own frames


def pattern_of(text: str) -> str:
    """Return a pattern for a row's text, whose parts in ⟨⟩ match anything."""
    return ".+?".join(map(re.escape, re.split("⟨.*?⟩", text)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.text[:60])
def test_a_mistake_is_told_in_these_words(row: Row):
    told, _ = seen(row)
    assert re.fullmatch(pattern_of(row.text), told, re.DOTALL), told


class Site(NamedTuple):
    """A place in the source that makes a message."""

    file: str
    function: str
    statement: str


def sites() -> Iterator[tuple[Site, tuple[str, int]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from sites_below(ast.parse(path.read_text(encoding="utf-8")), path, "")


def sites_below(node: ast.AST, path: pathlib.Path, function: str) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        if is_message(child):
            site = Site(str(path.relative_to(PACKAGE)), function, ast.unparse(child))
            yield site, (str(path), child.lineno)
        is_scope = isinstance(child, ast.FunctionDef)
        yield from sites_below(child, path, child.name if is_scope else function)


def is_message(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    on_stderr = any(ast.unparse(keyword.value) == "sys.stderr" for keyword in node.keywords)
    return called == "warnings.warn" or called.endswith(".add_note") or on_stderr


# Messages without a row: (file, function, start of the statement), with the reason or their test.
WITHOUT_ROW = {
    ("cli.py", "_status", "raise"): "passes on that something else is not installed",
    ("cli.py", "_run", "raise"): "passes on what is no lack of a device",
    ("cli.py", "_end_at_once", "print"): (
        "tests/training/run/test_distributed.py::"
        "test_a_lost_process_ends_the_run_and_one_process_goes_on_from_its_checkpoint"
    ),
    ("meshes.py", "with_auto_axes", "raise"): "passes on any other error of the function",
    ("training/run/distributed.py", "noticing_lost_processes", "raise"): (
        "passes on the error of a process that is alone"
    ),
    ("training/output/files.py", "noticing_what_cannot_be_written", "raise"): (
        "passes on what is no error of writing"
    ),
    ("training/run/runs.py", "_check_devices", "raise UsageError"): (
        "tests/training/run/test_distributed.py::test_a_batch_that_devices_cannot_share_is_refused"
    ),
}


def is_without_row(site: Site, key: tuple[str, str, str]) -> bool:
    file, function, beginning = key
    is_there = (site.file, site.function) == (file, function)
    # A bare `raise` begins like all others.
    return is_there and re.match(rf"{re.escape(beginning)}(\(|$)", site.statement) is not None


def test_every_message_has_a_row():
    ran = frozenset[tuple[str, int]]().union(*(seen(row)[1] for row in ROWS))
    missing = {site for site, line in sites() if line not in ran}
    unexplained = {s for s in missing if not any(is_without_row(s, key) for key in WITHOUT_ROW)}
    assert not unexplained, "\n".join(map(str, sorted(unexplained)))
    needless = {key for key in WITHOUT_ROW if not any(is_without_row(s, key) for s in missing)}
    assert not needless


@pytest.mark.parametrize("test", [why for why in WITHOUT_ROW.values() if "::" in why])
def test_what_has_no_row_has_a_test(test: str):
    path, name = test.split("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")
