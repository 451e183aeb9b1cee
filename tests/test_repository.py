"""What the repository says in two places is the same: versions, pins, commands of the issue forms."""

from __future__ import annotations

import pathlib
import re
import tomllib
from typing import Any

import pytest
import yaml

import psclip_optax as psc
from psclip_optax.clipped_grad import ClippedValueAndGrad
from psclip_optax.training.command import doctor

ROOT = pathlib.Path(__file__).parents[1]
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "slow.yml")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(path: pathlib.Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[([\d.]+)\] - ", changelog, flags=re.MULTILINE)[0]
    assert psc.__version__ == newest == read_yaml(ROOT / "CITATION.cff")["version"]


def test_hooks_run_what_ci_runs_with_the_same_versions():
    pins = {re.sub(r"\[.*\]", "", pin) for pin in PROJECT["optional-dependencies"]["dev"]}
    (local,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    names = re.findall(r"^check (lint|format|types) ", script, flags=re.MULTILINE)
    assert [hook["name"] for hook in local["hooks"]] == names
    for hook in local["hooks"]:
        if hook["language"] == "python":
            assert set(hook["additional_dependencies"]) <= pins
        else:  # of the environment that the extra made
            assert f"check {hook['name']} {hook['entry']}" in script
            assert any(pin.startswith("pyright==") for pin in pins)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_what_answers_most_questions(path: pathlib.Path):
    fields = [field["attributes"] for field in read_yaml(path)["body"]]
    asked = " ".join(field["label"] + field.get("description", "") for field in fields)
    assert "`psclip doctor`" in asked
    assert callable(doctor.diagnose)
    methods = set(re.findall(r"`print\(f\.(\w+)\(params, \*batch\)\)`", asked))
    assert methods == {"explain", "verify"}
    assert all(callable(getattr(ClippedValueAndGrad, name)) for name in methods)
