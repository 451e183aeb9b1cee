"""Build train steps over an NNX model and its `nnx.Optimizer`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
from flax import nnx

from psclip_optax.arrays import described
from psclip_optax.clipped_functions import ClippedFunction
from psclip_optax.training.steps.batch import Loss, Metrics
from psclip_optax.training.steps.functions import (
    GradientFunction,
    GradientOptions,
    gradient_function,
    metrics_of,
)
from psclip_optax.typing import Params, PyTree


def _check_pair(model: object, optimizer: object) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "the step is called as step(model, optimizer, *batch) with an nnx.Optimizer, got "
            f"{described(model)} and {described(optimizer)}; make one by "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)"
        )


def nnx_train_step(
    loss: Loss | ClippedFunction | GradientFunction,
    **options: Unpack[GradientOptions],
) -> Callable[..., Metrics]:
    """Builds a jitted train step over an NNX model and its `nnx.Optimizer`.

    Both are updated in place, and their old buffers are donated. The step trains the parameters
    that the optimizer's `wrt` selects. All other state of the model is read-only, because each
    sample would write a different value.

    Args:
      loss: The result of [`psclip_optax.clipped_value_and_grad`][] for `loss(model, *example)`, a
        scalar for one example, with any Optax optimizer. Or the loss itself, which the optimizer
        may clip by [`psclip_optax.per_sample_clip`][] as its first link. Do not map it over a batch
        axis. If the loss is random, pass keys as an argument of the batch, one for each sample:
        `model(x, rngs=nnx.Rngs(dropout=key))`.
      **options: As for [`gradient_function`][psclip_optax.training.steps.gradient_function]: an
        adaptive threshold or one from the optimizer's state, `return_norms` and `return_samples`,
        and for a loss the kind of gradients.

    Returns:
      `step(model, optimizer, *batch, sample_mask=None, positions=None) -> metrics`, with the batch,
      the mask, the positions and the metrics of
      [`linen_train_step`][psclip_optax.training.steps.linen_train_step].

    Raises:
      ValueError: `gradients` or an option is unknown, or a threshold would not be used. In the
        step: batch arguments have unequal sizes, the mask or positions are not of shape [n],
        positions would not be used, the optimizer does not fit the gradients, or the loss writes to
        the model's state (batch statistics, the counters of `nnx.Rngs`).
      TypeError: The loss or `threshold_from` is not a function. In the step: the optimizer is no
        `nnx.Optimizer`, the loss is not a real scalar, or a leaf of its aux is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import psclip_optax as psc
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> def loss(model, x, y):
      ...     return (model(x)[0] - y) ** 2
      >>> step = nnx_train_step(psc.clipped_value_and_grad(loss, threshold=1.0))
      >>> metrics = step(model, optimizer, jnp.ones([4, 3]), jnp.full(4, 100.0))
      >>> int(metrics["num_samples"]), float(metrics["clipped_share"])
      (4, 1.0)

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    function = gradient_function(loss, **options)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(
        model: PyTree,
        optimizer: nnx.Optimizer[Any],
        *examples: PyTree,
        sample_mask: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
    ) -> Metrics:
        _check_pair(model, optimizer)
        batch = function.checked_batch(optimizer.opt_state, examples, sample_mask, positions)
        graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
        loss_of_params = _loss_of_params(function.loss, graphdef, rest)
        computed = function.compute(loss_of_params, params, batch, optimizer.opt_state)
        optimizer.update(model, computed.gradients, **computed.extra_args)
        return metrics_of(computed, batch, optimizer.opt_state)

    return step


def _loss_of_params(loss: Loss, graphdef: nnx.GraphDef[Any], rest: PyTree) -> Loss:
    def loss_of_params(params: Params, *example: PyTree) -> PyTree:
        # Flax lets only the trace that created a variable write to it. Variables are created here,
        # so a loss that writes reaches the check below, whose error says what to do instead.
        own_rest = jax.tree.map(lambda value: value, rest)
        model = nnx.merge(graphdef, params, own_rest)
        before = _values_by_path(model)
        result = loss(model, *example)
        _check_unwritten(before, _values_by_path(model))
        return result

    return loss_of_params


def _values_by_path(model: PyTree) -> dict[str, list[Any]]:
    variables = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): jax.tree.leaves(variable) for path, variable in variables}


def _check_unwritten(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> None:
    # Compared by identity: under tracing, a variable that was written contains another tracer.
    identities = {path: list(map(id, values)) for path, values in before.items()}
    written = [path for path in after if list(map(id, after[path])) != identities.get(path)]
    if written:
        raise ValueError(
            "the loss reads the model's state, but this one writes to "
            f"{', '.join(map(repr, written))}, of which each sample would have its own value. For "
            "dropout pass one key a sample as an argument of the batch and write "
            "model(x, rngs=nnx.Rngs(dropout=key)); for batch normalisation take nnx.GroupNorm or "
            "nnx.LayerNorm, or use_running_average=True; return what you want to record as aux"
        )
