import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

import psclip_optax as psc
from benchmarks.zoo import laws
from benchmarks.zoo.laws import LAWS, LIGHT_LAWS, POWER_LAWS
from psclip_optax import tails
from tests import slow
from tests.numerics import heavy_tailed

ACCEPTED_LAWS = [name for name in POWER_LAWS if "in Gaussian" not in name]
PURE_LIGHT_LAWS = [name for name in LIGHT_LAWS if "30%" not in name]


def sample(name: str, n: int, seed: int = 0) -> np.ndarray:
    return LAWS[name].sample(np.random.default_rng(seed), n)


def trials(name: str, n: int, number: int, estimate=tails.tail_index) -> list:
    rng = np.random.default_rng([n, number])
    return [estimate(LAWS[name].sample(rng, n)) for _ in range(number)]


def quantiles(index: float, n: int = 5000) -> np.ndarray:
    """Return a Pareto sample without noise."""
    return (1 - (np.arange(n) + 0.5) / n) ** (-1 / index)


def share_covering(results, truth: float) -> float:
    return np.mean([result.lower <= truth <= result.upper for result in results])


# Hill's estimator


@pytest.mark.parametrize("k", [1, 2, 77, 999])
def test_hill_is_the_mean_log_excess(k):
    norms = sample("Student-t 1.5", 1000)
    ordered = sorted(norms, reverse=True)
    excesses = [math.log(ordered[j] / ordered[k]) for j in range(k)]
    estimate = tails.hill_estimator(norms, k)
    assert estimate.index == pytest.approx(1 / np.mean(excesses), rel=1e-12)
    assert estimate.k == k


def test_hill_interval_of_a_pareto_law_covers_as_often_as_it_says():
    # 1,000 trials of 90% have a standard error of 0.95%.
    estimate = lambda norms: tails.hill_estimator(norms, 200, confidence=0.9)
    results = trials("Pareto 1.5", 1000, 1000, estimate)
    assert share_covering(results, 1.5) == pytest.approx(0.9, abs=0.03)


def test_hill_plot_is_the_estimator_at_each_k():
    norms = sample("stable 1.3", 1000)
    plot = tails.hill_plot(norms, confidence=0.8)
    assert plot.k.tolist() == list(range(1, 501))
    for k in (1, 3, 100, 500):
        estimate = tails.hill_estimator(norms, k, confidence=0.8)
        drawn = [values[k - 1] for values in (plot.index, plot.lower, plot.upper)]
        np.testing.assert_allclose(
            drawn, [estimate.index, estimate.lower, estimate.upper], rtol=1e-12
        )


def test_hill_plot_starts_at_infinity_where_the_largest_norms_tie():
    norms = quantiles(2.0)
    norms[-4:] = norms[-1]
    plot = tails.hill_plot(norms)
    assert np.isinf(plot.index[:3]).all()
    assert np.isinf(plot.upper[:3]).all()
    assert np.isfinite(plot.index[3:]).all()


# The choice of k


def test_k_is_a_tenth_of_the_upper_half_of_a_pareto_law():
    assert tails.choose_k(quantiles(1.5, 10_000)) == 500


def test_k_stays_above_the_point_where_a_power_law_ends():
    # Index 1.5 for the largest tenth of the norms, index 6 below.
    exceeded = 1 - (np.arange(20_000) + 0.5) / 20_000
    norms = np.where(exceeded < 0.1, (exceeded / 0.1) ** (-1 / 1.5), (exceeded / 0.1) ** (-1 / 6))
    k = tails.choose_k(norms)
    assert 100 <= k <= 2000
    assert tails.tail_index(norms).index == pytest.approx(1.5, rel=0.05)


@given(factor=st.floats(1e-30, 1e30), seed=st.integers(0, 99))
def test_scale_and_order_of_the_norms_do_not_matter(factor, seed):
    norms = sample("Student-t 2", 600, seed)
    shuffled = np.random.default_rng(seed).permutation(norms) * factor
    before, after = tails.suggest_threshold(norms), tails.suggest_threshold(shuffled)
    assert after.tail.k == before.tail.k
    assert after.tail.verdict == before.tail.verdict
    np.testing.assert_allclose(
        [after.tail.index, after.tail.lower, after.beta, after.alpha / factor],
        [before.tail.index, before.tail.lower, before.beta, before.alpha],
        rtol=1e-9,
    )


# Index and interval


@pytest.mark.parametrize(
    ("n", "number", "widest"), [(2_000, 200, 1.1), (10_000, 60, 0.7)], ids=["2,000", "10,000"]
)
@pytest.mark.parametrize("name", slow.but(ACCEPTED_LAWS[::4], ACCEPTED_LAWS))
def test_the_interval_covers_the_index(name, n, number, widest):
    results = trials(name, n, number)
    index = LAWS[name].index
    assert share_covering(results, index) >= 0.9
    assert np.median([result.upper - result.lower for result in results]) / index <= widest
    assert np.median([result.index for result in results]) == pytest.approx(index, rel=0.15)


def test_the_interval_without_a_choice_of_k_would_not_cover():
    # These laws are biased, so the coverage above is not due to a lack of bias.
    for name in ("Student-t 3", "stable 1.5"):
        results = trials(name, 10_000, 50, lambda norms: tails.hill_estimator(norms, 1000))
        assert share_covering(results, LAWS[name].index) < 0.1


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_allows_for_a_bias_of_half_a_standard_error(confidence):
    result = tails.tail_index(sample("Pareto 2", 2000), confidence=confidence)
    half_width = math.log(result.upper / result.lower) / 2 * math.sqrt(result.k)
    misses = lambda c: stats.norm.cdf(c - 0.5) - stats.norm.cdf(-c - 0.5) - confidence
    assert half_width == pytest.approx(optimize.brentq(misses, 0, 10), rel=1e-6)
    assert result.confidence == confidence


def test_more_norms_give_a_narrower_interval():
    widths = [
        np.median([r.upper - r.lower for r in trials("Student-t 1.5", n, 20)])
        for n in (1000, 6000, 36_000)
    ]
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


# Light tails


@pytest.mark.parametrize("name", PURE_LIGHT_LAWS)
def test_light_tails_are_called_light(name):
    results = trials(name, 10_000, 60)
    assert np.mean([result.is_light for result in results]) >= 0.8
    assert np.mean([result.verdict == "heavy" for result in results]) <= 0.1


@pytest.mark.parametrize("name", POWER_LAWS)
def test_power_laws_are_not_called_light(name):
    results = trials(name, 2000, 100)
    assert np.mean([result.is_light for result in results]) <= 0.1


def largest_log_likelihood(values: np.ndarray, covariate: np.ndarray, largest_slope=None) -> float:
    """Maximise the likelihood of exponential values whose log-mean is linear in a covariate."""

    def loss(coefficients):
        log_means = coefficients[0] + coefficients[1] * (covariate - covariate.mean())
        return np.mean(log_means + values * np.exp(-log_means))

    bounds = [(None, None), (None, largest_slope)]
    return -len(values) * optimize.minimize(loss, [0.0, -1.0], bounds=bounds, tol=1e-12).fun


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_the_ratio_is_of_the_largest_likelihoods_of_rounded_norms_too(decimals):
    norms = sample("Pareto 1.5", 3000, seed=1).round(decimals)
    j = np.arange(1, 1501)
    spacings = -j * np.diff(np.log(np.sort(norms)[: -len(j) - 2 : -1]))
    spacings /= spacings.mean()
    heavy = largest_log_likelihood(spacings, j / 1501)
    light = largest_log_likelihood(spacings, np.log(np.log(3000 / (j - 0.5))), -0.5)
    assert tails.tail_index(norms).log_likelihood_ratio == pytest.approx(heavy - light, rel=1e-4)


def test_a_bounded_law_is_light():
    assert tails.tail_index(np.random.default_rng(0).uniform(size=2000)).is_light


def test_a_light_tail_has_no_finite_index_and_all_moments():
    suggestion = tails.suggest_threshold(sample("|N(0, 1)|", 10_000))
    assert suggestion.tail.index == suggestion.tail.upper == math.inf
    assert 2 < suggestion.tail.lower < math.inf
    assert suggestion.scale.method == "normal"
    assert suggestion.beta == suggestion.beta_interval[1] == 2
    assert suggestion.scale.lower < 1 < suggestion.scale.upper
    assert suggestion.scale.upper - suggestion.scale.lower < 0.1


# Scale


@pytest.mark.parametrize("p", [0.3, 1.0, 1.9])
def test_scale_is_the_raw_moment(p):
    norms = sample("Student-t 1.5", 1000)
    norms[::5] = 0
    scale = tails.moment_scale(norms, p)
    assert scale.value == pytest.approx(np.mean(norms**p) ** (1 / p), rel=1e-12)
    assert 0 <= scale.lower <= scale.value <= scale.upper
    assert scale.p == p


def test_scale_of_norms_whose_powers_leave_the_range_of_float64():
    norms = quantiles(3.0)
    huge, tiny = (tails.moment_scale(norms * unit, 2.0) for unit in (1e290, 1e-290))
    assert huge.value / 1e290 == pytest.approx(tails.moment_scale(norms, 2.0).value)
    assert tiny.value / 1e-290 == pytest.approx(tails.moment_scale(norms, 2.0).value)
    assert math.isfinite(huge.lower)


def test_scale_covers_by_the_central_limit_theorem_where_there_is_a_variance():
    results = trials("Pareto 3", 2000, 200, lambda norms: tails.moment_scale(norms, 0.5))
    assert {result.method for result in results} == {"normal"}
    truth = laws.pareto(3).moment(0.5) ** 2
    assert 0.9 <= share_covering(results, truth) <= 0.99


@pytest.mark.parametrize("name", ["Pareto 1.5", "Student-t 1.5", "stable 1.5"])
def test_scale_covers_where_there_is_none(name):
    p = 1.0
    results = trials(name, 10_000, 60, lambda norms: tails.moment_scale(norms, p))
    assert {result.method for result in results} == {"tail"}
    assert share_covering(results, LAWS[name].moment(p) ** (1 / p)) >= 0.9
    assert np.median([result.upper / result.lower for result in results]) < 2.5


def test_scale_of_a_moment_that_may_be_infinite_is_unbounded():
    scale = tails.moment_scale(quantiles(1.5), 1.45)
    assert scale.upper == math.inf
    assert math.isfinite(scale.value)


# Thresholds


@pytest.mark.parametrize("name", ["Student-t 1.3", "Pareto 3", "exponential"])
def test_suggestion_is_the_scale_of_an_order_below_the_index(name):
    norms = sample(name, 10_000)
    suggestion = tails.suggest_threshold(norms)
    assert suggestion.tail == tails.tail_index(norms)
    assert suggestion.scale == tails.moment_scale(norms, suggestion.beta)
    margin = max(0.1, suggestion.tail.k**-0.5)
    assert suggestion.beta == pytest.approx(min(2, max(1, (1 - margin) * suggestion.tail.index)))
    low, high = suggestion.beta_interval
    assert 1 <= low <= suggestion.beta <= high <= 2
    assert suggestion.alpha_interval == (suggestion.scale.lower, suggestion.scale.upper)
    assert suggestion.threshold == psc.growing_threshold(suggestion.alpha, suggestion.beta)


def test_suggestion_of_an_index_below_one_warns():
    printed = str(tails.suggest_threshold(quantiles(0.8)))
    assert "the gradient has no mean" in printed
    assert "beta=1)" in printed


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        (quantiles(1.5), ["heavy", "1.5", "to ∞", "The index may be below p"]),
        (sample("|N(0, 1)|", 5000), ["light", "no finite index", "∞ (95%:", "beta=2)"]),
    ],
    ids=["heavy", "light"],
)
def test_printed_suggestion_says_what_to_write(norms, words):
    suggestion = tails.suggest_threshold(norms)
    printed = str(suggestion)
    assert all(word in printed for word in words)
    assert str(suggestion.tail) in printed
    assert str(suggestion.scale) in printed
    written = eval(printed.splitlines()[-1], {"psc": psc})
    assert written.alpha == pytest.approx(suggestion.alpha, rel=0.01)
    assert written.beta == pytest.approx(suggestion.beta, rel=0.01)


def test_undecided_says_so():
    # Of 60 samples that are hard to classify at least one is undecided.
    results = trials("log-normal σ = 1", 1000, 60)
    undecided = [result for result in results if result.verdict == "undecided"]
    assert undecided
    assert "about as likely" in str(undecided[0])
    assert all(math.isfinite(result.upper) for result in undecided)


def test_norms_of_clip_stats():
    loss = lambda w, x, y: jnp.square(jnp.dot(w, x) - y)
    x = jax.random.normal(jax.random.key(0), (4000, 3))
    y = heavy_tailed(1, (4000,))
    f = psc.clipped_grad(loss, jnp.inf, return_stats=True)
    _, clip_stats = jax.jit(f)(jnp.zeros(3), x, y)
    suggestion = tails.suggest_threshold(clip_stats.norms)
    assert suggestion.tail.lower < 1.5 < suggestion.tail.upper
    # In batches of 8 it clips some, but few.
    taus = suggestion.threshold(jnp.arange(1, 9))
    assert 0.01 < jnp.mean(clip_stats.norms.reshape(-1, 8) > taus) < 0.1


# Inputs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_any_real_dtype_is_computed_in_float64(dtype):
    norms = jnp.asarray(3 * sample("Pareto 2", 1000), dtype)
    before = np.asarray(norms, np.float64)
    assert tails.suggest_threshold(norms) == tails.suggest_threshold(before)
    assert tails.suggest_threshold(list(before)) == tails.suggest_threshold(before)


def test_rounding_to_bfloat16_hardly_changes_the_index():
    norms = sample("Student-t 1.5", 10_000)
    exact, rounded = tails.tail_index(norms), tails.tail_index(jnp.asarray(norms, jnp.bfloat16))
    assert rounded.verdict == exact.verdict == "heavy"
    assert rounded.index == pytest.approx(exact.index, rel=0.1)


def test_norms_are_left_as_they_are():
    norms = sample("Pareto 2", 1000)
    before = norms.copy()
    tails.suggest_threshold(norms)
    np.testing.assert_array_equal(norms, before)


def test_zeros_count_in_the_scale_alone():
    norms = sample("Pareto 2", 2000)
    with_zeros = np.concatenate([norms, np.zeros(500)])
    alone, beside = tails.suggest_threshold(norms), tails.suggest_threshold(with_zeros)
    assert beside.tail.index == alone.tail.index
    assert beside.tail.num_norms == 2500
    assert beside.alpha == pytest.approx(alone.alpha * 0.8 ** (1 / alone.beta))


NORMS = quantiles(2.0, 1000)


def with_value(value):
    norms = NORMS.copy()
    norms[[3, 7]] = value
    return norms


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        (NORMS[:499], ValueError, "at least 500 positive norms.*got 499.*several batches"),
        (np.concatenate([NORMS[:400], np.zeros(600)]), ValueError, "at least 500.*got 400"),
        (np.zeros(1000), ValueError, "at least 500.*got 0"),
        (with_value(np.nan), ValueError, "finite norms, but 2 of 1000.*isfinite"),
        (with_value(np.inf), ValueError, "finite norms, but 2 of 1000"),
        (with_value(-3.0), ValueError, "norms ≥ 0, but 2 of 1000.*the least -3.*absolute"),
        (NORMS.reshape(10, 100), ValueError, r"shape \[n\].*float64\[10, 100\].*ravel"),
        (np.float64(1), ValueError, r"shape \[n\].*float64\[\]"),
        (np.full(1000, 3.0), ValueError, "26 largest norms are equal.*before clipping"),
        (np.minimum(NORMS, 2.0), ValueError, "26 largest norms are equal.*before clipping"),
        (NORMS.astype(complex), TypeError, r"real dtype.*, got complex128\[1000\]"),
        (NORMS > 2, TypeError, r"real dtype.*, got bool\[1000\]"),
        (["a"] * 1000, TypeError, "real dtype"),
        (None, TypeError, "real dtype"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        tails.tail_index,
        tails.suggest_threshold,
        tails.choose_k,
        tails.hill_plot,
        lambda norms: tails.moment_scale(norms, 1.0),
    ],
)
def test_bad_norms_are_refused(function, norms, error, message):
    with pytest.raises(error, match=message):
        function(norms)


def test_traced_norms_are_refused():
    with pytest.raises(TypeError, match="return the norms from the jitted function"):
        jax.jit(tails.suggest_threshold)(jnp.asarray(NORMS))


@pytest.mark.parametrize("k", [0, -1, 1000])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"1 ≤ k < 1000.*got {k}"):
        tails.hill_estimator(NORMS, k)


def test_k_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="hill_estimator expects an int as `k`"):
        tails.hill_estimator(NORMS, 10.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("p", [0, -1.0, math.nan, math.inf])
def test_order_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match=f"`p` > 0 and < inf, got {p:g}"):
        tails.moment_scale(NORMS, p)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match="`confidence` > 0 and < 1, got"):
        tails.suggest_threshold(NORMS, confidence=confidence)
