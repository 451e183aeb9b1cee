"""Runs the comparison: see `benchmarks.peers.run`."""

import tyro

from benchmarks.peers.run import main

if __name__ == "__main__":
    tyro.cli(main)
