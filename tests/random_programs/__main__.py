"""Run `python -m tests.random_programs --count 5000 --out programs.jsonl`."""

from __future__ import annotations

import tyro

from tests.fuzz.command import main_of
from tests.random_programs.source import SOURCE

if __name__ == "__main__":
    tyro.cli(main_of(SOURCE))
