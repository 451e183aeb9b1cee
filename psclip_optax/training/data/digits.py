"""Load digits of 8 × 8 pixels, which come with scikit-learn."""

from __future__ import annotations

import numpy as np

from psclip_optax.training.data.source import Source
from psclip_optax.training.data.splits import (
    Dataset,
    DatasetShape,
    Split,
    random_generator,
    train_validation_split,
)

_NUM_TEST = 500
_SEED = 0


def _load() -> Dataset:
    # Imported here, because scikit-learn takes a second to import.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = random_generator(_SEED, "digits").permutation(len(labels))
    train, test = train_validation_split(
        Split(pixels[order], labels[order].astype(np.int32)),
        num_validation=_NUM_TEST,
        seed=_SEED,
    )
    return Dataset("digits", 10, tuple("0123456789"), train, test)


DIGITS = Source("digits", DatasetShape((8, 8, 1), 10), lambda origin: _load(), "scikit-learn")
