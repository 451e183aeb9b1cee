"""Draws noise with exactly known tails, and simulates the errors of its robust means.

The benchmarks of the estimator share this module; nothing here runs by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import psclip_optax as psc

DIMENSION = 10
# Moments exist for orders below the index, so the theory gets a smaller order.
GAP = 0.1
# The number of draws in one compiled call, few enough for a core's cache.
SAMPLES_PER_CHUNK = 2**17
WEISZFELD_STEPS = 20
WARM_UP = 100  # batches before the first trial, for thresholds with a state
# A function from gradients [trials, dimension, n] to estimates [trials, dimension].
Estimator: TypeAlias = Callable[[jax.Array], jax.Array]


class Noise(NamedTuple):
    """A distribution of per-sample gradients g = μ + ξ in dimension 10, with E ξ = 0.

    ξ = R U, where P(R > r) = r^{-a} for r ≥ 1 and U is uniform on the unit sphere. If one-sided, U
    has the absolute values of these entries, and ξ is centred by its exact mean. With a = ∞, ξ is
    standard Gaussian instead. μ is along (1, …, 1), and so is, by symmetry, every estimator's bias.

    Attributes:
      tail_index: the index a of ‖ξ‖; moments of this order and above are infinite.
      one_sided: whether all large samples deviate to the same side.
    """

    tail_index: float
    one_sided: bool = False

    @property
    def is_gaussian(self) -> bool:
        return math.isinf(self.tail_index)

    @property
    def order(self) -> float:
        """Returns p, the order of the moment that the thresholds assume."""
        return 2.0 if self.is_gaussian else self.tail_index - GAP

    @property
    def label(self) -> str:
        side = "one-sided" if self.one_sided else "symmetric"
        return "Gaussian" if self.is_gaussian else f"{side}, a = {self.tail_index:g}"

    def radial_moment(self, order: float) -> float:
        """Computes E R^order; for the Gaussian only the second moment."""
        return DIMENSION if self.is_gaussian else self.tail_index / (self.tail_index - order)

    def rates(self) -> dict[str, float]:
        """Returns slopes of log error over log n: that of the bound, and the limits for these laws.

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


def num_blocks(delta: float) -> int:
    """Chooses a median of means' number of blocks for δ: the power of two next to 8 ln(1/δ)."""
    return 2 ** round(math.log2(8 * math.log(1 / delta)))


GROWING, CONSTANT, MEAN = "growing", "constant", "plain mean"
FEW, MANY = num_blocks(1e-2), num_blocks(1e-4)
GEOMETRIC_FEW, GEOMETRIC_MANY = f"geometric MoM, {FEW}", f"geometric MoM, {MANY}"
COORDINATE_FEW = f"coordinate MoM, {FEW}"
ESTIMATORS = (GROWING, CONSTANT, MEAN, GEOMETRIC_FEW, GEOMETRIC_MANY, COORDINATE_FEW)
CLIPPED = (GROWING, CONSTANT)
STATISTICS = ("rms", "median", "q99")  # of errors over trials

# Samples and estimators


def unit_mean() -> jax.Array:
    return jnp.full(DIMENSION, DIMENSION**-0.5)


def draw(key: jax.Array, noise: Noise, mean_norm: float, trials: int, n: int) -> Any:
    """Draws gradients [trials, dimension, n] and the radii R of their noise [trials, n]."""
    for_direction, for_radius = jax.random.split(key)
    directions = jax.random.normal(for_direction, (trials, DIMENSION, n))
    norms = jnp.sqrt(jnp.sum(jnp.square(directions), axis=1, keepdims=True))
    mean = mean_norm * unit_mean()
    if noise.is_gaussian:
        return directions + mean[:, None], norms[:, 0]
    bits = jax.random.bits(for_radius, (trials, 1, n), jnp.uint32)
    radii = radii_of_bits(bits, noise.tail_index)
    if noise.one_sided:
        directions = jnp.abs(directions)
        mean -= noise.radial_moment(1.0) * _mean_absolute_entry()
    return directions * (radii / norms) + mean[:, None], radii[:, 0]


def radii_of_bits(bits: jax.Array, tail_index: float) -> jax.Array:
    """Draws Pareto radii from 32 random bits each, to resolve small uniforms.

    The uniforms of `jax.random.pareto` in float32 are multiples of 2^-23, which would cut off the
    tail within the range of these draws.
    """
    uniforms_times_2_32 = bits.astype(jnp.float32) + 0.5
    return jnp.exp((32 * math.log(2) - jnp.log(uniforms_times_2_32)) / tail_index)


def _mean_absolute_entry() -> float:
    """Computes E|U_1| for U uniform on the unit sphere."""
    return math.gamma(DIMENSION / 2) / (math.sqrt(math.pi) * math.gamma((DIMENSION + 1) / 2))


def raw_scale(noise: Noise, mean_norm: float, samples: int, key: jax.Array) -> float:
    """Estimates σ = (E‖g‖^p)^{1/p}.

    A sample mean of ‖g‖^p hardly converges for p close to the index. The sample mean of ‖g‖^p - R^p
    does, because it has a finite variance, and E R^p is known.
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


def clipping(threshold: Any) -> optax.GradientTransformationExtraArgs:
    return psc.per_sample_clip(threshold, sample_axis=1)


def clipped_mean(gradients: jax.Array, threshold: Any) -> jax.Array:
    """Computes the library's clipped mean of every trial, [trials, dimension]."""
    tx = clipping(threshold)
    state = tx.init(jnp.zeros(gradients.shape[1]))
    means: Any = jax.vmap(lambda stack: tx.update(stack, state)[0])(gradients)
    return means


def clipped_in_turn(gradients: jax.Array, tx: Any, state: Any) -> tuple[Any, jax.Array]:
    """Computes clipped means of trials that are consecutive batches of one training run."""

    def step(state: Any, stack: jax.Array) -> tuple[Any, jax.Array]:
        mean, state = tx.update(stack, state)
        return state, mean

    return jax.lax.scan(step, state, gradients)


def block_means(gradients: jax.Array, blocks: int) -> jax.Array:
    """Averages blocks: [trials, dimension, n] → [trials, dimension, blocks]; `blocks` divides n."""
    return gradients.reshape(*gradients.shape[:2], blocks, -1).mean(axis=-1)


def geometric_median(points: jax.Array) -> jax.Array:
    """Computes the geometric median of the columns by Weiszfeld's iteration."""

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
    """Clips at the growing threshold σ k^{1/p}, and at its last value as a constant."""
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
    """The errors of the estimators in many trials of one size.

    Attributes:
      norms: [estimators, trials], Euclidean.
      along: [estimators, trials], the error's component along the mean; its mean is the bias.
    """

    norms: np.ndarray
    along: np.ndarray


def simulate(
    noise: Noise,
    mean_norm: float,
    estimators: list[Estimator],
    n: int,
    trials: int,
    key: jax.Array,
    rule: psc.AdaptiveThreshold[Any] | None = None,
) -> Errors:
    """Simulates the errors of all estimators in the same trials.

    Clipped means with an adaptive threshold come last. Their trials are consecutive batches of one
    training run, after WARM_UP others, so that each is clipped at a threshold from earlier batches.
    """
    in_chunk = max(1, min(trials, SAMPLES_PER_CHUNK // n))
    tx = None if rule is None else clipping(rule)

    @jax.jit
    def errors_of_chunk(state: Any, key: jax.Array) -> Any:
        gradients, _ = draw(key, noise, mean_norm, in_chunk, n)
        estimates = [estimator(gradients) for estimator in estimators]
        if tx is not None:
            state, in_turn = clipped_in_turn(gradients, tx, state)
            estimates.append(in_turn)
        errors = jnp.stack(estimates) - mean_norm * unit_mean()
        norms = jnp.sqrt(jnp.sum(jnp.square(errors), axis=-1))
        return state, (norms, jnp.sum(errors * unit_mean(), -1))

    state = None if tx is None else warmed_up(tx, noise, mean_norm, n, key)
    chunks = []
    for own_key in jax.random.split(key, -(-trials // in_chunk)):
        state, found = errors_of_chunk(state, own_key)
        chunks.append(jax.device_get(found))
    norms, along = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    return Errors(norms[:, :trials].astype(np.float64), along[:, :trials].astype(np.float64))


def warmed_up(tx: Any, noise: Noise, mean_norm: float, n: int, key: jax.Array) -> Any:
    """Returns a threshold's state after warm-up batches."""

    def step(state: Any, own_key: jax.Array) -> tuple[Any, None]:
        gradients, _ = draw(own_key, noise, mean_norm, 1, n)
        return tx.update(gradients[0], state)[1], None

    keys = jax.random.split(jax.random.fold_in(key, WARM_UP), WARM_UP)
    return jax.lax.scan(step, tx.init(unit_mean()), keys)[0]


# The theory


def guaranteed_rms(taus: np.ndarray, sigma: float, p: float) -> float:
    """Bounds the root-mean-square error of Σ γ_k g_k / n for E‖g‖^p ≤ σ^p.

    Clipping at τ changes the mean by at most E(‖g‖ - τ)₊ ≤ c σ^p τ^{1-p} with
    c = (p - 1)^{p-1} / p^p, for x - τ ≤ c x^p τ^{1-p}; and E min(‖g‖, τ)² ≤ σ^p τ^{2-p}. With
    τ_k = σ k^{1/p} both halves are of the order σ n^{-(p-1)/p}.
    """
    c = (p - 1) ** (p - 1) / p**p
    bias = c * sigma**p * np.mean(taus ** (1 - p))
    variance = sigma**p * np.sum(taus ** (2 - p)) / len(taus) ** 2
    return math.sqrt(bias**2 + variance)


def expected_rms(noise: Noise, taus: np.ndarray) -> float | None:
    """Computes the RMS error of Σ γ_k g_k / n under symmetric noise; None for other noise.

    There is no bias, and E min(R, τ)² = (2 τ^{2-a} - a) / (2 - a).
    """
    if noise.is_gaussian or noise.one_sided:
        return None
    a = noise.tail_index
    second_moments = (2 * taus ** (2 - a) - a) / (2 - a)
    return math.sqrt(np.sum(second_moments)) / len(taus)


def growing_taus(noise: Noise, sigma: float, n: int) -> np.ndarray:
    taus = psc.growing_threshold(sigma, noise.order)(jnp.arange(1, n + 1))
    return np.asarray(taus, np.float64)


def guarantees(noise: Noise, sigma: float, n: int) -> dict[str, float]:
    constant = np.full(n, sigma * n ** (1 / noise.order))
    taus = {GROWING: growing_taus(noise, sigma, n), CONSTANT: constant}
    return {name: guaranteed_rms(own, sigma, noise.order) for name, own in taus.items()}


def has_rms(noise: Noise, estimator: str) -> bool:
    return noise.is_gaussian or estimator != MEAN
