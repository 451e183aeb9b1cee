import gc
import os

import jax
import pytest
from hypothesis import settings

from tests import passes
from tests.compiler_flags import pytest_configure as pytest_configure
from tests.fuzz import record

# For tests of sharding in this process; all others use the first device. Set before JAX starts.
jax.config.update("jax_num_cpu_devices", 8)

# Like `few_optimizations`, for computations at import; and in the environment, for processes that
# tests start.
jax.config.update("jax_disable_most_optimizations", True)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# JAX computes a key of each program for a cache on disk, even if there is no such cache.
jax.config.update("jax_enable_compilation_cache", False)
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

# Tracing creates many objects but few cycles, and each collection of cycles scans all imported
# modules. `forget_what_was_compiled` collects them too.
gc.set_threshold(50_000, 20, 20)

# No deadline, because compilation takes long. Failures must be reproducible; new examples come from
# `python -m tests.fuzz` and `python -m tests.random_programs`.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


RUNNING_PROGRAMS = "running_programs"


@pytest.fixture
def running_programs(pytestconfig):
    """Return the folder for notes of running programs, because an abort of XLA ends the process."""
    return pytestconfig.cache.mkdir(RUNNING_PROGRAMS)


def pytest_addoption(parser):
    parser.addoption(
        "--slow-share", default="0/1", metavar="I/N", help="every Nth slow test, from the Ith"
    )


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if "slow" in item.keywords]
    left_out = set(slow).difference(in_share(config.getoption("--slow-share"), slow))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def in_share(share, tests):
    """Return every Nth test from the Ith on, for a share "I/N"."""
    first, _, of = share.partition("/")
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise pytest.UsageError(f"--slow-share: expected I/N with 0 <= I < N, got {share!r}")
    return tests[int(first) :: int(of)]


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # objects imported so far are never collected


def pytest_terminal_summary(terminalreporter, config):
    if not hasattr(config, "cache"):  # with -p no:cacheprovider
        return
    for what in record.left_behind(config.cache.mkdir(RUNNING_PROGRAMS)):
        terminalreporter.write_line(f"This was running when its process died: {what}", red=True)


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Clear caches, so that the processes of pytest-xdist fit into a build server's memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def few_optimizations(request):
    """Reduce optimizations, because compiling programs that run once takes most of the time.

    Tests can opt out by a mark. LLVM's optimizations are covered by the benchmarks, which compare
    gradients as well.
    """
    jax.config.update("jax_disable_most_optimizations", "optimized" not in request.keywords)


@pytest.fixture
def two_passes():
    """Make the mode `two_pass` use two passes, where such a small model would have slices."""
    with passes.two_passes():
        yield
