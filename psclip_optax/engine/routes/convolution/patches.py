"""Compute squared norms from the patches that pixels read, like those of a product's rows.

XLA extracts patches by a convolution with a kernel of ones and zeros, which is fast on an
accelerator; shifted copies and other orders of axes are slow there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes import dense
from psclip_optax.engine.routes.convolution.layouts import Pixels
from psclip_optax.engine.routes.dense import Factors


def factors(pixels: Pixels) -> Factors:
    """Return the factors [1, n, blocks, pixels, …] of the sum of the gradients at sites."""
    parts = [
        (_arranged(site, _patches(site, x)), _arranged(site, _leaving(site, dy)))
        for site, x, dy in zip(*pixels, strict=True)
    ]
    left, right = (jnp.concatenate(sides, axis=2) for sides in zip(*parts, strict=True))
    return Factors(left[None], right[None])


def squared_norms(pixels: Pixels, dtype: Any) -> jax.Array:
    return dense.squared_norms(factors(pixels), dtype)


def _patches(site: Site, x: jax.Array) -> jax.Array:
    """Return each pixel's patch, [n, scans…, images, *spatial, groups, channels · kernel]."""
    params = site.eqn.params
    kernel, (_, _, *spatial) = aval(site.eqn.invars[1]).shape, params["dimension_numbers"].rhs_spec
    images = _channels_last(x, 1 + len(site.scans), params["dimension_numbers"].lhs_spec)
    lead = images.shape[: 2 + len(site.scans)]
    rank = len(spatial)
    axes = tuple(range(1, 1 + rank))
    patches = lax.conv_general_dilated_patches(
        images.reshape(math.prod(lead), *images.shape[len(lead) :]),
        filter_shape=[kernel[axis] for axis in spatial],
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, rank + 1, *axes), (rank + 1, rank, *range(rank)), (0, rank + 1, *axes)
        ),
        precision=lax.Precision.HIGHEST if x.dtype.itemsize > 4 else None,
    )
    groups = params["feature_group_count"]
    return patches.reshape(*lead, *patches.shape[1:-1], groups, -1)


def _leaving(site: Site, dy: jax.Array) -> jax.Array:
    """Return cotangents as [n, scans…, images, *spatial, groups, channels]."""
    dims, groups = site.eqn.params["dimension_numbers"], site.eqn.params["feature_group_count"]
    dy = _channels_last(dy, 1 + len(site.scans), dims.out_spec)
    return dy.reshape(*dy.shape[:-1], groups, -1)


def _channels_last(array: jax.Array, offset: int, spec: Sequence[int]) -> jax.Array:
    image, channel, *spatial = (offset + axis for axis in spec)
    return array.transpose([*range(offset), image, *spatial, channel])


def _arranged(site: Site, array: jax.Array) -> jax.Array:
    """Arrange [n, scans…, images, *spatial, groups, entries] as [n, blocks, pixels, entries]."""
    layered, steps = ([1 + axis for axis in axes] for axes in site.scan_axes)
    group, entries = array.ndim - 2, array.ndim - 1
    pixels = [*steps, *range(1 + len(site.scans), group)]
    return dense.in_groups(array, [0], [*layered, group], pixels, [entries])
