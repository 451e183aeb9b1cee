"""Norms and weighted sums of the per-sample gradients of one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax.bookkeeping.norms import conv, dense, embedding
from psclip_optax.bookkeeping.plan import Group, LeafPlan, route_of
from psclip_optax.bookkeeping.sites import Site, of_parameter, operate
from psclip_optax.bookkeeping.taps import Taps


def squared_norms(plan: LeafPlan, entered: Taps, cotangents: Taps, dtype: Any) -> jax.Array:
    """‖G_k‖² of the parameter for each sample, shape [n].

    Args:
      plan: the parameter's, with sites.
      entered: what entered each site, [n, scans…, …].
      cotangents: those of what left each site, [n, scans…, …].
      dtype: of the result, in which sums are accumulated.
    """
    norms = [_group_norms(group, entered, cotangents, dtype) for group in plan.groups]
    return jnp.sum(jnp.stack(norms), axis=0)


def site_squared_norm(site: Site, x: jax.Array, dy: jax.Array, dtype: Any) -> jax.Array:
    """‖G‖² at one site for one sample, from what entered and the cotangent of what left it."""
    route = route_of(site)
    return _group_norms(Group(route, (site,)), {site.path: x[None]}, {site.path: dy[None]}, dtype)[
        0
    ]


def _group_norms(group: Group, entered: Taps, cotangents: Taps, dtype: Any) -> jax.Array:
    def of(site: Site) -> tuple[Site, jax.Array, jax.Array]:
        return site, entered[site.path], cotangents[site.path]

    def rows(sites: Sequence[Site]) -> embedding.Rows:
        return embedding.joined([embedding.rows(*of(site)) for site in sites])

    def factors(sites: Sequence[Site], like: dense.Form) -> dense.Factors:
        return dense.joined([dense.factors(*of(site), like) for site in sites])

    sites = group.sites
    if group.route == "dense":
        return dense.squared_norms(factors(sites, dense.form(sites[0])), dtype)
    if group.route == "embedding":
        return embedding.squared_norms(rows(sites), dtype)
    if group.route == "conv":
        pixels = conv.joined([conv.pixels(*of(site)) for site in sites])
        return conv.squared_norms(pixels, conv.window(sites[0]), dtype)
    gathers, products = group.gathers, group.products
    taken, form = rows(gathers), dense.form(products[0])
    left, right = factors(products, form)
    is_left = form.left == (embedding.row_axis(gathers[0]),)
    over_rows, over_columns = (left, right) if is_left else (right, left)
    crossed = embedding.twice_inner_products(taken, over_rows, over_columns, dtype)
    own = dense.squared_norms(dense.Factors(left, right), dtype)
    return jnp.maximum(own + embedding.squared_norms(taken, dtype) + crossed, 0)


def weighted_sum(
    plan: LeafPlan, parameter: Any, entered: Taps, cotangents: Taps, weights: jax.Array
) -> jax.Array:
    """Σ weights_k G_k: what a plain backward pass does, with the weighted cotangents.

    Args:
      plan: the parameter's, with sites.
      parameter: it, or its shape and dtype.
      entered: what entered each site, [n, scans…, …].
      cotangents: those of what left each site, [n, scans…, …].
      weights: one for each sample, shape [n].
    """

    def leaving(parameter: Any) -> list[jax.Array]:
        return [
            jax.vmap(of_parameter(site, operate(site)), in_axes=(None, 0))(
                parameter, entered[site.path]
            )
            for site in plan.sites
        ]

    weighted = [_scaled(cotangents[site.path], weights) for site in plan.sites]
    (total,) = jax.linear_transpose(leaving, parameter)(weighted)
    return total


def _scaled(array: jax.Array, weights: jax.Array) -> jax.Array:
    weights = weights.reshape(-1, *[1] * (array.ndim - 1))
    return (array * weights).astype(array.dtype)
