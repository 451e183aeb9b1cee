"""Clip a program's parameters by leaf, or by groups of a few, and compare with `vmap(grad)`."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from tests.numerics import clipped_mean
from tests.random_programs.checks import relative_error
from tests.random_programs.program import NUM_SAMPLES, Program, Run

Groups = tuple[tuple[str, ...], ...]


def groups_of(program: Program) -> Groups:
    """Group by leaf, or by runs of consecutive parameters, like layers."""
    names, size = list(program.params), 1 + program.seed // 2 % 3
    return tuple(tuple(names[i : i + size]) for i in range(0, len(names), size))


def tree_of(groups: Groups, leaves: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: leaves[name] for name in names} for names in groups]


def clipped_by_group(
    program: Program, clip: Run = psc.clipped_value_and_grad, **options: Any
) -> Run:
    """Return a function from parameters, batch and thresholds to the clipped gradient."""
    groups = groups_of(program)

    def loss(groups: list[dict[str, Any]], example: Any) -> Any:
        return program.loss({name: leaf for own in groups for name, leaf in own.items()}, example)

    # A large limit, as devices report one: the choice of a mode then estimates the memory.
    options = {"memory_limit_bytes": 2**40, **options}
    f = clip(loss, [1.0] * len(groups), return_stats=True, **options)

    def run(params: dict[str, Any], batch: Any, taus: Any) -> Any:
        value, grads, stats = f(tree_of(groups, params), batch, threshold=list(taus))
        return value, {name: leaf for own in grads for name, leaf in own.items()}, stats

    return run


def norms_of(program: Program, stacked: dict[str, Any]) -> Any:
    """Return the norm of each sample and group, [n, groups]."""

    def squares(name: str) -> Any:
        return jnp.sum(jnp.square(stacked[name].reshape(NUM_SAMPLES, -1)), 1)

    return jnp.sqrt(jnp.stack([sum(map(squares, own)) for own in groups_of(program)], 1))


def taus_of(norms: Any) -> Any:
    """Return thresholds that clip about half of the samples in each group."""
    return jnp.median(norms, axis=0)


def errors_by_group(
    program: Program, result: Any, losses: Any, stacked: dict[str, Any], floor: float = 1e-2
) -> dict[str, float]:
    """Return the errors of gradients, norms and loss."""
    value, grads, stats = result
    if any(grads[name].dtype != leaf.dtype for name, leaf in stacked.items()):
        return {"dtype": math.inf}
    norms = np.asarray(norms_of(program, stacked), np.float64)
    parts = tree_of(groups_of(program), stacked)
    means: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for own, tau in zip(parts, np.asarray(taus_of(norms), np.float64), strict=True):
        taus = np.full(NUM_SAMPLES, tau)
        means |= clipped_mean(own, taus)
        sizes |= clipped_mean({name: np.abs(leaf) for name, leaf in own.items()}, taus)
    return {
        "gradient": relative_error(grads, means, sizes, floor),
        "norms": relative_error(stats.norms, norms),
        "loss": relative_error(np.append(losses, value), np.append(losses, losses.mean())),
    }
