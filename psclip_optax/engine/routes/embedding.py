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
# Up to this number, the products of pairs are sums in one pass, which needs no matrix unit.
_FEW_ROWS = 4


class Rows(NamedTuple):
    """Holds the rows that were looked up.

    Attributes:
      indices: the index of each row, within bounds, [n, B, T].
      cotangents: the cotangent of each row, [n, B, T, …].
      is_told: whether the gradient has the row: an index out of bounds has none, [n, B, T].
    """

    indices: jax.Array
    cotangents: jax.Array
    is_told: jax.Array


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
    left = [a for a in range(aval(site.eqn.invars[0]).ndim) if a not in dims.collapsed_slice_dims]
    # Offset axes are in the operand's order. Sites share the frame's order.
    in_dy = dict(zip(left, (offset + axis for axis in dims.offset_dims), strict=True))
    taken = [axis for axis in range(offset, dy.ndim) if axis not in in_dy.values()]
    kept = [in_dy.pop(axis) for axis in _indexed(site.eqn) if axis in in_dy]  # of size 1
    columns = [in_dy[axis] for axis in sorted(in_dy, key=site.view.axes.__getitem__)]
    groups = [[0], layered, steps + taken]
    shape = [math.prod(dy.shape[axis] for axis in group) for group in groups]
    cotangents = dy.transpose([*itertools.chain(*groups), *kept, *columns])
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
    if of_rows.dtype.itemsize < 4:  # a table may have more rows than such a dtype can count
        of_rows = of_rows.astype(jnp.int32)
    if site.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        clipped = jnp.clip(of_rows, 0, shape[axis] - 1)
        return Rows(clipped, cotangents, jnp.ones_like(clipped, bool))
    # If an axis is taken whole, any index other than 0 is out of bounds.
    others = jnp.delete(indices, place, axis=-1, assume_unique_indices=True)
    is_inside = (of_rows >= 0) & (of_rows < shape[axis]) & jnp.all(others == 0, axis=-1)
    return Rows(jnp.where(is_inside, of_rows, 0), cotangents, is_inside)


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    # Sites may have indices of several dtypes.
    parts = [part._replace(indices=part.indices.astype(int)) for part in parts]
    return Rows(*(jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True)))


def squared_norms(rows: Rows, dtype: Any) -> jax.Array:
    """Return ‖G_k‖² for each sample, [n]."""
    indices, is_told = rows.indices, rows.is_told
    cotangents = rows.cotangents.astype(dtype)
    num_rows = indices.shape[2]
    flat = cotangents.reshape(*indices.shape, math.prod(cotangents.shape[3:]))
    if num_rows > _LARGEST_GRAM:
        told = jnp.where(is_told[..., None], flat, 0)
        sums = jax.vmap(jax.vmap(_sum_by_index))(indices, told)
        return jnp.sum(jnp.square(sums), axis=(1, 2, 3))
    same = indices[..., :, None] == indices[..., None, :]
    same &= is_told[..., :, None] & is_told[..., None, :]
    # The gradient is a sum of rows for each index, so that only rows with equal index meet.
    if 0 < num_rows <= _FEW_ROWS:
        return jnp.maximum(_products_of_few(same, cotangents), 0)
    matrices = flat.reshape(-1, *flat.shape[2:])
    gram = dense.product(matrices, matrices, 2, dtype).reshape(same.shape)
    return jnp.maximum(jnp.sum(jnp.where(same, gram, 0), axis=(1, 2, 3)), 0)


def _products_of_few(same: jax.Array, rows: jax.Array) -> jax.Array:
    """Sum the inner products of the pairs of rows [n, B, T, …] that are the same row, [n].

    Rows stay in the shape that the backward pass gives them, and the matrix unit is not needed. A
    TPU sums the squares of all rows as it makes them.
    """
    columns, num_rows = tuple(range(3, rows.ndim)), rows.shape[2]

    def apart(distance: int) -> jax.Array:
        low, high = rows[:, :, : num_rows - distance], rows[:, :, distance:]
        products = jnp.sum(low * high, axis=columns)
        is_same = jnp.diagonal(same, distance, 2, 3)
        return jnp.sum(jnp.where(is_same, products, 0), axis=(1, 2))

    return apart(0) + 2 * sum(map(apart, range(1, num_rows)), jnp.zeros(len(rows), rows.dtype))


def _sum_by_index(indices: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Sum the rows with equal index, [T, q], padded with rows of 0 at the end."""
    order = jnp.argsort(indices)
    ordered = indices[order]
    is_new = jnp.concatenate([jnp.zeros(1, int), (ordered[1:] != ordered[:-1]).astype(int)])
    return jax.ops.segment_sum(
        cotangents[order], jnp.cumsum(is_new), num_segments=len(indices), indices_are_sorted=True
    )
