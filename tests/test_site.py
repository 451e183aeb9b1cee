"""The site's pages lead to what exists. `.ci/run` builds it, and a warning fails the build."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest

import psclip_optax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
CONFIGURATION = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")


def test_repository_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"repo_url: {project['urls']['Repository']}\n" in CONFIGURATION


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda p: p.stem)
def test_links_lead_somewhere_in_the_repository_too(page: pathlib.Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).is_file(), target


def test_api_has_every_public_name():
    pages = "".join(page.read_text(encoding="utf-8") for page in (PAGES / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)$|^      heading: (\w+)$", pages, re.MULTILINE)
    told = {(name or heading).rpartition(".")[2] for name, heading in named}
    assert set(psclip_optax.__all__) <= told
