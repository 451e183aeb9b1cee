"""Lays models out over the chips of a TPU: batch, parameters and activations.

"fsdp": all chips share the batch and each parameter. "tensor parallel": the columns of the grid of
chips do so, and the chips of a column share the products as in Megatron: columns of the first
product, rows of the second. In both layouts activations are constrained only by batch, so the
compiler gathers parameters where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.engine.real_models import Model
from benchmarks.engine.targets import devices

LAYOUTS = ("fsdp", "tensor parallel")
# Products after a split: the rows of these kernels are split, the columns of all others.
_PARTED_ROWS = re.compile(r"Block_\d+/(Attention_0/)?Dense_1/|Embed_0/")
_PARTED_ROWS_OF_LLAMA = re.compile(r"Dense_[35]/")


class Laid(NamedTuple):
    """A model laid out over the chips of a TPU.

    Attributes:
      loss: the loss for one example; its axis of samples is the mesh's "data".
      batch_loss: the mean over a batch.
      arguments: shapes of (params, *batch), with shardings.
    """

    loss: Callable[..., Any]
    batch_loss: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def gradients(self) -> Any:
        """Returns the shardings of gradients, which are those of the parameters."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.arguments[0])


def mesh_of(layout: str, target: str, topology: str) -> Mesh:
    chips = np.array(devices(target, topology))
    if layout == "fsdp":
        return Mesh(chips, ("data",))
    return Mesh(chips.reshape([int(side) for side in topology.split("x")]), ("data", "model"))


def laid_out(model: Model, mesh: Mesh, samples_each: int) -> Laid:
    """Lays a model out, with `samples_each` samples for each chip along "data"."""
    params, *_ = model.abstract()
    num_samples = samples_each * mesh.shape["data"]
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(lambda key: model.make_batch(key, num_samples), key)
    specs = jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(mesh, path, leaf), params)
    return Laid(
        _constrained(model.loss, mesh, None),
        _constrained(model.batch_loss, mesh, "data"),
        (
            jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), params, specs),
            *(_placed(array, mesh, P("data")) for array in batch),
        ),
    )


def _placed(shaped: Any, mesh: Mesh, spec: P) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shaped.shape, shaped.dtype, sharding=sharding)


def _spec(mesh: Mesh, path: Any, leaf: Any) -> P:
    """Returns a parameter's sharding: matrices over all chips, vectors not at all."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_scanned = "Checkpoint" in name
    if leaf.ndim - is_scanned < 2:
        return P()
    rows, columns = leaf.ndim - 2, leaf.ndim - 1
    is_llama = "LlamaBlock" in name
    parts_rows = _PARTED_ROWS_OF_LLAMA if is_llama else _PARTED_ROWS
    by_model = rows if parts_rows.search(name) else columns
    axes = {"model": by_model, "data": rows + columns - by_model}
    if "model" not in mesh.shape:
        fitting = [a for a in (rows, columns) if leaf.shape[a] % mesh.shape["data"] == 0]
        axes = {"data": max(fitting, key=lambda a: leaf.shape[a])} if fitting else {}
    names = [None] * leaf.ndim
    for mesh_axis, axis in axes.items():
        if leaf.shape[axis] % mesh.shape[mesh_axis] == 0:
            names[axis] = mesh_axis
    return P(*names)


def _constrained(function: Callable[..., Any], mesh: Mesh, batch: str | None) -> Callable[..., Any]:
    """Constrains the outputs of modules to be sharded by batch, the first axis."""

    def constrain(array: jax.Array, is_product: bool) -> jax.Array:
        last = P.UNCONSTRAINED if is_product and "model" in mesh.shape else None
        spec = P(batch, *[None] * (array.ndim - 2), last)
        return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    def interceptor(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        out = call(*arguments, **named)
        is_within = context.module.name is not None  # the network itself returns the logits
        is_array = is_within and isinstance(out, jax.Array) and out.ndim > 2
        is_product = isinstance(context.module, nn.Dense) or context.method_name == "attend"
        return constrain(out, is_product) if is_array else out

    def run(*arguments: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return function(*arguments)

    return run
