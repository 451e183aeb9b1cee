"""Register CIFAR-10 and CIFAR-100, which are downloaded once."""

from __future__ import annotations

import functools

from psclip_optax.training.data.source import Origin, Source
from psclip_optax.training.data.splits import Dataset, DatasetShape


def _load(name: str, origin: Origin) -> Dataset:
    # Imported here: the downloader comes with the extra and takes time to import.
    from psclip_optax.training.data.cifar_files import load_cifar

    return load_cifar(name, origin)


CIFAR10 = Source("CIFAR-10", DatasetShape((32, 32, 3), 10), functools.partial(_load, "cifar10"))
CIFAR100 = Source("CIFAR-100", DatasetShape((32, 32, 3), 100), functools.partial(_load, "cifar100"))
