"""Defines smooth non-convex problems with known ∇F, and noise with known tail index."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Noise(NamedTuple):
    """Noise with mean 0 and E|Z| = 1; the method assumes that the moment of order `p` is finite.

    Args:
      p: in (1, 2]; the tail index is p + 0.1, and p = 2 means Gaussian noise.
      one_sided: a Pareto tail only upwards, so that clipping is biased; else symmetric.
    """

    p: float
    one_sided: bool = False

    @property
    def tail_index(self) -> float:
        return math.inf if self.p == 2 else self.p + 0.1

    @property
    def label(self) -> str:
        if self.p == 2:
            return "Gaussian"
        return f"p = {self.p}, {'one-sided' if self.one_sided else 'symmetric'}"

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.p == 2:
            return jax.random.normal(key, shape) * math.sqrt(math.pi / 2)
        bits = jax.random.bits(key, shape, jnp.uint32)
        # jax.random.uniform and .pareto have 2^23 values: they would cut off the tail among the
        # largest of a run's draws.
        uniform = ((bits >> 1).astype(jnp.float32) + 0.5) * 2.0**-31
        lomax = uniform ** (-1 / self.tail_index) - 1
        mean = 1 / (self.tail_index - 1)
        if self.one_sided:
            return (lomax - mean) / (2 * mean * (1 + mean) ** (1 - self.tail_index))
        return jnp.where(bits & 1, lomax, -lomax) / mean


class Problem(NamedTuple):
    """F with a known gradient, and the gradients of samples.

    Attributes:
      start: float [d].
      smoothness: the largest curvature L, for the step η = 1/L.
      population_gradient: ∇F, a function from [d] to [d].
      sample: a function from a noise, a key and n to the samples, independent of the parameters.
      gradients: a function from parameters [d] and samples to per-sample gradients [d, n].
    """

    start: jax.Array
    smoothness: float
    population_gradient: Callable[[jax.Array], jax.Array]
    sample: Callable[[Noise, jax.Array, int], Any]
    gradients: Callable[[jax.Array, Any], jax.Array]


def robust_regression(dimension: int = 8, population: int = 128, ridge: float = 0.02) -> Problem:
    """Builds Geman–McClure regression with outliers: f(w, ξ) = F(w) + ⟨ξ, w⟩."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(population, dimension)).astype(np.float32)
    targets = inputs @ generator.normal(size=dimension)
    targets += np.where(generator.random(population) < 0.2, 10.0, 0.0)
    targets = targets.astype(np.float32)

    def objective(w: jax.Array) -> jax.Array:
        squares = jnp.square(inputs @ w - targets)
        return jnp.mean(16 * squares / (16 + squares)) / 2 + ridge * jnp.sum(w**2) / 2

    gradient = jax.grad(objective)

    def sample(noise: Noise, key: jax.Array, n: int) -> jax.Array:
        return 0.5 * noise.draw(key, (dimension, n))

    def gradients(w: jax.Array, samples: jax.Array) -> jax.Array:
        return gradient(w)[:, None] + samples

    start = jnp.zeros(dimension)
    # The loss's curvature is at most 1.
    smoothness = np.linalg.norm(inputs.T @ inputs / population, 2) + ridge
    return Problem(start, float(smoothness), gradient, sample, gradients)


def committee_network(
    width: int = 3, features: int = 4, population: int = 128, ridge: float = 0.1
) -> Problem:
    """Builds teacher and student Σ_j tanh(w_j·x) on fixed inputs with noisy labels.

    f(w, x, ε) = (h(w, x) − y)²/2 − ε h(w, x), the squared loss up to a constant, and a ridge. The
    output weights are fixed, so that F is smooth everywhere and the noise ε ∇h of a bounded moment.
    """
    generator = np.random.default_rng(1)
    inputs = jnp.asarray(generator.normal(size=(features, population)), jnp.float32)
    teacher = jnp.asarray(generator.normal(size=width * features), jnp.float32)

    def hidden(w: jax.Array, x: jax.Array) -> jax.Array:
        # A sum over few features, because products of such small matrices take longer.
        return jnp.tanh(jnp.sum(w.reshape(width, features, 1) * x, axis=1))

    def output(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(hidden(w, x), axis=0)

    targets = output(teacher, inputs)

    def objective(w: jax.Array) -> jax.Array:
        errors = jnp.mean(jnp.square(output(w, inputs) - targets))
        return errors / 2 + ridge * jnp.sum(w**2) / 2

    def sample(noise: Noise, key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        which, how_much = jax.random.split(key)
        chosen = jax.random.randint(which, (n,), 0, population)
        return inputs[:, chosen], targets[chosen] + noise.draw(how_much, (n,))

    def gradients(w: jax.Array, samples: Any) -> jax.Array:
        # Written out: with so few parameters it takes a third of the time of vmap(grad).
        x, labels = samples
        activations = hidden(w, x)
        factors = (jnp.sum(activations, axis=0) - labels) * (1 - activations**2)
        return (factors[:, None] * x).reshape(w.size, -1) + ridge * w[:, None]

    start = jnp.asarray(0.5 * generator.normal(size=width * features), jnp.float32)
    smoothness = largest_curvature(objective, start)
    return Problem(start, smoothness, jax.grad(objective), sample, gradients)


def largest_curvature(objective: Callable[..., Any], start: jax.Array, steps: int = 500) -> float:
    """Finds the Hessian's largest eigenvalue along gradient descent, without a global bound."""

    def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return w - 0.1 * jax.grad(objective)(w), jnp.linalg.eigvalsh(jax.hessian(objective)(w))[-1]

    return float(jnp.max(lax.scan(step, start, length=steps)[1]))


PROBLEMS = {"regression": robust_regression, "network": committee_network}
LIGHT = Noise(2.0)
NOISES = (*(Noise(p, side) for p in (1.4, 1.6, 1.8) for side in (False, True)), LIGHT)
