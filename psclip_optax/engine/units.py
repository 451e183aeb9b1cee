"""Describe the unit that is clipped: a single sample, or a micro-batch of consecutive samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


class Unit(NamedTuple):
    """Consecutive samples that are clipped together.

    Attributes:
      size: the number of samples; the last unit may have fewer.
      is_micro_batch: whether its mean gradient is clipped, even if it has one sample.
    """

    size: int = 1
    is_micro_batch: bool = False

    def number(self, num_samples: int) -> int:
        return -(-num_samples // self.size)

    def counting(self, counts: jax.Array) -> jax.Array:
        """Tell which units contain an unmasked sample, from bool [n]."""
        if self.size == 1:
            return counts
        number = self.number(counts.size)
        padded = jnp.pad(counts, (0, number * self.size - counts.size))
        return jnp.any(padded.reshape(number, self.size), axis=1)

    def of_each_sample(self, values: jax.Array, num_samples: int) -> jax.Array:
        """Repeat each unit's value for its samples: [units, …] → [n, …]."""
        return values if self.size == 1 else jnp.repeat(values, self.size, axis=0)[:num_samples]

    def sharded(self, by_sample: Any) -> Any:
        """Convert the sharding of an array of samples to that of an array of units."""
        return P() if self.is_micro_batch else by_sample
