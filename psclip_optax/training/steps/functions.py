"""Build the gradient function of a train step, from a loss or a clipped function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from psclip_optax.clipped_functions import ClippedFunction
from psclip_optax.clipped_grad import (
    ClippedGrad,
    ClippedValueAndGrad,
    check_loss,
    clipped_value_and_grad,
)
from psclip_optax.options import ClipAt, Mode
from psclip_optax.thresholds import AdaptiveThreshold
from psclip_optax.thresholds.auto import auto_threshold
from psclip_optax.thresholds.tracking import TrackNormsState
from psclip_optax.training.steps.batch import (
    Batch,
    Loss,
    Metrics,
    checked_batch,
    logged,
    mean_logs,
)
from psclip_optax.training.steps.optimizers import check_optimizer, clip_states, nodes_of_kind
from psclip_optax.training.steps.ways import (
    MEAN,
    PER_SAMPLE,
    Computed,
    Returned,
    ThresholdFrom,
    Way,
    clipped,
    mean_in_parts,
)
from psclip_optax.typing import Params, PyTree, ThresholdLike, ThresholdTree

Gradients: TypeAlias = Literal["clipped", "per_sample", "mean"]
StepThreshold: TypeAlias = ThresholdLike | AdaptiveThreshold[PyTree] | ThresholdTree

_OF_THE_STEP = ("threshold", "threshold_from", "return_norms", "return_samples")


class GradientOptions(TypedDict, total=False):
    """The options of `gradient_function`, which documents them."""

    gradients: Gradients | None
    has_aux: bool
    threshold: StepThreshold | None
    threshold_from: ThresholdFrom | None
    mode: Mode
    microbatch_size: int | None
    clip_at: ClipAt
    return_norms: bool
    return_samples: bool


class GradientFunction(NamedTuple):
    """The gradient function of a train step, made by `gradient_function`.

    Attributes:
      loss: the loss for one example.
      has_aux: whether the loss returns a pair (loss, aux).
      way: a function from the optimizer's state to the way of computing gradients.
    """

    loss: Loss
    has_aux: bool
    way: Callable[[optax.OptState], Way]

    def compute(
        self, loss: Loss, params: Params, batch: Batch, opt_state: optax.OptState
    ) -> Computed:
        """Computes the gradients of `loss`, which is `self.loss` as a function of `params`."""
        way = self.way(opt_state)
        return way.compute(logged(loss, self.has_aux), params, batch, opt_state)

    def checked_batch(
        self,
        opt_state: optax.OptState,
        examples: tuple[PyTree, ...],
        sample_mask: jax.typing.ArrayLike | None,
        positions: jax.typing.ArrayLike | None,
    ) -> Batch:
        """Refuses an optimizer that does not fit the gradients, and checks the batch."""
        way = self.way(opt_state)
        check_optimizer(opt_state, way.stacked)
        _check_use_of_positions(positions, way.by_position)
        return checked_batch(examples, sample_mask, positions)


def gradient_function(
    loss: Loss | ClippedFunction | GradientFunction,
    **options: Unpack[GradientOptions],
) -> GradientFunction:
    """Builds the gradient function of `linen_train_step` and `nnx_train_step`.

    Args:
      loss: A function that [`psclip_optax.clipped_value_and_grad`][] returned, with samples on axis
        0 and with its options. Or a loss for one example, as for
        [`linen_train_step`][psclip_optax.training.steps.linen_train_step] or
        [`nnx_train_step`][psclip_optax.training.steps.nnx_train_step], with the options below. Or a
        function that `gradient_function` returned.
      **options: `threshold` is a number, a threshold such as `psclip_optax.growing_threshold`, or
        an adaptive one such as `psclip_optax.moment_threshold()`. For an adaptive threshold, the
        optimizer needs a [`psclip_optax.track_norms`][] of the same rule, which stores its state. A
        tree prefix of the parameters with one of these for each group clips by group. `threshold`
        replaces the threshold passed to `clipped_value_and_grad`. Without either it is
        [`psclip_optax.auto_threshold`][], whose state `track_norms()` stores.

        `threshold_from` replaces `threshold` by a function from the optimizer's state to the
        threshold, for scheduled or tuned thresholds.

        `return_norms`, False by default: whether the metrics include "norms", float [n] or by group
        [n, groups], the gradient norms before clipping (one for each micro-batch if those are
        clipped). They are NaN for padding.

        `return_samples`, False by default: whether the metrics include "samples", a dict of "loss",
        "norm" and "scale" of each sample in this step, float [n] each. They are NaN for padding.
        When clipping by group, the norm is that of the whole gradient, and the scale is the norm's
        share that remains after clipping. [`psclip_optax.tails.most_clipped`][] ranks samples by
        them.

        The other options are for a loss. `gradients` is "clipped" by default if a threshold is
        given or the optimizer has a [`psclip_optax.track_norms`][]: any Optax optimizer then gets
        the clipped mean gradient of [`psclip_optax.clipped_value_and_grad`][]. Otherwise it is
        "per_sample" by default: the optimizer, whose first link is
        [`psclip_optax.per_sample_clip`][], gets the stacked gradients [n, …], the mask and the
        positions. "mean" is the gradient of the mean loss, for baselines.

        `has_aux`, False by default: whether the loss returns a pair (loss, aux), where aux is a
        pytree of scalars.

        `mode` and `clip_at` are for "clipped", as for [`psclip_optax.clipped_value_and_grad`][].
        Micro-batches have no `positions`. With micro-batches the metrics include
        "num_microbatches", and "num_clipped" and "num_nonfinite" count micro-batches.

        `microbatch_size` is for "clipped" and "mean": the batch is processed in slices of at most
        this many samples.

    Returns:
      A function to pass to a train step.

    Raises:
      ValueError: `gradients` or an option is unknown, a threshold is not used, or an option belongs
        to `clipped_value_and_grad`.
      TypeError: The loss or `threshold_from` is not a function.

    Examples:
      >>> import psclip_optax as psc
      >>> loss = lambda params, x: params["w"] * x
      >>> clipped = gradient_function(psc.clipped_value_and_grad(loss, 1.0, mode="two_pass"))
      >>> baseline = gradient_function(loss, gradients="mean")
    """
    if isinstance(loss, GradientFunction):
        _check_unsaid(options, ())
        return loss
    if isinstance(loss, ClippedValueAndGrad):
        _check_unsaid(options, _OF_THE_STEP)
        return _of_built(
            loss,
            options.get("threshold"),
            options.get("threshold_from"),
            options.get("return_norms", False),
            options.get("return_samples", False),
        )
    return _of_loss(loss, **options)


def _of_built(
    function: ClippedFunction,
    threshold: StepThreshold | None,
    threshold_from: ThresholdFrom | None,
    return_norms: bool,
    return_samples: bool,
) -> GradientFunction:
    if function.options.in_axes != 0 or function.options.axis_name is not None:
        raise ValueError(
            "a train step takes batches with the samples on axis 0, of all devices together, got a "
            f"clipped_value_and_grad with in_axes={function.options.in_axes!r} and "
            f"axis_name={function.options.axis_name!r}; leave both out, close over what samples "
            "share, and shard the batch by its jax.sharding"
        )
    if None not in (threshold, threshold_from):
        raise ValueError(
            "a train step takes one of threshold and threshold_from, or neither, got "
            f"{threshold=}, {threshold_from=}"
        )
    _check_threshold_from(threshold_from)
    own = function.threshold if threshold is None else threshold
    returned = _returned(function.options.clip_at, return_norms, return_samples)
    way = clipped(function, _source(own, threshold_from), returned)
    return GradientFunction(function.loss, function.options.has_aux, lambda opt_state: way)


def _of_loss(
    loss: Loss,
    *,
    gradients: str | None = None,
    has_aux: bool = False,
    threshold: StepThreshold | None = None,
    threshold_from: ThresholdFrom | None = None,
    mode: Mode = "auto",
    microbatch_size: int | None = None,
    clip_at: ClipAt = "sample",
    return_norms: bool = False,
    return_samples: bool = False,
) -> GradientFunction:
    _check_built_whole(loss)
    function = clipped_value_and_grad(
        loss, has_aux=has_aux, mode=mode, microbatch_size=microbatch_size, clip_at=clip_at
    )
    has_threshold = threshold is not None or threshold_from is not None
    name = gradients or ("clipped" if has_threshold else "per_sample")
    _check_name(name, threshold, threshold_from)
    _check_threshold_from(threshold_from)
    returned = _returned(clip_at, return_norms, return_samples)
    by_clipping = clipped(function, _source(threshold, threshold_from), returned)
    if name == "clipped":
        return GradientFunction(loss, has_aux, lambda opt_state: by_clipping)
    _check_is_of_clipped(name, clip_at, returned)
    named = _unclipped(name, microbatch_size)

    def way(opt_state: optax.OptState) -> Way:
        tracks_norms = nodes_of_kind(opt_state, TrackNormsState) and not clip_states(opt_state)
        return by_clipping if gradients is None and tracks_norms else named

    return GradientFunction(loss, has_aux, way)


def _source(threshold: StepThreshold | None, threshold_from: ThresholdFrom | None) -> ThresholdFrom:
    given = auto_threshold() if threshold is None else threshold
    return threshold_from or (lambda _: given)


def _unclipped(name: str, microbatch_size: int | None) -> Way:
    if microbatch_size is None:
        return PER_SAMPLE if name == "per_sample" else MEAN
    if name == "per_sample":
        raise ValueError(
            'gradients="per_sample" stacks the whole batch; microbatch_size is of "clipped" and '
            f'"mean", got {microbatch_size}'
        )
    return mean_in_parts(microbatch_size)


def _check_unsaid(options: GradientOptions, known: tuple[str, ...]) -> None:
    misplaced = [name for name in options if name not in known]
    if misplaced:
        raise ValueError(
            "a gradient function that is built has its options already, got "
            f"{', '.join(misplaced)} beside it; give them to what builds it, as in "
            "linen_train_step(psclip_optax.clipped_value_and_grad(loss, threshold, has_aux=True))"
        )


def _check_built_whole(loss: object) -> None:
    check_loss(loss)
    if isinstance(loss, ClippedGrad):
        raise TypeError(
            "a train step logs the loss too, but clipped_grad leaves it out; pass "
            "psclip_optax.clipped_value_and_grad(loss, threshold)"
        )


def _check_name(name: str, threshold: object, threshold_from: object) -> None:
    known = ("per_sample", "mean", "clipped")
    if name not in known:
        raise ValueError(f"gradients is one of {', '.join(map(repr, known))}, got {name!r}")
    has_threshold = threshold is not None or threshold_from is not None
    if (has_threshold and name != "clipped") or None not in (threshold, threshold_from):
        raise ValueError(
            'gradients="clipped" takes one of threshold and threshold_from, or neither, the others '
            f"take none, got gradients={name!r}, {threshold=}, {threshold_from=}; per_sample_clip "
            "has its threshold in the optimizer"
        )


def _check_threshold_from(threshold_from: object) -> None:
    if threshold_from is not None and not callable(threshold_from):
        raise TypeError(
            "threshold_from is a function from the optimizer's state to the threshold, got "
            f"{threshold_from!r}; a threshold itself is passed as threshold"
        )


def _returned(clip_at: str, norms: bool, samples: bool) -> Returned:
    if samples and clip_at != "sample":
        raise ValueError(
            "return_samples tells what clipping did to each sample, got it with "
            f"clip_at={clip_at!r}, which clips no samples; leave one of them out, or take "
            "return_norms for the norms of what is clipped"
        )
    return Returned(norms, samples)


def _check_is_of_clipped(name: str, clip_at: str, returned: Returned) -> None:
    if clip_at != "sample":
        raise ValueError(
            f'clip_at is of gradients="clipped", got {clip_at!r} with gradients={name!r}; give '
            "the step a threshold, or leave clip_at out"
        )
    for option, wanted in returned._asdict().items():
        if wanted:
            raise ValueError(
                f'return_{option} is of gradients="clipped", got gradients={name!r}, whose step '
                "has no norms to return; give the step a threshold, jnp.inf to clip nothing"
            )


def _check_use_of_positions(positions: object, by_position: bool) -> None:
    if positions is not None and not by_position:
        raise ValueError(
            "positions are of samples that are clipped one by one; a step with "
            'gradients="mean" or clip_at="micro-batch" has no use for them: leave them out'
        )


def metrics_of(computed: Computed, batch: Batch, opt_state: optax.OptState) -> Metrics:
    """Collects the metrics of a step."""
    states = clip_states(opt_state)
    figures = states[0]._asdict() if states else computed.figures
    unlogged = ("num_updates", "all_finite", "threshold_state")
    figures = {name: value for name, value in figures.items() if name not in unlogged}
    if figures:
        number = figures.get("num_microbatches", figures["num_samples"])
        figures["clipped_share"] = figures["num_clipped"] / jnp.maximum(number, 1)
    return mean_logs(computed.logs, batch.sample_mask) | figures
