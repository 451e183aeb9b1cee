from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.training import official_archives
from tests.training.official_archives import OfficialArchive, Server


@pytest.fixture(scope="module", autouse=True)
def few_optimizations_of_what_tests_share():
    """Reduce optimizations before `few_optimizations` does: resumed runs need the same programs."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", params=[official_archives.cifar10, official_archives.cifar100])
def archive(request: pytest.FixtureRequest) -> OfficialArchive:
    """Return a small archive in the official layout, for CIFAR-10 and CIFAR-100."""
    return request.param()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server on 127.0.0.1, reached directly even if a proxy is set."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with official_archives.serve() as running:
        yield running
