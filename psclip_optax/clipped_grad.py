"""Compute the clipped mean gradient from the loss itself, without stacked gradients."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import jax
from jax import lax

from psclip_optax import groups
from psclip_optax.clipped_functions import ClippedFunction, ClippedGrad, ClippedValueAndGrad
from psclip_optax.clipping import ClipStats, OnNonfinite
from psclip_optax.options import ClipAt, ClipOptions, Mode, Options, Reduction
from psclip_optax.thresholds import ConstantThreshold, GrowingThreshold
from psclip_optax.typing import (
    AuxT,
    AxisName,
    InAxes,
    Loss,
    LossWithAux,
    PyTree,
    ThresholdLike,
    ThresholdTree,
)

__all__ = ["ClippedGrad", "ClippedValueAndGrad", "clipped_grad", "clipped_value_and_grad"]


@overload
def clipped_value_and_grad(
    loss: Loss,
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[ClipOptions],
) -> ClippedValueAndGrad[jax.Array]: ...


@overload
def clipped_value_and_grad(
    loss: Loss,
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[ClipOptions],
) -> ClippedValueAndGrad[jax.Array, ClipStats]: ...


@overload
def clipped_value_and_grad(
    loss: LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[ClipOptions],
) -> ClippedValueAndGrad[tuple[jax.Array, AuxT]]: ...


@overload
def clipped_value_and_grad(
    loss: LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[ClipOptions],
) -> ClippedValueAndGrad[tuple[jax.Array, AuxT], ClipStats]: ...


@overload
def clipped_value_and_grad(
    loss: Loss | LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: bool = False,
    return_stats: bool = False,
    **options: Unpack[ClipOptions],
) -> ClippedFunction: ...


def clipped_value_and_grad(
    loss: Loss | LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: bool = False,
    in_axes: InAxes = 0,
    keep_batch_dim: bool = False,
    microbatch_size: int | None = None,
    mode: Mode = "auto",
    on_nonfinite: OnNonfinite = "drop",
    axis_name: AxisName = None,
    spmd_axis_name: AxisName = None,
    return_stats: bool = False,
    memory_limit_bytes: int | None = None,
    clip_at: ClipAt = "sample",
    reduction: Reduction = "mean",
    norm_precision: lax.Precision | None = None,
) -> ClippedFunction:
    r"""Build a function that returns value and clipped mean gradient, without stacked gradients.

    The function gives the same numbers as `jax.vmap` of `jax.value_and_grad` followed by
    [`psclip_optax.per_sample_clip`][],

    $$g = \frac1N \sum_{k=1}^n \gamma_k g_k, \qquad \gamma_k = \min(1, \tau_k / \|g_k\|)$$

    but never stacks the $g_k$. If an operation is linear in a parameter (a product, a convolution,
    a look-up), each sample's norm follows from the operation's inputs and cotangents, and the sum
    from weighted cotangents. Any loss that JAX can trace is supported: a parameter that is used in
    another way has an exact fallback, which does not affect the others.

    Args:
      loss: `loss(params, *example)`, a real scalar for ONE example.
      threshold: the largest norm τ_k of the sample at the 1-based position k: a number, a threshold
        such as `psc.growing_threshold`, or any callable from positions [n] to norms [n]. A tree
        prefix of the parameters with one of these for each group of leaves clips by group: each
        group has a separate ‖g_k‖ and γ_k, and a sample that is not finite in one group is dropped
        in all groups. [`psclip_optax.by_layer`][] makes such a prefix with a group for each layer,
        and [`psclip_optax.each_slice`][] is for layers that are stacked in one array. With None,
        each call has to pass a threshold, or a train step of `psclip_optax.training` does.
      has_aux: whether the loss returns `(loss, aux)`.
      in_axes: the axis of the samples in each argument after `params`: an int, None for an
        argument that all samples share, or a tuple with one of these (or a tree prefix of them)
        for each argument.
      keep_batch_dim: keep the sample axis with size 1, so that a loss written for batches can be
        used unchanged.
      microbatch_size: process the batch in slices of at most this many samples. This changes the
        memory, not the result.
      mode: how the sum is computed; the result is the same.

        * "one_pass" is the fastest.
        * "two_pass" needs about as much memory as a plain gradient. It runs one pass over the whole
          batch, or over two to four slices of it, depending on the shapes. If more slices would be
          needed (as with many rematerialised layers), or if devices may share the batch, it runs
          one forward pass and two backward passes instead. It always uses slices if the loss has a
          derivative that is not known to be linear in its cotangent, and when clipping by group.
        * "vmap" stacks gradients, as a reference. Every mode does so for a threshold below 1e-13.
        * "auto" is "one_pass" if it is estimated to fit into `memory_limit_bytes`, else "two_pass".
          When clipping by group, a group that meets data in one place is clipped there, within the
          backward pass, and none of its cotangents are stored; the plan calls this "fused".
      on_nonfinite: "drop" gives a sample weight 0 if its loss or gradient is not finite, and counts
        it; the sample keeps its position and its share in N. "one_pass" and "two_pass" also drop a
        sample whose squared norm overflows or vanishes: with a norm above 1.8e19 in float32, or
        below 1e-13 if a traced threshold is below 1e-13 too. The same holds for a layer's inputs
        and cotangents, whose products are its gradient: these modes need them between 1e-19 and
        1.8e19. "propagate" includes all samples.
      axis_name: under `jax.shard_map`, the mesh axis (or axes) over which the batch is sharded.
        Positions continue over the devices. Value, gradients and counts are those of the whole
        batch, the same on all devices (`out_specs` of `P()`); norms, scales and aux are those of a
        device's local samples (`P(axis_name)`). Omit an axis over which the batch varies only if
        the parameters vary over it too. Under `check_vma=False` JAX does not track which arrays
        vary: without `axis_name`, each device then returns the result of its local samples, without
        a warning.
      spmd_axis_name: passed to `jax.vmap`; needed for sharding constraints inside the loss.
      return_stats: whether to return a `psc.ClipStats` as well.
      memory_limit_bytes: the limit for "auto"; by default the memory that the device reports.
      clip_at: "sample" clips each sample's gradient. "micro-batch" clips the mean gradient of each
        `microbatch_size` consecutive samples at τ_j, j its 1-based position, and averages them by
        their numbers of samples. This does in one step, at the cost of plain gradients, what
        [`psclip_optax.accumulate_clipped`][] does over several. The micro-batch then replaces the
        sample: it has one position, one norm and one scale, and the whole micro-batch is dropped if
        a loss or gradient in it is not finite.
      reduction: "mean" divides by N. "sum" gives $\sum_k \gamma_k g_k$. Adding a sample to the
        batch, or removing it, changes the sum by at most its τ_k, provided that the thresholds of
        the other samples stay the same (constant ones do). When clipping by group the bound is
        $\sqrt{\sum_j \tau_{kj}^2}$ over the groups j; for a micro-batch it is its number of samples
        times its τ_j. Replacing a sample changes the sum by at most twice as much. Noise for
        differential privacy is scaled to this sensitivity. The value is still the mean loss, which
        no threshold bounds.
      norm_precision: the `jax.lax.Precision` of the products from which norms are computed; None
        means JAX's default, as in the loss. The default is full precision on a CPU, but rounds the
        operands to bfloat16 on a TPU and to TF32 on an NVIDIA GPU. `jax.lax.Precision.HIGHEST` uses
        float32 operands, and these products then take up to six times as long. It changes only the
        norms, never how gradients are rounded.

    Returns:
      `f(params, *batch, sample_mask=None, positions=None, threshold=None)`, which returns
      `(value, grads)`, or `((value, aux), grads)` with aux stacked on axis 0, and with
      `return_stats` a `psc.ClipStats` as a third item. The value is the mean loss over the samples
      that are unmasked and finite. `sample_mask`, bool [n], is False for padding, which has no
      position, no weight and no share in N. `positions`, int [n], replaces 1, 2, …. `threshold`
      replaces the one given here, for schedules without recompiling; when clipping by group it is
      one threshold, used for every group, or a tree again. `f.explain(params, *batch)` shows each
      parameter's route, its cost, and the reason for it; it accepts `jax.ShapeDtypeStruct`s too.
      `f.verify(params, *batch, num_samples=4)` compares gradients and norms of the first samples
      with those of `jax.vmap(jax.grad(loss))`, in float64 if x64 is enabled. It returns a table,
      with `.ok`.

    Raises:
      TypeError: the loss is no function or does not return a real scalar, a parameter is not real
        floating-point, or positions are not integers.
      ValueError: an option is out of range, batch arguments do not have the same number of
        samples, the number of samples is symbolic, a tree of thresholds is no prefix of the
        parameters' or has one for a subtree without leaves, the loss has effects other than those
        of `jax.debug` (which run as under `vmap(grad)`, in "two_pass" perhaps twice), or under
        `jax.shard_map` the loss varies over a mesh axis that is neither in `axis_name` nor one
        that the parameters vary over.

    Warns:
      UserWarning: the loss normalises by statistics over a batch axis of size 1, as batch
        normalisation in training mode does. It is issued each time the loss is traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> loss = lambda w, x: jnp.dot(w, x)
      >>> f = psc.clipped_value_and_grad(loss, psc.growing_threshold(alpha=1.0, beta=2.0))
      >>> value, grads = f(jnp.ones(2), jnp.array([[0.5, 0.0], [0.0, 100.0]]))
      >>> print(value, grads.round(3))
      50.25 [0.25  0.707]

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026 (the estimator).

      Bu et al., [Differentially Private Optimization on Large Model at Small
      Cost](https://arxiv.org/abs/2210.00038), 2023 (book-keeping, for a list of layers).

      Rochette, Manoel and Tramel, [Efficient Per-Example Gradient Computations in Convolutional
      Neural Networks](https://arxiv.org/abs/1912.06015), 2019 (the convolution's gradient).
    """
    check_loss(loss)
    options = Options(
        has_aux=has_aux,
        in_axes=in_axes,
        keep_batch_dim=keep_batch_dim,
        microbatch_size=microbatch_size,
        mode=mode,
        on_nonfinite=on_nonfinite,
        axis_name=axis_name,
        spmd_axis_name=spmd_axis_name,
        memory_limit_bytes=memory_limit_bytes,
        clip_at=clip_at,
        reduction=reduction,
        norm_precision=norm_precision,
    ).checked()
    thresholds = None if threshold is None else groups.as_thresholds(threshold)
    return ClippedValueAndGrad(loss, thresholds, options, return_stats)


@overload
def clipped_grad(
    loss: Loss,
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[ClipOptions],
) -> ClippedGrad[()]: ...


@overload
def clipped_grad(
    loss: Loss,
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[ClipOptions],
) -> ClippedGrad[ClipStats]: ...


@overload
def clipped_grad(
    loss: LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[ClipOptions],
) -> ClippedGrad[AuxT]: ...


@overload
def clipped_grad(
    loss: LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[ClipOptions],
) -> ClippedGrad[AuxT, ClipStats]: ...


@overload
def clipped_grad(
    loss: Loss | LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: bool = False,
    return_stats: bool = False,
    **options: Unpack[ClipOptions],
) -> ClippedGrad[*tuple[PyTree, ...]]: ...


def clipped_grad(
    loss: Loss | LossWithAux[AuxT],
    threshold: ThresholdLike | ThresholdTree | None = None,
    *,
    has_aux: bool = False,
    return_stats: bool = False,
    **options: Unpack[ClipOptions],
) -> ClippedGrad[*tuple[PyTree, ...]]:
    """Build a function that returns the clipped mean gradient only.

    Args:
      loss: `loss(params, *example)`, a real scalar for ONE example.
      threshold: as for [`psclip_optax.clipped_value_and_grad`][].
      has_aux: whether the loss returns `(loss, aux)`.
      return_stats: whether to return a `psc.ClipStats` as well.
      **options: the other arguments of [`psclip_optax.clipped_value_and_grad`][].

    Returns:
      `f(params, *batch, sample_mask=None, positions=None, threshold=None)`, which returns the
      gradients; with `has_aux` `(grads, aux)`; with `return_stats` a `psc.ClipStats` comes last.

    Raises:
      TypeError: as [`psclip_optax.clipped_value_and_grad`][] does.
      ValueError: as [`psclip_optax.clipped_value_and_grad`][] does.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> f = psc.clipped_grad(lambda w, x: jnp.dot(w, x), threshold=1.0)
      >>> print(f(jnp.ones(2), jnp.array([[0.5, 0.0], [0.0, 100.0]])))
      [0.25 0.5 ]

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    value_and_grad = clipped_value_and_grad(
        loss, threshold, has_aux=has_aux, return_stats=return_stats, **options
    )
    return ClippedGrad(value_and_grad, has_aux)


def check_loss(loss: object) -> None:
    if not callable(loss) or isinstance(loss, ConstantThreshold | GrowingThreshold):
        raise TypeError(
            f"the loss is a function loss(params, *example) and comes before the threshold, got "
            f"{loss!r}"
        )
