"""Compute running means and moments of norms, in which earlier batches are discounted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RunningMean(NamedTuple):
    """Holds a mean over batches; each update discounts the earlier batches by the decay.

    Attributes:
      weight: float, the sum of the weights; 0 before the first batch.
      mean: float, the weighted mean.
    """

    weight: jax.Array
    mean: jax.Array


class RunningMoment(NamedTuple):
    """Holds roots of mean powers of the norms seen, (mean ‖g‖^p)^{1/p}.

    Attributes:
      weight: float, the discounted number of norms.
      root: float, in the units of a norm; shape [m] for m orders p.
    """

    weight: jax.Array
    root: jax.Array


def zeros(shape: Sequence[int] = ()) -> jax.Array:
    return jnp.zeros(shape, jnp.result_type(float))


def _weigh(
    weight: jax.Array, amount: jax.typing.ArrayLike, decay: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Return the new weight, and the share of the new batch in it."""
    amount = jnp.asarray(amount, weight.dtype)
    weight = weight * decay + amount
    return weight, amount / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)


def observe_mean(
    running: RunningMean,
    value: jax.Array,
    amount: jax.typing.ArrayLike,
    decay: jax.typing.ArrayLike,
) -> RunningMean:
    weight, share = _weigh(running.weight, amount, decay)
    return RunningMean(weight, running.mean + share * (value - running.mean))


def observe_moment(
    running: RunningMoment,
    norms: jax.Array,
    counts: jax.Array,
    orders: jax.typing.ArrayLike,
    decay: jax.typing.ArrayLike,
) -> RunningMoment:
    number = jnp.sum(counts)
    weight, share = _weigh(running.weight, number, decay)
    orders = jnp.asarray(orders, norms.dtype)
    # Relative to the largest norm, so that no power overflows.
    largest = jnp.maximum(jnp.max(norms, initial=0), running.root)
    unit = jnp.where(largest > 0, largest, 1)
    behind_orders = (*[1] * orders.ndim, -1)
    powers = (norms.reshape(behind_orders) / unit[..., None]) ** orders[..., None]
    counted = jnp.where(counts.reshape(behind_orders), powers, 0)
    mean = jnp.sum(counted, axis=-1) / jnp.maximum(number, 1).astype(norms.dtype)
    before = (running.root / unit) ** orders
    return RunningMoment(weight, unit * ((1 - share) * before + share * mean) ** (1 / orders))
