"""Find the axes that arrays vary over under shard_map, and handle meshes with Explicit axes.

On Explicit axes an operation must specify its result's sharding if JAX cannot infer it. The
clipping does not know the operations of a loss, so it cannot specify these shardings. It runs with
Auto axes, where the compiler chooses them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def check_axis_name(axis_name: Any) -> None:
    """Refuse the name of a mesh axis that no enclosing shard_map maps."""
    if axis_name is None:
        return
    try:
        lax.psum(1, axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name is the mesh axis (or a tuple of axes) of the jax.shard_map that this runs "
            f"in, got {axis_name!r}, which none around it maps; outside of shard_map leave it out: "
            "under jit a sharded batch needs no name"
        ) from error


def names_of(axis_name: Any) -> tuple[Any, ...]:
    """Return the mesh axes that an axis_name stands for."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def axes_of(array: Any) -> tuple[Any, ...]:
    """Return the mesh axes of shard_map over which an array, or a shape, varies.

    The result is () under check_vma=False, where JAX does not track these axes.
    """
    return axes_of_type(jax.typeof(array))


def axes_of_type(kind: Any) -> tuple[Any, ...]:
    """Return the same from a type, or from a `jax.ShapeDtypeStruct`."""
    if hasattr(kind, "manual_axis_type"):
        return tuple(sorted(kind.manual_axis_type.varying)) if kind.manual_axis_type else ()
    return tuple(sorted(kind.vma or ()))  # JAX < 0.10


def is_explicit(array: jax.Array) -> bool:
    """Tell whether an array's type names a mesh and how the array is sharded over it."""
    mesh = jax.typeof(array).sharding.mesh
    return not mesh.empty and bool(mesh.explicit_axes)


def shape_of_type(kind: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Make a shape for tracing that varies over the axes of a type."""
    plain = jax.ShapeDtypeStruct(kind.shape if shape is None else shape, kind.dtype)
    axes = axes_of_type(kind)
    if not axes:
        return plain
    # A `ShapeDtypeStruct` of axes does not know their mesh, which may have others too.
    traced = jax.make_jaxpr(lambda: varying(jnp.zeros(plain.shape, plain.dtype), axes))()
    return traced.out_avals[0]


def axes_without(array: jax.Array, axis_name: Any) -> tuple[Any, ...]:
    """Return those of the axes over which an array is the same on all devices."""
    return tuple(name for name in names_of(axis_name) if name not in axes_of(array))


def _of_shard_map(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the axes that JAX tracks, without those of vmap and those under check_vma=False."""
    return tuple(name for name in axes if name in axes_of(lax.axis_index(name)))


def varying(leaf: jax.Array, axis_name: Any) -> jax.Array:
    """Mark an array as varying, so that shard_map does not sum its cotangents."""
    missing = _of_shard_map(axes_without(leaf, axis_name))
    if not missing:
        return leaf
    if hasattr(lax, "pcast"):
        return lax.pcast(leaf, missing, to="varying")
    return lax.pvary(leaf, missing)  # pyright: ignore (JAX < 0.8)


def in_words(axes: tuple[Any, ...]) -> str:
    """Format axes as a value of the argument `axis_name`."""
    return repr(axes[0] if len(axes) == 1 else axes)


def assignment_that_varies(name: str, axes: tuple[Any, ...]) -> str:
    """Write the code that marks a tree of arrays as varying, in this version of JAX."""
    if hasattr(lax, "pcast"):
        return f"{name} = jax.lax.pcast({name}, {in_words(axes)}, to='varying')"
    return f"{name} = jax.lax.pvary({name}, {in_words(axes)})"


def check_sharded(name: str, per_sample_grads: Any, axis_name: Any) -> None:
    """Refuse a stack that is replicated over the axes that should shard it."""
    if axis_name is None or axes_without(lax.axis_index(axis_name), axis_name):
        return  # with check_vma=False nothing is known
    for path, leaf in jax.tree_util.tree_leaves_with_path(per_sample_grads):
        missing = axes_without(leaf, axis_name)
        if missing:
            raise ValueError(
                f"axis_name={axis_name!r} says that each device has samples of its own, but "
                f"{name}{jax.tree_util.keystr(path)} is the same on all devices of the mesh axis "
                f"{in_words(missing)}: jax.shard_map has gradients of replicated parameters summed "
                "over them. Before jax.vmap(jax.grad(loss), …) make them each device's own, "
                f"{assignment_that_varies('params', missing)}, or pass a stack that in_specs shard"
            )


def explicit_mesh(tree: Any) -> Any:
    """Return the mesh with Explicit axes that some array is on; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            kinds = mesh.axis_types or ()
            if AxisType.Explicit in kinds and AxisType.Manual not in kinds:
                return mesh
    return None


def num_sharing(tree: Any, num_samples: int, name: Any = None) -> int:
    """Count the devices that may share the samples of arrays; 1 if none can.

    These are the devices along some axes of the arrays' mesh, or all devices if they have no mesh.
    Axes that shard_map maps do not count. Which axes shard the samples is only known by `name`.
    Otherwise the result is a multiple of each number that is possible. Programs compiled ahead of
    time may use meshes of devices that this machine does not have.

    Args:
      tree: the arrays.
      num_samples: n. Devices share the samples only if each has equally many.
      name: the mesh axis, or tuple of axes, that shards the samples; None if it is not known.
    """
    shapes = _shapes_of_meshes(tree)
    named = [[shape[axis] for axis in names_of(name) if axis in shape] for shape in shapes]
    if any(named):
        possible = set(map(math.prod, named))
    else:
        sizes = [list(shape.values()) for shape in shapes] or [[jax.device_count()]]
        possible = {math.prod(axes) for shape in sizes for axes in _subsets(shape)}
    return math.lcm(*(number for number in possible if num_samples % number == 0))


def _subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    numbers = range(len(items) + 1)
    return itertools.chain.from_iterable(itertools.combinations(items, r) for r in numbers)


def devices_of_mesh(tree: Any) -> int | None:
    """Count the devices of the mesh that arrays are known to be on; None if they have no mesh."""
    return max((math.prod(shape.values()) for shape in _shapes_of_meshes(tree)), default=None)


def has_several_axes(tree: Any) -> bool:
    """Tell whether arrays have a mesh that may share more than the samples."""
    return any(sum(size > 1 for size in shape.values()) > 1 for shape in _shapes_of_meshes(tree))


def _shapes_of_meshes(tree: Any) -> list[dict[Any, int]]:
    """Return the sizes of the axes that shard_map does not map, for each mesh of arrays."""
    meshes = dict.fromkeys(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return [
        {
            name: mesh.shape[name]
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Manual
        }
        for mesh in meshes
        if not mesh.empty
    ]


def specs_of(tree: Any) -> Any:
    """Return the sharding of each array of a tree over Explicit axes."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def specs_without(tree: Any, axis: int) -> Any:
    """Return the sharding of each array without one of its axes."""

    def spec_without(leaf: Any) -> P:
        spec = jax.typeof(leaf).sharding.spec
        left = [part for i, part in enumerate(spec) if i != axis % max(jnp.ndim(leaf), 1)]
        return P(*left)

    return jax.tree.map(spec_without, tree)


def samples_spec(leaves: Sequence[Any], axes: Sequence[int | None]) -> P:
    """Return the sharding of an array [n] that matches the leaves' axes of samples."""
    for leaf, axis in zip(leaves, axes, strict=True):
        spec = jax.typeof(leaf).sharding.spec
        if axis is not None and axis % jnp.ndim(leaf) < len(spec):
            return P(spec[axis % jnp.ndim(leaf)])
    return P()


def with_auto_axes(
    function: Callable[..., Any], arguments: tuple[Any, ...], mesh: Any, out_specs: Any
) -> Any:
    """Call function(*arguments) with Auto axes, and return its results on Explicit axes.

    Args:
      function: a function of trees of arrays; other leaves are passed unchanged.
      arguments: the trees.
      mesh: the mesh with Explicit axes.
      out_specs: the shardings, a prefix of the tree that the function returns.

    Raises:
      ValueError: the function closes over arrays on Explicit axes.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def of_arrays(*arrays: jax.Array) -> Any:
        own = iter(arrays)
        merged = [
            next(own) if is_one else leaf for is_one, leaf in zip(is_array, leaves, strict=True)
        ]
        return function(*treedef.unflatten(merged))

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), out_specs, is_leaf=lambda node: isinstance(node, P)
    )
    arrays = [leaf for is_one, leaf in zip(is_array, leaves, strict=True) if is_one]
    try:
        return jax.sharding.auto_axes(of_arrays, out_sharding=shardings)(*arrays)
    except ValueError as error:
        if "context mesh" not in str(error):
            raise
        raise ValueError(
            "of arrays on a mesh with Explicit axes gradients are clipped with Auto axes, but the "
            "loss or the threshold closes over some: pass them as arguments (a batch argument that "
            "all samples share has in_axes=None)"
        ) from error
