"""Clip by group: a tree prefix of the parameters has a threshold for each group of leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from psclip_optax.arrays import as_array, described, described_tree, is_integer
from psclip_optax.slices import EachSlice
from psclip_optax.thresholds import (
    AdaptiveThreshold,
    ConstantThreshold,
    GrowingThreshold,
    as_threshold,
    least_norm,
    thresholds_at,
)
from psclip_optax.typing import (
    ArrayT,
    AxisName,
    Params,
    PyTree,
    Threshold,
    ThresholdLike,
    ThresholdTree,
)

KeyPath: TypeAlias = tuple[object, ...]


class Groups(NamedTuple):
    """Says which leaves are clipped together.

    Attributes:
      of_leaf: the number of each leaf's group, or of its first slice's group. None where all
        leaves are clipped together, and arrays of samples have no axis of groups.
      num_slices: for each leaf the number of its slices, if each slice is a group, with consecutive
        numbers; else 0.
    """

    of_leaf: tuple[int, ...] | None = None
    num_slices: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the axes after that of samples in arrays of samples: () or (groups,)."""
        if self.of_leaf is None:
            return ()
        return (max(self.columns(leaf).stop for leaf in range(len(self.of_leaf))),)

    def columns(self, leaf: int) -> range:
        """Return the columns of a leaf in arrays [n, groups]: one, or one for each slice."""
        if self.of_leaf is None:
            return range(1)
        first = self.of_leaf[leaf]
        return range(first, first + (self.num_slices[leaf] or 1))

    def part(self, values: jax.Array, leaf: int) -> jax.Array:
        """Take the column of a leaf's group from an array [..., groups]."""
        return values if self.of_leaf is None else values[..., self.of_leaf[leaf]]

    def members(self, num_leaves: int) -> list[Sequence[int]]:
        """List the leaves of each group."""
        if self.of_leaf is None:
            return [range(num_leaves)]
        leaves: list[list[int]] = [[] for _ in range(*self.shape)]
        for leaf, group in enumerate(self.of_leaf):
            leaves[group].append(leaf)
        return [*leaves]

    def apart(self) -> Groups:
        """Return the same groups over leaves in which each slice that is a group is a leaf."""
        if not any(self.num_slices):
            return self
        leaves = range(len(self.num_slices))
        of_leaf = tuple(column for leaf in leaves for column in self.columns(leaf))
        return Groups(of_leaf, (0,) * len(of_leaf))

    def slices(self, arrays: Sequence[ArrayT], axes: Sequence[int]) -> list[ArrayT]:
        """Split arrays that correspond to the leaves into the slices that are groups."""
        if not any(self.num_slices):
            return [*arrays]
        each = zip(arrays, axes, self.num_slices, strict=True)
        parted = [
            [array[(slice(None),) * axis + (i,)] for i in range(number)] if number else [array]
            for array, axis, number in each
        ]
        return [part for parts in parted for part in parts]

    def whole(self, slices: Sequence[ArrayT]) -> list[ArrayT | jax.Array]:
        """Stack slices along a leading axis, so that one array corresponds to each leaf again."""
        if not any(self.num_slices):
            return [*slices]
        rest = iter(slices)
        return [
            jnp.stack([next(rest) for _ in range(number)]) if number else next(rest)
            for number in self.num_slices
        ]

    def stacked(self, arrays: Iterable[jax.Array]) -> jax.Array:
        """Stack the arrays of the groups on a last axis."""
        if self.of_leaf is None:
            (array,) = arrays
            return array
        return jnp.stack(jnp.broadcast_arrays(*arrays), axis=-1)

    def in_all(self, flags: jax.Array) -> jax.Array:
        """Tell which samples have the flag in all groups."""
        return flags if self.of_leaf is None else jnp.all(flags, axis=-1)


ALL_TOGETHER = Groups()


class Limits(NamedTuple):
    """The thresholds that parameters are clipped at.

    Attributes:
      thresholds: a threshold for each group.
      groups: the groups.
    """

    thresholds: tuple[Threshold, ...]
    groups: Groups

    def at(self, positions: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return τ at positions [n], shape [n] or [n, groups]."""
        taus = (thresholds_at(threshold, positions, dtype) for threshold in self.thresholds)
        return self.groups.stacked(taus)

    def least_norms(self) -> np.ndarray | None:
        """Return the smallest τ of each group over all positions; None if one is not known."""
        known = [least_norm(threshold) for threshold in self.thresholds]
        return None if any(one is None for one in known) else np.array(known)


def by_layer(params: Params, threshold: ThresholdLike, depth: int = 1) -> ThresholdTree:
    r"""Split a threshold among the layers of the parameters, for clipping by group.

    Each subtree at the given depth is a group, whose gradient is clipped at $\tau_k / \sqrt m$,
    where m is the number of groups. The norm of a whole clipped gradient is then at most $\tau_k$,
    as with one threshold for all parameters.

    Args:
      params: the tree of parameters, or another tree of the same structure.
      threshold: a number, [`psclip_optax.growing_threshold`][], or any callable from positions [n]
        to norms [n].
      depth: the depth of the subtrees, at least 1: 2 for Flax's `{"params": {"Dense_0": …}}`. A
        leaf above that depth is a separate group. A subtree without leaves does not change.

    Returns:
      A tree prefix of `params` with a threshold for each group, for
      [`psclip_optax.clipped_value_and_grad`][] and [`psclip_optax.per_sample_clip`][].

    Raises:
      TypeError: the threshold is neither a number nor a callable.
      ValueError: the number is out of range, `depth` is no int of at least 1, or the tree has no
        leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> params = {"body": {"w": jnp.ones(3), "b": jnp.ones(1)}, "head": {"w": jnp.ones(3)}}
      >>> thresholds = psc.by_layer(params, psc.growing_threshold(alpha=2**0.5, beta=2.0))
      >>> print({name: one(jnp.array([1, 4])) for name, one in thresholds.items()})
      {'body': Array([1., 2.], dtype=float32), 'head': Array([1., 2.], dtype=float32)}

    References:
      He et al., [Exploring the Limits of Differentially Private Deep Learning with Group-wise
      Clipping](https://arxiv.org/abs/2212.01539), ICLR 2023.
    """
    if not is_integer(depth) or depth < 1:
        raise ValueError(f"by_layer expects an int of at least 1 as `depth`, got {depth!r}")
    threshold = as_threshold(threshold)
    marked = _marked(params, depth)
    number = len(jax.tree.leaves(marked))
    if not number:
        raise ValueError(f"by_layer makes groups of parameters, got a tree without any, {params!r}")
    share = _scaled(threshold, 1 / math.sqrt(number))
    return jax.tree.map(lambda _: share, marked)


def _marked(tree: PyTree, depth: int) -> PyTree:
    """Replace each subtree at that depth by 0, unless it has no leaves."""
    if depth == 0:
        return 0 if jax.tree.leaves(tree) else tree
    return jax.tree.map(
        lambda child: _marked(child, depth - 1), tree, is_leaf=lambda node: node is not tree
    )


def _scaled(threshold: Threshold, factor: float) -> Threshold:
    if isinstance(threshold, ConstantThreshold):
        return ConstantThreshold(threshold.value * factor)
    if isinstance(threshold, GrowingThreshold):
        return GrowingThreshold(threshold.alpha * factor, threshold.beta)
    # A Partial is a pytree, and so may be the threshold.
    return jax.tree_util.Partial(_times, threshold, factor)


def _times(threshold: Threshold, factor: jax.typing.ArrayLike, positions: jax.Array) -> jax.Array:
    return jnp.asarray(threshold(positions)) * factor


def is_threshold(node: object, node_types: frozenset[type] = frozenset()) -> bool:
    """Tell whether a node of a prefix is a threshold, and not a tree of thresholds.

    Args:
      node: a node of the prefix.
      node_types: the types of the parameters' nodes, which may be callable (Equinox's modules).
    """
    if isinstance(node, AdaptiveThreshold | ConstantThreshold | GrowingThreshold):
        return True
    return callable(node) and type(node) not in node_types


def is_prefix(threshold: ThresholdTree, node_types: frozenset[type] = frozenset()) -> bool:
    """Tell whether an argument is a tree of thresholds."""
    # A suggestion of psc.tails is a tuple that contains a threshold.
    has_one = hasattr(threshold, "threshold") and type(threshold) not in node_types
    if has_one or is_threshold(threshold, node_types):
        return False
    treedef = jax.tree.structure(threshold)
    return treedef.num_leaves > 0 and not jax.tree_util.treedef_is_leaf(treedef)


def as_thresholds(threshold: ThresholdLike | ThresholdTree) -> Threshold | ThresholdTree:
    """Replace numbers by constant thresholds, also within a tree."""
    if not is_prefix(threshold):
        return as_threshold(threshold)
    return jax.tree_util.tree_map_with_path(_as_threshold_at, threshold, is_leaf=is_threshold)


def _as_threshold_at(path: KeyPath, threshold: ThresholdTree) -> Threshold:
    try:
        return as_threshold(threshold)
    except (TypeError, ValueError) as error:
        error.add_note(f"It came as threshold{jax.tree_util.keystr(path)}, for a group of its own.")
        raise


def in_groups_of(
    prefix: Threshold | ThresholdTree | None, threshold: Threshold | ThresholdTree
) -> Threshold | ThresholdTree:
    """Repeat a threshold for each group of a prefix, unless it already has groups."""
    if is_prefix(threshold) or not is_prefix(prefix):
        return threshold
    return jax.tree.map(lambda _: threshold, prefix, is_leaf=is_threshold)


def fitted(
    threshold: ThresholdLike | ThresholdTree, params: PyTree, sample_axis: int | None = None
) -> Limits:
    """Return the limits that a threshold, or a tree of them, sets for these parameters.

    Args:
      threshold: a number, a callable, or a tree prefix of the parameters with one for each group.
      params: the parameters, or a tree of the same structure.
      sample_axis: the axis of samples, if that tree holds stacks of gradients.

    Raises:
      TypeError: a leaf of the prefix is no threshold.
      ValueError: the prefix does not fit, a group has no leaves, or the numbers of slices and of
        their thresholds differ.
    """
    node_types = _node_types(params)
    if not is_prefix(threshold, node_types):
        return Limits((as_threshold(threshold),), ALL_TOGETHER)

    def is_leaf(node: object) -> bool:
        return isinstance(node, EachSlice) or is_threshold(node, node_types)

    named, treedef = jax.tree_util.tree_flatten_with_path(threshold, is_leaf=is_leaf)
    try:
        parts = treedef.flatten_up_to(params)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "a tree of thresholds is a prefix of the parameters' tree, one for each subtree that "
            f"is clipped together, got {threshold!r} for parameters {described_tree(params)}; "
            "psc.by_layer(params, threshold) makes one"
        ) from error
    thresholds: list[Threshold] = []
    of_leaf: list[int] = []
    num_slices: list[int] = []
    for (path, node), part in zip(named, parts, strict=True):
        number = len(jax.tree.leaves(part))
        if not number:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"threshold{name} is for a group, but params{name} has no arrays to clip, got "
                f"{part!r}; leave it in the prefix as it is, without a threshold"
            )
        of_leaf += [len(thresholds)] * number
        num_slices += [_num_slices(node, path, part, sample_axis)] * number
        own = node.thresholds if isinstance(node, EachSlice) else [node]
        thresholds += [_as_threshold_at(path, one) for one in own]
    return Limits(tuple(thresholds), Groups(tuple(of_leaf), tuple(num_slices)))


def _num_slices(node: object, path: KeyPath, part: PyTree, sample_axis: int | None) -> int:
    """Count the slices that are groups; 0 if the group has whole leaves."""
    if not isinstance(node, EachSlice):
        return 0
    number = len(node.thresholds)
    for leaf in jax.tree.leaves(part):
        shape = [*jnp.shape(leaf)]
        if sample_axis is not None and -len(shape) <= sample_axis < len(shape):
            del shape[sample_axis]
        if shape[:1] != [number]:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"threshold{name} has {number} thresholds, one for each slice along the leading "
                f"axis of each leaf of params{name}, but one has shape {shape}; give each_slice as "
                "many as there are slices"
            )
    return number


def _node_types(tree: PyTree) -> frozenset[type]:
    found: set[type] = set()

    def note(node: object) -> bool:
        found.add(type(node))
        return False

    jax.tree.leaves(tree, is_leaf=note)
    return frozenset(found)


def has_rules(threshold: ThresholdTree) -> bool:
    """Tell whether an argument is a tree of thresholds, some of them adaptive."""
    if not is_prefix(threshold):
        return False
    leaves = jax.tree.leaves(threshold, is_leaf=is_threshold)
    return any(isinstance(leaf, AdaptiveThreshold) for leaf in leaves)


def fixed_rule(threshold: ThresholdLike | ThresholdTree) -> AdaptiveThreshold[tuple[()]]:
    """Make a rule without state that always returns this threshold (or tree of thresholds)."""
    fixed = as_thresholds(threshold)
    return AdaptiveThreshold(tuple, lambda state: fixed, lambda state, *_, **__: state)


def rule_by_group(prefix: ThresholdTree) -> AdaptiveThreshold[PyTree]:
    """Make one rule from a tree of rules; it takes norms [n, groups] and returns trees."""
    leaves, treedef = jax.tree.flatten(prefix, is_leaf=is_threshold)
    rules = [one if isinstance(one, AdaptiveThreshold) else fixed_rule(one) for one in leaves]

    def init() -> PyTree:
        return treedef.unflatten([rule.init() for rule in rules])

    def threshold(state: PyTree) -> ThresholdTree:
        both = zip(rules, treedef.flatten_up_to(state), strict=True)
        return treedef.unflatten([rule.threshold(one) for rule, one in both])

    def update(
        state: PyTree,
        norms: jax.typing.ArrayLike,
        sample_mask: jax.typing.ArrayLike | None = None,
        *,
        axis_name: AxisName = None,
    ) -> PyTree:
        expected = (
            "a tree of adaptive thresholds is updated with the norms of a batch by group, a float "
            f"array of shape [n, {len(rules)}] such as stats.norms of psc.ClipStats"
        )
        norms = as_array(norms, expected)
        if norms.ndim != 2 or norms.shape[1] != len(rules):
            raise ValueError(f"{expected}, got {described(norms)}")
        each = zip(rules, treedef.flatten_up_to(state), norms.T, strict=True)
        new = [rule.update(one, own, sample_mask, axis_name=axis_name) for rule, one, own in each]
        return treedef.unflatten(new)

    def is_new(state: PyTree) -> jax.Array:
        both = zip(rules, treedef.flatten_up_to(state), strict=True)
        return jnp.stack([rule.is_new(one) for rule, one in both if rule.is_new]).any()

    has_new = any(rule.is_new for rule in rules)
    return AdaptiveThreshold(init, threshold, update, is_new if has_new else None)
