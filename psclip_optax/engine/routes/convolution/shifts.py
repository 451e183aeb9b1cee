"""Line up inputs with the cotangents that read them, without a copy for each offset.

The pixels of an image are stored as one row. The pixels read at one kernel offset are a slice of
that row. XLA's compiler for TPUs reads the slice in place, because a sample's pixels are not
adjacent in its memory. Copying these pixels takes far longer than a product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax.engine.routes.convolution import geometry
from psclip_optax.engine.routes.convolution.geometry import Axis, Reads


class Shifted(NamedTuple):
    """Holds the inputs read at one kernel offset, and the cotangents that read them.

    One of them is zero where an offset leads out of the image.

    Attributes:
      offset: the offset.
      read: inputs, [m, pixels, …].
      readers: the cotangents of what reads them, [m, pixels, …].
    """

    offset: tuple[int, ...]
    read: jax.Array
    readers: jax.Array


def shifted(inputs: jax.Array, cotangents: jax.Array, axes: Sequence[Axis]) -> Iterator[Shifted]:
    """Line up inputs [m, *axes, …] with cotangents [m, *axes, …], at each offset of the kernel."""
    for reads in geometry.reads_of_all(axes):
        readers = geometry.readers(cotangents, 1, reads)
        for phases in itertools.product(*(of_axis.phases for of_axis in reads)):
            read = geometry.of_phases(inputs, 1, reads, [phase for phase, _ in phases])
            yield from _shifted(read, readers, [of_phase for _, of_phase in phases])


def _shifted(read: jax.Array, readers: jax.Array, reads: Sequence[Reads]) -> Iterator[Shifted]:
    """Line up inputs and cotangents of one phase, whose reads are one pixel apart."""
    spatial = slice(1, 1 + len(reads))
    both = zip(read.shape[spatial], readers.shape[spatial], strict=True)
    sizes = [max(one, other) for one, other in both]
    outer = next((axis for axis, size in enumerate(sizes) if size > 1), 0)
    pitches = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    read, readers = (_in_a_row(array, outer, sizes) for array in (read, readers))
    num_read, num_readers = read.shape[1], readers.shape[1]
    for offset in geometry.offsets(reads):
        shifts = [of_axis.starts[k] for of_axis, k in zip(reads, offset, strict=True)]
        by = sum(shift * pitch for shift, pitch in zip(shifts, pitches, strict=True))
        if not -num_readers < by < num_read:
            continue  # only zeros around the image are read
        # Nothing lies beyond the outer axis, because the row ends there.
        inner = list(zip(shifts, sizes, pitches, strict=True))[outer + 1 :]
        if num_read > num_readers:
            within = _within_rows(readers, inner)
            yield Shifted(offset, read, _moved(within, by, num_read))
        else:
            moved = _moved(read, -by, num_readers)
            yield Shifted(offset, _within_rows(moved, inner), readers)


def _in_a_row(array: jax.Array, outer: int, sizes: Sequence[int]) -> jax.Array:
    """Pad the axes after the outer one with zeros, and merge all axes: [m, pixels, …]."""
    config = [(0, 0, 0)] * array.ndim
    for axis, size in enumerate(sizes[outer + 1 :], outer + 2):
        config[axis] = (0, size - array.shape[axis], 0)
    array = lax.pad(array, jnp.zeros((), array.dtype), config)
    first = 1 + len(sizes)
    return array.reshape(len(array), math.prod(array.shape[1:first]), *array.shape[first:])


def _moved(row: jax.Array, by: int, length: int) -> jax.Array:
    """Move the pixels of a row [m, pixels, …] into one of another length, between zeros."""
    config = [(0, 0, 0), (by, length - by - row.shape[1], 0), *[(0, 0, 0)] * (row.ndim - 2)]
    return lax.pad(row, jnp.zeros((), row.dtype), config)


def _within_rows(row: jax.Array, inner: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Set to zero the pixels that a shift leads beyond an end of their row of the image.

    Args:
      row: pixels of cotangents, or what they read, [m, pixels, …].
      inner: the shift of each inner axis, its size, and how many pixels a step along it is.
    """
    pixels = jnp.arange(row.shape[1]).reshape(1, -1, *[1] * (row.ndim - 2))
    for shift, size, pitch in inner:
        if shift:
            place = pixels // pitch % size + shift
            row = jnp.where((place >= 0) & (place < size), row, 0)
    return row
