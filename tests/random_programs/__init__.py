"""Draw random per-sample losses, and compare the clipped gradient of each with `vmap(grad)`.

    python -m tests.random_programs --count 5000 --start 0 --out programs.jsonl

A program is a list of operations over a pool of named values, drawn from one integer seed: data
(`x0`), indices (`i0`), parameters (`w0`), and values computed from them (`v0`). Its loss reads the
values that no later operation uses. `--show SEED` prints a program and, if it fails, a smaller one.
"""
