"""conv_general_dilated: sample k's gradient is, at each offset of the kernel, X_offsetᵀ dY.

X_offset is what the kernel's entry at that offset has read, once for each of the P output pixels.
‖G‖² = Σ_offsets Σ (X_offset X_offsetᵀ) ∘ (dY dYᵀ), and the Gram matrices of all X_offset are parts
of one, that of the input's pixels: it is made once and summed over shifts.
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


def may_join(one: Site, other: Site) -> bool:
    """Whether two sites in one frame read it alike, as a network does that sees two images."""
    return (
        one.view.axes == other.view.axes
        and str(one.eqn.params) == str(other.eqn.params)
        and aval(one.eqn.invars[0]).shape == aval(other.eqn.invars[0]).shape
    )


# Up to here patches are put together, for one product instead of one an offset; beyond, they would
# take as many times the input's memory as the kernel has offsets.
_MOST_PATCH_ENTRIES = 128


class Pixels(NamedTuple):
    """What the kernel reads, [n, B, M, *padded, C], and cotangents, [n, B, M, *out, O].

    B counts layers times feature groups, M the images and steps that share a kernel.
    """

    inputs: jax.Array
    cotangents: jax.Array


class Window(NamedTuple):
    """The kernel's size, stride and dilation along each spatial axis."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


def supports(eqn: core.JaxprEqn, operand: int) -> bool:
    return operand == 1 and eqn.params["batch_group_count"] == 1


def leaving_axes(site: Site) -> dict[int, int]:
    """For each axis of W that is one of y, which."""
    dims = site.eqn.params["dimension_numbers"]
    return {dims.rhs_spec[0]: dims.out_spec[1]}


def window(site: Site) -> Window:
    params, kernel = site.eqn.params, aval(site.eqn.invars[1]).shape
    size = tuple(kernel[axis] for axis in params["dimension_numbers"].rhs_spec[2:])
    return Window(size, tuple(params["window_strides"]), tuple(params["rhs_dilation"]))


def pixels(site: Site, x: jax.Array, dy: jax.Array) -> Pixels:
    params, dims = site.eqn.params, site.eqn.params["dimension_numbers"]
    groups = params["feature_group_count"]
    dilated = [
        (lo, hi, d - 1)
        for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    inputs = _arranged(site, x, dims.lhs_spec, groups)
    zero = jnp.zeros((), inputs.dtype)
    inputs = lax.pad(inputs, zero, [(0, 0, 0)] * 3 + dilated + [(0, 0, 0)])
    return Pixels(inputs, _arranged(site, dy, dims.out_spec, groups))


def joined(parts: list[Pixels]) -> Pixels:
    if len(parts) == 1:
        return parts[0]
    return Pixels(*(jnp.concatenate(sides, axis=2) for sides in zip(*parts, strict=True)))


def _arranged(site: Site, array: jax.Array, spec: Any, groups: int) -> jax.Array:
    """[n, scans…, image's axes in any order] → [n, B, M, *spatial, channels of a group]."""
    offset = 1 + len(site.scans)
    image, channel, *spatial = (offset + axis for axis in spec)
    layered, steps = ([1 + axis for axis in axes] for axes in site.scan_axes)
    order = [0, *layered, channel, *steps, image, *spatial]
    sizes = [array.shape[axis] for axis in order]
    num_layers, num_steps = len(layered), len(steps)
    array = array.transpose(order)
    blocks = math.prod(sizes[1 : 1 + num_layers]) * groups
    images = math.prod(sizes[2 + num_layers : 3 + num_layers + num_steps])
    per_group = sizes[1 + num_layers] // groups
    array = array.reshape(sizes[0], blocks, per_group, images, *sizes[3 + num_layers + num_steps :])
    return jnp.moveaxis(array, 2, -1)


def squared_norms(pixels: Pixels, window: Window, dtype: Any) -> jax.Array:
    """‖G_k‖² for each sample, [n]."""
    inputs, cotangents = pixels
    positions, outputs = (math.prod(side.shape[2:-1]) for side in pixels)
    num_in, num_out = inputs.shape[-1], cotangents.shape[-1]
    offsets = math.prod(window.size)
    by_gram = positions**2 * num_in + outputs**2 * (num_out + offsets)
    by_gradient = outputs * num_in * num_out * offsets
    if by_gram < by_gradient:
        return _from_gram(pixels, window, dtype)
    return _from_gradients(pixels, window, dtype)


def _read_at(
    inputs: jax.Array, out_shape: tuple[int, ...], window: Window, offset: Any, first: int
) -> jax.Array:
    """What the kernel's entry at `offset` reads, spatial axes from axis `first` on."""
    start, limit, strides = [0] * inputs.ndim, list(inputs.shape), [1] * inputs.ndim
    for i, (k, size) in enumerate(zip(offset, out_shape, strict=True)):
        axis, stride = first + i, window.stride[i]
        start[axis] = k * window.dilation[i]
        limit[axis] = start[axis] + (size - 1) * stride + 1
        strides[axis] = stride
    return lax.slice(inputs, start, limit, strides)


def _offsets(window: Window) -> Any:
    return itertools.product(*map(range, window.size))


def _from_gradients(pixels: Pixels, window: Window, dtype: Any) -> jax.Array:
    inputs, cotangents = pixels
    out_shape, leaving = cotangents.shape[3:-1], _rows(cotangents)
    read = [_read_at(inputs, out_shape, window, offset, 3) for offset in _offsets(window)]
    if inputs.shape[-1] * len(read) <= _MOST_PATCH_ENTRIES:
        read = [jnp.concatenate(read, axis=-1)]
    gradients = [dense.product(_rows(part), leaving, 1, dtype) for part in read]
    squares = [jnp.sum(jnp.square(part), axis=(1, 2)) for part in gradients]
    return jnp.sum(sum(squares, jnp.zeros((), dtype)).reshape(inputs.shape[:2]), axis=1)


def _rows(array: jax.Array) -> jax.Array:
    """[n, B, M, *spatial, C] → [n · B, all pixels, C]."""
    return array.reshape(array.shape[0] * array.shape[1], -1, array.shape[-1])


def _from_gram(pixels: Pixels, window: Window, dtype: Any) -> jax.Array:
    inputs, cotangents = pixels
    out_shape, in_shape = cotangents.shape[2:-1], inputs.shape[2:-1]
    gram = _gram(inputs, dtype).reshape(*inputs.shape[:2], *in_shape, *in_shape)
    ndim = len(in_shape)

    def shifted(offset: Any) -> jax.Array:
        rows = _read_at(gram, out_shape[1:], window, offset, 3)
        return _read_at(rows, out_shape[1:], window, offset, 3 + ndim)

    shifts = sum(shifted(offset) for offset in _offsets(window))
    weights = _gram(cotangents, dtype).reshape(shifts.shape)  # pyright: ignore
    return jnp.maximum(jnp.sum(weights * shifts, axis=tuple(range(1, shifts.ndim))), 0)  # pyright: ignore


def _gram(array: jax.Array, dtype: Any) -> jax.Array:
    rows = _rows(array)
    return dense.product(rows, rows, 2, dtype)
