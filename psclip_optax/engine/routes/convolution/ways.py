"""List the methods for the norms, and their costs for a site's shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from psclip_optax.engine.routes.convolution import geometry, gradients, gram
from psclip_optax.engine.routes.convolution.geometry import Axis, Reads

# Writing an entry costs as much as this many multiply-adds in a matrix product. The numbers for a
# TPU are its compiler's estimates for v5e, for kernels of size 1 to 16 and 3 to 512 channels: in a
# cycle it does 20,000 multiply-adds, writes 33 entries in another order of axes, or squares 80.
_MULTIPLY_ADDS_PER_ENTRY = 32
_MULTIPLY_ADDS_PER_ENTRY_ON_TPU = 600
_MULTIPLY_ADDS_PER_SQUARE_ON_TPU = 250
_MULTIPLY_ADDS_PER_TERM_ON_TPU = 400  # of a sum of products of entries
# A product with fewer entries takes as long as one with so many.
_LEAST_ENTRIES_ON_TPU = 1024


class Way(NamedTuple):
    """A method for the norms, with its costs for one block of one sample.

    Attributes:
      squared_norms: a function from both sides, axes and dtype to the norms of all samples.
      multiply_adds: the number of multiply-adds in its matrix products.
      entries: the number of entries that it writes.
      multiply_adds_per_entry: the number of multiply-adds that take as long as writing an entry.
    """

    squared_norms: Callable[..., jax.Array]
    multiply_adds: int
    entries: int
    multiply_adds_per_entry: int = _MULTIPLY_ADDS_PER_ENTRY

    @property
    def cost(self) -> int:
        return self.multiply_adds + self.multiply_adds_per_entry * self.entries


def ways_on_tpu(axes: Sequence[Axis], num_in: int, num_out: int) -> dict[str, Way]:
    """List the methods with their costs on a TPU, which shifts images without copying them."""
    by_name = {
        name: way._replace(multiply_adds_per_entry=_MULTIPLY_ADDS_PER_ENTRY_ON_TPU)
        for name, way in ways(axes, num_in, num_out).items()
    }
    # Products of entries are summed as they are computed, and take no memory.
    multiplied = by_name["multiplied"]
    terms = _MULTIPLY_ADDS_PER_TERM_ON_TPU * multiplied.entries
    by_name["multiplied"] = multiplied._replace(multiply_adds=terms, entries=0)
    if all(map(geometry.is_read_where_touched, axes)):
        # An input that nothing reads may be NaN, and would be multiplied with zeros beside the
        # cotangents.
        by_name["shifted"] = _shifted(axes, num_in, num_out)
    return by_name


def _shifted(axes: Sequence[Axis], num_in: int, num_out: int) -> Way:
    reads = _total(axes, lambda some: some.length * len(some.starts))
    entries = max(num_in * num_out, _LEAST_ENTRIES_ON_TPU)
    squares = math.prod(len(axis.shifts) for axis in axes) * entries
    return Way(
        functools.partial(gradients.squares_of, gradients.by_shifting),
        reads * entries
        + _MULTIPLY_ADDS_PER_SQUARE_ON_TPU * squares
        + _MULTIPLY_ADDS_PER_ENTRY_ON_TPU * _moved(axes, num_in, num_out),
        entries=0,
    )


def ways(axes: Sequence[Axis], num_in: int, num_out: int) -> dict[str, Way]:
    """List the methods for a kernel with `num_in` inputs and `num_out` outputs in a group."""
    turned = [axis.turned for axis in axes]
    entries = math.prod(len(axis.shifts) for axis in axes) * num_in * num_out
    reads = _total(axes, lambda some: some.length * len(some.starts))
    turned_reads = _total(turned, lambda some: some.length * len(some.starts))
    of_inputs = _total(axes, _pairs_of_inputs)
    of_outputs = _total(axes, lambda some: some.length**2)
    of_reads = _total(axes, lambda some: some.length**2 * len(some.starts))
    by_name = {
        "unfolded inputs": Way(
            functools.partial(gradients.squares_of, gradients.by_unfolding_inputs),
            reads * num_in * num_out,
            reads * num_in + entries,
        ),
        "unfolded cotangents": Way(
            functools.partial(gradients.squares_of, gradients.by_unfolding_cotangents),
            turned_reads * num_in * num_out,
            turned_reads * num_out + entries,
        ),
        "multiplied": Way(
            functools.partial(gradients.squares_of, gradients.by_multiplying),
            0,
            reads * num_in * num_out,
        ),
        "gram of pixels": Way(
            functools.partial(gram.squares_by_gram, gram.gram_of_pixels),
            of_inputs * num_in + of_outputs * num_out,
            of_inputs + of_reads + of_outputs,
        ),
        "gram of patches": Way(
            functools.partial(gram.squares_by_gram, gram.gram_of_patches),
            of_reads * num_in + of_outputs * num_out,
            reads * num_in + 2 * of_outputs,
        ),
    }
    if not all(map(geometry.is_read_whole, axes)):
        # An input that nothing reads may be NaN, and would be multiplied with the zeros around the
        # cotangents.
        del by_name["unfolded cotangents"]
    return by_name


def _moved(axes: Sequence[Axis], num_in: int, num_out: int) -> int:
    """Count the entries that are copied before pixels can be shifted.

    Inputs are, where a stride parts them into phases; cotangents, where their rows are shorter.
    """
    phases = [_sizes_of_phases(axis) for axis in axes]
    outer = next((place for place, axis in enumerate(axes) if axis.inputs > 1), 0)
    is_parted = any(axis.stride != axis.dilation for axis in axes)
    is_filled = any(
        size != axis.outputs
        for axis, sizes in zip(axes[outer + 1 :], phases[outer + 1 :], strict=True)
        for size in sizes
    )
    inputs, outputs = math.prod(map(sum, phases)), math.prod(axis.outputs for axis in axes)
    return (is_parted or is_filled) * inputs * num_in + is_filled * outputs * num_out


def _sizes_of_phases(axis: Axis) -> list[int]:
    return [
        len(range(phase, axis.inputs, reads.step))
        for reads in geometry.reads_of(axis)
        for phase, _ in reads.phases
    ]


def _total(axes: Sequence[Axis], count: Callable[[Reads], int]) -> int:
    return math.prod(sum(map(count, geometry.reads_of(axis))) for axis in axes)


def _pairs_of_inputs(reads: Reads) -> int:
    extents = (of_phase.extent for _, of_phase in reads.phases)
    return sum((high - low) ** 2 for low, high in extents)
