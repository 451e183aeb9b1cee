"""How should a threshold be set automatically?

    python -m benchmarks.thresholds.auto_threshold

Small nets are trained on digits, clean, with wrong labels and with heavy-tailed pixels, and on
regressions with Gaussian and Student-t noise. Held out from the choice of the automatic threshold
are other noises of both, a language model with heavy-tailed losses, and REINFORCE with heavy-tailed
returns. Optimizers are momentum SGD and AdamW, batch sizes 32 to 512. Candidates that need no
number, including `psc.auto_threshold`, are tuned over the learning rates; batch clipping and a
fixed threshold are tuned over thresholds as well. Prints a table and writes it to
benchmarks/results as auto_threshold.json and .png. With --runs a folder stores finished conditions;
repeat the command to resume.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

import psclip_optax as psc
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.statistics import paired_difference
from benchmarks.thresholds.auto_report import NOTE, draw, tables
from benchmarks.thresholds.auto_rules import (
    BATCH,
    FIXED,
    METHODS,
    TUNED,
    Candidate,
    initial_state,
    threshold_of,
    updated,
)
from benchmarks.thresholds.auto_tasks import (
    CHOSEN_ON,
    CONDITIONS,
    HELD_OUT,
    KINDS,
    Data,
    Split,
    features,
    initial_params,
    load,
    outputs,
    score,
)
from psclip_optax.training.output.files import to_json, write_atomically

RATES = {"momentum": (0.01, 0.03, 0.1, 0.3, 1.0), "AdamW": (0.001, 0.003, 0.01, 0.03, 0.1)}
REGRESSION_FACTOR = 0.3  # of momentum SGD's rates: gradients are as large as the targets
STEPS = {32: 300, 128: 200, 512: 100}
HIDDEN = 64


class Cell(NamedTuple):
    """One condition.

    Attributes:
      data: one of CONDITIONS.
      optimizer: one of RATES.
      batch_size: one of STEPS.
    """

    data: str
    optimizer: str
    batch_size: int

    def label(self) -> str:
        return f"{self.data}, {self.optimizer}, n = {self.batch_size}"

    def rates(self) -> tuple[float, ...]:
        is_scaled = CONDITIONS[self.data].kind == "regression" and self.optimizer == "momentum"
        return tuple(
            rate * (REGRESSION_FACTOR if is_scaled else 1) for rate in RATES[self.optimizer]
        )

    def describe(self) -> dict[str, Any]:
        return self._asdict() | {
            "is_heavy": CONDITIONS[self.data].is_heavy,
            "is_held_out": self.data in HELD_OUT,
        }


class Setting(NamedTuple):
    """The settings for which a program is compiled.

    Attributes:
      kind: one of KINDS.
      optimizer: one of RATES.
      batch_size: samples in a step.
      steps: the steps of each run.
    """

    kind: str
    optimizer: str
    batch_size: int
    steps: int


def build_cells() -> list[Cell]:
    """Lists the cells; those on which the automatic threshold was chosen come first."""
    kinds = (("momentum", 32), ("momentum", 128), ("AdamW", 128))
    cells = [Cell(data, *kind) for kind in kinds for data in CHOSEN_ON]
    cells += [Cell(data, "momentum", 512) for data in ("clean", "heavy pixels")]
    cells += [Cell(data, *kind) for data in HELD_OUT for kind in kinds[1:]]
    return [*cells, Cell("10% labels", "momentum", 32)]


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


def train(setting: Setting, rate: Any, key: jax.Array, data: Data, candidate: Candidate) -> Scores:
    """Trains one run.

    Every rule clips the first batch by its own norms, so rules differ only in their thresholds.
    """
    kind, n = KINDS[setting.kind], setting.batch_size
    init_key, order_key = jax.random.split(key)
    num_features = features(data.train.inputs[:1]).shape[1]
    params = initial_params(init_key, (num_features, HIDDEN, kind.num_outputs))
    tx = build_optimizer(setting.optimizer, rate, setting.steps)

    def loss(params: Any, inputs: jax.Array, target: Any) -> jax.Array:
        return kind.loss(outputs(params, inputs), target)

    value_and_grad = psc.clipped_value_and_grad(loss, jnp.inf, return_stats=True)

    def batch_of(step: Any) -> Split:
        own_key = jax.random.fold_in(order_key, step)
        chosen = jax.random.randint(own_key, (n,), 0, len(data.train.inputs))
        return jax.tree.map(lambda x: x[chosen], data.train)

    first_norms = value_and_grad(params, *batch_of(0))[-1].norms
    unit = jnp.median(first_norms)

    def step(carry: Any, index: jax.Array) -> Any:
        params, opt_state, state = carry
        threshold = threshold_of(candidate, candidate.sample * unit, state, n)
        _, grads, stats = value_and_grad(params, *batch_of(index), threshold=threshold)
        before = jax.tree.map(lambda x: jnp.where(index == 0, 0, x), state)  # counts once
        state = updated(before, stats.norms)
        limit = optax.clip_by_global_norm(candidate.batch * unit)
        clipped = limit.update(grads, optax.EmptyState())[0]
        updates, opt_state = tx.update(clipped, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    start = params, tx.init(params), updated(initial_state(), first_norms)
    params = lax.scan(step, start, jnp.arange(setting.steps))[0][0]
    return Scores(score(kind, params, data.validation), score(kind, params, data.test))


@functools.cache
def build_program(setting: Setting) -> Callable[..., Scores]:
    """Builds (rates, keys, data, candidates) → scores [rates, seeds, candidates].

    All methods are runs of one program, because compiling takes longer than most runs.
    """

    def at_rate(rate: jax.Array, keys: Any, data: Data, candidates: Candidate) -> Scores:
        def of_seed(own: Any) -> Scores:
            return jax.vmap(functools.partial(train, setting, rate, *own))(candidates)

        return lax.map(of_seed, (keys, data))

    def program(rates: jax.Array, *arguments: Any) -> Scores:
        return lax.map(lambda rate: at_rate(rate, *arguments), rates)

    return jax.jit(program)


def run_cell(cell: Cell, seeds: int, quick: bool) -> dict[str, Any]:
    """Trains all methods; the scores of each are [rates, thresholds, seeds]."""
    steps = 20 if quick else STEPS[cell.batch_size]
    rates = cell.rates()[:2] if quick else cell.rates()
    program = build_program(
        Setting(CONDITIONS[cell.data].kind, cell.optimizer, cell.batch_size, steps)
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    candidates = [own for method in METHODS.values() for own in method]
    stacked = Candidate(*map(jnp.asarray, zip(*candidates, strict=True)))
    found = program(jnp.asarray(rates), keys, load(cell.data, seeds), stacked)
    ends = np.cumsum([len(method) for method in METHODS.values()])[:-1]
    by_method = [np.split(np.moveaxis(np.asarray(own), 1, 2), ends, axis=1) for own in found]
    scores = {
        name: Scores(*(own.tolist() for own in both))._asdict()
        for name, *both in zip(METHODS, *by_method, strict=True)
    }
    return {
        "cell": cell.describe(),
        "label": cell.label(),
        "machine": describe_machine(),
        "steps": steps,
        "rates": rates,
        "scores": scores,
    }


def described(row: dict[str, Any]) -> dict[str, Any]:
    """Finds each method's winner, its difference to the best tuned one, and its failures by rate.

    Differences are paired by seed, with their 95 % intervals. Means are over all trials, [rates,
    thresholds].
    """
    tuned = {name: _winner(row, name) for name in row["scores"]}
    best = max(TUNED, key=lambda name: np.mean(tuned[name]["test"]))
    chance = KINDS[CONDITIONS[row["cell"]["data"]].kind].chance
    trained = np.max(
        [np.max(row["scores"][name]["test"], axis=1) for name in (BATCH, FIXED)], axis=0
    )
    failures = {
        name: np.sum(
            (np.max(scores["test"], axis=1) < chance) & (trained >= chance), axis=1
        ).tolist()
        for name, scores in row["scores"].items()
    }
    return {
        **{name: row[name] for name in ("cell", "label", "steps", "rates")},
        "best": best,
        "tuned": tuned,
        "differences": {
            name: paired_difference(winner["test"], tuned[best]["test"])
            for name, winner in tuned.items()
        },
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
        "candidate": METHODS[name][threshold]._asdict(),
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
        "protocol": {"seeds": seeds, "hidden": HIDDEN},
        "rows": list(map(described, rows)),
    }
    publish(out, "auto_threshold", result, tables(result), draw(result), width=200)


if __name__ == "__main__":
    tyro.cli(main)
