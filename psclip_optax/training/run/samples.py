"""Record each sample's loss, norm and scale in each step, in files that are complete or absent.

A file of samples/ is named by its steps. One ends at each checkpoint, so a run that resumes there
removes only whole files, and no sample is recorded twice or lost.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import re
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.output.files import to_npy, write_atomically

RECORD = np.dtype(
    [("step", "<i4"), ("index", "<i4"), ("scale", "<f4"), ("norm", "<f4"), ("loss", "<f4")]
)
_STEPS_OF_A_PART = 256
_NAME = re.compile(r"(\d{8,})-(\d{8,})\.npy")


class _Part(NamedTuple):
    """A file, with its first and last step."""

    path: pathlib.Path
    first: int
    last: int


class SampleLog:
    """Records single samples; results are fetched and written in the background.

    Arrays stay on the device until a file is full or a checkpoint is due, so no step waits for
    them.
    """

    def __init__(self, folder: pathlib.Path, pool: concurrent.futures.Executor):
        self._folder = folder
        self._pool = pool
        self._held: list[tuple[int, dict[str, Any]]] = []
        self._writing: list[concurrent.futures.Future[None]] = []

    def add(self, step: int, samples: dict[str, Any]) -> None:
        """Adds "index", "scale", "norm" and "loss", `[n]` each, of a step's batch."""
        self._held.append((step, samples))
        if len(self._held) >= _STEPS_OF_A_PART:
            self._hand_over()

    def commit(self) -> None:
        """Writes all records to disk before a checkpoint of the same step is saved."""
        if self._held:
            self._hand_over()
        for part in self._writing:
            part.result()
        self._writing.clear()

    def _hand_over(self) -> None:
        self._writing.append(self._pool.submit(_write_part, self._folder, self._held))
        self._held = []


@contextlib.contextmanager
def recording_samples(folder: pathlib.Path, step: int) -> Generator[SampleLog]:
    """Opens the records of a run that starts or resumes after a step.

    Args:
      folder: created if missing; records of later steps are removed.
      step: the step of the checkpoint; 0 for a new run.

    Yields:
      The log. Records after its last `commit` may not be on disk.

    Examples:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> samples = {"index": [3, 1], "scale": [1.0, 0.5], "norm": [0.2, 4.0], "loss": [0.1, 2.0]}
      >>> with recording_samples(folder, step=0) as log:
      ...     log.add(1, {name: np.array(values) for name, values in samples.items()})
      ...     log.commit()
      >>> read_samples(folder)["index"]
      array([3, 1], dtype=int32)
    """
    folder.mkdir(exist_ok=True)
    for part in _parts(folder):
        if part.last > step:
            part.path.unlink()
    with concurrent.futures.ThreadPoolExecutor(1, "samples") as pool:
        yield SampleLog(folder, pool)


def read_samples(folder: pathlib.Path) -> np.ndarray:
    """Reads the records so far.

    Args:
      folder: the folder of `recording_samples`; it may be missing.

    Returns:
      Records `[N]` of "step", "index", "scale", "norm" and "loss", in the order of steps; empty if
      nothing is recorded yet.

    Raises:
      UsageError: a part is missing or damaged.

    Examples:
      >>> read_samples(pathlib.Path("nowhere")).size
      0
    """
    step, records = 0, [np.empty(0, RECORD)]
    for part in _parts(folder):
        if part.first != step + 1:
            raise UsageError(
                f"{folder}: expected a part that begins at step {step + 1}, got {part.path.name}; "
                "what was recorded between is lost, so that means over the run would be wrong: "
                "train again in another folder"
            )
        records.append(_read_part(part))
        step = part.last
    return np.concatenate(records)


def _parts(folder: pathlib.Path) -> list[_Part]:
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.npy")]
    parts = [_Part(path, int(name[1]), int(name[2])) for path, name in names if name]
    return sorted(parts, key=lambda part: part.first)


def _write_part(folder: pathlib.Path, held: list[tuple[int, dict[str, Any]]]) -> None:
    steps, samples = zip(*held, strict=True)
    records = np.empty((len(steps), len(samples[0]["index"])), RECORD)
    records["step"] = np.array(steps)[:, None]
    for name in samples[0]:
        # Not by jax.device_get, which takes several times as long for small arrays.
        records[name] = [np.asarray(own[name]) for own in samples]
    path = folder / f"{steps[0]:08}-{steps[-1]:08}.npy"
    write_atomically(path, to_npy(records.ravel()))


def _read_part(part: _Part) -> np.ndarray:
    try:
        records = np.load(part.path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(part) from error
    if records.dtype != RECORD or records.ndim != 1:
        raise _damaged(part)
    steps, counts = np.unique(records["step"], return_counts=True)
    expected = np.arange(part.first, part.last + 1)
    if not np.array_equal(steps, expected) or len(set(counts)) > 1:
        raise _damaged(part)
    return records


def _damaged(part: _Part) -> UsageError:
    return UsageError(
        f"{part.path}: expected as many records of each step from {part.first} to {part.last}, as "
        "psclip train wrote them, but the file is damaged; train again in another folder"
    )
