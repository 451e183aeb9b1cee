"""Models of the sizes that people train, each a loss of one example, in bfloat16 where they are.

Parameters are float32. Every loss gives its network a batch of one, as code written for batches
does. Nothing is allocated until parameters or a batch are asked for: `Model.abstract` has the
shapes of a model of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from psclip_optax.training.models import build_model

Size = Literal["tiny", "small", "full"]
COMPUTE = jnp.bfloat16


class Model(NamedTuple):
    """A loss, and what makes its arguments.

    Attributes:
      name: in tables.
      loss: `loss(params, *example)`, of one example.
      make_params: key → initial parameters, float32.
      make_batch: (key, n) → the arguments after `params`, samples on axis 0.
      n: samples in its usual batch.
    """

    name: str
    loss: Callable[..., jax.Array]
    make_params: Callable[[jax.Array], Any]
    make_batch: Callable[[jax.Array, int], tuple[jax.Array, ...]]
    n: int

    def abstract(self) -> tuple[Any, ...]:
        """Shapes of (params, *batch)."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = jax.eval_shape(lambda key: self.make_batch(key, self.n), key)
        return jax.eval_shape(self.make_params, key), *batch


def classifier(
    name: str, network: nn.Module, shape: tuple[int, ...], num_classes: int, n: int
) -> Model:
    """Model of images [H, W, C] and their labels."""

    def loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, image[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def make_params(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *shape)))["params"]

    def make_batch(key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        return jax.random.normal(key, (n, *shape)), jnp.arange(n) % num_classes

    return Model(name, loss, make_params, make_batch, n)


def language_model(name: str, network: nn.Module, vocabulary: int, length: int, n: int) -> Model:
    """Model of the next token of texts [T + 1]."""

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, tokens[None, :-1])[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
        return losses.mean()

    def make_params(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, length), jnp.int32))["params"]

    def make_batch(key: jax.Array, n: int) -> tuple[jax.Array, ...]:
        return (jax.random.randint(key, (n, length + 1), 0, vocabulary),)

    return Model(name, loss, make_params, make_batch, n)


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
        # In float32 from here on, for logits of bfloat16 have two or three digits.
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=-2))


class GPT2(nn.Module):
    """GPT-2, with the table of the tokens for the logits as well.

    Attributes:
      scanned: one block scanned over the layers and rematerialised, instead of a block a layer.
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
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        block = nn.remat(Block, prevent_cse=False)
        return scan(block(self.heads, causal=True), x, None)[0]


# Models


def alexnet(size: Size = "full") -> Model:
    """AlexNet for images of CIFAR-100, in float32 as the comparisons train it."""
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
    """GPT-2 of 124 million parameters, its vocabulary filled up to a multiple of 128."""
    vocabulary, length, dim, layers, heads, n = {
        "tiny": (50, 8, 16, 2, 2, 4),
        "small": (8192, 128, 256, 4, 4, 16),
        "full": (50_304, 1024, 768, 12, 12, 8),
    }[size]
    network = GPT2(vocabulary, length, dim, layers, heads, scanned)
    name = "GPT-2, scanned" if scanned else "GPT-2"
    return language_model(name, network, vocabulary, length, n)
