import math
import os

import jax
import jaxlib
import pytest
from hypothesis import settings

from psclip_optax.bookkeeping import passes

# So that tests of sharding run in this process; all others use the first. Before JAX starts.
jax.config.update("jax_num_cpu_devices", 8)

# Other ways to code that run as well and compile in half the time, which is most of the tests'. In
# the environment, for processes that tests start; before those given there, which count more. XLA
# ends a process at a flag that it does not know.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.version.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])

# Compiling takes as long as it takes. On a build server a failure must be seen again by whoever
# looks for it, elsewhere new examples are worth more.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """So that the processes of pytest-xdist, one for each core, fit into a build server's memory."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def few_optimizations(request):
    """For nearly all the time goes into compiling what runs once; but not of tests marked so.

    What LLVM does to programs the benchmarks see, which compare gradients as well.
    """
    jax.config.update("jax_disable_most_optimizations", "optimized" not in request.keywords)


@pytest.fixture(autouse=True)
def two_passes_even_where_slices_would_do(request, monkeypatch):
    """So that small models test them; but not in tests marked `as_is`."""
    if "as_is" not in request.keywords:
        monkeypatch.setattr(passes, "MOST_SLICES", 0)
        monkeypatch.setattr(passes, "MOST_KEPT", math.inf)
