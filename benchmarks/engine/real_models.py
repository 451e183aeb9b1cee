"""Builds models of realistic size, each with a loss for one example.

Parameters are float32. Every loss passes its network a batch of one, like code written for batches.
Nothing is allocated until parameters or a batch are requested: `Model.abstract` has the shapes of a
model of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import psclip_optax as psc
from psclip_optax.training.models.classifiers import build_model

Size = Literal["tiny", "small", "full"]
COMPUTE = jnp.bfloat16
# Flax's name for the stack of a scan over rematerialised layers.
_STACKED = "Checkpoint"


class Model(NamedTuple):
    """A loss, and functions that make its arguments.

    Attributes:
      name: the name in tables.
      loss: `loss(params, *example)`, for one example.
      batch_loss: `batch_loss(params, *batch)`, the mean loss written for a batch.
      make_params: key → initial parameters, float32.
      make_batch: (key, n) → the arguments after `params`, samples on axis 0.
      n: its usual batch size.
    """

    name: str
    loss: Callable[..., jax.Array]
    batch_loss: Callable[..., jax.Array]
    make_params: Callable[[jax.Array], Any]
    make_batch: Callable[[jax.Array, int], tuple[jax.Array, ...]]
    n: int

    def abstract(self) -> tuple[Any, ...]:
        """Returns the shapes of (params, *batch)."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = jax.eval_shape(lambda key: self.make_batch(key, self.n), key)
        return jax.eval_shape(self.make_params, key), *batch


def of_one_and_all(
    losses: Callable[..., jax.Array],
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Makes a loss for one example and the mean loss of a batch from `losses(params, *batch)`."""

    def loss(params: Any, *example: jax.Array) -> jax.Array:
        return losses(params, *(array[None] for array in example))[0]

    def batch_loss(params: Any, *batch: jax.Array) -> jax.Array:
        return losses(params, *batch).mean()

    return loss, batch_loss


def classifier(
    name: str, network: nn.Module, shape: tuple[int, ...], num_classes: int, n: int
) -> Model:
    """Builds a model of images [H, W, C] and their labels."""

    def losses(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = network.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def make_params(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *shape)))["params"]

    def make_batch(key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        return jax.random.normal(key, (n, *shape)), jnp.arange(n) % num_classes

    return Model(name, *of_one_and_all(losses), make_params, make_batch, n)


def language_model(name: str, network: nn.Module, vocabulary: int, length: int, n: int) -> Model:
    """Builds a model of the next token of texts [T + 1]."""

    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = network.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(axis=1)

    def make_params(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, length), jnp.int32))["params"]

    def make_batch(key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        return (jax.random.randint(key, (n, length + 1), 0, vocabulary),)

    return Model(name, *of_one_and_all(losses), make_params, make_batch, n)


# Networks


class Attention(nn.Module):
    """Self-attention with one product for queries, keys and values."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *batch, dim = x.shape
        joint = nn.Dense(3 * dim, dtype=COMPUTE)(x)
        query, key, value = jnp.moveaxis(
            joint.reshape(*batch, 3, self.heads, dim // self.heads), -3, 0
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        return nn.Dense(dim, dtype=COMPUTE)(mixed.reshape(x.shape))


class Block(nn.Module):
    """Transformer block that normalises before attention and before the hidden layer."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        x = x + Attention(self.heads, self.causal)(nn.LayerNorm(dtype=COMPUTE)(x))
        hidden = nn.Dense(4 * dim, dtype=COMPUTE)(nn.LayerNorm(dtype=COMPUTE)(x))
        return x + nn.Dense(dim, dtype=COMPUTE)(nn.gelu(hidden))


class VisionTransformer(nn.Module):
    """ViT without a class token: the mean over the patches is classified."""

    num_classes: int
    patch: int
    dim: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        window = (self.patch, self.patch)
        x = nn.Conv(self.dim, window, strides=window, dtype=COMPUTE)(images)
        x = x.reshape(*x.shape[:-3], -1, self.dim)
        place = self.param("position", nn.initializers.normal(0.02), x.shape[-2:])
        x = x + place.astype(COMPUTE)
        for _ in range(self.layers):
            x = Block(self.heads, causal=False)(x)
        # In float32 from here on, because logits in bfloat16 have two or three digits.
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=-2))


class ResidualBlock(nn.Module):
    """Bottleneck of ResNet-50, with group normalisation, which is independent for each sample."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(normalized_convolution(x, self.channels, 1))
        y = nn.relu(normalized_convolution(y, self.channels, 3, self.stride))
        y = normalized_convolution(y, 4 * self.channels, 1)
        if x.shape != y.shape:
            x = normalized_convolution(x, 4 * self.channels, 1, self.stride)
        return nn.relu(x + y)


def normalized_convolution(x: jax.Array, channels: int, size: int, stride: int = 1) -> jax.Array:
    """Adds a convolution and its group normalisation to the module that calls it."""
    x = nn.Conv(channels, (size, size), stride, use_bias=False, dtype=COMPUTE)(x)
    groups = math.gcd(32, channels)
    return nn.GroupNorm(groups, dtype=COMPUTE, reduction_axes=(-3, -2, -1))(x)


class ResNet(nn.Module):
    """ResNet of bottlenecks; `blocks` has the number of each stage."""

    num_classes: int
    channels: int
    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(normalized_convolution(images, self.channels, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, number in enumerate(self.blocks):
            for block in range(number):
                stride = 2 if stage and not block else 1
                x = ResidualBlock(self.channels * 2**stage, stride)(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(-3, -2)).astype(jnp.float32))


class Bert(nn.Module):
    """BERT, which predicts each token of a text; it normalises after each residual."""

    vocabulary: int
    length: int
    dim: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocabulary, self.dim, dtype=COMPUTE)
        shape = (self.length, self.dim)
        place = self.param("position", nn.initializers.normal(0.02), shape)
        x = nn.LayerNorm(dtype=COMPUTE)(table(tokens) + place.astype(COMPUTE))
        for _ in range(self.layers):
            mixed = Attention(self.heads, causal=False)(x)
            x = nn.LayerNorm(dtype=COMPUTE)(x + mixed)
            hidden = nn.gelu(nn.Dense(4 * self.dim, dtype=COMPUTE)(x))
            x = nn.LayerNorm(dtype=COMPUTE)(x + nn.Dense(self.dim, dtype=COMPUTE)(hidden))
        x = nn.gelu(nn.Dense(self.dim, dtype=COMPUTE)(x))
        logits = table.attend(nn.LayerNorm(dtype=COMPUTE)(x)).astype(jnp.float32)
        return logits + self.param("bias", nn.initializers.zeros, (self.vocabulary,))


class LlamaBlock(nn.Module):
    """Block of a Llama: rotated queries and keys, fewer of the latter, a gated hidden layer."""

    heads: int
    key_heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *batch, dim = x.shape
        size = dim // self.heads

        def project(x: jax.Array, heads: int) -> jax.Array:
            return dense(heads * size)(x).reshape(*batch, heads, size)

        h = nn.RMSNorm(dtype=COMPUTE)(x)
        query, key = rotated(project(h, self.heads)), rotated(project(h, self.key_heads))
        value = project(h, self.key_heads)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(dim)(mixed.reshape(x.shape))
        h = nn.RMSNorm(dtype=COMPUTE)(x)
        gate = nn.silu(dense(self.hidden)(h))
        return x + dense(dim)(gate * dense(self.hidden)(h))


def dense(features: int) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=COMPUTE)


def rotated(x: jax.Array) -> jax.Array:
    """Turns pairs of features [..., T, heads, size] by angles that grow with the position."""
    length, _, size = x.shape[-3:]
    speeds = 1e4 ** (-jnp.arange(0, size, 2) / size)
    angles = (jnp.arange(length)[:, None] * speeds)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Llama(nn.Module):
    """Llama-like model, its block scanned over the layers and rematerialised."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    key_heads: int
    hidden: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.dim, dtype=COMPUTE)(tokens)
        block = nn.remat(LlamaBlock, prevent_cse=False)
        x = scanned(block(self.heads, self.key_heads, self.hidden), x, self.layers)
        logits = dense(self.vocabulary)(nn.RMSNorm(dtype=COMPUTE)(x))
        return logits.astype(jnp.float32)


def scanned(block: nn.Module, x: jax.Array, layers: int) -> jax.Array:
    """Applies a block `layers` times, each time with other parameters."""
    scan = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=layers,
    )
    return scan(block, x, None)[0]


class GPT2(nn.Module):
    """GPT-2, with its embedding tied to the output layer.

    Attributes:
      scanned: whether one block is scanned over the layers and rematerialised, instead of one per
      layer.
    """

    vocabulary: int
    length: int
    dim: int
    layers: int
    heads: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocabulary, self.dim, dtype=COMPUTE)
        shape = (self.length, self.dim)
        place = self.param("position", nn.initializers.normal(0.02), shape)
        x = self.blocks(table(tokens) + place.astype(COMPUTE))
        return table.attend(nn.LayerNorm(dtype=COMPUTE)(x)).astype(jnp.float32)

    def blocks(self, x: jax.Array) -> jax.Array:
        if not self.scanned:
            for _ in range(self.layers):
                x = Block(self.heads, causal=True)(x)
            return x
        block = nn.remat(Block, prevent_cse=False)
        return scanned(block(self.heads, causal=True), x, self.layers)


def by_layer(params: Any, threshold: float) -> Any:
    """Makes a threshold for each layer, also in scans, with the sensitivity of one threshold."""
    if not isinstance(params, dict):
        return psc.by_layer(params, threshold)
    layers = {
        name: jax.tree.leaves(own)[0].shape[0] if name.startswith(_STACKED) else 1
        for name, own in params.items()
    }
    each = threshold / math.sqrt(sum(layers.values()))
    return {
        name: psc.each_slice([each] * number) if name.startswith(_STACKED) else each
        for name, number in layers.items()
    }


# Models


def alexnet(size: Size = "full") -> Model:
    """Builds AlexNet for images of CIFAR-100, in float32 as the comparisons train it."""
    width, n = {"tiny": (0.05, 4), "small": (0.25, 32), "full": (1.0, 128)}[size]
    return classifier("AlexNet", build_model("alexnet", 100, width=width), (32, 32, 3), 100, n)


def vit_b16(size: Size = "full") -> Model:
    dim, layers, heads, side, n = {
        "tiny": (16, 2, 2, 32, 4),
        "small": (192, 4, 3, 96, 8),
        "full": (768, 12, 12, 224, 32),
    }[size]
    network = VisionTransformer(1000, 16, dim, layers, heads)
    return classifier("ViT-B/16", network, (side, side, 3), 1000, n)


def gpt2(size: Size = "full", *, scanned: bool = False) -> Model:
    """Builds GPT-2 with 124 million parameters, its vocabulary padded to a multiple of 128."""
    vocabulary, length, dim, layers, heads, n = {
        "tiny": (50, 8, 16, 2, 2, 4),
        "small": (8192, 128, 256, 4, 4, 16),
        "full": (50_304, 1024, 768, 12, 12, 8),
    }[size]
    network = GPT2(vocabulary, length, dim, layers, heads, scanned)
    name = "GPT-2, scanned" if scanned else "GPT-2"
    return language_model(name, network, vocabulary, length, n)


def resnet50(size: Size = "full") -> Model:
    channels, blocks, side, n = {
        "tiny": (4, (1, 1), 32, 4),
        "small": (16, (1, 1, 1, 1), 96, 8),
        "full": (64, (3, 4, 6, 3), 224, 32),
    }[size]
    return classifier("ResNet-50", ResNet(1000, channels, blocks), (side, side, 3), 1000, n)


def bert_base(size: Size = "full") -> Model:
    """Builds BERT-base with padded vocabulary; it predicts the next token, at the same cost."""
    vocabulary, length, dim, layers, heads, n = {
        "tiny": (50, 8, 16, 2, 2, 4),
        "small": (8192, 64, 256, 4, 4, 16),
        "full": (30_592, 128, 768, 12, 12, 32),
    }[size]
    network = Bert(vocabulary, length, dim, layers, heads)
    return language_model("BERT-base", network, vocabulary, length, n)


def llama_1b(size: Size = "full") -> Model:
    """Builds a Llama-like model of 1.1 billion parameters."""
    vocabulary, length, dim, layers, heads, key_heads, hidden, n = {
        "tiny": (50, 8, 16, 2, 4, 2, 32, 4),
        "small": (8192, 128, 256, 4, 4, 2, 688, 8),
        "full": (32_000, 2048, 2048, 22, 32, 4, 5632, 4),
    }[size]
    network = Llama(vocabulary, dim, layers, heads, key_heads, hidden)
    return language_model("Llama-1B", network, vocabulary, length, n)
