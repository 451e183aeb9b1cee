"""Build the site, which fails on warnings, and check its links, formulas and code."""

from __future__ import annotations

import pathlib
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from bs4 import BeautifulSoup
from mkdocs.exceptions import PluginError

import psclip_optax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
CONFIGURATION = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
CODE = "pre, code, script, style, .clipboard-copy-txt"  # the last repeats a notebook's cells


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Build the site in a temporary folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        "docs/mkdocs.yml",
        "-d",
        folder,
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: pathlib.Path) -> dict[str, BeautifulSoup]:
    paths = sorted(site.rglob("*.html"))
    return {
        p.relative_to(site).as_posix(): BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser")
        for p in paths
    }


def test_repository_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"repo_url: {project['urls']['Repository']}\n" in CONFIGURATION


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda p: p.stem)
def test_links_lead_somewhere_in_the_repository_too(page: pathlib.Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).is_file(), target


def test_code_of_the_first_page_fits_its_box():
    code = re.findall(
        r"^```.*?^```$", (PAGES / "index.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert [line for line in "\n".join(code).splitlines() if len(line) > 80] == []
    assert len(code) >= 4


def test_api_has_every_public_name():
    pages = "".join(page.read_text(encoding="utf-8") for page in (PAGES / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)$|^      heading: (\w+)$", pages, re.MULTILINE)
    told = {(name or heading).rpartition(".")[2] for name, heading in named}
    assert set(psclip_optax.__all__) <= told


def test_every_formula_is_rendered(pages: dict[str, BeautifulSoup]):
    for path, page in pages.items():
        prose = [t for t in page.find_all(string=re.compile(r"[$\\]")) if not is_code(t)]
        assert not prose, f"{path}: expected MathML, got {prose}"


def test_no_bracket_of_a_fixed_size_has_an_exponent(pages: dict[str, BeautifulSoup]):
    # Chromium draws the exponent small and low: write {\\big( x \\big)}^2, not \\big( x \\big)^2.
    for path, page in pages.items():
        assert not page.select("msub > mo[minsize], msup > mo[minsize]"), path


def is_code(text) -> bool:
    return text.find_parent(lambda tag: tag.css.match(CODE)) is not None


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("theory/index.html", "docs/pages/theory.md"),
        ("notebooks/02_fast_gradients/index.html", "notebooks/02_fast_gradients.ipynb"),
        ("api/tails/index.html", "psclip_optax/tails/hill.py"),
    ],
)
def test_pages_notebooks_and_docstrings_keep_their_formulas(pages, path, source):
    text = (ROOT / source).read_text(encoding="utf-8")
    formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", text, re.DOTALL)
    assert len(pages[path].find_all("math")) >= len(formulas) > 0


def test_a_formula_that_is_not_latex_fails_the_build():
    with_mathml = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["with_mathml"]
    assert with_mathml("a < $b$", "page.md") == "a &lt; <math><mi>b</mi></math>"
    with pytest.raises(PluginError, match=r"page\.md: expected a formula in LaTeX, got \\tua_k"):
        with_mathml(r"at $\tua_k$", "page.md")


def test_nothing_that_a_page_loads_to_show_text_lies_elsewhere(pages: dict[str, BeautifulSoup]):
    for path, page in pages.items():
        loaded = [tag.get("src", tag.get("href")) for tag in page.select("script[src], link[href]")]
        assert loaded, path
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], path


def test_stylesheets_take_no_font_from_elsewhere(site: pathlib.Path):
    sheets = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert sheets
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\s]+", "".join(sheets))
