"""Compute squared norms from the gradients themselves, some kernel offsets at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psclip_optax.engine.routes import dense
from psclip_optax.engine.routes.convolution import geometry, layouts
from psclip_optax.engine.routes.convolution.geometry import Axis
from psclip_optax.engine.routes.convolution.layouts import Side
from psclip_optax.engine.routes.convolution.shifts import shifted


class Piece(NamedTuple):
    """Holds the gradients at some offsets of the kernel.

    Attributes:
      offsets: the offsets.
      gradients: their entries, [samples · blocks, offsets, channels in, channels out].
    """

    offsets: list[tuple[int, ...]]
    gradients: jax.Array


def _unfolded(
    source: jax.Array, target: jax.Array, axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    """Multiply the pixels of a source that a target reads with the target.

    Args:
      source: the source, [m, channels, *axes].
      target: the target, [m, *axes, channels].
      axes: how the target reads the source.
      dtype: the dtype of the products.
    """
    for reads in geometry.reads_of_all(axes):
        readers = geometry.readers(target, 1, reads)
        readers = readers.reshape(len(readers), -1, readers.shape[-1]).swapaxes(1, 2)
        padded, (*outer, last) = geometry.padded(source, 2, reads)
        # Copies shifted along the last axis are joined into one product; along all axes they would
        # take too much memory.
        rows = [geometry.read(padded, padded.ndim - 1, [last], [k]) for k in last.starts]
        rows = jnp.concatenate(rows, axis=1)
        for offset in geometry.offsets(outer):
            read = geometry.read(rows, 2, outer, offset)
            product = dense.product(read.reshape(*read.shape[:2], -1), readers, 2, dtype)
            shape = (len(product), len(last.starts), source.shape[1], target.shape[-1])
            yield Piece([(*offset, k) for k in last.starts], product.reshape(shape))


def by_unfolding_inputs(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    return _unfolded(layouts.channels_first(entering), layouts.channels_last(leaving), axes, dtype)


def by_unfolding_cotangents(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    turned = [axis.turned for axis in axes]
    for piece in _unfolded(
        layouts.channels_first(leaving), layouts.channels_last(entering), turned, dtype
    ):
        yield Piece(piece.offsets, piece.gradients.swapaxes(2, 3))


def by_shifting(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    """Multiply the pixels read at each offset with the cotangents, pixels in a row."""
    inputs, cotangents = layouts.channels_last(entering), layouts.channels_last(leaving)
    for offset, read, readers in shifted(inputs, cotangents, axes):
        yield Piece([offset], dense.product(read, readers, 1, dtype)[:, None])


def by_multiplying(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    inputs, cotangents = (layouts.blocks_last(sides).astype(dtype) for sides in (entering, leaving))
    pixel_axes = tuple(range(1, 1 + len(axes)))
    for reads in geometry.reads_of_all(axes):
        readers = geometry.readers(cotangents, 1, reads)[..., None, :, :]
        padded, moved = geometry.padded(inputs, 1, reads)
        for offset in geometry.offsets(moved):
            read = geometry.read(padded, 1, moved, offset)[..., None, :]
            gradients = jnp.moveaxis(jnp.sum(read * readers, axis=pixel_axes), -1, 1)
            yield Piece([offset], gradients.reshape(-1, 1, *gradients.shape[-2:]))


def squares_of(
    make: Callable[..., Iterator[Piece]],
    entering: Sequence[Side],
    leaving: Sequence[Side],
    axes: Sequence[Axis],
    dtype: Any,
) -> jax.Array:
    n = len(entering[0].array)
    squares = jnp.zeros(n, dtype)
    for piece in make(entering, leaving, axes, dtype):
        squares += jnp.sum(jnp.square(piece.gradients).reshape(n, -1), axis=1)
    return squares
