"""One call of a clipped loss: from its arguments to value, gradients and figures, or its plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, meshes, stacks
from psclip_optax.clipping import ClipStats
from psclip_optax.engine.analysis.linearity import described_rule
from psclip_optax.engine.analysis.statistics import warn_of_batch_statistics
from psclip_optax.engine.calls import Call, axes_of_leaves, take_apart, trace
from psclip_optax.engine.explain import Plan, explained, explained_microbatches
from psclip_optax.engine.memory import estimated_bytes
from psclip_optax.engine.modes import MODES, micro_batches, one_pass
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples, in_slices
from psclip_optax.engine.modes.two_pass import num_slices
from psclip_optax.engine.plan import plan_weights
from psclip_optax.options import Options
from psclip_optax.thresholds import Threshold, concrete, least_norm


def clip(
    call: Call, sample_mask: Any, positions: Any, rule: Threshold, options: Options
) -> tuple[Any, Any, ClipStats]:
    samples = _samples(call, rule, sample_mask, positions, options)
    problem = _problem(call, options)
    result = in_slices(
        _run(problem, call, rule, samples, sample_mask is not None, options),
        samples,
        options.microbatch_size,
        has_convolutions=problem.has_convolutions,
        consecutive=options.clip_at == "micro-batch",
    )
    return _packed(result, call, samples.counts, options)


def explain(call: Call, params: Any, rule: Threshold, options: Options) -> Plan:
    problem = _problem(call, options)
    num_samples = min(call.num_samples, options.microbatch_size or call.num_samples)
    if options.clip_at == "micro-batch":
        return explained_microbatches(params, num_samples)
    mode = _chosen_mode(problem, call, least_norm(rule), options)
    is_two_pass = mode == "two_pass"
    return explained(
        problem.plans,
        params,
        num_samples,
        problem.dtype,
        mode=mode,
        num_slices=num_slices(problem, call.params, num_samples) if is_two_pass else 1,
        note=_note(problem, call, mode, num_samples, options),
    )


def _note(problem: Problem, call: Call, mode: str, num_samples: int, options: Options) -> str:
    """Say what keeps a call from the mode that it would take otherwise."""
    if mode == "vmap" and options.mode != "vmap":
        return "stacked gradients, for the threshold is too small to hold a sum of squares against"
    if mode == "one_pass":
        number = one_pass.samples_at_a_time(problem, call.params, num_samples)
        at_a_time = "for parameters without a route have a stack of gradients"
        return "" if number is None else f"{number} samples at a time, {at_a_time}"
    rule = problem.unproven_rule() if mode == "two_pass" else None
    if rule is None:
        return ""
    return f"one pass over slices, never two passes: the loss passes {described_rule(rule)}"


def prepare(loss: Any, params: Any, batch: tuple[Any, ...], options: Options) -> Call:
    return take_apart(
        loss,
        params,
        batch,
        in_axes=options.in_axes,
        has_aux=options.has_aux,
        keep_batch_dim=options.keep_batch_dim,
        axis_name=options.axis_name,
    )


def out_specs(params: Any, batch: tuple[Any, ...], options: Options) -> Any:
    """How value, gradients and figures are sharded where parameters and batch are so by type."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    everywhere: Any = P()
    by_sample: Any = meshes.samples_spec(leaves, axes_of_leaves(options.in_axes, batch))
    by_unit = by_sample if options.clip_at == "sample" else everywhere
    value = (everywhere, by_sample) if options.has_aux else everywhere
    return value, meshes.specs_of(params), ClipStats(by_unit, by_unit, everywhere, everywhere)


def _samples(
    call: Call, threshold: Threshold, sample_mask: Any, positions: Any, options: Options
) -> Samples:
    n, dtype = call.num_samples, stacks.norm_dtype(call.params)
    together = options.num_together(n)
    mask = None if sample_mask is None else clipping.check_sample_mask(sample_mask, n)
    counts = meshes.varying(jnp.ones(n, bool) if mask is None else mask, options.axis_name)
    number: Any = n if mask is None else jnp.sum(counts)
    if options.axis_name is not None:
        number = lax.psum(number, options.axis_name)
    shares = jnp.broadcast_to(1 / jnp.maximum(number, 1).astype(dtype), (n,))
    units = micro_batches.counting(counts, together)
    unit_mask = None if mask is None else units
    if positions is not None:
        positions = clipping.check_positions(positions, units.size)
    taus = clipping.batch_thresholds(
        threshold, units.size, dtype, unit_mask, positions, options.axis_name
    )
    taus = micro_batches.of_each_sample(taus, together, n)
    return Samples(call.examples, taus, shares, counts)


def _problem(call: Call, options: Options) -> Problem:
    closed = trace(call, options.axis_name)
    warn_of_batch_statistics(closed, len(call.params))
    return Problem(
        closed,
        plan_weights(closed, len(call.params)),
        options.on_nonfinite,
        stacks.norm_dtype(call.params),
        options.axis_name,
        options.spmd_axis_name,
    )


def _run(
    problem: Problem,
    call: Call,
    rule: Threshold,
    samples: Samples,
    is_masked: bool,
    options: Options,
) -> Callable[[Samples], Result]:
    """What gives the result of a slice."""
    if not call.num_samples:  # of none there is a stack, but nothing that enters a site
        return functools.partial(MODES["vmap"], problem, call.params)
    if options.clip_at == "sample":
        least = least_norm(rule)
        taus = concrete(samples.taus) if least is None else least
        mode = MODES[_chosen_mode(problem, call, taus, options)]
        return functools.partial(mode, problem, call.params)
    is_padded = is_masked or call.num_samples % options.num_together(call.num_samples) != 0
    return functools.partial(
        micro_batches.clip_microbatch, problem, call.params, is_padded=is_padded
    )


def _chosen_mode(problem: Problem, call: Call, taus: Any, options: Options) -> str:
    """Choose the mode, for thresholds that are known or None."""
    if taus is not None and np.any(clipping.is_tiny(taus, problem.dtype)):
        return "vmap"  # whose norms are scaled before they are squared
    if options.mode != "auto":
        return options.mode
    limit = options.memory_limit_bytes or stacks.bytes_limit(jax.local_devices()[0])
    n = min(call.num_samples, options.microbatch_size or call.num_samples)
    if limit is None:
        return "one_pass"
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in call.params)
    of_batch = estimated_bytes(problem.closed, problem.plans, call.params, n).of_one_pass
    return "one_pass" if 2 * parameters + of_batch <= limit else "two_pass"


def _packed(
    result: Result, call: Call, counts: jax.Array, options: Options
) -> tuple[Any, Any, ClipStats]:
    losses, *aux = result.outs
    together = options.num_together(counts.size)
    units = micro_batches.counting(counts, together)
    stats = clipping.clip_stats(result.norms, result.scales, units, result.finite)
    finite = micro_batches.of_each_sample(result.finite, together, counts.size)
    averaged = counts & finite if options.on_nonfinite == "drop" else counts
    total_loss = jnp.sum(jnp.where(averaged, losses, 0), dtype=stacks.norm_dtype([losses]))
    totals = result.sums, total_loss, jnp.sum(averaged), (stats.num_clipped, stats.num_nonfinite)
    if options.axis_name is not None:
        totals = lax.psum(totals, options.axis_name)
    sums, total_loss, num_averaged, (num_clipped, num_nonfinite) = totals
    stats = stats._replace(num_clipped=num_clipped, num_nonfinite=num_nonfinite)
    value = total_loss / jnp.maximum(num_averaged, 1).astype(total_loss.dtype)
    value = value.astype(losses.dtype)
    value = (value, call.aux_treedef().unflatten(aux)) if options.has_aux else value
    grads = [total.astype(leaf.dtype) for total, leaf in zip(sums, call.params, strict=True)]
    return value, call.treedef.unflatten(grads), stats
