"""Clip groups in the backward pass, once their cotangents are known; others as in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax import clipping, meshes
from psclip_optax.engine.explain import Plan, explained
from psclip_optax.engine.memory import NO_GRADIENT_OF_VMAP, estimated_bytes
from psclip_optax.engine.modes.batched import Inputs, Operand, forward
from psclip_optax.engine.modes.mode import Mode
from psclip_optax.engine.modes.one_pass import ONE_PASS
from psclip_optax.engine.modes.operation import operation
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.slices import Result, Samples
from psclip_optax.engine.modes.tapped import all_weights, squared_norms, weighted_sums
from psclip_optax.engine.modes.weighing import changed_if_any, weigh, weights_of_sum
from psclip_optax.platforms import by_platform
from psclip_optax.thresholds import concrete


class FusedPass(Mode):
    """Clips groups within one backward pass of the batch, once their cotangents are known."""

    name = "fused"

    def run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        try:
            return self._run(problem, leaves, samples)
        except NO_GRADIENT_OF_VMAP:
            return ONE_PASS.run(problem, leaves, samples)

    def _run(self, problem: Problem, leaves: Sequence[Any], samples: Samples) -> Result:
        given = _Given(list(problem.plans.closed.consts), list(leaves), samples)
        if problem.on_nonfinite == "propagate" and not problem.may_be_padded:
            return _passed(problem, given, samples.counts).result
        if concrete(samples.counts) is not None:
            return _and_again(problem, given)
        if not problem.has_convolutions:
            return _in_a_loop(problem, given)
        # XLA's CPU backend runs convolutions inside a loop many times slower than outside.
        return by_platform(
            samples.counts,
            given,
            cpu=lambda _, given: _and_again(problem, given),
            elsewhere=lambda _, given: _in_a_loop(problem, given),
        )

    def explain(
        self, problem: Problem, leaves: Sequence[Any], params: Any, num_samples: int, note: str
    ) -> Plan:
        if not _has_gradient_of_batch(problem, leaves):
            return ONE_PASS.explain(problem, leaves, params, num_samples, note)
        fusion = problem.fusion
        assert fusion is not None
        return explained(
            fusion.plans,
            params,
            num_samples,
            problem.dtype,
            mode=self.name,
            note=note,
            fusion=fusion,
        )


FUSED = FusedPass()


def _has_gradient_of_batch(problem: Problem, leaves: Sequence[Any]) -> bool:
    """Tell whether JAX can differentiate the loss under vmap, not only that of a single sample."""
    return estimated_bytes(problem.closed, problem.plans, leaves, 1).saved is not None


class _Given(NamedTuple):
    """Holds the arguments of a pass: the loss's constants, the parameters' leaves, the samples."""

    consts: list[Any]
    leaves: list[Any]
    samples: Samples


class _Passed(NamedTuple):
    """Holds the result of a pass, and which samples it includes."""

    result: Result
    kept: jax.Array

    @property
    def is_spoilt(self) -> jax.Array:
        """Tell of each sample whether it is left out of the sum but not finite, [n]."""
        return ~self.result.finite & ~self.kept


def _passed(problem: Problem, given: _Given, kept: jax.Array) -> _Passed:
    """Make one pass with the samples in `kept`; the others are left out."""
    fusion = problem.fusion
    assert fusion is not None
    plans = fusion.plans
    problem = problem._replace(
        plans=plans._replace(closed=plans.closed.replace(consts=given.consts))
    )
    samples = given.samples
    n, leaves = samples.number, problem.plans.pieces.of(given.leaves)
    weights, pull_back = all_weights(problem, leaves)
    shares = jnp.where(kept, samples.shares, 0)
    axes_of_loss = meshes.axes_of_type(problem.closed.out_avals[0])

    def operand(columns: range) -> Operand:
        taus = samples.taus[:, columns.start : columns.stop : columns.step].T
        zeros = meshes.varying(jnp.zeros_like(taus), axes_of_loss)  # as its cotangent will
        values = zeros, taus, jnp.broadcast_to(shares, taus.shape)
        return Operand(*(value if len(columns) > 1 else value[0] for value in values))

    operations = {
        one.segment.path: (operation(problem, one), operand(one.columns)) for one in fusion.fused
    }
    apart = [i for i in range(len(leaves)) if i not in fusion.obstacles]
    inputs = Inputs(
        [*leaves, *samples.examples], [None] * len(leaves) + [0] * len(samples.examples), apart
    )
    one = forward(
        problem, fusion.rest, weights, inputs, operations, num_cotangents=1, num_samples=n
    )
    backward = one.pull_back([jnp.ones_like(one.outs[0])])
    seen = one.seen(backward)
    squares = squared_norms(problem, fusion.rest, pull_back, weights, seen)
    squares = jnp.broadcast_to(squares, samples.taus.shape)
    for own in fusion.fused:
        new = backward.cotangents[own.segment.path].reshape(len(own.columns), n).T
        squares = squares.at[:, jnp.array(own.columns)].set(new)
    norms, scales, finite, kept_of_all = weigh(problem, samples, one.outs[0], squares)
    of_samples = weights_of_sum(samples.taus, shares, norms, scales)
    sums = weighted_sums(problem, fusion.rest, pull_back, weights, seen, of_samples)
    for i, total in zip(apart, backward.inputs, strict=True):
        sums[i] = total
    sums = problem.plans.pieces.together(sums, given.leaves)
    return _Passed(Result(sums, one.outs, norms, scales, finite), kept_of_all)


def _without(given: _Given, kept: jax.Array) -> _Given:
    """Replace the samples that are left out by one that is kept, whose gradient is finite."""
    first = jnp.argmax(kept)

    def replaced(example: jax.Array) -> jax.Array:
        flags = kept.reshape(-1, *[1] * (example.ndim - 1))
        return jnp.where(flags, example, lax.dynamic_index_in_dim(example, first, 0))

    samples = given.samples
    examples = [replaced(example) for example in samples.examples]
    return given._replace(samples=samples._replace(examples=examples))


def _sums_without(problem: Problem, given: _Given, kept: jax.Array) -> list[jax.Array]:
    return _zeros_if_none(_passed(problem, _without(given, kept), kept).result.sums, kept)


def _and_again(problem: Problem, given: _Given) -> Result:
    """Make a pass, and another without some samples if the first sums are not finite."""
    first = _passed(problem, given, given.samples.counts)

    def again(_: Any, given: _Given, kept: jax.Array) -> list[jax.Array]:
        return _sums_without(problem, given, kept)

    sums = changed_if_any(first.is_spoilt, again, first.result.sums, given, first.kept)
    return first.result._replace(sums=sums)


class _State(NamedTuple):
    """Holds the carry of a loop over passes.

    Attributes:
      num_left: the number of passes still to make: at first one, then another if needed.
      is_first: whether no pass has been made.
      kept: which samples the sums of the next pass include.
      result: the result of the first pass, with the sums of the last.
    """

    num_left: jax.Array
    is_first: jax.Array
    kept: jax.Array
    result: Result


def _in_a_loop(problem: Problem, given: _Given) -> Result:
    """Make the passes in a loop, so that a pass is compiled only once."""
    fusion = problem.fusion
    assert fusion is not None
    # Scanned layers convert their parameters in each step, and a product would take memory.
    has_scans = any(len(one.columns) > 1 for one in fusion.fused)

    def step(state: _State, given: _Given) -> _State:
        if not has_scans:
            given = given._replace(leaves=_times_one(given.leaves, state.num_left >= 1))
        present = state.kept | state.is_first
        new = _passed(problem, _without(given, present), state.kept)
        sums = [
            total.astype(old.dtype)
            for total, old in zip(new.result.sums, state.result.sums, strict=True)
        ]
        # Zeros by a branch of its own: a choice between two arrays would write each sum again.
        sums = changed_if_any(~jnp.any(state.kept)[None], _zeros_if_none, sums, state.kept)
        both = (one._replace(sums=[]) for one in (new.result, state.result))
        result = jax.tree.map(lambda *both: jnp.where(state.is_first, *both), *both)
        is_spoilt = clipping.any_of(lax.stop_gradient(new.is_spoilt))
        return _State(
            num_left=(state.is_first & is_spoilt).astype(jnp.int32),
            is_first=jnp.zeros_like(state.is_first),
            kept=jnp.where(state.is_first, new.kept, state.kept),
            result=result._replace(sums=sums),
        )

    @jax.custom_jvp
    def run(state: _State, given: _Given) -> _State:
        return lax.while_loop(lambda s: s.num_left >= 1, lambda s: step(s, given), state)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def twice(state: _State, given: _Given) -> _State:
            first = step(state, given)
            return lax.cond(first.num_left >= 1, lambda: step(first, given), lambda: first)

        return jax.jvp(twice, primals, tangents)

    return run(_start(problem, given), given).result


def _times_one(leaves: list[jax.Array], is_any_left: jax.Array) -> list[jax.Array]:
    """Return the parameters times a 1 that a TPU's compiler does not know before the loop.

    Otherwise it moves their conversions to bfloat16 out of the loop, and writes what each product
    would convert as it reads.
    """

    def multiplied(leaves: list[jax.Array], is_any_left: jax.Array) -> list[jax.Array]:
        one = jnp.where(is_any_left, 1, 0).astype(jnp.float32)
        return [leaf * one if leaf.dtype == one.dtype else leaf for leaf in leaves]

    return by_platform(leaves, is_any_left, tpu=multiplied, elsewhere=lambda leaves, _: leaves)


def _zeros_if_none(sums: list[jax.Array], kept: jax.Array) -> list[jax.Array]:
    """Return zeros if no sample is kept; under vmap, other batches may keep some."""
    return [jnp.where(jnp.any(kept), total, jnp.zeros_like(total)) for total in sums]


def _start(problem: Problem, given: _Given) -> _State:
    axes = meshes.axes_of_type(problem.closed.out_avals[0])
    samples, closed = given.samples, problem.plans.closed

    def zeros(shape: tuple[int, ...], dtype: Any, make: Any = jnp.zeros) -> jax.Array:
        return meshes.varying(make(shape, dtype), axes)

    n = samples.number
    # The first pass writes the sums, so that nothing need be in them. JAX 0.7 has no `empty`.
    empty = getattr(lax, "empty", jnp.zeros)
    result = Result(
        sums=[zeros(leaf.shape, leaf.dtype, empty) for leaf in given.leaves],
        outs=[zeros((n, *out.shape), out.dtype) for out in closed.out_avals],
        norms=zeros(samples.taus.shape, samples.taus.dtype),
        scales=zeros(samples.taus.shape, samples.taus.dtype),
        finite=zeros((n,), bool),
    )
    one, yes = (meshes.varying(jnp.ones((), kind), axes) for kind in (jnp.int32, bool))
    return _State(one, yes, meshes.varying(samples.counts, axes), result)
