"""Check the numbers that define thresholds, and the positions passed to them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from psclip_optax.arrays import as_array, described, dtype_of

_SCALAR_POSITION = (
    "a threshold takes the positions of a batch's samples, an integer array of shape [n], but "
    "was called with a scalar. `optax.inject_hyperparams` does this to any callable, taking it "
    "for a schedule over steps: to schedule the numbers in a threshold, write "
    "`optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=…, alpha=…, beta=…)`, or pass a "
    "number or a schedule as `threshold`; to keep it as it is, add static_args=('threshold',)"
)


def concrete(x: object) -> np.ndarray | None:
    """Return the value of `x`; None if it is traced or on other processes' devices."""
    try:
        return np.asarray(x)
    except (jax.errors.TracerArrayConversionError, RuntimeError):
        return None


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    lowest: float,
    highest: float = math.inf,
    open_ends: tuple[bool, bool] = (False, False),
) -> None:
    """Refuse a value that is no real scalar or is known to be outside the interval."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    if not (isinstance(value, int | float) or is_array) or not is_numeric(dtype_of(value)):
        raise TypeError(f"{owner} expects a real number as `{name}`, got {value!r}")
    if np.shape(value) or jnp.issubdtype(dtype_of(value), jnp.complexfloating):
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


def is_numeric(dtype: jax.typing.DTypeLike | None) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.number)


def as_positions(positions: jax.typing.ArrayLike) -> jax.Array:
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
