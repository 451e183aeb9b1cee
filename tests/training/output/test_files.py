"""Check that files are complete or absent, and that JSON is valid."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.output.files import (
    held_alone,
    to_json,
    writable_folder,
    write_atomically,
)


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
        enter(writable_folder(tmp_path / "file" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folder_that_stays_empty_is_gone_again_with_its_parents(tmp_path: pathlib.Path):
    with writable_folder(tmp_path / "a" / "b"), held_alone(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no"), writable_folder(tmp_path / "a" / "b"):
        raise UsageError("no")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_was_there_or_was_written_to_stays(tmp_path: pathlib.Path):
    (tmp_path / "there").mkdir()
    with writable_folder(tmp_path / "there"):
        pass
    with writable_folder(tmp_path / "new") as folder, held_alone(folder):
        (folder / "file").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "there"]


def test_folder_is_held_by_one(tmp_path: pathlib.Path):
    with held_alone(tmp_path):
        for _ in range(2):
            with pytest.raises(UsageError, match=f"another psclip is writing to {tmp_path}; wait"):
                enter(held_alone(tmp_path))
    enter(held_alone(tmp_path))


def test_folder_is_free_when_its_holder_was_killed(tmp_path: pathlib.Path):
    script = """
import pathlib, sys, time
from psclip_optax.training.output.files import held_alone
with held_alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
    argv = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UsageError, match="another psclip"):
                enter(held_alone(tmp_path))
        finally:
            holder.kill()
    enter(held_alone(tmp_path))


def enter(context):
    with context:
        pass
