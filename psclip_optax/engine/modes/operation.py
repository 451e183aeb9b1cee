"""Turn a group's segment into an operation on the whole batch, with a custom derivative.

Its forward pass is the segment. Its backward pass computes the norms of the group's gradients, and
returns Σ γ_k G_k / N for the group's parameters and the unchanged cotangents for its data. So
everything else is one plain backward pass, and nothing of the group is stored after its backward
pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax import clipping
from psclip_optax.engine.fusion import Fused
from psclip_optax.engine.modes.batched import Forward, Inputs, Operand, forward_of_each
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.tapped import all_weights, squared_norms, weighted_sums
from psclip_optax.engine.modes.weighing import told_scales, weights_of_sum
from psclip_optax.engine.taps import Operation
from psclip_optax.groups import ALL_TOGETHER


def operation(problem: Problem, fused: Fused) -> Operation:
    """Make the operation that replaces a segment, for one sample under `vmap` over all."""
    segment = fused.segment
    own = problem._replace(plans=fused.plans, groups=ALL_TOGETHER)

    @jax.custom_batching.custom_vmap
    def run(operand: Operand, weights: list[Any], data: list[Any], others: list[Any]) -> Any:
        del operand
        return core.jaxpr_as_fun(segment.closed)(*weights, *data, *others)

    @run.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
        _, weights, *inputs = in_batched
        assert not any(weights), "parameters are the same for all samples"
        axes = [None] * len(weights) + [0 if flag else None for flags in inputs for flag in flags]
        outs = _over_batch(own, axis_size, axes, segment.num_cotangents)(*arguments)
        return outs, [True] * len(outs)

    def split(operand: Operand, *values: Any) -> list[Any]:
        num_weights, num_data = len(segment.weights), len(segment.data)
        weights, data = values[:num_weights], values[num_weights : num_weights + num_data]
        return run(operand, [*weights], [*data], [*values[num_weights + num_data :]])

    return Operation(segment, split)


def _over_batch(problem: Problem, n: int, axes: list[int | None], num_cotangents: int) -> Any:
    plans = problem.plans.all

    def passed(weights: list[Any], data: list[Any], others: list[Any]) -> Forward:
        wanted = [*range(len(weights), len(weights) + len(data))]
        inputs = Inputs([*weights, *data, *others], axes, wanted)
        all_of_them, _ = all_weights(problem, weights)
        return forward_of_each(
            problem, plans, all_of_them, inputs, num_cotangents=num_cotangents, num_samples=n
        )

    @jax.custom_vjp
    def run(operand: Operand, weights: list[Any], data: list[Any], others: list[Any]) -> Any:
        del operand
        return passed(weights, data, others).outs

    def forwards(operand: Operand, weights: list[Any], data: list[Any], others: list[Any]) -> Any:
        one = passed(weights, data, others)
        return one.outs, (operand, weights, one._replace(outs=[]))

    def backwards(saved: Any, cotangents: Any) -> Any:
        operand, weights, one = saved
        backward = one.pull_back([*cotangents[:num_cotangents]])
        seen = one.seen(backward)
        all_of_them, pull_back = all_weights(problem, weights)
        squares = squared_norms(problem, plans, pull_back, all_of_them, seen)
        squares = jnp.broadcast_to(squares, operand.zero.shape)
        norms = clipping.norms_of(squares)
        scales = told_scales(norms, operand.tau)
        of_samples = weights_of_sum(operand.tau, operand.share, norms, scales)
        sums = weighted_sums(problem, plans, pull_back, all_of_them, seen, of_samples)
        sums = [total.astype(w.dtype) for total, w in zip(sums, weights, strict=True)]
        return Operand(squares, None, None), sums, backward.inputs, None

    run.defvjp(forwards, backwards)
    return run
