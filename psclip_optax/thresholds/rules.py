"""Adaptive thresholds from what they observe: the checks and the devices that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, meshes
from psclip_optax.arrays import as_array, described, described_tree, promoted
from psclip_optax.thresholds.checks import check_number, concrete
from psclip_optax.thresholds.interface import AdaptiveThreshold, Threshold


def check_memory(owner: str, decay: Any, initial: Any) -> None:
    check_number(owner, "decay", decay, lowest=0, highest=1)
    check_number(owner, "initial", initial, lowest=0)


def build_rule(
    init: Callable[[], Any],
    threshold: Callable[[Any], Threshold],
    observe: Callable[[Any, jax.Array, jax.Array], Any],
    is_new: Callable[[Any], jax.Array] | None = None,
) -> AdaptiveThreshold:
    """A rule from (state, norms, which of them have a say) → state, the others being 0."""
    expected = jax.eval_shape(init)

    def checked_threshold(state: Any) -> Threshold:
        _check_state(state, expected)
        return threshold(state)

    def update(
        state: Any,
        norms: jax.typing.ArrayLike,
        sample_mask: jax.typing.ArrayLike | None = None,
        *,
        axis_name: Any = None,
    ) -> Any:
        _check_state(state, expected)

        def compute(state: Any, norms: Any, sample_mask: Any) -> Any:
            meshes.check_axis_name(axis_name)
            norms, counts = _checked_norms(norms, sample_mask)
            if axis_name is not None:
                norms, counts = (clipping.gathered(x, axis_name) for x in (norms, counts))
            new = observe(state, jnp.where(counts, norms, 0), counts)
            return jax.tree.map(
                lambda new, old: jnp.where(jnp.any(counts), new, old).astype(old.dtype), new, state
            )

        arguments = (state, norms, sample_mask)
        mesh = meshes.explicit_mesh(arguments)
        if mesh is None:
            return compute(*arguments)
        return meshes.with_auto_axes(compute, arguments, mesh, P())

    return AdaptiveThreshold(init, checked_threshold, update, is_new)


def _check_state(state: Any, expected: Any) -> None:
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise TypeError(
            "an adaptive threshold's state comes from init() or update(state, norms) of the same "
            f"rule, {described_tree(expected)}, got {described_tree(state)}"
        )


def _checked_norms(norms: Any, sample_mask: Any) -> tuple[jax.Array, jax.Array]:
    """Norms in the dtype of a state, and which are finite and not masked."""
    expected = (
        "an adaptive threshold is updated with the norms of a batch, a float array of shape [n] "
        "such as stats.norms of psc.ClipStats"
    )
    norms = as_array(norms, expected)
    if norms.ndim != 1 or not jnp.issubdtype(norms.dtype, jnp.floating):
        raise ValueError(f"{expected}, got {described(norms)}")
    known = concrete(norms)
    negative = np.zeros(0) if known is None else known[np.isfinite(known) & (known < 0)]
    if negative.size:
        raise ValueError(
            f"norms are ≥ 0, but the smallest of {described(norms)} is {negative.min()}; pass "
            "stats.norms of psc.ClipStats as they are"
        )
    norms = lax.stop_gradient(norms).astype(promoted(norms.dtype, jnp.result_type(float)))
    finite = jnp.isfinite(norms)
    if sample_mask is None:
        return norms, finite
    return norms, finite & clipping.check_sample_mask(sample_mask, norms.size)
