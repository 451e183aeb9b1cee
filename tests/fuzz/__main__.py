"""Run `python -m tests.fuzz --count 10000 --out programs.jsonl`; repeat it to resume."""

from __future__ import annotations

import tyro

from tests.fuzz.check import SOURCE
from tests.fuzz.command import main_of

if __name__ == "__main__":
    tyro.cli(main_of(SOURCE))
