"""Tell what is clipped together: single samples, or micro-batches of consecutive ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


class Unit(NamedTuple):
    """So many consecutive samples, which are clipped together.

    Attributes:
      size: how many; of the last unit there may be fewer.
      is_micro_batch: whether its mean gradient is what is clipped, were it of one sample.
    """

    size: int = 1
    is_micro_batch: bool = False

    def number(self, num_samples: int) -> int:
        return -(-num_samples // self.size)

    def counting(self, counts: jax.Array) -> jax.Array:
        """Tell which units hold a sample that counts, from bool [n]."""
        if self.size == 1:
            return counts
        number = self.number(counts.size)
        padded = jnp.pad(counts, (0, number * self.size - counts.size))
        return jnp.any(padded.reshape(number, self.size), axis=1)

    def of_each_sample(self, values: jax.Array, num_samples: int) -> jax.Array:
        """Give each sample what its unit has: [units, …] → [n, …]."""
        return values if self.size == 1 else jnp.repeat(values, self.size, axis=0)[:num_samples]

    def sharded(self, by_sample: Any) -> Any:
        """Say how an array of units is sharded where one of samples is so."""
        return P() if self.is_micro_batch else by_sample
