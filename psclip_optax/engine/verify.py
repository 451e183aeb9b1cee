"""Compare the engine's gradients and norms of a few samples with `jax.vmap(jax.grad(loss))`."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from psclip_optax.arrays import is_narrow
from psclip_optax.engine.analysis.equations import inner_jaxprs
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.calls import Call
from psclip_optax.engine.explain import Plan
from psclip_optax.engine.memory import NO_GRADIENT_OF_VMAP
from psclip_optax.groups import Groups, Limits
from psclip_optax.table import table
from psclip_optax.thresholds import Threshold

_COLUMNS = ("parameter", "route", "largest error", "ok")
_ISSUES = "https://github.com/psclip/psclip_optax/issues"
# The error of a leaf whose gradient almost vanishes is relative to this share of the largest entry.
_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class VerificationRow:
    """The largest error of one of the results, compared with `vmap(grad)`.

    Attributes:
      parameter: the path in the tree of parameters; "norms" or "loss" for the other rows.
      route: the route of its gradient, as in [`psclip_optax.engine.explain.PlanRow`][].
      error: the largest difference of an entry, relative to the leaf's largest entry.
      ok: whether the error is within the tolerance.
    """

    parameter: str
    route: str
    error: float
    ok: bool


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`; printed as a table.

    Attributes:
      rows: a row for each parameter, then for norms and loss.
      mode: the mode that was verified.
      num_samples: the number of samples compared, or of micro-batches if those are clipped.
      dtype: the name of the dtype used for the comparison.
      tolerance: the largest relative error that rounding can explain.
      report: the file that describes an error, to attach to a report; None if there is none.
    """

    rows: tuple[VerificationRow, ...]
    mode: str
    num_samples: int
    dtype: str
    tolerance: float
    report: str | None = None

    @property
    def ok(self) -> bool:
        """Tell whether all errors are within the tolerance."""
        return all(row.ok for row in self.rows)

    @property
    def largest_error(self) -> float:
        """Return the largest of all relative errors."""
        return max(row.error for row in self.rows)

    def __str__(self) -> str:
        cells = [
            (row.parameter, row.route, f"{row.error:.1e}", "yes" if row.ok else "NO")
            for row in self.rows
        ]
        title = (
            f"mode {self.mode} against vmap(grad), {self.num_samples} samples in {self.dtype}, "
            f"tolerance {self.tolerance:.0e}"
        )
        lines = [title, *table([_COLUMNS, *cells])]
        return "\n".join([*lines, *([] if self.ok else [self._what_to_do()])])

    def _what_to_do(self) -> str:
        return (
            f'Not the same numbers: take mode="vmap" meanwhile, and report {self.report}, which '
            f"holds the jaxpr and the routes, at {_ISSUES}"
        )


def verify(
    clip: Callable[..., Any], call: Call, together: int, plan: Plan, groups: Groups
) -> Verification:
    """Compare a mode with the reference, both compiled, in full precision.

    Args:
      clip: a function from a call and its limits to value, gradients' leaves and ClipStats.
      call: the call with the samples to compare.
      together: the number of samples that are clipped together.
      plan: the plan of the whole batch, for its mode and routes.
      groups: which parameters are clipped together.
    """
    call = _in_widest(call)
    with jax.default_matmul_precision("highest"):
        losses, stack = _reference(call, together)
        stack = groups.slices(stack, [1] * len(stack))
        members = groups.apart().members(len(stack))
        # The norm of each sample and each group.
        norms = np.sqrt(np.stack([sum(_squares(stack[i]) for i in own) for own in members], -1))
        # Each sample has a different weight, so that errors do not cancel.
        taus = norms * np.linspace(0.25, 1.25, len(norms))[:, None]
        limits = Limits(tuple(map(_threshold_of, taus.T)), groups)
        value, grads, stats = jax.jit(lambda *both: clip(call.of(*both), limits))(
            call.params, call.examples
        )
    finite = np.isfinite(norms).all(axis=-1) & np.isfinite(losses)
    shares = _shares(call.num_samples, together)
    weights = (np.minimum(1, taus / np.where(norms > 0, norms, 1)) * shares[:, None])[finite]
    wanted = {
        leaf: np.tensordot(own, stack[leaf][finite], 1)
        for own, leaves in zip(weights.T, members, strict=True)
        for leaf in leaves
    }
    means = groups.whole([wanted[leaf] for leaf in range(len(stack))])
    errors = _errors(grads, [np.asarray(mean) for mean in means])
    errors += _errors([np.reshape(stats.norms, norms.shape)[finite]], [norms[finite]])
    mean = np.average(losses[finite], weights=shares[finite]) if finite.any() else 0
    errors += _errors([value], [mean])
    tolerance = _tolerance(_jaxpr(call).jaxpr)
    names = [(row.parameter, row.route) for row in plan.rows] + [("norms", ""), ("loss", "")]
    rows = tuple(
        VerificationRow(*name, error, error <= tolerance)
        for name, error in zip(names, errors, strict=True)
    )
    dtype = str(jnp.result_type(*call.params))
    result = Verification(rows, plan.mode, len(norms), dtype, tolerance)
    if result.ok:
        return result
    return dataclasses.replace(result, report=_written(result, call, plan))


def _shares(num_samples: int, together: int) -> np.ndarray:
    """Return each unit's share in the mean; the last unit may have fewer samples."""
    starts = np.arange(0, num_samples, together)
    return np.minimum(together, num_samples - starts) / num_samples


def _threshold_of(taus: np.ndarray) -> Threshold:
    return lambda positions: jnp.asarray(taus[: len(positions)])


def _in_widest(call: Call) -> Call:
    """Convert the call to float64, if x64 is enabled and the loss accepts it."""
    wide = call.of(*jax.tree.map(_widened, (call.params, call.examples)))
    try:
        _jaxpr(wide)
    except Exception:  # e.g. a loss that mixes its arguments with another dtype
        return call
    return wide


def _jaxpr(call: Call) -> core.ClosedJaxpr:
    return jax.make_jaxpr(call.loss)(call.params, [example[0] for example in call.examples])


def _widened(leaf: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.result_type(float)) if is_float else leaf


def _reference(call: Call, together: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Compute losses and stacked gradients of samples, or of means over those clipped together."""
    leaves, examples = call.params, call.examples

    def loss(leaves: list[jax.Array], example: list[jax.Array]) -> jax.Array:
        return call.loss(leaves, example)[0]

    def mean(leaves: list[jax.Array], examples: list[jax.Array]) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0))(leaves, examples))

    if together == 1:
        losses, stack = _of_each(jax.value_and_grad(loss), leaves, examples)
    else:  # one after the other, because the last may have fewer samples
        starts, run = range(0, call.num_samples, together), jax.jit(jax.value_and_grad(mean))
        results = [run(leaves, [e[i : i + together] for e in examples]) for i in starts]
        losses, stack = jax.tree.map(lambda *parts: jnp.stack(parts), *results)
    return np.asarray(losses, np.float64), [np.asarray(leaf, np.float64) for leaf in stack]


def _of_each(gradient: Callable[..., Any], leaves: list[Any], each: list[Any]) -> Any:
    try:
        return jax.jit(jax.vmap(gradient, (None, 0)))(leaves, each)
    except NO_GRADIENT_OF_VMAP:  # as with ragged_dot: one after the other
        return jax.lax.map(lambda own: gradient(leaves, own), each)


def _squares(leaf: np.ndarray) -> np.ndarray:
    return np.sum(np.square(leaf.reshape(len(leaf), -1)), axis=1)


def _errors(got: Sequence[Any], wanted: Sequence[Any]) -> list[float]:
    """Find the largest error of each array, relative to its largest entry; ∞ if one is NaN."""
    largest = max((np.max(np.abs(want), initial=0) for want in wanted), default=0)

    def error(one: Any, want: Any) -> float:
        difference = np.max(np.abs(np.asarray(one, np.float64) - want), initial=0)
        scale = max(np.max(np.abs(want), initial=0), _FLOOR * largest)
        relative = difference / scale if scale else difference
        return float(relative) if np.isfinite(relative) else math.inf

    return [error(*both) for both in zip(got, wanted, strict=True)]


def _tolerance(jaxpr: core.Jaxpr) -> float:
    """Bound the rounding error: the root of the coarsest dtype's epsilon; for float8, epsilon."""
    dtypes = _float_dtypes(jaxpr)
    wide = [float(jnp.finfo(dtype).eps) for dtype in dtypes if not is_narrow(dtype)]
    narrow = [float(jnp.finfo(dtype).eps) for dtype in dtypes if is_narrow(dtype)]
    return max([*(math.sqrt(eps) for eps in wide), *narrow])


def _float_dtypes(jaxpr: core.Jaxpr) -> set[Any]:
    variables = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    dtypes: set[Any] = {aval(v).dtype for v in variables if hasattr(v.aval, "dtype")}
    inner = (_float_dtypes(one) for eqn in jaxpr.eqns for one in inner_jaxprs(eqn))
    return {d for d in dtypes.union(*inner) if jnp.issubdtype(d, jnp.floating)}


def _written(result: Verification, call: Call, plan: Plan) -> str:
    """Write a file that describes an error, and return its path."""
    text = "\n\n".join([f"jax {jax.__version__}", str(result), str(plan), str(_jaxpr(call))])
    with tempfile.NamedTemporaryFile(
        "w", prefix="psclip_verify_", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return file.name
