"""Compute squared norms from Gram matrices of the kernel's inputs and of the cotangents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax.engine.routes import dense
from psclip_optax.engine.routes.convolution import geometry, layouts
from psclip_optax.engine.routes.convolution.geometry import Axis, Reads
from psclip_optax.engine.routes.convolution.layouts import Side


def squares_by_gram(
    gram_of_reads: Callable[..., jax.Array],
    entering: Sequence[Side],
    leaving: Sequence[Side],
    axes: Sequence[Axis],
    dtype: Any,
) -> jax.Array:
    inputs, cotangents = layouts.channels_last(entering), layouts.channels_last(leaving)
    n = len(entering[0].array)
    squares = jnp.zeros(n, dtype)
    for reads in geometry.reads_of_all(axes):
        weights = _gram(geometry.readers(cotangents, 1, reads), dtype)
        gram = gram_of_reads(inputs, reads, dtype).reshape(weights.shape)
        squares += jnp.sum((weights * gram).reshape(n, -1), axis=1)
    return jnp.maximum(squares, 0)


def _gram(array: jax.Array, dtype: Any) -> jax.Array:
    """Compute the Gram matrix of the pixels of [m, *axes, channels]."""
    rows = array.reshape(len(array), -1, array.shape[-1])
    return dense.product(rows, rows, 2, dtype)


def gram_of_pixels(inputs: jax.Array, reads: Sequence[Reads], dtype: Any) -> jax.Array:
    total = jnp.zeros((), dtype)
    for phases in itertools.product(*(of_axis.phases for of_axis in reads)):
        read = geometry.of_phases(inputs, 1, reads, [phase for phase, _ in phases])
        gram = _gram(read, dtype).reshape(len(read), *read.shape[1:-1] * 2)
        gram, moved = geometry.padded(gram, 1, [of_phase for _, of_phase in phases] * 2)
        # Summing over offsets along one axis after the other takes far fewer sums than over all
        # offsets.
        for axis, of_axis in enumerate(moved[: len(reads)]):
            both = (1 + axis, 1 + axis + len(reads))
            terms = [_read_both(gram, both, of_axis, k) for k in of_axis.starts]
            gram = sum(terms, jnp.zeros((), dtype))
        total += gram
    return total


def _read_both(array: jax.Array, axes: tuple[int, int], reads: Reads, k: int) -> jax.Array:
    for axis in axes:
        array = geometry.cut(array, axis, reads.starts[k], reads.length, reads.step)
    return array


def gram_of_patches(inputs: jax.Array, reads: Sequence[Reads], dtype: Any) -> jax.Array:
    padded, moved = geometry.padded(inputs, 1, reads)
    patches = [geometry.read(padded, 1, moved, offset) for offset in geometry.offsets(moved)]
    return _gram(jnp.concatenate(patches, axis=-1), dtype)
