import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.theory import convergence_rate, descent, noisy_problems
from benchmarks.theory.convergence_rate import Cell
from benchmarks.theory.descent import METHODS, Schedule, Settings
from benchmarks.theory.noisy_problems import LIGHT, NOISES, PROBLEMS, Noise
from tests import numerics

problem_of = functools.cache(lambda name: PROBLEMS[name]())
SCALES = descent.Scales(raw_moment=2.0, median_norm=1.0, population_norm=0.5)


def refuse(*_):
    raise AssertionError("a finished cell was computed again")


@pytest.mark.slow
def test_quick_run_writes_tables_and_figure_and_goes_on_from_its_cells(
    tmp_path, capsys, monkeypatch
):
    run = functools.partial(convergence_rate.main, tmp_path, tmp_path / "runs.jsonl", quick=True)
    run()
    result = json.loads((tmp_path / "convergence_rate.json").read_text())
    pairs = [("regression", noise) for noise in ("p = 1.4, one-sided", LIGHT.label)]
    assert [(row["problem"], row["noise"]) for row in result["noises"]] == pairs
    for row in result["ratios"] + result["theory_ratios"]:
        low, high = row["interval"]
        ours, other = row["estimates"]
        assert row["ratio"] == pytest.approx(ours / other)
        assert row["verdict"] == ("better" if high < 1 else "worse" if low > 1 else "equal")
    assert {row["other"] for row in result["ratios"]} == set(METHODS) - {"PS-Clip-SGD"}
    assert (tmp_path / "convergence_rate.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("Slope of", "each tuned", "Control: Gaussian"))

    monkeypatch.setattr(
        convergence_rate, "COMPUTE", dict.fromkeys(convergence_rate.COMPUTE, refuse)
    )
    run()
    assert json.loads((tmp_path / "convergence_rate.json").read_text()) == result
    with pytest.raises(AssertionError, match="computed again"):
        run(seed=1)

    capsys.readouterr()
    run(markdown=True)
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(pairs)
    assert {row.count("|") for row in (header, line, *rows)} == {header.count("|")}


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("p", [1.4, 1.8])
def test_noise_is_a_lomax_law_of_mean_0_and_unit_mean_deviation(p: float, one_sided: bool):
    noise = Noise(p, one_sided)
    lomax = stats.lomax(noise.tail_index)
    centre = lomax.mean() if one_sided else 0
    unit = 2 * (lomax.expect(lambda x: x - centre, lb=centre) if one_sided else lomax.mean() / 2)
    draws = np.asarray(noise.draw(jax.random.key(0), (100_000,)), np.float64) * unit + centre
    if not one_sided:
        assert np.mean(draws > 0) == pytest.approx(0.5, abs=0.01)
    assert stats.kstest(np.abs(draws), lomax.cdf).pvalue > 0.01


def test_noise_reaches_beyond_what_23_bits_hold(monkeypatch):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.ones(shape, dtype))
    largest = float(Noise(1.4).draw(jax.random.key(0), ()))
    unit = stats.lomax(1.5).mean()
    assert largest == pytest.approx(2.0 ** (32 / 1.5) / unit, rel=1e-3)


def test_gaussian_noise_has_unit_mean_deviation():
    draws = LIGHT.draw(jax.random.key(0), (100_000,))
    assert stats.kstest(draws, stats.norm(scale=math.sqrt(math.pi / 2)).cdf).pvalue > 0.01


@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_gradients_are_unbiased(name: str):
    problem = problem_of(name)
    w = problem.start + 0.3
    gradients = np.asarray(problem.gradients(w, problem.sample(LIGHT, jax.random.key(1), 50_000)))
    errors = gradients.mean(axis=1) - problem.population_gradient(w)
    assert (np.abs(errors) < 4.5 * gradients.std(axis=1) / math.sqrt(50_000)).all()


def test_networks_gradients_are_those_of_its_loss():
    problem = problem_of("network")
    w = problem.start

    def loss(w, x, label):
        return (jnp.sum(jnp.tanh(w.reshape(3, 4) @ x)) - label) ** 2 / 2 + 0.1 * w @ w / 2

    x, labels = problem.sample(Noise(1.4), jax.random.key(0), 7)
    wanted = jax.vmap(jax.grad(loss), (None, 1, 0), out_axes=1)(w, x, labels)
    numerics.assert_close(problem.gradients(w, (x, labels)), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_not_convex_and_as_smooth_as_said(name: str):
    problem = problem_of(name)
    hessian = jax.jit(jax.jacfwd(problem.population_gradient))
    smallest, *_, largest = jnp.linalg.eigvalsh(hessian(problem.start))
    assert smallest < -0.01
    assert 0 < largest < problem.smoothness * 1.001


def test_largest_curvature_is_found_along_the_way():
    def quartic(w):
        return jnp.sum(w**4) / 12 + jnp.sum(w**2) / 2

    found = noisy_problems.largest_curvature(quartic, jnp.array([2.0, 0.0]))
    assert found == pytest.approx(5, rel=1e-5)


def directions(threshold: float) -> dict[str, np.ndarray]:
    """Compute each method's direction from gradients [n, d] in NumPy."""
    gradients = numerics.heavy_tailed(2, (40, 5)).astype(np.float64)
    mean = gradients.mean(axis=0)
    norm = np.linalg.norm(mean)
    return {
        "gradients": gradients,
        "PS-Clip-SGD": numerics.clipped_mean(gradients, numerics.growing(threshold, 1.4, 40)),
        "SGD": mean,
        "global clipping": mean * min(1, threshold / norm),
        "normalised SGD": mean / norm,
        "per-sample constant": numerics.clipped_mean(gradients, np.full(40, threshold)),
        # The quantile's first batch is clipped at the median norm at the start.
        "per-sample quantile": numerics.clipped_mean(gradients, np.full(40, SCALES.median_norm)),
    }


@pytest.mark.parametrize("name", METHODS)
def test_methods_make_their_directions(name: str):
    wanted = directions(threshold=0.8)
    transformation = METHODS[name].make(jnp.array(0.8), 1.4, SCALES.median_norm)
    gradients = jnp.asarray(wanted["gradients"].T, jnp.float32)
    direction, _ = transformation.update(gradients, transformation.init(jnp.zeros(5)))
    numerics.assert_close(direction, wanted[name], rtol=2e-5)


@pytest.mark.parametrize("name", ["PS-Clip-SGD", "SGD"])
def test_simulation_is_sgd_step_by_step(name: str):
    problem, noise, schedule = problem_of("regression"), Noise(1.6), Schedule(4, 16)
    settings = {name: Settings(jnp.array([0.3, 0.5]), jnp.array([0.5, 1.0]))}
    keys = jax.random.split(jax.random.key(3), 3)
    norms = descent.simulate(problem, noise, settings, schedule, SCALES, keys)[name]
    for run, candidate in ((0, 0), (2, 1)):
        learning_rate, threshold = (float(x[candidate]) for x in settings[name])
        w, total = np.asarray(problem.start, np.float64), 0.0
        for key in jax.random.split(keys[run], schedule.steps):
            population = np.asarray(problem.population_gradient(jnp.asarray(w, jnp.float32)))
            gradients = population + np.asarray(problem.sample(noise, key, schedule.batch)).T
            taus = numerics.growing(threshold if name == "PS-Clip-SGD" else math.inf, 1.6, 16)
            w = w - learning_rate * numerics.clipped_mean(gradients, taus)
            total += np.linalg.norm(population)
        assert norms[run, candidate] == pytest.approx(total / schedule.steps, rel=1e-4)


@pytest.mark.parametrize("p", [1.4, 1.8, 2.0])
def test_schedule_spends_the_samples_as_the_theory_has_it(p: float):
    steps, batch = descent.schedule_for(2**20, p)
    assert steps * batch == pytest.approx(2**20, rel=0.02)
    assert math.log(batch) / math.log(steps) == pytest.approx(p / (2 * p - 2), rel=0.01)


def test_every_method_is_tuned_on_as_many_points():
    grids = descent.make_grids(SCALES, 2.0, 5, 3)
    assert list(grids) == list(METHODS)
    for learning_rates, thresholds in grids.values():
        points = set(zip(learning_rates.tolist(), thresholds.tolist(), strict=True))
        assert len(points) == 15


def test_samples_are_of_a_cell_and_other_ones_are_tuned_on():
    plan = convergence_rate.Plan(0, 4, 4, 10, tuple(PROBLEMS), NOISES, (64,), (64,), (2, 2))
    cells = list(convergence_rate.make_cells(plan))
    assert len({cell.label for cell in cells}) == len(cells)
    keys = [jax.random.key_data(convergence_rate.key_for(0, cell.label)).tolist() for cell in cells]
    assert len(set(map(tuple, keys))) == len(cells)
    before = [cells.index(Cell("tuning", *cell[1:])) for cell in cells if cell.kind == "final"]
    finals = [index for index, cell in enumerate(cells) if cell.kind == "final"]
    assert all(a < b for a, b in zip(before, finals, strict=True))


@pytest.mark.parametrize("statistic", descent.STATISTICS)
def test_replicates_are_statistics_of_resampled_runs(statistic: str):
    values = np.random.default_rng(0).pareto(1.5, size=150)
    counts = convergence_rate.resample(len(values), "any")[:20]
    assert (counts.sum(axis=1) == len(values)).all()
    wanted = [convergence_rate.estimate(np.repeat(values, count), statistic) for count in counts]
    np.testing.assert_allclose(convergence_rate.replicate(values, counts, statistic), wanted)


def test_interval_of_a_mean_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    counts = convergence_rate.resample(200, "coverage")
    covered = 0
    for _ in range(200):
        replicates = convergence_rate.replicate(generator.exponential(size=200), counts, "mean")
        low, high = convergence_rate.interval(replicates)
        covered += low <= 1 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_slope_of_a_power_law():
    totals = np.array([256, 1000, 4096])
    powers = np.array([-0.25, -0.4])
    found = convergence_rate.slope(totals, 3.0 * totals[:, None] ** powers)
    np.testing.assert_allclose(found, powers, rtol=1e-10)


def test_comparison_pairs_the_runs():
    others = np.random.default_rng(0).pareto(1.5, size=300) + 1
    counts = convergence_rate.resample(300, "pairs")
    same = convergence_rate.compare(others, others, counts, "mean")
    assert (same["interval"], same["verdict"]) == ([1, 1], "equal")
    better = convergence_rate.compare(0.99 * others, others, counts, "99% quantile")
    assert better["verdict"] == "better"
    assert better["interval"] == pytest.approx([0.99, 0.99])
    assert convergence_rate.compare(1.01 * others, others, counts, "mean")["verdict"] == "worse"


def test_edges_of_grids_are_told():
    assert convergence_rate.is_at_edge([1, 2, 4], 4)
    assert not convergence_rate.is_at_edge([1, 2, 4], 2)
    assert not convergence_rate.is_at_edge([0, 0, 0], 0)  # a method without a threshold
