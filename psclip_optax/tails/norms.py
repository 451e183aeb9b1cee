"""Check the norms from which a tail is estimated, and compute spacings of the largest."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from psclip_optax.arrays import described
from psclip_optax.thresholds import concrete

MIN_NORMS = 500
MIN_K = 25


def as_norms(norms: npt.ArrayLike) -> np.ndarray:
    expected = "psc.tails expects norms of a real dtype and shape [n], one a sample"
    try:
        known = concrete(norms)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}, got {described(norms)}") from error
    if known is None:
        raise TypeError(
            "psc.tails looks at concrete norms, on the host, but got traced ones; return the norms "
            "from the jitted function (ClipStats.norms) and call psc.tails outside of it"
        )
    came = f"{known.dtype}{list(known.shape)}"
    if not (jnp.issubdtype(known.dtype, jnp.floating) or jnp.issubdtype(known.dtype, jnp.integer)):
        raise TypeError(f"{expected}, got {came}")
    if known.ndim != 1:
        raise ValueError(
            f"{expected}, got {came}; those of several batches go into one array by norms.ravel() "
            "or jnp.concatenate"
        )
    values = known.astype(np.float64)
    num_nonfinite = np.count_nonzero(~np.isfinite(values))
    if num_nonfinite:
        raise ValueError(
            f"psc.tails expects finite norms, but {num_nonfinite} of {len(values)} are NaN or "
            "infinite; look at where they come from, or leave them out by norms[isfinite(norms)]"
        )
    if (values < 0).any():
        raise ValueError(
            f"psc.tails expects norms ≥ 0, but {np.count_nonzero(values < 0)} of {len(values)} are "
            f"negative, the least {values.min():g}; of signed values pass the absolute ones"
        )
    if np.count_nonzero(values) < MIN_NORMS:
        raise ValueError(
            f"psc.tails needs at least {MIN_NORMS} positive norms for an interval that can be "
            f"trusted, got {np.count_nonzero(values)} in {came}; gather those of several batches"
        )
    return values


def without_zeros(norms: np.ndarray) -> np.ndarray:
    return norms[norms > 0]


def log_spacings(positive: np.ndarray, k: int) -> np.ndarray:
    """Computes the first k of j log(X_(j) / X_(j+1)): exponential, mean 1 / a in a power law."""
    largest = np.sort(np.log(np.partition(positive, -k - 1)[-k - 1 :]))[::-1]
    return np.arange(1, k + 1) * -np.diff(largest)


def spacings_of_upper_half(norms: np.ndarray) -> np.ndarray:
    positive = without_zeros(norms)
    spacings = log_spacings(positive, len(positive) // 2)
    mean_spacing(spacings, MIN_K)
    return spacings


def mean_spacing(spacings: np.ndarray, k: int) -> float:
    mean = float(spacings[:k].mean())
    if mean == 0:
        raise ValueError(
            f"the {k + 1} largest norms are equal, so that they have no tail to estimate; pass the "
            "norms before clipping, in a dtype in which they do not saturate"
        )
    return mean
