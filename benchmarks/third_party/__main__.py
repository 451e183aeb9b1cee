"""Runs `python -m benchmarks.third_party`."""

from __future__ import annotations

import tyro

from benchmarks.third_party.run import main

if __name__ == "__main__":
    tyro.cli(main)
