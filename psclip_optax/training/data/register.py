"""The data sets that there are: a new one is a file beside this, and a line in the table.

Nothing heavy is imported here, for the command line names its choices from it.
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
