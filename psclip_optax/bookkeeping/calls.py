"""A call of the loss: its arguments, checked and taken apart, and its trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core


class Call(NamedTuple):
    """One call's arguments, checked and taken apart.

    Attributes:
      params: the parameters' leaves.
      examples: the batched leaves, samples on the first axis.
      loss: from the parameters' leaves and one example's leaves to (loss, *leaves of aux).
      aux_treedef: gives the tree of aux, once the loss was traced.
      treedef: the parameters' tree.
    """

    params: list[jax.Array]
    examples: list[jax.Array]
    loss: Callable[[list[Any], list[Any]], list[Any]]
    aux_treedef: Callable[[], Any]
    treedef: Any

    @property
    def num_samples(self) -> int:
        return self.examples[0].shape[0]


def take_apart(
    loss: Callable[..., Any],
    params: Any,
    batch: tuple[Any, ...],
    *,
    in_axes: Any,
    has_aux: bool,
    keep_batch_dim: bool,
    axis_name: Any,
) -> Call:
    """Checks a call's arguments before any work is done.

    Args:
      loss: of one example.
      params: a tree of floating-point arrays.
      batch: the arguments after `params`.
      in_axes: where the samples lie in each of them.
      has_aux: whether the loss returns (loss, aux).
      keep_batch_dim: whether an example keeps an axis of size 1 there.
      axis_name: of the mesh axes that the batch is sharded over, under shard_map.
    """
    _check_params(params)
    leaves, treedef = jax.tree.flatten(params)
    leaves = [varying(jnp.asarray(leaf), axis_name) for leaf in leaves]
    axes = axes_of_leaves(in_axes, batch)
    batch_leaves, batch_treedef = jax.tree.flatten(batch)
    batch_leaves = [jnp.asarray(leaf) for leaf in batch_leaves]
    _check_batch(batch, batch_leaves, axes)
    examples = [
        jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(batch_leaves, axes, strict=True)
        if axis is not None
    ]
    aux_treedefs: list[Any] = []

    def flat_loss(leaves: list[Any], example: list[Any]) -> list[Any]:
        own = iter(example)
        arguments = [
            leaf if axis is None else _restored(next(own), axis, keep_batch_dim)
            for leaf, axis in zip(batch_leaves, axes, strict=True)
        ]
        result = loss(treedef.unflatten(leaves), *batch_treedef.unflatten(arguments))
        value, aux = _value_and_aux(result, has_aux)
        aux_leaves, aux_treedef = jax.tree.flatten(aux)
        aux_treedefs.append(aux_treedef)
        return [value, *aux_leaves]

    return Call(leaves, examples, flat_loss, lambda: aux_treedefs[-1], treedef)


def varying(leaf: jax.Array, axis_name: Any) -> jax.Array:
    """The array as each device's own, so that shard_map does not add up its cotangents."""
    missing = _missing_axes(leaf, axis_name)
    if not missing:
        return leaf
    if hasattr(lax, "pcast"):
        return lax.pcast(leaf, missing, to="varying")
    return lax.pvary(leaf, missing)  # pyright: ignore (JAX < 0.8)


def _missing_axes(leaf: jax.Array, axis_name: Any) -> tuple[Any, ...]:
    if axis_name is None:
        return ()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return tuple(name for name in names if name not in _varies_over(jax.typeof(leaf)))


def _varies_over(kind: Any) -> frozenset[Any]:
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma  # JAX < 0.10


def _restored(example: Any, axis: int, keep_batch_dim: bool) -> Any:
    return jnp.expand_dims(example, axis) if keep_batch_dim else example


def axes_of_leaves(in_axes: Any, batch: tuple[Any, ...]) -> list[int | None]:
    """The axis of samples of each leaf, None where all share it."""

    def is_axis(node: Any) -> bool:
        return node is None or isinstance(node, int)

    if is_axis(in_axes):
        in_axes = (in_axes,) * len(batch)
    try:
        filled = jax.tree.map(
            lambda axis, part: [axis] * len(jax.tree.leaves(part)),
            tuple(in_axes),
            tuple(batch),
            is_leaf=is_axis,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"in_axes is an int, None, or a tuple with one of them (or a tree prefix) for each of "
            f"the {len(batch)} arguments after params, got {in_axes!r}"
        ) from error
    return jax.tree.leaves(filled, is_leaf=is_axis)


def _check_params(params: Any) -> None:
    paths = jax.tree_util.tree_leaves_with_path(params)
    if not paths:
        raise ValueError(f"params has no leaves to differentiate: {params!r}")
    for path, leaf in paths:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {dtype}{list(jnp.shape(leaf))}, but "
                "gradients are taken of real floating-point parameters; close over the others, or "
                "part them off (eqx.partition, nnx.split)"
            )


def _check_batch(batch: Any, leaves: list[jax.Array], axes: list[int | None]) -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)]
    described = [
        f"batch{path}: {leaf.dtype}{list(leaf.shape)} (axis {axis})"
        for path, leaf, axis in zip(paths, leaves, axes, strict=True)
    ]
    batched = [(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
    lacks_axis = any(not -leaf.ndim <= axis < leaf.ndim for leaf, axis in batched)
    sizes = set() if lacks_axis else {leaf.shape[axis] for leaf, axis in batched}
    if len(sizes) != 1:
        raise ValueError(
            "the arguments after params hold the n samples on the axes that in_axes names, the "
            f"same n ≥ 1 in each and in one at least, got {', '.join(described) or 'none'}; "
            "write in_axes=None for an argument that all samples share"
        )


def _value_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"with has_aux=True the loss returns (loss, aux), got {type(result)}")
    value: Any
    value, aux = result if has_aux else (result, ())
    if jax.tree.structure(value) != jax.tree.structure(0) or jnp.shape(value):
        what = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", value)
        raise TypeError(
            f"the loss is of ONE example and returns a scalar, got {what}; average what is left of "
            "it, write has_aux=True if it returns (loss, aux), or keep_batch_dim=True if it is "
            "written for batches"
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(f"the loss is a real floating-point scalar, got {jnp.result_type(value)}")
    return value, aux


def _one_of(leaf: jax.Array) -> Any:
    # Under shard_map a real sample, for its type says over which mesh axes it varies.
    if leaf.shape[0] and _varies_over(jax.typeof(leaf)):
        return leaf[0]
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def trace(call: Call) -> core.ClosedJaxpr:
    one = [_one_of(leaf) for leaf in call.examples]
    closed = jax.make_jaxpr(call.loss)(call.params, one)
    if closed.effects:
        effects = ", ".join(map(str, closed.effects))
        raise ValueError(
            f"the loss has effects ({effects}), as of jax.debug.print or io_callback, which would "
            "happen an unknown number of times; take them out, or return what you want to see as "
            "aux"
        )
    return closed
