"""Models and laws of norms that benchmarks measure and tests check.

They lie beside the benchmarks, which a user runs, and not in the package, where no user needs them.
"""
