"""clipped_value_and_grad: the clipped mean gradient from the loss itself, nothing stacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from psclip_optax import clipped_call, groups, meshes
from psclip_optax.clipping import ClipStats, OnNonfinite
from psclip_optax.engine import verify
from psclip_optax.engine.calls import Call
from psclip_optax.engine.explain import Plan
from psclip_optax.engine.verify import Verification
from psclip_optax.groups import Limits
from psclip_optax.options import ClipAt, Mode, Options, Reduction, checked_size
from psclip_optax.thresholds import ConstantThreshold, GrowingThreshold, Threshold

_VERIFIED_ALONE = (
    "verify compares one device's samples, but axis_name names mesh axes; verify the same function "
    "without axis_name, outside of jax.shard_map"
)


def clipped_value_and_grad(
    loss: Callable[..., Any],
    threshold: Threshold | jax.typing.ArrayLike | Any = None,
    *,
    has_aux: bool = False,
    in_axes: Any = 0,
    keep_batch_dim: bool = False,
    microbatch_size: int | None = None,
    mode: Mode = "auto",
    on_nonfinite: OnNonfinite = "drop",
    axis_name: Any = None,
    spmd_axis_name: Any = None,
    return_stats: bool = False,
    memory_limit_bytes: int | None = None,
    clip_at: ClipAt = "sample",
    reduction: Reduction = "mean",
    norm_precision: lax.Precision | None = None,
) -> ClippedValueAndGrad:
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
        the groups j; a micro-batch, by its number of samples times its τ_j), and one that is
        replaced by at most twice that. That is the sensitivity which noise for differential privacy
        is scaled to. The value stays the mean loss, which no threshold bounds.
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


def clipped_grad(
    loss: Callable[..., Any],
    threshold: Threshold | jax.typing.ArrayLike | Any = None,
    **options: Any,
) -> ClippedGrad:
    """Clipped mean gradient of a per-sample loss: `clipped_value_and_grad` without the value.

    Args:
      loss: `loss(params, *example)`, a real scalar for ONE example.
      threshold: as for [`psclip_optax.clipped_value_and_grad`][].
      **options: as for [`psclip_optax.clipped_value_and_grad`][].

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
    value_and_grad = clipped_value_and_grad(loss, threshold, **options)
    return ClippedGrad(value_and_grad, options.get("has_aux", False))


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedValueAndGrad:
    """A function of parameters and batch that returns what `clipped_value_and_grad` says.

    Attributes:
      loss: of one example.
      threshold: for calls that bring none; a tree of them where they clip by group.
      options: the other arguments of `clipped_value_and_grad`.
      return_stats: whether a call returns the figures too.
    """

    loss: Callable[..., Any]
    threshold: Any
    options: Options
    return_stats: bool

    def __call__(
        self,
        params: Any,
        *batch: Any,
        sample_mask: Any = None,
        positions: Any = None,
        threshold: Any = None,
        **unknown: Any,
    ) -> Any:
        """Return value and clipped mean gradient, and the figures if asked for."""
        _check_known(unknown)
        rule = self._own_threshold() if threshold is None else groups.as_thresholds(threshold)
        rule = groups.in_groups_of(self.threshold, rule)
        arguments = (params, batch, sample_mask, positions, rule)
        mesh = meshes.explicit_mesh(arguments)
        if mesh is None:
            results = self._compute(*arguments)
        else:
            out_specs = clipped_call.out_specs(params, batch, self.options)
            results = meshes.with_auto_axes(self._compute, arguments, mesh, out_specs)
        return results if self.return_stats else results[:2]

    def explain(self, params: Any, *batch: Any, **unknown: Any) -> Plan:
        """Tell the route that each parameter's gradient takes, what it costs, and why.

        Args:
          params: of the call that is explained, or their `jax.ShapeDtypeStruct`s.
          *batch: likewise.
          **unknown: refused.
        """
        _check_known(unknown)
        plans: list[Plan] = []

        def of_values(params: Any, batch: tuple[Any, ...]) -> None:
            call = clipped_call.prepare(self.loss, params, batch, self.options)
            limits = groups.fitted(self._own_threshold(), params)
            plans.append(clipped_call.explain(call, params, limits, self.options))

        if _has_shapes_alone((params, batch)):
            jax.eval_shape(of_values, params, batch)
        else:
            of_values(params, batch)
        return plans[0]

    def verify(
        self, params: Any, *batch: Any, num_samples: int = 4, **unknown: Any
    ) -> Verification:
        """Hold gradients and norms against `jax.vmap(jax.grad(loss))`.

        Args:
          params: at which to compare.
          *batch: of whose first samples to compare gradients.
          num_samples: how many; micro-batches, where those are clipped.
          **unknown: refused.

        Returns:
          A table with the largest error of each parameter, printed as one; its `ok` is a bool.
        """
        _check_known(unknown)
        checked_size("num_samples", num_samples)
        if self.options.axis_name is not None:
            raise ValueError(_VERIFIED_ALONE)
        call = clipped_call.prepare(self.loss, params, batch, self.options)
        if not call.num_samples:
            raise ValueError("verify compares samples, but the batch has none; pass one at least")
        plan = self.explain(params, *batch)
        own = self.options._replace(mode=plan.mode, reduction="mean")
        together = self.options.unit(call.num_samples).size

        def clip(one: Call, limits: Limits) -> tuple[Any, Any, ClipStats]:
            value, grads, stats = clipped_call.clip(one, None, None, limits, own)
            return value[0] if own.has_aux else value, jax.tree.leaves(grads), stats

        of_threshold = groups.fitted(self._own_threshold(), params).groups
        return verify.verify(clip, call.first(num_samples * together), together, plan, of_threshold)

    def _own_threshold(self) -> Any:
        if self.threshold is None:
            raise TypeError(
                "a threshold is a number or a callable from positions [n] to norms [n], got None "
                "both for the function and for the call; pass clipped_value_and_grad(loss, "
                "threshold), or threshold=… to the call"
            )
        return self.threshold

    def _compute(
        self,
        params: Any,
        batch: tuple[Any, ...],
        sample_mask: Any,
        positions: Any,
        rule: Any,
    ) -> tuple[Any, Any, ClipStats]:
        call = clipped_call.prepare(self.loss, params, batch, self.options)
        limits = groups.fitted(rule, params)
        return clipped_call.clip(call, sample_mask, positions, limits, self.options)


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGrad:
    """A function of parameters and batch that returns what `clipped_grad` says.

    Attributes:
      value_and_grad: which returns the value too.
      has_aux: whether aux comes with it.
    """

    value_and_grad: ClippedValueAndGrad
    has_aux: bool

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        """Return the clipped mean gradient, then aux and the figures if asked for."""
        value, grads, *stats = self.value_and_grad(params, *batch, **keywords)
        results = [grads, *([value[1]] if self.has_aux else []), *stats]
        return results[0] if len(results) == 1 else tuple(results)

    def explain(self, params: Any, *batch: Any, **unknown: Any) -> Plan:
        """Do what [`psclip_optax.clipped_grad.ClippedValueAndGrad.explain`][] does."""
        return self.value_and_grad.explain(params, *batch, **unknown)

    def verify(
        self, params: Any, *batch: Any, num_samples: int = 4, **unknown: Any
    ) -> Verification:
        """Do what [`psclip_optax.clipped_grad.ClippedValueAndGrad.verify`][] does."""
        return self.value_and_grad.verify(params, *batch, num_samples=num_samples, **unknown)


def check_loss(loss: Any) -> None:
    if not callable(loss) or isinstance(loss, ConstantThreshold | GrowingThreshold):
        raise TypeError(
            f"the loss is a function loss(params, *example) and comes before the threshold, got "
            f"{loss!r}"
        )


def _check_known(unknown: dict[str, Any]) -> None:
    if unknown:
        raise TypeError(
            "f(params, *batch, sample_mask=None, positions=None, threshold=None) takes the loss's "
            f"arguments by position, got {', '.join(map(repr, unknown))} by name; write "
            "f(params, x, y), in the order of loss(params, x, y)"
        )


def _has_shapes_alone(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
