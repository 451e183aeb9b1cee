"""Does PS-Clip-SGD converge at the optimal rate, and is it better than others at equal samples?

    python benchmarks/convergence_rate.py

Prints tables and writes them to benchmarks/results as convergence_rate.json and .png: the slope of
‖∇F‖ against the number of samples N on two smooth non-convex problems of known ∇F, and the ratios
to other methods, each tuned on as many grid points, at equal N. Every finished cell is a file in
`--runs`, from which an interrupted command goes on.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.progress import track
from rich.table import Table

import psclip_optax as psc
from benchmarks.stacked_traffic import describe, describe_machine, publish

NOTE = (
    "‖∇F‖ is averaged over the iterates of a run; mean and 99% quantile are over runs. A noise of "
    "p has index p + 0.1: finite moments of order p, no variance. N = nT with n ≈ T^(p/(2p−2)). "
    "All intervals are 95%, by a bootstrap over runs."
)


class Noise(NamedTuple):
    """Of mean 0 and E|Z| = 1; `p` is the moment that the method is told to be finite.

    Args:
      p: in (1, 2]; the tail index is p + 0.1, and p = 2 stands for Gaussian noise.
      one_sided: a Pareto tail upwards alone, so that clipping is biased; else symmetric.
    """

    p: float
    one_sided: bool = False

    @property
    def index(self) -> float:
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
        # jax.random.uniform and .pareto know 2^23 values: they cut the tail off where the largest
        # of a run's draws lie.
        uniform = ((bits >> 1).astype(jnp.float32) + 0.5) * 2.0**-31
        lomax = uniform ** (-1 / self.index) - 1
        mean = 1 / (self.index - 1)
        if self.one_sided:
            return (lomax - mean) / (2 * mean * (1 + mean) ** (1 - self.index))
        return jnp.where(bits & 1, lomax, -lomax) / mean


class Problem(NamedTuple):
    """F with a known gradient, and the gradients of samples.

    Attributes:
      start: float [d].
      smoothness: the largest curvature L, on which the step η = 1/L rests.
      population_gradient: ∇F, from [d] to [d].
      sample: from a noise, a key and n to the samples, independent of the parameters.
      gradients: from parameters [d] and samples to per-sample gradients [d, n].
    """

    start: jax.Array
    smoothness: float
    population_gradient: Callable[[jax.Array], jax.Array]
    sample: Callable[[Noise, jax.Array, int], Any]
    gradients: Callable[[jax.Array, Any], jax.Array]


def robust_regression(dimension: int = 8, population: int = 128, ridge: float = 0.02) -> Problem:
    """Geman–McClure regression with outliers: f(w, ξ) = F(w) + ⟨ξ, w⟩, ξ of independent entries."""
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
    width: int = 3, features: int = 4, population: int = 128, ridge: float = 0.02
) -> Problem:
    """Teacher and student Σ_j tanh(w_j·x) on a fixed sample of inputs, the labels noisy.

    f(w, x, ε) = (h(w, x) − y)²/2 − ε h(w, x), the squared loss but for what does not depend on w,
    and a ridge. The output weights are fixed, so that F is smooth everywhere and the noise
    ε ∇h of a bounded moment.
    """
    generator = np.random.default_rng(1)
    inputs = jnp.asarray(generator.normal(size=(features, population)), jnp.float32)
    teacher = jnp.asarray(generator.normal(size=width * features), jnp.float32)

    def hidden(w: jax.Array, x: jax.Array) -> jax.Array:
        # As a sum over few features: products of so small matrices take longer.
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
        # By hand, for XLA compiles it to a third of the time of vmap(grad) on so few parameters.
        x, labels = samples
        activations = hidden(w, x)
        factors = (jnp.sum(activations, axis=0) - labels) * (1 - activations**2)
        return (factors[:, None] * x).reshape(w.size, -1) + ridge * w[:, None]

    start = jnp.asarray(0.5 * generator.normal(size=width * features), jnp.float32)
    smoothness = largest_curvature(objective, start)
    return Problem(start, smoothness, jax.grad(objective), sample, gradients)


def largest_curvature(objective: Callable[..., Any], start: jax.Array, steps: int = 500) -> float:
    """The largest eigenvalue of the Hessian along gradient descent, where no global one is known."""

    def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return w - 0.1 * jax.grad(objective)(w), jnp.linalg.eigvalsh(jax.hessian(objective)(w))[-1]

    return float(jnp.max(lax.scan(step, start, length=steps)[1]))


PROBLEMS = {"regression": robust_regression, "network": committee_network}
NOISES = (*(Noise(p, side) for p in (1.4, 1.6, 1.8) for side in (False, True)), Noise(2.0))


class Scales(NamedTuple):
    """Of the gradients at the start: what thresholds and learning rates are measured by."""

    raw_moment: float
    median_norm: float
    population_norm: float


class Method(NamedTuple):
    """An Optax transformation from per-sample gradients [d, n] to a direction [d].

    Attributes:
      make: from a threshold, p and the median norm at the start.
      thresholds: from Scales to the range of the grid; None where there is no threshold.
    """

    make: Callable[[jax.Array, float, float], optax.GradientTransformationExtraArgs]
    thresholds: Callable[[Scales], tuple[float, float]] | None = None


def per_sample(threshold: Any) -> optax.GradientTransformationExtraArgs:
    return psc.per_sample_clip(threshold, sample_axis=1, on_nonfinite="propagate")


def of_the_mean(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    mean = optax.stateless(lambda gradients, _: jnp.mean(gradients, axis=1))
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
OURS, PLAIN, _, NORMALISED, *_ = METHODS
OTHERS = tuple(METHODS)[1:]


class Settings(NamedTuple):
    """Candidates of one method, each float [c]."""

    learning_rates: jax.Array
    thresholds: jax.Array


class Schedule(NamedTuple):
    """T steps of n samples."""

    steps: int
    batch: int


def schedule_for(samples: int, p: float) -> Schedule:
    """The split of N for which n ≈ T^(p/(2p−2))."""
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
    """‖∇F‖ averaged over the iterates, by method, [runs, c]; all see the same samples in a run."""

    def transformation(method: str, setting: Settings) -> Any:
        return METHODS[method].make(setting.thresholds, noise.p, scales.median_norm)

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


def key_for(seed: int, label: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(label.encode()))


def examine(problem: Problem, noise: Noise, key: jax.Array, draws: int) -> dict[str, Any]:
    """Scales at the start, and whether the noise is as heavy as stated."""
    gradients = problem.gradients(problem.start, problem.sample(noise, key, draws))
    population = problem.population_gradient(problem.start)
    norms = np.asarray(jnp.linalg.norm(gradients, axis=0))
    moment = psc.tails.moment_scale(norms, noise.p)
    tail = psc.tails.tail_index(np.asarray(jnp.linalg.norm(gradients - population[:, None], axis=0)))
    return {
        "raw_moment": moment.value,
        "raw_moment_interval": [moment.lower, moment.upper],
        "median_norm": float(np.median(norms)),
        "population_norm": float(jnp.linalg.norm(population)),
        "index_stated": noise.index,
        "index": tail.index,
        "index_interval": [tail.lower, tail.upper],
        "verdict": tail.verdict,
    }


STATISTICS = ("mean", "99% quantile")
LEVEL = 0.99
REPLICATES = 1000


class Plan(NamedTuple):
    """What is computed, and with how much."""

    seed: int
    runs: int
    tuning_runs: int
    draws: int
    noises: tuple[Noise, ...]
    sizes: tuple[int, ...]
    tuned_sizes: tuple[int, ...]
    grid: tuple[int, int]  # learning rates and thresholds


class Cell(NamedTuple):
    """One file of the folder of runs."""

    kind: str  # noise, rate, tuning or final
    problem: str
    noise: Noise
    samples: int = 0

    @property
    def label(self) -> str:
        parts = [self.kind, self.problem, self.noise.label]
        return ", ".join(parts + ([f"N = {self.samples}"] if self.samples else []))

    @property
    def file(self) -> str:
        side = "one-sided" if self.noise.one_sided else "symmetric"
        return f"{self.kind}-{self.problem}-{self.noise.p}-{side}-{self.samples}.json"


def make_cells(plan: Plan) -> Iterator[Cell]:
    """In an order in which each comes after those it rests on."""
    pairs = list(itertools.product(PROBLEMS, plan.noises))
    yield from (Cell("noise", *pair) for pair in pairs)
    for samples in sorted({*plan.sizes, *plan.tuned_sizes}):
        for pair in pairs:
            if samples in plan.sizes:
                yield Cell("rate", *pair, samples)
            if samples in plan.tuned_sizes:
                yield Cell("tuning", *pair, samples)
                yield Cell("final", *pair, samples)


class Results:
    """Cells that are files in a folder, computed when they are not there."""

    def __init__(self, folder: pathlib.Path, plan: Plan):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan = folder, plan
        self.problem = functools.cache(lambda name: PROBLEMS[name]())

    def __getitem__(self, cell: Cell) -> Any:
        path, settings = self.folder / cell.file, self.settings(cell)
        if path.exists():
            known = json.loads(path.read_text())
            if known["settings"] == settings:
                return known["values"]
        values = COMPUTE[cell.kind](self, cell)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": settings, "values": values}))
        partial.replace(path)
        return values

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What the cell's values depend on, apart from the code and what it is of."""
        names = {
            "noise": ["draws"],
            "rate": ["draws", "runs"],
            "tuning": ["draws", "tuning_runs", "grid"],
            "final": ["draws", "runs", "tuning_runs", "grid"],
        }[cell.kind]
        settings = {name: getattr(self.plan, name) for name in ["seed", *names]}
        return json.loads(json.dumps(settings))

    def keys(self, cell: Cell) -> jax.Array:
        runs = self.plan.tuning_runs if cell.kind == "tuning" else self.plan.runs
        return jax.random.split(key_for(self.plan.seed, cell.label), runs)

    def scales(self, cell: Cell) -> Scales:
        values = self[Cell("noise", cell.problem, cell.noise)]
        return Scales(*(values[name] for name in Scales._fields))

    def simulate(self, cell: Cell, settings: dict[str, Settings]) -> dict[str, np.ndarray]:
        problem, schedule = self.problem(cell.problem), schedule_for(cell.samples, cell.noise.p)
        return simulate(
            problem, cell.noise, settings, schedule, self.scales(cell), self.keys(cell)
        )


def compute_noise(results: Results, cell: Cell) -> dict[str, Any]:
    key = key_for(results.plan.seed, cell.label)
    return examine(results.problem(cell.problem), cell.noise, key, results.plan.draws)


def compute_rate(results: Results, cell: Cell) -> dict[str, list[float]]:
    """With the step 1/L, by run; the theory's α = σ, and the median norm for comparison."""
    scales, step = results.scales(cell), 1 / results.problem(cell.problem).smoothness
    alphas = jnp.array([scales.raw_moment, scales.median_norm])
    settings = Settings(jnp.full(2, step), alphas)
    norms = results.simulate(cell, {OURS: settings, PLAIN: settings})
    return {
        f"{OURS}, α = σ": rounded(norms[OURS][:, 0]),
        f"{OURS}, α = median": rounded(norms[OURS][:, 1]),
        PLAIN: rounded(norms[PLAIN][:, 0]),
    }


def compute_tuning(results: Results, cell: Cell) -> dict[str, dict[str, list[float]]]:
    """Both statistics of every point of every method's grid."""
    smoothness = results.problem(cell.problem).smoothness
    grids = make_grids(results.scales(cell), smoothness, *results.plan.grid)
    norms = results.simulate(cell, grids)
    return {
        method: {statistic: rounded(estimate(norms[method], statistic)) for statistic in STATISTICS}
        | {name: rounded(np.asarray(grid)) for name, grid in grids[method]._asdict().items()}
        for method in grids
    }


def compute_final(results: Results, cell: Cell) -> dict[str, dict[str, list[float]]]:
    """By run, each method with its best point for each statistic."""
    tuning = results[cell._replace(kind="tuning")]
    chosen = {}
    for method, values in tuning.items():
        best = [best_point(values[statistic]) for statistic in STATISTICS]
        chosen[method] = Settings(*(jnp.array(values[name])[np.array(best)] for name in Settings._fields))
    norms = results.simulate(cell, chosen)
    return {
        method: {s: rounded(norms[method][:, i]) for i, s in enumerate(STATISTICS)}
        for method in norms
    }


COMPUTE: dict[str, Callable[[Results, Cell], Any]] = {
    "noise": compute_noise,
    "rate": compute_rate,
    "tuning": compute_tuning,
    "final": compute_final,
}


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def best_point(values: list[float]) -> int:
    return int(np.argmin(np.nan_to_num(values, nan=np.inf)))


def make_grids(
    scales: Scales, smoothness: float, num_rates: int, num_thresholds: int
) -> dict[str, Settings]:
    """As many points for each method: learning rates × thresholds, or that many learning rates.

    Learning rates are in units of 1/L, or, where they are the length of a step, of the first one of
    gradient descent.
    """
    grids = {}
    for name, method in METHODS.items():
        unit = (scales.population_norm if name == NORMALISED else 1) / smoothness
        if method.thresholds is None:
            rates = unit * np.geomspace(1 / 32, 8, num_rates * num_thresholds)
            pairs = [rates, np.zeros_like(rates)]
        else:
            rates = unit * np.geomspace(1 / 4, 8, num_rates)
            thresholds = np.geomspace(*method.thresholds(scales), num_thresholds)
            pairs = np.meshgrid(rates, thresholds, indexing="ij")
        grids[name] = Settings(*(jnp.asarray(axis.ravel(), jnp.float32) for axis in pairs))
    return grids


def estimate(values: np.ndarray, statistic: str) -> np.ndarray:
    """The statistic over runs, on axis 0."""
    if statistic == "mean":
        return np.mean(values, axis=0)
    return np.quantile(values, LEVEL, axis=0, method="inverted_cdf")


def resample(runs: int, label: str) -> np.ndarray:
    """How often each run comes in each replicate, [replicates, runs]."""
    generator = np.random.default_rng(zlib.crc32(label.encode()))
    return generator.multinomial(runs, np.full(runs, 1 / runs), size=REPLICATES)


def replicate(values: np.ndarray, counts: np.ndarray, statistic: str) -> np.ndarray:
    """The statistic of `values` [runs] in each replicate."""
    if statistic == "mean":
        return counts @ values / len(values)
    order = np.argsort(values)
    reached = np.cumsum(counts[:, order], axis=1) >= LEVEL * len(values)
    return values[order][np.argmax(reached, axis=1)]


def interval(replicates: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.quantile(replicates, [0.025, 0.975], axis=0)]
