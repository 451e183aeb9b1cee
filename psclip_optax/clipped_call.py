"""Run one call of a clipped loss: compute value, gradients and statistics from its arguments."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from psclip_optax import clipping, meshes, stacks
from psclip_optax.clipping import ClipStats
from psclip_optax.engine.analysis.statistics import warn_of_batch_statistics
from psclip_optax.engine.calls import Call, axes_of_leaves, take_apart, trace
from psclip_optax.engine.explain import Plan
from psclip_optax.engine.fusion import plan_fusion
from psclip_optax.engine.modes import MODES
from psclip_optax.engine.modes.choice import chosen
from psclip_optax.engine.modes.fused import FUSED
from psclip_optax.engine.modes.micro_batches import MICRO_BATCHES
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.one_by_one import run_mode
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples, in_slices
from psclip_optax.engine.modes.stacked import STACKED
from psclip_optax.engine.plan import plan_weights
from psclip_optax.engine.units import Unit
from psclip_optax.groups import Groups, Limits
from psclip_optax.options import Options
from psclip_optax.thresholds import concrete


def clip(
    call: Call, sample_mask: Any, positions: Any, limits: Limits, options: Options
) -> tuple[Any, Any, ClipStats]:
    unit = options.unit(call.num_samples)
    samples = _samples(call, limits, sample_mask, positions, unit, options)
    is_padded = sample_mask is not None or call.num_samples % unit.size != 0
    problem = _problem(call, limits.groups, options, may_be_padded=is_padded)
    least = limits.least_norms()
    mode = _mode(problem, call, concrete(samples.taus) if least is None else least, options)
    result = in_slices(
        functools.partial(run_mode, mode, problem, call.params),
        samples,
        options.microbatch_size,
        has_convolutions=problem.has_convolutions,
        consecutive=unit.is_micro_batch,
    )
    return _packed(result, call, samples.counts, unit, options)


def explain(call: Call, params: Any, limits: Limits, options: Options) -> Plan:
    problem = _problem(call, limits.groups, options, may_be_padded=False)
    num_samples = min(call.num_samples, options.microbatch_size or call.num_samples)
    mode = _mode(problem, call, limits.least_norms(), options)
    note = _TOO_SMALL if mode is STACKED and options.mode != "vmap" and call.num_samples else ""
    plan = mode.explain(problem, call.params, params, num_samples, note)
    return plan.of_groups(limits.groups)


_TOO_SMALL = "stacked gradients, for the threshold is too small to hold a sum of squares against"


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
    """Return the shardings of the results, if the types of parameters and batch have shardings."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    everywhere: Any = P()
    by_sample: Any = meshes.samples_spec(leaves, axes_of_leaves(options.in_axes, batch))
    by_unit = options.unit(1).sharded(by_sample)
    value = (everywhere, by_sample) if options.has_aux else everywhere
    return value, meshes.specs_of(params), ClipStats(by_unit, by_unit, everywhere, everywhere)


def _samples(
    call: Call,
    limits: Limits,
    sample_mask: Any,
    positions: Any,
    unit: Unit,
    options: Options,
) -> Samples:
    n, dtype = call.num_samples, stacks.norm_dtype(call.params)
    mask = None if sample_mask is None else clipping.check_sample_mask(sample_mask, n)
    counts = meshes.varying(jnp.ones(n, bool) if mask is None else mask, options.axis_name)
    shares = jnp.broadcast_to(_share(counts, mask, dtype, options), (n,))
    units = unit.counting(counts)
    unit_mask = None if mask is None else units
    if positions is not None:
        positions = clipping.check_positions(positions, units.size)
    taus = clipping.batch_thresholds(
        limits, units.size, dtype, unit_mask, positions, options.axis_name
    )
    return Samples(call.examples, unit.of_each_sample(taus, n), shares, counts)


def _share(counts: jax.Array, mask: Any, dtype: Any, options: Options) -> jax.Array:
    """Return the factor of each sample's clipped gradient: 1/N, or 1 for a sum."""
    if options.reduction == "sum":
        return jnp.ones((), dtype)
    number: Any = counts.size if mask is None else jnp.sum(counts)
    if options.axis_name is not None:
        number = lax.psum(number, options.axis_name)
    return 1 / jnp.maximum(number, 1).astype(dtype)


def _problem(call: Call, groups: Groups, options: Options, *, may_be_padded: bool) -> Problem:
    closed = trace(call, options.axis_name)
    warn_of_batch_statistics(closed, len(call.params))
    trees, name = (call.params, call.examples), options.spmd_axis_name
    num_devices = meshes.num_sharing(trees, call.num_samples, name)
    plans = plan_weights(closed, len(call.params), groups, are_shared=num_devices > 1)
    may_be_fused = math.prod(groups.shape) > 1 and options.mode in ("auto", FUSED.name)
    return Problem(
        closed,
        plans,
        groups,
        options.on_nonfinite,
        stacks.norm_dtype(call.params),
        options.axis_name,
        options.spmd_axis_name,
        may_be_padded,
        plan_fusion(plans, groups) if may_be_fused else None,
        options.norm_precision,
        num_devices,
    )


def _mode(problem: Problem, call: Call, taus: Any, options: Options) -> Mode:
    """Choose the mode; thresholds that are not known are None."""
    if not call.num_samples:  # an empty batch can be stacked, but has no sites
        return STACKED
    if options.unit(call.num_samples).is_micro_batch:
        return MICRO_BATCHES
    if taus is not None and np.any(clipping.is_tiny(taus, problem.dtype)):
        return STACKED  # it scales norms before squaring them
    if options.mode != "auto":
        return MODES[options.mode]
    limit = options.memory_limit_bytes or stacks.bytes_limit(jax.local_devices()[0])
    n = min(call.num_samples, options.microbatch_size or call.num_samples)
    return chosen(problem, call.params, call.examples, n, limit)


def _packed(
    result: Result, call: Call, counts: jax.Array, unit: Unit, options: Options
) -> tuple[Any, Any, ClipStats]:
    losses, *aux = result.outs
    units = unit.counting(counts)
    stats = clipping.clip_stats(result.norms, result.scales, units, result.finite)
    finite = unit.of_each_sample(result.finite, counts.size)
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
