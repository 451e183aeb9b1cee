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
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

import psclip_optax as psc
from benchmarks.stacked_traffic import describe, describe_machine, publish

DIMENSION = 10
MEAN_NORM = 0.5  # of the true gradient; σ is 3.2 to 9
STRONG_MEAN_NORM = 100.0
# The largest moment that exists is of an order below the index, so that the theory gets less.
GAP = 0.1
# What one compiled call draws, so that it stays in a core's cache.
SAMPLES_PER_CHUNK = 2**17
WEISZFELD_STEPS = 20


class Noise(NamedTuple):
    """A law of per-sample gradients g = μ + ξ in dimension 10, with E ξ = 0.

    ξ = R U, where P(R > r) = r^{-a} for r ≥ 1 and U is uniform on the unit sphere; one-sided,
    U has the absolute values of its entries, and ξ is centred by its exact mean. With a = ∞, ξ
    is standard Gaussian instead. μ is along (1, …, 1), and so is, by symmetry, every estimator's
    bias.

    Attributes:
      tail_index: the index a of ‖ξ‖; moments of this order and above are infinite.
      one_sided: whether large samples all err to the same side.
    """

    tail_index: float
    one_sided: bool = False

    @property
    def is_gaussian(self) -> bool:
        return math.isinf(self.tail_index)

    @property
    def order(self) -> float:
        """p, the order of the moment that the thresholds assume."""
        return 2.0 if self.is_gaussian else self.tail_index - GAP

    @property
    def label(self) -> str:
        side = "one-sided" if self.one_sided else "symmetric"
        return "Gaussian" if self.is_gaussian else f"{side}, a = {self.tail_index:g}"

    def radial_moment(self, order: float) -> float:
        """E R^order; of the Gaussian the second alone."""
        return DIMENSION if self.is_gaussian else self.tail_index / (self.tail_index - order)

    def rates(self) -> dict[str, float]:
        """Slopes of log error over log n: the bound's, and what these very laws tend to.

        With P(R > r) = r^{-a} and τ_k of the order k^{1/p} the variance is of the order
        τ_n^{2-a} / n and the bias, if one-sided, of the order τ_n^{1-a}.
        """
        a, p = self.tail_index, self.order
        bound = -(p - 1) / p
        if self.is_gaussian:
            return {"bound": bound, "clipped": -0.5, "mean": -0.5}
        deviation, bias = ((2 - a) / p - 1) / 2, -(a - 1) / p
        clipped = max(deviation, bias) if self.one_sided else deviation
        return {"bound": bound, "clipped": clipped, "mean": -(a - 1) / a}


GAUSSIAN = Noise(math.inf)
NOISES = (*(Noise(a, side) for side in (False, True) for a in (1.3, 1.6, 1.9)), GAUSSIAN)
STRONG_SIGNAL_NOISE = Noise(1.6)


def num_blocks(delta: float) -> int:
    """Blocks of a median of means for failure probability δ: the power of two next to 8 ln(1/δ)."""
    return 2 ** round(math.log2(8 * math.log(1 / delta)))


GROWING, CONSTANT, MEAN = "growing", "constant", "plain mean"
FEW, MANY = num_blocks(1e-2), num_blocks(1e-4)
GEOMETRIC_FEW, GEOMETRIC_MANY = f"geometric MoM, {FEW}", f"geometric MoM, {MANY}"
COORDINATE_FEW = f"coordinate MoM, {FEW}"
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
    "8 ln(1/δ) for δ = 1e-2 and 1e-4. Errors are Euclidean. Brackets: 95% intervals, from a "
    "bootstrap over trials. Slopes are least-squares fits of log error over log n; the bound is "
    "-(p - 1)/p, and a slope is 'below' it (falls faster) where its whole interval is. Level: RMS "
    "error / (σ n^{-(p-1)/p}). The plain mean's mean-square error is infinite under the heavy "
    "tails: its sample RMS tells nothing but its sample, so that median and 99% errors are given."
)
TAIL_NOTE = (
    "Fits of the error's quantile q over failure probabilities δ: polynomial q = c δ^{-s}, polylog "
    "q = c log(1/δ)^s, least squares of log q, two parameters each. ΔAIC = m ln(RSS polynomial / "
    "RSS polylog) of the m points, which are dependent: it compares the fits, and the interval, "
    "from resampled trials, says whether the sign is certain. Growth: q(1e-4) / q(1e-1)."
)
STRONG_NOTE = (
    f"Mean of norm {STRONG_MEAN_NORM:g}, noise {STRONG_SIGNAL_NOISE.label}. Raw: σ from E‖g‖^p; "
    "central: σ from E‖g - μ‖^p."
)


# From gradients [trials, dimension, n] to estimates [trials, dimension].
Estimator: TypeAlias = Callable[[jax.Array], jax.Array]

# Samples and estimators


def unit_mean() -> jax.Array:
    return jnp.full(DIMENSION, DIMENSION**-0.5)


def draw(key: jax.Array, noise: Noise, mean_norm: float, trials: int, n: int) -> Any:
    """Gradients [trials, dimension, n] and the radii R of their noise [trials, n]."""
    for_direction, for_radius = jax.random.split(key)
    directions = jax.random.normal(for_direction, (trials, DIMENSION, n))
    norms = jnp.sqrt(jnp.sum(jnp.square(directions), axis=1, keepdims=True))
    mean = mean_norm * unit_mean()
    if noise.is_gaussian:
        return directions + mean[:, None], norms[:, 0]
    radii = _pareto(for_radius, noise.tail_index, (trials, 1, n))
    if noise.one_sided:
        directions = jnp.abs(directions)
        mean -= noise.radial_moment(1.0) * _mean_absolute_entry()
    return directions * (radii / norms) + mean[:, None], radii[:, 0]


def _pareto(key: jax.Array, index: float, shape: tuple[int, ...]) -> jax.Array:
    # All 32 bits go into the small uniforms: those of jax.random.pareto in float32 are multiples
    # of 2^-23, which would cut off the tail within what is drawn here.
    bits = jax.random.bits(key, shape, jnp.uint32).astype(jnp.float32) + 0.5
    return jnp.exp((32 * math.log(2) - jnp.log(bits)) / index)


def _mean_absolute_entry() -> float:
    """E|U_1| of a point U that is uniform on the unit sphere."""
    return math.gamma(DIMENSION / 2) / (math.sqrt(math.pi) * math.gamma((DIMENSION + 1) / 2))


def raw_scale(noise: Noise, mean_norm: float, samples: int, key: jax.Array) -> float:
    """σ = (E‖g‖^p)^{1/p}.

    A sample mean of ‖g‖^p hardly converges for p next to the index. That of ‖g‖^p - R^p does, for
    it has a finite variance, and E R^p is known.
    """
    p, n = noise.order, min(SAMPLES_PER_CHUNK, samples)
    one = jax.jit(draw, static_argnums=(1, 2, 3, 4))
    differences = []
    for own_key in jax.random.split(key, samples // n):
        drawn = one(own_key, noise, mean_norm, 1, n)
        gradients, radii = (np.asarray(x, np.float64) for x in drawn)
        norms = np.sqrt(np.square(gradients).sum(axis=1))
        differences.append(np.mean(norms**p - radii**p))
    return (noise.radial_moment(p) + float(np.mean(differences))) ** (1 / p)


def clipped_mean(gradients: jax.Array, threshold: Any) -> jax.Array:
    """The library's own, of every trial: [trials, dimension, n] → [trials, dimension]."""
    tx = psc.per_sample_clip(threshold, sample_axis=1)
    state = tx.init(jnp.zeros(gradients.shape[1]))
    means: Any = jax.vmap(lambda stack: tx.update(stack, state)[0])(gradients)
    return means


def block_means(gradients: jax.Array, blocks: int) -> jax.Array:
    """[trials, dimension, n] → [trials, dimension, blocks]; `blocks` divides n."""
    return gradients.reshape(*gradients.shape[:2], blocks, -1).mean(axis=-1)


def geometric_median(points: jax.Array) -> jax.Array:
    """Of the columns of [trials, dimension, blocks], by Weiszfeld's iteration."""

    def step(_: Any, centre: jax.Array) -> jax.Array:
        distances = jnp.sqrt(jnp.sum(jnp.square(points - centre), axis=1, keepdims=True))
        weights = 1 / jnp.maximum(distances, jnp.finfo(distances.dtype).tiny ** 0.5)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.sum(points * (weights / total), axis=-1, keepdims=True)

    start = jnp.mean(points, axis=-1, keepdims=True)
    return jax.lax.fori_loop(0, WEISZFELD_STEPS, step, start)[..., 0]


def plain_mean(gradients: jax.Array) -> jax.Array:
    return gradients.mean(axis=-1)


def geometric_median_of_means(gradients: jax.Array, blocks: int) -> jax.Array:
    return geometric_median(block_means(gradients, blocks))


def coordinate_median_of_means(gradients: jax.Array, blocks: int) -> jax.Array:
    return jnp.median(block_means(gradients, blocks), axis=-1)


def clipped_means(sigma: float, p: float, n: int) -> tuple[Estimator, Estimator]:
    """With the growing threshold σ k^{1/p}, and with the constant one that it ends at."""
    growing = functools.partial(clipped_mean, threshold=psc.growing_threshold(sigma, p))
    return growing, functools.partial(clipped_mean, threshold=sigma * n ** (1 / p))


def estimators(sigma: float, p: float, n: int) -> dict[str, Estimator]:
    growing, constant = clipped_means(sigma, p, n)
    return {
        GROWING: growing,
        CONSTANT: constant,
        MEAN: plain_mean,
        GEOMETRIC_FEW: functools.partial(geometric_median_of_means, blocks=FEW),
        GEOMETRIC_MANY: functools.partial(geometric_median_of_means, blocks=MANY),
        COORDINATE_FEW: functools.partial(coordinate_median_of_means, blocks=FEW),
    }


class Errors(NamedTuple):
    """Of the estimators in many trials of one size.

    Attributes:
      norms: [estimators, trials], Euclidean.
      along: [estimators, trials], the error's component along the mean; its mean is the bias.
    """

    norms: np.ndarray
    along: np.ndarray


def simulate(
    noise: Noise,
    mean_norm: float,
    estimators: Iterable[Estimator],
    n: int,
    trials: int,
    key: jax.Array,
) -> Errors:
    """The errors of all estimators in the same trials."""
    in_chunk = max(1, min(trials, SAMPLES_PER_CHUNK // n))

    @jax.jit
    def errors_of_chunk(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradients, _ = draw(key, noise, mean_norm, in_chunk, n)
        estimates = jnp.stack([estimator(gradients) for estimator in estimators])
        errors = estimates - mean_norm * unit_mean()
        return jnp.sqrt(jnp.sum(jnp.square(errors), axis=-1)), jnp.sum(errors * unit_mean(), -1)

    keys = jax.random.split(key, -(-trials // in_chunk))
    chunks = [jax.device_get(errors_of_chunk(key)) for key in keys]
    norms, along = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    return Errors(norms[:, :trials].astype(np.float64), along[:, :trials].astype(np.float64))


def kept(path: pathlib.Path | None, compute: Callable[[], Errors]) -> Errors:
    """What a file holds, or what is computed and then written to it."""
    if path is None:
        return compute()
    if path.exists():
        with np.load(path) as file:
            return Errors(file["norms"], file["along"])
    errors = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole: an interruption leaves no half a file.
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, **errors._asdict())
    os.replace(unfinished, path)
    return errors


# The theory


def guaranteed_rms(taus: np.ndarray, sigma: float, p: float) -> float:
    """What the root-mean-square error of Σ γ_k g_k / n cannot exceed if E‖g‖^p ≤ σ^p.

    Clipping at τ moves the mean by no more than E(‖g‖ - τ)₊ ≤ c σ^p τ^{1-p} with
    c = (p - 1)^{p-1} / p^p, for x - τ ≤ c x^p τ^{1-p}; and E min(‖g‖, τ)² ≤ σ^p τ^{2-p}. With
    τ_k = σ k^{1/p} both halves are of the order σ n^{-(p-1)/p}.
    """
    c = (p - 1) ** (p - 1) / p**p
    bias = c * sigma**p * np.mean(taus ** (1 - p))
    variance = sigma**p * np.sum(taus ** (2 - p)) / len(taus) ** 2
    return math.sqrt(bias**2 + variance)


def guarantees(noise: Noise, sigma: float, n: int) -> dict[str, float]:
    growing = np.asarray(psc.growing_threshold(sigma, noise.order)(jnp.arange(1, n + 1)))
    constant = np.full(n, sigma * n ** (1 / noise.order))
    taus = {GROWING: growing.astype(np.float64), CONSTANT: constant}
    return {name: guaranteed_rms(own, sigma, noise.order) for name, own in taus.items()}


def has_rms(noise: Noise, estimator: str) -> bool:
    return noise.is_gaussian or estimator != MEAN


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


def log_slopes(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log values over x, along the first axis."""
    centred = x - x.mean()
    return np.tensordot(centred / np.sum(centred**2), np.log(values), axes=1)


def against(interval: list[float], bound: float) -> str:
    _, low, high = interval
    return "below" if high < bound else "above" if low > bound else "contains"


def signed_bias(along: np.ndarray) -> list[float]:
    mean, error = along.mean(), along.std(ddof=1) / math.sqrt(len(along))
    return [float(mean), float(mean - 1.96 * error), float(mean + 1.96 * error)]


class Analysed(NamedTuple):
    """Statistics over sizes: [sizes, statistics, estimators], and [sizes, replicates, …]."""

    sizes: np.ndarray
    values: np.ndarray
    replicates: np.ndarray


def analyse(errors: dict[int, Errors], replicates: int, rng: np.random.Generator) -> Analysed:
    values = [statistics_of(own.norms) for own in errors.values()]
    resampled = [bootstrap(own.norms, replicates, rng) for own in errors.values()]
    return Analysed(np.array(list(errors)), np.stack(values), np.stack(resampled))


def slope_rows(noise: Noise, analysed: Analysed) -> list[dict[str, Any]]:
    x, bound = np.log(analysed.sizes), noise.rates()["bound"]
    slopes, resampled = log_slopes(x, analysed.values), log_slopes(x, analysed.replicates)
    rows = []
    for e, estimator in enumerate(ESTIMATORS):
        row: dict[str, Any] = {"noise": noise.label, "estimator": estimator}
        for s, statistic in enumerate(STATISTICS):
            if statistic == "rms" and not has_rms(noise, estimator):
                row[statistic] = row[f"{statistic}_against_bound"] = None
                continue
            row[statistic] = with_interval(slopes[s, e], resampled[:, s, e])
            row[f"{statistic}_against_bound"] = against(row[statistic], bound)
        rows.append(row)
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
    tail_sizes=(1024,),
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
        "noises": [describe_noise(noise, sigma)],
        "slopes": slope_rows(noise, analysed),
        "levels": level_rows(noise, sigma, equal, analysed),
        "ratios": ratio_rows(noise, analysed),
        "tails": tails,
    }


def describe_noise(noise: Noise, sigma: float) -> dict[str, Any]:
    return {
        "noise": noise.label,
        "index": None if noise.is_gaussian else noise.tail_index,
        "one_sided": noise.one_sided,
        "p": noise.order,
        "sigma": sigma,
        "mean_norm": MEAN_NORM,
        "slope_of_bound": noise.rates()["bound"],
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


def show(interval: list[float] | None, digits: int = 2) -> str:
    if interval is None:
        return "–"
    value, low, high = (f"{x:.{digits}f}".replace("-", "−") for x in interval)
    return f"{value} ({low} to {high})"


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
        "slope guaranteed",
        "slope measured",
        "RMS of guaranteed",
        "99% error ÷ plain mean",
        "÷ constant",
        "÷ median of means",
        "growth, clipped",
        "growth, plain mean",
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
            f"{noise['slope_of_bound']:.2f}".replace("-", "−"),
            show(slope),
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
        say_ratios(result),
        say_tails(result),
        say_fits(result),
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
    return f"Slope of the RMS error, growing threshold, its interval against the bound's. {said}."


def say_levels(result: dict[str, Any]) -> str:
    shares = {row["noise"]: largest_of_guarantee(result, row["noise"]) for row in result["noises"]}
    worst = max(shares, key=lambda label: shares[label])
    verb = "stays within" if shares[worst] <= 1 else "exceeds"
    return (
        f"RMS error, growing threshold, {verb} what the theory guarantees: at most "
        f"{shares[worst]:.2f} of it ({worst}), at least {min(shares.values()):.2f}."
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
    for name in ("noise, slope of the bound", "estimator"):
        table.add_column(name, no_wrap=True)
    names = ("slope of RMS", "is", "slope of median", "slope of 99%", f"level, n = {n}")
    for name in (*names, "growing ÷ this: RMS", "growing ÷ this: 99%"):
        table.add_column(name, justify="right", no_wrap=True)
    bounds = {row["noise"]: row["slope_of_bound"] for row in result["noises"]}
    for row in result["slopes"]:
        where = {"noise": row["noise"], "n": n}
        estimator, level = (
            row["estimator"],
            find(result["levels"], **where, estimator=row["estimator"]),
        )
        ratios = [None, None]
        if estimator != GROWING:
            ratio = find(result["ratios"], **where, growing_against=estimator)
            ratios = [ratio["rms"], ratio["q99"]]
        table.add_row(
            f"{row['noise']}: {bounds[row['noise']]:.3f}" if estimator == GROWING else "",
            estimator,
            show(row["rms"], 3),
            row["rms_against_bound"] or "–",
            *(show(row[name], 3) for name in ("median", "q99")),
            show(level["level"]),
            *map(show, ratios),
            end_section=estimator == ESTIMATORS[-1],
        )
    return table


def tail_table(result: dict[str, Any]) -> Table:
    table = Table(caption=TAIL_NOTE, caption_justify="left")
    for name in ("noise", "estimator"):
        table.add_column(name, no_wrap=True)
    for name in ("polynomial: s", "polylog: s", "ΔAIC", "fits better", "growth"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["tails"]:
        table.add_row(
            f"{row['noise']}, n = {row['n']}" if row["estimator"] == GROWING else "",
            row["estimator"],
            *(show(row[name]["slope"], 3) for name in ("polynomial", "polylog")),
            show(row["delta_aic"], 0),
            row["fits_better"],
            show(row["growth"]),
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
    said = f"{label}\ngrowing: {show(slope)}, bound: {noise['slope_of_bound']:.2f}"
    axes.set_title(said.replace("-", "−"), fontsize=9)
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
    figure = Figure(figsize=(3.4 * len(shown), 8), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    for (above, below), noise in zip(grid.T, shown, strict=True):
        draw_errors(above, result, noise)
        draw_tails(below, result, noise)
    grid[0, 0].set_ylabel("RMS error, and its fit")
    grid[1, 0].set_ylabel(f"Error exceeded with probability δ, n = {tail_size(result)}")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("{x:g}")
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
        label="of a sample: its expectation is infinite",
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
      runs: folder for the errors of every finished simulation, which are not simulated again.
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
        **rounded(rows | {"strong_signal": strong_signal(plan, plan.tail_sizes[0])}),
    }
    result["summary"] = summarise(result)
    tables = [error_table(result), tail_table(result), strong_table(result)]
    publish(out, "estimator_error", result, tables, draw_figure(result), width=170)
    print(*result["summary"], sep="\n")


if __name__ == "__main__":
    tyro.cli(main)
