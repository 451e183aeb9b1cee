"""Compute norms of convolutions' gradients, which are X_offsetᵀ dY at each kernel offset.

X_offset has the inputs that the kernel's entry at that offset reads, one row for each pixel of the
output. There are several methods for ‖G_k‖². The cheapest for a site's shapes is used.

- Unfolded: compute G_k by products of shifted copies of one side, input or cotangents, with the
  other.
- Shifted: the same on a TPU, one kernel offset after the other, without copies.
- Patches: on a TPU, if patches do not overlap, treat them as the rows of a product.
- Multiplied: compute G_k entry by entry, if a group has too few channels for products.
- Gram of pixels: ‖G_k‖² = Σ_offsets Σ (X_offset X_offsetᵀ) ⊙ (dY dYᵀ). The Gram matrices of all
  X_offset are submatrices of one, that of the input's pixels. It is computed once and summed over
  shifts.
- Gram of patches: the same sum from the X_offset themselves, if the output has few pixels.

Shifted copies and Gram matrices are many times as large as the input, so a few samples are
processed at a time. This needs little memory, and is faster on a CPU if it fits into the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.engine.analysis.operations import convolution_leaving
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes.convolution import patches
from psclip_optax.engine.routes.convolution.geometry import Axis, window
from psclip_optax.engine.routes.convolution.layouts import Pixels, block_sizes, sides
from psclip_optax.engine.routes.convolution.ways import Way, ways, ways_on_tpu
from psclip_optax.engine.routes.route import Cotangents, Entered, Route, entries_read, samples_first
from psclip_optax.platforms import by_platform

# A few samples may take as much as a CPU's cache.
_BYTES_AT_ONCE_ON_CPU = 2**22


class Convolution(Route):
    """The route for convolutions, by the cheapest method."""

    name = "conv"
    is_slow_in_loops = True

    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        if eqn.primitive.name != "conv_general_dilated" or operand != 1:
            return False
        return eqn.params["batch_group_count"] == 1

    def joins(self, sites: Sequence[Site]) -> bool:
        return all(site.route is self and _read_alike(sites[0], site) for site in sites)

    def leaving_axes(self, site: Site) -> dict[int, int]:
        return convolution_leaving(site.eqn)

    def squared_norms(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        every = functools.partial(super().squared_norms, sites, dtype=dtype)
        axes = {site.path: site.sample_axis for site in sites}
        own = {path: entered[path] for path in axes}, {path: cotangents[path] for path in axes}
        if own[1][sites[0].path].shape[sites[0].sample_axis] > 1:
            return every(*own)

        # A loss under `vmap` sees a single sample. The samples are those that `vmap` maps over.
        @jax.custom_batching.custom_vmap
        def of_one(entered: Entered, cotangents: Cotangents) -> jax.Array:
            return every(entered, cotangents)

        @of_one.def_vmap
        def of_many(size: int, is_batched: Any, *sides: Any) -> tuple[jax.Array, bool]:
            def whole(axis: int, array: jax.Array, batched: bool) -> jax.Array:
                many = array if batched else jnp.broadcast_to(array, (size, *array.shape))
                return jnp.moveaxis(jnp.squeeze(many, axis + 1), 0, axis)

            axes_of_sides = {path: (axis,) for path, axis in axes.items()}, axes
            every_sample = jax.tree.map(whole, axes_of_sides, sides, tuple(is_batched))
            return every(*every_sample)[:, None], True

        # JAX cannot transpose the derivative of a custom_vmap.
        @jax.custom_jvp
        def differentiable(entered: Entered, cotangents: Cotangents) -> jax.Array:
            return of_one(entered, cotangents)

        differentiable.defjvp(lambda primals, tangents: jax.jvp(every, primals, tangents))
        return differentiable(*own)

    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        inputs = tuple(samples_first(site, *entered[site.path]) for site in sites)
        leaving = tuple(samples_first(site, cotangents[site.path]) for site in sites)
        on_tpu = patches.squared_norms if _is_patchwise(sites) else _by_ways_on_tpu
        return by_platform(
            inputs,
            leaving,
            tpu=lambda *both: on_tpu(Pixels(tuple(sites), *both), dtype),
            elsewhere=lambda *both: _by(ways, Pixels(tuple(sites), *both), dtype),
        )

    def least_parts_on_cpu(self, sites: Sequence[Site], num_samples: int, num_bytes: int) -> float:
        del sites, num_samples
        return num_bytes / _BYTES_AT_ONCE_ON_CPU

    def entries_made(self, sites: Sequence[Site]) -> int:
        way, _ = _cheapest(ways, sites)
        return block_sizes(sites[0]).number * way.entries

    def entries_made_on_tpu(self, sites: Sequence[Site]) -> int:
        if _is_patchwise(sites):
            return entries_read(sites)  # patches have at most as many entries as the input
        way, _ = _cheapest(ways_on_tpu, sites)
        return block_sizes(sites[0]).number * way.entries


CONVOLUTION = Convolution()


def _read_alike(one: Site, other: Site) -> bool:
    """Tell whether two sites in one frame read the kernel in the same way."""
    return (
        one.view.axes == other.view.axes
        and str(one.eqn.params) == str(other.eqn.params)
        and aval(one.eqn.invars[0]).shape == aval(other.eqn.invars[0]).shape
    )


def _is_patchwise(sites: Sequence[Site]) -> bool:
    """Tell whether the kernel is as large as its stride, so that patches do not overlap."""
    return all(
        len(axis.shifts) == axis.stride > 1 and axis.dilation == 1 for axis in window(sites[0])
    )


def _by(list_of_ways: Callable[..., dict[str, Way]], pixels: Pixels, dtype: Any) -> jax.Array:
    way, axes = _cheapest(list_of_ways, pixels.sites)
    return way.squared_norms(*sides(pixels), axes, dtype)


_by_ways_on_tpu = functools.partial(_by, ways_on_tpu)


def _cheapest(
    list_of_ways: Callable[..., dict[str, Way]], sites: Sequence[Site]
) -> tuple[Way, list[Axis]]:
    """Choose the cheapest method, and return it with its axes, images first."""
    sizes = [block_sizes(site) for site in sites]
    images = sum(size.images for size in sizes)
    axes = [Axis(images, images, (0,), 1, 1), *window(sites[0])]
    by_name = list_of_ways(axes, sizes[0].num_in, sizes[0].num_out)
    return min(by_name.values(), key=lambda way: way.cost), axes
