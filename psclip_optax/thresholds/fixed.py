"""Define thresholds that are known in advance: constant, or growing with the position.

Both classes are pytrees whose numbers may be traced. So a threshold can be an argument of a jitted
function, and can be scheduled, batched by `jax.vmap` or differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from psclip_optax.arrays import as_array, described
from psclip_optax.thresholds.checks import as_positions, check_number, concrete, is_numeric
from psclip_optax.thresholds.interface import AdaptiveThreshold
from psclip_optax.typing import Threshold, ThresholdLike

_Class = TypeVar("_Class", bound=type)

_KEEPS_NO_STATE = (
    "an AdaptiveThreshold has a state, which is not kept here; expected a number or a callable "
    "from positions [n] to norms [n]. With clipped_value_and_grad(…, return_stats=True) keep it "
    "yourself: pass threshold=rule.threshold(state) to each call, then write "
    "state = rule.update(state, stats.norms, sample_mask). psc.per_sample_clip(rule) keeps it, and "
    "so do the train steps of an optimizer with psc.track_norms(rule)"
)


def _register_without_checks(cls: _Class) -> _Class:
    """Register a dataclass as a pytree that can be rebuilt with any leaves.

    `jax.tree_util.register_dataclass` calls `__init__`, whose checks would refuse values that JAX
    puts into such trees: cotangents (which may be negative), batched values, placeholders.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten_with_keys(node: object) -> tuple[list[tuple[object, object]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names], None

    def unflatten(_: None, leaves: Iterable[object]) -> object:
        node: object = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(node, name, leaf)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@_register_without_checks
@dataclasses.dataclass(frozen=True)
class ConstantThreshold:
    """The same largest norm for every sample: τ_k = value.

    Args:
      value: the largest norm, a real scalar ≥ 0 in the units of the gradient's norm; may be
        traced. 0 makes every gradient zero, ∞ clips nothing.

    Raises:
      TypeError: `value` is not a number; or, when called, the positions are not an integer array.
      ValueError: `value` is negative, NaN or not a scalar, or a position is below 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> psc.constant_threshold(5.0)(jnp.arange(1, 4))
      Array([5., 5., 5.], dtype=float32)
    """

    value: jax.typing.ArrayLike

    def __post_init__(self) -> None:
        check_number("constant_threshold", "value", self.value, lowest=0)

    def __call__(self, positions: jax.typing.ArrayLike) -> jax.Array:
        """Return τ for each of the 1-based integer `positions`, shape [n] → [n]."""
        self.__post_init__()
        positions = as_positions(positions)
        return jnp.full(positions.shape, self.value, dtype=jnp.result_type(float))


@_register_without_checks
@dataclasses.dataclass(frozen=True)
class GrowingThreshold:
    """A largest norm that grows with the sample's position in the batch: τ_k = α k^{1/β}.

    With α = σ and β = p, where E‖∇f(x, ξ)‖^p ≤ σ^p for a p in (1, 2], the mean of the clipped
    gradients is the estimator of PS-Clip-SGD. It does not depend on the batch size: it is an
    anytime truncated mean.

    Args:
      alpha: the scale α, a real scalar ≥ 0 in the units of the gradient's norm; may be traced.
      beta: the growth β, a real scalar > 0, without unit; may be traced. ∞ means no growth.

    Raises:
      TypeError: α or β is no number; or, when called, the positions are not an integer array.
      ValueError: α < 0, β ≤ 0, NaN, not a scalar, or a position below 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> psc.growing_threshold(alpha=2.0, beta=2.0)(jnp.array([1, 4, 9]))
      Array([2., 4., 6.], dtype=float32)

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026 (the estimator's γ_k).

      Bubeck, Cesa-Bianchi and Lugosi, [Bandits with Heavy Tail](https://arxiv.org/abs/1209.1727),
      2013 (the truncated mean).
    """

    alpha: jax.typing.ArrayLike
    beta: jax.typing.ArrayLike

    def __post_init__(self) -> None:
        check_number("growing_threshold", "alpha", self.alpha, lowest=0)
        check_number("growing_threshold", "beta", self.beta, lowest=0, open_ends=(True, False))

    def __call__(self, positions: jax.typing.ArrayLike) -> jax.Array:
        """Return τ for each of the 1-based integer `positions`, shape [n] → [n]."""
        self.__post_init__()
        positions = as_positions(positions).astype(jnp.result_type(float))
        alpha = jnp.asarray(self.alpha, positions.dtype)
        beta = jnp.asarray(self.beta, positions.dtype)
        # The growth is clamped to a finite value if it overflows: for α = 0, 0 · ∞ would be NaN.
        growth = jnp.minimum(positions ** (1 / beta), jnp.finfo(positions.dtype).max)
        return alpha * growth


constant_threshold = ConstantThreshold
growing_threshold = GrowingThreshold


def _is_real(dtype: jax.typing.DTypeLike) -> bool:
    return is_numeric(dtype) and not jnp.issubdtype(dtype, jnp.complexfloating)


def as_threshold(threshold: ThresholdLike) -> Threshold:
    """Return the threshold itself, or the constant threshold for a number."""
    if isinstance(threshold, AdaptiveThreshold):
        raise TypeError(_KEEPS_NO_STATE)
    if callable(threshold):
        return threshold
    try:
        return ConstantThreshold(threshold)
    except TypeError:
        has_one = " with a threshold of its own; pass its .threshold"
        raise TypeError(
            "a threshold is a number or a callable from positions [n] to norms [n], got "
            f"{threshold!r}{has_one if hasattr(threshold, 'threshold') else ''}"
        ) from None


def least_norm(threshold: Threshold) -> np.ndarray | None:
    """Return the smallest τ of a threshold over all positions; None if it is not known."""
    if isinstance(threshold, ConstantThreshold):
        return concrete(threshold.value)
    return concrete(threshold.alpha) if isinstance(threshold, GrowingThreshold) else None


def thresholds_at(
    threshold: Threshold, positions: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Return τ at `positions`, shape [n], checked and cast to `dtype`."""
    try:
        came = threshold(positions)
    except Exception as error:
        error.add_note(
            f"The threshold {threshold!r} was called with positions, {described(positions)}, for a "
            "norm at each."
        )
        raise
    expected = (
        f"a threshold gives one real norm per position, {list(positions.shape)} of them from "
        f"{threshold!r}"
    )
    taus = as_array(came, expected)
    if taus.shape != positions.shape or not _is_real(taus.dtype):
        raise ValueError(
            f"{expected}, got {described(taus)}; a number stands for the same at all positions"
        )
    known = concrete(taus)
    if known is not None and not (known >= 0).all():
        raise ValueError(
            f"a threshold's norms are ≥ 0 and not NaN, but {threshold!r} gave "
            f"{known[~(known >= 0)][0]}; write α ≥ 0, or clamp it with jnp.maximum(…, 0)"
        )
    return taus.astype(dtype)
