"""Group a classifier's parameters for clipping, and record statistics of each group."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax.training.config.commands import ClipGroupsName


def parameter_groups(name: ClipGroupsName, params: Any) -> Any:
    """Makes a tree prefix of the parameters with a leaf for each group.

    Args:
      name: "layer" groups the arrays of each module, such as a kernel and its bias; "leaf" makes
        each array a group; "all" makes no groups.
      params: Linen's parameters, or their shapes.

    Returns:
      The prefix, with each group's name as a leaf; None without groups.

    Examples:
      >>> params = {"Block_0": {"Conv_0": {"kernel": 1.0}}, "Dense_0": {"kernel": 1.0, "bias": 0.0}}
      >>> parameter_groups("layer", params)
      {'Block_0': {'Conv_0': 'Block_0/Conv_0'}, 'Dense_0': 'Dense_0'}
      >>> parameter_groups("leaf", params)["Dense_0"]
      {'bias': 'Dense_0/bias', 'kernel': 'Dense_0/kernel'}
    """
    if name == "all":
        return None

    def name_of(path: Any, _: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    is_group = _is_layer if name == "layer" else None
    return jax.tree_util.tree_map_with_path(name_of, params, is_leaf=is_group)


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mapping) and not any(
        isinstance(child, Mapping) for child in node.values()
    )


def whole_norms(norms: jax.Array) -> jax.Array:
    """Computes the norms of whole gradients from those of their groups.

    Args:
      norms: `[n]`, or by group `[n, groups]`.

    Returns:
      `[n]`.

    Examples:
      >>> whole_norms(jnp.array([[3.0, 4.0], [0.0, 2.0]]))
      Array([5., 2.], dtype=float32)
    """
    return norms if norms.ndim == 1 else jnp.linalg.norm(norms, axis=1)


def recorded(metrics: dict[str, Any], groups: Any) -> dict[str, Any]:
    """Converts metrics to the content of a record.

    Args:
      metrics: scalars, and with groups also arrays with a value for each group.
      groups: the result of `parameter_groups`.

    Returns:
      Numbers; "groups" has the values of each group by its name, and "clipped_share" is their mean.

    Examples:
      >>> metrics = {"loss": jnp.float32(2), "clipped_share": jnp.array([0.5, 1.0])}
      >>> recorded(metrics, {"a": "a", "b": "b"})
      {'loss': 2.0, 'clipped_share': 0.75,
       'groups': {'a': {'clipped_share': 0.5}, 'b': {'clipped_share': 1.0}}}
    """
    values = {name: value.tolist() for name, value in metrics.items()}
    if groups is None:
        return values
    by_group = {name: value for name, value in values.items() if isinstance(value, list)}
    scalars = {name: value for name, value in values.items() if name not in by_group}
    each = zip(*by_group.values(), strict=True)
    return scalars | {
        "clipped_share": statistics.fmean(by_group["clipped_share"]),
        "groups": {
            name: dict(zip(by_group, own, strict=True))
            for name, own in zip(jax.tree.leaves(groups), each, strict=True)
        },
    }
