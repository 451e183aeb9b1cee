"""Where should a threshold be that nobody chose?

    python -m benchmarks.thresholds.auto_threshold

Small nets on digits, clean, with wrong labels and with heavy-tailed pixels, and regressions with
Gaussian and Student-t noise; momentum SGD and AdamW; batches of 32 to 512. The candidates that need
no number, `psc.auto_threshold` among them, get the learning rates of no clipping; batch clipping
and a fixed threshold are tuned over both. Prints a table and writes it to benchmarks/results as
auto_threshold.json and .png. With --runs a folder keeps what is finished, and the same command goes
on where it was stopped.
"""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

import psclip_optax as psc
from benchmarks.cifar100.runs import NOISES
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.thresholds.auto_report import COLOURS, NOTE, draw, to_rows, to_table
from benchmarks.thresholds.auto_rules import BATCH, FIXED, METHODS, NONE
from psclip_optax.training.data.corruptions import with_label_noise, with_student_t_pixels
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.splits import train_validation_split
from psclip_optax.training.output.files import to_json, write_atomically

RATES = {"momentum": (0.01, 0.03, 0.1, 0.3, 1.0), "AdamW": (0.001, 0.003, 0.01, 0.03, 0.1)}
REGRESSION_FACTOR = 0.3  # of the rates of momentum SGD, whose gradients are as large as the targets
STEPS = {32: 300, 128: 200, 512: 100}
HIDDEN = 64
DF = 1.5  # degrees of freedom of Student's t
FEATURES, NUM_TRAIN, NUM_HELD_OUT = 20, 1200, 800  # of the regressions
NUM_VALIDATION = 300
# Scores that a method reaches without having learned anything; 0 and 0.1 are chance.
CHANCE = 0.2
TUNED = (NONE, BATCH, FIXED)  # which the others are compared with


class Cell(NamedTuple):
    """One condition.

    Attributes:
      data: one of the conditions below.
      optimizer: one of RATES.
      batch_size: one of STEPS.
    """

    data: str
    optimizer: str
    batch_size: int

    def label(self) -> str:
        return f"{self.data}, {self.optimizer}, n = {self.batch_size}"

    @property
    def is_regression(self) -> bool:
        return self.data in REGRESSIONS

    def rates(self) -> tuple[float, ...]:
        is_scaled = self.is_regression and self.optimizer == "momentum"
        return tuple(
            rate * (REGRESSION_FACTOR if is_scaled else 1) for rate in RATES[self.optimizer]
        )


class Setting(NamedTuple):
    """The settings that a program is compiled for.

    Attributes:
      method: one of METHODS.
      optimizer: one of RATES.
      batch_size: samples in a step.
      steps: the steps of each run.
      num_outputs: the outputs of the net; 1 for a regression.
    """

    method: str
    optimizer: str
    batch_size: int
    steps: int
    num_outputs: int


class Split(NamedTuple):
    """Inputs [N, features], and labels or targets [N]."""

    inputs: Any
    targets: Any


class Data(NamedTuple):
    """The data that one seed trains on, and the held-out data."""

    train: Split
    validation: Split
    test: Split


REGRESSIONS = {"Gaussian targets": None, "heavy targets": DF}
CLASSIFICATIONS = ("clean", "20% labels", "40% labels", "heavy pixels")
CONDITIONS = (*CLASSIFICATIONS, *REGRESSIONS)


def build_cells() -> list[Cell]:
    """Lists all data with batches of 32 and 128 and with AdamW; extremes with larger batches."""
    kinds = (("momentum", 32), ("momentum", 128), ("AdamW", 128))
    cells = [Cell(data, *kind) for kind in kinds for data in CONDITIONS]
    return cells + [Cell(data, "momentum", 512) for data in ("clean", "heavy pixels")]


def digits(condition: str, seed: int) -> Data:
    dataset, noise = load_dataset("digits"), NOISES[condition]
    train, validation = train_validation_split(dataset.train, num_validation=NUM_VALIDATION, seed=0)
    labels = with_label_noise(train.labels, noise.label_noise, dataset.num_classes, seed)
    images = train.images
    if noise.pixel_df is not None:
        images = with_student_t_pixels(images, noise.pixel_df, seed)

    def flat(images: np.ndarray, labels: np.ndarray) -> Split:
        unit = images * np.float32(1 / 255 if images.dtype == np.uint8 else 1)
        normalized = (unit - dataset.pixel_mean) / dataset.pixel_std
        return Split(normalized.reshape(len(unit), -1).astype(np.float32), labels)

    test = flat(dataset.test.images, dataset.test.labels)
    return Data(flat(images, labels), flat(validation.images, validation.labels), test)


def regression(df: float | None, seed: int) -> Data:
    """Makes targets tanh(2 u·x) + 0.3 x_1 with |u| = 1, with noise / 2 in the training data."""
    weights = np.random.default_rng(0).normal(size=FEATURES)
    weights *= 2 / np.linalg.norm(weights)
    rng = np.random.default_rng(seed + 1)
    inputs = rng.normal(size=(NUM_TRAIN + 2 * NUM_HELD_OUT, FEATURES)).astype(np.float32)
    targets = np.tanh(inputs @ weights) + 0.3 * inputs[:, 0]
    noise = rng.normal(size=NUM_TRAIN) if df is None else rng.standard_t(df, NUM_TRAIN)
    targets[:NUM_TRAIN] += noise / 2
    parts = np.split(np.arange(len(inputs)), [NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT])
    return Data(*(Split(inputs[own], targets[own].astype(np.float32)) for own in parts))


def load(condition: str, seeds: int) -> Data:
    """Loads the data of all seeds, stacked on the first axis."""
    own = [
        regression(REGRESSIONS[condition], seed)
        if condition in REGRESSIONS
        else digits(condition, seed)
        for seed in range(seeds)
    ]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *own)


def initial_params(key: jax.Array, sizes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(own, (into, out)) * (2 / into) ** 0.5, jnp.zeros(out))
        for own, into, out in zip(keys, sizes, sizes[1:], strict=False)
    ]


def outputs(params: Any, inputs: jax.Array) -> jax.Array:
    *hidden, (kernel, bias) = params
    for own_kernel, own_bias in hidden:
        inputs = jax.nn.relu(inputs @ own_kernel + own_bias)
    return inputs @ kernel + bias


def loss(params: Any, inputs: jax.Array, target: jax.Array) -> jax.Array:
    """Computes the loss of one sample: cross-entropy of a label, or half the squared error."""
    out = outputs(params, inputs)
    if jnp.issubdtype(target.dtype, jnp.floating):
        return jnp.square(out[0] - target) / 2
    return optax.softmax_cross_entropy_with_integer_labels(out, target)


def score(params: Any, split: Split) -> jax.Array:
    """Computes accuracy, or R² where it is above 0; 0 where it is not finite."""
    out = outputs(params, split.inputs)
    if jnp.issubdtype(split.targets.dtype, jnp.floating):
        errors = jnp.mean(jnp.square(out[:, 0] - split.targets))
        found = jnp.maximum(1 - errors / jnp.var(split.targets), 0)
    else:
        found = jnp.mean(jnp.argmax(out, axis=-1) == split.targets)
    return jnp.where(jnp.all(jnp.isfinite(out)), found, 0)


class Scores(NamedTuple):
    """The scores on validation and test data."""

    validation: Any
    test: Any


def build_optimizer(name: str, learning_rate: Any, steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(1.0, steps)
    inner = (
        optax.sgd(learning_rate, momentum=0.9)
        if name == "momentum"
        else optax.adamw(learning_rate, weight_decay=1e-3)
    )
    return optax.chain(inner, optax.scale_by_schedule(schedule))


def train(setting: Setting, rate: Any, threshold: Any, key: jax.Array, data: Data) -> Scores:
    """Trains one run; the threshold is in units of the median norm in the first batch.

    Every rule clips the first batch by its own norms, so that what differs is where it clips.
    """
    method = METHODS[setting.method]
    init_key, order_key = jax.random.split(key)
    params = initial_params(init_key, (data.train.inputs.shape[1], HIDDEN, setting.num_outputs))
    tx = build_optimizer(setting.optimizer, rate, setting.steps)
    value_and_grad = psc.clipped_value_and_grad(loss, jnp.inf, return_stats=True)

    def batch_of(step: Any) -> Split:
        own_key = jax.random.fold_in(order_key, step)
        chosen = jax.random.randint(own_key, (setting.batch_size,), 0, len(data.train.inputs))
        return Split(data.train.inputs[chosen], data.train.targets[chosen])

    first_norms = value_and_grad(params, *batch_of(0))[-1].norms
    limit = threshold * jnp.median(first_norms)
    rule = method.rule(limit, setting.batch_size)

    def step(carry: Any, index: jax.Array) -> Any:
        params, opt_state, state = carry
        threshold = rule.threshold(state)
        _, grads, stats = value_and_grad(params, *batch_of(index), threshold=threshold)
        before = jax.tree.map(lambda x: jnp.where(index == 0, 0, x), state)  # not twice the first
        state = rule.update(before, stats.norms)
        if method.clips_batch:
            grads = optax.clip_by_global_norm(limit).update(grads, optax.EmptyState())[0]
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    start = params, tx.init(params), rule.update(rule.init(), first_norms)
    params = lax.scan(step, start, jnp.arange(setting.steps))[0][0]
    return Scores(score(params, data.validation), score(params, data.test))


@functools.cache
def build_program(setting: Setting) -> Callable[..., Scores]:
    """Builds (rates, thresholds, keys, data) → scores for all runs of a method.

    The scores are [rates, thresholds, seeds].
    """
    over_seeds = jax.vmap(functools.partial(train, setting), (None, None, 0, 0))
    over_thresholds = jax.vmap(over_seeds, (None, 0, None, None))
    return jax.jit(jax.vmap(over_thresholds, (0, None, None, None)))


def run_method(name: str, cell: Cell, rates: tuple[float, ...], steps: int, data: Data) -> Any:
    num_outputs = 1 if cell.is_regression else 10
    program = build_program(Setting(name, cell.optimizer, cell.batch_size, steps, num_outputs))
    keys = jax.vmap(jax.random.key)(jnp.arange(len(data.train.inputs)))
    scores = program(jnp.asarray(rates), jnp.asarray(METHODS[name].thresholds), keys, data)
    return Scores(*(np.asarray(x).tolist() for x in scores))._asdict()


def run_cell(cell: Cell, seeds: int, quick: bool) -> dict[str, Any]:
    names = [*COLOURS, BATCH] if quick else METHODS
    steps = 20 if quick else STEPS[cell.batch_size]
    rates = cell.rates()[:2] if quick else cell.rates()
    data = load(cell.data, seeds)
    return {
        "cell": cell._asdict(),
        "label": cell.label(),
        "machine": describe_machine(),
        "steps": steps,
        "rates": rates,
        "scores": {name: run_method(name, cell, rates, steps, data) for name in names},
    }


def described(row: dict[str, Any]) -> dict[str, Any]:
    """Finds each method's winner, its difference to the best tuned one, and its failures.

    The means are of all trials, [rates, thresholds].
    """
    tuned = {name: _winner(row, name) for name in row["scores"]}
    best = max(statistics.fmean(tuned[name]["test"]) for name in TUNED)
    differences = {name: statistics.fmean(winner["test"]) - best for name, winner in tuned.items()}
    trained = np.max(
        [np.max(row["scores"][name]["test"], axis=1) for name in (BATCH, FIXED)], axis=0
    )
    failures = {
        name: int(np.sum((np.max(scores["test"], axis=1) < CHANCE) & (trained >= CHANCE)))
        for name, scores in row["scores"].items()
    }
    return {
        **{name: row[name] for name in ("cell", "label", "steps", "rates")},
        "best": best,
        "tuned": tuned,
        "differences": differences,
        "failures": failures,
        "test_means": {
            name: np.mean(scores["test"], axis=-1).round(4).tolist()
            for name, scores in row["scores"].items()
        },
    }


def _winner(row: dict[str, Any], name: str) -> dict[str, Any]:
    means = np.mean(row["scores"][name]["validation"], axis=-1)
    rate, threshold = np.unravel_index(np.argmax(means), means.shape)
    return {
        "learning_rate": row["rates"][rate],
        "threshold": METHODS[name].thresholds[threshold],
        "test": row["scores"][name]["test"][rate][threshold],
    }


def kept(path: pathlib.Path | None, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads a file, or computes its content and writes it."""
    if path is None:
        return compute()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(compute()).encode())
    return json.loads(path.read_text())


def to_markdown(result: dict[str, Any]) -> str:
    return markdown_table([["condition", "best", *result["rows"][0]["tuned"]], *to_rows(result)])


def main(
    out: pathlib.Path = RESULTS,
    runs: pathlib.Path | None = None,
    seeds: int = 4,
    quick: bool = False,
) -> None:
    """Compares thresholds that need no number with tuned ones.

    Args:
      out: folder for auto_threshold.json and auto_threshold.png.
      runs: the folder of finished conditions; none by default.
      seeds: the number of seeds of each trial.
      quick: one condition and few short runs, to check that the benchmark works.
    """
    cells = build_cells()
    if quick:
        cells, seeds = [Cell("heavy targets", "momentum", 32)], 2
    rows = []
    for cell in cells:
        name = cell.label().replace(" ", "_").replace("%", "") + ".json"
        path = None if runs is None else runs / name
        rows.append(kept(path, functools.partial(run_cell, cell, seeds, quick)))
    result = {
        "machine": rows[0]["machine"],
        "note": NOTE,
        "protocol": {"seeds": seeds, "hidden": HIDDEN, "student_t_df": DF},
        "rows": list(map(described, rows)),
    }
    publish(out, "auto_threshold", result, [to_table(result)], draw(result), width=150)


if __name__ == "__main__":
    tyro.cli(main)
