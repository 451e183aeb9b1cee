"""Build image classifiers in Flax Linen that process each sample of a batch independently.

Per-sample gradients exist only if no sample's output depends on another's, so normalisation is over
groups of channels, never over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psclip_optax.arrays import is_integer
from psclip_optax.thresholds import check_number

# He's initialisation preserves the variance of activations through ReLUs. Flax's default (LeCun)
# halves it in each layer, which hurts deep nets without normalisation. The layer of the logits uses
# the default.
_HE_NORMAL = nn.initializers.he_normal()


class MLP(nn.Module):
    """Multilayer perceptron with ReLUs.

    Attributes:
      num_classes: Number of logits.
      width: Multiplies the hidden sizes.
      dropout_rate: Share of each hidden layer's units dropped in training.
      hidden_sizes: Units of each hidden layer, before `width`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = MLP(num_classes=10)
      >>> images = jnp.zeros([2, 8, 8, 1])
      >>> model.apply(model.init(jax.random.key(0), images), images).shape
      (2, 10)
    """

    num_classes: int
    width: float = 1.0
    dropout_rate: float = 0.0
    hidden_sizes: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = _flatten_image(x)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(_scaled(size, self.width), kernel_init=_HE_NORMAL)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class SmallCNN(nn.Module):
    """Two pairs of 3×3 convolutions, each followed by a 2×2 max pool, and one hidden layer.

    It is small enough for 8×8 digits on a CPU, and a fair baseline for 32×32 images.

    Attributes:
      num_classes: Number of logits.
      width: Multiplies the channels and the hidden size.
      dropout_rate: Share of the hidden layer's inputs dropped in training.

    References:
      Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
      ICLR 2015 (these blocks).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = SmallCNN(num_classes=10)
      >>> images = jnp.zeros([2, 8, 8, 1])
      >>> model.apply(model.init(jax.random.key(0), images), images).shape
      (2, 10)
    """

    num_classes: int
    width: float = 1.0
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        _check_image_size(x, 4, "SmallCNN")
        for channels in (32, 64):
            for _ in range(2):
                x = nn.relu(_conv3x3(_scaled(channels, self.width))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(_flatten_image(x))
        x = nn.relu(nn.Dense(_scaled(128, self.width), kernel_init=_HE_NORMAL)(x))
        return nn.Dense(self.num_classes)(x)


class AlexNet(nn.Module):
    """AlexNet for 32×32 images: five convolutions, two hidden layers of 4096 units.

    It is the common adaptation to CIFAR: 3×3 convolutions of 64 (stride 2), 192, 384, 256, 256
    channels, 2×2 max pools after the first, second and fifth, no local response normalisation.

    Attributes:
      num_classes: Number of logits.
      width: Multiplies the channels and the hidden sizes.
      dropout_rate: Share of each hidden layer's inputs dropped in training.

    References:
      Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
      Networks", NeurIPS 2012.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = AlexNet(num_classes=100, width=0.125)
      >>> images = jnp.zeros([2, 32, 32, 3])
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> jax.eval_shape(model.apply, variables, images).shape
      (2, 100)
    """

    num_classes: int
    width: float = 1.0
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        _check_image_size(x, 16, "AlexNet")
        for channels, stride, pool in (
            (64, 2, True),
            (192, 1, True),
            (384, 1, False),
            (256, 1, False),
            (256, 1, True),
        ):
            x = nn.relu(_conv3x3(_scaled(channels, self.width), stride)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if pool else x
        x = _flatten_image(x)
        for _ in range(2):
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            x = nn.relu(nn.Dense(_scaled(4096, self.width), kernel_init=_HE_NORMAL)(x))
        return nn.Dense(self.num_classes)(x)


class ResNet18(nn.Module):
    """ResNet-18 for small images, with group normalisation in place of batch normalisation.

    The stem is one 3×3 convolution without a max pool; four stages of two basic blocks follow, of
    64, 128, 256 and 512 channels, then the mean over the image.

    Attributes:
      num_classes: Number of logits.
      width: Multiplies the channels.
      dropout_rate: Share of the last layer's inputs dropped in training.

    References:
      He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
      Wu and He, "Group Normalization", ECCV 2018.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = ResNet18(num_classes=10, width=0.125)
      >>> images = jnp.zeros([2, 32, 32, 3])
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> jax.eval_shape(model.apply, variables, images).shape
      (2, 10)
    """

    num_classes: int
    width: float = 1.0
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = _conv3x3(_scaled(64, self.width), use_bias=False)(x)
        x = nn.relu(_group_norm(x.shape[-1])(x))
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            x = _BasicBlock(_scaled(channels, self.width), stride)(x)
            x = _BasicBlock(_scaled(channels, self.width))(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(jnp.mean(x, axis=(-3, -2)))
        return nn.Dense(self.num_classes)(x)


class _BasicBlock(nn.Module):
    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _conv3x3(self.channels, self.stride, use_bias=False)(x)
        y = nn.relu(_group_norm(self.channels)(y))
        y = _conv3x3(self.channels, use_bias=False)(y)
        y = _group_norm(self.channels)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False, kernel_init=_HE_NORMAL)(
                x
            )
            x = _group_norm(self.channels)(x)
        return nn.relu(x + y)


def _conv3x3(channels: int, stride: int = 1, *, use_bias: bool = True) -> nn.Conv:
    return nn.Conv(channels, (3, 3), stride, use_bias=use_bias, kernel_init=_HE_NORMAL)


def _group_norm(channels: int) -> nn.GroupNorm:
    # Flax's default reduces over every axis but the first; with two batch axes also over samples.
    return nn.GroupNorm(num_groups=math.gcd(32, channels), reduction_axes=(-3, -2, -1))


def _flatten_image(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-3], -1)


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def _check_image_size(x: jax.Array, smallest: int, name: str) -> None:
    # Max pooling too small an image gives an empty one, and logits that ignore it.
    if x.ndim < 3 or min(x.shape[-3:-1]) < smallest:
        raise ValueError(
            f"{name} takes images [..., H, W, C] with H and W at least {smallest}, got shape "
            f'{list(x.shape)}; resize them, or take "mlp" or "resnet18"'
        )


_MODELS: dict[str, Any] = {
    "mlp": MLP,
    "small_cnn": SmallCNN,
    "alexnet": AlexNet,
    "resnet18": ResNet18,
}


def build_model(
    name: str, num_classes: int, *, width: float = 1.0, dropout_rate: float = 0.0
) -> nn.Module:
    """Builds a classifier by name.

    Args:
      name: "mlp", "small_cnn", "alexnet" or "resnet18".
      num_classes: Number of logits, at least 1.
      width: Multiplies the channels and hidden sizes, positive.
      dropout_rate: In [0, 1); if positive, `apply` in training takes `rngs={"dropout": key}`.

    Returns:
      A Linen module: `model.apply(variables, images, train=False)` takes images [..., H, W, C] and
      returns logits [..., num_classes]; no sample's logits depend on another sample.

    Raises:
      ValueError: The name is unknown, or a number is out of range.
      TypeError: `width` or `dropout_rate` is no number.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = build_model("small_cnn", num_classes=10, width=0.5)
      >>> variables = model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 1]))
      >>> model.apply(variables, jnp.zeros([5, 8, 8, 1])).shape
      (5, 10)
    """
    if name not in list(_MODELS):
        raise ValueError(f"name is one of {', '.join(map(repr, _MODELS))}, got {name!r}")
    if not is_integer(num_classes) or num_classes < 1:
        raise ValueError(f"num_classes is an int of at least 1, got {num_classes!r}")
    check_number("build_model", "width", width, lowest=0, open_ends=(True, True))
    check_number(
        "build_model", "dropout_rate", dropout_rate, lowest=0, highest=1, open_ends=(False, True)
    )
    return _MODELS[name](num_classes=num_classes, width=width, dropout_rate=dropout_rate)
