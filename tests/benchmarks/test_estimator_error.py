import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

import psclip_optax as psc
from benchmarks.common.cache import RunsCache
from benchmarks.common.publishing import RESULTS
from benchmarks.theory import estimator_error, estimator_report, heavy_tails
from benchmarks.theory.heavy_tails import GAUSSIAN, GROWING, MEAN, Noise
from tests import numerics

ONE_SIDED = Noise(1.6, one_sided=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    # As in the tests, because XLA's optimizations change the last digits; no other fixture has run
    # yet.
    jax.config.update("jax_disable_most_optimizations", True)
    out = tmp_path_factory.mktemp("results")
    estimator_error.main(out=out, runs=out / "runs.jsonl", quick=True)
    return out, json.loads((out / "estimator_error.json").read_text())


@pytest.mark.slow
def test_quick_run_writes_every_figure_of_every_estimator(finished):
    out, result = finished
    noises = [row["noise"] for row in result["noises"]]
    assert noises == [noise.label for noise in estimator_error.QUICK.noises]
    pairs = [(noise, name) for noise in noises for name in heavy_tails.ESTIMATORS]
    assert [(row["noise"], row["estimator"]) for row in result["slopes"]] == pairs
    for row in result["slopes"]:
        heavy_mean = row["estimator"] == MEAN and row["noise"] != "Gaussian"
        assert (row["rms"] is None) == heavy_mean
        for name in ("median", "q99", *(() if heavy_mean else ("rms",))):
            value, low, high = row[name]
            assert low < value < high
            assert row[f"{name}_against_bound"] in ("below", "contains", "above")
    assert len(result["levels"]) == len(pairs) * len(estimator_error.QUICK.sizes)
    for row in result["levels"]:
        assert 0 < row["median"][0] < row["q99"][0]
        assert (row["guaranteed_level"] is None) == (row["estimator"] not in heavy_tails.CLIPPED)
    assert [(row["noise"], row["estimator"]) for row in result["tails"]] == pairs
    for row in result["tails"]:
        quantiles = [value for value, _, _ in row["quantiles"]]
        assert quantiles == sorted(quantiles)
        assert all(low <= value <= high for value, low, high in row["quantiles"])
    assert (out / "estimator_error.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_errors_stay_within_what_the_theory_guarantees(finished):
    for row in finished[1]["levels"]:
        if row["estimator"] in heavy_tails.CLIPPED:
            assert 0 < row["level"][1] < row["guaranteed_level"]


def test_errors_are_those_of_the_exact_second_moments():
    noise, n = Noise(1.9), 256
    expected = heavy_tails.expected_rms(noise, numerics.growing(2.0, noise.order, n))
    growing = heavy_tails.estimators(2.0, noise.order, n)[GROWING]
    errors = heavy_tails.simulate(noise, 0.0, [growing], n, 500, jax.random.key(4))
    # The relative standard error is about 2 %.
    assert estimator_error.statistics_of(errors.norms)[0, 0] == pytest.approx(expected, rel=0.1)
    assert heavy_tails.expected_rms(ONE_SIDED, np.ones(3)) is None


@pytest.mark.slow
def test_finished_simulations_are_read_again(finished, monkeypatch, capsys):
    out, result = finished
    assert len(RunsCache(out / "runs.jsonl").records()) == len(estimator_error.QUICK.noises)
    simulated = []

    def recorded(noise, *arguments):
        simulated.append(noise)
        return heavy_tails.simulate(noise, *arguments)

    monkeypatch.setattr(estimator_error, "simulate", recorded)
    estimator_error.main(out=out / "again", runs=out / "runs.jsonl", quick=True)
    assert simulated == [estimator_error.STRONG_SIGNAL_NOISE]
    again = json.loads((out / "again" / "estimator_error.json").read_text())
    assert again == result
    assert all(sentence in capsys.readouterr().out for sentence in result["summary"][:1])


@pytest.mark.slow
def test_markdown_has_a_row_a_noise_and_measures_nothing(finished, capsys):
    out, result = finished
    capsys.readouterr()
    estimator_error.main(out=out, markdown=True)
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(result["noises"])
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1


def test_committed_summary_is_what_the_committed_figures_say():
    result = json.loads((RESULTS / "estimator_error.json").read_text())
    assert estimator_report.summarise(result) == result["summary"]


@pytest.mark.parametrize("noise", [Noise(1.3), ONE_SIDED, GAUSSIAN], ids=lambda noise: noise.label)
def test_estimators_of_all_trials_are_those_of_each(noise):
    gradients, _ = heavy_tails.draw(jax.random.key(0), noise, 0.5, 3, 128)
    estimators = heavy_tails.estimators(2.0, noise.order, 128)
    estimates = {name: estimator(gradients) for name, estimator in estimators.items()}
    growing, few = numerics.growing(2.0, noise.order, 128), heavy_tails.FEW
    for trial, columns in enumerate(np.asarray(gradients)):
        stack = columns.T
        for name, threshold, taus in (
            (GROWING, psc.growing_threshold(2.0, noise.order), growing),
            (heavy_tails.CONSTANT, growing[-1], np.full(128, growing[-1])),
        ):
            tx = psc.per_sample_clip(threshold)
            own, _ = tx.update(jnp.asarray(stack), tx.init(jnp.zeros(10)))
            numerics.assert_close(estimates[name][trial], own, rtol=1e-5)
            reference = numerics.clipped_mean(stack, taus)
            numerics.assert_close(estimates[name][trial], reference, rtol=1e-5)
        numerics.assert_close(estimates[MEAN][trial], stack.mean(axis=0), rtol=1e-5)
        means = np.stack([block.mean(axis=0) for block in np.split(stack, few)])
        coordinate = estimates[heavy_tails.COORDINATE_FEW][trial]
        numerics.assert_close(coordinate, np.median(means, axis=0), rtol=1e-5)
        geometric = np.asarray(estimates[heavy_tails.GEOMETRIC_FEW][trial], np.float64)
        numerics.assert_close(geometric, minimiser_of_distances(means, geometric), rtol=1e-3)


def minimiser_of_distances(points, start):
    distances = lambda x: np.linalg.norm(points - x, axis=1).sum()
    return optimize.minimize(distances, start, method="BFGS", options={"gtol": 1e-9}).x


def test_radii_have_the_tail_they_are_said_to_have():
    _, radii = heavy_tails.draw(jax.random.key(1), Noise(1.3), 0.0, 8, 4096)
    pareto = stats.pareto(1.3)
    assert stats.kstest(np.asarray(radii).ravel(), pareto.cdf).pvalue > 1e-3


def test_small_uniforms_reach_beyond_float32_steps():
    bits = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    radii = heavy_tails.radii_of_bits(bits, 1.3)
    expected = ((np.asarray(bits, np.float64) + 0.5) / 2**32) ** (-1 / 1.3)
    np.testing.assert_allclose(radii, expected, rtol=1e-5)


@pytest.mark.parametrize("one_sided", [False, True])
def test_noise_is_centred(one_sided):
    noise = Noise(1.9, one_sided)
    gradients, radii = heavy_tails.draw(jax.random.key(2), noise, 0.5, 1, 2**15)
    # Weights that shorten the tail: E R^{-1} (g - μ) is known, and has a finite variance.
    flattened = (gradients[0].T - 0.5 * heavy_tails.unit_mean()) / radii[0][:, None]
    mean = float(heavy_tails.unit_mean() @ flattened.mean(axis=0))
    entry = stats.beta(0.5, 4.5).expect(math.sqrt) * math.sqrt(10) if one_sided else 0.0
    inverse_moments = 1.9 / (1.9 + 1), 1.9 / (1.9 - 1)
    expected = entry * (1 - inverse_moments[0] * inverse_moments[1])
    assert mean == pytest.approx(expected, abs=0.02)


def test_scale_is_the_raw_moment():
    noise, norm = Noise(1.6), 3.0

    def integrand(cosine, log_radius):
        radius = math.exp(log_radius)
        moment = (radius**2 + 2 * radius * norm * cosine + norm**2) ** (noise.order / 2)
        return (moment - radius**noise.order) * 1.6 * radius**-1.6 * (1 - cosine**2) ** 3.5

    total, _ = integrate.dblquad(integrand, 0, 30, -1, 1, epsrel=1e-4)
    normaliser = integrate.quad(lambda t: (1 - t**2) ** 3.5, -1, 1)[0]
    expected = (16.0 + total / normaliser) ** (1 / noise.order)
    sigma = heavy_tails.raw_scale(noise, norm, 2**16, jax.random.key(3))
    assert sigma == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("p", [1.2, 1.5, 1.8, 2.0])
def test_guarantee_bounds_bias_and_variance_of_any_threshold(p):
    """Check the two-point distribution with the largest possible bias: 0, or x above τ."""
    tau, n = 3.0, 7
    x = tau * p / (p - 1)
    probability = 0.01
    sigma = (probability * x**p) ** (1 / p)
    bias = probability * (x - tau)
    variance = probability * (1 - probability) * tau**2 / n
    guaranteed = heavy_tails.guaranteed_rms(np.full(n, tau), sigma, p)
    assert math.sqrt(bias**2 + variance) <= guaranteed
    c = (p - 1) ** (p - 1) / p**p
    assert bias == pytest.approx(c * sigma**p * tau ** (1 - p))


def test_slopes_of_power_laws_are_their_exponents():
    sizes = np.array([256, 512, 1024, 2048])
    values = 3 * sizes[:, None] ** np.array([-0.5, -0.25])
    np.testing.assert_allclose(
        estimator_error.log_slopes(np.log(sizes), values), [-0.5, -0.25], rtol=1e-12
    )
    assert estimator_error.against([-0.3, -0.4, -0.2], -0.25) == "contains"
    assert estimator_error.against([-0.3, -0.4, -0.2], -0.1) == "below"
    assert estimator_error.against([-0.3, -0.4, -0.2], -0.5) == "above"


def test_tails_are_told_apart():
    rng = np.random.default_rng(0)
    polynomial = stats.pareto(2.0).rvs(size=200_000, random_state=rng)
    polylog = rng.exponential(size=200_000)
    row = lambda norms: estimator_error.tail_row(GAUSSIAN, 1, MEAN, norms, 200, rng)
    heavy, light = row(polynomial), row(polylog)
    assert (heavy["fits_better"], light["fits_better"]) == ("polynomial", "polylog")
    for fitted, exponent in ((heavy["polynomial"], 0.5), (light["polylog"], 1.0)):
        _, low, high = fitted["slope"]
        assert low < exponent < high
    # The last of 13 is δ = 1e-4.
    value, low, high = heavy["quantiles"][-1]
    assert low < 100.0 < high
    assert low < value < high


def test_resampled_quantiles_spread_as_those_of_whole_resamples():
    rng = np.random.default_rng(1)
    ordered, ranks = np.sort(rng.exponential(size=1000)), np.array([500, 900])
    quick = estimator_error.resampled_quantiles(ordered, ranks, 4000, rng)
    whole = np.sort(rng.choice(ordered, (4000, 1000)), axis=1)[:, ranks - 1]
    for column in range(2):
        assert stats.ks_2samp(quick[:, column], whole[:, column]).pvalue > 1e-3
    assert np.corrcoef(quick.T)[0, 1] == pytest.approx(np.corrcoef(whole.T)[0, 1], abs=0.05)


def test_bootstrap_is_paired_over_estimators():
    norms = np.random.default_rng(2).exponential(size=(1, 500)) * np.array([[1.0], [3.0]])
    replicates = estimator_error.bootstrap(norms, 20, np.random.default_rng(3))
    assert replicates.shape == (20, 3, 2)
    np.testing.assert_allclose(replicates[..., 1], 3 * replicates[..., 0], rtol=1e-12)
    assert np.ptp(replicates[:, 0, 0]) > 0


def test_bias_has_a_slope_only_where_it_is_told_from_zero():
    sizes = (256, 512, 1024)
    spread = np.random.default_rng(4).normal(size=2000)
    spread -= spread.mean()
    biased = {n: 2 * n**-0.5 + 0.01 * spread for n in sizes}
    slope = estimator_error.bias_slope(biased)
    assert slope is not None
    assert slope[0] == pytest.approx(-0.5)
    assert slope[1] < slope[0] < slope[2]
    assert estimator_error.bias_slope(biased | {512: spread}) is None
