import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.publishing import RESULTS
from benchmarks.theory import tail_index
from benchmarks.zoo.laws import LAWS, POWER_LAWS

COMMITTED = RESULTS / "tail_index.json"


def test_quick_run_writes_its_tables_and_figure(tmp_path, capsys):
    tail_index.main(out=tmp_path, quick=True)
    result = json.loads((tmp_path / "tail_index.json").read_text())
    assert [row["law"] for row in result["rows"]] == list(LAWS)
    for row in result["rows"]:
        assert sum(middle for _, middle, _ in row["shares"].values()) == pytest.approx(1)
        assert ("coverage" in row) == (row["law"] in POWER_LAWS)
    assert (tmp_path / "tail_index.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in LAWS)


@pytest.mark.parametrize(("count", "trials"), [(0, 20), (7, 20), (20, 20), (470, 500)])
def test_share_has_the_interval_of_wilson(count, trials):
    low, share, high = tail_index.wilson(count, trials)
    expected = stats.binomtest(count, trials).proportion_ci(method="wilson")
    assert share == count / trials
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LAWS if LAWS[name].moment is not None])
def test_laws_have_the_moments_they_say(name):
    law = LAWS[name]
    p = min(law.index, 3.0) / 4  # so that the powers almost have a fourth moment
    powers = law.sample(np.random.default_rng(0), 100_000) ** p
    assert powers.mean() == pytest.approx(law.moment(p), abs=5 * powers.std() / math.sqrt(1e5))


def folded(law):
    return lambda x: law.cdf(x) - law.cdf(-x)


REFERENCES = {
    "Pareto 1.5": stats.pareto(1.5).cdf,
    "Student-t 1.5": folded(stats.t(1.5)),
    "Student-t 1.5, 100 dimensions": lambda x: stats.f(100, 1.5).cdf(x**2 / 100),
    "stable 1.3": folded(stats.levy_stable(1.3, 0)),
    "log-normal σ = 0.5": stats.lognorm(0.5).cdf,
    "‖N(0, I)‖, 10 dimensions": stats.chi(10).cdf,
    "exponential": stats.expon().cdf,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_laws_are_those_of_scipy(name):
    values = LAWS[name].sample(np.random.default_rng(0), 1000)
    assert stats.kstest(values, REFERENCES[name]).pvalue > 0.001


def test_the_committed_intervals_cover_as_often_as_is_claimed():
    rows = json.loads(COMMITTED.read_text())["rows"]
    one_dimensional = [row for row in rows if "coverage" in row and "," not in row["law"]]
    accepted = [row for row in one_dimensional if "in Gaussian" not in row["law"]]
    assert len(accepted) == 11 * 3
    assert all(row["coverage"][1] >= 0.9 and row["trials"] >= 500 for row in accepted)
