"""Clip stacked per-sample gradients, and average them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, groups, meshes, stacks
from psclip_optax.arrays import (
    PART_IT_OFF,
    array_leaves,
    described,
    dtype_of,
    is_integer,
)
from psclip_optax.clipped_sums import Batch, clip_and_sum
from psclip_optax.clipping import BatchFigures, OnNonfinite
from psclip_optax.groups import Limits
from psclip_optax.thresholds import AdaptiveThreshold, ConstantThreshold
from psclip_optax.thresholds.tracking import as_adaptive, state_for_batch
from psclip_optax.typing import AxisName, PyTree, Threshold, ThresholdLike, ThresholdTree

UNCLIPPED = ConstantThreshold(math.inf)


class _Figures(NamedTuple):
    num_updates: jax.Array  # not `count`: Adam has one in the same chain
    num_samples: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    mean_scale: jax.Array
    median_norm: jax.Array
    max_norm: jax.Array
    all_finite: jax.Array
    threshold_state: PyTree = ()


class PerSampleClipState(_Figures):
    """Holds statistics of the last batch, to log, e.g. with `optax.tree.get`.

    Norms and the mean scale are over the samples that are unmasked and finite; 0 if there are none.
    If a tree of thresholds clips by group, they and `num_clipped` have shape [groups].

    Attributes:
      num_updates: int32, the number of updates so far.
      num_samples: int32, N, the number of unmasked samples.
      num_clipped: int32, the number of samples scaled by γ_k < 1.
      num_nonfinite: int32, the number of unmasked samples that are not finite.
      mean_scale: float, the mean of γ_k.
      median_norm: float, the median of ‖g_k‖ before clipping.
      max_norm: float, the largest ‖g_k‖ before clipping.
      all_finite: bool, whether all unmasked samples were finite.
      threshold_state: the state of an adaptive threshold for the next batch, or a tree of such
        states; () for any other threshold.
    """

    __slots__ = ()

    def __new__(cls, *fields: Any, **named: Any) -> PerSampleClipState:
        # JAX calls this when it rebuilds the tree. optax.contrib.sam selects a state by a weighted
        # sum with weights 0 and 1, in which only a bool changes its dtype.
        state = super().__new__(cls, *fields, **named)
        stacks.refuse_weighted_sum(state.all_finite)
        return state


def _next_state(
    state: PerSampleClipState, figures: BatchFigures, threshold_state: PyTree
) -> PerSampleClipState:
    num_updates = jnp.asarray(optax.safe_increment(state.num_updates))
    before = state[1 : 1 + len(figures)]
    cast = [new.astype(old.dtype) for new, old in zip(figures, before, strict=True)]
    all_finite = figures.num_nonfinite == 0
    return PerSampleClipState(num_updates, *cast, all_finite, threshold_state)


def _check_sample_axis(sample_axis: int) -> int:
    if not is_integer(sample_axis):
        raise TypeError(
            f"sample_axis is a Python int, got {sample_axis!r}; under optax.inject_hyperparams add "
            "static_args=('sample_axis',)"
        )
    return int(sample_axis)


def _check_state(state: object) -> None:
    if not isinstance(state, PerSampleClipState):
        raise TypeError(
            "per_sample_clip's update takes (per_sample_grads, state, params) with a "
            f"PerSampleClipState from its init or its last update, got {described(state)}"
        )


def per_sample_clip(
    threshold: ThresholdLike | AdaptiveThreshold[PyTree] | ThresholdTree | None = None,
    *,
    sample_axis: int = 0,
    on_nonfinite: OnNonfinite = "drop",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip every sample's gradient to its threshold, then average over the batch.

    The transformation takes stacked per-sample gradients, as `jax.vmap` of `jax.grad` returns them,
    and computes

    $$g = \frac1N \sum_{k=1}^n \gamma_k g_k, \qquad \gamma_k = \min(1, \tau_k / \|g_k\|)$$

    where the norm is over all leaves of sample k together, or over those of each group. It has to
    be the *first* link of a chain. Because it changes shapes, put `optax.masked`,
    `optax.partition`, `optax.MultiSteps` and `optax.apply_if_finite` around the links after it.

    With τ = ∞ nothing is clipped, and the result is the plain mean gradient. Norms and sums
    accumulate in `promote_types(dtype, float32)`.

    Args:
      threshold: the largest norm τ_k of the sample at the 1-based position k, in the units of the
        gradient's norm: a number (the same for all), [`psclip_optax.growing_threshold`][], any
        callable from integer positions [n] to norms [n], or an adaptive one such as
        [`psclip_optax.moment_threshold`][]. An adaptive threshold computes τ_k from the norms of
        earlier batches, which the state summarises. None means [`psclip_optax.auto_threshold`][],
        which needs no number. A tree prefix of the parameters with one of these for each group of
        leaves clips by group: each group has a separate ‖g_k‖ and γ_k. [`psclip_optax.by_layer`][]
        makes such a prefix, and [`psclip_optax.each_slice`][] is for layers that are stacked in one
        array.
      sample_axis: the axis of every leaf along which the n samples are stacked.
      on_nonfinite: "drop" gives a sample weight 0 if its gradient contains NaN or ∞, and counts it;
        the sample keeps its position and its share in N. "propagate" includes it, so the result is
        not finite. A norm beyond the square root of the dtype's range (1.8e19 in float32) may also
        give NaN with "propagate"; "drop" clips it like any other. "propagate" reads float32
        gradients twice, which is the minimum, and so does "drop" if all are finite.
      axis_name: under `jax.shard_map`, the mesh axis (or axes) over which the samples are sharded.
        Positions continue over the devices. The result and the state are those of the whole batch,
        the same on all devices (`out_specs` of `P()`). Under shard_map, `jax.vmap(jax.grad(loss))`
        sums the gradients of replicated parameters over the devices. Mark the parameters first, by
        `jax.lax.pcast(params, axis_name, to="varying")`, so that each device has the gradients of
        its samples.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its update takes
      `(per_sample_grads, state, params=None, *, sample_mask=None, positions=None)`:

      * `per_sample_grads`: a pytree of floating-point arrays, with size n on `sample_axis`;
      * `params`: the parameters; if given, shapes are checked against theirs;
      * `sample_mask`: bool [n], False for padding, which has no position, no weight and no share
        in N;
      * `positions`: int [n], replaces 1, 2, …: for slices of a larger batch, for shards, or a
        permutation if batches are sorted.

      It returns the mean without the sample axis, in the leaves' dtypes, and a
      [`psclip_optax.transforms.PerSampleClipState`][]. N = 0 gives zeros. A tree without leaves
      gives a tree without leaves.

    Raises:
      TypeError: a leaf is not real floating-point, a threshold is neither a number nor a
        callable, or the state is that of another transformation.
      ValueError: a leaf has no sample axis, leaves have unequal numbers of samples, there are
        parameters but no gradients, shapes do not fit the parameters, mask or positions are not
        of shape [n], a tree of thresholds is no prefix of the gradients' or has one for a subtree
        without leaves, the stack is summed over the devices of `axis_name`, or the transformation
        is wrapped in `optax.masked`, `optax.MultiSteps`, `optax.contrib.sam` or the like.

    Warns:
      UserWarning: the stack takes more memory than the devices have. It is issued during tracing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import psclip_optax as psc
      >>> loss = lambda w, x: jnp.dot(w, x)
      >>> tx = optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1))
      >>> w = jnp.zeros(2)
      >>> x = jnp.array([[0.5, 0.0], [0.0, 100.0]])  # the second is an outlier
      >>> grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(w, x)
      >>> updates, state = tx.update(grads, tx.init(w), w)
      >>> updates
      Array([-0.025, -0.05 ], dtype=float32)
      >>> int(optax.tree.get(state, "num_clipped"))
      1

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    rule = as_adaptive(threshold)
    sample_axis = _check_sample_axis(sample_axis)
    clipping.check_on_nonfinite(on_nonfinite)

    def init(params: optax.Params) -> PerSampleClipState:
        stacks.refuse_masked_nodes(params)
        leaves = array_leaves("params", params, PART_IT_OFF)
        floats = [p for _, p in leaves if jnp.issubdtype(dtype_of(p), jnp.floating)]
        # Each field has a separate array: a donated state may not contain an array twice.
        integers = [jnp.zeros((), jnp.int32) for _ in range(4)]
        threshold_state = rule.init()
        shape = groups.fitted(rule.threshold(threshold_state), params).groups.shape
        numbers = [jnp.zeros(shape, stacks.norm_dtype(floats)) for _ in range(3)]
        state = PerSampleClipState(*integers, *numbers, jnp.ones((), bool), threshold_state)
        return state._replace(num_clipped=jnp.zeros(shape, jnp.int32))

    def update(
        per_sample_grads: optax.Updates,
        state: PerSampleClipState,
        params: optax.Params | None = None,
        *,
        sample_mask: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, PerSampleClipState]:
        del extra_args
        _check_state(state)
        threshold = rule.threshold(state.threshold_state)
        arguments = (per_sample_grads, state, params, sample_mask, positions, threshold)
        mesh = meshes.explicit_mesh(arguments)
        if mesh is None:
            return compute(*arguments)
        out_specs = (meshes.specs_without(per_sample_grads, sample_axis), P())
        return meshes.with_auto_axes(compute, arguments, mesh, out_specs)

    def compute(
        per_sample_grads: optax.Updates,
        state: PerSampleClipState,
        params: optax.Params | None,
        sample_mask: jax.typing.ArrayLike | None,
        positions: jax.typing.ArrayLike | None,
        threshold: Threshold | ThresholdTree,
    ) -> tuple[optax.Updates, PerSampleClipState]:
        meshes.check_axis_name(axis_name)
        stacks.refuse_masked_nodes(per_sample_grads)
        limits = groups.fitted(threshold, per_sample_grads, sample_axis)
        if not jax.tree.leaves((per_sample_grads, params)):
            figures = clipping.no_figures()
            return per_sample_grads, _next_state(state, figures, state.threshold_state)
        stack = stacks.check_stack(per_sample_grads, sample_axis)
        meshes.check_sharded("per_sample_grads", per_sample_grads, axis_name)
        stacks.check_against_params(stack, per_sample_grads, params)
        stacks.warn_if_beyond_memory(stack)
        n = stack.num_samples
        mask = None if sample_mask is None else clipping.check_sample_mask(sample_mask, n)
        positions = None if positions is None else clipping.check_positions(positions, n)
        counts = jnp.ones(n, bool) if mask is None else mask
        clipped_sum = functools.partial(
            clip_and_sum,
            stack.leaves,
            axes=stack.axes,
            groups=limits.groups,
            masked=mask is not None,
            on_nonfinite=on_nonfinite,
        )

        def thresholds(limits: Limits) -> jax.Array:
            dtype = stacks.norm_dtype(stack.leaves)
            return clipping.batch_thresholds(limits, n, dtype, mask, positions, axis_name)

        def measure() -> jax.Array:
            unclipped = limits._replace(thresholds=(UNCLIPPED,) * len(limits.thresholds))
            return clipped_sum(Batch(thresholds(unclipped), counts))[1].norms

        own_limits = limits
        if rule.is_new is not None:
            own = state_for_batch(rule, state.threshold_state, measure, counts, axis_name=axis_name)
            own_limits = groups.fitted(rule.threshold(own), per_sample_grads, sample_axis)
        sums, stats, kept = clipped_sum(Batch(thresholds(own_limits), counts))
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
            stats, counts, kept = clipping.over_devices(stats, counts, kept, axis_name)
        threshold_state = rule.update(state.threshold_state, stats.norms, counts)
        figures = clipping.batch_figures(stats, counts, kept)
        state = _next_state(state, figures, threshold_state)
        divisor = jnp.maximum(state.num_samples, 1)
        means = [
            (total / divisor.astype(total.dtype)).astype(leaf.dtype)
            for total, leaf in zip(sums, stack.leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(per_sample_grads), means), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] (the first argument has its own name)
