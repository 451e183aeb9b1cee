"""Check stacks of per-sample gradients, and compute their norms and weighted sums."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export, lax

from psclip_optax.arrays import described, dtype_of, float_leaves, promoted
from psclip_optax.groups import ALL_TOGETHER, Groups
from psclip_optax.platforms import by_platform

_PUT_IT_FIRST = (
    "per_sample_clip changes shapes, so it is the first link of a chain, and whatever accumulates, "
    "masks or skips goes around the links after it: write "
    "`optax.chain(psc.per_sample_clip(…), optax.MultiSteps(…).gradient_transformation())` or "
    "`optax.chain(psc.per_sample_clip(…), optax.masked(…))`, not `optax.MultiSteps(optax.chain("
    "psc.per_sample_clip(…), …))` or `optax.masked(psc.per_sample_clip(…))`"
)


class Stack(NamedTuple):
    """Holds the leaves of a stack, the sample axis of each leaf, and their groups."""

    leaves: list[jax.Array]
    axes: tuple[int, ...]
    groups: Groups = ALL_TOGETHER

    @property
    def num_samples(self) -> int:
        return self.leaves[0].shape[self.axes[0]]

    def apart(self) -> Stack:
        """Split the leaves into the slices that are groups."""
        apart = self.groups.apart()
        if apart is self.groups:
            return self
        # Slices lie along the leading axis of one sample's leaf.
        leading = [int(axis == 0) for axis in self.axes]
        axes = [
            axis - (axis > 0) if n else axis
            for axis, n in zip(self.axes, self.groups.num_slices, strict=True)
        ]
        each = zip(axes, self.groups.num_slices, strict=True)
        leaves = self.groups.slices(self.leaves, leading)
        return Stack(leaves, tuple(axis for axis, n in each for _ in range(n or 1)), apart)

    def with_own(self, *by_group: jax.Array) -> Iterator[tuple[Any, ...]]:
        """Yield each leaf, its axis, and its group's column of arrays [n] or [n, groups]."""
        for i, both in enumerate(zip(self.leaves, self.axes, strict=True)):
            yield *both, *(self.groups.part(array, i) for array in by_group)


def refuse_masked_nodes(tree: Any) -> None:
    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
        raise ValueError(
            "per_sample_clip needs every leaf, for the norm is over a sample's whole gradient, but "
            "some came as optax.MaskedNode, from optax.masked or optax.partition. " + _PUT_IT_FIRST
        )


def refuse_weighted_sum(flag: Any) -> None:
    """Refuse a state whose flag has become an integer through arithmetic on states."""
    if isinstance(flag, jax.Array) and jnp.issubdtype(flag.dtype, jnp.integer):
        raise ValueError(
            "a state of per_sample_clip is not for sums or means, but one has made an integer of "
            "its bool, as optax.contrib.sam around it does, whose other optimizer is given stacked "
            "gradients: write `optax.chain(psc.per_sample_clip(…), optax.contrib.sam(…))`. "
            + _PUT_IT_FIRST
        )


def check_stack(per_sample_grads: Any, sample_axis: int) -> Stack:
    named = float_leaves("per_sample_grads", per_sample_grads)
    if not named:
        raise ValueError(
            "per_sample_clip expects a stack of gradients for each parameter, got a tree without "
            f"leaves, {per_sample_grads!r}; pass what jax.vmap(jax.grad(loss), …) gives of the "
            "parameters"
        )
    for path, leaf in named:
        _check_has_axis(path, leaf, sample_axis)
    leaves = [leaf for _, leaf in named]
    axes = tuple(sample_axis % leaf.ndim for leaf in leaves)
    sizes = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True)}
    if len(sizes) > 1:
        shapes = [f"{path}: {described(leaf)}" for path, leaf in named]
        raise ValueError(
            f"all leaves have the same number of samples on axis {sample_axis}, but they have "
            f"{sorted(sizes)}: {', '.join(shapes)}. Stack them with jax.vmap(jax.grad(loss), …), "
            f"or say where the samples are with sample_axis. {_PUT_IT_FIRST}"
        )
    return Stack(leaves, axes)


def _check_has_axis(path: str, leaf: jax.Array, sample_axis: int) -> None:
    if not -leaf.ndim <= sample_axis < leaf.ndim:
        raise ValueError(
            f"{path} has no sample axis {sample_axis}: it is {described(leaf)}. Stack "
            "per-sample gradients with jax.vmap(jax.grad(loss), in_axes=(None, 0)); a gradient "
            f"that is already averaged can no longer be clipped per sample. {_PUT_IT_FIRST}"
        )


def check_against_params(stack: Stack, per_sample_grads: Any, params: Any) -> None:
    """Refuse a stack whose shapes without the sample axis are not those of the parameters."""
    if params is None or jax.tree.structure(params) != jax.tree.structure(per_sample_grads):
        return  # without parameters, or with other names, there is nothing to compare
    named = jax.tree_util.tree_leaves_with_path(per_sample_grads)
    params_leaves = jax.tree.leaves(params)
    for (path, _), (leaf, axis), param in zip(named, stack.with_own(), params_leaves, strict=True):
        one_sample = leaf.shape[:axis] + leaf.shape[axis + 1 :]
        if one_sample != jnp.shape(param):
            raise ValueError(
                f"per_sample_grads{jax.tree_util.keystr(path)} is {described(leaf)}: without its "
                f"sample axis {axis} that is "
                f"{list(one_sample)}, but the parameter has shape {list(jnp.shape(param))}. "
                f"Stack per-sample gradients with jax.vmap(jax.grad(loss), …). {_PUT_IT_FIRST}"
            )


def warn_if_beyond_memory(stack: Stack) -> None:
    """Warn about memory during tracing, before the allocator fails."""
    if any(export.is_symbolic_dim(size) for leaf in stack.leaves for size in leaf.shape):
        return  # jax.export leaves the size open
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in stack.leaves)
    memory = _memory_of_devices()
    if memory is not None and size > memory:
        warnings.warn(
            f"a stack of {stack.num_samples} per-sample gradients takes {size / 2**30:.1f} GiB, "
            f"and the devices have {memory / 2**30:.1f} GiB; psc.clipped_value_and_grad(loss, "
            "threshold) gives the same gradient from the loss itself without stacking any, or take "
            "fewer samples at a time",
            stacklevel=3,
        )


def _memory_of_devices() -> int | None:
    """Return the bytes of all devices together, as a stack may be sharded; None if unknown."""
    devices = jax.devices()
    if devices[0].platform == "cpu":  # all CPU devices share the machine's memory
        names = os.sysconf_names if hasattr(os, "sysconf") else {}
        known = "SC_PHYS_PAGES" in names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    limit = bytes_limit(devices[0])
    return None if limit is None else limit * len(devices)


def bytes_limit(device: Any) -> int | None:
    """Return the bytes that arrays may take on a device; None if it does not say (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _accumulation_dtype(dtype: Any) -> Any:
    return promoted(dtype, jnp.float32)


def norm_dtype(leaves: Sequence[Any]) -> Any:
    return promoted(jnp.float32, *map(dtype_of, leaves))


def _per_sample(vector: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, leaf.shape, (axis,))


def squared_norms(stack: Stack, dtype: Any) -> jax.Array:
    """Sum ‖g_k‖² over all leaves of each sample, shape [n]; ∞ beyond the dtype's range.

    When clipping by group the sum is over the leaves of each group, shape [n, groups].
    """

    def over(leaves: Sequence[int]) -> jax.Array:
        total = jnp.zeros(stack.num_samples, dtype)
        for leaf, axis in ((stack.leaves[i], stack.axes[i]) for i in leaves):
            wide = leaf.astype(_accumulation_dtype(leaf.dtype))
            total += _sum_of_squares(wide, axis).astype(dtype)
        return total

    return stack.groups.stacked(map(over, stack.groups.members(len(stack.leaves))))


def scaled_squared_norms(stack: Stack, factors: jax.Array) -> jax.Array:
    """Sum ‖factors_k g_k‖² over each sample's leaves, [n], or each group's, [n, groups]."""

    def over(leaves: Sequence[int]) -> jax.Array:
        own = stack.groups.part(factors, leaves[0])
        total = jnp.zeros_like(own)
        for leaf, axis in ((stack.leaves[i], stack.axes[i]) for i in leaves):
            scaled = leaf.astype(own.dtype) * _per_sample(own, leaf, axis)
            total += _sum_of_squares(scaled, axis)
        return total

    return stack.groups.stacked(map(over, stack.groups.members(len(stack.leaves))))


def _sum_of_squares(leaf: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(jnp.square(leaf), axis=tuple(i for i in range(leaf.ndim) if i != axis))


def weighted_sum(leaf: jax.Array, axis: int, weights: jax.Array) -> jax.Array:
    """Return Σ_k weights_k leaf_k over the samples on `axis`, in at least float32."""
    dtype = _accumulation_dtype(leaf.dtype)
    weights, leaf = weights.astype(dtype), leaf.astype(dtype)

    # A TPU's matrix unit would multiply a single row in several passes. The sum is one pass, fused
    # with what makes the leaf.
    def summed(weights: jax.Array, leaf: jax.Array) -> jax.Array:
        return jnp.sum(leaf * _per_sample(weights, leaf, axis), axis)

    # By default a GPU would multiply in TF32. Full precision costs nothing here, where each number
    # is read once.
    def product(weights: jax.Array, leaf: jax.Array) -> jax.Array:
        dims = (((0,), (axis,)), ((), ()))
        highest = lax.Precision.HIGHEST
        return lax.dot_general(weights, leaf, dims, precision=highest, preferred_element_type=dtype)

    return by_platform(weights, leaf, tpu=summed, elsewhere=product)


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(at_most, 0, -1) if number % d == 0)


def selected_weighted_sum(
    leaf: jax.Array, axis: int, selected: jax.Array, factors: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum weights_k (factors_k leaf_k) over the selected samples, whatever the others hold.

    The selection needs a copy, so it processes one slice after another. Strided slices preserve the
    sharding of the sample axis.
    """
    num_slices = _largest_divisor(max(leaf.shape[axis], 1), at_most=8)
    split = (leaf.shape[axis] // num_slices, num_slices)
    shape = leaf.shape[:axis] + split + leaf.shape[axis + 1 :]
    sliced = leaf.reshape(shape)
    per_sample = [vector.reshape(split) for vector in (selected, factors, weights)]

    def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        part = lax.dynamic_index_in_dim(sliced, i, axis + 1, keepdims=False)
        keep, factor, weight = (vector[:, i] for vector in per_sample)
        scaled = part.astype(weights.dtype) * _per_sample(factor, part, axis)
        chosen = jnp.where(_per_sample(keep, part, axis), scaled, 0)
        return total + weighted_sum(chosen, axis, weight), None

    # zeros_like of a sum varies over the same axes under shard_map as the sum. XLA removes the sum.
    zero = jnp.zeros_like(jnp.sum(leaf, axis), weights.dtype)
    total, _ = lax.scan(add, zero, jnp.arange(num_slices))
    return total.astype(_accumulation_dtype(leaf.dtype))
