"""Clip each micro-batch's mean gradient before it is accumulated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from psclip_optax import stacks
from psclip_optax.arrays import described, dtype_of, float_leaves
from psclip_optax.clipped_sums import clipped_alone
from psclip_optax.groups import ALL_TOGETHER
from psclip_optax.thresholds import as_threshold, concrete, thresholds_at
from psclip_optax.typing import PyTree, ThresholdLike

# Maps the number of updates made so far to K.
Schedule: TypeAlias = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]

# Such as jnp.float32, which is callable: optax.inject_hyperparams would take it for a schedule.
_FLOAT32 = jnp.dtype("float32")


def accumulate_clipped(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Schedule,
    threshold: ThresholdLike,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: optax.ShouldSkipUpdateFunction | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = _FLOAT32,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulate gradients of micro-batches, each clipped before it is added.

    Works like `optax.MultiSteps`, but first clips the mean gradient $\bar g_k$ of the k-th
    micro-batch in a window of K to the norm τ_k, so no micro-batch can dominate the sum:

    $$g = \frac1K \sum_{k=1}^K \min(1, \tau_k / \|\bar g_k\|) \, \bar g_k$$

    k restarts at 1 with each window. A skipped micro-batch is not counted.

    `optax.inject_hyperparams(psc.accumulate_clipped)(inner, every_k_schedule, threshold)` accepts a
    number, or a schedule over calls, as the threshold. Name the arguments that are other callables
    in `static_args`: a threshold such as `psc.growing_threshold`, `every_k_schedule`,
    `should_skip_update_fn`, and an `accumulator_dtype` such as `jnp.bfloat16`.

    Args:
      inner: the Optax optimizer that gets the accumulated gradient.
      every_k_schedule: K, or a function from the number of updates made so far to K.
      threshold: the largest norm τ_k of the mean gradient of the micro-batch at the 1-based
        position k in its window: a number, [`psclip_optax.growing_threshold`][], or any callable
        from integer positions [n] to norms [n]. A micro-batch's mean is less noisy than a sample's
        gradient, so use a smaller α.
      use_grad_mean: whether gradients are averaged over the window, or summed.
      should_skip_update_fn: as for `optax.MultiSteps`, such as `optax.skip_not_finite`; it gets the
        gradient before clipping.
      accumulator_dtype: the dtype of the accumulated gradient; None for the parameters' dtype.

    Returns:
      An `optax.GradientTransformationExtraArgs` over gradients with the parameters' shapes, with
      the `optax.MultiStepsState` of `optax.MultiSteps`. Every K-th update moves the parameters; the
      others are zero. A gradient that is not finite makes the accumulated gradient NaN unless it is
      skipped.

    Raises:
      TypeError: `inner` is no gradient transformation, `every_k_schedule` is neither an int nor a
        callable that returns one, the threshold is neither a number nor a callable,
        `should_skip_update_fn` is not callable, `accumulator_dtype` or a gradient is not real
        floating-point, or the state is that of another transformation.
      ValueError: `every_k_schedule` is below 1, or the gradients do not have the shapes of the
        parameters that `init` saw (stacked per-sample gradients do not).

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import psclip_optax as psc
      >>> tx = psc.accumulate_clipped(optax.sgd(1.0), 2, psc.growing_threshold(1.0, 1.0))
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jnp.array([0.5, 0.0]), state, w)
      >>> print(updates)
      [0. 0.]
      >>> updates, state = tx.update(jnp.array([0.0, 100.0]), state, w)  # clipped at 2
      >>> print(updates)
      [-0.25 -1.  ]

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026 (clipping before accumulation).
    """
    _check_inner(inner)
    every_k_schedule = _checked_schedule(every_k_schedule)
    threshold = as_threshold(threshold)
    _check_options(should_skip_update_fn, accumulator_dtype)

    def steps(should_skip_update_fn: optax.ShouldSkipUpdateFunction | None) -> optax.MultiSteps:
        return optax.MultiSteps(
            inner,
            every_k_schedule,
            use_grad_mean=use_grad_mean,
            should_skip_update_fn=should_skip_update_fn,
            accumulator_dtype=accumulator_dtype,  # pyright: ignore[reportArgumentType] (None is that of the parameters)
        )

    def init(params: optax.Params) -> optax.MultiStepsState:
        return steps(should_skip_update_fn).init(params)

    def clip_at_step(leaves: list[jax.Array], state: optax.MultiStepsState) -> list[jax.Array]:
        if not leaves:  # without parameters there is nothing to clip
            return leaves
        position = jnp.asarray(state.mini_step, jnp.int32).reshape(1) + 1
        taus = thresholds_at(threshold, position, stacks.norm_dtype(leaves))
        clipped, *_ = clipped_alone(leaves, taus, ALL_TOGETHER)
        return clipped

    def update(
        grads: optax.Updates,
        state: optax.MultiStepsState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.MultiStepsState]:
        _check_state(state)
        leaves = _checked_leaves(grads, state.acc_grads)
        should_skip = should_skip_update_fn and _seeing(grads, should_skip_update_fn)
        clipped = jax.tree.unflatten(jax.tree.structure(grads), clip_at_step(leaves, state))
        return steps(should_skip).update(clipped, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] (the first argument has its own name)


def _seeing(
    grads: optax.Updates, should_skip_update_fn: optax.ShouldSkipUpdateFunction
) -> optax.ShouldSkipUpdateFunction:
    """Apply the rule to the gradient before clipping, whose norm may be too large."""

    @functools.wraps(should_skip_update_fn)
    def should_skip(
        updates: optax.Updates,
        gradient_step: jax.typing.ArrayLike,
        params: optax.Params | None,
    ) -> tuple[jax.typing.ArrayLike, PyTree]:
        del updates
        return should_skip_update_fn(grads, gradient_step, params)

    return should_skip


def _check_inner(inner: object) -> None:
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            "accumulate_clipped takes an optax.GradientTransformation to give the accumulated "
            f"gradient to, such as optax.sgd(0.1), got {inner!r}"
        )


def _checked_schedule(every_k_schedule: int | Schedule) -> Schedule:
    if not callable(every_k_schedule):
        _check_window(every_k_schedule)
        return lambda step: _as_window(every_k_schedule)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        window = every_k_schedule(step)
        _check_window(window, f" from {every_k_schedule!r}")
        return _as_window(window)

    return schedule


def _as_window(window: jax.typing.ArrayLike) -> jax.Array:
    """Cast K to the dtype that optax.MultiSteps counts in; optax.inject_hyperparams traces it."""
    return jnp.asarray(window).astype(jnp.int32)


def _check_window(window: jax.typing.ArrayLike, source: str = "") -> None:
    dtype = dtype_of(window)
    is_bool = dtype is not None and jnp.issubdtype(dtype, jnp.bool_)
    is_number = dtype is not None and (is_bool or jnp.issubdtype(dtype, jnp.integer))
    if not is_number or jnp.shape(window):
        raise TypeError(
            "every_k_schedule is the int number of micro-batches in a window, or a function from "
            f"the number of updates to it, got {window!r}{source}"
        )
    known = concrete(window)
    if known is not None and (known < 1 or is_bool):
        raise ValueError(
            "every_k_schedule is the number of micro-batches in a window, at least 1, got "
            f"{window!r}{source}"
        )


def _check_options(
    should_skip_update_fn: object, accumulator_dtype: jax.typing.DTypeLike | None
) -> None:
    if should_skip_update_fn is not None and not callable(should_skip_update_fn):
        raise TypeError(
            "should_skip_update_fn is None or a function such as optax.skip_not_finite, got "
            f"{should_skip_update_fn!r}"
        )
    if isinstance(accumulator_dtype, jax.Array):
        raise TypeError(
            "accumulator_dtype is a dtype, got an array, as optax.inject_hyperparams makes of "
            "jnp.bfloat16 and all that is callable; add static_args=('accumulator_dtype',)"
        )
    try:
        is_float = jnp.issubdtype(jnp.dtype(accumulator_dtype), jnp.floating)
    except TypeError:
        is_float = False
    if accumulator_dtype is not None and not is_float:
        raise TypeError(
            "accumulator_dtype is a real floating-point dtype such as jnp.float32, or None for "
            f"that of the parameters, got {accumulator_dtype!r}"
        )


def _check_state(state: object) -> None:
    if not isinstance(state, optax.MultiStepsState):
        raise TypeError(
            "accumulate_clipped's update takes (grads, state, params) with an "
            "optax.MultiStepsState from its init or its last update, got "
            f"{described(state)}"
        )


def _checked_leaves(grads: optax.Updates, accumulated: optax.Updates) -> list[jax.Array]:
    named, treedef = float_leaves("grads", grads), jax.tree.structure(grads)
    if treedef != jax.tree.structure(accumulated):
        raise ValueError(
            "gradients have the structure of the parameters that init saw, "
            f"{jax.tree.structure(accumulated)}, got {treedef}"
        )
    for (path, leaf), kept in zip(named, jax.tree.leaves(accumulated), strict=True):
        if leaf.shape != jnp.shape(kept):
            raise ValueError(
                f"{path} is {described(leaf)}, but its parameter has shape "
                f"{list(jnp.shape(kept))}: accumulate_clipped takes the mean gradient of a "
                "micro-batch. Average stacked per-sample gradients first, clipped with "
                "optax.chain(psc.per_sample_clip(…), psc.accumulate_clipped(…)) or not"
            )
    return [leaf for _, leaf in named]
