"""Thresholds: from a sample's position in the batch to the largest norm its gradient may have.

A threshold is any callable from 1-based integer positions, shape `[n]`, to norms τ, shape
`[n]`. The two classes here are pytrees whose numbers may be traced, so that a threshold can be
an argument of a jitted function, be scheduled, batched by `jax.vmap` or differentiated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from psclip_optax.arrays import as_array, described, dtype_of

Threshold: TypeAlias = Callable[[jax.Array], jax.Array]
_Class = TypeVar("_Class", bound=type)


class AdaptiveThreshold(NamedTuple):
    """A threshold that follows the norms it has seen: three pure functions, as Optax has two.

    Between a batch and the next its state is the caller's to keep: it is a pytree of arrays, to be
    checkpointed, replicated over devices and carried through `jax.lax.scan`.

    Attributes:
      init: `init() -> state`, before any norm was seen.
      threshold: `threshold(state) -> threshold`, from the norms seen up to now; a pytree, and a
        callable from positions [n] to norms τ [n].
      update: `update(state, norms, sample_mask=None, *, axis_name=None) -> state`, after a batch
        with these norms, float [n]. Those that are masked (bool [n], False for padding) or not
        finite have no say; a batch without any that has leaves the state as it is. Under
        `jax.shard_map` `axis_name` is the mesh axis (or axes) over which the norms are
        sharded; the state is then that of the whole batch, the same on all devices.
    """

    init: Callable[[], Any]
    threshold: Callable[[Any], Threshold]
    update: Callable[..., Any]


_KEEPS_NO_STATE = (
    "an AdaptiveThreshold has a state, which is not kept here; expected a number or a callable "
    "from positions [n] to norms [n]. With clipped_value_and_grad(…, return_stats=True) keep it "
    "yourself: pass threshold=rule.threshold(state) to each call, then write "
    "state = rule.update(state, stats.norms, sample_mask). psc.per_sample_clip(rule) keeps it, and "
    "so do the train steps of an optimizer with psc.track_norms(rule)"
)

_SCALAR_POSITION = (
    "a threshold takes the positions of a batch's samples, an integer array of shape [n], but "
    "was called with a scalar. `optax.inject_hyperparams` does this to any callable, taking it "
    "for a schedule over steps: to schedule the numbers in a threshold, write "
    "`optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=…, alpha=…, beta=…)`, or pass a "
    "number or a schedule as `threshold`; to keep it as it is, add static_args=('threshold',)"
)


def concrete(x: Any) -> np.ndarray | None:
    """The value of `x`, or None while it is being traced, or is on other processes' devices."""
    try:
        return np.asarray(x)
    except (jax.errors.TracerArrayConversionError, RuntimeError):
        return None


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    lowest: float,
    highest: float = math.inf,
    open_ends: tuple[bool, bool] = (False, False),
) -> None:
    """Refuse what is no real scalar or, where the value is known, lies outside the interval."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    if not (isinstance(value, int | float) or is_array) or not _is_numeric(dtype_of(value)):
        raise TypeError(f"{owner} expects a real number as `{name}`, got {value!r}")
    if np.shape(value) or jnp.iscomplexobj(value):
        raise ValueError(
            f"{owner} expects a real scalar as `{name}`, got {described(value)}; for one threshold "
            "per sample pass a callable, `lambda k: taus[k - 1]`"
        )
    known = concrete(value)
    if known is None:
        return
    number = float(known)
    is_inside = lowest <= number <= highest
    if not is_inside or (number == lowest and open_ends[0]) or (number == highest and open_ends[1]):
        expected = f"{'>' if open_ends[0] else '>='} {lowest:g}"
        if highest < math.inf or open_ends[1]:
            expected += f" and {'<' if open_ends[1] else '<='} {highest:g}"
        raise ValueError(f"{owner} expects `{name}` {expected}, got {number:g}")


def _is_numeric(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.number)


def as_positions(positions: Any) -> jax.Array:
    positions = as_array(positions, "positions are 1-based integers k = 1, 2, …, of shape [n]")
    if positions.ndim == 0:
        raise TypeError(_SCALAR_POSITION)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            f"positions are 1-based integers k = 1, 2, …, but came as {described(positions)}; cast "
            "them with .astype(int)"
        )
    known = concrete(positions)
    if known is not None and (known < 1).any():
        raise ValueError(
            f"positions are 1-based, but the smallest that came is {known.min()}; write "
            "`jnp.arange(1, n + 1)`"
        )
    return positions


def _register_without_checks(cls: _Class) -> _Class:
    """Register a dataclass as a pytree that any leaves may be put back into.

    `jax.tree_util.register_dataclass` calls `__init__`, whose checks would refuse what JAX puts
    into such trees: cotangents (which may be negative), batched values, placeholders.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names], None

    def unflatten(_: None, leaves: Any) -> Any:
        node = object.__new__(cls)
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
        traced. 0 lets only zero gradients through unscaled, ∞ clips nothing.

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
        """τ for each of the 1-based integer `positions`, shape [n] → [n]."""
        self.__post_init__()
        positions = as_positions(positions)
        return jnp.full(positions.shape, self.value, dtype=jnp.result_type(float))


@_register_without_checks
@dataclasses.dataclass(frozen=True)
class GrowingThreshold:
    """A largest norm that grows with the sample's position in the batch: τ_k = α k^{1/β}.

    With α = σ and β = p, where the gradient noise has E‖∇f(x, ξ)‖^p ≤ σ^p for a p in (1, 2], the
    mean of the clipped gradients is the estimator of PS-Clip-SGD. It needs no batch size in
    advance: it is an anytime truncated mean.

    Args:
      alpha: the scale α, a real scalar ≥ 0 in the units of the gradient's norm; may be traced.
      beta: the growth β, a real scalar > 0, without unit; may be traced. ∞ means no growth.

    Raises:
      TypeError: a number is none; or, when called, the positions are not an integer array.
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
        """τ for each of the 1-based integer `positions`, shape [n] → [n]."""
        self.__post_init__()
        positions = as_positions(positions).astype(jnp.result_type(float))
        alpha = jnp.asarray(self.alpha, positions.dtype)
        beta = jnp.asarray(self.beta, positions.dtype)
        # A growth that overflows stays finite, for α = 0 would turn ∞ into NaN.
        growth = jnp.minimum(positions ** (1 / beta), jnp.finfo(positions.dtype).max)
        return alpha * growth


constant_threshold = ConstantThreshold
growing_threshold = GrowingThreshold


def _is_real(dtype: Any) -> bool:
    return _is_numeric(dtype) and not jnp.issubdtype(dtype, jnp.complexfloating)


def as_threshold(threshold: Threshold | jax.typing.ArrayLike) -> Threshold:
    """The threshold itself, or the constant one that a number stands for."""
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
    """Tell the smallest τ that a threshold gives at any position; None where it is not known."""
    if isinstance(threshold, ConstantThreshold):
        return concrete(threshold.value)
    return concrete(threshold.alpha) if isinstance(threshold, GrowingThreshold) else None


def thresholds_at(threshold: Threshold, positions: jax.Array, dtype: Any) -> jax.Array:
    """τ at `positions`, shape [n], checked and cast to `dtype`."""
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
