"""Draw the figure of `psclip compare` from `compare.json`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

# Okabe and Ito's colours, which colour-blind readers can distinguish, without yellow, which is
# faint on white.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
_COLOURS = {"momentum": BLUE, "batch-clip": ORANGE, "ps-clip": GREEN, "ps-clip-median": PURPLE}
_STYLES = {"momentum": "--", "batch-clip": "-.", "ps-clip": "-", "ps-clip-median": ":"}
_INITIAL, _FINAL = SKY, VERMILION
_DPI = 160


def draw_comparison(result: dict[str, Any]) -> Figure:
    """Draws accuracy over steps and over seconds, and the distribution of gradient norms.

    Args:
      result: the result of `compare`, or the content of `compare.json`.

    Returns:
      A figure outside Matplotlib's global state.

    References:
      Okabe and Ito, "Color Universal Design", 2008, for the colours.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, width_ratios=(1, 1, 1.1), wspace=0.03)
    over_steps = figure.add_subplot(grid[0])
    over_seconds = figure.add_subplot(grid[1], sharey=over_steps)
    norms = figure.add_subplot(grid[2])
    methods = result["methods"]
    _draw_accuracy(over_steps, methods, "steps")
    num_seeds = len(methods["ps-clip"]["curves"])
    over_steps.set(xlabel="Step", xlim=(0, None))
    over_steps.set_ylabel(f"Test accuracy (mean ± standard error, {num_seeds} seeds)")
    over_steps.set_ylim(_lowest_shown(methods), None)
    over_steps.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _draw_accuracy(over_seconds, methods, "seconds")
    over_seconds.set(xlabel="Training time (s, log scale)", xscale="log")
    # Within one decade Matplotlib also labels minor ticks, whose labels would overlap.
    over_seconds.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    over_seconds.xaxis.set_major_formatter("{x:g}")
    over_seconds.xaxis.set_minor_formatter(NullFormatter())
    over_seconds.tick_params(labelleft=False)
    _draw_norms(norms, result["norms"], result["config"]["batch_size"])
    handles, labels = over_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=10)
    titles = ("Accuracy by step", "Accuracy by time", "Gradient norms, per-sample clipping")
    for axes, title in zip((over_steps, over_seconds, norms), titles, strict=True):
        tidy(axes, title)
    task = result["task"]
    figure.suptitle(f"{task[0].upper()}{task[1:]}", x=0.008, ha="left", fontsize=13, weight="bold")
    return figure


def to_png(figure: Figure) -> bytes:
    """Renders a figure.

    Args:
      figure: a figure of Matplotlib.

    Returns:
      The bytes of a PNG file.

    Examples:
      >>> to_png(Figure())[1:4]
      b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def tidy(axes: Axes, title: str) -> None:
    """Gives a panel its title, a light grid, and no frame.

    Args:
      axes: the panel.
      title: its title.

    Examples:
      >>> axes = Figure().subplots()
      >>> tidy(axes, "Accuracy")
      >>> axes.get_title(loc="left")
      'Accuracy'
    """
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def survival(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the empirical survival function; heavy tails are straight lines in log-log axes.

    Args:
      values: `[N]`; values that are not finite and positive count, but are not on a logarithmic
        axis.

    Returns:
      The sorted positive values x, and for each the share of all values that are at least x.

    Examples:
      >>> survival(np.array([3.0, 1.0, 0.0, 2.0]))
      (array([1., 2., 3.]), array([0.75, 0.5 , 0.25]))
    """
    ordered = np.sort(values)
    shares = 1 - np.arange(len(ordered)) / len(ordered)
    shown = np.isfinite(ordered) & (ordered > 0)
    return ordered[shown], shares[shown]


def _draw_accuracy(axes: Axes, methods: dict[str, Any], over: str) -> None:
    for name, method in methods.items():
        accuracy, colour = _accuracies(method), _COLOURS[name]
        x = np.mean([curve[over] for curve in method["curves"]], axis=0)
        mean, error = accuracy.mean(axis=0), _standard_error(accuracy)
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
        label = f"{method['label']}: {100 * mean[-1]:.1f} ± {100 * error[-1]:.1f}%"
        axes.plot(x, mean, _STYLES[name], color=colour, linewidth=2, label=label)
        axes.plot(x[-1], mean[-1], "o", color=colour, markersize=5)


def _accuracies(method: dict[str, Any]) -> np.ndarray:
    return np.array([curve["accuracy"] for curve in method["curves"]])


def _standard_error(accuracy: np.ndarray) -> np.ndarray:
    return accuracy.std(axis=0, ddof=1) / np.sqrt(len(accuracy))


def _lowest_shown(methods: dict[str, Any]) -> float:
    """Returns the lowest accuracy to show: the first quarter of the rise is omitted."""
    means = [_accuracies(method).mean(axis=0) for method in methods.values()]
    return min(mean[len(mean) // 4 :].min() for mean in means) - 0.05


def _draw_norms(axes: Axes, norms: dict[str, Any], batch_size: int) -> None:
    low, high = norms["thresholds"]
    label = f"threshold, samples 1 to {batch_size}"
    axes.axvspan(low, high, color=_COLOURS["ps-clip"], alpha=0.18, linewidth=0, label=label)
    largest = high
    for when, colour, label in (
        ("initial", _INITIAL, "at initialisation"),
        ("final", _FINAL, "after training"),
    ):
        x, share = survival(np.array(norms[when], float))
        axes.step(x, share, where="post", color=colour, linewidth=2, label=label)
        largest = max(largest, x.max(initial=0))
    lowest = 0.5 / len(norms["initial"])
    axes.set(xscale="log", yscale="log", ylim=(lowest, 1.5), xlim=(low / 10, 2 * largest))
    axes.set(xlabel="Norm x of a sample's gradient", ylabel="Share of samples with norm ≥ x")
    axes.legend(loc="lower left", frameon=False, fontsize=9)
