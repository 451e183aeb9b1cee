"""Runs PS-Clip-SGD and other methods many times at once on a noisy problem."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import psclip_optax as psc
from benchmarks.theory.noisy_problems import Noise, Problem

STATISTICS = ("mean", "99% quantile")  # of ‖∇F‖ over runs


class Scales(NamedTuple):
    """The scales of the gradients at the start, to which thresholds and rates are relative."""

    raw_moment: float
    median_norm: float
    population_norm: float


class Method(NamedTuple):
    """An Optax transformation from per-sample gradients [d, n] to a direction [d].

    Attributes:
      make: a function from a threshold, p and the median norm at the start.
      thresholds: a function from Scales to the range of the grid; None without a threshold.
      rates: the range of the learning rates' grid, if there is no threshold to tune.
    """

    make: Callable[[jax.Array, float, float], optax.GradientTransformationExtraArgs]
    thresholds: Callable[[Scales], tuple[float, float]] | None = None
    rates: tuple[float, float] = (1 / 32, 8)


def per_sample(threshold: Any) -> optax.GradientTransformationExtraArgs:
    return psc.per_sample_clip(threshold, sample_axis=1, on_nonfinite="propagate")


def mean_over_samples(gradients: Any) -> jax.Array:
    return jnp.mean(gradients, axis=1)


def of_the_mean(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    mean = optax.stateless(lambda gradients, _: mean_over_samples(gradients))
    return optax.chain(mean, *links)


METHODS = {
    "PS-Clip-SGD": Method(
        lambda alpha, p, _: per_sample(psc.growing_threshold(alpha, p)),
        lambda scales: (scales.median_norm / 128, scales.median_norm * 2),
    ),
    "SGD": Method(lambda *_: of_the_mean()),
    "global clipping": Method(
        lambda threshold, *_: of_the_mean(optax.clip_by_global_norm(threshold)),
        lambda scales: (scales.population_norm / 4, scales.population_norm * 4),
    ),
    "normalised SGD": Method(lambda *_: of_the_mean(optax.normalize_by_update_norm())),
    "per-sample constant": Method(
        lambda threshold, *_: per_sample(psc.constant_threshold(threshold)),
        lambda scales: (scales.median_norm / 4, scales.median_norm * 64),
    ),
    "per-sample quantile": Method(
        lambda odds, _, median: per_sample(
            psc.quantile_threshold(odds / (1 + odds), decay=0.9, initial=median)
        ),
        lambda _: (1 / 9, 999),  # odds of the quantiles 0.1 and 0.999
    ),
}
OURS, PLAIN, _, NORMALISED, CONSTANT, _ = METHODS
OTHERS = tuple(METHODS)[1:]
# Used only by benchmarks.theory.automatic_theory. It clips most samples, and its learning rates are
# larger.
AUTOMATIC = "automatic"
ALL_METHODS = METHODS | {
    AUTOMATIC: Method(lambda *_: per_sample(psc.auto_threshold()), rates=(1 / 8, 32))
}


class Settings(NamedTuple):
    """The candidates of one method, each float [c]."""

    learning_rates: jax.Array
    thresholds: jax.Array


def make_grids(
    scales: Scales,
    smoothness: float,
    num_rates: int,
    num_thresholds: int,
    methods: Iterable[str] = METHODS,
) -> dict[str, Settings]:
    """Builds the same number of points for each method: rates × thresholds, or that many rates.

    Learning rates are relative to 1/L, or, if they are the length of a step, to the first step of
    gradient descent.
    """
    grids = {}
    for name in methods:
        method = ALL_METHODS[name]
        unit = (scales.population_norm if name == NORMALISED else 1) / smoothness
        if method.thresholds is None:
            rates = unit * np.geomspace(*method.rates, num_rates * num_thresholds)
            pairs = [rates, np.zeros_like(rates)]
        else:
            rates = unit * np.geomspace(1 / 4, 8, num_rates)
            thresholds = np.geomspace(*method.thresholds(scales), num_thresholds)
            pairs = np.meshgrid(rates, thresholds, indexing="ij")
        grids[name] = Settings(*(jnp.asarray(axis.ravel(), jnp.float32) for axis in pairs))
    return grids


class Schedule(NamedTuple):
    """A schedule of T steps with n samples each."""

    steps: int
    batch: int


def schedule_for(samples: int, p: float) -> Schedule:
    """Splits N so that n ≈ T^(p/(2p−2))."""
    steps = max(round(samples ** ((2 * p - 2) / (3 * p - 2))), 1)
    return Schedule(steps, round(samples / steps))


def rate(p: float) -> float:
    return -(p - 1) / (3 * p - 2)


def simulate(
    problem: Problem,
    noise: Noise,
    settings: dict[str, Settings],
    schedule: Schedule,
    scales: Scales,
    keys: jax.Array,
) -> dict[str, np.ndarray]:
    """Averages ‖∇F‖ over the iterates, by method, [runs, c]; in a run all use the same samples."""

    def transformation(method: str, setting: Settings) -> Any:
        return ALL_METHODS[method].make(setting.thresholds, noise.p, scales.median_norm)

    def start(method: str, setting: Settings) -> Any:
        state = transformation(method, setting).init(problem.start)
        return problem.start, state, jnp.zeros(())

    def advance(method: str, samples: Any, carry: Any, setting: Settings) -> Any:
        w, state, total = carry
        update = transformation(method, setting).update
        direction, state = update(problem.gradients(w, samples), state)
        total += jnp.linalg.norm(problem.population_gradient(w))
        return w - setting.learning_rates * direction, state, total

    def all_advance(carries: dict[str, Any], key: jax.Array) -> tuple[dict[str, Any], None]:
        samples = problem.sample(noise, key, schedule.batch)
        return {
            method: jax.vmap(functools.partial(advance, method, samples))(carries[method], setting)
            for method, setting in settings.items()
        }, None

    def run(key: jax.Array) -> dict[str, jax.Array]:
        carries = {
            method: jax.vmap(functools.partial(start, method))(setting)
            for method, setting in settings.items()
        }
        carries, _ = lax.scan(all_advance, carries, jax.random.split(key, schedule.steps))
        return {method: total / schedule.steps for method, (*_, total) in carries.items()}

    candidates = max(len(setting.thresholds) for setting in settings.values())
    numbers = problem.start.size * schedule.batch * candidates
    together = largest_divisor(len(keys), at_most=max(2**20 // numbers, 1))
    totals = jax.jit(functools.partial(lax.map, run, batch_size=together))(keys)
    return {method: np.asarray(total, np.float64) for method, total in totals.items()}


def largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)
