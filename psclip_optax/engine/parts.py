"""Process samples in parts, one after another, to keep intermediate arrays small."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax import meshes
from psclip_optax.platforms import by_platform


class Parts(NamedTuple):
    """Holds the least number of parts, by platform.

    A CPU is faster if intermediate arrays stay in its cache. On other platforms each step of a loop
    costs time, and parts only save memory. XLA's compiler for TPUs fuses squaring and summing into
    products, which then take no memory.
    """

    on_cpu: float
    on_tpu: float
    elsewhere: float


def in_parts(
    function: Callable[[Any], jax.Array], trees: Any, axes: Any, num_samples: int, least: Parts
) -> jax.Array:
    """Compute a function's result [n] in at least `least` parts, if the samples can be split so.

    If devices may share the samples, a part takes every m-th sample, so the same number from each
    device. Consecutive samples would have to move between devices.

    Args:
      function: a function from trees of arrays to one number for each sample.
      trees: the trees of arrays.
      axes: the axis of samples in each of the arrays.
      num_samples: n.
      least: the least number of parts.
    """
    devices = meshes.num_sharing(trees, num_samples)
    numbers = [
        number_of_parts(num_samples // devices, at_least / devices, devices == 1)
        for at_least in least
    ]
    run = functools.partial(_in_so_many, function, axes, num_samples)
    if len(set(numbers)) == 1:
        return run(numbers[0], trees)
    on_cpu, on_tpu, elsewhere = (functools.partial(run, number) for number in numbers)
    return by_platform(trees, cpu=on_cpu, tpu=on_tpu, elsewhere=elsewhere)


def _in_so_many(
    function: Callable[[Any], jax.Array], axes: Any, num_samples: int, num_parts: int, trees: Any
) -> jax.Array:
    if num_parts == 1:
        return function(trees)
    if num_samples % num_parts:
        return _in_overlapping_parts(function, trees, axes, num_samples, num_parts)

    def part(i: jax.Array) -> jax.Array:
        return function(
            jax.tree.map(lambda array, axis: _strided(array, axis, i, num_parts), trees, axes)
        )

    return lax.map(part, jnp.arange(num_parts)).T.reshape(num_samples)


def number_of_parts(num_samples: int, at_least: float, may_overlap: bool) -> int:
    """Choose the number of parts: a divisor of num_samples, unless that is far too many."""
    wanted = min(num_samples, max(1, math.ceil(at_least)))
    most = 2 * wanted if may_overlap else num_samples + 1
    return next((number for number in range(wanted, most) if num_samples % number == 0), wanted)


def _strided(array: jax.Array, axis: int, i: jax.Array, num_parts: int) -> jax.Array:
    # XLA's CPU backend copies the whole batch if it is reshaped outside the loop. It also does so
    # if there are axes of size 1, which it reorders.
    before = [size for size in array.shape[:axis] if size > 1]
    behind = [size for size in array.shape[axis + 1 :] if size > 1]
    size = array.shape[axis] // num_parts
    parted = array.reshape(*before, size, num_parts, *behind)
    part = lax.dynamic_index_in_dim(parted, i, len(before) + 1, keepdims=False)
    return part.reshape(*array.shape[:axis], size, *array.shape[axis + 1 :])


def _in_overlapping_parts(
    function: Callable[[Any], jax.Array], trees: Any, axes: Any, num_samples: int, num_parts: int
) -> jax.Array:
    """Run parts whose size does not divide the samples; the last part overlaps the one before."""
    size = -(-num_samples // num_parts)
    num_parts = -(-num_samples // size)

    def part(start: jax.Array) -> jax.Array:
        return function(
            jax.tree.map(
                lambda array, axis: lax.dynamic_slice_in_dim(array, start, size, axis), trees, axes
            )
        )

    norms = lax.map(part, jnp.minimum(jnp.arange(num_parts) * size, num_samples - size))
    last = norms[-1, (num_parts - 1) * size - (num_samples - size) :]
    return jnp.concatenate([norms[:-1].reshape(-1), last])
