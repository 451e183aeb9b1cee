"""List the ways to the norms, and what each costs at a site's shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from psclip_optax.engine.routes.convolution import geometry, gradients, gram
from psclip_optax.engine.routes.convolution.geometry import Axis, Reads

# To write an entry costs as much as so many multiply-adds of a product of matrices.
_MULTIPLY_ADDS_PER_ENTRY = 32


class Way(NamedTuple):
    """A way to the norms, and its costs for one block of one sample.

    Attributes:
      squared_norms: a function from both sides, axes and dtype to the norms of all samples.
      multiply_adds: how many multiply-adds its products of matrices have.
      entries: how many entries it writes.
    """

    squared_norms: Callable[..., jax.Array]
    multiply_adds: int
    entries: int

    @property
    def cost(self) -> int:
        return self.multiply_adds + _MULTIPLY_ADDS_PER_ENTRY * self.entries


def ways(axes: Sequence[Axis], num_in: int, num_out: int) -> dict[str, Way]:
    """List the ways at a site whose kernel has so many inputs and outputs in a group."""
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
        # An input that nothing reads may be NaN, and would meet the zeros around the cotangents.
        del by_name["unfolded cotangents"]
    return by_name


def _total(axes: Sequence[Axis], count: Callable[[Reads], int]) -> int:
    return math.prod(sum(map(count, geometry.reads_of(axis))) for axis in axes)


def _pairs_of_inputs(reads: Reads) -> int:
    extents = (of_phase.extent for _, of_phase in reads.phases)
    return sum((high - low) ** 2 for low, high in extents)
