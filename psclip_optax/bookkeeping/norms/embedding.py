"""gather of whole rows: sample k's gradient has the sum of the rows that were taken at each index.

Never an array of the vocabulary's size for each sample: T rows have at most T distinct indices.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax.bookkeeping.norms import dense
from psclip_optax.bookkeeping.sites import Site
from psclip_optax.bookkeeping.views import aval

# Up to here comparing all pairs of rows is faster than sorting them.
_LARGEST_GRAM = 256


class Rows(NamedTuple):
    """indices [n, B, T], and the rows' cotangents [n, B, T, q], 0 where the index is outside."""

    indices: jax.Array
    cotangents: jax.Array


def supports(eqn: core.JaxprEqn, operand: int) -> bool:
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if operand != 0 or dims.operand_batching_dims or len(dims.start_index_map) != 1:
        return False
    row_axis, shape = dims.start_index_map[0], aval(eqn.invars[0]).shape
    whole = [size for axis, size in enumerate(shape) if axis != row_axis]
    taken = [size for axis, size in enumerate(sizes) if axis != row_axis]
    return dims.collapsed_slice_dims == (row_axis,) and whole == taken


def row_axis(site: Site) -> int:
    """The axis of the frame that is indexed."""
    return site.view.axes[site.eqn.params["dimension_numbers"].start_index_map[0]]


def rows(site: Site, indices: jax.Array, dy: jax.Array) -> Rows:
    offset = 1 + len(site.scans)
    layered, steps = site.scan_axes
    dims = site.eqn.params["dimension_numbers"]
    columns = [offset + axis for axis in dims.offset_dims]
    taken = [axis for axis in range(offset, dy.ndim) if axis not in columns]
    operand = aval(site.eqn.invars[0])
    own = [a for a in range(operand.ndim) if a != dims.start_index_map[0]]
    # Offset axes come in the operand's order; the frame's is the one that sites share.
    columns = [columns[own.index(a)] for a in sorted(own, key=site.view.axes.__getitem__)]
    groups = [[0], layered, steps + taken, columns]
    shape = [math.prod(dy.shape[axis] for axis in group) for group in groups]
    cotangents = dy.transpose([*itertools.chain(*groups)]).reshape(shape)
    indices = indices[..., 0]
    flat = indices.transpose([*itertools.chain(*_shifted(groups[:3], taken, offset))]).reshape(
        shape[:3]
    )
    return _resolved(flat, cotangents, operand.shape[dims.start_index_map[0]], site)


def _shifted(groups: list[list[int]], taken: list[int], offset: int) -> list[list[int]]:
    """The same axes in the indices, which have no columns between theirs."""
    in_indices = {axis: offset + i for i, axis in enumerate(taken)}
    return [[in_indices.get(axis, axis) for axis in group] for group in groups]


def _resolved(indices: jax.Array, cotangents: jax.Array, num_rows: int, site: Site) -> Rows:
    """As the gather takes an index outside: the nearest row, or none."""
    if site.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return Rows(jnp.clip(indices, 0, num_rows - 1), cotangents)
    is_inside = (indices >= 0) & (indices < num_rows)
    return Rows(jnp.where(is_inside, indices, 0), jnp.where(is_inside[..., None], cotangents, 0))


def joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        jnp.concatenate([part.indices for part in parts], axis=2),
        jnp.concatenate([part.cotangents for part in parts], axis=2),
    )


def squared_norms(rows: Rows, dtype: Any) -> jax.Array:
    """‖G_k‖² for each sample, [n]."""
    indices, cotangents = rows.indices, rows.cotangents.astype(dtype)
    if indices.shape[2] == 1:
        return jnp.sum(jnp.square(cotangents), axis=(1, 2, 3))
    if indices.shape[2] <= _LARGEST_GRAM:
        same = indices[..., :, None] == indices[..., None, :]
        flat = cotangents.reshape(-1, *cotangents.shape[2:])
        gram = dense.product(flat, flat, 2, dtype).reshape(same.shape)
        return jnp.maximum(jnp.sum(jnp.where(same, gram, 0), axis=(1, 2, 3)), 0)
    sums = jax.vmap(jax.vmap(_sum_by_index))(indices, cotangents)
    return jnp.sum(jnp.square(sums), axis=(1, 2, 3))


def _sum_by_index(indices: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Sums of the rows with equal index, [T, q], those of the last ones 0."""
    order = jnp.argsort(indices)
    ordered = indices[order]
    is_new = jnp.concatenate([jnp.zeros(1, int), (ordered[1:] != ordered[:-1]).astype(int)])
    return jax.ops.segment_sum(
        cotangents[order], jnp.cumsum(is_new), num_segments=len(indices), indices_are_sorted=True
    )


def twice_inner_products(
    rows: Rows, over_rows: jax.Array, over_columns: jax.Array, dtype: Any
) -> jax.Array:
    """2 ⟨G, H⟩ for each sample with H = over_rowsᵀ over_columns, [n, B, S, V] and [n, B, S, q].

    As an embedding tied to the output layer has it: Σ_s Σ_t over_rows[s, id_t] (over_columns_s ·
    dE_t).
    """
    over, taken = (side.reshape(-1, *side.shape[2:]) for side in (over_columns, rows.cotangents))
    products = dense.product(over, taken, 2, dtype).reshape(*over_rows.shape[:3], -1)
    at_indices = jnp.take_along_axis(over_rows, rows.indices[:, :, None, :], axis=3)
    return 2 * jnp.sum(products * at_indices.astype(dtype), axis=(1, 2, 3))
