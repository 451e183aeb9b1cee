"""Draw the records of several runs in one figure: `psclip plot`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from psclip_optax.training.config.commands import FREE_FIELDS, PlotConfig, UsageError
from psclip_optax.training.output.files import (
    COMPARISON,
    CONFIG,
    METRICS,
    read_json,
    writable_folder,
    write_atomically,
)
from psclip_optax.training.plot.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    tidy,
    to_png,
)
from psclip_optax.training.run.metrics import read_intact_records
from psclip_optax.training.run.norms import bin_edges, histogram

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_STYLES = ("-", "--", ":", "-.")
_MOST_WITH_DETAILS = 3
_RUNNING_MEANS = 25
_LEGEND_WIDTH = 150
_DECADES_OF_NORMS = 6


class Run(NamedTuple):
    """The records of a run.

    Attributes:
      source: the folder of the run, as given.
      config: the configuration of the run.
      train: the records of training, in the order of steps; values that were not recorded are
        missing or None.
      test: the records of evaluations.
    """

    source: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def plot(config: PlotConfig) -> pathlib.Path:
    """Draws runs to a PNG.

    Args:
      config: names the runs and the PNG.

    Returns:
      The path of the figure.

    Raises:
      UsageError: a folder is missing, contains no run or nothing to draw yet, or is damaged, or the
        figure cannot be written.
    """
    runs = [run for folder in config.runs for run in read_runs(folder)]
    png = to_png(draw_runs(runs))
    with writable_folder(config.out.expanduser().absolute().parent) as folder:
        write_atomically(folder / config.out.name, png)
        return folder / config.out.name


def read_runs(folder: pathlib.Path) -> list[Run]:
    """Reads a folder with a run, or with a comparison, where each method is a run.

    Args:
      folder: a folder that `psclip train` or `psclip compare` wrote.

    Returns:
      At least one run.

    Raises:
      UsageError: the folder is missing, or contains neither, no records yet, or damaged files.

    Examples:
      >>> read_runs(pathlib.Path("nowhere"))
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: nowhere: expected a folder that ...
    """
    path = folder.expanduser()
    if (path / CONFIG).exists():
        return [_read_run(path, str(folder))]
    if (path / COMPARISON).exists():
        return _read_comparison(path / COMPARISON, str(folder))
    found = f"{CONFIG} and {COMPARISON} are missing" if path.is_dir() else "there is no such folder"
    raise UsageError(
        f"{folder}: expected a folder that psclip train or psclip compare wrote, but {found}"
    )


def labels_of(runs: list[Run]) -> list[str]:
    """Names runs by the fields in which their configurations differ.

    Args:
      runs: one or more.

    Returns:
      A label for each run: the values of the fields that differ, or the folder if these are not
      enough. Different folders have different labels.

    Examples:
      >>> runs = [Run(name, {"lr": lr, "seed": 0}, [], []) for name, lr in (("a", 1), ("b", 2))]
      >>> labels_of(runs)
      ['lr 1', 'lr 2']
    """
    # A field that an older version or another command lacks does not distinguish runs.
    common = [name for name in runs[0].config if all(name in run.config for run in runs)]
    differing = [
        name
        for name in common
        if name not in FREE_FIELDS and len({str(run.config[name]) for run in runs}) > 1
    ]
    told = [", ".join(_told(name, run.config[name]) for name in differing) for run in runs]
    return [
        _with_source(label, run.source, is_unique=told.count(label) == 1)
        for label, run in zip(told, runs, strict=True)
    ]


def draw_runs(runs: list[Run]) -> Figure:
    """Draws loss, accuracy, clipped share, norms and tail index over steps, and the last norms.

    Args:
      runs: one or more; panels omit runs without records of their quantity.

    Returns:
      A figure outside Matplotlib's global state.

    References:
      Okabe and Ito, "Color Universal Design", 2008, for the colours.
    """
    labels = labels_of(runs)
    figure = Figure(figsize=(14, 7.6 + 0.08 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    band = start = ""
    if len(runs) <= _MOST_WITH_DETAILS:
        band, start = ", 95% interval", ", and at the start (thin)"
    panels: list[tuple[str, Callable[[Axes, list[Run]], None]]] = [
        ("Training loss, running mean", _draw_loss),
        ("Test accuracy", _draw_accuracy),
        ("Share of samples or batches clipped, running mean", _draw_clipped_share),
        ("Gradient norms: median, and 99% quantile (thin)", _draw_norm_quantiles),
        (f"Tail index of norms{band} (▽ light: at least this)", _draw_tail_index),
        (f"Gradient norms at the end{start}", _draw_histograms),
    ]
    for axes, (title, draw) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        draw(axes, runs)
        tidy(axes, title)
        if not axes.has_data():
            _say_nothing_recorded(axes)
    keys = [Line2D([], [], linewidth=2.5, label=labels[i], **_look(i)) for i in range(len(runs))]
    columns = max(1, min(4, len(runs), _LEGEND_WIDTH // max(map(len, labels))))
    figure.legend(handles=keys, loc="outside lower left", ncols=columns, frameon=False, fontsize=10)
    figure.suptitle(_shared_title(runs), x=0.008, ha="left", fontsize=13, weight="bold")
    return figure


def _read_run(folder: pathlib.Path, source: str) -> Run:
    config = read_json(folder / CONFIG, "config")["config"]
    records = read_intact_records(folder / METRICS)
    if not records:
        raise UsageError(
            f"{source}: no record in {METRICS} yet; wait for the run's first --log-every steps"
        )
    train, test = ([r for r in records if r["kind"] == kind] for kind in ("train", "test"))
    return Run(source, config, train, test)


def _read_comparison(path: pathlib.Path, source: str) -> list[Run]:
    result = read_json(path, "methods")
    runs = []
    for name, method in result["methods"].items():
        told = {"method": name, "lr": method["learning_rate"], "alpha": method["threshold"]}
        train = _mean_records(method["curves"], "loss", "clipped_share")
        if name == "ps-clip":
            train[0] |= _norm_record(result["norms"]["initial"])
            train[-1] |= _norm_record(result["norms"]["final"])
        test = _mean_records(method["curves"], "accuracy")
        runs.append(Run(source, result["config"] | told, train, test))
    return runs


def _mean_records(curves: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    means = {name: _floats(curve[name] for curve in curves).mean(axis=0) for name in names}
    return [
        {"step": step, **{name: values[i] for name, values in means.items()}}
        for i, step in enumerate(curves[0]["steps"])
    ]


def _norm_record(norms: list[float | None]) -> dict[str, Any]:
    finite = np.array([norm for norm in norms if norm is not None])
    return {"num_norms": len(finite), "norm_histogram": histogram(finite)}


def _with_source(label: str, source: str, *, is_unique: bool) -> str:
    if not label:
        return source
    return label if is_unique else f"{label} ({source})"


def _told(name: str, value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else "none" if value is None else value
    return f"{name.replace('_', '-')} {shown}"


def _shared_title(runs: list[Run]) -> str:
    shared = [
        str(runs[0].config[name])
        for name in ("dataset", "model")
        if len({run.config.get(name) for run in runs}) == 1 and name in runs[0].config
    ]
    return ", ".join(shared)


def _look(index: int) -> dict[str, Any]:
    style = index // len(_COLOURS) % len(_STYLES)
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _STYLES[style]}


def _floats(rows: Iterable[Any]) -> np.ndarray:
    return np.array(list(rows), float)  # None becomes NaN, where lines have gaps


def _series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Lists steps and values; a missing value is NaN."""
    return _floats(r["step"] for r in records), _floats(r.get(name) for r in records)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Averages over a 25th of the values; NaN if none is recorded."""
    width = 2 * (len(values) // _RUNNING_MEANS // 2) + 1
    is_finite = np.isfinite(values)
    ones = np.ones(width)
    sums = np.convolve(np.where(is_finite, values, 0), ones, mode="same")
    counts = np.convolve(is_finite, ones, mode="same")
    return np.where(is_finite, sums / np.maximum(counts, 1), np.nan)


def _draw_running_means(axes: Axes, runs: list[Run], name: str) -> None:
    for index, run in enumerate(runs):
        steps, values = _series(run.train, name)
        if not np.isfinite(values).any():
            continue
        look = _look(index)
        if len(runs) <= _MOST_WITH_DETAILS:
            axes.plot(steps, values, color=look["color"], alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(values), linewidth=1.8, **look)
    axes.set(xlabel="Step", xlim=(0, None))


def _draw_loss(axes: Axes, runs: list[Run]) -> None:
    _draw_running_means(axes, runs, "loss")
    low, high = axes.dataLim.intervaly
    if 0 < 30 * low < high:  # a loss that falls or explodes by orders of magnitude
        axes.set_yscale("log")


def _draw_clipped_share(axes: Axes, runs: list[Run]) -> None:
    _draw_running_means(axes, runs, "clipped_share")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_accuracy(axes: Axes, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        steps, values = _series(run.test, "accuracy")
        if len(steps):
            axes.plot(steps, values, marker="o", markersize=3, linewidth=1.8, **_look(index))
    axes.set(xlabel="Step", xlim=(0, None))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")


def _draw_norm_quantiles(axes: Axes, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        for name, width in (("norm_q50", 1.8), ("norm_q99", 0.8)):
            steps, values = _series(run.train, name)
            shown = np.where(values > 0, values, np.nan)
            if np.isfinite(shown).any():
                axes.plot(steps, shown, linewidth=width, **_look(index))
    axes.set(xlabel="Step", xlim=(0, None), yscale="log")


def _draw_tail_index(axes: Axes, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        steps, values = _series(run.train, "tail_index")
        lower, upper = (_series(run.train, name)[1] for name in ("tail_lower", "tail_upper"))
        if not np.isfinite(lower).any():
            continue
        look = _look(index)
        axes.plot(steps, values, linewidth=1.8, **look)
        is_light = np.isfinite(lower) & ~np.isfinite(values)
        axes.plot(
            steps[is_light],
            lower[is_light],
            "v",
            color=look["color"],
            markersize=4,
            fillstyle="none",
        )
        if len(runs) <= _MOST_WITH_DETAILS:
            axes.fill_between(steps, lower, upper, color=look["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="Step", xlim=(0, None))
    if not axes.has_data():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.axhline(2, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.text(
        0.01, 2, "below: no finite variance", transform=axes.get_yaxis_transform(), va="center",
        fontsize=8, color="0.4", bbox={"color": "white", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def _draw_histograms(axes: Axes, runs: list[Run]) -> None:
    highest, lowest_share = 0.0, 1.0
    for index, run in enumerate(runs):
        recorded = [r for r in run.train if r.get("norm_histogram")]
        shown = [(recorded[-1], 1.8)] if recorded else []
        if len(runs) <= _MOST_WITH_DETAILS and len(recorded) > 1:
            shown.append((recorded[0], 0.8))
        for record, width in shown:
            shares, edges = _histogram_outline(record)
            axes.stairs(shares, edges, linewidth=width, **_look(index))
            highest = max(highest, edges[-1])
            lowest_share = min(lowest_share, 1 / record["num_norms"])
    axes.set(xlabel="Norm, in bins of half a power of two", ylabel="Share in the bin")
    if highest:
        lowest = max(axes.dataLim.x0, highest / 10**_DECADES_OF_NORMS)
        axes.set(xscale="log", yscale="log", xlim=(lowest, highest), ylim=(lowest_share / 2, 1))


def _histogram_outline(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    counts = record["norm_histogram"]
    bins = range(min(map(int, counts)), max(map(int, counts)) + 1)
    lower, upper = bin_edges(bins)
    shares = np.array([counts.get(str(bin), 0) for bin in bins]) / record["num_norms"]
    return shares, np.append(lower, upper[-1])


def _say_nothing_recorded(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.4")
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
