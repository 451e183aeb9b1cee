"""Check which modules import which, and how long files are."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "psclip_optax"
TRAINING = "psclip_optax.training"
# The command and `python -m psclip_optax`, which start it.
STARTERS = {PACKAGE / "cli.py", PACKAGE / "__main__.py"}
# A folder imports only those before it.
FOLDERS = ("data", "config", "output", "models", "steps", "run", "plot", "compare", "command")
MOST_LINES = 400
# Tests that are still longer; remove a name once its file is split.
LONG = {
    "tests/test_accumulation.py",
    "tests/test_adaptive.py",
    "tests/test_clipped_grad.py",
    "tests/test_frameworks.py",
    "tests/test_groups.py",
    "tests/test_many_devices.py",
    "tests/test_tails.py",
    "tests/test_transforms.py",
    "tests/training/test_steps.py",
}


def imports(path: pathlib.Path) -> set[str]:
    """Return imported modules, and names imported from packages, which may be modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_below(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def sources(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_core_imports_no_training():
    core = [path for path in sources("psclip_optax") if "training" not in path.parts]
    assert len(core) > 50
    assert set(core) >= STARTERS
    found = {p for p in core if any(is_below(name, TRAINING) for name in imports(p))}
    assert found <= STARTERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_training_imports_those_before_it_alone(folder):
    later = FOLDERS[FOLDERS.index(folder) + 1 :]
    for path in sources(f"psclip_optax/training/{folder}"):
        upwards = {
            name
            for name in imports(path)
            for other in later
            if is_below(name, f"{TRAINING}.{other}")
        }
        assert not upwards, path


def test_folders_of_training_are_those_in_order():
    folders = {path.parent.name for path in (PACKAGE / "training").glob("*/__init__.py")}
    assert folders == set(FOLDERS)


def test_an_import_starts_no_backend():
    """Check that settings after an import, such as the number of devices, still work."""
    set_afterwards = "import psclip_optax, psclip_optax.training, jax; jax.config.update('jax_num_cpu_devices', 2)"
    subprocess.run([sys.executable, "-c", set_afterwards], check=True, timeout=120)


def test_benchmarks_import_no_tests():
    for path in sources("benchmarks"):
        assert not {name for name in imports(path) if is_below(name, "tests")}, path


def test_files_are_not_longer_than_a_reader_takes_in():
    long = {
        path.relative_to(ROOT).as_posix()
        for folder in ("psclip_optax", "tests", "benchmarks")
        for path in sources(folder)
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    }
    assert long == LONG
