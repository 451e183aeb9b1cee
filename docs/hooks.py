"""Extend MkDocs: add pages from elsewhere in the repository, links to them, and formulas.

Links of a page are relative to its file, so that they work on GitHub too. On the site, a link to a
file with a page leads to that page, and any other link out of the pages leads to the repository.
Formulas become MathML, which browsers render without scripts or fonts from other servers.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from html import escape, unescape
from typing import Any

from bs4 import BeautifulSoup
from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
PAGES = "docs/pages"
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/README.md": "results/index.md",
}
FOLDERS = {"benchmarks/results": ("results", "*.png"), "notebooks": ("notebooks", "*.ipynb")}
WITH_FORMULAS = ".arithmatex, .jp-MarkdownOutput"  # in a page, and a cell of a notebook
FORMULA = re.compile(r"\$\$(?P<display>.+?)\$\$|\$(?P<inline>.+?)\$", re.DOTALL)
LATEX = LatexToMathML()


def sources() -> dict[str, str]:
    """Map paths in the repository to paths of the site's source, for files outside the pages."""
    found = dict(ELSEWHERE)
    for folder, (place, pattern) in FOLDERS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            found[f"{folder}/{path.name}"] = f"{place}/{path.name}"
    return found


@event_priority(100)  # before the plugin that makes pages from notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, place in sources().items():
        files.append(file_of(path, place, config))
    return files


def file_of(path: str, place: str, config: MkDocsConfig) -> File:
    if path == place:  # the plugin for notebooks accepts only files in a source folder
        return File(path, str(ROOT), config.site_dir, config.use_directory_urls)
    return File.generated(config, place, abs_src_path=str(ROOT / path))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    places = sources()
    here = next(
        (path for path, place in places.items() if place == page.file.src_uri),
        f"{PAGES}/{page.file.src_uri}",
    )

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match["path"]))
        anchor = match["anchor"] or ""
        place = places.get(target) or target.removeprefix(f"{PAGES}/")
        if place == target:  # it has no page
            return f"]({config.repo_url}/blob/main/{target}{anchor})"
        start = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(place, start or '.')}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", moved, markdown)


def on_page_content(html: str, *, page: Page, **_: Any) -> str:
    soup = BeautifulSoup(html, "html.parser")
    texts = [text for part in soup.select(WITH_FORMULAS) for text in part.find_all(string=FORMULA)]
    for text in texts:
        if not text.find_parent(["code", "pre"]):
            text.replace_with(BeautifulSoup(with_mathml(text, page.file.src_uri), "html.parser"))
    return str(soup) if texts else html


def with_mathml(text: str, source: str) -> str:
    def rendered(match: re.Match[str]) -> str:
        formula = unescape(match["display"] or match["inline"])
        try:
            return LATEX.convert_with_local_state(formula, displaystyle=bool(match["display"]))
        except LatexError as error:
            raise PluginError(
                f"{source}: expected a formula in LaTeX, got {formula}\n{error}"
            ) from error

    return FORMULA.sub(rendered, escape(text, quote=False))
