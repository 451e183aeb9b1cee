from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.training import official_archives
from tests.training.official_archives import OfficialArchive, Server


@pytest.fixture(scope="module", autouse=True)
def few_optimizations_of_what_tests_share():
    """As `few_optimizations` has it, which comes after: a run gone on is of the same programs."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", params=[official_archives.cifar10, official_archives.cifar100])
def archive(request: pytest.FixtureRequest) -> OfficialArchive:
    """A small archive of the official layout, of CIFAR-10 and of CIFAR-100."""
    return request.param()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on 127.0.0.1, reached directly also where a proxy is set."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with official_archives.serve() as running:
        yield running
