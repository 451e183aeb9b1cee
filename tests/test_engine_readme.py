"""The engine's README names files that exist, and every route and mode."""

from __future__ import annotations

import pathlib
import re

import pytest

from psclip_optax.engine.modes import MODES
from psclip_optax.engine.routes import ROUTES

ROOT = pathlib.Path(__file__).parents[1]
ENGINE = ROOT / "psclip_optax" / "engine"
README = (ENGINE / "README.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"(?:\.\./)?[\w/]+\.py\b", README)) - {"routes/NAME.py"})


@pytest.mark.parametrize("name", FILES)
def test_names_files_that_exist(name: str):
    assert ((ROOT if name.startswith("tests/") else ENGINE) / name).is_file()


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_tells_the_file_of_every_route(route: object):
    file = type(route).__module__.removeprefix("psclip_optax.engine.").replace(".", "/") + ".py"
    assert f"| {route.name} | `{file}` |" in README


@pytest.mark.parametrize("mode", MODES)
def test_picture_has_every_mode(mode: str):
    assert f"mode -->|{mode}|" in README


def test_names_every_analysis():
    names = {path.stem for path in (ENGINE / "analysis").glob("*.py")} - {"__init__"}
    assert {name for name in names if f"analysis/{name}.py" in README} == names
