"""Does the error of the clipped mean fall as the theory says, and where does clipping not help?

    python -m benchmarks.theory.estimator_error

Monte Carlo with noise whose tail index is known exactly. Prints tables and writes them to
benchmarks/results as estimator_error.json and .png. Every finished law of noise is a line of
--runs; repeat the command to resume.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.theory.estimator_figure import draw_figure
from benchmarks.theory.estimator_report import (
    error_table,
    strong_table,
    summarise,
    tail_table,
    to_markdown,
)
from benchmarks.theory.estimator_statistics import (
    Analysed,
    against,
    analyse,
    bias_slope,
    bootstrap,
    failure_probabilities,
    fit,
    log_slopes,
    resampled_quantiles,
    signed_bias,
    statistics_of,
    with_interval,
)
from benchmarks.theory.heavy_tails import (
    CONSTANT,
    DIMENSION,
    ESTIMATORS,
    FEW,
    GAUSSIAN,
    GROWING,
    MANY,
    MEAN,
    STATISTICS,
    Errors,
    Estimator,
    Noise,
    clipped_means,
    estimators,
    expected_rms,
    growing_taus,
    guarantees,
    has_rms,
    plain_mean,
    raw_scale,
    simulate,
)

MEAN_NORM = 0.5  # norm of the true gradient; σ is 3.2 to 9
STRONG_MEAN_NORM = 100.0
NOISES = (*(Noise(a, side) for side in (False, True) for a in (1.3, 1.6, 1.9)), GAUSSIAN)
STRONG_SIGNAL_NOISE = Noise(1.6)
NOTE = (
    f"Gradients in dimension {DIMENSION}: a mean of norm {MEAN_NORM} and noise with tail index a "
    "(exactly Pareto radius), symmetric or one-sided, or standard Gaussian. p = a - 0.1, or 2 if "
    "Gaussian; σ is the raw moment (E‖g‖^p)^{1/p}. Growing: τ_k = σ k^{1/p}; constant: τ = σ "
    "n^{1/p}; MoM: median of means over as many blocks as stated, the power of two next to "
    "8 ln(1/δ) for δ = 1e-2 and 1e-4. Errors are Euclidean. Brackets: two-sided 95% intervals "
    "from a bootstrap over trials; ±: half their width. Slopes: least-squares fits of log error "
    "over log n. The bound's is -(p - 1)/p; a slope is 'below' it, and the error falls faster, "
    "where the whole interval is. Level: RMS error / (σ n^{-(p-1)/p}). Under heavy tails the plain "
    "mean's mean-square error is infinite, and its sample RMS tells of its sample alone: median "
    "and 99% errors are given instead. Slopes of the bias, where every bias is told from 0, and of "
    "the median are in the JSON."
)
TAIL_NOTE = (
    "Fits of the error's quantile q over failure probabilities δ: polynomial q = c δ^{-s}, polylog "
    "q = c log(1/δ)^s, least squares of log q, two parameters each. ΔAIC = m ln(RSS polynomial / "
    "RSS polylog) of the m points, which are dependent: it compares the fits, and the interval, "
    "from resampled trials, says whether the sign is certain. Growth: q at the least δ relative to "
    "q at δ = 1e-1."
)
STRONG_NOTE = (
    f"Mean of norm {STRONG_MEAN_NORM:g}, noise {STRONG_SIGNAL_NOISE.label}. Raw: σ from E‖g‖^p; "
    "central: σ from E‖g - μ‖^p."
)


# Numbers with their intervals


def slope_rows(noise: Noise, errors: dict[int, Errors], analysed: Analysed) -> list[dict[str, Any]]:
    x, bound = np.log(analysed.sizes), noise.rates()["bound"]
    slopes, resampled = log_slopes(x, analysed.values), log_slopes(x, analysed.replicates)
    rows = []
    for e, estimator in enumerate(ESTIMATORS):
        row: dict[str, Any] = {
            statistic: with_interval(slopes[s, e], resampled[:, s, e])
            for s, statistic in enumerate(STATISTICS)
        }
        row["bias"] = bias_slope({n: own.along[e] for n, own in errors.items()})
        if not has_rms(noise, estimator):
            row["rms"] = row["bias"] = None
        verdicts = {
            f"{name}_against_bound": own and against(own, bound) for name, own in row.items()
        }
        rows.append({"noise": noise.label, "estimator": estimator, **row, **verdicts})
    return rows


def level_rows(
    noise: Noise, sigma: float, errors: dict[int, Errors], analysed: Analysed
) -> list[dict[str, Any]]:
    rows = []
    for i, n in enumerate(errors):
        unit = sigma * n ** noise.rates()["bound"]
        guaranteed = guarantees(noise, sigma, n)
        for e, estimator in enumerate(ESTIMATORS):
            row: dict[str, Any] = {"noise": noise.label, "n": n, "estimator": estimator}
            for s, statistic in enumerate(STATISTICS):
                resampled = analysed.replicates[i, :, s, e]
                row[statistic] = with_interval(analysed.values[i, s, e], resampled)
            if has_rms(noise, estimator):
                row["level"] = [value / unit for value in row["rms"]]
                row["bias"] = signed_bias(errors[n].along[e])
            else:
                row["rms"][1:] = [None, None]
                row["level"] = row["bias"] = None
            row["guaranteed_level"] = (
                guaranteed[estimator] / unit if estimator in guaranteed else None
            )
            rows.append(row)
    return rows


def ratio_rows(noise: Noise, analysed: Analysed) -> list[dict[str, Any]]:
    """Divides the errors of the growing threshold by those of each other estimator."""
    first = ESTIMATORS.index(GROWING)
    ratios = analysed.values[..., [first]] / analysed.values
    resampled = analysed.replicates[..., [first]] / analysed.replicates
    rows = []
    for i, n in enumerate(analysed.sizes):
        for e, estimator in enumerate(ESTIMATORS):
            if e == first:
                continue
            row: dict[str, Any] = {"noise": noise.label, "n": int(n), "growing_against": estimator}
            for s, statistic in enumerate(STATISTICS):
                known = statistic != "rms" or has_rms(noise, estimator)
                interval = with_interval(ratios[i, s, e], resampled[i, :, s, e])
                row[statistic] = interval if known else None
            rows.append(row)
    return rows


# Tails


def tail_row(
    noise: Noise,
    n: int,
    estimator: str,
    norms: np.ndarray,
    replicates: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    ordered, deltas = np.sort(norms), failure_probabilities(len(norms))
    ranks = np.ceil((1 - deltas) * len(norms) - 1e-6).astype(int)
    quantiles = ordered[ranks - 1]
    resampled = resampled_quantiles(ordered, ranks, replicates, rng)
    fits, residuals = {}, []
    for name, x in (("polynomial", -np.log(deltas)), ("polylog", np.log(-np.log(deltas)))):
        slope, sums = fit(x, quantiles[:, None])
        slopes, resampled_sums = fit(x, resampled.T)
        deviation = math.sqrt(sums[0] / (len(deltas) - 2))
        fits[name] = {"slope": with_interval(slope[0], slopes), "residual_deviation": deviation}
        residuals.append((sums[0], resampled_sums))
    (power, powers), (log, logs) = residuals
    delta_aic = with_interval(
        len(deltas) * math.log(power / log), len(deltas) * np.log(powers / logs)
    )
    return {
        "noise": noise.label,
        "n": n,
        "estimator": estimator,
        "deltas": deltas.tolist(),
        "quantiles": [with_interval(q, own) for q, own in zip(quantiles, resampled.T, strict=True)],
        "growth": with_interval(quantiles[-1] / quantiles[0], resampled[:, -1] / resampled[:, 0]),
        **fits,
        "delta_aic": delta_aic,
        "fits_better": {"below": "polynomial", "above": "polylog"}.get(
            against(delta_aic, 0.0), "undecided"
        ),
    }


# The whole


class Plan(NamedTuple):
    """The amount of simulation."""

    noises: tuple[Noise, ...]
    sizes: tuple[int, ...]
    shown_size: int
    tail_sizes: tuple[int, ...]
    trials: int
    tail_trials: int
    replicates: int
    samples_for_scale: int
    seed: int


FULL = Plan(
    noises=NOISES,
    sizes=tuple(2**i for i in range(8, 15)),
    shown_size=4096,
    tail_sizes=(1024, 4096),
    trials=10_000,
    tail_trials=200_000,
    replicates=1000,
    samples_for_scale=2**22,
    seed=0,
)
QUICK = Plan(
    noises=(Noise(1.3), Noise(1.3, one_sided=True), GAUSSIAN),
    sizes=(128, 256),
    shown_size=256,
    tail_sizes=(128,),
    trials=300,
    tail_trials=2000,
    replicates=50,
    samples_for_scale=2**14,
    seed=0,
)
USES = ("errors", "scale", "errors of a strong signal", "scale of a strong signal")


def key_for(plan: Plan, use: str, noise: Noise) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(plan.seed), USES.index(use))
    return jax.random.fold_in(key, NOISES.index(noise))


def errors_over_sizes(plan: Plan, noise: Noise, sigma: float) -> dict[int, Errors]:
    key = key_for(plan, "errors", noise)
    errors = {}
    for n in plan.sizes:
        trials = plan.tail_trials if n in plan.tail_sizes else plan.trials
        own = list(estimators(sigma, noise.order, n).values())
        errors[n] = simulate(noise, MEAN_NORM, own, n, trials, jax.random.fold_in(key, n))
    return errors


def measure(plan: Plan, noise: Noise) -> dict[str, Any]:
    """Measures the rows of one law of noise."""
    sigma = raw_scale(noise, MEAN_NORM, plan.samples_for_scale, key_for(plan, "scale", noise))
    errors = errors_over_sizes(plan, noise, sigma)
    rng = np.random.default_rng((plan.seed, NOISES.index(noise)))
    # As many trials at every size, so that each weighs the same.
    equal = {n: Errors(*(x[:, : plan.trials] for x in own)) for n, own in errors.items()}
    analysed = analyse(equal, plan.replicates, rng)
    tails = [
        tail_row(noise, n, estimator, errors[n].norms[e], plan.replicates, rng)
        for n in plan.tail_sizes
        for e, estimator in enumerate(ESTIMATORS)
    ]
    return {
        "noises": [describe_noise(noise, sigma, plan.sizes)],
        "slopes": slope_rows(noise, equal, analysed),
        "levels": level_rows(noise, sigma, equal, analysed),
        "ratios": ratio_rows(noise, analysed),
        "tails": tails,
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    return plan._asdict() | {"noises": [noise.label for noise in plan.noises]}


def describe_noise(noise: Noise, sigma: float, sizes: tuple[int, ...]) -> dict[str, Any]:
    expected = [expected_rms(noise, growing_taus(noise, sigma, n)) for n in sizes]
    known = None not in expected
    x = np.log(sizes)
    return {
        "noise": noise.label,
        "index": None if noise.is_gaussian else noise.tail_index,
        "one_sided": noise.one_sided,
        "p": noise.order,
        "sigma": sigma,
        "mean_norm": MEAN_NORM,
        "slope_of_bound": noise.rates()["bound"],
        "slope_expected": float(log_slopes(x, np.array(expected))) if known else None,
        "slope_of_clipped_asymptotically": noise.rates()["clipped"],
        "slope_of_mean_asymptotically": noise.rates()["mean"],
    }


def strong_signal(plan: Plan, n: int) -> list[dict[str, Any]]:
    """Measures errors if the mean is far larger than the noise."""
    noise, p = STRONG_SIGNAL_NOISE, STRONG_SIGNAL_NOISE.order
    raw = raw_scale(
        noise,
        STRONG_MEAN_NORM,
        plan.samples_for_scale,
        key_for(plan, "scale of a strong signal", noise),
    )
    central = noise.radial_moment(p) ** (1 / p)
    cases: dict[str, Estimator] = {}
    for scale, sigma in (("raw", raw), ("central", central)):
        growing, constant = clipped_means(sigma, p, n)
        cases |= {f"{GROWING}, {scale} σ": growing, f"{CONSTANT}, {scale} σ": constant}
    cases[MEAN] = plain_mean
    key = key_for(plan, "errors of a strong signal", noise)
    errors = simulate(noise, STRONG_MEAN_NORM, list(cases.values()), n, plan.trials, key)
    values = statistics_of(errors.norms)
    resampled = bootstrap(errors.norms, plan.replicates, np.random.default_rng(plan.seed))
    rows = []
    for e, name in enumerate(cases):
        row: dict[str, Any] = {
            "estimator": name,
            "n": n,
            "sigma_raw": raw,
            "sigma_central": central,
        }
        for s, statistic in enumerate(STATISTICS):
            interval = with_interval(values[s, e], resampled[:, s, e])
            row[statistic] = None if statistic == "rms" and name == MEAN else interval
        row["bias"] = None if name == MEAN else signed_bias(errors.along[e])
        rows.append(row)
    return rows


def rounded(tree: Any) -> Any:
    """Rounds floats to five digits, more than any interval here supports."""
    return jax.tree.map(lambda x: float(f"{x:.5g}") if isinstance(x, float) else x, tree)


def main(
    out: pathlib.Path = RESULTS,
    runs: pathlib.Path = pathlib.Path("runs/estimator_error.runs.jsonl"),
    trials: int | None = None,
    tail_trials: int | None = None,
    seed: int = 0,
    quick: bool = False,
    markdown: bool = False,
) -> None:
    """Measures how the error of the clipped mean falls, and where clipping does not help.

    Args:
      out: folder for estimator_error.json and estimator_error.png.
      runs: file of the finished laws of noise, which are not simulated again; use another file
        after changing the simulation.
      trials: the number of trials at each size; 10,000 by default.
      tail_trials: the number of trials for quantiles down to 1e-4; 200,000 by default.
      seed: the seed of all random numbers.
      quick: few trials of small batches, to check that the benchmark works.
      markdown: measure nothing; print the results page's table from the file.
    """
    if markdown:
        print(to_markdown(json.loads((out / "estimator_error.json").read_text())))
        return
    plan = (QUICK if quick else FULL)._replace(seed=seed)
    plan = plan._replace(trials=trials or plan.trials, tail_trials=tail_trials or plan.tail_trials)
    cache = RunsCache(runs)
    parts = [
        cache.once(
            describe_plan(plan._replace(noises=(noise,))), functools.partial(measure, plan, noise)
        )
        for noise in plan.noises
    ]
    rows = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": describe_plan(plan) | {"dimension": DIMENSION, "blocks": [FEW, MANY]},
        "note": NOTE,
        "note_of_tails": TAIL_NOTE,
        "note_of_strong_signal": STRONG_NOTE,
        **rounded(rows | {"strong_signal": strong_signal(plan, plan.sizes[1])}),
    }
    result["summary"] = summarise(result)
    tables = [error_table(result), tail_table(result), strong_table(result)]
    publish(out, "estimator_error", result, tables, draw_figure(result), width=164)
    print(*result["summary"], sep="\n")


if __name__ == "__main__":
    tyro.cli(main)
