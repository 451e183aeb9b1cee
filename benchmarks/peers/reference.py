"""Computes the inputs that all peers share, and the reference gradients."""

from __future__ import annotations

import pathlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from benchmarks.engine.cost import largest_error
from benchmarks.peers.common import Inputs, Peer
from benchmarks.peers.jax_peers import as_names, as_tree
from benchmarks.zoo.models import ZOO

DTYPES = ("float32", "float64")
# In float64 few samples suffice, because algorithms are compared, not their rounding.
SAMPLES_IN_FLOAT64 = 4
# The largest accepted errors in float64: of the gradients, relative to the largest entry of a leaf,
# and of the loss, relative.
FLOAT64_LIMIT = 1e-10
LOSS_LIMITS = {"float32": 1e-5, "float64": FLOAT64_LIMIT}


class Reference(NamedTuple):
    """The result of psclip_optax itself.

    Attributes:
      loss: the mean over the samples.
      norms: the norms of the samples' gradients, [n].
      gradients: a function from a peer's ε to the clipped mean gradient with its clip factor.
    """

    loss: float
    norms: np.ndarray
    gradients: dict[float, dict[str, np.ndarray]]


def prepare(
    folder: pathlib.Path,
    model: str,
    size: Literal["small", "full"],
    samples: int,
    epsilons: set[float],
) -> dict[str, Reference]:
    """Writes the inputs of both dtypes into the folder; returns the references."""
    references = {}
    built = ZOO[model](size)
    for dtype in DTYPES:
        params, batch = as_names(built.params), tuple(map(np.asarray, built.batch(samples)))
        if dtype == "float64":
            params = {name: array.astype(dtype) for name, array in params.items()}
            batch = tuple(as_float64(array[:SAMPLES_IN_FLOAT64]) for array in batch)
        inputs = Inputs(model, size, np.inf, params, batch)
        with x64(dtype == "float64"):
            references[dtype], threshold = compute(inputs, built.loss, epsilons)
        inputs._replace(threshold=threshold).save(folder / f"{dtype}.npz")
    return references


def as_float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


@contextmanager
def x64(enabled: bool) -> Generator[None]:
    before = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def compute(inputs: Inputs, loss: Any, epsilons: set[float]) -> tuple[Reference, float]:
    """Computes the reference and the threshold, which is the median of the norms."""
    clipped = psc.clipped_value_and_grad(loss, jnp.inf, mode="one_pass", return_stats=True)

    @jax.jit
    def run(thresholds: jax.Array, *arguments: Any) -> Any:
        return clipped(*arguments, threshold=lambda positions: thresholds[positions - 1])

    arguments = (as_tree(inputs.params), *map(jnp.asarray, inputs.batch))
    value, _, stats = run(jnp.full(inputs.num_samples, jnp.inf), *arguments)
    norms = np.asarray(stats.norms, np.float64)
    threshold = float(np.median(norms))
    thresholds = {epsilon: thresholds_with(epsilon, threshold, norms) for epsilon in epsilons}
    gradients = {
        epsilon: as_names(run(jnp.asarray(of_samples), *arguments)[1])
        for epsilon, of_samples in thresholds.items()
    }
    return Reference(float(value), norms, gradients), threshold


def thresholds_with(epsilon: float, threshold: float, norms: np.ndarray) -> np.ndarray:
    """Computes norms τ_k with min(1, τ_k / ‖g_k‖) = min(1, C / (‖g_k‖ + ε)).

    Some libraries add such an ε to the norm. These thresholds account for it, so that no tolerance
    has to cover it.
    """
    return threshold * norms / (norms + epsilon)


def limit(peer: Peer, dtype: str, what: str) -> float:
    """Returns the largest accepted error of the "loss" or the "gradients"."""
    if what == "loss":
        return LOSS_LIMITS[dtype]
    return peer.float32_limit if dtype == "float32" else FLOAT64_LIMIT


def errors_of(
    reference: Reference, epsilon: float, loss: float, gradients: dict[str, np.ndarray]
) -> dict[str, float]:
    """Computes the relative error of the loss, and of each leaf relative to its largest entry."""
    return {
        "loss": abs(loss - reference.loss) / abs(reference.loss),
        "gradients": largest_error(gradients, reference.gradients[epsilon]),
    }
