"""Write files so that each is complete or absent."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Generator, Sequence
from typing import Any

import filelock
import numpy as np

from psclip_optax.training.config.commands import UsageError

# The contents of a run's folder.
CONFIG, METRICS = "config.json", "metrics.jsonl"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
SAMPLES = "samples"  # if they were recorded
RUN = (CONFIG, METRICS, CHECKPOINTS)
LOCK = ".lock"  # while a process writes there
# The contents of a comparison's folder.
COMPARISON, COMPARISON_FIGURE = "compare.json", "compare.png"
# The contents of a folder of psclip outliers.
OUTLIERS = ("outliers.csv", "classes.csv", "outliers.html", "outliers.png")


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file; after a crash it has the old or the new content, never a part.

    Args:
      path: the file; an existing one is replaced.
      content: its whole content.

    Raises:
      OSError: it cannot be written; an existing file does not change.

    Examples:
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers"
      >>> write_atomically(path, b"1 2 3")
      >>> path.read_bytes(), len(list(path.parent.iterdir()))
      (b'1 2 3', 1)
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Formats valid JSON: NaN and ∞, which JSON lacks, become null.

    Args:
      value: dicts, lists, strings, paths, and numbers and arrays of Python, NumPy or JAX.
      indent: the number of spaces to indent by; None writes one line.

    Returns:
      The text.

    Raises:
      TypeError: it contains anything else.

    Examples:
      >>> to_json({"loss": np.float32("nan"), "steps": np.arange(2), "out": pathlib.Path("run")})
      '{"loss": null, "steps": [0, 1], "out": "run"}'
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def to_npy(array: np.ndarray) -> bytes:
    """Returns the content of a .npy file for an array.

    Args:
      array: an array of numbers, or of records of numbers.

    Returns:
      The bytes, for `np.load`.

    Examples:
      >>> np.load(io.BytesIO(to_npy(np.arange(3))))
      array([0, 1, 2])
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_json(path: pathlib.Path, field: str) -> dict[str, Any]:
    """Reads a file that a command wrote.

    Args:
      path: the path of the file.
      field: a field of its object that must be an object too.

    Returns:
      The whole object.

    Raises:
      UsageError: it is not such a file.

    Examples:
      >>> path = pathlib.Path(tempfile.mkdtemp()) / CONFIG
      >>> _ = path.write_text('{"config": {"seed": 0}}')
      >>> read_json(path, "config")
      {'config': {'seed': 0}}
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path}: expected JSON, got {str(error)[:80]}; leave this folder out, or make it anew"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(field), dict):
        raise UsageError(
            f"{path}: expected an object with {field!r} in it, as psclip wrote it; leave this "
            "folder out, or make it anew"
        )
    return content


@contextlib.contextmanager
def writable_folder(folder: pathlib.Path) -> Generator[pathlib.Path]:
    """Creates a folder and checks that it is writable before work starts.

    Args:
      folder: created if missing, with its parents. Folders that were created and stay empty are
          removed.

    Yields:
      Its absolute path.

    Raises:
      UsageError: it cannot be created or written.

    Examples:
      >>> with writable_folder(pathlib.Path(tempfile.mkdtemp()) / "new") as folder:
      ...     folder.is_dir()
      True
      >>> folder.is_dir()
      False
    """
    folder = folder.expanduser().absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _check_writable(folder)
        yield folder
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # the folder is not empty, or was not created
                path.rmdir()


def _check_writable(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: pathlib.Path, error: OSError) -> UsageError:
    return UsageError(f"--out: cannot write to {folder}: {error.strerror}; choose another folder")


@contextlib.contextmanager
def held_alone(folder: pathlib.Path) -> Generator[None]:
    """Prevents other processes from writing to the same folder.

    The lock ends with its process, so a run whose process died can be resumed.

    Args:
      folder: an existing folder.

    Raises:
      UsageError: another process holds the lock, or the folder cannot be written.

    Examples:
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with held_alone(folder), held_alone(folder):
      ...     pass
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: --out: another psclip is writing to ...
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UsageError(
            f"--out: another psclip is writing to {folder}; wait until it ends, or choose another "
            "folder"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # before another process can lock it
        lock.release()


def named_in(folder: pathlib.Path, names: Sequence[str]) -> str:
    """Lists which of these files and folders a folder contains.

    Args:
      folder: the folder; it may be missing.
      names: the names to look for.

    Returns:
      The names that were found, separated by commas.

    Examples:
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> (folder / CONFIG).touch()
      >>> named_in(folder, RUN)
      'config.json'
    """
    return ", ".join(name for name in names if (folder / name).exists())


def check_holds_none_of(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Refuses a folder in which a run and a comparison would be mixed.

    Args:
      folder: the folder; it may be missing.
      names: the names that the other command writes.

    Raises:
      UsageError: one of them is in the folder.

    Examples:
      >>> check_holds_none_of(pathlib.Path(tempfile.mkdtemp()), RUN)
    """
    found = named_in(folder, names)
    if found:
        raise UsageError(
            f"--out: {folder} holds what another command wrote ({found}), and of a run and a "
            "comparison in one folder psclip plot shows the run alone; choose another folder"
        )


@contextlib.contextmanager
def noticing_what_cannot_be_written(folder: pathlib.Path) -> Generator[None]:
    """Turns errors of a full or missing disk into one line.

    Args:
      folder: the folder to write to.

    Raises:
      UsageError: something could not be written.

    Examples:
      >>> import errno
      >>> with noticing_what_cannot_be_written(pathlib.Path("run")):
      ...     raise OSError(errno.ENOSPC, "No space left on device")
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: --out: cannot write to run: No space ...
    """
    try:
        yield
    except Exception as error:
        reason = _why_not_written(error)
        if reason is None:
            raise
        # Each failed task of Orbax would report the error again, with a traceback.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise UsageError(
            f"--out: cannot write to {folder}: {reason}; the checkpoints before are whole: make "
            "room, and go on with --resume"
        ) from error


def _why_not_written(error: BaseException | None) -> str | None:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # from TensorStore, below Orbax
    if code:
        return os.strerror(int(code[1]))
    return None if error is None else _why_not_written(error.__cause__ or error.__context__)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    array = np.asarray(value)
    if array.ndim:
        return _plain(array.tolist())
    number = array.item()
    return None if isinstance(number, float) and not np.isfinite(number) else number
