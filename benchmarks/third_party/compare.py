"""Compares the engine with vmap(grad) on one model."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from benchmarks.third_party.common import LIMITS, MODES, Case, Dtype, Mode, Model
from benchmarks.zoo.reference import clipped_mean, enable_x64

# The error of a leaf whose gradient vanishes up to rounding is relative to this share of the
# largest entry of all leaves, and that of a sample's norm likewise.
FLOOR = 1e-3


def compare(model: Model) -> dict[str, Any]:
    """Compares the engine on a model; records an exception and its stage."""
    row: dict[str, Any] = {"dtype": model.dtype}
    stage = "build"
    try:
        with enable_x64(model.dtype == "float64"):
            case = prepared(model.build(), model.dtype)
            leaves = jax.tree.leaves(case.params)
            row |= {"parameters": sum(leaf.size for leaf in leaves), "leaves": len(leaves)}
            stage = "vmap(grad)"
            stacked, norms = reference(case)
            threshold = float(np.median(norms))
            expected = clipped_mean(stacked, np.full(len(norms), threshold))
            stage = "explain"
            row |= {"threshold": threshold, "share_of_routes": share_of_routes(case)}
            row["errors"] = {}
            for mode in MODES:
                stage = mode
                grads, found = clipped(case, threshold, mode)
                row["errors"][mode] = {
                    "norms": error_of_norms(found, norms),
                    "gradients": error_of_gradients(grads, expected),
                }
    except Exception as error:  # any exception of a library or the engine is a result
        return row | {"outcome": "failed", "stage": stage, "message": last_words(error)}
    errors = [error for of_mode in row["errors"].values() for error in of_mode.values()]
    return row | {"outcome": "ok" if np.max(errors) <= LIMITS[model.dtype] else "wrong"}


def last_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def prepared(case: Case, dtype: Dtype) -> Case:
    rng = np.random.default_rng(0)

    def drawn(leaf: Any) -> jax.Array:
        noise = case.spread * rng.normal(size=np.shape(leaf))
        return jnp.asarray(np.asarray(leaf, np.float64) + noise, dtype)

    params = jax.tree.map(drawn, case.params)
    return case._replace(
        params=params, batch=jax.tree.map(lambda leaf: cast(leaf, dtype), case.batch)
    )


def cast(leaf: Any, dtype: Dtype) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles in about half the usual time, for programs that run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def reference(case: Case) -> tuple[Any, np.ndarray]:
    axes = case.in_axes if isinstance(case.in_axes, tuple) else (case.in_axes,) * len(case.batch)
    stacked = compiled(jax.vmap(jax.grad(case.loss), (None, *axes)))(case.params, *case.batch)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    norms = np.sqrt(sum(np.square(leaf.reshape(len(leaf), -1)).sum(1) for leaf in leaves))
    if not (np.isfinite(norms).all() and norms.any()):
        raise ValueError(f"the norms of vmap(grad) are {norms}")
    return stacked, norms


def clipped(case: Case, threshold: float, mode: Mode) -> tuple[Any, Any]:
    """Computes gradients and norms in a mode."""
    function = psc.clipped_value_and_grad(
        case.loss, threshold, in_axes=case.in_axes, mode=mode, return_stats=True
    )
    _, grads, stats = compiled(function)(case.params, *case.batch)
    return grads, stats.norms


def share_of_routes(case: Case) -> dict[str, float]:
    """Computes the share of the parameters on each route."""
    function: Any = psc.clipped_value_and_grad(case.loss, 1.0, in_axes=case.in_axes)
    sizes: collections.Counter[str] = collections.Counter()
    plan = function.explain(case.params, *case.batch)
    for row, leaf in zip(plan.rows, jax.tree.leaves(case.params), strict=True):
        sizes[row.route] += leaf.size
    return {route: size / sizes.total() for route, size in sizes.most_common()}


def error_of_norms(found: Any, norms: np.ndarray) -> float:
    scales = np.maximum(norms, FLOOR * norms.max())
    return float(np.max(np.abs(np.asarray(found) - norms) / scales))


def error_of_gradients(grads: Any, expected: Any) -> float:
    """Returns the largest error of a leaf relative to its largest entry; NaN if any is."""
    wanted = jax.tree.leaves(expected)
    largest = np.array([np.abs(leaf).max(initial=0) for leaf in wanted])
    errors = [
        np.abs(np.asarray(leaf) - want).max(initial=0)
        for leaf, want in zip(jax.tree.leaves(grads), wanted, strict=True)
    ]
    return float(np.max(np.array(errors) / np.maximum(largest, FLOOR * largest.max())))
