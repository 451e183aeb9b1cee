"""Check the scripts in `.ci`: their options, and that every failing check is reported."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHECKS = ROOT / ".ci" / "checks.bash"


def bash(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("given", ["--quick", "--fast --all", "fast"])
def test_an_option_that_is_none_is_told_with_those_there_are(given: str):
    ran = bash(f".ci/run {given}")
    assert (ran.returncode, ran.stdout) == (2, "")
    complaint, usage = ran.stderr.splitlines()
    assert complaint == f".ci/run: expected no option, --all or --fast, got {given}"
    assert usage == "usage: .ci/run [--all | --fast]"


def test_all_checks_are_run_and_those_that_failed_named():
    ran = bash(
        f"source {CHECKS}; begin behind bash -c 'echo said; exit 3'; begin well true;"
        "check before false; check after echo ran; finish; tell_outcome"
    )
    assert ran.returncode == 1
    assert "said" in ran.stdout
    assert "ran" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "Failed: before behind"


def test_where_all_pass_it_says_so():
    ran = bash(f"source {CHECKS}; begin one true; check other true; finish; tell_outcome")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "All checks passed.")


def test_a_check_that_dies_has_failed():
    ran = bash(f"source {CHECKS}; begin dead bash -c 'kill -9 $PPID'; finish; tell_outcome")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1] == "Failed: dead"
