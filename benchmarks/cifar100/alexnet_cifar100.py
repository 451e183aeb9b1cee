"""Does per-sample clipping train AlexNet on CIFAR-100 better than tuned baselines?

    python -m benchmarks.cifar100.alexnet_cifar100 --data-dir FOLDER --runs FILE

Each of six methods has 12 trials on 45,000 training images. The best by the accuracy on the other
5,000 is trained again from five seeds and tested. Every finished run is a line of --runs; repeat
the command to resume. Prints tables and writes them to benchmarks/results as alexnet_cifar100.json
and .png.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import psclip_optax as psc
from benchmarks.cifar100.alexnet_report import (
    BASELINES,
    FAILED,
    NOTE,
    Method,
    best_of,
    differences_to_markdown,
    draw,
    to_markdown,
    to_tables,
)
from benchmarks.cifar100.many_runs import check_noises
from benchmarks.cifar100.runs import NOISES, Numbers, Run, Setting
from benchmarks.cifar100.tuned import (
    SAMPLE_NORM,
    Options,
    Trainer,
    batch_clipping_grid,
    best_numbers,
    build_trainer,
    growing_grid,
    raised,
    stopped_accuracy,
    test_accuracy,
    timed_once,
    validation_accuracy,
)
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.statistics import paired_difference
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

__all__ = ["BASELINES", "DEFAULTS", "FAILED", "build_methods", "main", "to_markdown"]

RATES = (0.01, 0.025, 0.06, 0.15)
BETA = 2.0
WATCHED = ("momentum", "per-sample, growing")  # methods whose gradient norms' tails are estimated
DEFAULTS = Options(
    RESULTS / "alexnet_cifar100.runs.jsonl",
    width=0.5,
    epochs=28,
    seeds=5,
    together=30,
    dtype="bfloat16",
)


def build_methods(batch_size: int) -> dict[str, Method]:
    """Builds twelve points for each method: twelve rates, or four rates with three thresholds."""
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
        # Seed 0 was used for tuning.
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
    """Times a train step of one run, for each way of computing its gradient."""
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
    """Trains the runs of all noises as one list, and returns records by noise."""
    all_runs = list(itertools.chain(*runs.values()))
    records = iter(train(all_runs))
    return {noise: [next(records) for _ in own] for noise, own in runs.items()}


def mean_of(rows: list[Any]) -> list[float]:
    """Averages column by column; NaN if a run diverged."""
    return np.mean(np.array(rows, float), axis=0).tolist()


def summarize(
    tuned: list[dict[str, Any]], finals: list[dict[str, Any]], chosen: dict[str, Numbers]
) -> dict[str, Any]:
    """Selects the numbers of one noise that the results contain."""
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
      tuning_epochs: the epochs of the trials.
      noises: the corruptions of the training data, one comparison each.
      batch_size: samples in a step.
      markdown: train nothing; print the pages' tables from the file.
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
