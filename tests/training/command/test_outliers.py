"""Check the tables, the page and the figure of the most clipped samples."""

from __future__ import annotations

import csv
import io
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.image import imread
from rich.console import Console

from psclip_optax import tails
from psclip_optax.cli import main
from psclip_optax.training.command.outliers import outliers
from psclip_optax.training.config.commands import OutliersConfig, TrainConfig
from psclip_optax.training.data.corruptions import with_label_noise
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.run.runs import train
from psclip_optax.training.run.samples import read_samples

TOP = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        label_noise=0.2, steps=120, eval_every=120, width=0.5, record_samples=True, out=out
    )
    train(config, Console(file=io.StringIO()))
    return out


@pytest.fixture(scope="module")
def written(trained: pathlib.Path) -> pathlib.Path:
    return outliers(OutliersConfig(run=trained, top=TOP))


def table(path: pathlib.Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_every_sample_in_order(trained: pathlib.Path, written: pathlib.Path):
    rows = table(written / "outliers.csv")
    records = read_samples(trained / "samples")
    found = tails.most_clipped(*(records[name] for name in ("index", "scale", "norm", "loss")))
    assert [int(row["index"]) for row in rows] == found.index.tolist()
    for name in ("count", "mean_scale", "median_norm", "mean_loss"):
        told = [float(row[name]) for row in rows]
        np.testing.assert_allclose(told, getattr(found, name), rtol=1e-5)
    digits = load_dataset("digits")
    labels = with_label_noise(digits.train.labels, 0.2, 10, seed=0)
    assert [int(row["label"]) for row in rows] == labels[found.index].tolist()
    originals = digits.train.labels[found.index]
    assert [int(row["original_label"]) for row in rows] == originals.tolist()


def test_labels_that_were_replaced_come_first(written: pathlib.Path):
    rows = table(written / "outliers.csv")
    wrong = [row["label"] != row["original_label"] for row in rows]
    assert np.mean(wrong) == pytest.approx(0.2, abs=0.03)
    assert np.mean(wrong[:TOP]) > 0.9


def test_the_share_of_each_class(written: pathlib.Path):
    samples, classes = table(written / "outliers.csv"), table(written / "classes.csv")
    assert sum(float(row["share"]) for row in classes) == pytest.approx(1, abs=1e-3)
    assert sum(float(row["share_of_first"]) for row in classes) == pytest.approx(1, abs=1e-3)
    counts = [int(row[f"first_{TOP}"]) for row in classes]
    assert counts == sorted(counts, reverse=True)
    for row in classes:
        own = [sample for sample in samples if sample["label"] == row["label"]]
        assert int(row["samples"]) == len(own)
        first = [sample for sample in samples[:TOP] if sample["label"] == row["label"]]
        assert int(row[f"first_{TOP}"]) == len(first)
        mean = np.mean([float(sample["mean_scale"]) for sample in own])
        assert float(row["mean_scale"]) == pytest.approx(mean, rel=1e-4)


def test_the_page_needs_no_other_file(written: pathlib.Path):
    page = BeautifulSoup((written / "outliers.html").read_text(encoding="utf-8"), "html.parser")
    assert not page.select("script, link, iframe")
    sources = [str(image["src"]) for image in page.select("img")]
    assert len(sources) == TOP
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:", page.get_text())
    first = table(written / "outliers.csv")[0]
    caption = page.select("figcaption")[0].get_text(" ")
    assert f"{first['index']}: scale" in caption
    assert f"(was {first['original_name']})" in caption


def test_the_figure_is_a_picture(written: pathlib.Path):
    pixels = imread(written / "outliers.png")
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.1


@pytest.mark.parametrize(("by", "column"), [("norm", "median_norm"), ("loss", "mean_loss")])
def test_other_orders(trained: pathlib.Path, tmp_path: pathlib.Path, by: Any, column: str):
    outliers(OutliersConfig(run=trained, by=by, top=1, out=tmp_path))
    values = [float(row[column]) for row in table(tmp_path / "outliers.csv")]
    assert values == sorted(values, reverse=True)


def test_pictures_that_are_brighter_than_white(tmp_path: pathlib.Path):
    config = TrainConfig(
        pixel_df=1.0, steps=8, width=0.05, record_samples=True, eval_every=8, out=tmp_path / "run"
    )
    train(config, Console(file=io.StringIO()))
    out = outliers(OutliersConfig(run=config.out, top=3))
    rows = table(out / "outliers.csv")
    assert len(rows) == 8 * 64
    assert {row["count"] for row in rows} == {"1"}


def test_the_command_tells_what_it_wrote_and_overwrites_nothing(
    trained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["outliers", str(trained), "--out", str(tmp_path), "--top", "2"]
    assert main(arguments) == 0
    told = capsys.readouterr().out.split()
    assert all((tmp_path / name).is_file() for name in ("outliers.csv", "classes.csv"))
    assert str(tmp_path / "outliers.html") in told
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == 2
    assert "holds a result already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*arguments, "--overwrite"]) == 0
