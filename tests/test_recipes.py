"""Run the Python code on the pages of docs/, and compare each recipe's gradient with vmap(grad).

A block runs unchanged. A comment above its fence may say otherwise, and why:
`<!-- not run: reason -->`, or `<!-- needs module, reason -->` if the module may be missing.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from tests import slow, snippets
from tests.numerics import assert_close

pytest.importorskip("flax", reason="recipes use the extras train and dev")
from flax.training.dynamic_scale import DynamicScale

from tests.recipe_checks import CHECKS, Names

ROOT = pathlib.Path(__file__).parents[1]
MOST_LINES = 40


class Found(NamedTuple):
    """A block and its page."""

    page: pathlib.Path
    block: snippets.Block

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.block.heading} ({self.block.line})"


def pages() -> list[pathlib.Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


FOUND = [
    Found(page, block)
    for page in pages()
    for block in snippets.fenced(page.read_text(encoding="utf-8"), "python")
]
RECIPES = [found for found in FOUND if found.page.parent.name == "recipes"]


def run(found: Found) -> Names:
    marker = found.block.marker
    if reason := re.fullmatch(r"not run: (.+)", marker):
        pytest.skip(reason[1])
    if needed := re.fullmatch(r"needs (\w+), (.+)", marker):
        pytest.importorskip(needed[1], reason=f"{needed[1]}, {needed[2]}")
    path = str(found.page.relative_to(ROOT))
    return snippets.run(found.block.source, path, found.block.line)


# Compiled for eight devices, as the zoo by layer is in tests/test_many_devices.py.
COSTLY = [found for found in RECIPES if "FSDP" in found.block.heading]


@pytest.mark.parametrize(
    "found", slow.but([found for found in FOUND if found not in COSTLY], FOUND), ids=str
)
def test_python_runs_and_recipes_give_the_clipped_mean(found: Found):
    names = run(found)
    if found in RECIPES:
        CHECKS[found.block.heading](names)


def test_each_check_has_its_recipe():
    assert CHECKS.keys() == {found.block.heading for found in RECIPES}


def test_recipes_are_short():
    too_long = [str(r) for r in RECIPES if len(r.block.source.splitlines()) > MOST_LINES]
    assert too_long == []


@pytest.mark.parametrize("heading", [name for name in CHECKS if name.startswith("From")])
def test_before_and_after_give_the_same(heading: str):
    before, after = (run(found) for found in RECIPES if found.block.heading == heading)
    compared = [name for name in ("value", "grads", "num_clipped", "updates") if name in before]
    after = after | {"num_clipped": after["stats"].num_clipped} if "stats" in after else after
    assert "grads" in compared
    for name in compared:
        assert_close(before[name], after[name], 1e-5)


def test_loss_scale_follows_the_rule_of_flax():
    (found,) = (found for found in RECIPES if found.block.heading.startswith("float16"))
    adjusted = run(found)["adjusted"]
    theirs = DynamicScale(growth_interval=3, scale=8.0, minimum_scale=1.0)
    ours = (8.0, 0)
    for value in [1.0] * 9 + [np.inf] * 7 + [1.0] * 4 + [np.nan]:
        theirs, finite, *_ = theirs.value_and_grad(lambda w, value=value: w * value)(jnp.ones(()))
        ours = adjusted(*ours, finite, interval=3)
        assert (float(ours[0]), int(ours[1])) == (float(theirs.scale), int(theirs.fin_steps))


def anchors(page: pathlib.Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).lower()) for title in titles}


def links_of_recipes() -> list[tuple[pathlib.Path, str]]:
    return [
        (page, target)
        for page in pages()
        if page.parent.name == "recipes"
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
    ]


def test_links_of_recipes_lead_somewhere():
    for page, target in links_of_recipes():
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        assert to.is_file(), (page, target)
        assert not anchor or anchor in anchors(to), (page, target)


def test_index_lists_every_page_of_recipes():
    listed = {
        target.partition("#")[0] for page, target in links_of_recipes() if page.stem == "index"
    }
    assert listed == {found.page.name for found in RECIPES}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("print(1 + 1)  # 3\n", "printed .*2.* says .*3"),
        ("x = 1\n", "neither prints nor asserts"),
        ("print(1)\n", "printed"),
    ],
)
def test_a_block_that_says_something_else_fails(source: str, complaint: str):
    with pytest.raises(AssertionError, match=complaint):
        snippets.run(source, "page.md")


def test_blocks_are_found_in_lists_and_with_attributes():
    page = "# A\n```python title='x'\na = 1  # not a heading\n```\n## B\n<!-- not run: c -->\n  ```python\n  b\n  ```\n```text\n```\n"
    assert snippets.fenced(page, "python") == [
        snippets.Block("a = 1  # not a heading\n", 2, "A", ""),
        snippets.Block("b\n", 7, "B", "not run: c"),
    ]
