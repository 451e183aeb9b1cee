"""How much does it cost to record every sample during training?

    python -m benchmarks.engine.recording

Runs steps of `psclip train` with the automatic threshold, with and without --record-samples, in
alternating windows. A window ends like a checkpoint: all its records are on disk. Ratios are to the
window without records in the same round. Prints a table and writes it to benchmarks/results as
recording.json.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table
from benchmarks.common.timing import quartiles
from psclip_optax.training.config.commands import ModelName, TaskConfig
from psclip_optax.training.data.datasets import dataset_shape
from psclip_optax.training.data.pipeline import iterate
from psclip_optax.training.data.splits import Dataset, Split
from psclip_optax.training.output.files import to_json
from psclip_optax.training.run.methods import Hyperparams
from psclip_optax.training.run.norms import NormWindow
from psclip_optax.training.run.samples import SampleLog, recording_samples
from psclip_optax.training.run.trainer import (
    build_task_model,
    build_trainer,
    dropout_key,
    training_batches,
)

NUM_IMAGES = 2048


class Setting(NamedTuple):
    """A model, its data and batches, and the number of steps in a window."""

    dataset: str
    model: ModelName
    width: float
    batch_size: int
    steps: int


SETTINGS = (
    Setting("cifar100", "alexnet", 0.5, 128, 20),
    Setting("cifar100", "resnet18", 0.25, 32, 20),
    Setting("digits", "mlp", 1.0, 64, 400),
)
TINY = (Setting("digits", "mlp", 0.05, 16, 3),)


def random_images(name: str) -> Dataset:
    """Makes noise with the shapes of a data set; a step costs the same as with its images."""
    shape, num_classes = dataset_shape(name)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES, *shape), np.uint8)
    split = Split(images, rng.integers(0, num_classes, NUM_IMAGES, np.int32))
    return Dataset(name, num_classes, tuple(map(str, range(num_classes))), split, split)


def build_window(setting: Setting, log: SampleLog | None) -> Callable[[], None]:
    """Returns a function that runs one window of steps, continuing from the last one."""
    dataset = random_images(setting.dataset)
    config = TaskConfig(model=setting.model, width=setting.width, batch_size=setting.batch_size)
    model = build_task_model(config, dataset)
    trainer = build_trainer(
        "ps-clip-median",
        model,
        dataset,
        config,
        setting.steps,
        return_norms=True,
        return_samples=log is not None,
    )
    batches = training_batches(dataset.train, dataset, config, 0)
    ready = [batch for _, batch in iterate(batches, 0, setting.steps)]
    key, norms = dropout_key(0), NormWindow(np.empty(0))
    state, step = trainer.init(0, Hyperparams(0.01, 1.0, 1.5)), 0

    def window() -> None:
        nonlocal state, step
        for batch in ready:
            state, metrics = trainer.step(state, key, batch)
            step += 1
            norms.add(metrics.pop("norms"))
            if log is not None:
                log.add(step, metrics.pop("samples"))
        if log is not None:
            log.commit()
        jax.block_until_ready(state)

    return window


def time_in_turn(windows: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each window, after a warm-up window of each."""
    seconds: dict[str, list[float]] = {name: [] for name in windows}
    for round_ in range(repeats + 1):
        # The order alternates, so that neither has warmer caches.
        for name in sorted(windows, reverse=round_ % 2 == 1):
            start = time.perf_counter()
            windows[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def measure(setting: Setting, repeats: int, folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    with recording_samples(folder, 0) as log:
        windows = {"plain": build_window(setting, None), "recorded": build_window(setting, log)}
        seconds = time_in_turn(windows, repeats)
    ratios = [own / plain for own, plain in zip(seconds["recorded"], seconds["plain"], strict=True)]
    return {
        **setting._asdict(),
        "seconds_a_step": statistics.median(seconds["plain"]) / setting.steps,
        "ratio_quartiles": quartiles(ratios),
        "bytes_a_sample": sum(path.stat().st_size for path in folder.iterdir())
        / ((repeats + 1) * setting.steps * setting.batch_size),
    }


def to_markdown(rows: list[dict[str, Any]]) -> str:
    header = ["model, samples", "ms a step", "with records: time", "bytes a sample"]
    body = [
        [
            f"{row['model']} of width {row['width']:g}, {row['batch_size']}",
            f"{1e3 * row['seconds_a_step']:.2f}",
            "{1:.3f} ({0:.3f}–{2:.3f})".format(*row["ratio_quartiles"]),
            f"{row['bytes_a_sample']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table([header, *body])


def main(out: pathlib.Path = RESULTS, repeats: int = 21, quick: bool = False) -> None:
    """Measures the cost of recording every sample during training.

    Args:
      out: where recording.json is written.
      repeats: the number of measured rounds.
      quick: a tiny net, to check that the benchmark works.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(setting, repeats, pathlib.Path(folder) / str(place))
            for place, setting in enumerate(TINY if quick else SETTINGS)
        ]
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(), "repeats": repeats, "rows": rows}
    (out / "recording.json").write_text(to_json(result, indent=2) + "\n")
    print(to_markdown(rows))


if __name__ == "__main__":
    tyro.cli(main)
