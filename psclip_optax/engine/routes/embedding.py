"""Compute norms of gather's gradients: at each index, the sum of the cotangents of its rows.

No array has the vocabulary's size for each sample: T rows have at most T different indices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes import dense
from psclip_optax.engine.routes.route import Cotangents, Entered, Route, samples_first

# Up to this number of rows, comparing all pairs is faster than sorting.
_LARGEST_GRAM = 256
# Up to this number, adding them up is one pass over them, which needs no matrix unit.
_FEW_ROWS = 4


class Rows(NamedTuple):
    """The indices [n, B, T] and cotangents [n, B, T, …] of rows, 0 for indices out of bounds."""

    indices: jax.Array
    cotangents: jax.Array


class Embedding(Route):
    """The route for look-ups of rows: norms from the cotangents of rows with equal index."""

    name = "embedding"

    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        if eqn.primitive.name != "gather" or operand != 0:
            return False
        dims = eqn.params["dimension_numbers"]
        indexed = _indexed(eqn)
        if dims.operand_batching_dims or len(indexed) != 1:
            return False
        is_row = eqn.params["slice_sizes"][indexed[0]] == 1
        is_told = indexed[0] in dims.start_index_map
        return is_row and is_told and set(dims.collapsed_slice_dims) <= set(indexed)

    def joins(self, sites: Sequence[Site]) -> bool:
        if any(site.route is not self for site in sites):
            return False
        return len({row_axis(site) for site in sites}) == 1

    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        return squared_norms(rows(sites, entered, cotangents), dtype)


EMBEDDING = Embedding()


def _indexed(eqn: core.JaxprEqn) -> list[int]:
    """Find the axes that are not taken whole; along the others an index can only be 0."""
    shape, sizes = aval(eqn.invars[0]).shape, eqn.params["slice_sizes"]
    collapsed = eqn.params["dimension_numbers"].collapsed_slice_dims
    return [a for a, size in enumerate(shape) if sizes[a] != size or a in collapsed]


def row_axis(site: Site) -> int:
    """Return the frame's indexed axis."""
    return site.view.axes[_indexed(site.eqn)[0]]


def rows(sites: Sequence[Site], entered: Entered, cotangents: Cotangents) -> Rows:
    """Concatenate the rows of sites that join."""
    parts = [
        _rows(
            site,
            samples_first(site, *entered[site.path]),
            samples_first(site, cotangents[site.path]),
        )
        for site in sites
    ]
    return _joined(parts)


def _rows(site: Site, indices: jax.Array, dy: jax.Array) -> Rows:
    offset = 1 + len(site.scans)
    layered, steps = ([1 + axis for axis in axes] for axes in site.scan_axes)
    dims = site.eqn.params["dimension_numbers"]
    columns = [offset + axis for axis in dims.offset_dims]
    taken = [axis for axis in range(offset, dy.ndim) if axis not in columns]
    whole = [a for a in range(aval(site.eqn.invars[0]).ndim) if a not in dims.collapsed_slice_dims]
    # Offset axes are in the operand's order. Sites share the frame's order.
    columns = [columns[whole.index(a)] for a in sorted(whole, key=site.view.axes.__getitem__)]
    groups = [[0], layered, steps + taken]
    shape = [math.prod(dy.shape[axis] for axis in group) for group in groups]
    cotangents = dy.transpose([*itertools.chain(*groups), *columns])
    cotangents = cotangents.reshape(*shape, *(dy.shape[axis] for axis in columns))
    order = [*itertools.chain(*_shifted(groups, taken, offset)), indices.ndim - 1]
    flat = indices.transpose(order).reshape(*shape, -1)
    return _resolved(flat, cotangents, site)


def _shifted(groups: list[list[int]], taken: list[int], offset: int) -> list[list[int]]:
    """Renumber axes of the cotangents as axes of the indices, which lack the columns."""
    in_indices = {axis: offset + i for i, axis in enumerate(taken)}
    return [[in_indices.get(axis, axis) for axis in group] for group in groups]


def _resolved(indices: jax.Array, cotangents: jax.Array, site: Site) -> Rows:
    """Resolve out-of-bounds indices as the gather does: to the nearest row, or to none."""
    (axis,), shape = _indexed(site.eqn), aval(site.eqn.invars[0]).shape
    place = site.eqn.params["dimension_numbers"].start_index_map.index(axis)
    of_rows = indices[..., place]
    if site.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return Rows(jnp.clip(of_rows, 0, shape[axis] - 1), cotangents)
    # If an axis is taken whole, any index other than 0 is out of bounds.
    others = jnp.delete(indices, place, axis=-1, assume_unique_indices=True)
    is_inside = (of_rows >= 0) & (of_rows < shape[axis]) & jnp.all(others == 0, axis=-1)
    of_columns = is_inside.reshape(*is_inside.shape, *[1] * (cotangents.ndim - 3))
    return Rows(jnp.where(is_inside, of_rows, 0), jnp.where(of_columns, cotangents, 0))


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        jnp.concatenate([part.indices for part in parts], axis=2),
        jnp.concatenate([part.cotangents for part in parts], axis=2),
    )


def squared_norms(rows: Rows, dtype: Any) -> jax.Array:
    """Return ‖G_k‖² for each sample, [n]."""
    indices, cotangents = rows.indices, rows.cotangents.astype(dtype)
    num_rows = indices.shape[2]
    flat = cotangents.reshape(*indices.shape, math.prod(cotangents.shape[3:]))
    if num_rows > _LARGEST_GRAM:
        sums = jax.vmap(jax.vmap(_sum_by_index))(indices, flat)
        return jnp.sum(jnp.square(sums), axis=(1, 2, 3))
    same = indices[..., :, None] == indices[..., None, :]
    if num_rows > _FEW_ROWS:
        matrices = flat.reshape(-1, *flat.shape[2:])
        gram = dense.product(matrices, matrices, 2, dtype).reshape(same.shape)
        return jnp.maximum(jnp.sum(jnp.where(same, gram, 0), axis=(1, 2, 3)), 0)
    # Rows stay in the shape that the backward pass gives them.
    sums = (_sum_of_equal(same, cotangents, row) for row in range(num_rows))
    squares = (jnp.sum(jnp.square(one), axis=tuple(range(1, one.ndim))) for one in sums)
    return sum(squares, jnp.zeros(len(indices), dtype))


def _sum_of_equal(same: jax.Array, cotangents: jax.Array, row: int) -> jax.Array:
    """Sum a row and the later ones with its index, [n, B, …]; 0 if an earlier one has it."""

    def where(is_taken: jax.Array, other: int) -> jax.Array:
        taken = is_taken.reshape(*is_taken.shape, *[1] * (cotangents.ndim - 3))
        return jnp.where(taken, cotangents[:, :, other], 0)

    is_first = ~jnp.any(same[..., row, :row], axis=-1)
    later = [where(is_first & same[..., row, other], other) for other in range(row, same.shape[-1])]
    return sum(later[1:], later[0])


def _sum_by_index(indices: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Sum the rows with equal index, [T, q], padded with rows of 0 at the end."""
    order = jnp.argsort(indices)
    ordered = indices[order]
    is_new = jnp.concatenate([jnp.zeros(1, int), (ordered[1:] != ordered[:-1]).astype(int)])
    return jax.ops.segment_sum(
        cotangents[order], jnp.cumsum(is_new), num_segments=len(indices), indices_are_sorted=True
    )
