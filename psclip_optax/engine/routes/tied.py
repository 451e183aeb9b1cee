"""Compute norms for an embedding tied to the output layer: gradients G of look-ups, H of a product.

‖G + H‖² = ‖G‖² + ‖H‖² + 2 ⟨G, H⟩, and the inner product needs only the rows of H that were looked
up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes import dense, embedding
from psclip_optax.engine.routes.dense import DENSE
from psclip_optax.engine.routes.embedding import EMBEDDING
from psclip_optax.engine.routes.route import Cotangents, Entered, Route, of_one_sample
from psclip_optax.platforms import by_platform


class Tied(Route):
    """The route for look-ups in a table that is also used in products."""

    name = "tied"

    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        del eqn, operand
        return False  # one equation is never tied

    def joins(self, sites: Sequence[Site]) -> bool:
        gathers, products = _of(sites, EMBEDDING), _of(sites, DENSE)
        if not gathers or not products or len(gathers) + len(products) < len(sites):
            return False
        if not EMBEDDING.joins(gathers) or not DENSE.joins(products):
            return False
        form = dense.form(products[0])
        rows = (embedding.row_axis(gathers[0]),)
        return not form.blocks and rows in (form.left, form.right)

    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        gathers, products = _of(sites, EMBEDDING), _of(sites, DENSE)
        taken = embedding.rows(gathers, entered, cotangents)
        factors = dense.factors(products, entered, cotangents)
        left, right = dense.by_sample(factors)
        is_left = dense.form(products[0]).left == (embedding.row_axis(gathers[0]),)
        over_rows, over_columns = (left, right) if is_left else (right, left)
        crossed = _twice_inner_products(taken, over_rows, over_columns, dtype)
        apart = dense.squared_norms(factors, dtype) + embedding.squared_norms(taken, dtype)
        return jnp.maximum(apart + crossed, 0)

    def entries_made(self, sites: Sequence[Site]) -> int:
        return DENSE.entries_made(_of(sites, DENSE)) + _entries_of_inner_products(sites)

    def entries_made_on_tpu(self, sites: Sequence[Site]) -> int:
        return DENSE.entries_made_on_tpu(_of(sites, DENSE)) + _entries_of_inner_products(sites)


TIED = Tied()


def _of(sites: Sequence[Site], route: Route) -> list[Site]:
    return [site for site in sites if site.route is route]


def _entries_of_inner_products(sites: Sequence[Site]) -> int:
    gathers = _of(sites, EMBEDDING)
    made = jax.eval_shape(functools.partial(embedding.rows, gathers), *of_one_sample(gathers))
    num_taken = made.indices.size
    num_rows = sum(math.prod(aval(site.leaving).shape[:-1]) for site in _of(sites, DENSE))
    return num_taken * (num_taken + num_rows)


def _twice_inner_products(
    rows: embedding.Rows, over_rows: jax.Array, over_columns: jax.Array, dtype: Any
) -> jax.Array:
    """Return 2 ⟨G, H⟩ for each sample, with H = over_rowsᵀ over_columns.

    ⟨G, H⟩ = Σ_s Σ_t over_rows[s, id_t] (over_columns_s · dE_t), where row id_t has the cotangent
    dE_t.

    Args:
      rows: the rows that were looked up.
      over_rows: the factor over the table's rows, [n, B, S, V].
      over_columns: the factor over its columns, [n, B, S, q].
      dtype: the dtype of the result, in which sums are accumulated.
    """
    over, taken = (
        side.reshape(-1, side.shape[2], math.prod(side.shape[3:]))
        for side in (over_columns, rows.cotangents)
    )
    products = dense.product(over, taken, 2, dtype).reshape(*over_rows.shape[:3], -1)
    # A TPU can look up along the last axis only in a copy of the whole array.
    at_indices = by_platform(over_rows, rows.indices, tpu=_selected, elsewhere=_looked_up)
    told = jnp.where(rows.is_told[:, :, None], products * at_indices.astype(dtype), 0)
    return 2 * jnp.sum(told, axis=(1, 2, 3))


def _looked_up(over_rows: jax.Array, indices: jax.Array) -> jax.Array:
    """Return the entries of [n, B, S, V] at indices [n, T] along the last axis, [n, B, S, T]."""
    return jnp.take_along_axis(over_rows, indices[:, :, None, :], axis=3)


def _selected(over_rows: jax.Array, indices: jax.Array) -> jax.Array:
    """Return the same by a product with a one-hot matrix, which is fused into the product."""
    parts, (num_rows, size) = over_rows.shape[:2], over_rows.shape[2:]
    ones = jax.nn.one_hot(indices, size, dtype=over_rows.dtype)
    left, right = (side.reshape(math.prod(parts), -1, size) for side in (over_rows, ones))
    chosen = dense.product(left, right, 2, over_rows.dtype)
    return chosen.reshape(*parts, num_rows, -1)
