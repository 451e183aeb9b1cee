"""Builds the models for tests and benchmarks of the engine, each with a loss for one example.

Every builder takes a size, "small" for tests and "full" for benchmarks, and returns a `Model`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss

Size = Literal["small", "full"]


class Model(NamedTuple):
    """A loss, its parameters, and batches for it.

    Attributes:
      loss: `loss(params, *example)`, for one example.
      params: initial parameters, float32.
      batch: a function from a number of samples to the arguments after `params`, samples on axis 0.
    """

    loss: Callable[..., Any]
    params: Any
    batch: Callable[[int], tuple[Any, ...]]


def _images(shape: tuple[int, ...], num_classes: int) -> Callable[[int], tuple[Any, ...]]:
    def batch(n: int) -> tuple[Any, ...]:
        images = jax.random.normal(jax.random.key(1), (n, *shape))
        return images, jnp.arange(n) % num_classes

    return batch


def _tokens(length: int, vocabulary: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda n: (jax.random.randint(jax.random.key(1), (n, length + 1), 0, vocabulary),)


def _classifier(module: nn.Module, shape: tuple[int, ...], num_classes: int) -> Model:
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    loss = classification_loss(module)
    return Model(lambda *args: loss(*args)[0], params, _images(shape, num_classes))


def _library_model(
    name: str, shape: tuple[int, ...], widths: tuple[float, float]
) -> Callable[[Size], Model]:
    def build(size: Size) -> Model:
        classes = 10 if size == "small" else 100
        width = widths[size == "full"]
        return _classifier(build_model(name, classes, width=width), shape, classes)

    return build


# Transformers


class Block(nn.Module):
    dim: int
    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        attention = nn.MultiHeadDotProductAttention(self.heads)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * self.dim)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.dim)(hidden)


class GPT(nn.Module):
    vocabulary: int
    dim: int
    layers: int
    heads: int
    tied: bool
    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocabulary, self.dim)
        position = self.param("position", nn.initializers.normal(0.02), (tokens.size, self.dim))
        x = self.blocks(table(tokens) + position)
        x = nn.LayerNorm()(x)
        return table.attend(x) if self.tied else nn.Dense(self.vocabulary, use_bias=False)(x)

    def blocks(self, x: jax.Array) -> jax.Array:
        if not self.scanned:
            for _ in range(self.layers):
                x = Block(self.dim, self.heads)(x)
            return x
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return scan(nn.remat(Block)(self.dim, self.heads), x, None)[0]


def gpt(*, tied: bool, scanned: bool, length: int | None = None) -> Callable[[Size], Model]:
    def build(size: Size) -> Model:
        small = size == "small"
        module = GPT(
            50 if small else 8000, 16 if small else 256, 2 if small else 4, 4, tied, scanned
        )
        steps = length or (7 if small else 128)
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(steps, int))["params"]

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            logits: Any = module.apply({"params": params}, tokens[:-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

        return Model(loss, params, _tokens(steps, module.vocabulary))

    return build


class ViT(nn.Module):
    num_classes: int
    dim: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = nn.Conv(self.dim, (4, 4), strides=(4, 4))(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x = Block(self.dim, 4, causal=False)(x)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=1))


def vit(size: Size) -> Model:
    small = size == "small"
    shape, classes = ((8, 8, 3), 10) if small else ((32, 32, 3), 100)
    return _classifier(ViT(classes, 16 if small else 192, 2 if small else 6), shape, classes)


# Recurrent, sparse and convolutional


def lstm(size: Size) -> Model:
    features, inputs, steps = (8, 5, 6) if size == "small" else (256, 64, 64)
    module = nn.RNN(nn.OptimizedLSTMCell(features))
    example = jnp.zeros((steps, inputs), jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), example)["params"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        zero = jnp.zeros(features, x.dtype)  # Flax's initial state is always float32
        hidden: Any = module.apply({"params": params}, x, initial_carry=(zero, zero))
        return jnp.square(hidden[-1] - x.mean()).mean()

    return Model(
        loss, params, lambda n: (jax.random.normal(jax.random.key(1), (n, steps, inputs)),)
    )


class Recommender(nn.Module):
    rows: int
    dim: int

    @nn.compact
    def __call__(self, items: jax.Array) -> jax.Array:
        history = nn.Embed(self.rows, self.dim)(items).mean(axis=0)
        return nn.Dense(1)(nn.relu(nn.Dense(4 * self.dim)(history)))[0]


def recommender(size: Size) -> Model:
    rows, dim, length = (50, 4, 6) if size == "small" else (100_000, 64, 32)
    module = Recommender(rows, dim)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(length, int))["params"]

    def loss(params: Any, items: jax.Array, rating: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(module.apply({"params": params}, items), rating)

    def batch(n: int) -> tuple[Any, ...]:
        # Popular items occur several times in one history, as in real data.
        ranks = jax.random.pareto(jax.random.key(1), 0.5, (n, length)).astype(int)
        return ranks % rows, (jnp.arange(n) % 2).astype(jnp.float32)

    return Model(loss, params, batch)


class SeparableCNN(nn.Module):
    num_classes: int
    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = nn.Conv(self.channels[0], (3, 3))(x)
        for i, channels in enumerate(self.channels):
            own = x.shape[-1]
            x = nn.Conv(own, (3, 3), strides=1 + i % 2, feature_group_count=own)(x)
            x = nn.relu(nn.Conv(channels, (1, 1))(nn.relu(x)))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


def separable_cnn(size: Size) -> Model:
    small = size == "small"
    shape, classes = ((8, 8, 3), 10) if small else ((32, 32, 3), 100)
    channels = (4, 6) if small else (64, 128, 256, 256)
    return _classifier(SeparableCNN(classes, channels), shape, classes)


class DilatedCNN(nn.Module):
    channels: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.channels, (2,), padding="CAUSAL")(x)
        for i in range(self.layers):
            x = x + jnp.tanh(
                nn.Conv(self.channels, (2,), kernel_dilation=2**i, padding="CAUSAL")(x)
            )
        return nn.Conv(1, (1,))(x)


def dilated_cnn(size: Size) -> Model:
    channels, layers, length = (4, 3, 16) if size == "small" else (64, 6, 256)
    module = DilatedCNN(channels, layers)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((length, 1)))["params"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        predicted: Any = module.apply({"params": params}, x[:-1])
        return jnp.square(predicted - x[1:]).mean()

    return Model(
        loss, params, lambda n: (jax.random.normal(jax.random.key(1), (n, length + 1, 1)),)
    )


class UNet(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, deep = self.channels, 2 * self.channels
        outer = nn.relu(nn.Conv(wide, (3, 3))(x))
        inner = nn.relu(nn.Conv(deep, (3, 3), strides=(2, 2))(outer))
        inner = nn.relu(nn.Conv(deep, (3, 3))(inner))
        up = nn.relu(nn.ConvTranspose(wide, (3, 3), strides=(2, 2))(inner))
        return nn.Conv(x.shape[-1], (3, 3))(jnp.concatenate([outer, up], axis=-1))


def unet(size: Size) -> Model:
    channels, side = (3, 8) if size == "small" else (32, 32)
    module = UNet(channels)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(module.apply({"params": params}, x[None])[0] - x[::-1]).mean()

    return Model(
        loss, params, lambda n: (jax.random.normal(jax.random.key(1), (n, side, side, 3)),)
    )


# Weights that are chosen or computed


def mixture_of_experts(size: Size) -> Model:
    experts, dim, hidden, length = (4, 5, 6, 3) if size == "small" else (16, 128, 256, 32)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "gate": jax.random.normal(keys[0], (dim, experts)),
        "up": jax.random.normal(keys[1], (experts, dim, hidden)) / dim**0.5,
        "down": jax.random.normal(keys[2], (experts, hidden, dim)) / hidden**0.5,
    }

    def loss(params: Any, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(x.mean(axis=0) @ params["gate"])
        weights, chosen = jax.lax.top_k(scores, 2)
        up, down = (jnp.take(params[name], chosen, axis=0) for name in ("up", "down"))
        hidden = jnp.tanh(jnp.einsum("td,edh->eth", x, up))
        y = jnp.einsum("eth,ehd,e->td", hidden, down, weights)
        return jnp.square(y - x[::-1]).mean()

    return Model(loss, params, lambda n: (jax.random.normal(jax.random.key(1), (n, length, dim)),))


def lora(size: Size) -> Model:
    dim, rank, length = (6, 2, 4) if size == "small" else (512, 8, 64)
    keys = jax.random.split(jax.random.key(0), 6)
    frozen = [jax.random.normal(key, (dim, dim)) / dim**0.5 for key in keys[:2]]
    params = [
        {
            "a": jax.random.normal(keys[2 + i], (dim, rank)) / dim**0.5,
            "b": jax.random.normal(keys[4 + i], (rank, dim)) / rank**0.5,
        }
        for i in range(2)
    ]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y = x
        for weight, own in zip(frozen, params, strict=True):
            y = jnp.tanh(y @ (weight + own["a"] @ own["b"]))
        return jnp.square(y - x[::-1]).mean()

    return Model(loss, params, lambda n: (jax.random.normal(jax.random.key(1), (n, length, dim)),))


def weight_norm(size: Size) -> Model:
    dims = (6, 5, 3) if size == "small" else (256, 512, 256)
    keys = jax.random.split(jax.random.key(0), len(dims))
    params = [
        {"direction": jax.random.normal(key, (a, b)), "scale": jnp.ones(b)}
        for key, a, b in zip(keys, dims, dims[1:], strict=False)
    ]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for own in params:
            norm = jnp.linalg.norm(own["direction"], axis=0)
            x = jnp.tanh(x @ (own["scale"] * own["direction"] / norm))
        return jnp.square(x).sum()

    return Model(loss, params, lambda n: (jax.random.normal(jax.random.key(1), (n, dims[0])),))


ZOO: dict[str, Callable[[Size], Model]] = {
    "mlp": _library_model("mlp", (8, 8, 1), (0.05, 4.0)),
    "alexnet": _library_model("alexnet", (32, 32, 3), (0.05, 1.0)),
    "resnet18": _library_model("resnet18", (32, 32, 3), (0.05, 0.5)),
    "vit": vit,
    "gpt": gpt(tied=False, scanned=False),
    "gpt_tied": gpt(tied=True, scanned=False),
    "gpt_scanned": gpt(tied=True, scanned=True),
    "lstm": lstm,
    "recommender": recommender,
    "separable_cnn": separable_cnn,
    "dilated_cnn": dilated_cnn,
    "unet": unet,
    "mixture_of_experts": mixture_of_experts,
    "lora": lora,
    "weight_norm": weight_norm,
}
