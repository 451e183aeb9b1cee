"""Models and laws that benchmarks measure and tests check: both import them from here.

They lie beside the benchmarks, which a user runs, and not in the package, where no user needs them.
"""
