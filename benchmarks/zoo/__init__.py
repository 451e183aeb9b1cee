"""Models and distributions of norms for benchmarks and tests.

They are in the benchmarks, which a user may run, not in the package, where no user needs them.
"""
