import math
import os

import jax
import pytest
from hypothesis import settings

from psclip_optax.bookkeeping import passes

# So that tests of sharding run in this process; all others use the first. Before JAX starts.
jax.config.update("jax_num_cpu_devices", 8)
# Nearly all the time goes into compiling programs that run once. What LLVM would do to them the
# benchmarks measure, which compare gradients as well.
jax.config.update("jax_disable_most_optimizations", True)

# Compiling takes as long as it takes. On a build server a failure must be seen again by whoever
# looks for it, elsewhere new examples are worth more.
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def two_passes_even_where_slices_would_do(request, monkeypatch):
    """So that small models test them; but not in tests marked `as_is`."""
    if "as_is" not in request.keywords:
        monkeypatch.setattr(passes, "MOST_SLICES", 0)
        monkeypatch.setattr(passes, "MOST_KEPT", math.inf)
