"""The functions that `clipped_value_and_grad` and `clipped_grad` return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeAlias, TypedDict, TypeVar, TypeVarTuple, Unpack, cast, overload

import jax

from psclip_optax import clipped_call, groups, meshes
from psclip_optax.clipping import ClipStats
from psclip_optax.engine import verify
from psclip_optax.engine.calls import Call
from psclip_optax.engine.explain import Plan
from psclip_optax.engine.verify import Verification
from psclip_optax.groups import Limits
from psclip_optax.options import Options, checked_size
from psclip_optax.typing import (
    Batch,
    Params,
    ParamsT,
    PyTree,
    Threshold,
    ThresholdLike,
    ThresholdTree,
)

ValueT = TypeVar("ValueT")
RestT = TypeVarTuple("RestT")

_VERIFIED_ALONE = (
    "verify compares one device's samples, but axis_name names mesh axes; verify the same function "
    "without axis_name, outside of jax.shard_map"
)


class CallOptions(TypedDict, total=False):
    """The keyword arguments of a call."""

    sample_mask: jax.typing.ArrayLike | None
    positions: jax.typing.ArrayLike | None
    threshold: ThresholdLike | ThresholdTree | None


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedValueAndGrad(Generic[ValueT, *RestT]):
    """A function from parameters and batch to value and clipped mean gradient.

    Attributes:
      loss: the loss for one example.
      threshold: the threshold of calls that pass none; a tree of them to clip by group.
      options: the other arguments of `clipped_value_and_grad`.
      return_stats: whether a call returns a `psc.ClipStats` too.
    """

    loss: Callable[..., PyTree]
    threshold: Threshold | ThresholdTree | None
    options: Options
    return_stats: bool

    def __call__(
        self,
        params: ParamsT,
        *batch: Batch,
        sample_mask: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        threshold: ThresholdLike | ThresholdTree | None = None,
        **unknown: object,
    ) -> tuple[ValueT, ParamsT, *RestT]:
        """Return value and clipped mean gradient, and the `psc.ClipStats` if asked for."""
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
        # The overload that built this function says which it is.
        return cast("tuple[ValueT, ParamsT, *RestT]", results if self.return_stats else results[:2])

    def explain(self, params: Params, *batch: Batch, **unknown: object) -> Plan:
        """Show each parameter's route, its cost, and the reason for it.

        Args:
          params: the parameters of the call to explain, or their `jax.ShapeDtypeStruct`s.
          *batch: its batch, or `jax.ShapeDtypeStruct`s.
          **unknown: no other argument is accepted.

        Returns:
          A table with a row for each parameter; `print` shows it.
        """
        _check_known(unknown)
        plans: list[Plan] = []

        def of_values(params: Params, batch: tuple[Batch, ...]) -> None:
            call = clipped_call.prepare(self.loss, params, batch, self.options)
            limits = groups.fitted(self._own_threshold(), params)
            plans.append(clipped_call.explain(call, params, limits, self.options))

        if _has_shapes_alone((params, batch)):
            jax.eval_shape(of_values, params, batch)
        else:
            of_values(params, batch)
        return plans[0]

    def verify(
        self, params: Params, *batch: Batch, num_samples: int = 4, **unknown: object
    ) -> Verification:
        """Compare gradients and norms with those of `jax.vmap(jax.grad(loss))`.

        Args:
          params: the parameters at which to compare.
          *batch: the batch whose first samples are compared.
          num_samples: how many samples, or micro-batches where those are clipped.
          **unknown: no other argument is accepted.

        Returns:
          A table with the largest error of each parameter; `print` shows it, and its `ok` is a
          bool.
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

        def clip(one: Call, limits: Limits) -> tuple[PyTree, list[jax.Array], ClipStats]:
            value, grads, stats = clipped_call.clip(one, None, None, limits, own)
            return value[0] if own.has_aux else value, jax.tree.leaves(grads), stats

        of_threshold = groups.fitted(self._own_threshold(), params).groups
        return verify.verify(clip, call.first(num_samples * together), together, plan, of_threshold)

    def _own_threshold(self) -> Threshold | ThresholdTree:
        if self.threshold is None:
            raise TypeError(
                "a threshold is a number or a callable from positions [n] to norms [n], got None "
                "both for the function and for the call; pass clipped_value_and_grad(loss, "
                "threshold), or threshold=… to the call"
            )
        return self.threshold

    def _compute(
        self,
        params: Params,
        batch: tuple[Batch, ...],
        sample_mask: jax.typing.ArrayLike | None,
        positions: jax.typing.ArrayLike | None,
        rule: Threshold | ThresholdTree,
    ) -> tuple[PyTree, Params, ClipStats]:
        call = clipped_call.prepare(self.loss, params, batch, self.options)
        limits = groups.fitted(rule, params)
        return clipped_call.clip(call, sample_mask, positions, limits, self.options)


# A function whose results are not known to a type checker.
ClippedFunction: TypeAlias = ClippedValueAndGrad[PyTree, *tuple[PyTree, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGrad(Generic[*RestT]):
    """A function from parameters and batch to the clipped mean gradient.

    Attributes:
      value_and_grad: the function that returns the value too.
      has_aux: whether the loss returns aux.
    """

    value_and_grad: ClippedFunction
    has_aux: bool

    @overload
    def __call__(
        self: ClippedGrad[()], params: ParamsT, *batch: Batch, **keywords: Unpack[CallOptions]
    ) -> ParamsT: ...
    @overload
    def __call__(
        self, params: ParamsT, *batch: Batch, **keywords: Unpack[CallOptions]
    ) -> tuple[ParamsT, *RestT]: ...
    def __call__(
        self, params: ParamsT, *batch: Batch, **keywords: Unpack[CallOptions]
    ) -> ParamsT | tuple[ParamsT, *RestT]:
        """Return the clipped mean gradient, then aux and the `psc.ClipStats` if asked for."""
        value, grads, *stats = self.value_and_grad(params, *batch, **keywords)
        results = [grads, *([value[1]] if self.has_aux else []), *stats]
        # The overload that built this function says which it is.
        return cast(
            "ParamsT | tuple[ParamsT, *RestT]", results[0] if len(results) == 1 else tuple(results)
        )

    def explain(self, params: Params, *batch: Batch, **unknown: object) -> Plan:
        """Do what [`psclip_optax.clipped_functions.ClippedValueAndGrad.explain`][] does."""
        return self.value_and_grad.explain(params, *batch, **unknown)

    def verify(
        self, params: Params, *batch: Batch, num_samples: int = 4, **unknown: object
    ) -> Verification:
        """Do what [`psclip_optax.clipped_functions.ClippedValueAndGrad.verify`][] does."""
        return self.value_and_grad.verify(params, *batch, num_samples=num_samples, **unknown)


def _check_known(unknown: dict[str, object]) -> None:
    if unknown:
        raise TypeError(
            "f(params, *batch, sample_mask=None, positions=None, threshold=None) takes the loss's "
            f"arguments by position, got {', '.join(map(repr, unknown))} by name; write "
            "f(params, x, y), in the order of loss(params, x, y)"
        )


def _has_shapes_alone(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
