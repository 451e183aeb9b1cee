"""Find code blocks in Markdown pages, and run those in Python."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from typing import Any, NamedTuple


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
      source: the code between the fences.
      line: the line number of the opening fence on the page, from 1.
      heading: the last heading above it, or "".
      marker: the text of the HTML comment on the line above its fence, or "".
    """

    source: str
    line: int
    heading: str
    marker: str


_FENCED = re.compile(
    r"^ *(?P<fence>`{3,}|~{3,}) *\{?\.?(?P<language>\w*)[^\n]*\n"
    r"(?P<source>.*?)^ *(?P=fence) *$",
    flags=re.DOTALL | re.MULTILINE,
)


def fenced(text: str, language: str) -> list[Block]:
    """List the blocks in one language, in order, also in lists and tabs."""
    blocks = []
    # Blanked, because what looks like a heading in code is a comment.
    outside = _FENCED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in _FENCED.finditer(text):
        if match["language"] != language:
            continue
        above = text[: match.start()]
        headings = re.findall(r"^#+ (.+)$", outside[: match.start()], flags=re.MULTILINE)
        marker = re.search(r"<!-- *(.*?) *-->\n\Z", above)
        blocks.append(
            Block(
                source=textwrap.dedent(match["source"]),
                line=above.count("\n") + 1,
                heading=headings[-1] if headings else "",
                marker=marker[1] if marker else "",
            )
        )
    return blocks


def first_words(source: str) -> str:
    """Return the first words of a block's last line, as its name."""
    return source.strip().splitlines()[-1][:40]


def run(source: str, path: str, line: int = 0) -> dict[str, Any]:
    """Run a block and return its names; check that it prints what its comments say, or asserts.

    Args:
      source: Python.
      path: the page's path, for tracebacks.
      line: the line of the fence above the block, so that tracebacks have the page's line numbers.
    """
    names: dict[str, Any] = {"__name__": "snippet"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + source, path, "exec"), names)
    said = re.findall(r"^print\(.*\)  # (.+)$", source, flags=re.MULTILINE)
    lines = printed.getvalue().splitlines()
    assert lines == said, f"{path}:{line} printed {lines}, and says {said}"
    assert said or "assert " in source, f"{path}:{line} neither prints nor asserts anything"
    return names
