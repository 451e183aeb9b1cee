"""How far is the automatic threshold from the theory's?

    python -m benchmarks.theory.automatic_theory

Compares `psc.auto_threshold()` with the growing threshold at α = σ and β = p, which are computed
from the noise: the errors of the clipped mean, by Monte Carlo, and ‖∇F‖ of descent, each method
tuned. Noise, problems and random numbers of the descent are those of `estimator_error` and
`convergence_rate`. Prints tables and writes them to benchmarks/results as automatic_theory.json and
.png. Every finished part is a line of --runs; repeat the command to resume.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.progress import track

import psclip_optax as psc
from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.theory import convergence_rate
from benchmarks.theory.automatic_report import draw, error_table, ratio_table
from benchmarks.theory.convergence_rate import Cell, Results
from benchmarks.theory.descent import AUTOMATIC, CONSTANT, OURS, PLAIN
from benchmarks.theory.estimator_error import MEAN_NORM, rounded
from benchmarks.theory.estimator_statistics import bootstrap, statistics_of, with_interval
from benchmarks.theory.heavy_tails import (
    GAUSSIAN,
    GROWING,
    MEAN,
    STATISTICS,
    WARM_UP,
    Errors,
    Noise,
    clipped_mean,
    clipped_means,
    plain_mean,
    raw_scale,
    simulate,
)
from benchmarks.theory.noisy_problems import LIGHT, NOISES, PROBLEMS

FIRST_BATCH, WARM = "automatic, first batch", "automatic"
ESTIMATORS = (GROWING, "constant", MEAN, FIRST_BATCH, WARM)
LAWS = (*(Noise(a, side) for side in (False, True) for a in (1.3, 1.6, 1.9)), GAUSSIAN)
OTHERS = (OURS, CONSTANT, PLAIN)
NOTE = (
    f"Gradients in dimension 10, a mean of norm {MEAN_NORM} and noise as in estimator_error; α = σ "
    f"and β = p are known to the growing threshold alone. Automatic: after {WARM_UP} batches, each "
    "trial the next batch of one sequence; and of a first batch, which is clipped by its own "
    "norms. Rescaled: every estimate times one factor, the best for its estimator over all trials, "
    "as a tuned learning rate would. Ratios to the growing threshold's error in the same trials, "
    "with 95% intervals by a bootstrap over trials: above 1 the automatic one is worse."
)


class Plan(NamedTuple):
    """The amount of computation.

    Attributes:
      laws: the distributions of the estimator's noise.
      sizes: its batch sizes.
      trials: the number of trials of each size.
      replicates: the number of bootstrap resamples.
      samples_for_scale: the number of samples for estimating σ.
      descent: the plan of `convergence_rate`.
    """

    laws: tuple[Noise, ...]
    sizes: tuple[int, ...]
    trials: int
    replicates: int
    samples_for_scale: int
    descent: convergence_rate.Plan


METHODS = (*OTHERS, AUTOMATIC)
FULL = Plan(
    laws=LAWS,
    sizes=(32, 128, 512, 2048, 4096),
    trials=10_000,
    replicates=1000,
    samples_for_scale=2**22,
    descent=convergence_rate.Plan(
        seed=0,
        runs=5000,
        tuning_runs=256,
        draws=200_000,
        problems=tuple(PROBLEMS),
        noises=NOISES,
        sizes=(),
        tuned_sizes=(4096,),
        grid=(10, 5),
        methods=METHODS,
    ),
)
QUICK = Plan(
    laws=(Noise(1.3, one_sided=True), GAUSSIAN),
    sizes=(32, 64),
    trials=200,
    replicates=50,
    samples_for_scale=2**14,
    descent=FULL.descent._replace(
        runs=24,
        tuning_runs=8,
        draws=2000,
        problems=("regression",),
        noises=(LIGHT,),
        tuned_sizes=(64,),
        grid=(2, 2),
    ),
)


# The clipped mean


def simulated(plan: Plan, law: Noise, sigma: float, n: int) -> Errors:
    """Simulates the estimators in order; only the first two get σ and p."""
    own = [
        *clipped_means(sigma, law.order, n),
        plain_mean,
        functools.partial(clipped_mean, threshold=psc.auto_threshold()),
    ]
    key = convergence_rate.key_for(plan.descent.seed, f"{law.label}, n = {n}")
    return simulate(law, MEAN_NORM, own, n, plan.trials, key, psc.auto_threshold())


def rescaled(errors: Errors) -> tuple[np.ndarray, np.ndarray]:
    """Finds each estimator's best common factor, and the norms of the errors with it.

    With an estimate g of μ and c = Σ⟨g, μ⟩ / Σ‖g‖² over the trials, the error is c g − μ. A mean
    whose bias turns it against μ has c = 0, because learning rates are not negative.
    """
    along_mean = MEAN_NORM * (errors.along + MEAN_NORM)  # ⟨g, μ⟩
    squares = errors.norms**2 + 2 * along_mean - MEAN_NORM**2  # ‖g‖²
    best = along_mean.mean(axis=1, keepdims=True) / squares.mean(axis=1, keepdims=True)
    factors = np.maximum(best, 0)
    of_scaled = factors**2 * squares - 2 * factors * along_mean + MEAN_NORM**2
    return factors[:, 0], np.sqrt(np.maximum(of_scaled, 0))


def error_rows(plan: Plan, law: Noise) -> dict[str, Any]:
    """Measures the errors of one law of noise."""
    key = convergence_rate.key_for(plan.descent.seed, law.label)
    sigma = raw_scale(law, MEAN_NORM, plan.samples_for_scale, key)
    rows = []
    for n in plan.sizes:
        errors = simulated(plan, law, sigma, n)
        factors, scaled = rescaled(errors)
        figures = {"": with_ratios(plan, errors.norms), "rescaled_": with_ratios(plan, scaled)}
        for e, estimator in enumerate(ESTIMATORS):
            row = {"noise": law.label, "n": n, "estimator": estimator, "factor": factors[e]}
            for prefix, own in figures.items():
                row |= {f"{prefix}{name}": value for name, value in own[e].items()}
            is_infinite = estimator == MEAN and not law.is_gaussian
            rows.append(row | dict.fromkeys(WITH_SQUARES) if is_infinite else row)
    return {"rows": rounded(rows)}


# Statistics from second moments, which the plain mean of a heavy tail lacks.
WITH_SQUARES = (
    "factor",
    "rms",
    "rms_ratio",
    *(f"rescaled_{name}{ratio}" for name in STATISTICS for ratio in ("", "_ratio")),
)


def with_ratios(plan: Plan, norms: np.ndarray) -> list[dict[str, list[float]]]:
    """Computes each estimator's statistics, and their ratios to the first one's."""
    values = statistics_of(norms)
    resampled = bootstrap(norms, plan.replicates, np.random.default_rng(plan.descent.seed))
    found = []
    for e in range(len(norms)):
        row = {}
        for s, statistic in enumerate(STATISTICS):
            row[statistic] = with_interval(values[s, e], resampled[:, s, e])
            ratios = resampled[:, s, e] / resampled[:, s, 0]
            row[f"{statistic}_ratio"] = with_interval(values[s, e] / values[s, 0], ratios)
        found.append(row)
    return found


# Descent


def descent_rows(results: Results) -> dict[str, Any]:
    """Compares the automatic threshold with each other method, all tuned, in the same runs."""
    pairs = itertools.product(results.plan.problems, results.plan.noises, results.plan.tuned_sizes)
    cells = [Cell("final", *pair) for pair in pairs]
    for cell in track(cells, "Descending"):
        results[cell]
    ratios = [
        row
        for cell in cells
        for row in convergence_rate.ratio_rows(results, *cell[1:], AUTOMATIC, OTHERS)
    ]
    tunings = [row for cell in cells for row in convergence_rate.tuning_rows(results, *cell[1:])]
    return {"ratios": ratios, "tunings": tunings}


def described(plan: Plan) -> dict[str, Any]:
    noises = [noise.label for noise in plan.descent.noises]
    return plan._asdict() | {
        "laws": [law.label for law in plan.laws],
        "descent": plan.descent._asdict() | {"noises": noises},
        "warm_up": WARM_UP,
    }


def main(
    out: pathlib.Path = RESULTS,
    runs: pathlib.Path = pathlib.Path("runs/automatic_theory.runs.jsonl"),
    quick: bool = False,
) -> None:
    """Compares the automatic threshold with the theory's best one.

    Args:
      out: folder for automatic_theory.json and automatic_theory.png.
      runs: file of the finished parts, which are not computed again; use another file after
        changing the simulation.
      quick: few trials of small batches, to check that the benchmark works.
    """
    plan = QUICK if quick else FULL
    cache = RunsCache(runs)
    errors = [
        row
        for law in track(plan.laws, "Estimating")
        for row in cache.once(
            described(plan._replace(laws=(law,))), functools.partial(error_rows, plan, law)
        )["rows"]
    ]
    result = {
        "machine": describe_machine(),
        "note": NOTE,
        "plan": described(plan),
        "errors": errors,
        **descent_rows(Results(runs, plan.descent)),
    }
    tables = [error_table(result), ratio_table(result)]
    publish(out, "automatic_theory", result, tables, draw(result), width=170)


if __name__ == "__main__":
    tyro.cli(main)
