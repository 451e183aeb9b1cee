"""Build train and evaluation steps over Linen's `TrainState`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from psclip_optax.arrays import described
from psclip_optax.clipped_functions import ClippedFunction
from psclip_optax.clipped_grad import check_loss
from psclip_optax.training.steps.batch import (
    Loss,
    Metrics,
    checked_batch,
    logged,
    over_samples,
    sum_over,
    which_count,
)
from psclip_optax.training.steps.functions import (
    GradientFunction,
    GradientOptions,
    gradient_function,
    metrics_of,
)
from psclip_optax.typing import Params, PyTree


def linen_train_step(
    loss: Loss | ClippedFunction | GradientFunction,
    **options: Unpack[GradientOptions],
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds a jitted train step over Flax's `TrainState`.

    The state is donated: its buffers, including the initial parameters, are reused for the new
    state and must not be read afterwards.

    Args:
      loss: The result of [`psclip_optax.clipped_value_and_grad`][] for `loss(params, *example)`, a
        scalar for one example, with any Optax optimizer. Or the loss itself, which `state.tx` may
        clip by [`psclip_optax.per_sample_clip`][] as its first link. Do not map it over a batch
        axis.
      **options: As for [`gradient_function`][psclip_optax.training.steps.gradient_function]: an
        adaptive threshold or one from the optimizer's state, `return_norms` and `return_samples`,
        and for a loss the kind of gradients.

    Returns:
      `step(state, *batch, sample_mask=None, positions=None) -> (state, metrics)`. Every leaf of
      the batch has n samples on its first axis. `sample_mask`, bool [n], is False for padding;
      `positions`, int [n], replaces 1, 2, … as the samples' positions ("mean" has none). Metrics
      are scalars. "loss" and each leaf of "aux" are means over the unmasked samples whose loss is
      finite; a mean over no sample is 0. If samples are clipped, the metrics include the statistics
      of [`psclip_optax.transforms.PerSampleClipState`][] and "clipped_share". An adaptive threshold
      adds "threshold_scale", τ_1 of this step. When clipping by group, statistics of the clipping
      have shape [groups].

    Raises:
      ValueError: `gradients` or an option is unknown, or a threshold would not be used. In the
        step: batch arguments have unequal sizes, the mask or positions are not of shape [n],
        positions would not be used, or the optimizer does not fit the gradients.
      TypeError: The loss or `threshold_from` is not a function. In the step: the state is no
        `TrainState`, the loss is not a real scalar, or a leaf of its aux is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> from flax.training.train_state import TrainState
      >>> def loss(params, x, y):
      ...     return (params["w"] * x - y) ** 2
      >>> params, tx = {"w": jnp.array(0.0)}, optax.sgd(learning_rate=1.0)
      >>> state = TrainState.create(apply_fn=loss, params=params, tx=tx)
      >>> threshold = psc.growing_threshold(alpha=1.0, beta=2.0)
      >>> step = linen_train_step(psc.clipped_value_and_grad(loss, threshold))
      >>> state, metrics = step(state, jnp.ones(2), jnp.array([1.0, 100.0]))
      >>> print(f"{state.params['w']:.4f}, clipped at 1 and √2: {metrics['num_clipped']}")
      1.2071, clipped at 1 and √2: 2

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    function = gradient_function(loss, **options)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState,
        *examples: PyTree,
        sample_mask: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
    ) -> tuple[TrainState, Metrics]:
        _check_state(state)
        batch = function.checked_batch(state.opt_state, examples, sample_mask, positions)
        computed = function.compute(function.loss, state.params, batch, state.opt_state)
        # `apply_gradients` does not pass additional arguments to the optimizer.
        updates, opt_state = state.tx.update(
            computed.gradients, state.opt_state, state.params, **computed.extra_args
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics_of(computed, batch, opt_state)

    return step


def linen_eval_step(loss: Loss, *, has_aux: bool = False) -> Callable[..., Metrics]:
    """Builds a jitted evaluation step that returns sums, which allow for a padded last batch.

    Args:
      loss: `loss(params, *example)`, a scalar for one example, as for
        [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      has_aux: Whether the loss returns a pair (loss, aux), where aux is a pytree of scalars.

    Returns:
      `step(params, *batch, sample_mask=None) -> sums`: a dict of scalars, "loss" and, leaf by leaf,
      "aux", summed over the unmasked samples, and their number, "count". Add the dicts of all
      batches and divide by the count. Samples whose loss is not finite count, so a diverged model
      is visible.

    Raises:
      ValueError: In the step: batch arguments have unequal sizes, or the mask is not of shape [n].
      TypeError: The loss is not a function. In the step: it is not a real scalar, or a leaf of its
        aux is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> step = linen_eval_step(lambda params, x: params * x)
      >>> padded = jnp.array([1.0, 2.0, 0.0])
      >>> sums = step(jnp.array(3.0), padded, sample_mask=jnp.array([True, True, False]))
      >>> float(sums["loss"] / sums["count"])
      4.5
    """
    check_loss(loss)
    logged_loss = logged(loss, has_aux)

    @jax.jit
    def step(
        params: Params, *examples: PyTree, sample_mask: jax.typing.ArrayLike | None = None
    ) -> Metrics:
        batch = checked_batch(examples, sample_mask, None)
        losses, logs = over_samples(logged_loss, params, batch.examples)
        counts = which_count(losses, batch.sample_mask)
        sums = jax.tree.map(lambda values: sum_over(values, counts), logs)
        return sums | {"count": jnp.sum(counts)}

    return step


def _check_state(state: object) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            "the step is called as step(state, *batch) with a "
            f"flax.training.train_state.TrainState, got {described(state)}; make one by "
            "TrainState.create(apply_fn=…, params=…, tx=…)"
        )
