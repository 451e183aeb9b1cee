import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import psclip_optax as psc
from benchmarks.thresholds import auto_report, auto_rules, auto_tasks, auto_threshold
from benchmarks.thresholds.auto_rules import Candidate

NORMS = np.random.default_rng(0).pareto(1.5, 500) + 1


@pytest.mark.slow
def test_quick_run_writes_its_table_and_figure_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    auto_threshold.main(out=tmp_path, runs=tmp_path / "runs", quick=True)
    result = json.loads((tmp_path / "auto_threshold.json").read_text())
    (row,) = result["rows"]
    means = {name: np.mean(row["tuned"][name]["test"]) for name in auto_rules.TUNED}
    assert row["best"] == max(means, key=means.__getitem__)
    assert set(row["differences"]) == set(auto_rules.METHODS)
    assert row["differences"]["automatic"]["mean"] <= 1 - means[row["best"]]
    assert all(len(winner["test"]) == 2 for winner in row["tuned"].values())
    assert (tmp_path / "auto_threshold.png").read_bytes().startswith(b"\x89PNG")
    assert "heavy targets" in capsys.readouterr().out
    monkeypatch.delattr(auto_threshold, "build_program")
    auto_threshold.main(out=tmp_path, runs=tmp_path / "runs", quick=True)
    assert auto_report.conditions_to_markdown(result).count("\n") == 3
    assert auto_report.rules_to_markdown(result).count("\n") == 2 + len(auto_rules.METHODS)


def described(**test_scores):
    """Describe a row from scores by learning rate and threshold, with one more seed."""
    scores = {
        name: {"validation": found, "test": found}
        for name, found in (
            (name.replace("_", " "), [[[value, value] for value in row] for row in own])
            for name, own in test_scores.items()
        )
    }
    cell = {"data": "clean", "is_heavy": False, "is_held_out": False}
    row = {"cell": cell, "label": "", "steps": 1, "rates": (0.1, 1.0), "scores": scores}
    return auto_threshold.described(row)


def test_failures_are_of_trials_that_some_clipping_trains():
    found = described(
        no_clipping=[[0.9], [0.1]],
        batch_clipping=[[0.1, 0.1], [0.1, 0.1]],
        fixed_threshold=[[0.1, 0.8], [0.1, 0.7]],
        median=[[0.6], [0.1]],
    )
    assert found["failures"] == {
        "no clipping": [0, 2],
        "batch clipping": [2, 2],
        "fixed threshold": [0, 0],
        "median": [0, 2],
    }
    assert found["differences"]["median"]["mean"] == pytest.approx(0.6 - 0.9)


@pytest.mark.parametrize(
    ("mean", "high", "is_heavy", "expected"),
    [
        (-0.004, 0.0, False, "met"),
        (-0.008, -0.001, False, "open"),
        (-0.008, -0.006, False, "missed"),
        (-0.008, -0.006, True, "met"),
        (-0.02, -0.011, True, "missed"),
    ],
)
def test_verdict_is_by_the_aim_and_the_interval(mean, high, is_heavy, expected):
    difference = {"mean": mean, "interval": [2 * mean - high, high]}
    row = {"cell": {"is_heavy": is_heavy}, "differences": {"automatic": difference}}
    assert auto_report.verdict(row) == expected


def state_of(norms):
    return auto_rules.updated(auto_rules.initial_state(), jnp.asarray(norms, jnp.float32))


def test_truncated_squares_solve_their_equation():
    tau = auto_rules.truncated_squares(state_of(NORMS), 128).alpha
    assert np.mean(np.minimum(NORMS**2 / tau**2, 1)) == pytest.approx(np.log(129) / 128, rel=0.05)


def test_bias_and_variance_are_least():
    n = 128

    def error(tau):
        bias = np.mean(np.maximum(NORMS - tau, 0))
        return bias**2 + np.mean(np.minimum(NORMS, tau) ** 2) / n

    best = optimize.minimize_scalar(error, bounds=(1, NORMS.max()), method="bounded").x
    tau = auto_rules.bias_and_variance(state_of(NORMS), n).alpha
    assert error(tau) == pytest.approx(error(best), rel=0.02)


def test_efficient_threshold_has_the_least_variance_of_those_allowed():
    median = np.median(NORMS)

    def variance(tau):
        return np.mean(np.minimum(NORMS, tau) ** 2) / np.mean(tau >= NORMS) ** 2

    allowed = np.geomspace(max(median / 2, 1.01), 4 * median, 400)
    tau = auto_rules.efficient(state_of(NORMS), 128).alpha
    assert variance(tau) == pytest.approx(min(map(variance, allowed)), rel=0.05)


def test_spread_norms_are_clipped_as_by_the_automatic_threshold_and_others_less():
    automatic = lambda state: auto_rules.automatic(state, 128).alpha
    spread, level = state_of(np.geomspace(1, 1e6, 100)), state_of(np.geomspace(1, 1.1, 100))
    assert auto_rules.by_spread(spread, 128).alpha == pytest.approx(automatic(spread))
    assert auto_rules.by_spread(level, 128).alpha == pytest.approx(4 * automatic(level))


def test_slow_median_grows_by_a_twentieth():
    state = auto_rules.updated(state_of(np.ones(50)), jnp.full(500, 100.0))
    assert auto_rules.automatic(state, 50).alpha == pytest.approx(50, rel=0.03)
    assert auto_rules.slow(state, 50).alpha == pytest.approx(1.05 / 2, rel=0.03)


def test_growing_is_the_automatic_one_in_the_middle_of_a_batch():
    state, index = state_of([1.0, 2.0, 3.0]), list(auto_rules.RULES).index("growing")
    threshold = auto_rules.threshold_of(Candidate(rule=index), np.inf, state, 7)
    k = np.arange(1, 8)
    expected = auto_rules.automatic(state, 7).alpha * np.sqrt(k / 4)
    np.testing.assert_allclose(threshold(k), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("candidate", "expected"), [(Candidate(), np.inf), (Candidate(-1, 2.0), 3)]
)
def test_fixed_thresholds_are_the_same_for_all_samples(candidate, expected):
    threshold = auto_rules.threshold_of(candidate, 1.5 * candidate.sample, state_of(NORMS), 4)
    np.testing.assert_allclose(threshold(np.arange(1, 5)), expected)


@pytest.mark.parametrize("condition", ["clean", "heavy targets", *auto_tasks.HELD_OUT])
def test_conditions_have_as_many_held_out_samples_and_none_of_them_corrupted(condition):
    first, second = (auto_tasks.CONDITIONS[condition].load(seed) for seed in (0, 1))
    kind = auto_tasks.KINDS[auto_tasks.CONDITIONS[condition].kind]
    for split in first:
        num_samples = {len(leaf) for leaf in jax.tree.leaves(split)}
        assert len(num_samples) == 1
    perfect = jax.tree.leaves(first.test.targets)[0]
    outputs = perfect[:, None] if kind.num_outputs == 1 else np.eye(kind.num_outputs)[perfect]
    assert kind.score(outputs, first.test.targets) == 1
    if condition not in ("clean", "heavy targets"):
        same = jax.tree.map(np.array_equal, first.train, second.train)
        assert not all(jax.tree.leaves(same))


def test_salt_and_pepper_hit_a_fifth_of_the_images():
    images = np.full((500, 8, 8, 1), 7, np.uint8)
    images[0] = 16
    hit = auto_tasks.with_salt_and_pepper(images, seed=0)
    changed = (hit != images).reshape(500, -1).mean(axis=1)[1:]
    assert np.mean(changed > 0) == pytest.approx(0.2, abs=0.06)
    assert np.mean(changed[changed > 0]) == pytest.approx(0.4, abs=0.05)
    assert set(np.unique(hit)) == {0, 7, 16}


def test_actions_are_drawn_from_the_policy_and_make_its_gradient():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25] + [1e-9] * 5))
    uniforms = (jnp.arange(400) + 0.5) / 400
    value = lambda logits, uniform: auto_tasks.reinforce(logits, (1, 0.5, uniform))
    grads = jax.vmap(jax.grad(value), (None, 0))(logits, uniforms)
    shares, chance = np.exp(logits), auto_tasks.CHANCE_OF_REWARD
    rewards = np.eye(8)[1] + 0.5 - chance
    expected = -(shares * rewards - shares * np.sum(shares * rewards))
    np.testing.assert_allclose(grads.mean(axis=0), expected, atol=1e-3)


def test_engine_clips_every_kind_of_loss_as_vmap_does():
    for kind, condition in (("text", "heavy losses of text"), ("policy", "heavy returns")):
        train = jax.tree.map(lambda x: x[:8], auto_tasks.CONDITIONS[condition].load(0).train)
        own = auto_tasks.KINDS[kind]
        sizes = (auto_tasks.features(train.inputs).shape[1], 4, own.num_outputs)
        params = auto_tasks.initial_params(jax.random.key(0), sizes)
        loss = lambda params, x, y, own=own: own.loss(auto_tasks.outputs(params, x), y)
        assert psc.clipped_value_and_grad(loss, 1.0).verify(params, *train).ok
