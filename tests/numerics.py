"""The reference every test compares with, in NumPy float64, and comparisons that fail on NaN."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from jax import enable_x64 as enable_x64
except ImportError:  # JAX < 0.8
    from jax.experimental import enable_x64 as enable_x64  # pyright: ignore


def clipped_mean(per_sample_grads: Any, taus: Any, sample_mask: Any = None) -> Any:
    """Σ γ_k g_k / N for stacks with samples on axis 0, written out sample by sample."""
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


def growing(alpha: float, beta: float, n: int) -> np.ndarray:
    return alpha * np.arange(1, n + 1) ** (1 / beta)


def assert_close(actual: Any, expected: Any, rtol: float, floor: float = 0.0) -> None:
    """Every entry within `rtol` of its leaf's largest entry; NaN is never close to anything.

    A leaf whose values vanish, but for rounding, is held against `floor` times the tree's largest
    entry instead.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    wanted = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(expected)]
    assert all(np.isfinite(leaf).all() for leaf in wanted), "the expected values must be finite"
    smallest = floor * max((np.abs(leaf).max(initial=0) for leaf in wanted), default=0)
    for leaf, want in zip(jax.tree.leaves(actual), wanted, strict=True):
        got = np.asarray(leaf, np.float64)
        assert got.shape == want.shape
        scale = max(np.abs(want).max(initial=0), smallest)
        allowed = rtol * scale + np.finfo(np.float32).tiny
        np.testing.assert_array_less(np.abs(got - want), allowed, strict=False)
        assert np.isfinite(got).all()


def in_float64(tree: Any) -> Any:
    """The same with its floating-point leaves in float64."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if is_float(leaf) else leaf, tree)
