"""Summarise the result in `compare.json`, by pure functions."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from psclip_optax.training.config.checks import flag
from psclip_optax.training.config.commands import CompareConfig
from psclip_optax.training.data.register import DATASETS
from psclip_optax.training.data.splits import Dataset, Split
from psclip_optax.training.run.methods import METHODS

_MODEL_TITLES = {
    "mlp": "MLP",
    "small_cnn": "small CNN",
    "alexnet": "AlexNet",
    "resnet18": "ResNet-18",
}
_GRID_OF = {"ps-clip-median": "momentum"}  # whose learning rates it is tuned over


class Estimate(NamedTuple):
    """A mean over seeds and its standard error.

    Attributes:
      mean: the mean.
      standard_error: the sample standard deviation over the root of the number of seeds.
    """

    mean: float
    standard_error: float


def estimate(values: list[float]) -> Estimate:
    """Estimates a mean.

    Args:
      values: at least two.

    Returns:
      The mean and its standard error.

    Examples:
      >>> estimate([1.0, 2.0, 3.0])
      Estimate(mean=2.0, standard_error=0.577...)
    """
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def final_accuracies(method: dict[str, Any]) -> list[float]:
    """Lists the test accuracy of each seed after the last step.

    Args:
      method: an entry of `result["methods"]`.

    Returns:
      One number in [0, 1] for each seed.

    Examples:
      >>> final_accuracies({"curves": [{"accuracy": [0.5, 0.8]}, {"accuracy": [0.4, 0.9]}]})
      [0.8, 0.9]
    """
    return [curve["accuracy"][-1] for curve in method["curves"]]


def difference_to_best_other(methods: dict[str, Any], name: str) -> tuple[str, Estimate]:
    """Compares a method with the best of the others, seed by seed.

    Args:
      methods: `result["methods"]`, two or more, with the same seeds.
      name: one of them.

    Returns:
      The other one's name, and the mean of the differences in accuracy with its standard error.

    Examples:
      >>> def method(*accuracies):
      ...     return {"curves": [{"accuracy": [a]} for a in accuracies]}
      >>> difference_to_best_other({"a": method(0.75, 1.0), "b": method(0.5, 0.75)}, "a")
      ('b', Estimate(mean=0.25, standard_error=0.0))
    """
    others = [other for other in methods if other != name]
    best = max(others, key=lambda other: statistics.fmean(final_accuracies(methods[other])))
    pairs = zip(final_accuracies(methods[name]), final_accuracies(methods[best]), strict=True)
    return best, estimate([own - other for own, other in pairs])


def describe_task(config: CompareConfig) -> str:
    """Names data set, corruption and model in a line.

    Args:
      config: the configuration of the comparison.

    Returns:
      The line.

    Examples:
      >>> describe_task(CompareConfig())
      'digits with 20% label noise and Student-t pixel factors (ν = 1.5), MLP of width 0.5'
    """
    noises = [f"{config.label_noise:.0%} label noise"] * (config.label_noise > 0)
    if config.pixel_df is not None:
        noises.append(f"Student-t pixel factors (ν = {config.pixel_df:g})")
    corruption = f" with {' and '.join(noises)}" if noises else ""
    model = f"{_MODEL_TITLES[config.model]} of width {config.width:g}"
    return f"{DATASETS[config.dataset].title}{corruption}, {model}"


def introduction(
    config: CompareConfig,
    dataset: Dataset,
    train: Split,
    validation: Split,
    units: dict[str, float],
) -> str:
    """Describes the comparison that is about to run.

    Args:
      config: the configuration of the comparison.
      dataset: the data set, whose test split gives the results.
      train: the split to train on.
      validation: the split that was held out.
      units: by clipping method, the initial gradient norm to which its thresholds are relative.

    Returns:
      A few lines.

    Examples:
      >>> from psclip_optax.training.data.datasets import load_dataset
      >>> digits = load_dataset("digits")
      >>> units = {"batch-clip": 2.0, "ps-clip": 8.0}
      >>> print(introduction(CompareConfig(), digits, digits.train, digits.test, units))
      digits with ..., MLP of width 0.5
      1297 training images, corrupted; 500 to validate and 500 to test on, both clean.
      Initial gradient norm (median): 8 of a sample, 2 of a batch's mean.
      9 trials a method, chosen on the validation images; then 5 seeds each, tested; 300 steps ...
    """
    return (
        f"{describe_task(config)}\n"
        f"{len(train.labels)} training images{', corrupted' * _is_corrupted(config)}; "
        f"{len(validation.labels)} to validate and {len(dataset.test.labels)} to test on, both "
        "clean.\n"
        f"Initial gradient norm (median): {units['ps-clip']:.3g} of a sample, "
        f"{units['batch-clip']:.3g} of a batch's mean.\n"
        f"{len(config.momentum_learning_rates)} trials a method, chosen on the validation images; "
        f"then {config.num_seeds} seeds each, tested; {config.steps} steps a run."
    )


def results_table(result: dict[str, Any]) -> Table:
    """Lays out the table of a comparison.

    Args:
      result: what `compare` returned.

    Returns:
      A table of Rich with a row for each method, at most 80 columns wide.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
        caption=(
            "\nMean ± standard error over seeds; the differences are paired, in points.\n"
            "Threshold of per-sample clipping: α of α k^(1/β), β = "
            f"{result['methods']['ps-clip']['beta']:g}, or found while training.\n"
            "Clipped: share of batches or of samples."
        ),
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for heading in (
        "lr",
        "threshold",
        "test\nacc. (%)",
        "vs best\nother",
        "ms per\nstep",
        "clipped",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, method in result["methods"].items():
        accuracy = estimate(final_accuracies(method))
        _, difference = difference_to_best_other(result["methods"], name)
        seconds = statistics.median(curve["median_step_seconds"] for curve in method["curves"])
        clipped = statistics.fmean(curve["mean_clipped_share"] for curve in method["curves"])
        clips = METHODS[name].has_threshold
        is_given = math.isfinite(method["threshold"])
        table.add_row(
            method["label"].replace(", ", ",\n"),
            f"{method['learning_rate']:g}",
            f"{method['threshold']:.3g}" if is_given else "found" if clips else "–",
            f"{100 * accuracy.mean:.1f} ± {100 * accuracy.standard_error:.1f}",
            f"{100 * difference.mean:+.1f} ± {100 * difference.standard_error:.1f}",
            f"{1e3 * seconds:.2f}",
            f"{clipped:.0%}" if clips else "–",
        )
    return table


def verdict(result: dict[str, Any]) -> str:
    """Says which method won, and whether by more than chance.

    Args:
      result: what `compare` returned.

    Returns:
      One sentence.

    Examples:
      >>> def method(label, *accuracies):
      ...     return {"label": label, "curves": [{"accuracy": [a]} for a in accuracies]}
      >>> first, second = method("momentum SGD", 0.75, 1.0), method("batch clipping", 0.5, 0.5)
      >>> print(verdict({"methods": {"momentum": first, "batch-clip": second}}))
      Momentum SGD came out best, 37.5 ± 12.5 points above batch clipping over 2 paired seeds of
      equal steps: more than twice the standard error.
    """
    methods = result["methods"]
    best = max(methods, key=lambda name: statistics.fmean(final_accuracies(methods[name])))
    other, difference = difference_to_best_other(methods, best)
    label = methods[best]["label"]
    comparison = (
        "more than twice the standard error"
        if difference.mean > 2 * difference.standard_error
        else "not more than twice the standard error, so these runs do not tell the two apart"
    )
    return (
        f"{label[0].upper()}{label[1:]} came out best, {100 * difference.mean:.1f} ± "
        f"{100 * difference.standard_error:.1f} points above {methods[other]['label']} over "
        f"{len(methods[best]['curves'])} paired seeds of equal steps: {comparison}."
    )


def edge_notes(result: dict[str, Any]) -> list[str]:
    """Names the chosen values at the edge of their grid, beyond which there may be better ones.

    Args:
      result: what `compare` returned.

    Returns:
      A line for each.

    Examples:
      >>> grid = [{"learning_rate": lr, "threshold": math.inf} for lr in (0.1, 0.2)]
      >>> result = {"methods": {"momentum": {"label": "momentum SGD", **grid[1]}},
      ...           "trials": {"momentum": grid}, "units": {}}
      >>> edge_notes(result)
      ['Note: momentum SGD chose the largest of --momentum-learning-rates, 0.2.']
    """
    notes = []
    for name, method in result["methods"].items():
        for field, unit in (("learning_rate", 1.0), ("threshold", result["units"].get(name, 1.0))):
            values = sorted({trial[field] for trial in result["trials"][name]})
            if len(values) == 1 or values[0] < method[field] < values[-1]:
                continue
            edge = "largest" if method[field] == values[-1] else "smallest"
            owner = _GRID_OF.get(name, name)
            option = flag(f"{owner}-{field}s".replace("-", "_"))
            notes.append(
                f"Note: {method['label']} chose the {edge} of {option}, {method[field] / unit:.3g}."
            )
    return notes


def print_result(result: dict[str, Any], console: Console) -> None:
    """Prints table, verdict and notes.

    Args:
      result: what `compare` returned.
      console: where.
    """
    console.print(results_table(result))
    for line in (verdict(result), *edge_notes(result)):
        console.print(line, highlight=False, soft_wrap=True)


def _is_corrupted(config: CompareConfig) -> bool:
    return config.label_noise > 0 or config.pixel_df is not None
