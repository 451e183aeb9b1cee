"""Does per-sample clipping train AlexNet on CIFAR-100 better than tuned baselines?

    python -m benchmarks.cifar100.alexnet_cifar100 --data-dir FOLDER --runs FILE

Six methods, each with 12 trials on 45,000 training images, the best of which by the accuracy on the
other 5,000 is trained again from five seeds and tested. Every finished run is a line of --runs; the
same command goes on where it was stopped. Prints tables and writes them to benchmarks/results as
alexnet_cifar100.json and .png.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import psclip_optax as psc
from benchmarks.cifar100.many_runs import NOISES, Numbers, Run, Setting, check_noises
from benchmarks.cifar100.tuned import (
    SAMPLE_NORM,
    Options,
    Trainer,
    batch_clipping_grid,
    best_numbers,
    build_trainer,
    describe_numbers,
    edges,
    growing_grid,
    raised,
    stopped_accuracy,
    test_accuracy,
    timed_once,
    validation_accuracy,
)
from benchmarks.common.machine import describe
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.statistics import describe_difference, describe_mean, paired_difference
from benchmarks.common.style import tidy
from benchmarks.common.timing import quartiles
from benchmarks.engine.accumulation import (
    NUM_MICROBATCHES,
    Compiled,
    compiled,
    mean_loss,
    time_windows,
)
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss

BASELINES = ("SGD", "momentum", "batch clipping")
RATES = (0.01, 0.025, 0.06, 0.15)
BETA = 2.0
FAILED = 0.015  # chance is 0.01
WATCHED = ("momentum", "per-sample, growing")  # methods whose tails of gradient norms are estimated
DEFAULTS = Options(
    RESULTS / "alexnet_cifar100.runs.jsonl",
    width=0.5,
    epochs=28,
    seeds=5,
    together=30,
    dtype="bfloat16",
)

NOTE = (
    "Chosen: the best of 12 trials by validation accuracy; tested with other seeds, 95% intervals "
    "of differences paired by seed (Student's t). Stopped early: at the epoch of the best "
    "validation accuracy. The best baseline is chosen by its test accuracy, in its favour. Times "
    "are of one run's steps, interleaved: ratios to the plain gradient's, median (quartiles)."
)


class Method(NamedTuple):
    """The grid of a method, and its look in figures.

    Attributes:
      grid: 12 points.
      colour: in figures.
      marker: in figures.
    """

    grid: tuple[Numbers, ...]
    colour: str
    marker: str


def build_methods(batch_size: int) -> dict[str, Method]:
    """Builds twelve points for each method: rates alone, or four rates with three thresholds."""
    rates = np.geomspace(RATES[0] / 2.5, 2 * RATES[-1], 12).tolist()
    constant = [
        Numbers(rate, threshold=tau)
        for tau in (1.0, 5.0, 25.0)
        for rate in raised(RATES, SAMPLE_NORM / tau)
    ]
    # σ̂ is about the norm itself, and the mean of k^{2/3} over the batch is 0.6 n^{2/3}.
    automatic = [
        Numbers(rate, scale=scale)
        for scale in (0.005, 0.03, 0.2)
        for rate in raised(RATES, 1 / (scale * 0.6 * batch_size ** (2 / 3)))
    ]
    after = batch_clipping_grid(RATES, (0.25, 1.0, 4.0))
    growing = growing_grid(RATES, (0.2, 1.0, 5.0), BETA, batch_size)
    return {
        "SGD": Method(tuple(Numbers(10 * rate, momentum=0.0) for rate in rates), "#999999", "v"),
        "momentum": Method(tuple(map(Numbers, rates)), "#000000", "o"),
        "batch clipping": Method(tuple(after), "#D55E00", "s"),
        "per-sample, constant": Method(tuple(constant), "#56B4E9", "^"),
        "per-sample, growing": Method(tuple(growing), "#0072B2", "D"),
        "per-sample, automatic": Method(tuple(automatic), "#009E73", "P"),
    }


def tuning_runs(methods: dict[str, Method], noise: str, epochs: int, setting: Setting) -> list[Run]:
    return [
        Run("tune", name, noise, numbers, epochs, 0, setting)
        for name, method in methods.items()
        for numbers in method.grid
    ]


def final_runs(
    chosen: dict[str, Numbers], noise: str, epochs: int, seeds: int, setting: Setting
) -> list[Run]:
    return [
        # Seed 0 chose the numbers.
        Run(
            "final",
            name,
            noise,
            numbers,
            epochs,
            seed,
            setting,
            watches_tails=seed == 1 and name in WATCHED,
        )
        for name, numbers in chosen.items()
        for seed in range(1, seeds + 1)
    ]


def time_steps(batch_size: int, train: Trainer) -> Any:
    """Times a train step of one run, for each way to make its gradient."""
    size, num_classes = train.image_size, train.num_classes
    model = build_model("alexnet", num_classes, width=train.options.width)
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch_size, size, size, 3))
    labels = jax.random.randint(key, (batch_size,), 0, num_classes)
    params = model.init(key, images[:1])["params"]
    plain = classification_loss(model)
    momentum = optax.sgd(0.01, momentum=0.9)
    stacked = optax.chain(psc.per_sample_clip(psc.growing_threshold(1.0, BETA)), momentum)

    def loss(params: Any, image: jax.Array, label: Any) -> jax.Array:
        return plain(params, image, label)[0]

    engine = psc.clipped_grad(loss, psc.growing_threshold(1.0, BETA), mode="one_pass")
    ways = {
        "plain": (jax.grad(mean_loss(loss)), momentum),
        "engine": (engine, momentum),
        "vmap": (jax.vmap(jax.grad(loss), (None, 0, 0)), stacked),
    }

    def build(gradient: Any, tx: Any) -> Compiled:
        def step(state: Any, *batch: Any) -> Any:
            params, opt_state = state
            updates, opt_state = tx.update(gradient(params, *batch), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        state = jax.tree.map(jnp.copy, (params, tx.init(params)))
        return Compiled(compiled(step, state, (images, labels)), state, (images, labels))

    cases = {name: build(*way) for name, way in ways.items()}
    seconds = time_windows(cases, train.options.rounds())
    return {
        name: {
            "seconds_quartiles": [q / NUM_MICROBATCHES for q in quartiles(own)],
            "ratio_quartiles": quartiles(
                [t / b for t, b in zip(own, seconds["plain"], strict=True)]
            ),
        }
        for name, own in seconds.items()
    }


def in_one_go(runs: dict[str, list[Run]], train: Trainer) -> dict[str, list[dict[str, Any]]]:
    """Trains the runs of all noises as if they were one list, and returns records by noise."""
    all_runs = list(itertools.chain(*runs.values()))
    records = iter(train(all_runs))
    return {noise: [next(records) for _ in own] for noise, own in runs.items()}


def mean_of(rows: list[Any]) -> list[float]:
    """Averages column by column; NaN where a run diverged."""
    return np.mean(np.array(rows, float), axis=0).tolist()


def summarize(
    tuned: list[dict[str, Any]], finals: list[dict[str, Any]], chosen: dict[str, Numbers]
) -> dict[str, Any]:
    """Selects the figures of one noise that the results keep."""
    methods = {}
    for name, numbers in chosen.items():
        own = [record for record in finals if record["method"] == name]
        curves = [record["curves"]["test_accuracy"] for record in own]
        methods[name] = {
            "chosen": numbers._asdict(),
            "trials": [
                {"numbers": r["numbers"], "validation_accuracy": validation_accuracy(r)}
                for r in tuned
                if r["method"] == name
            ],
            "test_accuracies": list(map(test_accuracy, own)),
            "stopped_accuracies": list(map(stopped_accuracy, own)),
            "test_curves": curves,
            "clipped_share": statistics.fmean(r["curves"]["clipped_share"][-1] for r in own),
            "batch_clipped": statistics.fmean(r["curves"]["batch_clipped"][-1] for r in own),
            "quantiles": {
                when: mean_of([r["curves"]["quantiles"][place] for r in own])
                for when, place in (("first", 0), ("last", -1))
            },
        }
    best = best_of(methods, "test_accuracies")
    best_stopped = best_of(methods, "stopped_accuracies")
    for own in methods.values():
        own["difference"] = paired_difference(
            own["test_accuracies"], methods[best]["test_accuracies"]
        )
        own["stopped_difference"] = paired_difference(
            own["stopped_accuracies"], methods[best_stopped]["stopped_accuracies"]
        )
    tails = {
        record["method"]: record["tails"] for record in finals if record.get("tails") is not None
    }
    return {
        "best_baseline": best,
        "best_stopped_baseline": best_stopped,
        "methods": methods,
        "tails": tails,
    }


def best_of(methods: dict[str, Any], accuracies: str) -> str:
    return max(BASELINES, key=lambda name: statistics.fmean(methods[name][accuracies]))


def to_tables(result: dict[str, Any]) -> list[Table]:
    noises = result["noises"]
    return [
        steps_table(result),
        *(noise_table(result, noise) for noise in noises),
        tails_table(noises),
        edges_table(noises),
    ]


def steps_table(result: dict[str, Any]) -> Table:
    machine = describe(result["steps"]["machine"])
    table = Table(title=machine, caption=NOTE, caption_justify="left")
    table.add_column("gradient of a train step", no_wrap=True)
    for name in ("ms", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in result["steps"]["ways"].items():
        low, middle, high = row["ratio_quartiles"]
        ms = f"{1e3 * row['seconds_quartiles'][1]:.2f}"
        table.add_row(name, ms, f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return table


def noise_table(result: dict[str, Any], noise: str) -> Table:
    found = result["noises"][noise]
    table = Table(title=f"{noise}: test accuracy, %")
    for name in ("method", "chosen"):
        table.add_column(name, no_wrap=True)
    for name in (
        "last epoch",
        f"against {found['best_baseline']} (95%)",
        "stopped early",
        f"against {found['best_stopped_baseline']} (95%)",
        "clipped",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name, own in found["methods"].items():
        clipped = own["batch_clipped"] if name == "batch clipping" else own["clipped_share"]
        table.add_row(
            name,
            describe_numbers(own["chosen"]),
            describe_mean(own["test_accuracies"]),
            "" if name == found["best_baseline"] else describe_difference(own["difference"]),
            describe_mean(own["stopped_accuracies"]),
            ""
            if name == found["best_stopped_baseline"]
            else describe_difference(own["stopped_difference"]),
            f"{clipped:.0%}",
        )
    return table


def tails_table(noises: dict[str, Any]) -> Table:
    table = Table(
        title="tails of the samples' gradient norms, over the training batches of an epoch",
        caption="Index: Hill's estimate with its 95% interval, by psclip_optax.tails; a light tail "
        "has all moments.",
        caption_justify="left",
    )
    for name in ("training data", "method", "epoch"):
        table.add_column(name, no_wrap=True)
    for name in ("tail index", "median", "99%", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for noise, found in noises.items():
        for method, epochs in found["tails"].items():
            for epoch, tail in epochs.items():
                table.add_row(noise, method, epoch, *describe_tail(tail))
    return table


def describe_tail(tail: dict[str, Any] | None) -> tuple[str, str, str, str]:
    if tail is None:
        return "diverged", "", "", ""
    median, _, high, _, largest = tail["quantiles"]
    low, up = tail["interval"]
    index = "light" if tail["index"] is None else f"{tail['index']:.2f} ({low:.2f} to {up:.2f})"
    undecided = " or light" if tail["verdict"] == "undecided" else ""
    return index + undecided, f"{median:.1f}", f"{high:.1f}", f"{largest:.0f}"


def edges_table(noises: dict[str, Any]) -> Table:
    """Lists winners at the edge of their grid, beyond which a better one may lie."""
    table = Table(title="chosen at an edge of the grid")
    for name in ("training data", "method", "chosen", "edge"):
        table.add_column(name, no_wrap=True)
    for noise, found in noises.items():
        for name, own in found["methods"].items():
            for edge in edges(own):
                table.add_row(noise, name, describe_numbers(own["chosen"]), edge)
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the guide's table: test accuracy after the last epoch."""
    ours = "per-sample, growing"
    names = list(result["protocol"]["trials"])
    rows = [["training data", "tail index", *names, "growing − best baseline"]]
    for noise, found in result["noises"].items():
        index, *_ = describe_tail(list(found["tails"][ours].values())[-1])
        accuracies = [describe_mean(found["methods"][name]["test_accuracies"]) for name in names]
        difference = describe_difference(found["methods"][ours]["difference"])
        rows.append([noise, index, *accuracies, difference])
    return markdown_table(rows)


def differences_to_markdown(result: dict[str, Any]) -> str:
    """Writes the differences of per-sample clipping to each baseline, last and stopped early."""
    rows = [["training data", "threshold", "stopped", *(f"− {name}" for name in BASELINES)]]
    for noise, found in result["noises"].items():
        for ours in ("constant", "growing", "automatic"):
            for when, accuracies in (("no", "test_accuracies"), ("early", "stopped_accuracies")):
                own, *others = (
                    found["methods"][name][accuracies]
                    for name in (f"per-sample, {ours}", *BASELINES)
                )
                differences = [describe_difference(paired_difference(own, o)) for o in others]
                rows.append([noise, ours, when, *differences])
    return markdown_table(rows)


def failures_to_markdown(result: dict[str, Any]) -> str:
    """Writes how many of all trials are not above chance."""
    names = list(result["protocol"]["trials"])
    rows = [["training data", *names]]
    for noise, found in result["noises"].items():
        trials = [found["methods"][name]["trials"] for name in names]
        failed = [sum(t["validation_accuracy"] < FAILED for t in own) for own in trials]
        rows.append(
            [noise, *(f"{few} of {len(own)}" for few, own in zip(failed, trials, strict=True))]
        )
    return markdown_table(rows)


def tails_to_markdown(result: dict[str, Any]) -> str:
    rows = [["training data", "method", "epoch", "tail index", "median", "99%", "largest"]]
    rows += [
        [noise, method, epoch, *describe_tail(tail)]
        for noise, found in result["noises"].items()
        for method, epochs in found["tails"].items()
        for epoch, tail in epochs.items()
    ]
    return markdown_table(rows)


def draw(result: dict[str, Any], styles: dict[str, Method]) -> Figure:
    noises = result["noises"]
    figure = Figure(figsize=(14, 3.6 * len(noises) + 0.6), layout="constrained")
    rows = figure.subplots(len(noises), 3, squeeze=False)
    for row, (noise, found) in zip(rows, noises.items(), strict=True):
        draw_curves(row[0], found["methods"], styles, dict.fromkeys(styles, 1.0), "epoch")
        row[0].set_ylabel(f"{noise}: test accuracy, %")
        minutes = {name: seconds_of_epoch(result, name) / 60 for name in styles}
        draw_curves(row[1], found["methods"], styles, minutes, "minutes of training, by the engine")
        name = "per-sample, growing"
        slow = {name: minutes[name] * vmap_ratio(result)}
        draw_curves(row[1], {name: found["methods"][name]}, styles, slow, "", dashed=True)
        draw_trials(row[2], found["methods"], styles)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(styles), frameon=False)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def vmap_ratio(result: dict[str, Any]) -> float:
    steps = result["steps"]["ways"]
    return steps["vmap"]["seconds_quartiles"][1] / steps["engine"]["seconds_quartiles"][1]


def seconds_of_epoch(result: dict[str, Any], name: str) -> float:
    way = "engine" if name.startswith("per-sample") else "plain"
    seconds = result["steps"]["ways"][way]["seconds_quartiles"][1]
    return result["protocol"]["steps_per_epoch"] * seconds


def draw_curves(
    axes: Axes,
    methods: dict[str, Any],
    styles: dict[str, Method],
    unit: dict[str, float],
    label: str,
    *,
    dashed: bool = False,
) -> None:
    for name, own in methods.items():
        curves = 100 * np.array(own["test_curves"], float)
        measured = np.isfinite(curves[0])
        x = unit[name] * (1 + np.flatnonzero(measured))
        mean = curves[:, measured].mean(axis=0)
        error = curves[:, measured].std(axis=0, ddof=1) / len(curves) ** 0.5
        style = {"color": styles[name].colour, "linewidth": 1.6}
        axes.plot(x, mean, "--" if dashed else "-", label="_" if dashed else name, **style)
        axes.fill_between(x, mean - error, mean + error, alpha=0.2, color=styles[name].colour)
        axes.plot(x[-1], mean[-1], styles[name].marker, color=styles[name].colour)
    if label:
        axes.set_xlabel(label)
    tidy(axes)


def draw_trials(axes: Axes, methods: dict[str, Any], styles: dict[str, Method]) -> None:
    for name, own in methods.items():
        rates = [trial["numbers"]["learning_rate"] for trial in own["trials"]]
        values = [100 * trial["validation_accuracy"] for trial in own["trials"]]
        axes.plot(rates, values, styles[name].marker, color=styles[name].colour, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of a trial")
    axes.set_ylabel("validation accuracy, %")
    tidy(axes)


def main(
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS,
    tuning_epochs: int = 8,
    noises: tuple[str, ...] = tuple(NOISES),
    batch_size: int = 128,
    markdown: bool = False,
) -> None:
    """Compares per-sample clipping with tuned baselines, for AlexNet on CIFAR-100.

    Args:
      common: the options of all comparisons on CIFAR-100.
      tuning_epochs: of the trials.
      noises: the corruptions of the training data, one comparison each.
      batch_size: samples in a step.
      markdown: train nothing, and print the pages' tables from the file.
    """
    if markdown:
        result = json.loads((common.out / "alexnet_cifar100.json").read_text())
        print(to_markdown(result), differences_to_markdown(result), sep="\n")
        return
    options = common
    if common.quick:
        options = dataclasses.replace(common, width=0.05, epochs=2, seeds=2, together=12)
        tuning_epochs, batch_size, noises = 1, 32, noises[:1]
    check_noises(noises)
    train, setting = build_trainer(options), options.setting(batch_size)
    methods = build_methods(batch_size)
    trials = {noise: tuning_runs(methods, noise, tuning_epochs, setting) for noise in noises}
    tuned = in_one_go(trials, train)
    chosen = {
        noise: {name: best_numbers(tuned[noise], trials[noise], name) for name in methods}
        for noise in noises
    }
    tests = {
        noise: final_runs(chosen[noise], noise, options.epochs, options.seeds, setting)
        for noise in noises
    }
    tested = in_one_go(tests, train)
    steps = timed_once(train, lambda: time_steps(batch_size, train), batch_size=batch_size)
    result = {
        "machine": tested[noises[0]][0]["machine"],
        "note": NOTE,
        "protocol": {
            **options.protocol(),
            "tuning_epochs": tuning_epochs,
            "trials": {name: len(method.grid) for name, method in methods.items()},
            "batch_size": batch_size,
            "steps_per_epoch": len(train.data.train.images) // batch_size,
        },
        "steps": steps,
        "noises": {
            noise: summarize(tuned[noise], tested[noise], chosen[noise]) for noise in noises
        },
    }
    tables, figure = to_tables(result), draw(result, methods)
    publish(options.out, "alexnet_cifar100", result, tables, figure, width=150)


if __name__ == "__main__":
    tyro.cli(main)
