import json

import numpy as np
import pytest

import psclip_optax as psc
from benchmarks.thresholds import auto_rules, auto_threshold


@pytest.mark.slow
def test_quick_run_writes_its_table_and_figure_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    auto_threshold.main(out=tmp_path, runs=tmp_path / "runs", quick=True)
    (row,) = json.loads((tmp_path / "auto_threshold.json").read_text())["rows"]
    best = max(np.mean(row["tuned"][name]["test"]) for name in auto_threshold.TUNED)
    assert row["best"] == pytest.approx(best)
    assert row["differences"]["automatic"] <= 1 - best
    assert all(len(winner["test"]) == 2 for winner in row["tuned"].values())
    assert (tmp_path / "auto_threshold.png").read_bytes().startswith(b"\x89PNG")
    assert row["label"] in capsys.readouterr().out
    monkeypatch.delattr(auto_threshold, "run_method")
    auto_threshold.main(out=tmp_path, runs=tmp_path / "runs", quick=True)
    assert auto_threshold.to_markdown({"rows": [row]}).count("\n") == 5


def test_failures_are_of_trials_that_some_clipping_trains():
    def scores(*by_rate):
        """By learning rate and threshold, of one seed."""
        own = [[[value] for value in by_threshold] for by_threshold in by_rate]
        return {"validation": own, "test": own}

    found = auto_threshold.described(
        {
            **dict.fromkeys(("cell", "label", "steps")),
            "rates": (0.1, 1.0),
            "scores": {
                "no clipping": scores([0.9], [0.1]),
                "batch clipping": scores([0.1, 0.1], [0.1, 0.1]),
                "fixed threshold": scores([0.1, 0.8], [0.1, 0.7]),
                "median": scores([0.6], [0.1]),
            },
        }
    )
    assert found["failures"] == {
        "no clipping": 1,
        "batch clipping": 2,
        "fixed threshold": 0,
        "median": 1,
    }
    assert found["differences"]["median"] == pytest.approx(0.6 - 0.9)


def test_truncated_squares_solve_their_equation():
    norms, n = np.random.default_rng(0).pareto(1.5, 500) + 1, 128
    rule = auto_rules.truncated_squares(1.0, n)
    tau = float(rule.threshold(rule.update(rule.init(), norms))(np.array([1]))[0])
    mean = np.mean(np.minimum(norms**2 / tau**2, 1))
    assert mean == pytest.approx(np.log(n + 1) / n, rel=0.05)


def test_growing_is_the_automatic_one_in_the_middle_of_a_batch():
    rule, plain = auto_rules.growing(1.0, 7), psc.auto_threshold()
    state = plain.update(plain.init(), np.array([1.0, 2.0, 3.0]))
    k = np.arange(1, 8)
    expected = plain.threshold(state)(k) * np.sqrt(k / 4)
    np.testing.assert_allclose(rule.threshold(state)(k), expected, rtol=1e-6)
