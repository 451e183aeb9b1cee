"""Compute an optimizer's gradients from a logged loss and a batch, in one of several ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from psclip_optax.clipped_functions import ClippedFunction
from psclip_optax.clipped_grad import clipped_value_and_grad
from psclip_optax.clipping import ClipStats, batch_figures, beside
from psclip_optax.groups import has_rules, in_groups_of, is_prefix, is_threshold, rule_by_group
from psclip_optax.thresholds import AdaptiveThreshold
from psclip_optax.thresholds.tracking import state_for_batch
from psclip_optax.training.steps.batch import (
    Batch,
    Loss,
    Metrics,
    at_least_one,
    over_samples,
    sum_over,
    which_count,
    with_samples_for_padding,
)
from psclip_optax.training.steps.optimizers import tracked_state
from psclip_optax.typing import Params, PyTree, ThresholdLike, ThresholdTree

ThresholdFrom: TypeAlias = Callable[
    [optax.OptState], ThresholdLike | AdaptiveThreshold[PyTree] | ThresholdTree
]


class Computed(NamedTuple):
    """Holds gradients for the optimizer, and logs.

    Attributes:
      logs: the logs of the loss, stacked [n].
      gradients: stacked [n, …], or with the parameters' shapes.
      extra_args: additional arguments of the optimizer's update.
      figures: statistics of the clipping if it is done already, with "norms" and "samples" if
        requested.
    """

    logs: Metrics
    gradients: PyTree
    extra_args: dict[str, jax.Array | None]
    figures: Metrics


class Way(NamedTuple):
    """A way of computing gradients from a loss.

    Attributes:
      compute: (logged loss, params, batch, state of the optimizer) → gradients.
      stacked: Whether the gradients still have their sample axis, for per_sample_clip.
      by_position: Whether each sample is clipped at the threshold of its position.
    """

    compute: Callable[[Loss, Params, Batch, optax.OptState], Computed]
    stacked: bool
    by_position: bool


def _per_sample(loss: Loss, params: Params, batch: Batch, opt_state: optax.OptState) -> Computed:
    del opt_state
    gradients, logs = over_samples(jax.grad(loss, has_aux=True), params, batch.examples)
    extra_args = {"sample_mask": batch.sample_mask, "positions": batch.positions}
    return Computed(logs, gradients, extra_args, {})


def _mean(loss: Loss, params: Params, batch: Batch, opt_state: optax.OptState) -> Computed:
    del opt_state
    examples = with_samples_for_padding(batch)

    def mean_loss(params: Params) -> tuple[jax.Array, Metrics]:
        losses, logs = over_samples(loss, params, examples)
        counts = which_count(losses, batch.sample_mask)
        return sum_over(losses, counts) / at_least_one(counts), logs

    gradients, logs = jax.grad(mean_loss, has_aux=True)(params)
    return Computed(logs, gradients, {}, {})


PER_SAMPLE = Way(_per_sample, stacked=True, by_position=True)
MEAN = Way(_mean, stacked=False, by_position=False)


def mean_in_parts(microbatch_size: int) -> Way:
    """Computes unclipped mean gradients, one micro-batch after another."""

    def compute(loss: Loss, params: Params, batch: Batch, opt_state: optax.OptState) -> Computed:
        del opt_state
        value_and_grad = clipped_value_and_grad(
            loss,
            jnp.inf,
            has_aux=True,
            microbatch_size=microbatch_size,
            clip_at="micro-batch",
            on_nonfinite="propagate",
        )
        (_, logs), gradients = value_and_grad(
            params, *batch.examples, sample_mask=batch.sample_mask
        )
        return Computed(logs, gradients, {}, {})

    return Way(compute, stacked=False, by_position=False)


class Returned(NamedTuple):
    """Says which values of single samples to return.

    Attributes:
      norms: whether to return the norms of the clipped gradients.
      samples: whether to return each sample's loss, norm and scale.
    """

    norms: bool
    samples: bool


def clipped(function: ClippedFunction, threshold_from: ThresholdFrom, returned: Returned) -> Way:
    """Computes clipped mean gradients, at a threshold from the optimizer's state.

    Args:
      function: the clipped function, whose loss is replaced by the logged one.
      threshold_from: a function from the optimizer's state to a threshold, a tree or a rule.
      returned: which values of single samples to return.
    """
    options = function.options

    def compute(loss: Loss, params: Params, batch: Batch, opt_state: optax.OptState) -> Computed:
        value_and_grad = functools.partial(
            dataclasses.replace(
                function, loss=loss, options=options._replace(has_aux=True), return_stats=True
            ),
            params,
            *batch.examples,
            sample_mask=batch.sample_mask,
            positions=batch.positions,
        )
        counts = batch.counts()
        units = options.unit(counts.size).counting(counts)
        threshold, first = threshold_from(opt_state), None
        if has_rules(threshold):
            threshold = rule_by_group(threshold)
        if isinstance(threshold, AdaptiveThreshold):
            threshold = _threshold_of(threshold, opt_state, units, value_and_grad)
            first = _first_thresholds(threshold)
        (_, logs), gradients, stats = value_and_grad(threshold=threshold)
        figures = _figures(stats, units)
        if options.clip_at == "micro-batch":
            number = {"num_microbatches": figures["num_samples"]}
            figures |= number | {"num_samples": jnp.sum(counts, dtype=jnp.int32)}
        if returned.norms:
            figures["norms"] = jnp.where(beside(units, stats.norms), stats.norms, jnp.nan)
        if returned.samples:
            figures["samples"] = _samples(stats, logs["loss"], counts)
        if first is None:
            return Computed(logs, gradients, {}, figures)
        figures["threshold_scale"] = first
        extra_args = {"norms": stats.norms, "sample_mask": units}
        return Computed(logs, gradients, extra_args, figures)

    return Way(compute, stacked=False, by_position=options.clip_at == "sample")


def _threshold_of(
    rule: AdaptiveThreshold[PyTree],
    opt_state: optax.OptState,
    units: jax.Array,
    value_and_grad: Callable[..., tuple[PyTree, Params, ClipStats]],
) -> ThresholdTree:
    """Returns the rule's threshold for this batch; a new rule uses the batch's own norms."""
    state = tracked_state(rule, opt_state)
    limits = in_groups_of(rule.threshold(state), jnp.inf)
    measure = lambda: value_and_grad(threshold=limits)[-1].norms  # noqa: E731
    return rule.threshold(state_for_batch(rule, state, measure, units))


def _first_thresholds(threshold: ThresholdTree) -> jax.Array:
    """Returns τ_1, or for a tree of thresholds the τ_1 of all groups."""
    of_groups = jax.tree.leaves(threshold, is_leaf=is_threshold)
    first = jnp.stack([own(jnp.ones(1, int))[0] for own in of_groups])
    return first if is_prefix(threshold) else first[0]


def _figures(stats: ClipStats, units: jax.Array) -> Metrics:
    finite = jnp.all(jnp.isfinite(stats.norms).reshape(units.size, -1), axis=1)
    return batch_figures(stats, units, units & finite)._asdict()


def _samples(stats: ClipStats, losses: jax.Array, counts: jax.Array) -> Metrics:
    """Returns the loss, norm and scale of each sample's whole gradient, [n]; NaN for padding."""
    by_group = stats.norms.ndim > 1
    norms, scales = _of_whole_gradients(stats) if by_group else (stats.norms, stats.scales)
    values = {"loss": losses, "norm": norms, "scale": scales}
    return {name: jnp.where(counts, own, jnp.nan) for name, own in values.items()}


def _of_whole_gradients(stats: ClipStats) -> tuple[jax.Array, jax.Array]:
    """Returns ‖g_k‖, and the share of it that remains after clipping each group."""
    before, after = _over_groups(stats.norms), _over_groups(stats.norms * stats.scales)
    has_share = jnp.isfinite(before) & (before > 0)
    share = jnp.minimum(after / jnp.where(has_share, before, 1), 1)
    # A dropped gradient has scales 0, a zero gradient has scales 1.
    return before, jnp.where(has_share, share, stats.scales[:, 0])


def _over_groups(norms: jax.Array) -> jax.Array:
    """Computes the root of a sum of squares relative to the largest, so that none overflows."""
    largest = jnp.max(norms, axis=1, keepdims=True)
    units = norms / jnp.where(largest > 0, largest, 1)
    total = largest[:, 0] * jnp.linalg.norm(units, axis=1)
    return jnp.where(jnp.isfinite(largest[:, 0]), total, largest[:, 0])
