"""Files whole or not there, and JSON that every reader takes."""

from __future__ import annotations

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from psclip_optax.training.configs import UsageError
from psclip_optax.training.files import make_writable_folder, to_json, write_atomically


def test_crash_while_writing_keeps_what_was_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "config.json"
    write_atomically(path, b"old")

    def crash(_: int):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new, half wri")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, np.float32("nan"), jnp.inf])
def test_json_has_no_tokens_of_its_own(number):
    assert json.loads(to_json({"a": [number, 1]})) == {"a": [None, 1]}


def test_json_keeps_numbers_exactly():
    value = {"a": jnp.float32(0.1), "b": np.arange(3), "c": True, "d": None, "e": (1, 2.5)}
    assert json.loads(to_json(value)) == {
        "a": float(np.float32(0.1)),
        "b": [0, 1, 2],
        "c": True,
        "d": None,
        "e": [1, 2.5],
    }


def test_folder_under_a_file_is_refused(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"--out: cannot write to {tmp_path}/file/run: Not a dir"):
        make_writable_folder(tmp_path / "file" / "run")
