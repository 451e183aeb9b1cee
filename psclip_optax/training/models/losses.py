"""Define losses for one example, which the train steps map over a batch."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from psclip_optax.typing import Params, PyTree


def classification_loss(
    model: nn.Module, *, dropout: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds the cross-entropy for one image, with the accuracy as aux.

    Args:
      model: A Linen module, called as `model.apply({"params": params}, images, train=dropout)` on
        images [1, H, W, C], that returns logits [1, num_classes].
      dropout: Whether the loss is for training with dropout: it then takes a key as well, a
        different one for each sample.

    Returns:
      `loss(params, image, label)`, or `loss(params, image, label, key)` with dropout: image
      [H, W, C], label an integer scalar, key a scalar key. It returns the scalar loss and
      `correct`, float32 0 or 1, whose mean over samples is the accuracy. Map it over a batch with
      `jax.vmap`, or pass it to `linen_train_step(loss, has_aux=True)`.

    Raises:
      TypeError: The loss is called without a key although there is dropout, or with a key although
        there is none.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from psclip_optax.training.models.classifiers import build_model
      >>> model = build_model("mlp", num_classes=10, width=0.1)
      >>> image = jnp.zeros([8, 8, 1])
      >>> params = model.init(jax.random.key(0), image[None])["params"]
      >>> loss, correct = classification_loss(model)(params, image, 3)
      >>> print(f"{loss:.4f}, ln 10 for equal logits")
      2.3026, ln 10 for equal logits
    """

    def evaluate(params: Params, image: jax.Array, label: jax.typing.ArrayLike, **options: PyTree):
        logits = model.apply({"params": params}, image[None], train=dropout, **options)[0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return loss, (jnp.argmax(logits) == label).astype(jnp.float32)

    def loss(params: Params, image: jax.Array, label: jax.typing.ArrayLike):
        return evaluate(params, image, label)

    def loss_with_dropout(
        params: Params, image: jax.Array, label: jax.typing.ArrayLike, key: jax.Array
    ):
        return evaluate(params, image, label, rngs={"dropout": key})

    return loss_with_dropout if dropout else loss
