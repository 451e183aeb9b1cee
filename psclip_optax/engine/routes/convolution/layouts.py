"""Arrange inputs and cotangents of convolutions in one order of axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval


class Pixels(NamedTuple):
    """Holds inputs and cotangents of sites that share a kernel, [n, scans…, …] each."""

    sites: tuple[Site, ...]
    inputs: tuple[jax.Array, ...]
    cotangents: tuple[jax.Array, ...]


class Side(NamedTuple):
    """Holds the inputs or cotangents of a site, with the meaning of their axes.

    A block is a group of channels in one layer. Steps that share a kernel count as images.
    """

    array: jax.Array
    samples: list[int]
    blocks: list[int]
    channels: list[int]
    images: list[int]
    spatial: list[list[int]]

    def arranged(self, *groups: list[int]) -> jax.Array:
        """Transpose the array and merge the axes of each group."""
        shape = [math.prod(self.array.shape[axis] for axis in group) for group in groups]
        return self.array.transpose([*itertools.chain(*groups)]).reshape(shape)


def _side(site: Site, array: jax.Array, spec: Sequence[int]) -> Side:
    """Describe an array's axes, with separate axes for groups and their channels."""
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


def sides(pixels: Pixels) -> tuple[list[Side], list[Side]]:
    dims = pixels.sites[0].eqn.params["dimension_numbers"]
    entering = map(_side, pixels.sites, pixels.inputs, itertools.repeat(dims.lhs_spec))
    leaving = map(_side, pixels.sites, pixels.cotangents, itertools.repeat(dims.out_spec))
    return list(entering), list(leaving)


def channels_first(sides: Sequence[Side]) -> jax.Array:
    """Arrange sides as [samples · blocks, channels, images, *spatial]."""
    return jnp.concatenate(
        [s.arranged(s.samples + s.blocks, s.channels, s.images, *s.spatial) for s in sides], axis=2
    )


def channels_last(sides: Sequence[Side]) -> jax.Array:
    """Arrange sides as [samples · blocks, images, *spatial, channels]."""
    return jnp.concatenate(
        [s.arranged(s.samples + s.blocks, s.images, *s.spatial, s.channels) for s in sides], axis=1
    )


def blocks_last(sides: Sequence[Side]) -> jax.Array:
    """Arrange sides as [samples, images, *spatial, channels, blocks]."""
    return jnp.concatenate(
        [s.arranged(s.samples, s.images, *s.spatial, s.channels, s.blocks) for s in sides], axis=1
    )


class BlockSizes(NamedTuple):
    """Holds the sizes of a site: channels of a block, the number of blocks, and images of each."""

    num_in: int
    num_out: int
    number: int
    images: int


def block_sizes(site: Site) -> BlockSizes:
    dims, groups = site.eqn.params["dimension_numbers"], site.eqn.params["feature_group_count"]
    layered, steps = site.scan_axes
    x, y = aval(site.eqn.invars[0]).shape, aval(site.leaving).shape
    return BlockSizes(
        num_in=x[dims.lhs_spec[1]] // groups,
        num_out=y[dims.out_spec[1]] // groups,
        number=groups * math.prod(site.scans[axis] for axis in layered),
        images=x[dims.lhs_spec[0]] * math.prod(site.scans[axis] for axis in steps),
    )
