"""Computes the reference for tests and benchmarks, in NumPy float64."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

try:
    from jax import enable_x64 as enable_x64
except ImportError:  # JAX < 0.8
    from jax.experimental import enable_x64 as enable_x64  # pyright: ignore


def clipped_mean(per_sample_grads: Any, taus: Any, sample_mask: Any = None) -> Any:
    """Computes Σ γ_k g_k / N for stacks with samples on axis 0, sample by sample."""
    stacked, treedef = jax.tree.flatten(per_sample_grads)
    stacked = [np.asarray(leaf, np.float64) for leaf in stacked]
    n = len(stacked[0])
    counts = np.ones(n, bool) if sample_mask is None else np.asarray(sample_mask)
    total = [np.zeros(leaf.shape[1:]) for leaf in stacked]
    for k in np.flatnonzero(counts):
        sample = [leaf[k] for leaf in stacked]
        if not all(np.isfinite(leaf).all() for leaf in sample):
            continue
        norm = np.sqrt(sum((leaf**2).sum() for leaf in sample))
        scale = min(1.0, taus[k] / norm) if norm > 0 else 1.0
        total = [t + scale * leaf for t, leaf in zip(total, sample, strict=True)]
    return jax.tree.unflatten(treedef, [t / max(counts.sum(), 1) for t in total])
