"""Replace characters that the output's encoding lacks."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
import unicodedata
from collections.abc import Generator
from typing import Any

_HANDLER = "psclip_optax.spelled_out"
_SIGNS = {
    "–": "-",
    "─": "-",
    "│": "|",
    "‖": "||",
    "×": "x",
    "±": "+/-",
    "√": "sqrt ",
    "∞": "inf",
    "≤": "<=",
    "≥": ">=",
}


@contextlib.contextmanager
def spelling_out() -> Generator[None]:
    """Replaces by ASCII the characters that the encodings of stdout and stderr lack.

    Otherwise such a character would end the command with a traceback.

    Examples:
      >>> with spelling_out():
      ...     "α k^(1/β) × 2 …".encode("ascii", "psclip_optax.spelled_out")
      b'alpha k^(1/beta) x 2 ...'
    """
    codecs.register_error(_HANDLER, _spelled_out)
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def _spelled_out(error: Any) -> tuple[str, int]:
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(sign: str) -> str:
    name = unicodedata.name(sign, "")
    if name.startswith("GREEK"):
        return name.split()[-1].lower()
    plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return _SIGNS.get(sign) or plain or "?"
