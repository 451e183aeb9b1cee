"""Let XLA compile in half the time, here and in processes that tests start.

A pytest plugin for all tests, and for notebooks by `-p tests.compiler_flags`.
"""

import os

import jaxlib

# Other compilation settings that also run. XLA ends a process at an unknown flag.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.version.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def pytest_configure() -> None:
    """Put the flags before those of the environment, which take precedence, before JAX starts."""
    os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
