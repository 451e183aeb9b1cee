"""Check the figure of runs, read back from its artists, and its errors."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from psclip_optax.training.config.commands import PlotConfig, UsageError
from psclip_optax.training.plot.plots import Run, draw_runs, labels_of, plot, read_runs
from psclip_optax.training.run.norms import norm_figures

NORMS = np.random.default_rng(0).pareto(1.5, [40, 600])
STEPS = range(10, 410, 10)


def train_records(**changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "loss": 100 / step,
            "clipped_share": 0.25,
            **norm_figures(norms),
            **changes,
        }
        for step, norms in zip(STEPS, NORMS, strict=True)
    ]


TEST = [{"kind": "test", "step": step, "accuracy": step / 400} for step in (100, 200, 400)]
TRAIN = train_records()


def runs_of(*configs: dict[str, Any]) -> list[Run]:
    return [Run(f"run{i}", config, TRAIN, TEST) for i, config in enumerate(configs)]


def write_run(folder: pathlib.Path, config: dict[str, Any], lines: list[Any]) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture(scope="module")
def figure():
    return draw_runs(runs_of({"lr": 0.1, "dataset": "digits", "model": "mlp"}))


def test_curves_are_the_records(figure):
    loss, accuracy, clipped, quantiles, tail, _ = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [100 / step for step in STEPS])
    np.testing.assert_allclose(
        accuracy.lines[0].get_xydata(), [(r["step"], r["accuracy"]) for r in TEST]
    )
    np.testing.assert_allclose(clipped.lines[0].get_ydata(), 0.25)
    for line, name in zip(quantiles.lines, ("norm_q50", "norm_q99"), strict=True):
        np.testing.assert_allclose(line.get_xydata(), [(r["step"], r[name]) for r in TRAIN])
    assert figure.get_suptitle() == "digits, mlp"
    indices = np.array([r["tail_index"] for r in TRAIN])
    expected = np.where(np.isfinite(indices), indices, np.nan)
    np.testing.assert_allclose(
        np.where(np.isfinite(tail.lines[0].get_ydata()), indices, np.nan), expected
    )


def test_running_mean_is_of_the_neighbours_that_are_numbers():
    records = train_records()
    records[20]["loss"] = None
    figure = draw_runs([Run("run", {}, records, TEST)])
    raw = np.array([r["loss"] for r in records], float)
    smooth = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(smooth[10], raw[10:11].mean())
    assert np.isnan(smooth[20])
    many = [r | {"step": i, "loss": float(i % 2)} for i, r in enumerate(5 * TRAIN)]
    smooth = draw_runs([Run("run", {}, many, TEST)]).axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(smooth[50], np.mean([i % 2 for i in range(46, 55)]))


def test_histogram_holds_the_shares_of_the_last_record(figure):
    last, first = figure.axes[5].patches
    for patch, record in ((last, TRAIN[-1]), (first, TRAIN[0])):
        shares, edges, _ = patch.get_data()
        assert sum(shares) == pytest.approx(1.0)
        assert len(edges) == len(shares) + 1
        np.testing.assert_allclose(edges[1:] / edges[:-1], 2**0.5)
        assert edges[0] <= min(2 ** (int(bin) / 2) for bin in record["norm_histogram"]) * 1.001
    assert figure.axes[5].get_xscale() == figure.axes[5].get_yscale() == "log"


def test_light_tails_are_marked_at_what_they_are_at_least():
    light = train_records(tail_index=None, tail_lower=2.5, tail_upper=None, tail_verdict="light")
    axes = draw_runs([Run("run", {}, light, TEST)]).axes[4]
    marks = [line for line in axes.lines if line.get_marker() == "v"]
    np.testing.assert_allclose(marks[0].get_xydata(), [(step, 2.5) for step in STEPS])


def test_labels_are_what_differs():
    common = {"out": "anywhere", "seed": 0, "log_every": 1}
    runs = runs_of(
        common | {"method": "momentum", "lr": 0.1},
        common | {"method": "ps-clip", "lr": 0.25, "log_every": 7, "out": "elsewhere"},
        common | {"method": "ps-clip", "lr": None},
    )
    assert labels_of(runs) == [
        "method momentum, lr 0.1",
        "method ps-clip, lr 0.25",
        "method ps-clip, lr none",
    ]
    assert legend(draw_runs(runs)) == labels_of(runs)


def test_labels_of_what_does_not_differ_are_the_folders():
    same = {"lr": 0.1, "out": "x"}
    assert labels_of(runs_of(same)) == ["run0"]
    assert labels_of(runs_of(same, same)) == ["run0", "run1"]
    other = same | {"lr": 0.2}
    assert labels_of(runs_of(same, same, other)) == ["lr 0.1 (run0)", "lr 0.1 (run1)", "lr 0.2"]


@pytest.mark.parametrize("number", [1, 2, 7, 10])
def test_every_run_has_its_look_and_its_label(number: int):
    figure = draw_runs(runs_of(*({"lr": i} for i in range(number))))
    looks = {(h.get_color(), h.get_linestyle()) for h in figure.legends[0].legend_handles}
    assert len(looks) == len(set(legend(figure))) == number
    drawn = {(line.get_color(), line.get_linestyle()) for line in figure.axes[1].lines}
    assert drawn == looks


def test_runs_without_norms_say_so():
    plain = [{"kind": "train", "step": 1, "loss": 1.0, "clipped_share": 0.0}]
    figure = draw_runs([Run("run", {}, plain, [])])
    assert texts(figure).count("not recorded") == 4  # three for norms, one for evaluation


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": None},
        {"norm_histogram": {}, "norm_q50": None, "norm_q99": None, "tail_lower": None},
        {"norm_q50": 0.0, "norm_q99": 0.0},
    ],
)
def test_run_that_diverged_is_drawn_too(changes: dict[str, Any], tmp_path: pathlib.Path):
    folder = write_run(tmp_path / "run", {"lr": 0.1}, [*train_records(**changes), *TEST])
    assert plot(PlotConfig(runs=(folder,), out=tmp_path / "plot.png")).exists()


def test_figure_is_replaced_and_wide_enough_to_read(tmp_path: pathlib.Path):
    folder = write_run(tmp_path / "run", {"lr": 0.1}, [*TRAIN, *TEST])
    for _ in range(2):
        png = plot(PlotConfig(runs=(folder,), out=tmp_path / "plot.png")).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") >= 1600


def test_unfinished_run_is_drawn_up_to_its_torn_line(tmp_path: pathlib.Path):
    folder = write_run(tmp_path / "run", {"lr": 0.1}, TRAIN[:3])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    (run,) = read_runs(folder)
    assert [record["step"] for record in run.train] == [10, 20, 30]
    assert run.test == []


def test_comparison_is_its_methods_over_seeds(tmp_path: pathlib.Path):
    curves = [
        {"steps": [1, 2], "loss": [seed, 2.0], "clipped_share": [0.5, 1.0], "accuracy": [0.1, seed]}
        for seed in (1.0, 3.0)
    ]
    methods = {
        name: {"learning_rate": 0.1, "threshold": None, "curves": curves}
        for name in ("momentum", "ps-clip")
    }
    norms = {"initial": [0.0, 1.0, None], "final": [4.0]}
    content = {"config": {"seed": 0}, "methods": methods, "norms": norms}
    (tmp_path / "compare.json").write_text(json.dumps(content))
    momentum, ps_clip = read_runs(tmp_path)
    assert labels_of([momentum, ps_clip]) == ["method momentum", "method ps-clip"]
    assert [(r["step"], r["loss"]) for r in momentum.train] == [(1, 2.0), (2, 2.0)]
    assert [r["accuracy"] for r in momentum.test] == [0.1, 2.0]
    assert "norm_histogram" not in momentum.train[0]
    assert [r["norm_histogram"] for r in ps_clip.train] == [{"0": 1}, {"4": 1}]
    assert draw_runs([momentum, ps_clip]).axes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json and compare.json are missing"),
        ({"config.json": "{"}, "config.json: expected JSON, got"),
        ({"config.json": "[]"}, "config.json: expected an object with 'config' in it"),
        ({"config.json": '{"config": {}}'}, "no record in metrics.jsonl yet"),
        (
            {"config.json": '{"config": {}}', "metrics.jsonl": '{"kind"\n{"kind"\n{"kind"\n'},
            "metrics.jsonl, line 1: expected a record",
        ),
        ({"compare.json": "{}"}, "compare.json: expected an object with 'methods' in it"),
    ],
)
def test_what_is_no_run_is_told(content: dict | None, message: str, tmp_path: pathlib.Path):
    for name, text in (content or {}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        plot(PlotConfig(runs=(tmp_path,), out=tmp_path / "plot.png"))
    assert not (tmp_path / "plot.png").exists()


def test_folder_that_cannot_be_written_is_told(tmp_path: pathlib.Path):
    folder = write_run(tmp_path / "run", {"lr": 0.1}, TRAIN)
    with pytest.raises(UsageError, match="--out: cannot write to"):
        plot(PlotConfig(runs=(folder,), out=folder / "config.json" / "plot.png"))
