"""clipped_value_and_grad: the clipped mean gradient from the loss itself, nothing stacked."""

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
    r"""Value and clipped mean gradient of a per-sample loss, without stacked gradients.

    Gives the same numbers as `jax.vmap` of `jax.value_and_grad` followed by
    [`psclip_optax.per_sample_clip`][],

    $$g = \frac1N \sum_{k=1}^n \gamma_k g_k, \qquad \gamma_k = \min(1, \tau_k / \|g_k\|)$$

    but takes the norms from what enters and leaves each place where a parameter meets data in an
    operation linear in it (a product, a convolution, a look-up), and the sum from one plain
    backward pass with weighted cotangents. Any traceable loss will do: parameters that are used in
    other ways take an exact fallback, each for itself.

    Args:
      loss: `loss(params, *example)`, a real scalar for ONE example.
      threshold: the largest norm τ_k of the sample at the 1-based position k: a number, a threshold
        such as `psc.growing_threshold`, or any callable from positions [n] to norms [n]. A tree
        prefix of the parameters with one of these for each group of leaves clips by group: ‖g_k‖
        and γ_k are then of a group's leaves alone, and a sample that is not finite in one is
        dropped from all. [`psclip_optax.by_layer`][] makes one for the layers, and
        [`psclip_optax.each_slice`][] is for layers that are stacked in one array. None leaves it to
        each call, and to the train steps of `psclip_optax.training`.
      has_aux: whether the loss returns `(loss, aux)`.
      in_axes: where the samples lie in each argument after `params`: an int, None for what all
        share, or a tuple of them (or of tree prefixes), one for each argument.
      keep_batch_dim: leave an axis of size 1 where `in_axes` points, so that a loss written for
        batches is used unchanged.
      microbatch_size: work through the batch in slices of at most this many samples; changes the
        memory, not the result.
      mode: how the sum is taken, with the same result.

        * "one_pass" is the fastest.
        * "two_pass" takes about a plain gradient's memory: by the shapes, one pass over the batch
          or over two to four slices of it. Where more slices would be needed (as of many
          rematerialised layers), or devices may share the batch, it takes one forward pass and two
          backward, unless a derivative in the loss is not known to be linear in its cotangent, or
          gradients are clipped by group.
        * "vmap" stacks gradients, for reference. All modes do so for a threshold below 1e-13.
        * "auto" is "one_pass" if, by an estimate, it fits into `memory_limit_bytes`, else
          "two_pass". By group it clips each that meets data in one place where its cotangents are,
          within the one pass, and keeps nothing of it: "fused" in the plan.
      on_nonfinite: "drop" gives a sample whose loss or gradient is not finite weight 0 and counts
        it; it keeps its position and its share in N. In "one_pass" and "two_pass" so does a sample
        whose norm cannot be told from its square: above 1.8e19 in float32, or below 1e-13 under a
        traced threshold that is as small. "propagate" lets it through.
      axis_name: under `jax.shard_map`, the mesh axis (or axes) over which the batch is sharded:
        positions run on over the devices, and value, gradients and counts are of the whole batch,
        the same on all (`out_specs` of `P()`); norms, scales and aux are of a device's samples
        (`P(axis_name)`). An axis that the batch varies over is left out only where the parameters
        vary over it too. `check_vma=False` hides from JAX what varies: then each device has a
        result of its own samples alone, and nothing tells.
      spmd_axis_name: passed to `jax.vmap`, for sharding constraints inside the loss.
      return_stats: whether to return a `psc.ClipStats` as well.
      memory_limit_bytes: for "auto"; by default what the device has, where it tells.
      clip_at: "sample" clips each sample's gradient. "micro-batch" clips the mean gradient of each
        `microbatch_size` consecutive samples at τ_j, j its 1-based position, and averages them by
        their numbers of samples: what [`psclip_optax.accumulate_clipped`][] does over several
        steps, in one, at the cost of plain gradients. Then the micro-batch takes the sample's
        place: positions and figures are one for each, and one with a loss or gradient that is not
        finite is dropped whole.
      reduction: "mean" divides by N. "sum" gives $\sum_k \gamma_k g_k$, which a sample that is
        added to the batch or taken out of it moves by at most its τ_k, so long as it leaves the
        others their thresholds, as constant ones do (by group, by $\sqrt{\sum_j \tau_{kj}^2}$ over
        the groups j; a micro-batch, by its number of samples times its τ_j). That is the
        sensitivity which noise for differential privacy is scaled to. The value stays the mean
        loss.
      norm_precision: the `jax.lax.Precision` of the products that norms are made of; None takes
        JAX's default, as the loss does. A CPU's default is exact; a TPU's has bfloat16 operands, an
        NVIDIA GPU's TF32, and `jax.lax.Precision.HIGHEST` those of float32, at up to six times the
        time of these products. Gradients are never rounded by it, only their norms.

    Returns:
      `f(params, *batch, sample_mask=None, positions=None, threshold=None)`, which returns
      `(value, grads)`, or `((value, aux), grads)` with aux stacked on axis 0, and with
      `return_stats` the figures as a third item. The value is the mean loss over the samples that
      count and are finite. `sample_mask`, bool [n], is False for padding: no position, no weight,
      no share in N. `positions`, int [n], replaces 1, 2, …. `threshold` replaces the one given
      here, for schedules without a recompile: one for each of the groups, or a tree again.
      `f.explain(params, *batch)` tells the route that each parameter's gradient takes, what it
      costs, and why; it takes `jax.ShapeDtypeStruct`s too.
      `f.verify(params, *batch, num_samples=4)` holds gradients and norms of the first samples
      against `jax.vmap(jax.grad(loss))`, in float64 where x64 is on: a table, and `.ok`.

    Raises:
      TypeError: the loss is no function or not a real scalar, a parameter is not real
        floating-point, or positions are no integers.
      ValueError: an option is out of range, batch arguments do not have the same number of
        samples, the number of samples is symbolic, a tree of thresholds is no prefix of the
        parameters' or has one for a subtree without leaves, the loss has effects (but those of
        `jax.debug`, which run as under `vmap(grad)`, in "two_pass" maybe twice), or under
        `jax.shard_map` it varies over a mesh axis over which the parameters do not and
        `axis_name` is silent.

    Warns:
      UserWarning: the loss normalises by statistics over a batch axis of size 1, as batch
        normalisation in training mode does; once each time it is traced.

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
    """Clipped mean gradient of a per-sample loss: `clipped_value_and_grad` without the value.

    Args:
      loss: `loss(params, *example)`, a real scalar for ONE example.
      threshold: as for [`psclip_optax.clipped_value_and_grad`][].
      has_aux: whether the loss returns `(loss, aux)`.
      return_stats: whether to return a `psc.ClipStats` as well.
      **options: the others of [`psclip_optax.clipped_value_and_grad`][].

    Returns:
      `f(params, *batch, sample_mask=None, positions=None, threshold=None)`, which returns the
      gradients; with `has_aux` `(grads, aux)`; with `return_stats` the figures come last.

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
