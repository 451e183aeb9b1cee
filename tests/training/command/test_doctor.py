"""Check that the doctor finds problems, and none if there are none."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import psclip_optax as psc
from psclip_optax.engine import norms
from psclip_optax.training.command import doctor
from psclip_optax.training.command.doctor import (
    NEWEST_TESTED_JAX,
    Finding,
    check_cache_folder,
    check_extras,
    check_jax,
    check_numbers,
    check_switches,
    diagnose,
    report,
)
from psclip_optax.training.config.commands import DoctorConfig
from tests.numerics import enable_x64

README = (pathlib.Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")


def test_newest_tested_jax_is_the_readme_s():
    versions = re.search(r"tested\s+with JAX ([\d., and]+[\d])", README)
    assert versions is not None
    assert re.findall(r"[\d.]*\d", versions[1])[-1] == NEWEST_TESTED_JAX


def test_all_is_looked_at(tmp_path: pathlib.Path):
    findings = diagnose(DoctorConfig(cache_dir=tmp_path))
    told = report(findings)
    for expected in (psc.__version__, jax.__version__, "device cpu:0", str(tmp_path), "one_pass"):
        assert expected in told
    assert "wrong" not in {finding.verdict for finding in findings}


@pytest.mark.parametrize("factor", [1.05, jnp.nan])
def test_wrong_numbers_are_found_and_shown(monkeypatch: pytest.MonkeyPatch, factor: float):
    right = norms.squared_norms
    monkeypatch.setattr(norms, "squared_norms", lambda *args: factor * right(*args))
    numbers, plan = check_numbers()
    assert numbers.verdict == "wrong"
    assert "NO" in numbers.text
    assert "report" in numbers.text
    assert plan.verdict == "ok"


def test_slow_routes_are_found_and_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(doctor._ROUTES, "bias", "dense")  # a route that it cannot have
    numbers, plan = check_numbers()
    assert (numbers.verdict, plan.verdict) == ("ok", "wrong")
    assert "not taken for bias" in plan.text
    assert "conv_general_dilated" in plan.text


def test_no_device_ends_the_look(monkeypatch: pytest.MonkeyPatch):
    def fail():
        raise RuntimeError("Unable to initialize backend\n'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    last = diagnose(DoctorConfig())[-1]
    assert last == Finding("wrong", "JAX finds no device: Unable to initialize backend 'cuda'")


def test_a_platform_without_its_plugin_ends_the_look_too(monkeypatch: pytest.MonkeyPatch):
    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    last = diagnose(DoctorConfig())[-1]
    assert last.verdict == "wrong"
    assert "this installation of JAX has no plugin for; install it, or unset" in last.text


@pytest.mark.parametrize(
    ("version", "verdict", "text"),
    [
        ("0.6.9", "note", "older than 0.7.0"),
        ("0.7.0", "ok", "in the tested range"),
        (NEWEST_TESTED_JAX, "ok", "in the tested range"),
        ("0.10.2.dev20260101", "ok", "in the tested range"),
        ("0.99.0", "note", f"newer than {NEWEST_TESTED_JAX}"),
    ],
)
def test_jax_beside_the_tested_range_is_noted(version: str, verdict: str, text: str):
    (finding,) = check_jax(version, ["jaxlib>=0.7.0", "jax>=0.7.0", "optax>=0.2.8"])
    assert finding.verdict == verdict
    assert text in finding.text


def test_extras_are_told_apart():
    requirements = [
        "jax>=0.7.0",
        'rich>=14.0.0; extra == "train"',
        "tyro>=1.0.0; extra == 'train'",
        "scikit-learn>=1.7.0; extra == 'train'",
        'tensorboardx>=2.6; extra == "tensorboard"',
        'mkdocs-material>=9.6; extra == "docs"',
        'pyright[nodejs]>=1; extra == "dev"',
    ]
    versions = {"rich": "14.0.0", "tyro": "0.9.30", "tensorboardx": "2.6.5"}
    train, tensorboard = check_extras(requirements, versions.get)
    assert train == Finding(
        "note",
        "extra train: tyro 0.9.30 is older than 1.0.0, scikit-learn is missing; pip install "
        "'psclip_optax[train]'",
    )
    assert tensorboard == Finding("ok", "extra tensorboard: tensorboardx 2.6.5")


def test_switches_and_variables_are_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with jax.disable_jit(False):
        before = check_switches()
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
    with enable_x64(True):
        after = check_switches()
    new = [finding for finding in after if finding not in before]
    assert [finding.verdict for finding in new] == ["note", "note"]
    assert "jax_enable_x64 is on" in new[0].text
    assert "XLA_FLAGS=--xla_foo=1" in new[1].text


def test_folder_that_cannot_be_written_is_noted_and_none_is_made(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    finding = check_cache_folder(tmp_path / "file" / "cache")
    assert finding.verdict == "note"
    assert f"cannot write to {tmp_path / 'file'}: Not a directory" in finding.text
    assert check_cache_folder(tmp_path / "new" / "cache").verdict == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("verdicts", "last"),
    [
        (["ok", "info"], "All is well."),
        (["ok", "note"], "All is well, but see the notes."),
        (["note", "wrong"], "Something is wrong: see above."),
    ],
)
def test_report_ends_with_what_it_comes_to(verdicts: list, last: str):
    lines = report([Finding(verdict, "something") for verdict in verdicts]).splitlines()
    assert lines[-1] == last
    assert [line.split()[0] for line in lines[:-1]] == verdicts
