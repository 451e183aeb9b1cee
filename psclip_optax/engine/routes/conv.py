"""conv_general_dilated: sample k's gradient is, at each offset of the kernel, X_offsetᵀ dY.

X_offset is what the kernel's entry at that offset has read, once for each pixel of the output.
There are several ways to ‖G_k‖², of which the one that costs least at a site's shapes is taken:

- unfolded: G_k from products of shifted copies of one side, input or cotangents, with the other;
- multiplied: G_k entry by entry, summed, where a group has too few channels for products;
- Gram of pixels: ‖G_k‖² = Σ_offsets Σ (X_offset X_offsetᵀ) ∘ (dY dYᵀ), and the Gram matrices of all
  X_offset are parts of one, that of the input's pixels: it is made once and summed over shifts;
- Gram of patches: the same from the X_offset themselves, where few pixels leave.

Shifted copies and Gram matrices are many times as large as the input, so a few samples are taken
at a time: that needs little memory, and on a CPU it is faster too while it stays in the cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes import dense

# What it costs to write an entry, in multiply-adds of a product of matrices.
_MULTIPLY_ADDS_PER_ENTRY = 32
# What a few samples may take: what a CPU's cache holds, and elsewhere, where every step of a loop
# costs, more.
_CHUNK_BYTES_ON_CPU = 2**22
_CHUNK_BYTES = 2**26
_MOST_CHUNKS = 16


def supports(eqn: core.JaxprEqn, operand: int) -> bool:
    return operand == 1 and eqn.params["batch_group_count"] == 1


def may_join(one: Site, other: Site) -> bool:
    """Whether two sites in one frame read it alike, as a network does that sees two images."""
    return (
        one.view.axes == other.view.axes
        and str(one.eqn.params) == str(other.eqn.params)
        and aval(one.eqn.invars[0]).shape == aval(other.eqn.invars[0]).shape
    )


def leaving_axes(site: Site) -> dict[int, int]:
    """For each axis of W that is one of y, which."""
    dims = site.eqn.params["dimension_numbers"]
    return {dims.rhs_spec[0]: dims.out_spec[1]}


class Pixels(NamedTuple):
    """What entered sites that share a kernel, and the cotangents of what left: [n, scans…, …]."""

    sites: tuple[Site, ...]
    inputs: tuple[jax.Array, ...]
    cotangents: tuple[jax.Array, ...]


def pixels(site: Site, x: jax.Array, dy: jax.Array) -> Pixels:
    return Pixels((site,), (x,), (dy,))


def joined(parts: Sequence[Pixels]) -> Pixels:
    return Pixels(*(tuple(itertools.chain(*side)) for side in zip(*parts, strict=True)))


# Which entries meet


class Axis(NamedTuple):
    """How an axis of the output reads one of the input.

    Through the kernel's k, output p reads input (p · stride + shifts[k]) / dilation; where there is
    none, a zero.
    """

    inputs: int
    outputs: int
    shifts: tuple[int, ...]
    stride: int
    dilation: int

    @property
    def turned(self) -> Axis:
        """The same pairs of an input and an output, as if the input read the output."""
        shifts = tuple(-shift for shift in self.shifts)
        return Axis(self.outputs, self.inputs, shifts, self.dilation, self.stride)


class Reads(NamedTuple):
    """Some outputs, and the entries of the kernel through which they read inputs.

    The outputs first, first + every, … read, through the kernel's k, the inputs from starts[k] on,
    a step apart. Through other entries they read but the zeros between dilated inputs.
    """

    first: int
    every: int
    length: int
    step: int
    starts: dict[int, int]

    @property
    def extent(self) -> tuple[int, int]:
        starts = self.starts.values()
        return min(starts), max(starts) + (self.length - 1) * self.step + 1

    @property
    def phases(self) -> list[tuple[int, Reads]]:
        """The same in parts, which read the inputs phase, phase + step, … one after the other."""
        parts: dict[int, dict[int, int]] = {}
        for k, start in self.starts.items():
            parts.setdefault(start % self.step, {})[k] = start // self.step
        return [(phase, self._replace(step=1, starts=starts)) for phase, starts in parts.items()]


def window(site: Site) -> list[Axis]:
    """The spatial axes."""
    params, dims = site.eqn.params, site.eqn.params["dimension_numbers"]
    x, kernel, y = (aval(atom).shape for atom in (*site.eqn.invars, *site.eqn.outvars))
    return [
        Axis(
            inputs=x[dims.lhs_spec[2 + i]],
            outputs=y[dims.out_spec[2 + i]],
            shifts=tuple(
                k * params["rhs_dilation"][i] - low for k in range(kernel[dims.rhs_spec[2 + i]])
            ),
            stride=params["window_strides"][i],
            dilation=params["lhs_dilation"][i],
        )
        for i, (low, _) in enumerate(params["padding"])
    ]


def _reads(axis: Axis) -> list[Reads]:
    common = math.gcd(axis.stride, axis.dilation)
    every, step = axis.dilation // common, axis.stride // common
    reads = []
    for first in range(min(every, axis.outputs)):
        places = {k: first * axis.stride + shift for k, shift in enumerate(axis.shifts)}
        starts = {k: at // axis.dilation for k, at in places.items() if at % axis.dilation == 0}
        if starts:
            reads.append(Reads(first, every, -(-(axis.outputs - first) // every), step, starts))
    return reads


def _reads_of_all(axes: Sequence[Axis]) -> Iterator[tuple[Reads, ...]]:
    return itertools.product(*map(_reads, axes))


def _offsets(reads: Sequence[Reads]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(own.starts for own in reads))


def _is_read_whole(axis: Axis) -> bool:
    read = (
        range(start, start + reads.length * reads.step, reads.step)
        for reads in _reads(axis)
        for start in reads.starts.values()
    )
    return set(range(axis.inputs)) <= set(itertools.chain(*read))


def _cut(array: jax.Array, axis: int, start: int, count: int, step: int) -> jax.Array:
    return lax.slice_in_dim(array, start, start + (count - 1) * step + 1, step, axis)


def _readers(array: jax.Array, first_axis: int, reads: Sequence[Reads]) -> jax.Array:
    for axis, own in enumerate(reads, first_axis):
        array = _cut(array, axis, own.first, own.length, own.every)
    return array


def _padded(
    array: jax.Array, first_axis: int, reads: Sequence[Reads]
) -> tuple[jax.Array, list[Reads]]:
    """All that is read and nothing else, with its zeros, and how that is read."""
    config, moved = [(0, 0, 0)] * array.ndim, []
    for axis, own in enumerate(reads, first_axis):
        low, high = own.extent
        config[axis] = (-low, high - array.shape[axis], 0)
        moved.append(own._replace(starts={k: start - low for k, start in own.starts.items()}))
    return lax.pad(array, jnp.zeros((), array.dtype), config), moved


def _read(
    array: jax.Array, first_axis: int, reads: Sequence[Reads], offset: Sequence[int]
) -> jax.Array:
    for axis, (own, k) in enumerate(zip(reads, offset, strict=True), first_axis):
        array = _cut(array, axis, own.starts[k], own.length, own.step)
    return array


# Layouts


class Side(NamedTuple):
    """What entered a site, or the cotangents of what left it, and which of its axes are what.

    A block is a group of channels in one layer; steps that share a kernel are as many images.
    """

    array: jax.Array
    samples: list[int]
    blocks: list[int]
    channels: list[int]
    images: list[int]
    spatial: list[list[int]]

    def arranged(self, *groups: list[int]) -> jax.Array:
        """Transposed, with the axes of each group as one."""
        shape = [math.prod(self.array.shape[axis] for axis in group) for group in groups]
        return self.array.transpose([*itertools.chain(*groups)]).reshape(shape)


def _side(site: Site, array: jax.Array, spec: Sequence[int]) -> Side:
    """With the channels of a group on an axis of their own."""
    offset, groups = 1 + len(site.scans), site.eqn.params["feature_group_count"]
    image, channel, *spatial = (offset + axis for axis in spec)
    layered, steps = ([1 + axis for axis in axes] for axes in site.scan_axes)
    shape = array.shape
    split = (groups, shape[channel] // groups)
    behind = lambda axis: axis + (axis > channel)  # noqa: E731
    return Side(
        array=array.reshape(*shape[:channel], *split, *shape[channel + 1 :]),
        samples=[0],
        blocks=[*layered, channel],
        channels=[channel + 1],
        images=[*steps, behind(image)],
        spatial=[[behind(axis)] for axis in spatial],
    )


def _sides(pixels: Pixels) -> tuple[list[Side], list[Side]]:
    dims = pixels.sites[0].eqn.params["dimension_numbers"]
    entering = map(_side, pixels.sites, pixels.inputs, itertools.repeat(dims.lhs_spec))
    leaving = map(_side, pixels.sites, pixels.cotangents, itertools.repeat(dims.out_spec))
    return list(entering), list(leaving)


def _channels_first(sides: Sequence[Side]) -> jax.Array:
    """[samples · blocks, channels, images, *spatial]."""
    return jnp.concatenate(
        [s.arranged(s.samples + s.blocks, s.channels, s.images, *s.spatial) for s in sides], axis=2
    )


def _channels_last(sides: Sequence[Side]) -> jax.Array:
    """[samples · blocks, images, *spatial, channels]."""
    return jnp.concatenate(
        [s.arranged(s.samples + s.blocks, s.images, *s.spatial, s.channels) for s in sides], axis=1
    )


def _blocks_last(sides: Sequence[Side]) -> jax.Array:
    """[samples, images, *spatial, channels, blocks]."""
    return jnp.concatenate(
        [s.arranged(s.samples, s.images, *s.spatial, s.channels, s.blocks) for s in sides], axis=1
    )


# Gradients


class Piece(NamedTuple):
    """Gradients at some offsets of the kernel: [samples · blocks, offsets, inputs', outputs'…]."""

    offsets: list[tuple[int, ...]]
    gradients: jax.Array


def _unfolded(
    source: jax.Array, target: jax.Array, axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    """Products of what a target's pixels read of a source with the target.

    Args:
      source: [m, channels, *axes].
      target: [m, *axes, channels].
      axes: how the target reads the source.
      dtype: of the products.
    """
    for reads in _reads_of_all(axes):
        readers = _readers(target, 1, reads)
        readers = readers.reshape(len(readers), -1, readers.shape[-1]).swapaxes(1, 2)
        padded, (*outer, last) = _padded(source, 2, reads)
        # Copies shifted along the last axis make one product; along all axes they would take more
        # memory than that is worth.
        rows = [_read(padded, padded.ndim - 1, [last], [k]) for k in last.starts]
        rows = jnp.concatenate(rows, axis=1)
        for offset in _offsets(outer):
            read = _read(rows, 2, outer, offset)
            product = dense.product(read.reshape(*read.shape[:2], -1), readers, 2, dtype)
            shape = (len(product), len(last.starts), source.shape[1], target.shape[-1])
            yield Piece([(*offset, k) for k in last.starts], product.reshape(shape))


def _by_unfolding_inputs(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    return _unfolded(_channels_first(entering), _channels_last(leaving), axes, dtype)


def _by_unfolding_cotangents(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    turned = [axis.turned for axis in axes]
    for piece in _unfolded(_channels_first(leaving), _channels_last(entering), turned, dtype):
        yield Piece(piece.offsets, piece.gradients.swapaxes(2, 3))


def _by_multiplying(
    entering: Sequence[Side], leaving: Sequence[Side], axes: Sequence[Axis], dtype: Any
) -> Iterator[Piece]:
    inputs, cotangents = (_blocks_last(sides).astype(dtype) for sides in (entering, leaving))
    pixel_axes = tuple(range(1, 1 + len(axes)))
    for reads in _reads_of_all(axes):
        readers = _readers(cotangents, 1, reads)[..., None, :, :]
        padded, moved = _padded(inputs, 1, reads)
        for offset in _offsets(moved):
            read = _read(padded, 1, moved, offset)[..., None, :]
            gradients = jnp.moveaxis(jnp.sum(read * readers, axis=pixel_axes), -1, 1)
            yield Piece([offset], gradients.reshape(-1, 1, *gradients.shape[-2:]))


def _squares_of(
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


# Gram matrices


def _squares_by_gram(
    gram_of_reads: Callable[..., jax.Array],
    entering: Sequence[Side],
    leaving: Sequence[Side],
    axes: Sequence[Axis],
    dtype: Any,
) -> jax.Array:
    inputs, cotangents = _channels_last(entering), _channels_last(leaving)
    n = len(entering[0].array)
    squares = jnp.zeros(n, dtype)
    for reads in _reads_of_all(axes):
        weights = _gram(_readers(cotangents, 1, reads), dtype)
        gram = gram_of_reads(inputs, reads, dtype).reshape(weights.shape)
        squares += jnp.sum((weights * gram).reshape(n, -1), axis=1)
    return jnp.maximum(squares, 0)


def _gram(array: jax.Array, dtype: Any) -> jax.Array:
    """Of the pixels of [m, *axes, channels]."""
    rows = array.reshape(len(array), -1, array.shape[-1])
    return dense.product(rows, rows, 2, dtype)


def _gram_of_pixels(inputs: jax.Array, reads: Sequence[Reads], dtype: Any) -> jax.Array:
    total = jnp.zeros((), dtype)
    for phases in itertools.product(*(own.phases for own in reads)):
        read = inputs
        for axis, (phase, own) in enumerate(zip(phases, reads, strict=True), 1):
            read = lax.slice_in_dim(read, min(phase[0], read.shape[axis]), None, own.step, axis)
        gram = _gram(read, dtype).reshape(len(read), *read.shape[1:-1] * 2)
        gram, moved = _padded(gram, 1, [own for _, own in phases] * 2)
        # Sums of offsets along one axis after the other: far fewer than of all of their products.
        for axis, own in enumerate(moved[: len(reads)]):
            both = (1 + axis, 1 + axis + len(reads))
            terms = [_read_both(gram, both, own, k) for k in own.starts]
            gram = sum(terms, jnp.zeros((), dtype))
        total += gram
    return total


def _read_both(array: jax.Array, axes: tuple[int, int], own: Reads, k: int) -> jax.Array:
    for axis in axes:
        array = _cut(array, axis, own.starts[k], own.length, own.step)
    return array


def _gram_of_patches(inputs: jax.Array, reads: Sequence[Reads], dtype: Any) -> jax.Array:
    padded, moved = _padded(inputs, 1, reads)
    patches = [_read(padded, 1, moved, offset) for offset in _offsets(moved)]
    return _gram(jnp.concatenate(patches, axis=-1), dtype)


# The way that costs least


class Way(NamedTuple):
    """A way to the norms, and its costs for one block of one sample.

    Attributes:
      squared_norms: for each sample, from both sides, axes and dtype.
      multiply_adds: in products of matrices.
      entries: that are written.
    """

    squared_norms: Callable[..., jax.Array]
    multiply_adds: int
    entries: int

    @property
    def cost(self) -> int:
        return self.multiply_adds + _MULTIPLY_ADDS_PER_ENTRY * self.entries


def ways(axes: Sequence[Axis], num_in: int, num_out: int) -> dict[str, Way]:
    """The ways at a site whose kernel has so many inputs and outputs in a group."""
    turned = [axis.turned for axis in axes]
    entries = math.prod(len(axis.shifts) for axis in axes) * num_in * num_out
    reads = _total(axes, lambda own: own.length * len(own.starts))
    turned_reads = _total(turned, lambda own: own.length * len(own.starts))
    of_inputs = _total(axes, _pairs_of_inputs)
    of_outputs = _total(axes, lambda own: own.length**2)
    of_reads = _total(axes, lambda own: own.length**2 * len(own.starts))
    by_name = {
        "unfolded inputs": Way(
            functools.partial(_squares_of, _by_unfolding_inputs),
            reads * num_in * num_out,
            reads * num_in + entries,
        ),
        "unfolded cotangents": Way(
            functools.partial(_squares_of, _by_unfolding_cotangents),
            turned_reads * num_in * num_out,
            turned_reads * num_out + entries,
        ),
        "multiplied": Way(
            functools.partial(_squares_of, _by_multiplying), 0, reads * num_in * num_out
        ),
        "gram of pixels": Way(
            functools.partial(_squares_by_gram, _gram_of_pixels),
            of_inputs * num_in + of_outputs * num_out,
            of_inputs + of_reads + of_outputs,
        ),
        "gram of patches": Way(
            functools.partial(_squares_by_gram, _gram_of_patches),
            of_reads * num_in + of_outputs * num_out,
            reads * num_in + 2 * of_outputs,
        ),
    }
    if not all(map(_is_read_whole, axes)):
        # An input that nothing reads may be NaN, and would meet the zeros around the cotangents.
        del by_name["unfolded cotangents"]
    return by_name


def _total(axes: Sequence[Axis], count: Callable[[Reads], int]) -> int:
    return math.prod(sum(map(count, _reads(axis))) for axis in axes)


def _pairs_of_inputs(reads: Reads) -> int:
    extents = (own.extent for _, own in reads.phases)
    return sum((high - low) ** 2 for low, high in extents)


def squared_norms(pixels: Pixels, window: Sequence[Axis], dtype: Any) -> jax.Array:
    """‖G_k‖² for each sample, [n], of the sum of the gradients at sites that share a kernel."""
    arrays = (*pixels.inputs, *pixels.cotangents)
    if len(arrays[0]) > 1:
        return _squared_norms(pixels, window, dtype)

    # A single one is what a loss under `vmap` sees: the samples are those it maps over.
    @jax.custom_batching.custom_vmap
    def of_one(*arrays: jax.Array) -> jax.Array:
        return _squared_norms(_with_arrays(pixels, arrays), window, dtype)

    @of_one.def_vmap
    def of_many(size: int, is_batched: Sequence[bool], *arrays: jax.Array) -> Any:
        stacked = [
            array[:, 0] if batched else jnp.broadcast_to(array, (size, *array.shape[1:]))
            for array, batched in zip(arrays, is_batched, strict=True)
        ]
        return _squared_norms(_with_arrays(pixels, stacked), window, dtype)[:, None], True

    return of_one(*arrays)


def _with_arrays(pixels: Pixels, arrays: Sequence[jax.Array]) -> Pixels:
    middle = len(pixels.sites)
    return Pixels(pixels.sites, tuple(arrays[:middle]), tuple(arrays[middle:]))


def _squared_norms(pixels: Pixels, window: Sequence[Axis], dtype: Any) -> jax.Array:
    entering, leaving = _sides(pixels)
    images = sum(math.prod(side.array.shape[axis] for axis in side.images) for side in entering)
    blocks = math.prod(entering[0].array.shape[axis] for axis in entering[0].blocks)
    channels = (side.array.shape[side.channels[0]] for side in (entering[0], leaving[0]))
    axes = [Axis(images, images, (0,), 1, 1), *window]
    way = min(ways(axes, *channels).values(), key=lambda way: way.cost)
    arrays = (*pixels.inputs, *pixels.cotangents)

    def of_chunk(arrays: Sequence[jax.Array]) -> jax.Array:
        return way.squared_norms(*_sides(_with_arrays(pixels, arrays)), axes, dtype)

    entries = len(arrays[0]) * blocks * way.entries
    return _in_chunks(of_chunk, arrays, entries * jnp.dtype(dtype).itemsize)


def _in_chunks(
    function: Callable[[Sequence[jax.Array]], jax.Array],
    arrays: Sequence[jax.Array],
    num_bytes: int,
) -> jax.Array:
    """A function of samples, of a few at a time, for on the way it takes so many bytes for all."""
    n = len(arrays[0])
    num_chunks = _num_chunks(n, num_bytes)
    size = -(-n // num_chunks)
    num_chunks = -(-n // size)
    if num_chunks == 1:
        return function(arrays)
    if n % num_chunks:
        starts = jnp.minimum(jnp.arange(num_chunks) * size, n - size)
        norms = lax.map(
            lambda start: function([lax.dynamic_slice_in_dim(a, start, size) for a in arrays]),
            starts,
        )
        return jnp.concatenate([norms[:-1].reshape(-1), norms[-1, (num_chunks - 1) * size - n :]])

    # Each num_chunks-th sample: contiguous parts of a batch that is sharded over devices would be
    # moved. XLA's CPU backend copies the whole batch if it is reshaped outside of the loop, and if
    # there are axes of size 1, among which it chooses another order.
    def chunk(array: jax.Array, i: jax.Array) -> jax.Array:
        longer = (length for length in array.shape[1:] if length > 1)
        parts = array.reshape(size, num_chunks, *longer)
        part = lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)
        return part.reshape(size, *array.shape[1:])

    norms = lax.map(
        lambda i: function([chunk(array, i) for array in arrays]), jnp.arange(num_chunks)
    )
    return norms.swapaxes(0, 1).reshape(n)


def _num_chunks(n: int, num_bytes: int) -> int:
    """How many chunks; as many as divide the samples, where there is no need for far more."""
    on_cpu = jax.default_backend() == "cpu"
    wanted = max(1, -(-num_bytes // (_CHUNK_BYTES_ON_CPU if on_cpu else _CHUNK_BYTES)))
    wanted = min(wanted, n if on_cpu else min(n, _MOST_CHUNKS))
    return next((number for number in range(wanted, 2 * wanted) if n % number == 0), wanted)
