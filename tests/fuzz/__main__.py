"""Run `python -m tests.fuzz --count 10000 --out programs.jsonl`, which goes on where it stopped."""

from __future__ import annotations

import tyro

from tests.fuzz.check import SOURCE
from tests.fuzz.command import main_of

if __name__ == "__main__":
    tyro.cli(main_of(SOURCE))
