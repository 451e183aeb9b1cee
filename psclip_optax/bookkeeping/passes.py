"""The modes: each gives Σ γ_k g_k of a batch, or of one slice of it after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax import clipping, stacks, transforms
from psclip_optax.bookkeeping import contract, taps
from psclip_optax.bookkeeping.calls import varying
from psclip_optax.bookkeeping.plan import LeafPlan
from psclip_optax.clipping import OnNonfinite
from psclip_optax.thresholds import concrete

# Up to here the slices of a batch are unrolled on a CPU.
_MOST_UNROLLED = 16


class Samples(NamedTuple):
    """The samples of one slice of a batch: their data, and what the clipping needs of each.

    Attributes:
      examples: the batched leaves, n on the first axis of each.
      taus: τ_k, [n].
      counts: whether the sample is no padding, bool [n].
    """

    examples: list[jax.Array]
    taus: jax.Array
    counts: jax.Array


class Result(NamedTuple):
    """What one slice gives.

    Attributes:
      sums: Σ γ_k g_k of each parameter.
      outs: what the loss returns, stacked: the losses, then the leaves of aux.
      norms: ‖g_k‖, [n].
      scales: γ_k, [n]; 0 for masked and dropped samples.
      finite: whether loss and gradient are, bool [n].
    """

    sums: list[jax.Array]
    outs: list[jax.Array]
    norms: jax.Array
    scales: jax.Array
    finite: jax.Array


class Problem(NamedTuple):
    """A traced loss, and what its parameters' gradients take.

    Attributes:
      closed: the loss for one example, from the parameters' and the example's leaves.
      plans: for each parameter.
      on_nonfinite: "drop" or "propagate".
      dtype: of norms and scales.
      axis_name: of the mesh axes that the batch is sharded over, under shard_map.
      spmd_axis_name: of the axis of samples, for constraints inside the loss.
    """

    closed: core.ClosedJaxpr
    plans: list[LeafPlan]
    on_nonfinite: OnNonfinite
    dtype: Any
    axis_name: Any
    spmd_axis_name: Any

    def over_samples(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=(None, None, 0), spmd_axis_name=self.spmd_axis_name)


# The modes


def _one_pass(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """One forward and one backward pass, keeping what enters and leaves each site."""
    sited = [plan for plan in problem.plans if plan.groups]
    actions = {site.path: taps.tap(site) for plan in sited for site in plan.sites}
    stacked, cotangents, outs, entered = _tapped(problem, leaves, samples, sited, actions)
    squares = _stacked_squares(stacked, problem.dtype)
    for plan in sited:
        squares += contract.squared_norms(plan, entered, cotangents, problem.dtype)
    norms, scales, finite, kept = _weigh(problem, samples, outs[0], squares)

    def contracted(plan: LeafPlan, is_kept: jax.Array | None) -> jax.Array:
        chosen = functools.partial(_where_kept, is_kept)
        if not plan.groups:
            return stacks.weighted_sum(chosen(stacked[plan.leaf]), 0, scales)
        sites = {site.path for site in plan.sites}
        entering, leaving = (
            {path: chosen(side[path]) for path in sites} for side in (entered, cotangents)
        )
        return contract.weighted_sum(plan, leaves[plan.leaf], entering, leaving, scales)

    # XLA's CPU backend runs convolutions inside a branch many times slower than outside. They
    # compute so much for each number read that choosing the samples always costs little.
    convolved = {plan.leaf: contracted(plan, kept) for plan in problem.plans if plan.is_convolution}
    others = [plan for plan in problem.plans if not plan.is_convolution]
    rest = _either(
        ~finite & ~kept,
        lambda: [contracted(plan, kept) for plan in others],
        lambda: [contracted(plan, None) for plan in others],
    )
    sums = convolved | {plan.leaf: total for plan, total in zip(others, rest, strict=True)}
    sums = [sums[leaf] for leaf in range(len(leaves))]
    return Result(sums, outs, norms, scales, finite)


def _two_pass(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """One forward pass and two backward: for the norms, then for the weighted sum."""
    sited = [plan for plan in problem.plans if plan.groups]
    probed = [plan for plan in sited if _may_be_probed(plan)]
    tapped = [plan for plan in sited if not _may_be_probed(plan)]
    norm = functools.partial(contract.site_squared_norm, dtype=problem.dtype)
    actions = {site.path: taps.tap(site) for plan in tapped for site in plan.sites}
    for site in (site for plan in probed for site in plan.sites):
        actions[site.path] = taps.probe(site, norm, problem.dtype)
    stacked, cotangents, outs, entered = _tapped(problem, leaves, samples, sited, actions)
    squares = _stacked_squares(stacked, problem.dtype)
    for plan in tapped:
        squares += contract.squared_norms(plan, entered, cotangents, problem.dtype)
    for site in (site for plan in probed for site in plan.sites):
        probed_squares = cotangents[site.path]
        squares += jnp.sum(probed_squares, axis=tuple(range(1, probed_squares.ndim)))
    norms, scales, finite, kept = _weigh(problem, samples, outs[0], squares)

    def backward(examples: list[jax.Array]) -> list[jax.Array]:
        def losses(leaves: Sequence[Any]) -> jax.Array:
            return problem.over_samples(_loss_of(problem))(leaves, None, examples)

        value, pull_back = jax.vjp(losses, list(leaves))
        return pull_back(scales.astype(value.dtype))[0]

    def backward_without_dropped() -> list[jax.Array]:
        # Padding and dropped samples may hold NaN, which weight 0 would not keep out.
        index = jnp.where(kept, jnp.arange(kept.size), jnp.argmax(kept))
        sums = backward([example[index] for example in samples.examples])
        return [jnp.where(jnp.any(kept), total, 0) for total in sums]

    # Not in the other branch: XLA's CPU backend runs convolutions many times slower there.
    plain = backward(samples.examples)
    sums = _either(~finite & ~kept, backward_without_dropped, lambda: plain)
    return Result(sums, outs, norms, scales, finite)


def _may_be_probed(plan: LeafPlan) -> bool:
    # Cotangents of probes add up: right for one use, and for the layers of a scan, but the steps
    # of a scan that share a parameter, and sites whose gradients overlap, have cross terms.
    return all(len(group.sites) == 1 and all(group.sites[0].layered) for group in plan.groups)


def _by_vmap(problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
    """The reference: gradients stacked by vmap, then clipped as the other face does."""
    grad = jax.value_and_grad(_outs_of(problem), has_aux=True)
    (_, outs), stacked = problem.over_samples(grad)(list(leaves), None, samples.examples)
    # A loss that is not finite drops its sample also where its gradient is finite.
    finite_loss = jnp.isfinite(outs[0])
    dropped = ~finite_loss & (problem.on_nonfinite == "drop")
    sums, stats, kept = transforms.clip_and_sum(
        stacked,
        transforms.Batch(samples.taus, samples.counts & ~dropped),
        axes=(0,) * len(stacked),
        masked=True,
        on_nonfinite=problem.on_nonfinite,
    )
    finite = jnp.where(samples.counts, kept & finite_loss, True)
    return Result(sums, outs, stats.norms, stats.scales, finite)


MODES: dict[str, Callable[[Problem, Sequence[Any], Samples], Result]] = {
    "one_pass": _one_pass,
    "two_pass": _two_pass,
    "vmap": _by_vmap,
}


def _outs_of(problem: Problem) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
    run = core.jaxpr_as_fun(problem.closed)

    def outs(leaves: Sequence[Any], _: None, example: list[jax.Array]) -> Any:
        outs = run(*leaves, *example)
        return outs[0], outs

    return outs


def _loss_of(problem: Problem) -> Callable[..., jax.Array]:
    outs = _outs_of(problem)
    return lambda *inputs: outs(*inputs)[0]


def _tapped(
    problem: Problem,
    leaves: Sequence[Any],
    samples: Samples,
    sited: list[LeafPlan],
    actions: dict[Any, taps.Action],
) -> tuple[dict[int, jax.Array], taps.Taps, list[jax.Array], taps.Taps]:
    """Per-sample gradients of the parameters without sites, and of all actions' zeros."""
    with_sites = {plan.leaf for plan in sited}
    direct = {i: leaf for i, leaf in enumerate(leaves) if i not in with_sites}

    def outs(direct: dict[int, Any], zeros: taps.Taps, example: list[jax.Array]) -> Any:
        inputs = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
        outs, entered = taps.run_with(problem.closed, [*inputs, *example], zeros, actions)
        return outs[0], (outs, entered)

    grad = jax.grad(outs, argnums=(0, 1), has_aux=True)
    zeros = {path: varying(a.zero, problem.axis_name) for path, a in actions.items()}
    gradients, (outs_, entered) = problem.over_samples(grad)(direct, zeros, samples.examples)
    stacked, cotangents = gradients
    return stacked, cotangents, outs_, entered


def _stacked_squares(stacked: dict[int, jax.Array], dtype: Any) -> Any:
    if not stacked:
        return jnp.zeros((), dtype)
    return stacks.squared_norms(stacks.Stack(list(stacked.values()), (0,) * len(stacked)), dtype)


def _weigh(
    problem: Problem, samples: Samples, losses: jax.Array, squares: jax.Array
) -> tuple[jax.Array, ...]:
    """Norms, scales (0 for what is not kept), which samples are finite, and which are kept."""
    norms = jnp.sqrt(squares)
    finite = jnp.isfinite(norms) & jnp.isfinite(losses)
    kept = samples.counts & finite if problem.on_nonfinite == "drop" else samples.counts
    scales = clipping.clip_scales(norms, samples.taus)
    scales = jnp.where(jnp.isfinite(norms), scales, jnp.nan)
    return norms, jnp.where(kept, scales, 0), finite, kept


def _either(
    flags: jax.Array,
    if_any: Callable[[], list[jax.Array]],
    otherwise: Callable[[], list[jax.Array]],
) -> list[jax.Array]:
    any_flag = clipping.any_of(lax.stop_gradient(flags))
    known = concrete(any_flag)
    if known is not None:  # un-jitted: `lax.cond` would compile both, anew in each call
        return if_any() if known else otherwise()
    return lax.cond(any_flag, if_any, otherwise)


def _where_kept(kept: jax.Array | None, array: jax.Array) -> jax.Array:
    if kept is None:
        return array
    return jnp.where(kept.reshape(-1, *[1] * (array.ndim - 1)), array, jnp.zeros((), array.dtype))


# Slices of a batch


def in_slices(
    run: Callable[[Samples], Result], samples: Samples, size: int | None, axis_name: Any
) -> Result:
    """The same result from slices of at most `size` samples, one after the other.

    Slice j takes every num_slices-th sample from j on: contiguous slices of a batch that is sharded
    over devices would move it. Where the last ones are short, real samples fill them, masked.
    """
    n = samples.taus.size
    if size is None or size >= n:
        return run(samples)
    num_slices = -(-n // size)
    missing = num_slices * size - n

    def split(array: jax.Array) -> jax.Array:
        whole = jnp.concatenate([array, array[:missing]]) if missing else array
        return whole.reshape(size, num_slices, *array.shape[1:])

    parts = jax.tree.map(split, samples)
    is_real = jnp.arange(num_slices * size) < n
    parts = parts._replace(counts=parts.counts & is_real.reshape(size, num_slices))

    def one(sums: list[jax.Array], i: jax.Array) -> tuple[list[jax.Array], Result]:
        result = run(jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, i, 1, False), parts))
        added = [
            total + new.astype(total.dtype) for total, new in zip(sums, result.sums, strict=True)
        ]
        return added, result._replace(sums=[])

    one_slice = jax.eval_shape(run, jax.tree.map(lambda part: part[:, 0], parts))
    zeros = [jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)) for s in one_slice.sums]
    zeros = [varying(zero, axis_name) for zero in zeros]
    # XLA's CPU backend runs convolutions inside a loop many times slower than outside.
    is_unrolled = jax.default_backend() == "cpu" and num_slices <= _MOST_UNROLLED
    unroll = num_slices if is_unrolled else 1
    sums, results = lax.scan(one, zeros, jnp.arange(num_slices), unroll=unroll)

    def in_order(array: jax.Array) -> jax.Array:
        return array.swapaxes(0, 1).reshape(num_slices * size, *array.shape[2:])[:n]

    return jax.tree.map(in_order, results)._replace(sums=sums)
