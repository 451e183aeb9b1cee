"""Check the stored notebooks, as Colab opens them and the site shows them; `.ci/run` runs them."""

from __future__ import annotations

import json
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000  # with its pictures

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: pathlib.Path, kind: str) -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_begins_with_a_badge_that_opens_it(path: pathlib.Path):
    first = "".join(cells(path, "markdown")[0]["source"])
    (target,) = re.findall(r"\]\((https://colab\.research\.google\.com/github/[^)\s]+)\)", first)
    owner = REPOSITORY.removeprefix("https://github.com/")
    assert target == (
        f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{path.name}"
    )


def test_installs_what_is_missing_and_nothing_else(path: pathlib.Path):
    first = "".join(cells(path, "code")[0]["source"])
    assert "except ModuleNotFoundError" in first
    assert "%pip install" in first
    assert f"git+{REPOSITORY}" in first


def test_outputs_are_stored_and_small(path: pathlib.Path):
    code = cells(path, "code")
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run it from top to bottom and store it"
    assert any(cell["outputs"] for cell in code)
    assert path.stat().st_size < MOST_BYTES
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)


def test_links_lead_to_what_the_repository_has(path: pathlib.Path):
    text = "".join(line for cell in cells(path, "markdown") for line in cell["source"])
    links = re.findall(rf"\]\({REPOSITORY}(?:/blob/main/([^)#\s]+))?(?:#([^)\s]+))?\)", text)
    assert len(links) == text.count(f"]({REPOSITORY}"), "expected …/blob/main/PATH or …#HEADING"
    for target, anchor in links:
        page = (ROOT / (target or "README.md")).read_text(encoding="utf-8")
        headings = re.findall("^#+ (.+)$", page, re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_headings_are_found_by_the_sites_contents(path: pathlib.Path):
    for cell in cells(path, "markdown"):
        headings = re.findall("^#+ (.+)$", "".join(cell["source"]), re.MULTILINE)
        assert not [title for title in headings if "`" in title], "code has no part in the link"


def test_speaks_of_no_machines_paths(path: pathlib.Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|opt|Users)/", text)
