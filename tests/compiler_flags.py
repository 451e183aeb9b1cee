"""Let XLA compile in half the time, here and in processes that tests start.

A plugin of pytest: that of all tests, and of notebooks by `-p tests.compiler_flags`.
"""

import os

import jaxlib

# Other ways to code that run as well. XLA ends a process at a flag that it does not know.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.version.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def pytest_configure() -> None:
    """Put the flags before those of the environment, which count more; JAX has not started yet."""
    os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
