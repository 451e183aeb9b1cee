import math
import os

import jax
import pytest
from hypothesis import settings

from psclip_optax.bookkeeping import passes

# So that tests of sharding run in this process; all others use the first. Before JAX starts.
jax.config.update("jax_num_cpu_devices", 8)

# Compiling takes as long as it takes. On a build server a failure must be seen again by whoever
# looks for it, elsewhere new examples are worth more.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")


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
