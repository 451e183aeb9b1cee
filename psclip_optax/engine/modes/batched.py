"""Run a loss, or a segment of one, on all samples at once, with taps and operations.

`tapped` runs the backward pass of each sample under `vmap`. Here one backward pass runs on the
whole batch, so it can contain operations on all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.engine import taps
from psclip_optax.engine.modes.problem import Problem
from psclip_optax.engine.modes.tapped import Seen, seen_of
from psclip_optax.engine.plan import LeafPlan


class Inputs(NamedTuple):
    """Holds the inputs of a jaxpr, and says which of them depend on the sample.

    Attributes:
      values: the value of each input, with n on the first axis of those that depend on the sample.
      axes: 0 for those, None for inputs that all samples share.
      wanted: the indices of the inputs whose cotangents are needed.
    """

    values: list[Any]
    axes: list[int | None]
    wanted: list[int]


class Operand(NamedTuple):
    """Holds the operands of an operation for each sample, [n], or [steps, n] within a scan.

    Attributes:
      zero: zeros, whose cotangents are ‖g_k‖² of its group.
      tau: τ_k of its group.
      share: the weight of the sample in the sum before it is clipped, 0 for padding.
    """

    zero: Any
    tau: Any
    share: Any


Operations: TypeAlias = dict[taps.Path, tuple[taps.Operation, Operand]]


class Backward(NamedTuple):
    """Holds the cotangents from a backward pass.

    Attributes:
      stacked: the gradients of direct weights, for each sample.
      cotangents: the cotangents of each tapped site's output, and of the operations' zeros.
      inputs: the cotangents of the needed inputs.
    """

    stacked: dict[int, jax.Array]
    cotangents: taps.Taps
    inputs: list[jax.Array]


class Forward(NamedTuple):
    """Holds the results of a forward pass.

    Attributes:
      outs: the outputs, [n, …].
      pull_back: a function from cotangents of the first outputs to a `Backward`.
      kept: the stored inputs and outputs of tapped sites.
    """

    outs: list[jax.Array]
    pull_back: Callable[[list[jax.Array]], Backward]
    kept: taps.Kept

    def seen(self, backward: Backward) -> Seen:
        """Collect the arrays for norms and sums of the tapped weights."""
        return seen_of(backward.stacked, backward.cotangents, self.outs, self.kept)


def forward(
    problem: Problem,
    plans: Sequence[LeafPlan],
    weights: dict[int, Any],
    inputs: Inputs,
    operations: Operations,
    *,
    num_cotangents: int,
    num_samples: int,
) -> Forward:
    """Run the forward pass of a problem's jaxpr.

    Args:
      problem: the problem.
      plans: the plans of the weights that are tapped or direct.
      weights: the values of all weights.
      inputs: the inputs of the jaxpr.
      operations: by path, the operations that replace segments, and their operands.
      num_cotangents: the first so many outputs have a cotangent.
      num_samples: the batch size.
    """
    run = _Run(problem, plans, weights, operations)

    def of_batch(direct: dict[int, Any], zeros: taps.Taps, wanted: list[Any]) -> Any:
        given = dict(zip(inputs.wanted, wanted, strict=True))
        values = [given.get(i, value) for i, value in enumerate(inputs.values)]
        batched = jax.vmap(
            run.of_sample,
            in_axes=(0, run.axes, {path: run.axes[path] for path in operations}, inputs.axes),
            out_axes=(0, run.axes_kept),
            axis_size=num_samples,
            spmd_axis_name=problem.spmd_axis_name,
        )
        operands = {path: operand for path, (_, operand) in operations.items()}
        outs, kept = batched(direct, zeros, operands, values)
        return outs[:num_cotangents], (outs[num_cotangents:], kept)

    wanted = [inputs.values[i] for i in inputs.wanted]
    variables = run.direct(num_samples), run.zeros(num_samples), wanted
    outs, pull_back, (others, kept) = jax.vjp(of_batch, *variables, has_aux=True)
    return Forward([*outs, *others], lambda given: Backward(*pull_back(given)), kept)


class _Run(NamedTuple):
    """Runs a problem's jaxpr for one sample, with inputs for all of them."""

    problem: Problem
    plans: Sequence[LeafPlan]
    weights: dict[int, Any]
    operations: Operations

    @property
    def taps(self) -> dict[taps.Path, taps.Action]:
        return {
            site.path: taps.tap(site, keeps_y=plan.is_radial)
            for plan in self.plans
            for site in plan.sites
        }

    @property
    def axes(self) -> taps.Axes:
        """Return the axis of samples of the arrays at each tap and each operation."""
        axes = {path: action.num_scans for path, action in self.taps.items()}
        return axes | {path: one.zero.ndim - 1 for path, (_, one) in self.operations.items()}

    @property
    def axes_kept(self) -> dict[tuple[taps.Path, taps.Side], int]:
        actions = self.taps.items()
        return {(path, side): one.num_scans for path, one in actions for side in one.keeps}

    def zeros(self, num_samples: int) -> taps.Taps:
        axes = meshes.axes_of_type(self.problem.closed.out_avals[0])

        def of_all(action: taps.Action) -> jax.Array:
            one, axis = action.zero, action.num_scans
            shape = (*one.shape[:axis], num_samples, *one.shape[axis:])
            return meshes.varying(jnp.zeros(shape, one.dtype), axes)

        zeros = {path: of_all(action) for path, action in self.taps.items()}
        return zeros | {path: operand.zero for path, (_, operand) in self.operations.items()}

    def direct(self, num_samples: int) -> dict[int, jax.Array]:
        """Repeat for each sample the weights whose gradients are made for each sample."""
        weights = [plan.weight for plan in self.plans if plan.is_direct]
        shape = (num_samples,)
        return {
            i: jnp.broadcast_to(self.weights[i], shape + self.weights[i].shape) for i in weights
        }

    def of_sample(
        self, direct: dict[int, Any], zeros: taps.Taps, operands: taps.Taps, values: list[Any]
    ) -> tuple[list[Any], taps.Kept]:
        plans, chosen = self.problem.plans, {plan.weight for plan in self.plans}
        given = {
            (one.path, one.output): direct.get(plan.weight, self.weights[plan.weight])
            for plan, one in zip(plans.others, plans.computed, strict=True)
            if plan.weight in chosen
        }
        tapped = {
            path: operands[path]._replace(zero=zero) if path in operands else zero
            for path, zero in zeros.items()
        }
        operations = {path: operation for path, (operation, _) in self.operations.items()}
        # After its weights the jaxpr has other inputs, with the numbers of computed weights.
        weights = [direct.get(i, value) for i, value in enumerate(values[: plans.num_leaves])]
        values = [*weights, *values[plans.num_leaves :]]
        return taps.run_with(plans.closed, values, tapped, {**self.taps, **operations}, given)


def forward_of_each(
    problem: Problem,
    plans: Sequence[LeafPlan],
    weights: dict[int, Any],
    inputs: Inputs,
    *,
    num_cotangents: int,
    num_samples: int,
) -> Forward:
    """Run the forward pass without operations, so that no weight is repeated for each sample.

    The derivative is that of one sample. Residuals that do not depend on the sample are stored
    once.
    """
    run = _Run(problem, plans, weights, {})
    jaxpr, structures = problem.plans.closed.jaxpr, []

    def of_sample(direct: dict[int, Any], zeros: taps.Taps, values: list[Any]) -> Any:
        def outs(direct: dict[int, Any], zeros: taps.Taps, wanted: list[Any]) -> Any:
            given = dict(zip(inputs.wanted, wanted, strict=True))
            own = [given.get(i, value) for i, value in enumerate(values)]
            outs, kept = run.of_sample(direct, zeros, {}, own)
            return outs[:num_cotangents], (outs[num_cotangents:], kept)

        wanted = [values[i] for i in inputs.wanted]
        outs_, pull_back, (others, kept) = jax.vjp(outs, direct, zeros, wanted, has_aux=True)
        saved, structure = jax.tree.flatten(pull_back)
        structures.append(structure)
        return outs_, others, kept, saved

    direct = {plan.weight: weights[plan.weight] for plan in plans if plan.is_direct}
    axes_of_loss = meshes.axes_of_type(problem.closed.out_avals[0])
    zeros = {path: meshes.varying(one.zero, axes_of_loss) for path, one in run.taps.items()}
    one = [meshes.shape_of_type(v.aval) for v in jaxpr.invars]
    closed, (outs, others, kept, saved) = jax.make_jaxpr(of_sample, return_shape=True)(
        direct, zeros, one
    )
    axes_of_inputs = [None] * len(jax.tree.leaves((direct, zeros))) + inputs.axes
    of_sample_alone = _batched(closed.jaxpr, axes_of_inputs)[-len(saved) :] if saved else []
    axes_saved = [0 if is_batched else None for is_batched in of_sample_alone]
    axes_kept = {key: [run.axes_kept[key]] * len(arrays) for key, arrays in kept.items()}
    axes = [*[0] * (len(outs) + len(others)), *jax.tree.leaves(axes_kept), *axes_saved]
    batched = jax.vmap(
        core.jaxpr_as_fun(closed),
        in_axes=axes_of_inputs,
        out_axes=axes,
        axis_size=num_samples,
        spmd_axis_name=problem.spmd_axis_name,
    )
    flat = batched(*jax.tree.leaves((direct, zeros)), *inputs.values)
    structure = jax.tree.structure((outs, others, kept, saved))
    outs, others, kept, saved = jax.tree.unflatten(structure, flat)
    shared = tuple(inputs.axes[i] is None for i in inputs.wanted)
    static = _Static(
        structures[-1], tuple(axes_saved), tuple(run.axes.items()), shared, problem.spmd_axis_name
    )
    return Forward([*outs, *others], _PullBackOfEach(saved, static), kept)


def _batched(jaxpr: core.Jaxpr, axes: Sequence[int | None]) -> list[bool]:
    """Tell which outputs depend on inputs that have an axis of samples."""
    known = {v for v, axis in zip(jaxpr.invars, axes, strict=True) if axis is not None}
    is_known = lambda v: isinstance(v, core.Var) and v in known  # noqa: E731
    for eqn in jaxpr.eqns:
        if any(map(is_known, eqn.invars)):
            known.update(eqn.outvars)
    return [is_known(v) for v in jaxpr.outvars]


class _Static(NamedTuple):
    """Holds static properties of the samples' pull-back.

    Attributes:
      structure: the tree structure of one sample's pull-back.
      axes_saved: the axis of samples of each of its residuals, or None.
      axes: the axis of samples of the cotangent at each tap.
      shared: which of the needed inputs all samples share.
      spmd_axis_name: the name of the axis of samples.
    """

    structure: Any
    axes_saved: tuple[int | None, ...]
    axes: tuple[tuple[taps.Path, int], ...]
    shared: tuple[bool, ...]
    spmd_axis_name: Any


@jax.tree_util.register_pytree_node_class
class _PullBackOfEach:
    """The samples' pull-back as a pytree, whose leaves are the residuals."""

    def __init__(self, saved: list[Any], static: _Static) -> None:
        self._saved, self._static = saved, static

    def __call__(self, cotangents: list[jax.Array]) -> Backward:
        static = self._static

        def of_sample(saved: list[Any], cotangents: list[Any]) -> Any:
            pull_back: Any = jax.tree.unflatten(static.structure, saved)
            return pull_back(cotangents)

        stacked, at_taps, wanted = jax.vmap(
            of_sample,
            in_axes=([*static.axes_saved], 0),
            out_axes=(0, dict(static.axes), 0),
            spmd_axis_name=static.spmd_axis_name,
        )(self._saved, cotangents)
        both = zip(wanted, static.shared, strict=True)
        return Backward(stacked, at_taps, [jnp.sum(g, 0) if own else g for g, own in both])

    def tree_flatten(self) -> Any:
        return (self._saved,), self._static

    @classmethod
    def tree_unflatten(cls, static: _Static, children: Any) -> _PullBackOfEach:
        (saved,) = children
        return cls(saved, static)
