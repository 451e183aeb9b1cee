"""Takes the Flax models of Hugging Face's diffusers, from tiny configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import jax
import jax.numpy as jnp

from benchmarks.third_party.building import KEY, normal, squared
from benchmarks.third_party.common import Case, Model


def denoised() -> Case:
    """Predicts the noise of an image, given a text's states."""
    module = diffusers.FlaxUNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=6,
    )

    def loss(params: Any, image: jax.Array, noise: jax.Array, text: jax.Array) -> jax.Array:
        time = jnp.array([3])
        found = module.apply({"params": params}, image[None] + noise[None], time, text[None]).sample
        return jnp.square(found[0] - noise).sum()

    batch = normal(2, 8, 8), normal(2, 8, 8, seed=2), normal(3, 6)
    return Case(loss, module.init_weights(KEY), batch, spread=0.02)


def encoded() -> Case:
    """Encodes an image and decodes it again."""
    module = diffusers.FlaxAutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=8,
        dtype=jnp.float64,
    )

    def loss(params: Any, image: jax.Array) -> jax.Array:
        return squared(module.apply({"params": params}, image[None]).sample[0])

    return Case(loss, module.init_weights(KEY), (normal(3, 8, 8),), spread=0.02)


MODELS = {
    "conditional UNet": Model(denoised, "float32"),  # it embeds times in float32
    "autoencoder": Model(encoded),
}
