"""Describe which outputs of a convolution read which inputs through which kernel entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval


class Axis(NamedTuple):
    """An axis of the output, with the axis of the input that it reads.

    Through kernel entry k, output p reads input (p · stride + shifts[k]) / dilation, or a zero if
    there is no such input.
    """

    inputs: int
    outputs: int
    shifts: tuple[int, ...]
    stride: int
    dilation: int

    @property
    def turned(self) -> Axis:
        """Return the same pairs of an input and an output with their roles exchanged."""
        shifts = tuple(-shift for shift in self.shifts)
        return Axis(self.outputs, self.inputs, shifts, self.dilation, self.stride)


class Reads(NamedTuple):
    """Some outputs, and the kernel entries through which they read inputs.

    The outputs first, first + every, … read the inputs starts[k], starts[k] + step, … through
    kernel entry k. Through the other entries they read only zeros between dilated inputs.
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
        """Split the reads by phase: each phase reads inputs phase, phase + step and so on."""
        parts: dict[int, dict[int, int]] = {}
        for k, start in self.starts.items():
            parts.setdefault(start % self.step, {})[k] = start // self.step
        return [(phase, self._replace(step=1, starts=starts)) for phase, starts in parts.items()]


def window(site: Site) -> list[Axis]:
    """Describe the spatial axes of a convolution."""
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


def reads_of(axis: Axis) -> list[Reads]:
    common = math.gcd(axis.stride, axis.dilation)
    every, step = axis.dilation // common, axis.stride // common
    reads = []
    for first in range(min(every, axis.outputs)):
        places = {k: first * axis.stride + shift for k, shift in enumerate(axis.shifts)}
        starts = {k: at // axis.dilation for k, at in places.items() if at % axis.dilation == 0}
        if starts:
            reads.append(Reads(first, every, -(-(axis.outputs - first) // every), step, starts))
    return reads


def reads_of_all(axes: Sequence[Axis]) -> Iterator[tuple[Reads, ...]]:
    return itertools.product(*map(reads_of, axes))


def offsets(reads: Sequence[Reads]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(of_axis.starts for of_axis in reads))


def is_read_whole(axis: Axis) -> bool:
    read = (
        range(start, start + reads.length * reads.step, reads.step)
        for reads in reads_of(axis)
        for start in reads.starts.values()
    )
    return set(range(axis.inputs)) <= set(itertools.chain(*read))


def is_read_where_touched(axis: Axis) -> bool:
    """Tell whether all inputs in the phases that are read are read."""
    for reads in reads_of(axis):
        for phase, of_phase in reads.phases:
            read = {
                start + place for start in of_phase.starts.values() for place in range(reads.length)
            }
            if not set(range(len(range(phase, axis.inputs, reads.step)))) <= read:
                return False
    return True


def cut(array: jax.Array, axis: int, start: int, count: int, step: int) -> jax.Array:
    return lax.slice_in_dim(array, start, start + (count - 1) * step + 1, step, axis)


def readers(array: jax.Array, first_axis: int, reads: Sequence[Reads]) -> jax.Array:
    for axis, of_axis in enumerate(reads, first_axis):
        array = cut(array, axis, of_axis.first, of_axis.length, of_axis.every)
    return array


def of_phases(
    array: jax.Array, first_axis: int, reads: Sequence[Reads], phases: Sequence[int]
) -> jax.Array:
    """Take the inputs of one phase of each axis: phase, phase + step, and so on."""
    for axis, (phase, of_axis) in enumerate(zip(phases, reads, strict=True), first_axis):
        start = min(phase, array.shape[axis])
        array = lax.slice_in_dim(array, start, None, of_axis.step, axis)
    return array


def padded(
    array: jax.Array, first_axis: int, reads: Sequence[Reads]
) -> tuple[jax.Array, list[Reads]]:
    """Pad or crop an array to what is read, including zeros, and return how it is read."""
    config, moved = [(0, 0, 0)] * array.ndim, []
    for axis, of_axis in enumerate(reads, first_axis):
        low, high = of_axis.extent
        config[axis] = (-low, high - array.shape[axis], 0)
        starts = {k: start - low for k, start in of_axis.starts.items()}
        moved.append(of_axis._replace(starts=starts))
    return lax.pad(array, jnp.zeros((), array.dtype), config), moved


def read(
    array: jax.Array, first_axis: int, reads: Sequence[Reads], offset: Sequence[int]
) -> jax.Array:
    for axis, (of_axis, k) in enumerate(zip(reads, offset, strict=True), first_axis):
        array = cut(array, axis, of_axis.starts[k], of_axis.length, of_axis.step)
    return array
