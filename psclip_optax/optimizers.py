"""Build chains of per-sample clipping and an Optax optimizer."""

from __future__ import annotations

import jax
import optax

from psclip_optax.thresholds import AdaptiveThreshold, GrowingThreshold, growing_threshold
from psclip_optax.thresholds.auto import AutoState, auto_threshold
from psclip_optax.transforms import per_sample_clip


def ps_clip_sgd(
    learning_rate: optax.ScalarOrSchedule,
    alpha: jax.typing.ArrayLike | None = None,
    beta: jax.typing.ArrayLike | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Build PS-Clip-SGD: SGD on the mean of gradients clipped per sample at τ_k = α k^{1/β}.

    This is the same as `optax.chain(psc.per_sample_clip(psc.growing_threshold(alpha, beta)),
    optax.sgd(learning_rate, momentum, nesterov))`.

    Args:
      learning_rate: a number or an Optax schedule over steps.
      alpha: the scale α ≥ 0 of the threshold, in the units of the gradient's norm; σ in the theory.
        Without α and β the threshold is [`psclip_optax.auto_threshold`][].
      beta: the growth β > 0 of the threshold with a sample's position k; in theory the order p of
        the moment, in (1, 2].
      momentum: the decay of the momentum; None for SGD without it.
      nesterov: whether the momentum is Nesterov's.

    Returns:
      An `optax.GradientTransformationExtraArgs` over stacked per-sample gradients, leaves
      [n, …]. Its update accepts `sample_mask` and `positions`, as with
      [`psclip_optax.per_sample_clip`][]. To schedule α or β, or to set them by hand, wrap it:
      `optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=…, alpha=…, beta=…)`.

    Raises:
      TypeError: α or β is no number (a schedule needs `optax.inject_hyperparams`), or one of them
        is given without the other.
      ValueError: α < 0, β ≤ 0 or NaN.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import psclip_optax as psc
      >>> loss = lambda w, x: jnp.dot(w, x)
      >>> tx = psc.ps_clip_sgd(learning_rate=1.0, alpha=1.0, beta=2.0)
      >>> w, x = jnp.zeros(2), jnp.array([[9.0, 0.0], [0.0, 9.0]])
      >>> grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(w, x)
      >>> updates, state = tx.update(grads, tx.init(w))
      >>> updates.round(3)  # clipped at 1 and at √2
      Array([-0.5  , -0.707], dtype=float32)

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    return optax.chain(
        per_sample_clip(_threshold(alpha, beta)),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


def _threshold(
    alpha: jax.typing.ArrayLike | None, beta: jax.typing.ArrayLike | None
) -> GrowingThreshold | AdaptiveThreshold[AutoState]:
    if alpha is None and beta is None:
        return auto_threshold()
    if alpha is None or beta is None:
        raise TypeError(
            "ps_clip_sgd expects both alpha and beta, or neither for psc.auto_threshold(), got "
            f"{alpha=}, {beta=}"
        )
    return growing_threshold(alpha, beta)
