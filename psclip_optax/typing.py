"""Name the types in public signatures, for use in annotations.

The results of `clipped_value_and_grad` are typed: the gradient has the type of the call's
parameters, and the other results follow from `has_aux` and `return_stats`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

# Any class may be registered as a container, so Python's types cannot describe pytrees.
PyTree: TypeAlias = Any
"""A pytree of JAX: arrays, and containers of them that JAX knows."""

Params: TypeAlias = PyTree
"""Parameters: a pytree of real floating-point arrays."""

Batch: TypeAlias = PyTree
"""An argument behind the parameters: a pytree of arrays with the samples along one axis."""

AxisName: TypeAlias = Hashable
"""The name of a mesh axis, or a tuple of names; None for no axis."""

InAxes: TypeAlias = int | Sequence[PyTree] | None
"""Where the samples lie, as `jax.vmap` takes it: an axis, None, or one of them an argument."""

Threshold: TypeAlias = Callable[[jax.Array], jax.Array]
"""A callable from 1-based positions, int [n], to norms τ, float [n]."""

ThresholdLike: TypeAlias = Threshold | jax.typing.ArrayLike
"""A threshold, or a number, which stands for the same one at all positions."""

ThresholdTree: TypeAlias = PyTree
"""A tree prefix of the parameters with a threshold for each group of leaves."""

Loss: TypeAlias = Callable[..., jax.typing.ArrayLike]
"""A loss of one example, `loss(params, *example)`."""

ParamsT = TypeVar("ParamsT")
AuxT = TypeVar("AuxT")
ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)

LossWithAux: TypeAlias = Callable[..., tuple[jax.typing.ArrayLike, AuxT]]
"""A loss of one example that returns `(loss, aux)`."""
