"""Define the methods of `psclip`: Optax chains with their hyperparameters in the state.

Learning rate and threshold are leaves of the optimizer's state, so all trials of a tuning grid
share one compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from psclip_optax.groups import has_rules
from psclip_optax.thresholds import (
    AdaptiveThreshold,
    Threshold,
    constant_threshold,
    growing_threshold,
)
from psclip_optax.thresholds.adaptive import moment_threshold
from psclip_optax.thresholds.auto import auto_threshold
from psclip_optax.thresholds.tracking import track_norms
from psclip_optax.training.config.commands import ClipAtName, MethodName, ScheduleName, TaskConfig


class Hyperparams(NamedTuple):
    """The hyperparameters in a method's state.

    Attributes:
      learning_rate: before the schedule.
      threshold: α, or the largest norm, in the units of the gradient's norm. "ps-clip-auto"
        multiplies its estimated scale by it, and "ps-clip-median" ignores it. ∞ clips nothing.
      beta: growth of the threshold with a sample's position, for "ps-clip" and "ps-clip-auto".
    """

    learning_rate: float
    threshold: float
    beta: float


class BatchNormState(NamedTuple):
    """Statistics of the last batch's mean gradient.

    Attributes:
      gradient_norm: float, its norm before clipping.
      clipped: bool, whether the norm is above the threshold.
    """

    gradient_norm: jax.Array
    clipped: jax.Array


class Method(NamedTuple):
    """A training method.

    Attributes:
      label: name in tables and figures.
      has_threshold: whether it clips.
      has_momentum: whether SGD with momentum follows the clipping.
      clip: threshold → the first link of the chain, for gradients of the mean loss; None for
        methods that clip samples.
      threshold: (threshold, β) → the threshold of each sample; None for methods that do not clip
      samples.
    """

    label: str
    has_threshold: bool
    has_momentum: bool
    clip: Callable[[Any], optax.GradientTransformation] | None = None
    threshold: Callable[[Any, Any], Threshold | AdaptiveThreshold[Any]] | None = None


def _recorded_norm(threshold: Any) -> optax.GradientTransformation:
    """Stores the norm of the gradient for the log, and changes nothing."""

    def init(params: Any) -> BatchNormState:
        del params
        return BatchNormState(jnp.float32(0), jnp.bool_(False))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, BatchNormState]:
        del state, params
        norm = optax.tree.norm(updates).astype(jnp.float32)
        return updates, BatchNormState(norm, norm > threshold)

    return optax.GradientTransformation(init, update)


def _no_clip(threshold: Any) -> optax.GradientTransformation:
    del threshold
    return _recorded_norm(jnp.inf)


def _batch_clip(threshold: Any) -> optax.GradientTransformation:
    return optax.chain(_recorded_norm(threshold), optax.clip_by_global_norm(threshold))


METHODS: dict[MethodName, Method] = {
    "sgd": Method("SGD", False, False, _no_clip),
    "momentum": Method("momentum SGD", False, True, _no_clip),
    "batch-clip": Method("batch clipping", True, True, _batch_clip),
    "ps-clip": Method("per-sample clipping", True, True, threshold=growing_threshold),
    "ps-clip-constant": Method(
        "per-sample clipping, constant",
        True,
        True,
        threshold=lambda threshold, beta: constant_threshold(threshold),
    ),
    "ps-clip-auto": Method(
        "per-sample clipping, automatic",
        True,
        True,
        threshold=lambda threshold, beta: moment_threshold(beta, scale=threshold),
    ),
    "ps-clip-median": Method(
        "per-sample clipping, running median",
        True,
        True,
        threshold=lambda threshold, beta: auto_threshold(),
    ),
}


def _method(name: str) -> Method:
    if name not in list(METHODS):
        raise ValueError(f"name: expected one of {', '.join(map(repr, METHODS))}, got {name!r}")
    return METHODS[name]


def method_that_clips(name: MethodName, clip_at: ClipAtName) -> MethodName:
    """Resolves a method's name: clipping at the batch is batch clipping.

    Args:
      name: one of `METHODS`.
      clip_at: the unit that per-sample methods clip.

    Returns:
      One of `METHODS`.

    Raises:
      ValueError: `name` is none of `METHODS`. The functions below raise it too.

    Examples:
      >>> method_that_clips("ps-clip", "batch"), method_that_clips("ps-clip", "micro-batch")
      ('batch-clip', 'ps-clip')
    """
    clips_before = _method(name).threshold is not None
    return "batch-clip" if clips_before and clip_at == "batch" else name


def method_of_alpha(name: MethodName, alpha: float | None) -> MethodName:
    """Resolves a method without α: it clips at the running median.

    Args:
      name: one of `METHODS`.
      alpha: α; None if it was not given.

    Returns:
      One of `METHODS`.

    Examples:
      >>> method_of_alpha("ps-clip", None), method_of_alpha("ps-clip", 1.0)
      ('ps-clip-median', 'ps-clip')
    """
    return "ps-clip-median" if name == "ps-clip" and alpha is None else name


def _limits(threshold: Callable[[Any, Any], Any], numbers: Any, groups: Any) -> Any:
    """Makes the samples' threshold, or a tree of thresholds or rules, one for each group."""
    given = threshold(numbers["threshold"], numbers["beta"])
    if groups is None:
        return given
    if not isinstance(given, AdaptiveThreshold):
        # So that a clipped gradient is no longer than with the threshold for all parameters.
        share = numbers["threshold"] / math.sqrt(len(jax.tree.leaves(groups)))
        given = threshold(share, numbers["beta"])
    return jax.tree.map(lambda _: given, groups)


def build_gradients(name: MethodName, config: TaskConfig, groups: Any = None) -> dict[str, Any]:
    """Builds the options of the gradients that a method's optimizer needs.

    Args:
      name: one of `METHODS`.
      config: names the engine, the clipped unit, and the number of micro-batches.
      groups: a tree prefix of the parameters with a leaf for each group; None for one group.

    Returns:
      Arguments for `linen_train_step`. The threshold comes from the optimizer's state.

    Examples:
      >>> build_gradients("momentum", TaskConfig(accumulate=2))
      {'microbatch_size': 32, 'gradients': 'mean'}
    """
    threshold = _method(name).threshold
    in_parts = config.accumulate > 1 or config.clip_at == "micro-batch"
    size = {"microbatch_size": config.batch_size // config.accumulate if in_parts else None}
    if threshold is None:
        return size | {"gradients": "mean"}

    def threshold_from(opt_state: Any) -> Any:
        return _limits(threshold, opt_state.hyperparams, groups)

    return size | {
        "gradients": "clipped",
        "threshold_from": threshold_from,
        "mode": config.engine,
        "clip_at": config.clip_at,
    }


def learning_rate_schedule(name: ScheduleName, num_steps: int) -> optax.Schedule:
    """Builds the factor of the learning rate over the steps of a run.

    Args:
      name: "cosine", from 1 to 0 along half a cosine, or "constant".
      num_steps: length of the run, at least 1.

    Returns:
      An Optax schedule, from a step that counts from 0 to the factor.

    Raises:
      ValueError: `name` is neither.

    Examples:
      >>> factor = learning_rate_schedule("cosine", 4)
      >>> [f"{factor(step):.3f}" for step in range(4)]
      ['1.000', '0.854', '0.500', '0.146']
    """
    if name == "constant":
        return optax.constant_schedule(1.0)
    if name != "cosine":
        raise ValueError(f"name: expected 'cosine' or 'constant', got {name!r}")
    return optax.cosine_decay_schedule(1.0, num_steps)


def build_optimizer(
    name: MethodName,
    hyperparams: Hyperparams,
    *,
    momentum: float,
    schedule: optax.Schedule,
    groups: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method's chain: clipping, (momentum) SGD, schedule.

    Args:
      name: one of `METHODS`.
      hyperparams: the hyperparameters in its initial state.
      momentum: decay of the momentum, in [0, 1).
      schedule: factor of the learning rate over steps.
      groups: as for `build_gradients`.

    Returns:
      An optimizer for the gradients of `build_gradients`; see `with_hyperparams`.

    Examples:
      >>> schedule = optax.constant_schedule(1.0)
      >>> tx = build_optimizer("batch-clip", Hyperparams(1.0, 5.0, 2.0), momentum=0.0,
      ...                      schedule=schedule)
      >>> updates, state = tx.update(jnp.array([6.0, 8.0]), tx.init(jnp.zeros(2)))
      >>> updates, gradient_figures(state)
      (Array([-3., -4.], dtype=float32),
       {'gradient_norm': Array(10., dtype=float32), 'clipped_share': Array(1., dtype=float32),
        'num_nonfinite': Array(0, dtype=int32)})
    """
    method = _method(name)

    def first_link(threshold: Any, beta: Any) -> optax.GradientTransformation:
        if method.clip is not None:
            return method.clip(threshold)
        assert method.threshold is not None
        limits = _limits(method.threshold, {"threshold": threshold, "beta": beta}, groups)
        is_rule = isinstance(limits, AdaptiveThreshold) or has_rules(limits)
        return track_norms(limits) if is_rule else optax.identity()

    def chain(learning_rate: Any, threshold: Any, beta: Any) -> optax.GradientTransformation:
        return optax.chain(
            first_link(threshold, beta),
            optax.sgd(learning_rate, momentum=momentum if method.has_momentum else None),
            optax.scale_by_schedule(schedule),
        )

    # An explicit dtype for the numbers: weakly typed numbers would recompile the step.
    return optax.inject_hyperparams(chain, hyperparam_dtype=jnp.float32)(**hyperparams._asdict())


def with_hyperparams(opt_state: Any, hyperparams: Hyperparams) -> Any:
    """Sets a method's hyperparameters without recompiling.

    Args:
      opt_state: state of an optimizer that `build_optimizer` built.
      hyperparams: the new hyperparameters.

    Returns:
      The state with these hyperparameters.

    Examples:
      >>> schedule = optax.constant_schedule(1.0)
      >>> tx = build_optimizer("sgd", Hyperparams(1.0, 1.0, 2.0), momentum=0.0, schedule=schedule)
      >>> state = with_hyperparams(tx.init(jnp.zeros(2)), Hyperparams(0.5, 1.0, 2.0))
      >>> tx.update(jnp.array([6.0, 8.0]), state)[0]
      Array([-3., -4.], dtype=float32)
    """
    numbers = {name: jnp.float32(value) for name, value in hyperparams._asdict().items()}
    return opt_state._replace(hyperparams=numbers)


def learning_rate_of(opt_state: Any) -> jax.Array:
    """Reads the learning rate before the schedule.

    Args:
      opt_state: state of an optimizer that `build_optimizer` built.

    Returns:
      float32 scalar.

    Examples:
      >>> schedule = optax.constant_schedule(1.0)
      >>> tx = build_optimizer("sgd", Hyperparams(0.5, 1.0, 2.0), momentum=0.0, schedule=schedule)
      >>> float(learning_rate_of(tx.init(jnp.zeros(2))))
      0.5
    """
    return opt_state.hyperparams["learning_rate"]


def gradient_figures(opt_state: Any) -> dict[str, jax.Array]:
    """Reads statistics of a mean gradient, with the names that per-sample clipping uses.

    Args:
      opt_state: state of an optimizer that `build_optimizer` built.

    Returns:
      Scalars: `gradient_norm`, the mean gradient's norm before clipping; `clipped_share`, 1 if it
      was clipped and 0 if not; `num_nonfinite`, 1 if it is not finite. Empty for the per-sample
      methods, whose statistics are in the train step's metrics.

    Examples:
      >>> schedule = optax.constant_schedule(1.0)
      >>> tx = build_optimizer("sgd", Hyperparams(1.0, 1.0, 2.0), momentum=0.0, schedule=schedule)
      >>> sorted(gradient_figures(tx.init(jnp.zeros(2))))
      ['clipped_share', 'gradient_norm', 'num_nonfinite']
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, BatchNormState))
    return {
        name: value
        for node in nodes
        if isinstance(node, BatchNormState)
        for name, value in _named(node).items()
    }


def _named(state: BatchNormState) -> dict[str, jax.Array]:
    return {
        "gradient_norm": state.gradient_norm,
        "clipped_share": state.clipped.astype(jnp.float32),
        "num_nonfinite": (~jnp.isfinite(state.gradient_norm)).astype(jnp.int32),
    }
