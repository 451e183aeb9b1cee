"""Check that characters are spelled out, and that streams are restored."""

from __future__ import annotations

import io
import sys

import pytest

from psclip_optax.training.command.encodings import spelling_out


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "tau_k = alpha k^(1/beta) >= 0 ... -- || +/- e ?"),
        ("cp1252", "tau_k = alpha k^(1/beta) >= 0 … –- || ± é ?"),
        ("utf-8", "τ_k = α k^(1/β) ≥ 0 … –─ ‖ ± é 雪"),
    ],
)
def test_what_an_encoding_lacks_is_spelled_out(
    encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with spelling_out():
        print("τ_k = α k^(1/β) ≥ 0 … –─ ‖ ± é 雪", end="", flush=True)
    assert stream.errors == "strict"
    assert stream.buffer.getvalue().decode(encoding) == expected  # pyright: ignore


def test_a_stream_without_an_encoding_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with spelling_out():
        print("β", end="")
    assert stream.getvalue() == "β"
