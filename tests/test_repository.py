"""Check that duplicated facts agree: versions, pins, commands in the issue forms."""

from __future__ import annotations

import ast
import pathlib
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import psclip_optax as psc
from psclip_optax.clipped_grad import ClippedValueAndGrad
from psclip_optax.training.command import doctor

ROOT = pathlib.Path(__file__).parents[1]
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "slow.yml")]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# A function's docstring begins with a verb, which none of these is.
NO_VERB = re.compile(
    "(A|All|An|As|At|Below|Both|By|Each|Every|For|From|How|In|None|Of|On|One|Over|So|That|The|Those|To|Two"
    "|What|When|Where|Whether|Which|Who|Why|With|Without),?"
)


def docstrings(source: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield modules, classes and functions with the first lines of their docstrings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            yield node, str(ast.get_docstring(node)).splitlines()[0]


def begins_well(node: ast.AST, line: str) -> bool:
    """Tell whether a first line begins with a verb, or a class's or module's with a noun."""
    word = line.split()[0]
    if isinstance(node, ast.FunctionDef):
        return re.fullmatch("[A-Z][a-z]+,?", word) is not None and not NO_VERB.fullmatch(word)
    return word not in ("Of", "What") or "?" in line  # a benchmark asks its question


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
    checks = r"^(?:check|begin) (lint|format|types) (.*)$"
    commands = dict(re.findall(checks, script, flags=re.MULTILINE))
    assert {hook["name"] for hook in local["hooks"]} == commands.keys()
    for hook in local["hooks"]:
        if hook["language"] == "python":
            assert set(hook["additional_dependencies"]) <= pins
        else:  # from the environment of the extra
            assert commands[hook["name"]] == hook["entry"]
            assert any(pin.startswith("pyright==") for pin in pins)


def test_every_night_all_tests_are_run():
    options = PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert options.endswith("-m 'not slow'")
    workflow = read_yaml(ROOT / ".github" / "workflows" / "tests.yml")
    (night,) = workflow[True]["schedule"]  # YAML's `on`
    assert night["cron"].endswith("* * *")
    is_night = "github.event_name == 'schedule'"
    assert workflow["env"]["TESTS"] == f"${{{{ {is_night} && 'slow or not slow' || 'not slow' }}}}"
    runs = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    tests = [run for run in runs if "pytest" in run or ".ci/" in run]
    assert f".ci/run ${{{{ {is_night} && '--all' || '' }}}}" in tests
    assert len(tests) == 3
    assert all('-m "$TESTS"' in run for run in tests if ".ci/run" not in run)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_what_answers_most_questions(path: pathlib.Path):
    fields = [field["attributes"] for field in read_yaml(path)["body"]]
    asked = " ".join(field["label"] + field.get("description", "") for field in fields)
    assert "`psclip doctor`" in asked
    assert callable(doctor.diagnose)
    methods = set(re.findall(r"`print\(f\.(\w+)\(params, \*batch\)\)`", asked))
    assert methods == {"explain", "verify"}
    assert all(callable(getattr(ClippedValueAndGrad, name)) for name in methods)


@pytest.mark.parametrize("folder", ["psclip_optax", "benchmarks", "docs"])
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node, line in docstrings(path.read_text(encoding="utf-8")):
            assert begins_well(node, line), f"{path.relative_to(ROOT)}: {line}"


@pytest.mark.parametrize(
    "source",
    [
        '"""What a module has."""',
        'def f():\n  """The rule."""',
        'class C:\n  """Of a batch."""',
        'def f():\n  """τ at k."""',
    ],
)
def test_docstrings_that_begin_otherwise_are_found(source: str):
    assert not all(begins_well(*found) for found in docstrings(source))
