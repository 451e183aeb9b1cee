"""Tunes, tests and compares methods: grids, winners, verdicts."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console

import psclip_optax as psc
from benchmarks.cifar100.many_runs import moment_rule, run_all
from benchmarks.cifar100.runs import Data, Numbers, Run, Setting, as_json, load_data
from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS
from benchmarks.common.statistics import paired_difference
from benchmarks.common.style import tidy
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.splits import Dataset, Split

# Approximate norms of a sample's and a batch's gradient in the first epochs. A method with smaller
# thresholds makes shorter steps, so its learning rates are larger by that factor.
SAMPLE_NORM, BATCH_NORM = 10.0, 3.0
CLIPPING = ("threshold", "batch_threshold", "scale")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all comparisons on CIFAR-100 share.

    Attributes:
      runs: the file of finished runs; by default that of the published results, so that nothing is
        trained again.
      data_dir: folder with an official archive of CIFAR-100; it is downloaded otherwise.
      out: folder for the table as JSON, and the figure.
      width: multiplies AlexNet's channels and hidden sizes.
      epochs: the length of the tested runs.
      seeds: the number of seeds of the tests, at least 2.
      together: runs that are trained at once; dozens on a GPU, 1 on a CPU.
      dtype: that of the forward and backward pass.
      seconds: the time after which no new runs are started; repeat the command to resume.
      quick: digits, a tiny net and few runs, to check that the benchmark works.
    """

    runs: pathlib.Path
    data_dir: pathlib.Path | None = None
    out: pathlib.Path = RESULTS
    width: float = 0.125
    epochs: int = 6
    seeds: int = 3
    together: int = 1
    dtype: str = "float32"
    seconds: float = float("inf")
    quick: bool = False

    def setting(self, batch_size: int = 128) -> Setting:
        return Setting(self.width, batch_size, augment=not self.quick, dtype=self.dtype)

    def protocol(self) -> dict[str, Any]:
        """Describes how the results were produced."""
        return {name: getattr(self, name) for name in ("width", "epochs", "seeds", "dtype")}

    def rounds(self) -> int:
        """Returns the number of rounds in which steps are timed."""
        return 3 if self.quick else 9


class Trainer(NamedTuple):
    """Trains runs on one data set, or reads finished records."""

    data: Data
    num_classes: int
    image_size: int
    options: Options
    cache: RunsCache

    def __call__(
        self,
        runs: list[Run],
        *,
        seconds: float | None = None,
        automatic: Callable[[Any], psc.AdaptiveThreshold[Any]] = moment_rule,
    ) -> list[dict[str, Any]]:
        """Trains runs, for the given seconds instead of those of the options."""
        options = self.options
        return run_all(
            runs,
            self.data,
            self.num_classes,
            cache=self.cache,
            together=options.together,
            console=Console(),
            seconds=options.seconds if seconds is None else seconds,
            automatic=automatic,
        )


def build_trainer(options: Options) -> Trainer:
    """Builds a trainer on CIFAR-100 (5,000 images choose between trials) or on digits."""
    if options.quick:
        dataset, num_validation = enlarged_digits(), 200
    else:
        dataset, num_validation = load_dataset("cifar100", data_dir=options.data_dir), 5_000
    data = load_data(dataset, num_validation)
    image_size, cache = dataset.image_shape[0], RunsCache(options.runs)
    return Trainer(data, dataset.num_classes, image_size, options, cache)


def growing_grid(
    rates: tuple[float, ...],
    alphas: tuple[float, ...],
    beta: float,
    batch_size: int,
    norm: float = SAMPLE_NORM,
    **other: Any,
) -> list[Numbers]:
    """Combines each rate with each α of τ_k = α k^{1/β}; `norm` is that of clipped gradients."""
    mean_growth = batch_size ** (1 / beta) * beta / (beta + 1)
    return [
        Numbers(rate, threshold=alpha, exponent=1 / beta, **other)
        for alpha in alphas
        for rate in raised(rates, norm / (alpha * mean_growth))
    ]


def batch_clipping_grid(
    rates: tuple[float, ...], thresholds: tuple[float, ...], **other: Any
) -> list[Numbers]:
    return [
        Numbers(rate, batch_threshold=threshold, **other)
        for threshold in thresholds
        for rate in raised(rates, BATCH_NORM / threshold)
    ]


def with_lower(rates: Sequence[float], factors: Sequence[float]) -> tuple[float, ...]:
    """Adds the lowest rate divided by these factors, for heavy pixels with momentum.

    The grid needs them: at rates that are best for the other data, no trial without clipping or
    with batch clipping is better than chance.
    """
    return (*(rates[0] / factor for factor in factors), *rates)


def raised(rates: tuple[float, ...], factor: float) -> list[float]:
    return [rate * max(1.0, factor) for rate in rates]


def validation_accuracy(record: dict[str, Any]) -> float:
    return record["curves"]["validation_accuracy"][-1]


def test_accuracy(record: dict[str, Any]) -> float:
    return record["curves"]["test_accuracy"][-1]


def stopped_accuracy(record: dict[str, Any]) -> float:
    """Reads the test accuracy at the epoch with the best validation accuracy."""
    curves = record["curves"]
    epochs = [i for i, value in enumerate(curves["validation_accuracy"]) if value is not None]
    return curves["test_accuracy"][max(epochs, key=lambda i: curves["validation_accuracy"][i])]


def best_numbers(records: list[dict[str, Any]], runs: list[Run], name: str) -> Numbers:
    own = [(validation_accuracy(r), i) for i, r in enumerate(records) if r["method"] == name]
    return runs[max(own)[1]].numbers


class Tuned(NamedTuple):
    """The results of the methods in one comparison.

    Attributes:
      chosen: the point of each method's grid with the best validation accuracy.
      tested: each method's records of runs with this point, with test seeds.
    """

    chosen: dict[str, Numbers]
    tested: dict[str, list[dict[str, Any]]]

    def described(self) -> dict[str, Any]:
        """Converts the results to JSON."""
        return {
            "machine": next(iter(self.tested.values()))[0]["machine"],
            "chosen": {name: numbers._asdict() for name, numbers in self.chosen.items()},
            "test_accuracies": {
                name: list(map(test_accuracy, records)) for name, records in self.tested.items()
            },
        }

    def described_against(self, ours: str) -> dict[str, Any]:
        """Converts the results to JSON, with the differences of one method to each other one."""
        described = self.described()
        accuracies = described["test_accuracies"]
        return described | {
            "differences": {
                other: paired_difference(accuracies[ours], values)
                for other, values in accuracies.items()
                if other != ours
            },
        }


def tune_and_test(
    grids: dict[str, list[Numbers]],
    make_run: Callable[[str, str, Numbers, int], Run],
    train: Callable[[list[Run]], list[dict[str, Any]]],
    seeds: int,
) -> Tuned:
    """Tunes over each grid with seed 0, and tests the winners with seeds 1 to `seeds`.

    Args:
      grids: the points of each method, the same number for each.
      make_run: (stage, method, numbers, seed) → run; the stage is "tune" or "final".
      train: a function from runs to their records.
      seeds: the number of seeds of the tests.
    """
    trials = [make_run("tune", name, point, 0) for name, grid in grids.items() for point in grid]
    tuned = train(trials)
    chosen = {name: best_numbers(tuned, trials, name) for name in grids}
    records = train(
        [
            make_run("final", name, numbers, seed)
            for name, numbers in chosen.items()
            for seed in range(1, seeds + 1)
        ]
    )
    return Tuned(
        chosen, {name: [one for one in records if one["method"] == name] for name in grids}
    )


def run_length(stage: str, epochs: int) -> int:
    """Returns the epochs of a run; a trial, for tuning only, has half of them."""
    return -(-epochs // 2) if stage == "tune" else epochs


def timed_once(train: Trainer, measure: Callable[[], Any], **step: int) -> dict[str, Any]:
    """Times steps once, and stores the times with the runs of the same machine."""
    return train.cache.once(
        described_steps(train, **step),
        lambda: as_json({"machine": describe_machine(), "ways": measure()}),
    )


def described_steps(train: Trainer, **step: int) -> dict[str, Any]:
    """Describes steps whose times the cache of runs keeps."""
    return {"steps": "alexnet", "width": train.options.width, **step}


def draw_differences(
    rows: list[dict[str, Any]], colours: dict[str, str], label: str, machine: str
) -> Figure:
    """Draws a row for each condition, with a mark for each method compared with ours."""
    figure = Figure(figsize=(10, 1.8 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, colour) in enumerate(colours.items()):
        differences = [row["differences"][name] for row in rows]
        means = [100 * difference["mean"] for difference in differences]
        half = [100 * (d["interval"][1] - d["interval"][0]) / 2 for d in differences]
        heights = np.arange(len(rows)) + 0.2 * (place - 0.5)
        style = {"color": colour, "marker": "os"[place], "linestyle": "none", "capsize": 3}
        axes.errorbar(means, heights, xerr=half, label=f"against {name}", **style)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # Linear up to 2 points: a method that diverges would hide all others.
    low, high = np.clip(axes.get_xlim(), -20, 40)
    axes.set_xscale("symlog", linthresh=2)
    ticks = [tick for tick in (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 40) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    axes.set_xlabel(label)
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=len(colours), frameon=False)
    figure.suptitle(machine, fontsize=10)
    return figure


def verdicts(result: dict[str, Any], name: str) -> dict[str, list[str]]:
    """Sorts conditions by the interval of the difference to a method: above, below, neither."""
    found: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable from": []}
    for row in result["rows"]:
        low, high = row["differences"][name]["interval"]
        word = "above" if low > 0 else "below" if high < 0 else "not distinguishable from"
        found[word].append(row["label"])
    return found


def describe_numbers(numbers: dict[str, Any]) -> str:
    """Formats the learning rate and threshold of numbers from JSON."""
    words = [f"η {numbers['learning_rate']:.3g}"]
    if numbers["scale"]:
        return f"{words[0]}, scale {numbers['scale']:g}"
    symbol = "α" if numbers["exponent"] else "τ"
    for name in ("threshold", "batch_threshold"):
        value = numbers[name]
        if value is not None and value != float("inf"):
            words.append(f"{symbol} {value:g}")
    return ", ".join(words)


def edges(own: dict[str, Any]) -> list[str]:
    """Lists which of a winner's numbers are the smallest or largest of its grid."""
    found = []
    points = [trial["numbers"] for trial in own["trials"]]
    for name in CLIPPING:
        found += edge_of(name, own["chosen"], points)
    beside = [p for p in points if all(p[n] == plain(own["chosen"][n]) for n in CLIPPING)]
    return found + edge_of("learning_rate", own["chosen"], beside)


def edge_of(name: str, chosen: dict[str, Any], points: list[dict[str, Any]]) -> list[str]:
    values = {point[name] for point in points} - {None}
    if len(values) < 2 or plain(chosen[name]) not in (min(values), max(values)):
        return []
    side = "largest" if plain(chosen[name]) == max(values) else "smallest"
    return [f"{side} {name.replace('_', ' ')}"]


def plain(value: float | None) -> float | None:
    """Converts a number to JSON: ∞ becomes null."""
    return None if value == float("inf") else value


def enlarged_digits() -> Dataset:
    """Loads digits enlarged to 16×16 pixels in three channels, AlexNet's smallest images."""
    digits = load_dataset("digits")

    def enlarged(split: Split) -> Split:
        images = np.repeat(np.repeat(split.images, 2, axis=1), 2, axis=2)
        return Split(np.repeat(images, 3, axis=3), split.labels)

    return Dataset(
        digits.name,
        digits.num_classes,
        digits.label_names,
        enlarged(digits.train),
        enlarged(digits.test),
    )
