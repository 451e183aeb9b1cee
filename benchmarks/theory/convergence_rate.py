"""Does PS-Clip-SGD converge at the optimal rate, and is it better than others at equal samples?

    python -m benchmarks.theory.convergence_rate

Prints tables and writes them to benchmarks/results as convergence_rate.json and .png: the slope of
‖∇F‖ against the number of samples N on two smooth non-convex problems with known ∇F, and the ratios
to other methods, each tuned on the same number of grid points, at equal N. Every finished cell is a
line of `--runs`; repeat the command to resume.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

import psclip_optax as psc
from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.theory.convergence_report import (
    control_table,
    draw,
    ratios_table,
    slopes_table,
    to_markdown,
)
from benchmarks.theory.convergence_statistics import (
    best_point,
    compare,
    estimate,
    interval,
    is_at_edge,
    replicate,
    resample,
    rounded,
    slope,
)
from benchmarks.theory.descent import (
    METHODS,
    OTHERS,
    OURS,
    PLAIN,
    STATISTICS,
    Scales,
    Settings,
    make_grids,
    rate,
    schedule_for,
    simulate,
)
from benchmarks.theory.noisy_problems import LIGHT, NOISES, PROBLEMS, Noise, Problem

NOTE = (
    "‖∇F‖ is averaged over the iterates of a run; mean and 99% quantile are over runs. A noise of "
    "p has index p + 0.1: finite moments of order p, no variance. N = nT with n ≈ T^(p/(2p−2)). "
    "All intervals are 95%, by a bootstrap over runs."
)


def key_for(seed: int, label: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(label.encode()))


def examine(problem: Problem, noise: Noise, key: jax.Array, draws: int) -> dict[str, Any]:
    """Measures the scales at the start, and whether the noise is as heavy as stated."""
    gradients = problem.gradients(problem.start, problem.sample(noise, key, draws))
    population = problem.population_gradient(problem.start)
    norms = np.asarray(jnp.linalg.norm(gradients, axis=0))
    moment = psc.tails.moment_scale(norms, noise.p)
    tail = psc.tails.tail_index(
        np.asarray(jnp.linalg.norm(gradients - population[:, None], axis=0))
    )
    return {
        "raw_moment": moment.value,
        "raw_moment_interval": [moment.lower, moment.upper],
        "median_norm": float(np.median(norms)),
        "population_norm": float(jnp.linalg.norm(population)),
        "index_stated": noise.tail_index,
        "index": tail.index,
        "index_interval": [tail.lower, tail.upper],
        "verdict": tail.verdict,
    }


class Plan(NamedTuple):
    """The amount of computation."""

    seed: int
    runs: int
    tuning_runs: int
    draws: int
    problems: tuple[str, ...]
    noises: tuple[Noise, ...]
    sizes: tuple[int, ...]
    tuned_sizes: tuple[int, ...]
    grid: tuple[int, int]  # learning rates and thresholds
    methods: tuple[str, ...] = tuple(METHODS)


class Cell(NamedTuple):
    """One unit of computation, stored as one line."""

    kind: str  # noise, rate, tuning or final
    problem: str
    noise: Noise
    samples: int = 0

    @property
    def label(self) -> str:
        parts = [self.kind, self.problem, self.noise.label]
        return ", ".join(parts + ([f"N = {self.samples}"] if self.samples else []))


def make_cells(plan: Plan) -> Iterator[Cell]:
    """Lists the cells so that each comes after those on which it depends."""
    pairs = list(itertools.product(plan.problems, plan.noises))
    yield from (Cell("noise", *pair) for pair in pairs)
    for samples in sorted({*plan.sizes, *plan.tuned_sizes}):
        for pair in pairs:
            if samples in plan.sizes:
                yield Cell("rate", *pair, samples)
            if samples in plan.tuned_sizes:
                yield Cell("tuning", *pair, samples)
                yield Cell("final", *pair, samples)


class Results:
    """Reads finished cells from a file, and computes others on request."""

    def __init__(self, path: pathlib.Path, plan: Plan):
        self.cache, self.plan = RunsCache(path), plan
        self.problem = functools.cache(lambda name: PROBLEMS[name]())

    def __getitem__(self, cell: Cell) -> Any:
        run = {"cell": cell.label} | self.settings(cell)
        return self.cache.once(run, lambda: COMPUTE[cell.kind](self, cell))

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Returns everything on which a cell's values depend, except the code and its names."""
        names = {
            "noise": ["draws"],
            "rate": ["draws", "runs"],
            "tuning": ["draws", "tuning_runs", "grid", "methods"],
            "final": ["draws", "runs", "tuning_runs", "grid", "methods"],
        }[cell.kind]
        return {name: getattr(self.plan, name) for name in ["seed", *names]}

    def keys(self, cell: Cell) -> jax.Array:
        runs = self.plan.tuning_runs if cell.kind == "tuning" else self.plan.runs
        return jax.random.split(key_for(self.plan.seed, cell.label), runs)

    def scales(self, cell: Cell) -> Scales:
        values = self[Cell("noise", cell.problem, cell.noise)]
        return Scales(*(values[name] for name in Scales._fields))

    def simulate(self, cell: Cell, settings: dict[str, Settings]) -> dict[str, np.ndarray]:
        problem, schedule = self.problem(cell.problem), schedule_for(cell.samples, cell.noise.p)
        return simulate(problem, cell.noise, settings, schedule, self.scales(cell), self.keys(cell))


def compute_noise(results: Results, cell: Cell) -> dict[str, Any]:
    key = key_for(results.plan.seed, cell.label)
    return examine(results.problem(cell.problem), cell.noise, key, results.plan.draws)


def compute_rate(results: Results, cell: Cell) -> dict[str, list[float]]:
    """Runs the step 1/L, with the theory's α = σ and, for comparison, the median norm."""
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
    """Computes both statistics of every point of each method's grid."""
    smoothness = results.problem(cell.problem).smoothness
    plan = results.plan
    grids = make_grids(results.scales(cell), smoothness, *plan.grid, plan.methods)
    norms = results.simulate(cell, grids)
    return {
        method: {statistic: rounded(estimate(norms[method], statistic)) for statistic in STATISTICS}
        | {name: rounded(np.asarray(grid)) for name, grid in grids[method]._asdict().items()}
        for method in grids
    }


def compute_final(results: Results, cell: Cell) -> dict[str, dict[str, list[float]]]:
    """Computes, for each run, each method at its best point for each statistic."""
    tuning = results[cell._replace(kind="tuning")]
    chosen = {}
    for method, values in tuning.items():
        best = [best_point(values[statistic]) for statistic in STATISTICS]
        chosen[method] = Settings(
            *(jnp.array(values[name])[np.array(best)] for name in Settings._fields)
        )
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


def assemble(results: Results) -> dict[str, Any]:
    """Assembles everything that is printed and drawn from the cells."""
    plan = results.plan
    pairs = list(itertools.product(plan.problems, plan.noises))
    tuned = [(*pair, samples) for pair in pairs for samples in plan.tuned_sizes]
    return {
        "machine": describe_machine(),
        "note": NOTE,
        "plan": plan._asdict() | {"noises": [noise.label for noise in plan.noises]},
        "noises": [noise_row(results, *pair) for pair in pairs],
        "rates": [row for pair in pairs for row in rate_rows(results, *pair)],
        "theory_ratios": [row for pair in pairs for row in theory_ratio_rows(results, *pair)],
        "ratios": [row for one in tuned for row in ratio_rows(results, *one)],
        "tunings": [row for one in tuned for row in tuning_rows(results, *one)],
    }


def identify(problem: str, noise: Noise) -> dict[str, Any]:
    return {"problem": problem, "noise": noise.label, "p": noise.p}


def noise_row(results: Results, problem: str, noise: Noise) -> dict[str, Any]:
    values = results[Cell("noise", problem, noise)]
    return identify(problem, noise) | {name: as_json(value) for name, value in values.items()}


def as_json(value: Any) -> Any:
    """Replaces infinities, which JSON does not have."""
    if isinstance(value, list):
        return [as_json(one) for one in value]
    return None if value == math.inf else value


def rate_rows(results: Results, problem: str, noise: Noise) -> list[dict[str, Any]]:
    """Computes the slope of each method and statistic over N."""
    plan = results.plan
    cells = [Cell("rate", problem, noise, samples) for samples in plan.sizes]
    norms = [{m: np.array(v) for m, v in results[cell].items()} for cell in cells]
    counts = [resample(plan.runs, cell.label) for cell in cells]
    schedules = [schedule_for(samples, noise.p) for samples in plan.sizes]
    totals = np.array([schedule.steps * schedule.batch for schedule in schedules])
    rows = []
    for method, statistic in itertools.product(norms[0], STATISTICS):
        estimates = np.array([estimate(one[method], statistic) for one in norms])
        replicates = np.array(
            [replicate(one[method], c, statistic) for one, c in zip(norms, counts, strict=True)]
        )
        rows.append(
            identify(problem, noise)
            | {
                "method": method,
                "statistic": statistic,
                "samples": totals.tolist(),
                "estimates": estimates.tolist(),
                "intervals": [interval(one) for one in replicates],
                "slope": float(slope(totals, estimates)),
                "slope_interval": interval(slope(totals, replicates)),
                "last_slope": float(slope(totals[-2:], estimates[-2:])),
                "last_slope_interval": interval(slope(totals[-2:], replicates[-2:])),
                "bound": rate(noise.p),
            }
        )
    return rows


def theory_ratio_rows(results: Results, problem: str, noise: Noise) -> list[dict[str, Any]]:
    """Compares PS-Clip-SGD with SGD at the same step 1/L, both untuned."""
    rows = []
    for samples in results.plan.sizes:
        cell = Cell("rate", problem, noise, samples)
        norms = {m: np.array(v) for m, v in results[cell].items()}
        others, counts = norms.pop(PLAIN), resample(results.plan.runs, cell.label)
        for ours, statistic in itertools.product(norms, STATISTICS):
            row = {"samples": samples, "ours": ours, "other": PLAIN, "statistic": statistic}
            ratio = compare(norms[ours], others, counts, statistic)
            rows.append(identify(problem, noise) | row | ratio)
    return rows


def ratio_rows(
    results: Results,
    problem: str,
    noise: Noise,
    samples: int,
    ours: str = OURS,
    others: Sequence[str] = OTHERS,
) -> list[dict[str, Any]]:
    """Compares a tuned method with each other tuned method."""
    cell = Cell("final", problem, noise, samples)
    norms, counts = results[cell], resample(results.plan.runs, cell.label)
    rows = []
    for other, statistic in itertools.product(others, STATISTICS):
        row = {"samples": samples, "ours": ours, "other": other, "statistic": statistic}
        own, its = (np.array(norms[method][statistic]) for method in (ours, other))
        rows.append(identify(problem, noise) | row | compare(own, its, counts, statistic))
    return rows


def tuning_rows(results: Results, problem: str, noise: Noise, samples: int) -> list[dict[str, Any]]:
    """Lists the chosen points, and whether they are at an edge of their grids."""
    rows = []
    for method, values in results[Cell("tuning", problem, noise, samples)].items():
        for statistic in STATISTICS:
            best = best_point(values[statistic])
            chosen = {name: values[name][best] for name in Settings._fields}
            edges = [name for name in Settings._fields if is_at_edge(values[name], chosen[name])]
            row = {"samples": samples, "method": method, "statistic": statistic}
            rows.append(identify(problem, noise) | row | chosen | {"at_edge": edges})
    return rows


def main(
    out: pathlib.Path = RESULTS,
    runs: pathlib.Path = pathlib.Path("runs/convergence_rate.runs.jsonl"),
    seed: int = 0,
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384, 65536),
    tuned_sizes: tuple[int, ...] = (1024, 4096),
    quick: bool = False,
    markdown: bool = False,
) -> None:
    """Measures how fast PS-Clip-SGD converges, and whether it is better at equal samples.

    Args:
      out: folder for convergence_rate.json and convergence_rate.png.
      runs: file of the finished cells, which are not computed again; use another file after
        changing the problems or the methods.
      seed: the seed of all random numbers.
      sizes: numbers of samples N for the slopes, at least 2 of them.
      tuned_sizes: numbers of samples N at which all methods are tuned and compared.
      quick: few and small cells, to check that the benchmark works.
      markdown: only print the results page's table, from the results in `out`.
    """
    if markdown:
        print(to_markdown(json.loads((out / "convergence_rate.json").read_text())))
        return
    plan = Plan(
        seed=seed,
        runs=5000,
        tuning_runs=256,
        draws=200_000,
        problems=tuple(PROBLEMS),
        noises=NOISES,
        sizes=sizes,
        tuned_sizes=tuned_sizes,
        grid=(10, 5),
    )
    if quick:
        small = {"runs": 24, "tuning_runs": 8, "draws": 2000, "grid": (2, 2)}
        few = {"problems": ("regression",), "noises": (Noise(1.4, one_sided=True), LIGHT)}
        plan = plan._replace(sizes=(32, 64), tuned_sizes=(64,), **small, **few)
    results = Results(runs, plan)
    for cell in track(list(make_cells(plan)), "Computing"):
        results[cell]
    result = assemble(results)
    tables = [slopes_table(result), ratios_table(result), control_table(result)]
    publish(out, "convergence_rate", result, tables, draw(result), width=200)


if __name__ == "__main__":
    tyro.cli(main)
