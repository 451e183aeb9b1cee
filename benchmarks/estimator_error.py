"""Does the error of the clipped mean fall as the theory says, and where does clipping not help?

    python -m benchmarks.estimator_error

Monte Carlo with noise whose tail index is known exactly. Prints tables and writes them to
benchmarks/results as estimator_error.json and .png. With --runs every finished part is kept in a
folder, so that an interrupted run goes on where it stopped.
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from benchmarks.engine import show_ticks
from benchmarks.heavy_tails import (
    CONSTANT,
    COORDINATE_FEW,
    DIMENSION,
    FEW,
    GAUSSIAN,
    GEOMETRIC_FEW,
    GEOMETRIC_MANY,
    GROWING,
    MANY,
    MEAN,
    Errors,
    Estimator,
    Noise,
    clipped_means,
    estimators,
    expected_rms,
    growing_taus,
    guarantees,
    has_rms,
    kept,
    plain_mean,
    raw_scale,
    simulate,
)
from benchmarks.stacked_traffic import describe, describe_machine, publish

MEAN_NORM = 0.5  # of the true gradient; σ is 3.2 to 9
STRONG_MEAN_NORM = 100.0
NOISES = (*(Noise(a, side) for side in (False, True) for a in (1.3, 1.6, 1.9)), GAUSSIAN)
STRONG_SIGNAL_NOISE = Noise(1.6)
# Okabe and Ito's colours, which the colour-blind can tell apart.
STYLES = {
    GROWING: ("#0072B2", "o"),
    CONSTANT: ("#56B4E9", "s"),
    MEAN: ("#D55E00", "^"),
    GEOMETRIC_FEW: ("#009E73", "D"),
    GEOMETRIC_MANY: ("#E69F00", "v"),
    COORDINATE_FEW: ("#CC79A7", "P"),
}
ESTIMATORS = tuple(STYLES)
STATISTICS = ("rms", "median", "q99")
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


# Figures with their intervals


def statistics_of(norms: np.ndarray) -> np.ndarray:
    """RMS, median and 99% quantile of errors [estimators, trials]: [statistics, estimators]."""
    rms = np.sqrt(np.mean(np.square(norms), axis=1))
    return np.stack([rms, *np.quantile(norms, [0.5, 0.99], axis=1)])


def bootstrap(norms: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """The statistics of resampled trials, the same for all estimators: [replicates, …]."""
    trials = norms.shape[1]
    draws = (rng.integers(trials, size=trials) for _ in range(replicates))
    return np.stack([statistics_of(norms[:, chosen]) for chosen in draws])


def with_interval(value: Any, replicates: np.ndarray) -> list[float]:
    """[value, low, high] of a two-sided 95% percentile interval."""
    low, high = np.quantile(replicates, [0.025, 0.975])
    return [float(value), float(low), float(high)]


def slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights of the values at x whose sum is their least-squares slope over x."""
    centred = x - x.mean()
    return centred / np.sum(centred**2)


def log_slopes(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log values over x, along the first axis."""
    return np.tensordot(slope_weights(x), np.log(values), axes=1)


def against(interval: list[float], bound: float) -> str:
    _, low, high = interval
    return "below" if high < bound else "above" if low > bound else "contains"


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def signed_bias(along: np.ndarray) -> list[float]:
    mean, error = mean_and_error(along)
    return [mean, mean - 1.96 * error, mean + 1.96 * error]


def bias_slope(alongs: dict[int, np.ndarray]) -> list[float] | None:
    """Slope of log |bias| over log n; None unless every bias is told from 0."""
    means, errors = np.array([mean_and_error(along) for along in alongs.values()]).T
    if np.any(np.abs(means) < 1.96 * errors):
        return None
    weights = slope_weights(np.log(list(alongs)))
    slope = float(weights @ np.log(np.abs(means)))
    error = float(np.sqrt(np.sum((weights * errors / means) ** 2)))
    return [slope, slope - 1.96 * error, slope + 1.96 * error]


class Analysed(NamedTuple):
    """Statistics over sizes: [sizes, statistics, estimators], and [sizes, replicates, …]."""

    sizes: np.ndarray
    values: np.ndarray
    replicates: np.ndarray


def analyse(errors: dict[int, Errors], replicates: int, rng: np.random.Generator) -> Analysed:
    values = [statistics_of(own.norms) for own in errors.values()]
    resampled = [bootstrap(own.norms, replicates, rng) for own in errors.values()]
    return Analysed(np.array(list(errors)), np.stack(values), np.stack(resampled))


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
    """The growing threshold's errors relative to every other estimator's, in the same trials."""
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


def failure_probabilities(trials: int) -> np.ndarray:
    """From 1e-1 to 1e-4, as far down as the trials reach (20 of them beyond)."""
    deltas = np.geomspace(1e-1, 1e-4, 13)
    return deltas[deltas * trials >= 19.99]


def resampled_quantiles(
    ordered: np.ndarray, ranks: np.ndarray, replicates: int, rng: np.random.Generator
) -> np.ndarray:
    """The order statistics at 1-based ranks of resampled trials: [replicates, ranks].

    Those of uniforms are sums of exponentials over their total, so that no resample is sorted.
    """
    trials = len(ordered)
    steps = np.diff(ranks, prepend=0, append=trials + 1)
    sums = np.cumsum(rng.standard_gamma(steps, size=(replicates, len(steps))), axis=1)
    return ordered[np.floor(sums[:, :-1] / sums[:, -1:] * trials).astype(int)]


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


def fit(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and sums of squared residuals of log values [points, fits] over x [points]."""
    slopes = log_slopes(x, values)
    logs = np.log(values)
    residuals = logs - logs.mean(axis=0) - np.outer(x - x.mean(), slopes)
    return slopes, np.sum(residuals**2, axis=0)


# The whole


class Plan(NamedTuple):
    """What is simulated, and how often."""

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


def errors_over_sizes(
    plan: Plan, noise: Noise, sigma: float, runs: pathlib.Path | None
) -> dict[int, Errors]:
    key = key_for(plan, "errors", noise)
    errors = {}
    for n in plan.sizes:
        trials = plan.tail_trials if n in plan.tail_sizes else plan.trials
        name = f"{noise.label.replace(', a = ', '_')}_n{n}_trials{trials}_seed{plan.seed}.npz"
        errors[n] = kept(
            None if runs is None else runs / name,
            functools.partial(
                simulate,
                noise,
                MEAN_NORM,
                list(estimators(sigma, noise.order, n).values()),
                n,
                trials,
                jax.random.fold_in(key, n),
            ),
        )
    return errors


def measure(plan: Plan, noise: Noise, runs: pathlib.Path | None) -> dict[str, Any]:
    """The rows of one law of noise."""
    sigma = raw_scale(noise, MEAN_NORM, plan.samples_for_scale, key_for(plan, "scale", noise))
    errors = errors_over_sizes(plan, noise, sigma, runs)
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
    """Errors where the mean is far larger than the noise: what the moment must be taken of."""
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
    """Floats to five digits, more than any interval here warrants."""
    return jax.tree.map(lambda x: float(f"{x:.5g}") if isinstance(x, float) else x, tree)


# What it says


def find(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    (row,) = (row for row in rows if all(row[name] == value for name, value in values.items()))
    return row


def minus(number: str) -> str:
    return number.replace("-", "−")


def show(interval: list[float] | None, digits: int = 2) -> str:
    if interval is None:
        return "–"
    value, low, high = (minus(f"{x:.{digits}f}") for x in interval)
    return f"{value} ({low} to {high})"


def show_briefly(interval: list[float] | None, digits: int = 3) -> str:
    """With half the width of the interval, for tables of many columns."""
    if interval is None:
        return "–"
    value, low, high = interval
    return minus(f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}")


def largest_of_guarantee(result: dict[str, Any], noise: str) -> float:
    """The largest over the sizes of the RMS error relative to what the theory guarantees."""
    rows = [row for row in result["levels"] if row["noise"] == noise]
    shares = (
        row["level"][0] / row["guaranteed_level"] for row in rows if row["estimator"] == GROWING
    )
    return max(shares)


def shown_size(result: dict[str, Any]) -> int:
    return result["settings"]["shown_size"]


def tail_size(result: dict[str, Any]) -> int:
    return result["settings"]["tail_sizes"][-1]


def to_markdown(result: dict[str, Any]) -> str:
    """README's table: how the growing threshold's error falls, and against what.

    Args:
      result: as estimator_error.json holds it.
    """
    shown, tail = shown_size(result), tail_size(result)
    columns = (
        "noise",
        "slope: bound",
        "measured",
        "RMS error ÷ guarantee",
        "99% error ÷ plain mean's",
        "÷ constant threshold's",
        "÷ median of means'",
        "growth of the error",
        "of the plain mean's",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for noise in result["noises"]:
        label = noise["noise"]
        slope = find(result["slopes"], noise=label, estimator=GROWING)["rms"]
        ratios = [
            find(result["ratios"], noise=label, n=shown, growing_against=other)["q99"]
            for other in (MEAN, CONSTANT, GEOMETRIC_FEW)
        ]
        growths = [
            find(result["tails"], noise=label, n=tail, estimator=estimator)["growth"]
            for estimator in (GROWING, MEAN)
        ]
        cells = [
            label,
            minus(f"{noise['slope_of_bound']:.2f}"),
            show(slope, 3),
            f"{largest_of_guarantee(result, label):.2f}",
            *map(show, ratios),
            *(show(growth, 1) for growth in growths),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summarise(result: dict[str, Any]) -> list[str]:
    """What holds and what does not, with the figures."""
    return [
        say_slopes(result),
        say_levels(result),
        say_bias(result),
        say_ratios(result),
        say_tails(result),
        say_fits(result),
        say_tail_of_mean(result),
        say_light_tails(result),
        say_strong_signal(result),
    ]


def labels(result: dict[str, Any], *, heavy: bool = True) -> list[str]:
    return [row["noise"] for row in result["noises"] if (row["index"] is not None) == heavy]


def say_slopes(result: dict[str, Any]) -> str:
    rows = [row for row in result["slopes"] if row["estimator"] == GROWING]
    by_verdict = {
        verdict: [row["noise"] for row in rows if row["rms_against_bound"] == verdict]
        for verdict in ("below", "contains", "above")
    }
    said = "; ".join(
        f"{verdict}: {', '.join(names) or 'none'}" for verdict, names in by_verdict.items()
    )
    exact = "; ".join(
        f"{noise['noise']}: {minus(format(noise['slope_expected'], '.3f'))}, measured "
        + show(find(rows, noise=noise["noise"])["rms"], 3)
        for noise in result["noises"]
        if noise["slope_expected"] is not None
    )
    return (
        f"Slope of the RMS error, growing threshold, its interval against the bound's. {said}. "
        f"What the exact second moments of the clipped noise give over the same sizes. {exact}."
    )


def say_levels(result: dict[str, Any]) -> str:
    shares = {row["noise"]: largest_of_guarantee(result, row["noise"]) for row in result["noises"]}
    worst = max(shares, key=lambda label: shares[label])
    verb = "stays within" if shares[worst] <= 1 else "exceeds"
    return (
        f"RMS error, growing threshold, {verb} what the theory guarantees: at most "
        f"{shares[worst]:.2f} of it ({worst}), at least {min(shares.values()):.2f}."
    )


def say_bias(result: dict[str, Any]) -> str:
    n, parts = shown_size(result), []
    for row in result["slopes"]:
        if row["estimator"] != GROWING or row["bias"] is None:
            continue
        level = find(result["levels"], noise=row["noise"], n=n, estimator=GROWING)
        share = (level["bias"][0] / level["rms"][0]) ** 2
        parts.append(f"{row['noise']}: {share:.2f}, slope {show(row['bias'], 3)}")
    return (
        f"Share of the squared bias in the mean-square error at n = {n}, and slope of the bias, "
        f"growing threshold, where every bias is told from 0. {'; '.join(parts) or 'Nowhere'}."
    )


def say_ratios(result: dict[str, Any]) -> str:
    n, parts = shown_size(result), []
    for other in ESTIMATORS[1:]:
        ratios = [
            find(result["ratios"], noise=label, n=n, growing_against=other)["q99"]
            for label in labels(result)
        ]
        smaller, larger = sum(r[2] < 1 for r in ratios), sum(r[1] > 1 for r in ratios)
        values = [r[0] for r in ratios]
        parts.append(
            f"{other}: {min(values):.2f} to {max(values):.2f} (smaller under {smaller}, larger "
            f"under {larger} of {len(ratios)})"
        )
    return (
        f"99% error under heavy tails at n = {n}, growing threshold relative to "
        + "; ".join(parts)
        + "."
    )


def say_tails(result: dict[str, Any]) -> str:
    n, parts = tail_size(result), []
    for estimator in ESTIMATORS:
        growths = [
            find(result["tails"], noise=label, n=n, estimator=estimator)["growth"][0]
            for label in labels(result)
        ]
        parts.append(f"{estimator}: {min(growths):.1f} to {max(growths):.1f}")
    row = result["tails"][0]
    return (
        f"Error's growth from δ = {row['deltas'][0]:.0e} to {row['deltas'][-1]:.0e} under heavy "
        f"tails at n = {n}, {'; '.join(parts)}."
    )


def say_fits(result: dict[str, Any]) -> str:
    parts = []
    for estimator in ESTIMATORS:
        fits = [
            row["fits_better"]
            for row in result["tails"]
            if row["estimator"] == estimator and row["noise"] in labels(result)
        ]
        counts = ", ".join(
            f"{fits.count(name)} {name}" for name in ("polynomial", "polylog", "undecided")
        )
        parts.append(f"{estimator}: {counts}")
    return f"What fits the error's quantiles better, heavy tails and sizes, {'; '.join(parts)}."


def say_tail_of_mean(result: dict[str, Any]) -> str:
    n, parts = tail_size(result), []
    for noise in result["noises"]:
        if noise["index"] is not None:
            row = find(result["tails"], noise=noise["noise"], n=n, estimator=MEAN)
            slope = show(row["polynomial"]["slope"], 3)
            parts.append(f"{noise['noise']}: {slope}, 1/a = {1 / noise['index']:.3f}")
    return f"Plain mean, s of the polynomial fit at n = {n}. {'; '.join(parts)}."


def say_light_tails(result: dict[str, Any]) -> str:
    (label,) = labels(result, heavy=False)
    rows = [
        row for row in result["ratios"] if row["noise"] == label and row["growing_against"] == MEAN
    ]
    said = ", ".join(f"{show(row['rms'], 4)} at n = {row['n']}" for row in (rows[0], rows[-1]))
    return (
        f"Gaussian noise, RMS error of the growing threshold relative to the plain mean's: {said}."
    )


def say_strong_signal(result: dict[str, Any]) -> str:
    rows = result["strong_signal"]
    said = "; ".join(f"{row['estimator']}: {show(row['q99'])}" for row in rows)
    return f"Mean far above the noise, n = {rows[0]['n']}, 99% error, {said}."


# Tables


def error_table(result: dict[str, Any]) -> Table:
    n = shown_size(result)
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in ("noise:\nslope of the bound", "estimator"):
        table.add_column(name, no_wrap=True)
    slopes = ("slope of\nRMS error", "against\nbound", "slope of\n99% error")
    for name in (*slopes, f"level,\nn = {n}", "growing ÷ this:\nRMS error", "\n99% error"):
        table.add_column(name, justify="right", no_wrap=True)
    bounds = {row["noise"]: row["slope_of_bound"] for row in result["noises"]}
    for row in result["slopes"]:
        noise, estimator = row["noise"], row["estimator"]
        level = find(result["levels"], noise=noise, n=n, estimator=estimator)["level"]
        ratio = {"rms": None, "q99": None}
        if estimator != GROWING:
            ratio = find(result["ratios"], noise=noise, n=n, growing_against=estimator)
        table.add_row(
            f"{noise}: {minus(f'{bounds[noise]:.3f}')}" if estimator == GROWING else "",
            estimator,
            show_briefly(row["rms"]),
            row["rms_against_bound"] or "–",
            *map(show_briefly, (row["q99"], level, ratio["rms"], ratio["q99"])),
            end_section=estimator == ESTIMATORS[-1],
        )
    return table


def tail_table(result: dict[str, Any]) -> Table:
    table = Table(caption=TAIL_NOTE, caption_justify="left")
    for name in ("noise", "estimator"):
        table.add_column(name, no_wrap=True)
    for name in ("polynomial: s", "residual", "polylog: s", "residual", "ΔAIC", "fits better"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("growth", justify="right", no_wrap=True)
    for row in result["tails"]:
        fits = [row["polynomial"], row["polylog"]]
        cells = [(show_briefly(f["slope"]), f"{f['residual_deviation']:.3f}") for f in fits]
        table.add_row(
            f"{row['noise']}, n = {row['n']}" if row["estimator"] == GROWING else "",
            row["estimator"],
            *(cell for pair in cells for cell in pair),
            show_briefly(row["delta_aic"], 0),
            row["fits_better"],
            show_briefly(row["growth"], 2),
            end_section=row["estimator"] == ESTIMATORS[-1],
        )
    return table


def strong_table(result: dict[str, Any]) -> Table:
    table = Table(caption=STRONG_NOTE, caption_justify="left")
    table.add_column("estimator", no_wrap=True)
    for name in ("RMS error", "median", "99%", "bias along μ"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["strong_signal"]:
        table.add_row(row["estimator"], *(show(row[s], 3) for s in (*STATISTICS, "bias")))
    return table


# Figure


def draw_errors(axes: Axes, result: dict[str, Any], noise: dict[str, Any]) -> None:
    label = noise["noise"]
    rows = [row for row in result["levels"] if row["noise"] == label]
    for estimator, (colour, marker) in STYLES.items():
        own = [row for row in rows if row["estimator"] == estimator]
        sizes = np.array([row["n"] for row in own])
        values = np.array([row["rms"][0] for row in own])
        slope = find(result["slopes"], noise=label, estimator=estimator)["rms"]
        filled = colour if slope else "none"
        axes.plot(sizes, values, marker, color=colour, markerfacecolor=filled, markersize=5)
        if slope:
            centre = np.exp(np.mean(np.log(values))), np.exp(np.mean(np.log(sizes)))
            axes.plot(sizes, centre[0] * (sizes / centre[1]) ** slope[0], color=colour, linewidth=1)
    growing = [row for row in rows if row["estimator"] == GROWING]
    sizes = np.array([row["n"] for row in growing])
    unit = noise["sigma"] * sizes ** noise["slope_of_bound"]
    guaranteed = unit * [row["guaranteed_level"] for row in growing]
    axes.plot(sizes, guaranteed, color="black", linestyle="--", linewidth=1.2)
    slope = find(result["slopes"], noise=label, estimator=GROWING)["rms"]
    bound = minus(f"{noise['slope_of_bound']:.3f}")
    axes.set_title(f"{label}\nslope: growing {show_briefly(slope)}, bound {bound}", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("Samples n")


def draw_tails(axes: Axes, result: dict[str, Any], noise: dict[str, Any]) -> None:
    n = tail_size(result)
    for estimator, (colour, marker) in STYLES.items():
        row = find(result["tails"], noise=noise["noise"], n=n, estimator=estimator)
        value, low, high = np.array(row["quantiles"]).T
        axes.plot(row["deltas"], value, color=colour, marker=marker, markersize=4, linewidth=1)
        axes.fill_between(row["deltas"], low, high, color=colour, alpha=0.2, linewidth=0)
        if estimator == MEAN and noise["index"]:
            ratios = np.array(row["deltas"]) / row["deltas"][-1]
            guide = 1.4 * value[-1] * ratios ** (-1 / noise["index"])
            axes.plot(row["deltas"], guide, color="black", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("Failure probability δ")


def draw_figure(result: dict[str, Any]) -> Figure:
    shown = [row for row in result["noises"] if row["one_sided"] or row["index"] is None]
    figure = Figure(figsize=(max(11, 3.4 * len(shown)), 8), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    for (above, below), noise in zip(grid.T, shown, strict=True):
        draw_errors(above, result, noise)
        draw_tails(below, result, noise)
    grid[0, 0].set_ylabel("RMS error, and its fit")
    grid[1, 0].set_ylabel(f"Error exceeded with probability δ, n = {tail_size(result)}")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        show_ticks(axes.yaxis, axes.get_ylim())
    add_legend(figure)
    figure.suptitle(describe(result["machine"]), fontsize=10)
    return figure


def add_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1, label=name)
        for name, (colour, marker) in STYLES.items()
    ]
    dashed = Line2D([], [], color="black", linestyle="--", label="guaranteed for growing")
    dotted = Line2D([], [], color="black", linestyle=":", label="δ^(−1/a)")
    hollow = Line2D(
        [],
        [],
        color=STYLES[MEAN][0],
        marker=STYLES[MEAN][1],
        markerfacecolor="none",
        linestyle="none",
        label="plain mean of one set of trials: its expectation is infinite",
    )
    figure.legend(
        handles=[*handles, dashed, dotted, hollow],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )


def main(
    out: pathlib.Path = pathlib.Path(__file__).parent / "results",
    runs: pathlib.Path | None = None,
    trials: int | None = None,
    tail_trials: int | None = None,
    seed: int = 0,
    quick: bool = False,
    markdown: bool = False,
) -> None:
    """Does the error of the clipped mean fall as the theory says, and where does it not help?

    Args:
      out: folder for estimator_error.json and estimator_error.png.
      runs: folder for the errors of every finished simulation, which are not simulated again; to
        be emptied where what is simulated changes.
      trials: at every size; 10,000 by default.
      tail_trials: for the quantiles down to 1e-4; 240,000 by default.
      seed: of all that is drawn.
      quick: few trials of small batches, to see that the benchmark works.
      markdown: measure nothing, and print README's table from the file.
    """
    if markdown:
        print(to_markdown(json.loads((out / "estimator_error.json").read_text())))
        return
    plan = (QUICK if quick else FULL)._replace(seed=seed)
    plan = plan._replace(trials=trials or plan.trials, tail_trials=tail_trials or plan.tail_trials)
    parts = [measure(plan, noise, runs) for noise in plan.noises]
    rows = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    settings = plan._asdict() | {"noises": [noise.label for noise in plan.noises]}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": settings | {"dimension": DIMENSION, "blocks": [FEW, MANY]},
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
