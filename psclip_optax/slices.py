"""Clip by slice: each slice along the leading axis of stacked leaves has a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from psclip_optax.thresholds import AdaptiveThreshold, as_threshold
from psclip_optax.typing import PyTree, Threshold, ThresholdLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EachSlice:
    """A subtree of thresholds, one for each slice along the leading axis of its leaves.

    Attributes:
      thresholds: the thresholds, in the order of the slices.
    """

    thresholds: tuple[Threshold | AdaptiveThreshold[PyTree], ...]


def each_slice(
    thresholds: Sequence[ThresholdLike | AdaptiveThreshold[PyTree]],
) -> EachSlice:
    r"""Clip each slice along the leading axis separately, for layers stacked in one array.

    In a tree of thresholds it stands for a subtree of the parameters whose leaves have shapes [L,
    …]. Slice l of all these leaves is one group: layer l of a model that scans over its layers with
    `jax.lax.scan`. Norms and scales have L columns for these groups, in order.

    Args:
      thresholds: L thresholds, each as for a group in [`psclip_optax.clipped_value_and_grad`][]: a
        number, a threshold, or an adaptive threshold where those are accepted.

    Returns:
      A subtree for a tree prefix of the parameters.

    Raises:
      TypeError: the thresholds are no sequence, or one is neither a number nor a callable.
      ValueError: there are none, or a number is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> loss = lambda params, x: jnp.sum(params["layers"] @ x) + params["bias"] * x[0]
      >>> params = {"layers": jnp.ones((2, 3, 4)), "bias": jnp.ones(())}
      >>> thresholds = {"layers": psc.each_slice([0.5, 1.0]), "bias": 1.0}
      >>> f = psc.clipped_value_and_grad(loss, thresholds, return_stats=True)
      >>> _, grads, stats = f(params, jnp.ones((8, 4)))
      >>> print(*(f"{scale:.3f}" for scale in stats.scales[0]))
      1.000 0.144 0.289

    References:
      He et al., [Exploring the Limits of Differentially Private Deep Learning with Group-wise
      Clipping](https://arxiv.org/abs/2212.01539), ICLR 2023.
    """
    if not isinstance(thresholds, Sequence) or isinstance(thresholds, str):
        raise TypeError(
            "each_slice expects a sequence of thresholds, one for each slice, such as [0.5] * 12, "
            f"got {thresholds!r}"
        )
    if not thresholds:
        raise ValueError("each_slice expects a threshold for each slice, got none")
    return EachSlice(tuple(_as_given(one) for one in thresholds))


def _as_given(
    threshold: ThresholdLike | AdaptiveThreshold[PyTree],
) -> Threshold | AdaptiveThreshold[PyTree]:
    return threshold if isinstance(threshold, AdaptiveThreshold) else as_threshold(threshold)
