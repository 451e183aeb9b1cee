"""Compute norms of ragged_dot's gradients, as in a mixture of experts: a matrix for each group.

For each expert e, sample k's gradient is X_eᵀ dY_e over the rows routed to e. The norms come from
Gram matrices of the rows, ‖G‖² = Σ (X Xᵀ) ⊙ (dY dYᵀ) over pairs of rows of one expert, so no
sample's gradient is made. JAX cannot batch the operation. Here all samples' rows are sorted by
expert, so that the batch is one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax.engine.analysis.sites import Site, viewed
from psclip_optax.engine.analysis.views import aval, run_equation
from psclip_optax.engine.routes import dense
from psclip_optax.engine.routes.route import Cotangents, Entered, Route

# The number of entries of Gram matrices made at a time on a CPU.
_MOST_MADE_ON_CPU = 2**22


class Ragged(Route):
    """The route for products with one matrix for each group of rows."""

    name = "ragged"

    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        if eqn.primitive.name != "ragged_dot_general" or operand != 1 or len(eqn.invars) != 3:
            return False
        dims = eqn.params["ragged_dot_dimension_numbers"]
        contracted, blocks = dims.dot_dimension_numbers
        axes = [*contracted, *blocks, dims.lhs_ragged_dimensions, dims.rhs_group_dimensions]
        return [*map(tuple, axes)] == [(1,), (1,), (), (), (0,), (0,)]

    def joins(self, sites: Sequence[Site]) -> bool:
        return len(sites) == 1 and sites[0].route is self

    def operation(self, site: Site) -> Callable[..., Any]:
        product = _batched(site)

        @jax.custom_vjp
        def run(w: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
            return product(w, rows, sizes)

        def backward(entered: Any, dy: jax.Array) -> Any:
            w, sizes = entered
            # W is a constant of this derivative, so nothing reads its cotangent.
            return jnp.zeros_like(w), product(w.swapaxes(1, 2), dy, sizes), None

        run.defvjp(lambda w, rows, sizes: (product(w, rows, sizes), (w, sizes)), backward)
        return run

    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        (site,) = sites
        rows, sizes = entered[site.path]
        dy = cotangents[site.path]
        experts = _over_leading(site, _experts, (dy.shape[-2],))(sizes)
        layered, steps = site.scan_axes
        last = dy.ndim - 1
        x, dy = (_in_groups(array, layered, site, steps) for array in (rows, dy))
        experts = dense.in_groups(experts, layered, [site.sample_axis], [*steps, last - 1])
        gram = dense.product(*_pairs(x), 2, dtype) * dense.product(*_pairs(dy), 2, dtype)
        is_same = experts[..., :, None] == experts[..., None, :]
        is_met = experts < aval(site.eqn.invars[1]).shape[0]
        gram = gram.reshape(is_same.shape)
        norms = jnp.sum(jnp.where(is_same & is_met[..., None], gram, 0), axis=(0, 2, 3))
        return jnp.maximum(norms, 0)

    def weighted_sum(
        self, site: Site, entered: tuple[jax.Array, ...], weighted: jax.Array
    ) -> tuple[Callable[[Any], Any], jax.Array]:
        rows, sizes = entered
        layered, steps = site.scan_axes
        w = aval(site.eqn.invars[1])
        samples = [*steps, site.sample_axis]
        last = rows.ndim - 1
        by_layer = [
            dense.in_groups(array, layered, samples, [last - 1], [last])
            for array in (rows, weighted)
        ]
        sizes = dense.in_groups(sizes, layered, samples, [sizes.ndim - 1])

        def of_layer(sides: Any) -> jax.Array:
            rows, dy, sizes = sides
            order, totals = _by_expert(sizes, rows.shape[1])
            rows, dy = (side.reshape(-1, side.shape[-1])[order] for side in (rows, dy))
            run = lambda w: run_equation(site.eqn, [rows, w, totals])[0]  # noqa: E731
            return jax.linear_transpose(run, w)(dy)[0]

        total = lax.map(of_layer, (*by_layer, sizes))
        layers = [rows.shape[axis] for axis in layered]
        return viewed(site), total.reshape(*layers, *w.shape)

    def least_parts_on_cpu(self, sites: Sequence[Site], num_samples: int, num_bytes: int) -> float:
        made = num_samples * self.entries_made(sites) / _MOST_MADE_ON_CPU
        return super().least_parts_on_cpu(sites, num_samples, num_bytes) + made

    def entries_made(self, sites: Sequence[Site]) -> int:
        (site,) = sites
        return 2 * (aval(site.leaving).shape[0] * math.prod(site.scans)) ** 2


RAGGED = Ragged()


def _experts(sizes: jax.Array, num_rows: int) -> jax.Array:
    """Find the expert of each row, [rows]; the number of experts for rows without one."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(num_rows), side="right")


def _by_expert(sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Order all samples' rows by expert, and count those of each expert, from [n, experts]."""
    experts = jax.vmap(lambda of_sample: _experts(of_sample, num_rows))(sizes).ravel()
    totals = jnp.bincount(experts, length=sizes.shape[1] + 1)[:-1]
    return jnp.argsort(experts, stable=True), totals.astype(sizes.dtype)


def _batched(site: Site) -> Callable[..., jax.Array]:
    """Return the operation (W, rows, sizes) -> y, with a rule for a batch of samples."""

    @jax.custom_batching.custom_vmap
    def product(w: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return run_equation(site.eqn, [rows, w, sizes])[0]

    @product.def_vmap
    def of_many(number: int, is_batched: Sequence[bool], *arrays: jax.Array) -> Any:
        if is_batched[0]:  # e.g. vmap over seeds
            each = lambda i: product(  # noqa: E731
                *(a[i] if batched else a for a, batched in zip(arrays, is_batched, strict=True))
            )
            return lax.map(each, jnp.arange(number)), True
        w, *entered = arrays
        rows, sizes = (
            array if batched else jnp.broadcast_to(array, (number, *array.shape))
            for array, batched in zip(entered, is_batched[1:], strict=True)
        )
        order, totals = _by_expert(sizes, rows.shape[1])
        y = product(w, rows.reshape(-1, rows.shape[-1])[order], totals)
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
        return y[back].reshape(*rows.shape[:2], -1), True

    return product


def _over_leading(site: Site, function: Callable[..., Any], static: tuple[Any, ...]) -> Any:
    """Extend a function of one step of one sample to all steps of all samples."""
    whole = lambda array: function(array, *static)  # noqa: E731
    for _ in range(site.sample_axis + 1):
        whole = jax.vmap(whole)
    return whole


def _in_groups(array: jax.Array, layered: list[int], site: Site, steps: list[int]) -> jax.Array:
    """Reshape an input or output to [layers, n, rows, columns]."""
    last = array.ndim - 1
    return dense.in_groups(array, layered, [site.sample_axis], [*steps, last - 1], [last])


def _pairs(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = array.reshape(-1, *array.shape[2:])
    return flat, flat
