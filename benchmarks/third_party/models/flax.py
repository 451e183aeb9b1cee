"""Takes layers of Flax that the project's tests do not use, in Linen and in NNX."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.third_party.building import normal, of_linen, of_nnx, squared, tokens
from benchmarks.third_party.common import Case, Model


class Convolutions(nn.Module):
    """Circular, transposed, masked and local convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", feature_group_count=2)(x)
        x = nn.max_pool(nn.swish(nn.WeightNorm(nn.Conv(4, (3, 3), kernel_dilation=2))(x)), (2, 2))
        x = nn.ConvTranspose(3, (3, 3), (2, 2))(x)
        x = nn.ConvLocal(2, (3, 3))(nn.InstanceNorm()(x))
        return nn.PReLU()(nn.DenseGeneral((2, 3), axis=(-3, -1))(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        x = nn.Embed(11, 4)(words)
        cells = (nn.OptimizedLSTMCell(4), nn.GRUCell(4), nn.MGUCell(4))
        zeros = jnp.zeros(4, x.dtype)
        backwards = nn.RNN(cells[1], reverse=True, keep_order=True)(x, initial_carry=zeros)
        x = nn.RNN(cells[0])(x, initial_carry=(zeros, zeros)) + backwards
        return nn.RNN(cells[2])(x, initial_carry=jnp.zeros(4, x.dtype))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        x = x + nn.SelfAttention(2)(nn.RMSNorm()(x), mask=mask)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x)))), None


class Decoder(nn.Module):
    """Layers in a scan, each rematerialised in the backward pass."""

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        table = nn.Embed(11, 8)
        mask = nn.make_causal_mask(words)

        scan = nn.scan(
            nn.remat(Block),
            {"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        return table.attend(scan()(table(words), mask)[0])


class Bilinear(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.lora = nnx.LoRALinear(4, 5, lora_rank=2, rngs=rngs)
        self.einsum = nnx.Einsum("ta,abc->tbc", (5, 2, 3), (2, 3), rngs=rngs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), update_stats=False, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.batch_norm(self.spectral(self.einsum(jnp.tanh(self.lora(x)))))


def low_rank() -> Case:
    module = Bilinear(nnx.Rngs(0))
    return of_nnx(module, normal(5, 4), call=lambda module, x: squared(module(x)))


MODELS = {
    "convolutions": Model(lambda: of_linen(Convolutions(), normal(8, 8, 4))),
    "recurrent cells": Model(lambda: of_linen(Recurrent(), tokens(6, 11))),
    "decoder in a scan": Model(lambda: of_linen(Decoder(), tokens(6, 11))),
    "NNX: low rank, spectral norm": Model(low_rank),
}
