"""Show the samples that a run clipped most, as tables and pictures: `psclip outliers`."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from psclip_optax.tails import MostClipped, most_clipped
from psclip_optax.training.config.commands import OutliersConfig, UsageError
from psclip_optax.training.data.corruptions import corrupt
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.register import DATASETS
from psclip_optax.training.data.splits import Dataset, Split
from psclip_optax.training.output.files import (
    CONFIG,
    OUTLIERS,
    SAMPLES,
    named_in,
    read_json,
    writable_folder,
    write_atomically,
)
from psclip_optax.training.plot.figures import to_png
from psclip_optax.training.plot.pictures import Picture, draw_pictures, page_of_pictures
from psclip_optax.training.run.samples import read_samples

_ORDERS = {
    "scale": "smallest mean scale first",
    "norm": "largest median norm first",
    "loss": "largest mean loss first",
}
_COLUMNS = ("index", "count", "mean_scale", "median_norm", "mean_loss")


class _Ranked(NamedTuple):
    """Holds the ranked samples of a run, and its training data.

    Attributes:
      samples: all recorded samples.
      dataset: the data set whose training split has these indices.
      trained: that split as used by the run, with wrong labels and corrupted pixels.
      num_steps: the number of recorded steps.
    """

    samples: MostClipped
    dataset: Dataset
    trained: Split
    num_steps: int


def outliers(config: OutliersConfig) -> pathlib.Path:
    """Writes the samples that a run clipped most.

    Args:
      config: names the run, the order, and where to write.

    Returns:
      The folder with `outliers.csv`, a row for each sample in order; `classes.csv`, a row for each
      class; and `outliers.html` and `outliers.png`, the first samples as pictures.

    Raises:
      UsageError: the folder contains no run or no samples, its records are damaged, or the results
        cannot be written or exist already.
      DatasetError: the dataset is not available.
    """
    told = _config_of(config.run)
    records = _records_of(config.run)
    with writable_folder(config.out or config.run / "outliers") as out:
        _check_unwritten(out, config.overwrite)
        ranked = _rank(config, told, records)
        for name, content in zip(OUTLIERS, _contents(config, ranked), strict=True):
            write_atomically(out / name, content)
    return out


def _config_of(run: pathlib.Path) -> dict[str, Any]:
    path = run.expanduser() / CONFIG
    if not path.exists():
        raise UsageError(f"{run}: expected a folder that psclip train wrote, {CONFIG} is missing")
    return read_json(path, "config")["config"]


def _records_of(run: pathlib.Path) -> np.ndarray:
    folder = run.expanduser() / SAMPLES
    if not folder.exists():
        raise UsageError(
            f"{run}: this run did not record its samples, {SAMPLES}/ is missing; train with "
            "psclip train --record-samples"
        )
    records = read_samples(folder)
    if not records.size:
        raise UsageError(
            f"{run}: no samples in {SAMPLES}/ yet; wait for the run's first --checkpoint-every "
            "steps"
        )
    return records


def _check_unwritten(out: pathlib.Path, overwrite: bool) -> None:
    found = named_in(out, OUTLIERS)
    if found and not overwrite:
        raise UsageError(
            f"--out: {out} holds a result already ({found}); choose another folder, or pass "
            "--overwrite"
        )


def _rank(config: OutliersConfig, told: dict[str, Any], records: np.ndarray) -> _Ranked:
    dataset = load_dataset(
        told["dataset"],
        data_dir=config.data_dir or told["data_dir"],
        cache_dir=config.cache_dir or told["cache_dir"],
    )
    trained = corrupt(
        dataset.train,
        num_classes=dataset.num_classes,
        label_noise=told["label_noise"],
        pixel_df=told["pixel_df"],
        seed=told["seed"],
    )
    if records["index"].max() >= len(trained.labels):
        raise UsageError(
            f"{config.run}: expected samples 0 to {len(trained.labels) - 1} of {told['dataset']}, "
            f"got {records['index'].max()}; pass --data-dir with the data that the run had"
        )
    fields = {name: records[name] for name in ("index", "scale", "norm", "loss")}
    num_steps = int(records["step"].max())
    return _Ranked(most_clipped(**fields, by=config.by), dataset, trained, num_steps)


def _contents(config: OutliersConfig, ranked: _Ranked) -> tuple[bytes, bytes, bytes, bytes]:
    run = config.run.expanduser().absolute().name
    title = f"{DATASETS[ranked.dataset.name].title} ({run}), {_ORDERS[config.by]}"
    pictures = [_picture(ranked, place) for place in range(min(config.top, len(ranked.samples)))]
    classes = _class_rows(ranked, len(pictures))
    page = page_of_pictures(pictures, title, _paragraphs(ranked, len(pictures)), classes)
    return (
        _to_csv(_sample_rows(ranked)),
        _to_csv(classes),
        page.encode(),
        to_png(draw_pictures(pictures, title)),
    )


def _paragraphs(ranked: _Ranked, shown: int) -> list[str]:
    samples = ranked.samples
    return [
        f"{shown} of {len(samples)} samples, over {ranked.num_steps} steps of training, in which "
        f"one was seen {samples.count.min()} to {samples.count.max()} times.",
        "Scale: the factor that a sample's gradient was clipped by, 1 where it was not, mean over "
        "the times that it was seen. Norm: of its gradient before, median. Loss: mean.",
    ]


def _picture(ranked: _Ranked, place: int) -> Picture:
    index, _, scale, norm, loss = (column[place] for column in _columns(ranked.samples))
    names = ranked.dataset.label_names
    label, original = (split.labels[index] for split in (ranked.trained, ranked.dataset.train))
    return Picture(
        ranked.trained.images[index],
        names[label],
        names[original] if original != label else "",
        (f"{index}: scale {scale:.3g}", f"norm {norm:.3g}, loss {loss:.3g}"),
    )


def _sample_rows(ranked: _Ranked) -> list[list[str]]:
    names = ranked.dataset.label_names
    rows = [[*_COLUMNS, "label", "name", "original_label", "original_name"]]
    for index, *figures in zip(*_columns(ranked.samples), strict=True):
        labels = [split.labels[index] for split in (ranked.trained, ranked.dataset.train)]
        told = [text for label in labels for text in (str(label), names[label])]
        rows.append([str(index), *(f"{figure:.6g}" for figure in figures), *told])
    return rows


def _class_rows(ranked: _Ranked, shown: int) -> list[list[str]]:
    """Counts each class's share of the first samples, the largest first, and of all samples."""
    labels = ranked.trained.labels[ranked.samples.index]
    number = ranked.dataset.num_classes
    of_first, of_all = (np.bincount(own, minlength=number) for own in (labels[:shown], labels))
    sums = np.bincount(labels, ranked.samples.mean_scale, number)
    rows = [["name", "label", "samples", "share", f"first_{shown}", "share_of_first", "mean_scale"]]
    for label in np.lexsort((np.arange(number), -of_first)):
        every = of_all[label]
        rows.append(
            [
                ranked.dataset.label_names[label],
                str(label),
                str(every),
                f"{every / len(labels):.4f}",
                str(of_first[label]),
                f"{of_first[label] / shown:.4f}",
                f"{sums[label] / every:.6g}" if every else "",
            ]
        )
    return rows


def _columns(samples: MostClipped) -> Sequence[np.ndarray]:
    columns = [getattr(samples, name) for name in _COLUMNS]
    return [column for column in columns if column is not None]


def _to_csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
