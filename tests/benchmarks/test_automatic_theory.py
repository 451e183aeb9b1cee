import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psclip_optax as psc
from benchmarks.theory import automatic_report, automatic_theory, descent, heavy_tails
from benchmarks.theory.heavy_tails import Errors, Noise
from tests import numerics


@pytest.mark.slow
def test_quick_run_writes_tables_and_figure_and_goes_on_from_its_parts(
    tmp_path, capsys, monkeypatch
):
    run = functools.partial(automatic_theory.main, tmp_path, tmp_path / "runs.jsonl", quick=True)
    run()
    result = json.loads((tmp_path / "automatic_theory.json").read_text())
    laws, sizes = automatic_theory.QUICK.laws, automatic_theory.QUICK.sizes
    wanted = [(law.label, n, e) for law in laws for n in sizes for e in automatic_theory.ESTIMATORS]
    assert [(row["noise"], row["n"], row["estimator"]) for row in result["errors"]] == wanted
    for row in result["errors"]:
        if row["estimator"] == heavy_tails.GROWING:
            assert row["q99_ratio"] == [1, 1, 1]
        has_rms = row["estimator"] != heavy_tails.MEAN or row["noise"] == "Gaussian"
        assert (row["rms_ratio"] is not None) == has_rms
    assert {row["other"] for row in result["ratios"]} == set(automatic_theory.OTHERS)
    assert {row["ours"] for row in result["ratios"]} == {descent.AUTOMATIC}
    assert (tmp_path / "automatic_theory.png").read_bytes().startswith(b"\x89PNG")
    assert "At an edge of the grid" in capsys.readouterr().out
    errors = automatic_report.errors_to_markdown(result, *sizes)
    assert errors.count("\n") == 2 + 2 * len(laws) * len(sizes)
    assert automatic_report.ratios_to_markdown(result).count("\n") == 3

    monkeypatch.delattr(automatic_theory, "simulate")
    monkeypatch.delattr("benchmarks.theory.convergence_rate.simulate")
    run()
    assert json.loads((tmp_path / "automatic_theory.json").read_text()) == result


def test_threshold_in_turn_is_the_librarys_after_the_batches_before(monkeypatch):
    noise, n, key = Noise(1.6), 8, jax.random.key(0)
    monkeypatch.setattr(heavy_tails, "SAMPLES_PER_CHUNK", 2 * n)  # two trials each
    monkeypatch.setattr(heavy_tails, "WARM_UP", 3)
    mean = heavy_tails.plain_mean
    errors = heavy_tails.simulate(noise, 0.5, [mean], n, 4, key, psc.auto_threshold())

    def drawn(key, trials):
        return np.asarray(heavy_tails.draw(key, noise, 0.5, trials, n)[0])

    warm_up = jax.random.split(jax.random.fold_in(key, 3), 3)
    batches = np.concatenate([drawn(own, 1) for own in warm_up])
    trials = np.concatenate([drawn(own, 2) for own in jax.random.split(key, 2)])
    rule = psc.auto_threshold()
    state = rule.init()
    for batch in batches:
        state = rule.update(state, np.linalg.norm(batch, axis=0))
    for trial, batch in enumerate(trials):
        tau = float(rule.threshold(state)(jnp.ones(1, int))[0])
        error = numerics.clipped_mean(batch.T, np.full(n, tau)) - 0.5 * heavy_tails.unit_mean()
        assert errors.norms[1, trial] == pytest.approx(np.linalg.norm(error), rel=1e-4)
        state = rule.update(state, np.linalg.norm(batch, axis=0))
    assert errors.norms.shape == (2, 4)


def test_rescaled_errors_are_of_the_best_common_factor():
    rng, mean = np.random.default_rng(0), automatic_theory.MEAN_NORM
    target = np.array([mean, 0, 0])
    estimates = 0.3 * target + 0.1 * rng.normal(size=(500, 3))
    turned = -estimates
    errors = np.stack([estimates, turned]) - target
    norms = np.linalg.norm(errors, axis=-1)
    factors, scaled = automatic_theory.rescaled(Errors(norms, errors[..., 0]))
    by_factor = [
        np.mean(np.sum((c * estimates - target) ** 2, axis=1)) for c in np.linspace(0, 3, 301)
    ]
    assert factors[0] == pytest.approx(np.linspace(0, 3, 301)[np.argmin(by_factor)], abs=0.01)
    expected = np.linalg.norm(factors[0] * estimates - target, axis=1)
    np.testing.assert_allclose(scaled[0], expected, rtol=1e-9)
    # No learning rate reverses an estimate.
    assert factors[1] == 0
    np.testing.assert_allclose(scaled[1], mean, rtol=1e-9)


def test_automatic_threshold_is_tuned_on_as_many_learning_rates_as_there_are_points():
    scales = descent.Scales(raw_moment=2.0, median_norm=1.0, population_norm=0.5)
    grids = descent.make_grids(scales, 2.0, 5, 3, automatic_theory.METHODS)
    assert list(grids) == list(automatic_theory.METHODS)
    rates = np.asarray(grids[descent.AUTOMATIC].learning_rates)
    assert len(set(rates.tolist())) == 15
    assert (rates.min(), rates.max()) == pytest.approx((1 / 16, 16))
