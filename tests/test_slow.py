"""Check which tests are slow, and which share of them a run has."""

import itertools

import pytest

from tests import conftest, slow


def parts(cases):
    """Split cases into quick and slow ones; unmarked cases need not be parameter sets."""
    is_slow = lambda case: bool(getattr(case, "marks", ()))
    values = lambda case: getattr(case, "values", (case,))
    return [[values(case) for case in cases if is_slow(case) == which] for which in (False, True)]


def test_all_but_the_quick_cases_are_slow():
    assert parts(slow.but(["b"], "abc")) == [[("b",)], [("a",), ("c",)]]
    with pytest.raises(AssertionError, match="'d'"):
        slow.but(["d"], "abc")


def test_quick_cases_of_a_diagonal_meet_every_value():
    quick, others = parts(slow.diagonal("abc", range(2), "xy"))
    assert quick == [("a", 0, "x"), ("b", 1, "y"), ("c", 0, "x")]
    assert sorted([*quick, *others]) == list(itertools.product("abc", range(2), "xy"))


def test_of_a_long_axis_only_every_nth_value_has_a_quick_case():
    quick, _ = parts(slow.diagonal("abcde", range(2), every=2))
    assert quick == [("a", 0), ("c", 1), ("e", 0)]


def test_shares_are_all_of_it_and_have_nothing_in_common():
    shares = [conftest.in_share(f"{i}/3", range(10)) for i in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("share", ["3/3", "-1/3", "1", "a/b", ""])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(pytest.UsageError, match="expected I/N with 0 <= I < N"):
        conftest.in_share(share, range(10))
