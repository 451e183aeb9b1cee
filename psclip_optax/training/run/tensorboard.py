"""Write the records of metrics.jsonl for TensorBoard, which shows them during a run."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.run.norms import BINS_PER_OCTAVE

_AXES = {"kind", "step", "seconds"}


def check_tensorboard() -> None:
    """Checks before any work whether events can be written.

    Raises:
      UsageError: tensorboardX is not installed.

    Examples:
      >>> check_tensorboard()
    """
    try:
        import tensorboardX  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise UsageError(
            "--tensorboard: tensorboardX is not installed; pip install 'psclip_optax[tensorboard]'"
        ) from error


@contextlib.contextmanager
def writing_tensorboard(
    folder: pathlib.Path | None, records: Iterable[dict[str, Any]], seconds: float
) -> Generator[Callable[[dict[str, Any]], None]]:
    """Writes records as events: scalars, named by their kind, and the histogram of the norms.

    A scalar of a group of parameters has the group's name after its own.

    Events in the folder become void. When a run resumes, its records are written again, so
    TensorBoard shows the same as metrics.jsonl.

    Args:
      folder: the folder for event files; None writes nothing.
      records: the records so far.
      seconds: the seconds of training so far.

    Yields:
      `write(record)`. Values that are None or ∞ are omitted.

    Examples:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "tensorboard"
      >>> with writing_tensorboard(folder, [], seconds=0.0) as write:
      ...     write({"kind": "train", "step": 10, "loss": 2.3, "seconds": 0.5})
      >>> len(list(folder.iterdir()))
      1
    """
    if folder is None:
        yield lambda record: None
        return
    from tensorboardX import SummaryWriter

    start = time.time() - seconds
    # At step 0: from there on TensorBoard discards the events of earlier files.
    with SummaryWriter(str(folder), purge_step=0) as writer:
        for record in records:
            _write(writer, record, start)
        yield lambda record: _write(writer, record, start)


def _write(writer: Any, record: dict[str, Any], start: float) -> None:
    kind, when = record["kind"], (record["step"], start + record["seconds"])
    figures = {f"{kind}/{name}": value for name, value in record.items() if name not in _AXES}
    for group, own in record.get("groups", {}).items():
        figures |= {f"{kind}/{name}/{group}": value for name, value in own.items()}
    for tag, value in figures.items():
        if isinstance(value, int | float) and np.isfinite(value):
            writer.add_scalar(tag, value, *when)
    counts = record.get("norm_histogram")
    if counts:
        _write_histogram(writer, f"{kind}/log2_norm", counts, when)
    writer.flush()


def _write_histogram(
    writer: Any, tag: str, counts: dict[str, int], when: tuple[int, float]
) -> None:
    # Bins are logarithmic: a heavy tail would be a single bar on TensorBoard's linear axis.
    lower = np.arange(min(map(int, counts)), max(map(int, counts)) + 1)
    number = np.array([counts.get(str(bin), 0) for bin in lower])
    middle = (lower + 0.5) / BINS_PER_OCTAVE
    step, walltime = when
    writer.add_histogram_raw(
        tag,
        min=lower[0] / BINS_PER_OCTAVE,
        max=(lower[-1] + 1) / BINS_PER_OCTAVE,
        num=int(number.sum()),
        sum=float(number @ middle),
        sum_squares=float(number @ middle**2),
        bucket_limits=((lower + 1) / BINS_PER_OCTAVE).tolist(),
        bucket_counts=number.tolist(),
        global_step=step,
        walltime=walltime,
    )
