"""Read equations that contain a jaxpr, in the same way for every version of JAX.

Names of such primitives and of their parameters change between versions. Only this file knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend import core

CHECKPOINTS = ("checkpoint", "remat2", "remat")
CALLS = ("jit", "pjit", "closed_call", "eval_jaxpr", *CHECKPOINTS)
# The derivative of these is a user's rule.
CUSTOM_RULES = (
    *("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call", "custom_jvp_call_jaxpr"),
    *("linear_call", "custom_transpose_call", "remat_opt", "call_hi_primitive"),
)
_DEBUGGING = ("debug_callback", "debug_print")


def effects_of_references() -> set[Any]:
    """Return the effects of mutable references that a function creates and discards itself."""
    if not hasattr(jax, "new_ref"):  # JAX < 0.8
        return set()
    return jax.make_jaxpr(lambda x: jax.new_ref(x)[...])(0.0).effects


def without_debugging(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Remove the callbacks and prints of `jax.debug`."""
    silent = with_each_equation(
        closed.jaxpr, lambda eqn: None if eqn.primitive.name in _DEBUGGING else eqn
    )
    return closed.replace(jaxpr=silent)


def with_each_equation(
    jaxpr: core.Jaxpr, change: Callable[[core.JaxprEqn], core.JaxprEqn | None]
) -> core.Jaxpr:
    """Change each equation of a jaxpr and of inner jaxprs; None removes an equation."""

    def inside(value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=with_each_equation(value.jaxpr, change))
        if isinstance(value, core.Jaxpr):
            return with_each_equation(value, change)
        if type(value) is tuple:  # the branches of a condition
            return tuple(map(inside, value))
        return value

    changed = (
        change(eqn.replace(params={name: inside(one) for name, one in eqn.params.items()}))
        for eqn in jaxpr.eqns
    )
    return jaxpr.replace(eqns=[eqn for eqn in changed if eqn is not None])


def has_references(effects: Any) -> bool:
    """Tell whether these include effects of mutable references."""
    return bool(effects) and bool(effects & effects_of_references())


def body_parameter(eqn: core.JaxprEqn) -> str:
    return "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"


def inner_jaxpr(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """Return the jaxpr that an equation calls with all its inputs, and the jaxpr's constants."""
    inner = eqn.params[body_parameter(eqn)]
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Find all jaxprs among an equation's parameters, also in a tuple of branches."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one.jaxpr if isinstance(one, core.ClosedJaxpr) else one


def has_dtype(jaxpr: core.Jaxpr, dtype: Any) -> bool:
    """Tell whether any equation of a jaxpr, or of one inside it, makes an array of this dtype."""
    return any(
        any(getattr(v.aval, "dtype", None) == dtype for v in eqn.outvars)
        or any(has_dtype(inner, dtype) for inner in inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


class ScanCounts(NamedTuple):
    """Holds the numbers of a scan's inputs: first constants, then the carry."""

    consts: int
    carry: int


def scan_counts(eqn: core.JaxprEqn) -> ScanCounts:
    # JAX 0.11 changed the parameters that hold the counts, so we infer them from ranks. A scan's xs
    # and ys have one axis more outside than in the body. Constants and carry have the same number.
    body, _ = inner_jaxpr(eqn)
    carry = _num_unchanged(eqn.outvars, body.outvars)
    return ScanCounts(_num_unchanged(eqn.invars, body.invars) - carry, carry)


def _num_unchanged(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(outer.aval.ndim == inner.aval.ndim for outer, inner in pairs)


_Value = TypeVar("_Value")


def parted(
    values: Sequence[_Value], num_first: int, num_second: int
) -> tuple[Sequence[_Value], Sequence[_Value], Sequence[_Value]]:
    """Split the values of a scan's inputs into constants, carry and xs."""
    second = num_first + num_second
    return values[:num_first], values[num_first:second], values[second:]


def checkpointed(eqn: core.JaxprEqn, function: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpoint a function in the same way as an equation.

    Args:
      eqn: the equation that checkpoints.
      function: a function of a list of the equation's inputs, and of one more argument.
    """
    flags: Any = eqn.params["prevent_cse"]
    flags = flags if isinstance(flags, bool) else (list(flags), True)  # one for each input
    return jax.checkpoint(function, policy=eqn.params["policy"], prevent_cse=flags)


def needed_equations(jaxpr: core.Jaxpr, outputs: Iterable[Any]) -> list[core.JaxprEqn]:
    """Find the equations on which outputs depend, in order."""
    wanted, needed = {v for v in outputs if isinstance(v, core.Var)}, []
    for eqn in reversed(jaxpr.eqns):
        if wanted.isdisjoint(eqn.outvars):
            continue
        wanted.update(v for v in eqn.invars if isinstance(v, core.Var))
        needed.append(eqn)
    return needed[::-1]
