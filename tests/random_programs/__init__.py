"""Random per-sample losses, and a check of the clipped gradient of each against `vmap(grad)`.

    python -m tests.random_programs --count 5000 --start 0 --out programs.jsonl

A program is a list of operations over a pool of named values, drawn from one integer seed: data
(`x0`), indices (`i0`), parameters (`w0`), and what is computed from them (`v0`). Its loss reads
what no later operation takes. `--show SEED` prints a program and, if it fails, a smaller one.
"""
