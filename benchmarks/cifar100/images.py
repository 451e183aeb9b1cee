"""Normalizes, crops and mirrors images on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.cifar100.runs import Data

PADDING = 4  # the largest shift of a random crop, in pixels


def normalized(images: Any, factors: jax.Array, data: Data) -> jax.Array:
    unit = images.astype(jnp.float32) * (1 / 255 if images.dtype == jnp.uint8 else 1)
    return (unit * factors[:, None, None, None] - data.mean) / data.std


def shifted_and_mirrored(key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops images at random from padded ones, and mirrors each with probability 1/2."""
    shift_key, mirror_key = jax.random.split(key)
    n, *shape = images.shape
    corners = jax.random.randint(shift_key, (n, 2), 0, 2 * PADDING + 1)
    padded = jnp.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    cropped = jax.vmap(crop)(padded, corners)
    is_mirrored = jax.random.bernoulli(mirror_key, shape=(n, 1, 1, 1))
    return jnp.where(is_mirrored, cropped[:, :, ::-1], cropped)
