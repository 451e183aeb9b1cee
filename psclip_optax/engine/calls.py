"""Check and flatten the arguments of a call, and trace the loss for one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.arrays import (
    array_leaves,
    described,
    described_tree,
    dtype_of,
    float_leaves,
    is_integer,
)
from psclip_optax.engine.analysis.equations import effects_of_references


class Call(NamedTuple):
    """The arguments of one call, checked and flattened.

    Attributes:
      params: the parameters' leaves.
      examples: the batched leaves, samples on the first axis.
      loss: a function from the parameters' leaves and one example's leaves to
        (loss, *leaves of aux).
      aux_treedef: a function that returns the tree structure of aux, once the loss has been traced.
      treedef: the tree structure of the parameters.
    """

    params: list[jax.Array]
    examples: list[jax.Array]
    loss: Callable[[list[Any], list[Any]], list[Any]]
    aux_treedef: Callable[[], Any]
    treedef: Any

    @property
    def num_samples(self) -> int:
        return self.examples[0].shape[0]

    def of(self, params: list[jax.Array], examples: list[jax.Array]) -> Call:
        """Make the same call with other leaves."""
        return self._replace(params=params, examples=examples)

    def first(self, number: int) -> Call:
        """Take the first `number` samples."""
        return self._replace(examples=[example[:number] for example in self.examples])


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
    """Check a call's arguments before any work is done, and flatten them.

    Args:
      loss: the loss for one example.
      params: a tree of floating-point arrays.
      batch: the arguments after `params`.
      in_axes: the axis of samples in each of them.
      has_aux: whether the loss returns (loss, aux).
      keep_batch_dim: whether an example keeps its axis of samples, with size 1.
      axis_name: the mesh axes over which the batch is sharded, under shard_map.
    """
    meshes.check_axis_name(axis_name)
    treedef = jax.tree.structure(params)
    leaves = [meshes.varying(leaf, axis_name) for leaf in _checked_params(params)]
    axes = axes_of_leaves(in_axes, batch)
    batch_treedef = jax.tree.structure(batch)
    batch_leaves = _checked_batch(batch, axes)
    examples = [
        jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(batch_leaves, axes, strict=True)
        if axis is not None
    ]
    aux_treedefs: list[Any] = []

    def flat_loss(leaves: list[Any], example: list[Any]) -> list[Any]:
        batched = iter(example)
        arguments = [
            leaf if axis is None else _restored(next(batched), axis, keep_batch_dim)
            for leaf, axis in zip(batch_leaves, axes, strict=True)
        ]
        example_tree = batch_treedef.unflatten(arguments)
        try:
            result = loss(treedef.unflatten(leaves), *example_tree)
        except Exception as error:
            error.add_note(_called_for_one(example_tree, keep_batch_dim))
            raise
        value, aux = value_and_aux(result, has_aux)
        array_leaves("aux", aux, "aux is stacked over the samples, so close over what is no array")
        aux_leaves, aux_treedef = jax.tree.flatten(aux)
        aux_treedefs.append(aux_treedef)
        return [value, *aux_leaves]

    return Call(leaves, examples, flat_loss, lambda: aux_treedefs[-1], treedef)


def _restored(example: Any, axis: int, keep_batch_dim: bool) -> Any:
    return jnp.expand_dims(example, axis) if keep_batch_dim else example


def axes_of_leaves(in_axes: Any, batch: tuple[Any, ...]) -> list[int | None]:
    """Find the axis of samples of each leaf; None if all samples share the leaf."""

    def is_axis(node: Any) -> bool:
        return node is None or is_integer(node)

    given = (in_axes,) * len(batch) if is_axis(in_axes) else in_axes
    try:
        filled = jax.tree.map(
            lambda axis, part: [axis] * len(jax.tree.leaves(part)),
            tuple(given),
            tuple(batch),
            is_leaf=is_axis,
        )
    except (ValueError, TypeError):
        filled = None
    axes = jax.tree.leaves(filled, is_leaf=is_axis)
    if filled is None or not all(map(is_axis, axes)):
        raise ValueError(
            f"in_axes is an int, None, or a tuple with one of them (or a tree prefix) for each of "
            f"the {len(batch)} arguments after params, got {in_axes!r}"
        )
    return axes


def _checked_params(params: Any) -> list[jax.Array]:
    leaves = float_leaves("params", params)
    if not leaves:
        raise ValueError(
            f"params has no arrays to take gradients of, got {params!r}; they are the first "
            "argument, f(params, *batch)"
        )
    return [leaf for _, leaf in leaves]


def _checked_batch(batch: Any, axes: list[int | None]) -> list[jax.Array]:
    named = array_leaves(
        "batch", batch, "batch arguments are arrays, or trees of them; close over what is none"
    )
    leaves = [jnp.asarray(leaf) for _, leaf in named]
    _check_sizes(leaves)
    batched = [(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
    lacks_axis = any(not -leaf.ndim <= axis < leaf.ndim for leaf, axis in batched)
    sizes = set() if lacks_axis else {leaf.shape[axis] for leaf, axis in batched}
    if len(sizes) != 1:
        came = [
            f"{path}: {described(leaf)} (axis {axis})"
            for (path, leaf), axis in zip(named, axes, strict=True)
        ]
        if len(came) > 8:  # a list of numbers
            came[8:] = [f"and {len(came) - 8} more"]
        raise ValueError(
            "f(params, *batch) takes the samples on the axes that in_axes names, the same number "
            f"in each argument and in one at least, got {', '.join(came) or 'none'}; write "
            "in_axes=None for an argument that all samples share, jnp.asarray(…) around a list of "
            "numbers, and jax.random.split(key, n) for a key"
        )
    return leaves


def _check_sizes(leaves: list[jax.Array]) -> None:
    """Refuse symbolic shapes, as in jax.export: planning needs the sizes."""
    for leaf in leaves:
        if not all(is_integer(size) for size in leaf.shape):
            raise ValueError(
                f"the engine lays out its work by the number of samples, got {described(leaf)}; "
                "export with numbers for sizes, or export psc.per_sample_clip of "
                "jax.vmap(jax.grad(loss)), which takes symbolic ones"
            )


def _called_for_one(example: Any, keep_batch_dim: bool) -> str:
    arguments = ", ".join(["params", *map(described_tree, example)])
    hint = (
        "with an axis of size 1 for the batch, for keep_batch_dim is True"
        if keep_batch_dim
        else "without a batch axis; one that is written for batches needs keep_batch_dim=True"
    )
    return f"The loss was called for ONE example, as loss({arguments}), {hint}."


def value_and_aux(
    result: Any,
    has_aux: bool,
    for_batches: str = "keep_batch_dim=True if it is written for batches",
) -> tuple[Any, Any]:
    """Check the result of a loss for one example, and return value and aux, () without aux.

    Args:
      result: the result of the loss.
      has_aux: whether it should be (loss, aux).
      for_batches: the advice for a loss that is written for batches.
    """
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"with has_aux=True the loss returns (loss, aux), got {described_tree(result)}; return "
            "the pair, or write has_aux=False"
        )
    value: Any
    value, aux = result if has_aux else (result, ())
    dtype = dtype_of(value)
    if dtype is None or jnp.shape(value):
        raise TypeError(
            f"the loss is of ONE example and returns a scalar, got {described_tree(value)}; "
            "average what is left of it, write has_aux=True if it returns (loss, aux), or "
            f"{for_batches}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the loss is a real floating-point scalar, got {described(value)}; cast an integer "
            "with .astype(float), and take the real part of what is complex"
        )
    return value, aux


def _one_of(leaf: jax.Array) -> Any:
    # Under shard_map the type of an actual sample says over which mesh axes it varies.
    if leaf.shape[0] and meshes.axes_of(leaf):
        return leaf[0]
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def _check_effects(effects: Any) -> None:
    """Refuse all effects except debugging and references that the loss creates itself."""
    refused = effects - _of_debugging() - effects_of_references()
    if refused:
        names = ", ".join(map(str, refused))
        raise ValueError(
            f"the loss has effects ({names}), as of io_callback, an ordered jax.debug.print or a "
            "collective over a mesh axis, which would happen an unknown number of times; take them "
            "out, or return what you want to see as aux"
        )


def _of_debugging() -> set[Any]:
    """Return the effects of jax.debug, which run as they do under vmap(grad)."""
    return jax.make_jaxpr(lambda: jax.debug.callback(lambda: None))().effects


def trace(call: Call, axis_name: Any) -> core.ClosedJaxpr:
    one = [_one_of(leaf) for leaf in call.examples]
    closed = jax.make_jaxpr(call.loss)(call.params, one)
    if closed.effects:
        _check_effects(closed.effects)
    _check_own_gradients(call, meshes.axes_of_type(closed.out_avals[0]), axis_name)
    return closed


def _check_own_gradients(call: Call, axes: tuple[Any, ...], axis_name: Any) -> None:
    """Refuse parameters that do not vary over all axes over which the loss does.

    shard_map would sum their gradients over the devices, because it differentiates the sum of
    losses.
    """
    params = call.treedef.unflatten(call.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        missing = meshes.axes_without(leaf, axes)
        if missing:
            wanted = (*meshes.names_of(axis_name), *missing)
            raise ValueError(
                f"the loss varies over the mesh axis {meshes.in_words(missing)} of jax.shard_map, "
                f"but params{jax.tree_util.keystr(path)} does not, so JAX would sum its gradient "
                "over the devices before clipping. For the clipped mean of all devices' samples "
                f"pass axis_name={meshes.in_words(wanted)}; for a separate mean on each device "
                f"first write {meshes.assignment_that_varies('params', missing)}"
            )
