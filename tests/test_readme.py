"""Check README.md and the guide: commands work, and links have targets."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from tests import snippets

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs" / "pages" / "guide").glob("*.md"))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SMALLER = {
    "plot": {},
    "explain": {},
    "outliers": {},
    "doctor": {},
    "train": {"--width": "0.05", "--batch-size": "16", "--steps": "4"},
    "compare": {
        "--width": "0.05",
        "--batch-size": "16",
        "--steps": "4",
        "--num-seeds": "3",
        "--momentum-learning-rates": "0.1",
        "--batch-clip-learning-rates": "0.1",
        "--batch-clip-thresholds": "1",
        "--ps-clip-learning-rates": "0.1",
        "--ps-clip-thresholds": "1",
    },
}


def fences(language: str, *pages: str) -> list[str]:
    return [block.source for page in pages for block in snippets.fenced(page, language)]


@pytest.mark.parametrize("snippet", fences("python", README), ids=snippets.first_words)
def test_python_runs_and_prints_what_it_says(snippet: str):
    snippets.run(snippet, "README.md")


def test_readme_is_read_in_a_few_minutes():
    assert len(README.split()) <= 900
    assert len(README.splitlines()) <= 120


def test_programs_for_accelerators_are_compiled_as_it_says():
    said = "`pip install -e '.[train,accelerators]'` and `python -m benchmarks.engine.accelerators`"
    assert said in " ".join(README.split())
    assert {"train", "accelerators"} <= PROJECT["optional-dependencies"].keys()
    assert (ROOT / "benchmarks" / "engine" / "accelerators.py").is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+\.md#[^)]+)", README))))
def test_anchors_are_headings(target: str):
    path, anchor = target.split("#")
    headings = re.findall("^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in [title.lower().replace(" ", "-") for title in headings]


def shell_commands() -> list[str]:
    text = "".join(fences("bash", README, *GUIDE.values()))
    lines = text.replace("\\\n", "").splitlines()  # a command may continue on the next line
    return [command for line in lines for command in line.split(" && ")]


def psclip_commands() -> list[list[str]]:
    commands = map(shlex.split, shell_commands())
    return [argv[1:] for argv in commands if argv[0] == ".venv/bin/psclip"]


def test_shell_commands_are_of_the_kinds_checked_here():
    known = r"""
        python3\ -m\ venv\ \.venv
        | \.venv/bin/pip\ install\ (-e\ )?'\.\[(?P<extra>\w+)\]'
        | \.venv/bin/psclip\ .*
        | \.venv/bin/python\ -m\ pytest\ -n\ auto
    """
    matches = [re.fullmatch(known, command, re.VERBOSE) for command in shell_commands()]
    assert all(matches), shell_commands()
    extras = {match["extra"] for match in matches if match} - {None}
    assert extras == {"train", "dev"}
    assert extras <= PROJECT["optional-dependencies"].keys()


def test_psclip_commands_work_in_order(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    cli = pytest.importorskip("psclip_optax.cli")
    monkeypatch.chdir(tmp_path)
    assert {argv[0] for argv in psclip_commands()} == SMALLER.keys()
    for argv in psclip_commands():
        smaller = SMALLER[argv[0]].items()
        added = [word for name, value in smaller if name not in argv for word in (name, value)]
        if "--distributed" in argv:  # before JAX has started
            command = [sys.executable, "-m", "psclip_optax", *argv, *added]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=environment, check=True, timeout=300)
        else:
            assert cli.main([*argv, *added]) == 0, argv
    assert (tmp_path / "compare" / "compare.png").is_file()
    assert (tmp_path / "run" / "config.json").is_file()


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    (extraction,) = re.findall(r"^test_command=\$\((.*)\)$", script, flags=re.MULTILINE)
    extracted = subprocess.run(
        ["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert extracted in "".join(fences("bash", README)).splitlines()
    assert extracted.endswith("pytest -n auto")
    # The script creates no other environment than that command.
    assert "-m venv" not in script
    assert "pip install -e" not in script


def test_versions_are_the_lower_bounds():
    bounds = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]
    assert f"Python ≥ {PROJECT['requires-python'].removeprefix('>=')}," in README
    for title in ("JAX", "Optax", "Flax"):
        (version,) = re.findall(rf"{title} ≥ ([\d.]+\d)", README)
        assert f"{title.lower()}>={version}" in bounds


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_links_lead_to_files(target: str):
    assert (ROOT / target).exists()


def test_links_of_the_packaged_readme_lead_to_the_repository():
    packaged = importlib.metadata.metadata("psclip_optax").get_payload()
    home = PROJECT["urls"]["Repository"]
    files = home.replace("github.com", "raw.githubusercontent.com") + "/main/"
    targets = re.findall(r"\]\(([^)]+)\)", packaged)
    assert len(targets) == len(re.findall(r"\]\(([^)]+)\)", README))
    assert f"{files}docs/pages/images/compare.png" in targets
    assert f"{home}/blob/main/CONTRIBUTING.md" in targets
    for target in targets:
        assert target.startswith("https://")
        name = target.removeprefix(files).removeprefix(f"{home}/blob/main/")
        assert "https:" in name or (ROOT / name.partition("#")[0]).is_file()
