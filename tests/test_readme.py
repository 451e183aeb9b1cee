"""README.md: its Python runs and prints what it says, its commands work, its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from benchmarks import engine
from benchmarks.peers import report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SMALLER = {
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


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def first_words(snippet: str) -> str:
    return snippet.strip().splitlines()[-1][:40]


@pytest.mark.parametrize("snippet", fences("python"), ids=first_words)
def test_python_runs_and_prints_what_it_says(snippet: str):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    said = re.findall(r"^print\(.*\)  # (.+)$", snippet, flags=re.MULTILINE)
    assert printed.getvalue().splitlines() == said
    assert said or "assert " in snippet


def shell_commands() -> list[str]:
    lines = "".join(fences("bash")).splitlines()
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
    assert {argv[0] for argv in psclip_commands()} == {"compare", "train"}
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
    assert extracted in "".join(fences("bash")).splitlines()
    assert extracted.endswith("pytest -n auto")
    assert "pip install" not in script


def test_versions_are_the_lower_bounds():
    bounds = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]
    assert f"Python ≥ {PROJECT['requires-python'].removeprefix('>=')}," in README
    for title in ("JAX", "Optax", "Flax"):
        (version,) = re.findall(rf"{title} ≥ ([\d.]+\d)", README)
        assert f"{title.lower()}>={version}" in bounds


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", README))))
def test_links_lead_to_files(target: str):
    assert (ROOT / target).is_file()


def test_costs_of_accumulation_are_those_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/accumulation.json").read_text())["rows"]
    ours = [row for row in rows if "accumulate_clipped" in row["case"]]
    said = " ".join(README.split())
    for row in (row for row in ours if row["part"] == "train step"):
        low, middle, high = row["ratio_quartiles"]
        assert f"{middle:.2f} ({low:.2f}–{high:.2f})" in said
        assert f"with {row['samples']}" in said
    (update,) = (row for row in ours if row["part"] == "update")
    assert f"move {update['bytes_ratio']:.2f} times the bytes" in said


def test_intervals_of_the_tail_index_are_those_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/tail_index.json").read_text())["rows"]
    said = " ".join(README.split())
    # Mixtures apart, of which it speaks by themselves.
    rows = [row for row in rows if "30%" not in row["law"] and "5%" not in row["law"]]
    coverages = [100 * row["coverage"][1] for row in rows if row["index"]]
    assert f"{min(coverages):.1f} % to {max(coverages):.1f} % of the 95 % intervals" in said
    widths = {row["norms"]: row["width"] for row in rows if row["law"] == "Student-t 1.5"}
    spans = f"spans {widths[2_000]:.2f} of the index with 2,000 of them and {widths[10_000]:.2f}"
    assert spans in said
    for size, words in (
        (10_000, "{0:.0f} % to {1:.0f} % of their samples are called light, and at most {2:.0f} %"),
        (2_000, "with 2,000 it is {0:.0f} % to {1:.0f} %, and {2:.0f} %"),
    ):
        shares = {True: [], False: []}
        for row in (row for row in rows if row["norms"] == size):
            shares[row["index"] is None].append(100 * row["shares"]["light"][1])
        assert words.format(min(shares[True]), max(shares[True]), max(shares[False])) in said
    assert all(row["clipped_of_512"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("to_markdown", "path"),
    [
        (engine.to_markdown, "benchmarks/results/engine.json"),
        (report.to_markdown, "benchmarks/peers/results/peers.json"),
    ],
)
def test_tables_are_those_of_the_committed_measurements(to_markdown, path):
    assert to_markdown(json.loads((ROOT / path).read_text())["rows"]).strip() in README
