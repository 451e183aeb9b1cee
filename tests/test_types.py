"""Check that public signatures name their types, and that the typed example passes."""

from __future__ import annotations

import ast
import inspect
import json
import pathlib
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import psclip_optax as psc
from psclip_optax import training
from psclip_optax.clipped_grad import ClippedGrad, ClippedValueAndGrad
from tests import snippets

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pages" / "guide" / "types.md"
(EXAMPLE,) = (block.source for block in snippets.fenced(PAGE.read_text("utf-8"), "python"))
PUBLIC = {
    **{f"psc.{name}": getattr(psc, name) for name in psc.__all__},
    **{f"psc.tails.{name}": getattr(psc.tails, name) for name in psc.tails.__all__},
    **{f"training.{name}": getattr(training, name) for name in training._MODULE_OF},
    "ClippedValueAndGrad": ClippedValueAndGrad,
    "ClippedGrad": ClippedGrad,
}
PUBLIC = {name: it for name, it in PUBLIC.items() if inspect.isclass(it) or inspect.isfunction(it)}


def annotations(public: Any) -> Iterator[ast.expr]:
    """Yield annotations of a function's signature, or of a class's fields and methods."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(public))).body
    for node in tree.body if isinstance(tree, ast.ClassDef) else [tree]:
        if isinstance(node, ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, ast.FunctionDef):
            arguments = [n for n in ast.walk(node.args) if isinstance(n, ast.arg)]
            found = [node.returns, *(argument.annotation for argument in arguments)]
            yield from (annotation for annotation in found if annotation is not None)


def says_any(public: Any) -> bool:
    names = (name for annotation in annotations(public) for name in ast.walk(annotation))
    return any(isinstance(name, ast.Name) and name.id == "Any" for name in names)


def of_any(values: dict[str, Any]) -> None:
    """Have a signature with Any, for the search to find."""


@pytest.mark.parametrize("name", PUBLIC)
def test_no_public_signature_says_any(name: str):
    assert says_any(of_any)
    assert not says_any(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_types_of_public_signatures_are_there(name: str):
    assert typing.get_type_hints(PUBLIC[name]) or inspect.isclass(PUBLIC[name])


WRONG = """
psc.clipped_value_and_grad(loss, 1.0, mode="fast")
psc.clipped_value_and_grad(loss, 1.0, unknown=True)
value, grads, figures = psc.clipped_value_and_grad(loss, 1.0, has_aux=True)(w, 1, 2)
assert_type(psc.clipped_grad(loss, 1.0, has_aux=True)(w, 1, 2), Params)
"""


def errors_of_pyright(folder: pathlib.Path) -> dict[str, list[int]]:
    """Return the lines with an error in each file of a folder."""
    # JAX's functions have partly unknown types.
    own = {"reportUnknownMemberType": False, "extraPaths": [str(ROOT)]}
    options = {"typeCheckingMode": "strict"} | own
    (folder / "pyrightconfig.json").write_text(json.dumps(options), "utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(folder)], capture_output=True, text=True)
    found: dict[str, list[int]] = {path.name: [] for path in folder.glob("*.py")}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        found[pathlib.Path(one["file"]).name].append(one["range"]["start"]["line"])
    return found


def test_pyright_passes_the_typed_example_and_finds_what_is_wrong(tmp_path: pathlib.Path):
    (tmp_path / "right.py").write_text(EXAMPLE, "utf-8")
    (tmp_path / "wrong.py").write_text(EXAMPLE + WRONG, "utf-8")
    found = errors_of_pyright(tmp_path)
    assert found["right.py"] == []
    first = len(EXAMPLE.splitlines()) + 1
    assert {*found["wrong.py"]} == {*range(first, first + 4)}
