"""clipped_value_and_grad: the clipped mean gradient from the loss itself, nothing stacked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, meshes, stacks, verification
from psclip_optax.arrays import is_integer
from psclip_optax.bookkeeping import microbatches
from psclip_optax.bookkeeping.calls import Call, axes_of_leaves, take_apart, trace
from psclip_optax.bookkeeping.explain import Plan, explained, explained_microbatches
from psclip_optax.bookkeeping.linearity import described_rule
from psclip_optax.bookkeeping.memory import estimated_bytes
from psclip_optax.bookkeeping.passes import MODES, Problem, num_slices
from psclip_optax.bookkeeping.plan import plan_weights
from psclip_optax.bookkeeping.slices import Result, Samples, in_slices
from psclip_optax.bookkeeping.statistics import warn_of_batch_statistics
from psclip_optax.clipping import ClipStats, OnNonfinite
from psclip_optax.thresholds import (
    ConstantThreshold,
    GrowingThreshold,
    Threshold,
    as_threshold,
    concrete,
    least_norm,
)
from psclip_optax.verification import Verification

_VERIFIED_ALONE = (
    "verify compares one device's samples, but axis_name names mesh axes; verify the same function "
    "without axis_name, outside of jax.shard_map"
)

Mode: TypeAlias = Literal["auto", "one_pass", "two_pass", "vmap"]
ClipAt: TypeAlias = Literal["sample", "micro-batch"]


class _Settings(NamedTuple):
    """The arguments of `clipped_value_and_grad` but the loss and its threshold."""

    has_aux: bool
    in_axes: Any
    keep_batch_dim: bool
    microbatch_size: int | None
    mode: Mode
    on_nonfinite: OnNonfinite
    axis_name: Any
    spmd_axis_name: Any
    memory_limit_bytes: int | None
    clip_at: ClipAt

    def num_together(self, num_samples: int) -> int:
        """How many samples are clipped together."""
        size = self.microbatch_size if self.clip_at == "micro-batch" else 1
        return max(1, min(size or 1, num_samples))


def clipped_value_and_grad(
    loss: Callable[..., Any],
    threshold: Threshold | jax.typing.ArrayLike,
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
) -> Callable[..., Any]:
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
        such as `psc.growing_threshold`, or any callable from positions [n] to norms [n].
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
          backward, unless a derivative in the loss is not known to be linear in its cotangent.
        * "vmap" stacks gradients, for reference. All modes do so for a threshold below 1e-13.
        * "auto" is "one_pass" if, by an estimate, it fits into `memory_limit_bytes`, else
          "two_pass".
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

    Returns:
      `f(params, *batch, sample_mask=None, positions=None, threshold=None)`, which returns
      `(value, grads)`, or `((value, aux), grads)` with aux stacked on axis 0, and with
      `return_stats` the figures as a third item. The value is the mean loss over the samples that
      count and are finite. `sample_mask`, bool [n], is False for padding: no position, no weight,
      no share in N. `positions`, int [n], replaces 1, 2, …. `threshold` replaces the one given
      here, for schedules without a recompile. `f.explain(params, *batch)` tells the route that
      each parameter's gradient takes, what it costs, and why; it takes `jax.ShapeDtypeStruct`s too.
      `f.verify(params, *batch, num_samples=4)` holds gradients and norms of the first samples
      against `jax.vmap(jax.grad(loss))`, in float64 where x64 is on: a table, and `.ok`.

    Raises:
      TypeError: the loss is no function or not a real scalar, a parameter is not real
        floating-point, or positions are no integers.
      ValueError: an option is out of range, batch arguments do not have the same number of
        samples, the number of samples is symbolic, the loss has effects (but those of
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
    settings = _Settings(
        has_aux=has_aux,
        in_axes=in_axes,
        keep_batch_dim=keep_batch_dim,
        microbatch_size=_checked_size("microbatch_size", microbatch_size),
        mode=_checked_mode(mode),
        on_nonfinite=on_nonfinite,
        axis_name=axis_name,
        spmd_axis_name=spmd_axis_name,
        memory_limit_bytes=_checked_size("memory_limit_bytes", memory_limit_bytes),
        clip_at=_checked_clip_at(clip_at, microbatch_size),
    )
    clipping.check_on_nonfinite(on_nonfinite)
    default_threshold = as_threshold(threshold)

    def compute(
        params: Any, batch: tuple[Any, ...], sample_mask: Any, positions: Any, rule: Threshold
    ) -> tuple[Any, Any, ClipStats]:
        call = _call(loss, params, batch, settings)
        return _clipped(call, sample_mask, positions, rule, settings)

    def value_and_grad(
        params: Any,
        *batch: Any,
        sample_mask: Any = None,
        positions: Any = None,
        threshold: Any = None,
        **unknown: Any,
    ) -> Any:
        _check_known(unknown)
        rule = default_threshold if threshold is None else as_threshold(threshold)
        arguments = (params, batch, sample_mask, positions, rule)
        mesh = meshes.explicit_mesh(arguments)
        if mesh is None:
            value, grads, stats = compute(*arguments)
        else:
            out_specs = _out_specs(params, batch, settings)
            value, grads, stats = meshes.with_auto_axes(compute, arguments, mesh, out_specs)
        return (value, grads, stats) if return_stats else (value, grads)

    def explain(params: Any, *batch: Any, **unknown: Any) -> Plan:
        _check_known(unknown)
        plans: list[Plan] = []

        def of_values(params: Any, batch: tuple[Any, ...]) -> None:
            plans.append(_explained(loss, params, batch, default_threshold, settings))

        if _has_shapes_alone((params, batch)):
            jax.eval_shape(of_values, params, batch)
        else:
            of_values(params, batch)
        return plans[0]

    def verify(params: Any, *batch: Any, num_samples: int = 4, **unknown: Any) -> Verification:
        _check_known(unknown)
        _checked_size("num_samples", num_samples)
        if settings.axis_name is not None:
            raise ValueError(_VERIFIED_ALONE)
        call = _call(loss, params, batch, settings)
        if not call.num_samples:
            raise ValueError("verify compares samples, but the batch has none; pass one at least")
        plan = explain(params, *batch)
        is_by_sample = settings.clip_at == "sample"
        own = settings._replace(mode=plan.mode) if is_by_sample else settings
        together = settings.num_together(call.num_samples)

        def clip(one: Call, rule: Threshold) -> tuple[Any, Any, ClipStats]:
            value, grads, stats = _clipped(one, None, None, rule, own)
            return value[0] if settings.has_aux else value, jax.tree.leaves(grads), stats

        return verification.verify(clip, call.first(num_samples * together), together, plan)

    value_and_grad.explain = explain  # pyright: ignore[reportFunctionMemberAccess]
    value_and_grad.verify = verify  # pyright: ignore[reportFunctionMemberAccess]
    return value_and_grad


def clipped_grad(
    loss: Callable[..., Any], threshold: Threshold | jax.typing.ArrayLike, **options: Any
) -> Callable[..., Any]:
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
    has_aux = options.get("has_aux", False)

    def grad(params: Any, *batch: Any, **keywords: Any) -> Any:
        value, grads, *stats = value_and_grad(params, *batch, **keywords)
        results = [grads, *([value[1]] if has_aux else []), *stats]
        return results[0] if len(results) == 1 else tuple(results)

    grad.explain = value_and_grad.explain  # pyright: ignore[reportFunctionMemberAccess]
    grad.verify = value_and_grad.verify  # pyright: ignore[reportFunctionMemberAccess]
    return grad


def _clipped(
    call: Call, sample_mask: Any, positions: Any, rule: Threshold, settings: _Settings
) -> tuple[Any, Any, ClipStats]:
    samples = _samples(call, rule, sample_mask, positions, settings)
    problem = _problem(call, settings)
    result = in_slices(
        _run(problem, call, rule, samples, sample_mask is not None, settings),
        samples,
        settings.microbatch_size,
        has_convolutions=problem.has_convolutions,
        consecutive=settings.clip_at == "micro-batch",
    )
    return _packed(result, call, samples.counts, settings)


def _explained(
    loss: Any, params: Any, batch: tuple[Any, ...], rule: Threshold, settings: _Settings
) -> Plan:
    call = _call(loss, params, batch, settings)
    problem = _problem(call, settings)
    num_samples = min(call.num_samples, settings.microbatch_size or call.num_samples)
    if settings.clip_at == "micro-batch":
        return explained_microbatches(params, num_samples)
    taus = least_norm(rule)
    mode = _chosen_mode(problem, call, taus, settings)
    is_two_pass = mode == "two_pass"
    return explained(
        problem.plans,
        params,
        num_samples,
        problem.dtype,
        mode=mode,
        num_slices=num_slices(problem, call.params, num_samples) if is_two_pass else 1,
        note=_note(problem) if is_two_pass else "",
    )


def _note(problem: Problem) -> str:
    rule = problem.unproven_rule()
    if rule is None:
        return ""
    return f"one pass over slices, never two passes: the loss passes {described_rule(rule)}"


def _has_shapes_alone(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _call(loss: Any, params: Any, batch: tuple[Any, ...], settings: _Settings) -> Call:
    return take_apart(
        loss,
        params,
        batch,
        in_axes=settings.in_axes,
        has_aux=settings.has_aux,
        keep_batch_dim=settings.keep_batch_dim,
        axis_name=settings.axis_name,
    )


def _out_specs(params: Any, batch: tuple[Any, ...], settings: _Settings) -> Any:
    """How value, gradients and figures are sharded where parameters and batch are so by type."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    everywhere: Any = P()
    by_sample: Any = meshes.samples_spec(leaves, axes_of_leaves(settings.in_axes, batch))
    by_unit = by_sample if settings.clip_at == "sample" else everywhere
    value = (everywhere, by_sample) if settings.has_aux else everywhere
    return value, meshes.specs_of(params), ClipStats(by_unit, by_unit, everywhere, everywhere)


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


def _checked_size(name: str, size: Any) -> int | None:
    if size is None:
        return None
    if not is_integer(size) or size < 1:
        raise ValueError(f"{name} is a positive int or None, got {size!r}")
    return int(size)


def _checked_mode(mode: str) -> Any:
    known = ["auto", *MODES]
    if mode not in known:
        raise ValueError(f"mode is one of {', '.join(map(repr, known))}, got {mode!r}")
    return mode


def _checked_clip_at(clip_at: str, microbatch_size: int | None) -> Any:
    if clip_at not in ("sample", "micro-batch"):
        raise ValueError(f'clip_at is "sample" or "micro-batch", got {clip_at!r}')
    if clip_at == "micro-batch" and microbatch_size is None:
        raise ValueError(
            'clip_at="micro-batch" needs microbatch_size, the number of samples in each; that of '
            "the whole batch clips the batch's mean gradient"
        )
    return clip_at


def _samples(
    call: Call, threshold: Threshold, sample_mask: Any, positions: Any, settings: _Settings
) -> Samples:
    n, dtype = call.num_samples, stacks.norm_dtype(call.params)
    together = settings.num_together(n)
    mask = None if sample_mask is None else clipping.check_sample_mask(sample_mask, n)
    counts = meshes.varying(jnp.ones(n, bool) if mask is None else mask, settings.axis_name)
    number: Any = n if mask is None else jnp.sum(counts)
    if settings.axis_name is not None:
        number = lax.psum(number, settings.axis_name)
    shares = jnp.broadcast_to(1 / jnp.maximum(number, 1).astype(dtype), (n,))
    units = microbatches.counting(counts, together)
    unit_mask = None if mask is None else units
    if positions is not None:
        positions = clipping.check_positions(positions, units.size)
    taus = clipping.batch_thresholds(
        threshold, units.size, dtype, unit_mask, positions, settings.axis_name
    )
    taus = microbatches.of_each_sample(taus, together, n)
    return Samples(call.examples, taus, shares, counts)


def _problem(call: Call, settings: _Settings) -> Problem:
    closed = trace(call, settings.axis_name)
    warn_of_batch_statistics(closed, len(call.params))
    return Problem(
        closed,
        plan_weights(closed, len(call.params)),
        settings.on_nonfinite,
        stacks.norm_dtype(call.params),
        settings.axis_name,
        settings.spmd_axis_name,
    )


def _run(
    problem: Problem,
    call: Call,
    rule: Threshold,
    samples: Samples,
    is_masked: bool,
    settings: _Settings,
) -> Callable[[Samples], Result]:
    """What gives the result of a slice."""
    if not call.num_samples:  # of none there is a stack, but nothing that enters a site
        return functools.partial(MODES["vmap"], problem, call.params)
    if settings.clip_at == "sample":
        least = least_norm(rule)
        taus = concrete(samples.taus) if least is None else least
        mode = MODES[_chosen_mode(problem, call, taus, settings)]
        return functools.partial(mode, problem, call.params)
    is_padded = is_masked or call.num_samples % settings.num_together(call.num_samples) != 0
    return functools.partial(
        microbatches.clip_microbatch, problem, call.params, is_padded=is_padded
    )


def _chosen_mode(problem: Problem, call: Call, taus: Any, settings: _Settings) -> str:
    """Choose the mode, for thresholds that are known or None."""
    if taus is not None and np.any(clipping.is_tiny(taus, problem.dtype)):
        return "vmap"  # whose norms are scaled before they are squared
    if settings.mode != "auto":
        return settings.mode
    limit = settings.memory_limit_bytes or stacks.bytes_limit(jax.local_devices()[0])
    n = min(call.num_samples, settings.microbatch_size or call.num_samples)
    if limit is None:
        return "one_pass"
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in call.params)
    of_batch = estimated_bytes(problem.closed, problem.plans, call.params, n).of_one_pass
    return "one_pass" if 2 * parameters + of_batch <= limit else "two_pass"


def _packed(
    result: Result, call: Call, counts: jax.Array, settings: _Settings
) -> tuple[Any, Any, ClipStats]:
    losses, *aux = result.outs
    together = settings.num_together(counts.size)
    units = microbatches.counting(counts, together)
    stats = clipping.clip_stats(result.norms, result.scales, units, result.finite)
    finite = microbatches.of_each_sample(result.finite, together, counts.size)
    averaged = counts & finite if settings.on_nonfinite == "drop" else counts
    total_loss = jnp.sum(jnp.where(averaged, losses, 0), dtype=stacks.norm_dtype([losses]))
    totals = result.sums, total_loss, jnp.sum(averaged), (stats.num_clipped, stats.num_nonfinite)
    if settings.axis_name is not None:
        totals = lax.psum(totals, settings.axis_name)
    sums, total_loss, num_averaged, (num_clipped, num_nonfinite) = totals
    stats = stats._replace(num_clipped=num_clipped, num_nonfinite=num_nonfinite)
    value = total_loss / jnp.maximum(num_averaged, 1).astype(total_loss.dtype)
    value = value.astype(losses.dtype)
    value = (value, call.aux_treedef().unflatten(aux)) if settings.has_aux else value
    grads = [total.astype(leaf.dtype) for total, leaf in zip(sums, call.params, strict=True)]
    return value, call.treedef.unflatten(grads), stats
