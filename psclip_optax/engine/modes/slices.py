"""Run slices of a batch, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax import meshes
from psclip_optax.arrays import promoted

# The largest number of slices that may be unrolled on a CPU.
_MOST_UNROLLED = 16


class Samples(NamedTuple):
    """Holds the samples of a slice of a batch: their data, thresholds and shares.

    Attributes:
      examples: the batched leaves, n on the first axis of each.
      taus: τ_k, [n]; [n, groups] when clipping by group.
      shares: 1/N, the weight of a sample in the mean, [n]; 1 for a sum. It is part of the weights,
        so no gradient is divided, and a mean in half precision does not overflow.
      counts: whether the sample is unmasked, bool [n].
    """

    examples: list[jax.Array]
    taus: jax.Array
    shares: jax.Array
    counts: jax.Array

    @property
    def number(self) -> int:
        return self.counts.size


class Result(NamedTuple):
    """Holds the result of one slice.

    Attributes:
      sums: Σ γ_k g_k / N of each parameter.
      outs: the stacked results of the loss: the losses, then the leaves of aux.
      norms: ‖g_k‖, [n]; [n, groups] when clipping by group, like the scales. For a micro-batch that
        is clipped as a whole, n is 1, also below.
      scales: γ_k, [n]; 0 for masked and dropped samples.
      finite: whether loss and gradient are finite, bool [n].
    """

    sums: list[jax.Array]
    outs: list[jax.Array]
    norms: jax.Array
    scales: jax.Array
    finite: jax.Array


def in_slices(
    run: Callable[[Samples], Result],
    samples: Samples,
    size: int | None,
    *,
    has_convolutions: bool,
    consecutive: bool = False,
) -> Result:
    """Sum the results of slices of at most `size` samples, one after the other.

    If slices need not be consecutive, slice j takes every num_slices-th sample from j on:
    consecutive slices of a batch sharded over devices would move samples. Short slices are filled
    up with copies of real samples, masked.

    Args:
      run: a function from the samples of a slice to its result.
      samples: all samples.
      size: the size of a slice; None for one slice.
      has_convolutions: whether `run` has convolutions.
      consecutive: whether the samples of a slice are consecutive.
    """
    n = samples.number
    if size is None or size >= n:
        return run(samples)
    axis = 0 if consecutive else 1
    num_slices = -(-n // size)
    missing = num_slices * size - n

    def split(array: jax.Array) -> jax.Array:
        whole = jnp.concatenate([array, array[:missing]]) if missing else array
        return _sliced(whole, num_slices, axis)

    parts = jax.tree.map(split, samples)
    is_real = jnp.arange(num_slices * size) < n
    parts = parts._replace(counts=parts.counts & _sliced(is_real, num_slices, axis))
    # XLA's CPU backend runs convolutions many times slower inside a loop.
    is_cpu = jax.default_backend() == "cpu"
    is_unrolled = is_cpu and has_convolutions and num_slices <= _MOST_UNROLLED

    def one(sums: list[jax.Array], i: jax.Array) -> tuple[list[jax.Array], Result]:
        i = _after(sums, i) if is_unrolled else i
        result = run(
            jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, i, axis, False), parts)
        )
        added = [
            total + new.astype(total.dtype) for total, new in zip(sums, result.sums, strict=True)
        ]
        return added, result._replace(sums=[])

    first = jax.tree.map(lambda part: lax.index_in_dim(part, 0, axis, False), parts)
    sums_of_one = jax.make_jaxpr(lambda part: run(part).sums)(first).out_avals
    zeros = [_zeros_of_sums(kind) for kind in sums_of_one]
    unroll = num_slices if is_unrolled else 1
    sums, results = lax.scan(one, zeros, jnp.arange(num_slices), unroll=unroll)

    def in_order(array: jax.Array) -> jax.Array:
        ordered = jnp.moveaxis(array, 0, axis)
        return lax.collapse(ordered, 0, 2)[:n]

    return jax.tree.map(in_order, results)._replace(sums=sums)


def _zeros_of_sums(kind: Any) -> jax.Array:
    zeros = jnp.zeros(kind.shape, promoted(kind.dtype, jnp.float32))
    return meshes.varying(zeros, meshes.axes_of_type(kind))


def _sliced(array: jax.Array, num_slices: int, axis: int) -> jax.Array:
    shape = [len(array) // num_slices]
    shape.insert(axis, num_slices)
    return array.reshape(*shape, *array.shape[1:])


def _after(sums: list[jax.Array], i: jax.Array) -> jax.Array:
    """Return the index, available only after the sums.

    XLA would run unrolled slices in parallel, and hold the residuals of all of them. It removes an
    optimization_barrier before scheduling, so the index must seem to depend on the sums.
    """
    total = sum((total.ravel()[0] for total in sums if total.size), jnp.zeros(()))
    never = (total > 0) & (total < 0)
    return i + never.astype(i.dtype)


def even_slices(numbers: Iterable[int], num_samples: int, num_devices: int) -> list[int]:
    """Choose the numbers of slices that do not move samples between devices that share them."""
    if not may_be_shared(num_samples, num_devices):
        return [number for number in numbers if number <= num_samples]
    return [number for number in numbers if num_samples % (number * num_devices) == 0]


def may_be_shared(num_samples: int, num_devices: int) -> bool:
    return num_devices > 1 and num_samples % num_devices == 0
