"""Define the reference for every test, and comparisons that fail on NaN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from benchmarks.zoo.reference import clipped_mean as clipped_mean
from benchmarks.zoo.reference import enable_x64 as enable_x64


def growing(alpha: float, beta: float, n: int) -> np.ndarray:
    return alpha * np.arange(1, n + 1) ** (1 / beta)


def in_all_modes(
    loss: Any,
    threshold: Any,
    modes: Iterable[str] = ("one_pass", "two_pass", "vmap"),
    **options: Any,
) -> Any:
    """Return one program with the results of all modes, which compiles faster than three."""
    options = {"return_stats": True} | options
    run = {
        mode: psc.clipped_value_and_grad(loss, threshold, mode=mode, **options) for mode in modes
    }
    return jax.jit(lambda *arguments: {mode: f(*arguments) for mode, f in run.items()})


def heavy_tailed(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw Student-t numbers with 1.5 degrees of freedom by NumPy: compiling XLA's takes long."""
    return np.random.default_rng(seed).standard_t(1.5, shape).astype(np.float32)


def assert_close(actual: Any, expected: Any, rtol: float, floor: float = 0.0) -> None:
    """Assert that every entry is within `rtol` of its leaf's largest entry; NaN fails.

    The tolerance of a leaf that vanishes up to rounding is relative to `floor` times the tree's
    largest entry instead.
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
    """Convert the floating-point leaves of a tree to float64 by NumPy, which compiles nothing."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    wider = lambda leaf: jax.device_put(np.asarray(leaf, np.float64)) if is_float(leaf) else leaf
    return jax.tree.map(wider, tree)
