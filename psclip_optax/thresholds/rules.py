"""Build adaptive thresholds; all of them share these checks and sums over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, meshes
from psclip_optax.arrays import as_array, described, described_tree, promoted
from psclip_optax.thresholds.checks import check_number, concrete
from psclip_optax.thresholds.interface import AdaptiveThreshold
from psclip_optax.typing import AxisName, PyTree, Threshold

StateT = TypeVar("StateT")


def check_memory(owner: str, decay: jax.typing.ArrayLike, initial: jax.typing.ArrayLike) -> None:
    check_number(owner, "decay", decay, lowest=0, highest=1)
    check_number(owner, "initial", initial, lowest=0)


def build_rule(
    init: Callable[[], StateT],
    threshold: Callable[[StateT], Threshold],
    observe: Callable[[StateT, jax.Array, jax.Array], StateT],
    is_new: Callable[[StateT], jax.Array] | None = None,
) -> AdaptiveThreshold[StateT]:
    """Build a rule from `observe(state, norms, counts) -> state`.

    Norms are 0 where `counts` is False.
    """
    expected = jax.eval_shape(init)

    def checked_threshold(state: StateT) -> Threshold:
        _check_state(state, expected)
        return threshold(state)

    def update(
        state: StateT,
        norms: jax.typing.ArrayLike,
        sample_mask: jax.typing.ArrayLike | None = None,
        *,
        axis_name: AxisName = None,
    ) -> StateT:
        _check_state(state, expected)

        def compute(
            state: StateT,
            norms: jax.typing.ArrayLike,
            sample_mask: jax.typing.ArrayLike | None,
        ) -> StateT:
            meshes.check_axis_name(axis_name)
            checked, counts = _checked_norms(norms, sample_mask)
            if axis_name is not None:
                checked, counts = (clipping.gathered(x, axis_name) for x in (checked, counts))
            new = observe(state, jnp.where(counts, checked, 0), counts)

            def unless_none_counts(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(jnp.any(counts), new, old).astype(old.dtype)

            return jax.tree.map(unless_none_counts, new, state)

        arguments = (state, norms, sample_mask)
        mesh = meshes.explicit_mesh(arguments)
        if mesh is None:
            return compute(*arguments)
        return meshes.with_auto_axes(compute, arguments, mesh, P())

    return AdaptiveThreshold(init, checked_threshold, update, is_new)


def _check_state(state: PyTree, expected: PyTree) -> None:
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise TypeError(
            "an adaptive threshold's state comes from init() or update(state, norms) of the same "
            f"rule, {described_tree(expected)}, got {described_tree(state)}"
        )


def _checked_norms(
    norms: jax.typing.ArrayLike, sample_mask: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Return norms in the dtype of a state, and which of them are finite and not masked."""
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
