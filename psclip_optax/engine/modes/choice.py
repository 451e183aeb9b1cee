"""Choose the mode for "auto": one pass if it fits into the memory of a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from psclip_optax import meshes
from psclip_optax.engine.liveness import peak_bytes
from psclip_optax.engine.memory import NO_GRADIENT_OF_VMAP, estimated_bytes, num_bytes
from psclip_optax.engine.modes.fused import FUSED
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.one_pass import ONE_PASS
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Samples
from psclip_optax.engine.modes.two_pass import TWO_PASS

# No compiled model has needed more than twice the estimate from shapes. If the limit is further
# away than this, no pass is traced.
_FAR = 4
# How far the compilers' reports exceed the estimate, from `benchmarks.engine.memory`.
_MARGIN, _MARGIN_OF_GPU = 1.15, 1.45


def chosen(
    problem: Problem,
    leaves: Sequence[Any],
    examples: Sequence[Any],
    num_samples: int,
    limit: int | None,
) -> Mode:
    """Choose one pass if it fits into memory, else two passes.

    Args:
      problem: the traced loss.
      leaves: the parameters.
      examples: the leaves of the batch, [n, …] each.
      num_samples: the number of samples processed at a time.
      limit: the bytes of a device; None if not known.
    """
    fusion = problem.fusion
    at_once = FUSED if fusion is not None and fusion.fused else ONE_PASS
    if limit is None:
        return at_once
    devices = meshes.devices_of_mesh((leaves, examples)) or 1
    # Parameters and gradients, whole on each device for all that is known.
    free = limit - 2 * num_bytes(leaves) - num_bytes(examples) // devices
    if _FAR * _bytes_by_shapes(problem, leaves, num_samples) <= free * devices:
        return at_once
    try:
        needed = temporary_bytes(at_once, problem, leaves, examples, num_samples)
    except NO_GRADIENT_OF_VMAP:
        return at_once  # which reports this when it runs
    margin = _MARGIN_OF_GPU if jax.default_backend() == "gpu" else _MARGIN
    return at_once if margin * needed <= free * devices else TWO_PASS


def _bytes_by_shapes(problem: Problem, leaves: Sequence[Any], num_samples: int) -> int:
    fusion = problem.fusion
    if fusion is None or not fusion.fused:
        return estimated_bytes(problem.closed, problem.plans, leaves, num_samples).of_one_pass
    estimate = estimated_bytes(problem.closed, fusion.plans, leaves, num_samples)
    return estimate.of_fused([plan.weight for plan in fusion.rest])


def temporary_bytes(
    mode: Mode, problem: Problem, leaves: Sequence[Any], examples: Sequence[Any], num_samples: int
) -> int:
    """Trace a mode, and estimate its peak of temporary memory on all devices together."""

    def shaped(like: Any, shape: tuple[int, ...]) -> Any:
        return meshes.shape_of_type(jax.typeof(like), shape)

    one_each: list[Any] = [
        jax.ShapeDtypeStruct((num_samples, *axes), dtype)
        for axes, dtype in ((problem.groups.shape, problem.dtype), ((), problem.dtype), ((), bool))
    ]
    samples = Samples([shaped(one, (num_samples, *one.shape[1:])) for one in examples], *one_each)
    params = [shaped(leaf, leaf.shape) for leaf in leaves]
    traced = jax.make_jaxpr(functools.partial(mode.run, problem))(params, samples)
    is_tpu = jax.local_devices()[0].platform == "tpu"
    return peak_bytes(traced.jaxpr, is_tpu=is_tpu)
