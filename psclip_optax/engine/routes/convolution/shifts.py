"""Line up inputs with the cotangents that read them, without a copy for each offset.

The pixels of an image lie in one row. All that are read at one offset of the kernel then are a
slice of that row, and XLA's compiler for TPUs reads it in place, as a sample's pixels are not next
to each other in its memory. A copy of the same pixels takes it far longer than a product.
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
    """What is read at one offset of the kernel, and by what.

    Attributes:
      offset: the offset.
      read: inputs, [m, pixels, …].
      readers: the cotangents of these pixels, [m, pixels, …]; zero where an offset moves a pixel
        into another row of the image.
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
    """Line up what is read a pixel apart."""
    spatial = slice(1, 1 + len(reads))
    both = list(zip(read.shape[spatial], readers.shape[spatial], strict=True))
    sizes = list(map(max, both))
    outer = next((axis for axis, size in enumerate(sizes) if size > 1), 0)
    pitches = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    read, readers = (_in_a_row(array, outer, sizes) for array in (read, readers))
    for offset in geometry.offsets(reads):
        shifts = [of_axis.starts[k] for of_axis, k in zip(reads, offset, strict=True)]
        by = sum(shift * pitch for shift, pitch in zip(shifts, pitches, strict=True))
        first, end = max(0, -by), min(readers.shape[1], read.shape[1] - by)
        if first >= end:
            continue  # nothing but zeros around the image is read
        pixels = jnp.arange(first, end).reshape(1, -1, *[1] * (readers.ndim - 2))
        own = lax.slice_in_dim(readers, first, end, 1, 1)
        # Beyond the outer axis lies nothing, as the row ends there.
        for shift, size, pitch in list(zip(shifts, sizes, pitches, strict=True))[outer + 1 :]:
            if shift:
                place = pixels // pitch % size + shift
                own = jnp.where((place >= 0) & (place < size), own, 0)
        yield Shifted(offset, lax.slice_in_dim(read, first + by, end + by, 1, 1), own)


def _in_a_row(array: jax.Array, outer: int, sizes: Sequence[int]) -> jax.Array:
    """Fill the axes behind the outer one up with zeros, and make all one: [m, pixels, …]."""
    config = [(0, 0, 0)] * array.ndim
    for axis, size in enumerate(sizes[outer + 1 :], outer + 2):
        config[axis] = (0, size - array.shape[axis], 0)
    array = lax.pad(array, jnp.zeros((), array.dtype), config)
    return array.reshape(len(array), -1, *array.shape[1 + len(sizes) :])
