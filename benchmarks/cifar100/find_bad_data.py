"""Do the most clipped samples have wrong labels?

    python -m benchmarks.cifar100.find_bad_data --data-dir FOLDER

AlexNet is trained on CIFAR-100 with a fifth of the labels wrong, with the automatic threshold and
without clipping. Samples are ranked by their mean scale, median norm or mean loss over the epochs
so far, as in `psclip outliers`. Each order is evaluated by the area under its ROC curve: the
probability that a wrong label ranks before a right one. Every finished run is a line of --runs;
repeat the command to resume. Prints a table and writes it to benchmarks/results as
find_bad_data.json and .png.
"""

from __future__ import annotations

import math
import pathlib
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.cifar100.tuned import enlarged_digits
from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.statistics import interval, paired_difference
from benchmarks.common.style import tidy
from psclip_optax.tails import most_clipped
from psclip_optax.training.config.commands import MethodName, TaskConfig
from psclip_optax.training.data.corruptions import with_label_noise
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.pipeline import iterate
from psclip_optax.training.data.splits import Dataset, random_generator
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.run.methods import Hyperparams
from psclip_optax.training.run.trainer import (
    build_evaluation,
    build_task_model,
    build_trainer,
    dropout_key,
    training_batches,
)
from psclip_optax.training.steps import linen_eval_step

NOISE = 0.2
SCORES = ("scale", "norm", "loss", "random order")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of the samples that one looks at
COLOURS = dict(zip(SCORES, ("#0072B2", "#D55E00", "#009E73", "#888888"), strict=True))
NOTE = (
    "Area under the ROC curve of finding wrong labels, in %, mean over seeds (95% interval by "
    "Student's t). Found: share of wrong labels among the first 10 % of the samples, in %."
)


class Method(NamedTuple):
    """A training method, with the best rates of its kind in clipping_map with wrong labels.

    Attributes:
      name: a method of psclip.
      learning_rate: before the cosine schedule.
      alpha: the threshold, if any.
    """

    name: MethodName
    learning_rate: float
    alpha: float


METHODS = {
    "automatic threshold": Method("ps-clip-median", 0.04, 1.0),
    "no clipping": Method("ps-clip-constant", 0.02, math.inf),
}


def train(
    method: Method, dataset: Dataset, config: TaskConfig, epochs: int
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the records of the samples, [steps, n] each, and the test accuracy."""
    num_steps = last_step_of(epochs, dataset, config)
    model = build_task_model(config, dataset)
    trainer = build_trainer(method.name, model, dataset, config, num_steps, return_samples=True)
    state = trainer.init(config.seed, Hyperparams(method.learning_rate, method.alpha, config.beta))
    batches = training_batches(dataset.train, dataset, config, config.seed)
    key, recorded = dropout_key(config.seed), []
    for _, batch in iterate(batches, 0, num_steps):
        state, metrics = trainer.step(state, key, batch)
        recorded.append(metrics["samples"])
    eval_step = linen_eval_step(classification_loss(model), has_aux=True)
    accuracy = build_evaluation(eval_step, dataset.test, dataset)(state.params)["accuracy"]
    recorded = jax.device_get(recorded)
    return {name: np.stack([step[name] for step in recorded]) for name in recorded[0]}, accuracy


def last_step_of(epochs: int, dataset: Dataset, config: TaskConfig) -> int:
    return -(-epochs * len(dataset.train.labels) // config.batch_size)


def scores_of(records: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Returns scores, [N] each, that are larger for more suspicious samples."""
    found = most_clipped(*(records[name] for name in ("index", "scale", "norm", "loss")))
    order = np.argsort(found.index)
    assert found.mean_loss is not None
    return {
        "scale": -found.mean_scale[order],
        "norm": found.median_norm[order],
        "loss": found.mean_loss[order],
        "random order": random_generator(seed, "random order").random(len(order)),
    }


def judge(
    records: dict[str, np.ndarray], is_wrong: np.ndarray, last_steps: list[int], seed: int
) -> dict[str, Any]:
    """Returns the areas after each epoch, and the shares of wrong labels after the last."""
    areas: dict[str, list[float]] = {name: [] for name in SCORES}
    scores: dict[str, np.ndarray] = {}
    for last in last_steps:
        so_far = {name: values[:last] for name, values in records.items()}
        scores = scores_of(so_far, seed)
        for name, own in scores.items():
            areas[name].append(float(roc_auc_score(is_wrong, comparable(own))))
    found = {name: shares_found(is_wrong, own) for name, own in scores.items()}
    return {"areas": areas, "found": found}


def comparable(scores: np.ndarray) -> np.ndarray:
    """Returns ranks of the scores, ties equal, because scikit-learn refuses ∞."""
    return np.unique(scores, return_inverse=True)[1]


def shares_found(is_wrong: np.ndarray, scores: np.ndarray) -> list[float]:
    """Returns the share of wrong labels among the first samples, for each of SHARES.

    Ties are in the order of the samples, which is unrelated to their labels.
    """
    ordered = is_wrong[np.argsort(-scores, kind="stable")]
    return [float(ordered[: max(1, round(share * len(ordered)))].mean()) for share in SHARES]


def run_once(
    label: str, dataset: Dataset, config: TaskConfig, epochs: int, cache: RunsCache
) -> dict[str, Any]:
    method = METHODS[label]

    def find() -> dict[str, Any]:
        labels = dataset.train.labels
        wrong = labels != with_label_noise(labels, NOISE, dataset.num_classes, config.seed)
        records, accuracy = train(method, dataset, config, epochs)
        last_steps = [last_step_of(epoch + 1, dataset, config) for epoch in range(epochs)]
        judged = judge(records, wrong, last_steps, config.seed)
        return judged | {
            "test_accuracy": accuracy,
            "share_wrong": float(wrong.mean()),
            "machine": describe_machine(),
        }

    # A run's JSON spells ∞ as a word.
    numbers = method._asdict() | {"alpha": str(method.alpha)}
    told = {name: getattr(config, name) for name in ("width", "batch_size", "augment", "seed")}
    return cache.once({"method": label, **numbers, **told, "epochs": epochs, "noise": NOISE}, find)


def row_of(label: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    areas = {name: [run["areas"][name] for run in runs] for name in SCORES}
    last = {name: [own[-1] for own in areas[name]] for name in SCORES}
    best = max(SCORES, key=lambda name: statistics.fmean(last[name]))
    return {
        "method": label,
        "learning_rate": METHODS[label].learning_rate,
        "areas": areas,
        "found": {name: [run["found"][name] for run in runs] for name in SCORES},
        "test_accuracies": [run["test_accuracy"] for run in runs],
        "share_wrong": statistics.fmean(run["share_wrong"] for run in runs),
        "best": best,
        "best_against": {
            name: paired_difference(last[best], last[name]) for name in SCORES if name != best
        },
    }


def final_areas(row: dict[str, Any], name: str) -> list[float]:
    return [own[-1] for own in row["areas"][name]]


def describe_areas(areas: list[float]) -> str:
    low, high = interval(areas)
    return f"{100 * statistics.fmean(areas):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def to_cells(result: dict[str, Any]) -> list[list[str]]:
    """Makes the table's rows; the first is the header."""
    header = ["training", "order", "after 1 epoch", "after all", "found in the first 10 %"]
    rows = [header]
    place = SHARES.index(0.1)
    for row in result["rows"]:
        for name in SCORES:
            found = [own[place] for own in row["found"][name]]
            rows.append(
                [
                    row["method"],
                    name,
                    describe_areas([own[0] for own in row["areas"][name]]),
                    describe_areas(final_areas(row, name)),
                    describe_areas(found),
                ]
            )
    return rows


def to_table(result: dict[str, Any]) -> Table:
    header, *rows = to_cells(result)
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in header:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*cells, end_section=cells[1] == SCORES[-1])
    return table


def to_markdown(result: dict[str, Any]) -> str:
    return markdown_table(to_cells(result))


def verdict(row: dict[str, Any]) -> str:
    """Names the best order of a row, and its lead."""
    against = "; ".join(
        f"{name} {100 * own['mean']:+.1f} ({100 * own['interval'][0]:+.1f} to "
        f"{100 * own['interval'][1]:+.1f})"
        for name, own in row["best_against"].items()
    )
    return f"With {row['method']}, {row['best']} is the best order, in points against {against}."


def draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, style in zip(result["rows"], ("-", "--"), strict=True):
        for name in SCORES:
            if row["method"] == "no clipping" and name in ("scale", "random order"):
                continue  # a scale that is always 1 ranks nothing
            look = {"color": COLOURS[name], "linestyle": style}
            label = f"{name}, {row['method']}" if name != "random order" else name
            areas = 100 * np.array(row["areas"][name])
            epochs = np.arange(1, areas.shape[1] + 1)
            left.plot(epochs, areas.mean(axis=0), marker="o", markersize=3, label=label, **look)
            left.fill_between(
                epochs, areas.min(axis=0), areas.max(axis=0), color=COLOURS[name], alpha=0.15, lw=0
            )
            found = 100 * np.array(row["found"][name]).mean(axis=0)
            right.plot(100 * np.array(SHARES), found, marker="o", markersize=3, **look)
    left.set(xlabel="epochs recorded", ylabel="area under the ROC curve, % (mean and range)")
    right.set(xlabel="samples looked at, %, in this order", ylabel="wrong labels among them, %")
    for axes in (left, right):
        tidy(axes)
    left.set_ylim(45, 101)
    right.set_ylim(0, 101)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def main(
    data_dir: pathlib.Path | None = None,
    runs: pathlib.Path = RESULTS / "find_bad_data.runs.jsonl",
    out: pathlib.Path = RESULTS,
    width: float = 0.125,
    epochs: int = 6,
    seeds: int = 3,
    quick: bool = False,
) -> None:
    """Do the most clipped samples have wrong labels?

    Args:
      data_dir: folder with an official archive of CIFAR-100; it is downloaded otherwise.
      runs: the file of finished runs.
      out: folder for the table as JSON, and the figure.
      width: multiplies AlexNet's channels and hidden sizes.
      epochs: the epochs of every run.
      seeds: the number of seeds of the noise, the parameters and the order, at least 2.
      quick: digits, a tiny net and few runs, to check that the benchmark works.
    """
    batch_size = 128
    if quick:
        width, epochs, seeds, batch_size = 0.05, 2, 2, 32
    dataset = enlarged_digits() if quick else load_dataset("cifar100", data_dir=data_dir)
    cache, console = RunsCache(runs), Console(stderr=True)
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in METHODS}
    for seed in range(seeds):
        config = TaskConfig(
            model="alexnet",
            width=width,
            batch_size=batch_size,
            label_noise=NOISE,
            augment=not quick,
            seed=seed,
        )
        for label in METHODS:
            found[label].append(run_once(label, dataset, config, epochs, cache))
            console.print(f"{label}, seed {seed}: done", highlight=False)
    result = {
        "machine": found[next(iter(METHODS))][0]["machine"],
        "note": NOTE,
        "protocol": {
            "width": width,
            "batch_size": batch_size,
            "epochs": epochs,
            "seeds": seeds,
            "noise": NOISE,
            "shares": SHARES,
        },
        "rows": [row_of(label, own) for label, own in found.items()],
    }
    publish(out, "find_bad_data", result, [to_table(result)], draw(result), width=120)
    for row in result["rows"]:
        Console(soft_wrap=True).print(verdict(row), highlight=False)


if __name__ == "__main__":
    tyro.cli(main)
