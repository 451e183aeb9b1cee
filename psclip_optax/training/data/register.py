"""Register the data sets: a new one is a file in this folder and a line in the table.

No heavy package is imported here, because the command line reads its choices from this register.
"""

from __future__ import annotations

from psclip_optax.training.data.cifar import CIFAR10, CIFAR100
from psclip_optax.training.data.digits import DIGITS
from psclip_optax.training.data.source import Source

DATASETS: dict[str, Source] = {
    "digits": DIGITS,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}
