"""Prove that derivative rules are linear in their cotangent, or report that it is not known.

Σ γ_k Jᵀ c_k equals Jᵀ Σ γ_k c_k only if the backward pass is a linear function of the cotangent c.
JAX's own rules are linear. A user's rule may not be: a `jax.custom_vjp` may clip, normalise, round
or quantise. Its backward pass is traced, and each variable is checked for linearity in the
cotangents. A rule without a proof counts as not linear.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from psclip_optax import meshes
from psclip_optax.arrays import is_narrow
from psclip_optax.engine.analysis.equations import (
    CALLS,
    CUSTOM_RULES,
    has_references,
    inner_jaxpr,
    inner_jaxprs,
    scan_counts,
)
from psclip_optax.engine.analysis.views import aval, run_equation
from psclip_optax.engine.analysis.walk import walk
from psclip_optax.thresholds import concrete


def has_gradient(variable: Any) -> bool:
    return jnp.issubdtype(aval(variable).dtype, jnp.inexact)


def with_cotangents(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> set[core.Var]:
    """Find the variables that may get a cotangent in a backward pass from the wanted outputs."""
    outs = zip(jaxpr.outvars, wanted, strict=True)
    live = {v for v, is_wanted in outs if is_wanted and isinstance(v, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        reached = any(v in live and has_gradient(v) for v in eqn.outvars)
        if reached and eqn.primitive.name != "stop_gradient":
            live.update(v for v in eqn.invars if isinstance(v, core.Var) and has_gradient(v))
    return live


def unproven_rule(
    jaxpr: core.Jaxpr, varied: Sequence[bool], wanted: Sequence[bool]
) -> core.JaxprEqn | None:
    """Find an equation whose derivative is not proven linear in its cotangent.

    Args:
      jaxpr: the jaxpr to search, including all jaxprs that it calls.
      varied: which of its inputs depend on the differentiated variables.
      wanted: which of its outputs have a cotangent.

    Returns:
      The first such equation that a cotangent passes through; None if there is none.
    """
    inputs = zip(jaxpr.invars, varied, strict=True)
    depends = {v for v, is_varied in inputs if is_varied and has_gradient(v)}
    live = with_cotangents(jaxpr, wanted)
    for eqn in jaxpr.eqns:
        if has_references(eqn.effects):  # a second backward pass would need new ones
            return eqn
        flags = [isinstance(v, core.Var) and v in depends for v in eqn.invars]
        if not any(flags) or eqn.primitive.name == "stop_gradient":
            continue
        depends.update(v for v in eqn.outvars if has_gradient(v))
        reached = [v in live and has_gradient(v) for v in eqn.outvars]
        found = unproven_equation(eqn, flags, reached) if any(reached) else None
        if found is not None:
            return found
    return None


def unproven_equation(
    eqn: core.JaxprEqn, varied: Sequence[bool], wanted: Sequence[bool]
) -> core.JaxprEqn | None:
    """Check one equation for `unproven_rule`: return it, or an equation that it calls, or None."""
    name = eqn.primitive.name
    if name in CUSTOM_RULES:
        return None if _is_proven(eqn, varied) else eqn
    if _rounds(eqn):
        return eqn
    if name in CALLS:
        return unproven_rule(inner_jaxpr(eqn)[0], varied, wanted)
    if name == "scan":
        body, _ = inner_jaxpr(eqn)
        consts, carry = scan_counts(eqn)
        first = varied[:consts], [any(varied)] * carry, varied[consts + carry :]
        inner = [flag for flags in first for flag in flags]
        return unproven_rule(body, inner, [*[True] * carry, *wanted[carry:]])
    for jaxpr in inner_jaxprs(eqn):
        everything = [True] * len(jaxpr.invars), [True] * len(jaxpr.outvars)
        found = unproven_rule(jaxpr, *everything)
        if found is not None:
            return found
    return None


def described_rule(eqn: core.JaxprEqn) -> str:
    """Name an equation whose derivative is not proven linear in its cotangent."""
    name, at = eqn.primitive.name, source_info_util.summarize(eqn.source_info)
    if name in CUSTOM_RULES:
        return f"a {name.removesuffix('_call')} whose rule is not known to be linear ({at})"
    does = "rounds each cotangent" if _rounds(eqn) else "is not known to be linear in cotangents"
    return f"{name}, which {does} ({at})"


def _rounds(eqn: core.JaxprEqn) -> bool:
    """Tell whether the cotangent is rounded to far fewer digits than a 16-bit number has."""
    if eqn.primitive.name == "reduce_precision":
        return True
    return any(is_narrow(aval(v).dtype) for v in (*eqn.invars, *eqn.outvars))


def passes_cotangent_on(eqn: core.JaxprEqn, which: int) -> bool:
    """Tell whether the backward pass of one equation returns its only cotangent unchanged.

    Straight-through estimators do so for the input that they round.
    """
    backward = backward_of(eqn, [i == which for i in range(len(eqn.invars))])
    if backward is None:
        return False
    jaxpr = backward.jaxpr
    inputs = [v is jaxpr.invars[0] for v in jaxpr.invars]

    def equation(eqn: core.JaxprEqn, inputs: list[bool], path: Any) -> list[bool]:
        if eqn.primitive.name in CALLS:
            return walk(inner_jaxpr(eqn)[0], (), inputs, lambda _: False, equation, path)
        is_same = eqn.primitive.name in ("copy", "copy_p", "convert_element_type")
        return [inputs[0] and is_same and not _rounds(eqn)] * len(eqn.outvars)

    consts = [False] * len(backward.consts)
    return all(walk(jaxpr, consts, inputs, lambda _: False, equation))


def _is_proven(eqn: core.JaxprEqn, varied: Sequence[bool]) -> bool:
    """Tell whether the backward pass of one equation is proven linear in the cotangents."""
    closed = backward_of(eqn, varied)
    if closed is None:
        return False
    num_cotangents = len(closed.jaxpr.invars) - len(eqn.invars)
    flags = [_Dependence.LINEAR] * num_cotangents + [_Dependence.NONE] * len(eqn.invars)
    outs = _dependences(closed.jaxpr, flags)
    return all(one in (_Dependence.LINEAR, _Dependence.ZERO) for one in outs)


def backward_of(eqn: core.JaxprEqn, varied: Sequence[bool]) -> core.ClosedJaxpr | None:
    """Trace the backward pass of one equation, from cotangents and inputs to cotangents."""
    shapes = [meshes.shape_of_type(aval(v)) for v in (*eqn.invars, *eqn.outvars)]
    inputs, outputs = shapes[: len(eqn.invars)], shapes[len(eqn.invars) :]
    flags = zip(eqn.invars, varied, strict=True)
    chosen = [i for i, (v, is_varied) in enumerate(flags) if is_varied and has_gradient(v)]
    reached = [i for i, v in enumerate(eqn.outvars) if has_gradient(v)]

    def backward(cotangents: list[Any], inputs: list[Any]) -> Any:
        def run(values: list[Any]) -> list[Any]:
            given = dict(zip(chosen, values, strict=True))
            outs = run_equation(eqn, [given.get(i, one) for i, one in enumerate(inputs)])
            return [outs[i] for i in reached]

        return jax.vjp(run, [inputs[i] for i in chosen])[1](cotangents)

    try:
        return jax.make_jaxpr(backward)([outputs[i] for i in reached], inputs)
    except Exception:  # the user's rule raises again when it is called
        return None


# Find how each variable of a backward pass depends on its cotangents


def linear_in(jaxpr: core.Jaxpr, is_cotangent: Sequence[bool]) -> list[bool | None]:
    """Tell whether each output is linear in some inputs; None if it depends on none of them."""
    flags = [_Dependence.LINEAR if flag else _Dependence.NONE for flag in is_cotangent]
    known = {_Dependence.NONE: None, _Dependence.LINEAR: True}
    return [known.get(one, False) for one in _dependences(jaxpr, flags)]


def moves_entries(eqn: core.JaxprEqn) -> bool:
    """Tell whether an equation returns each entry of its input once, maybe with another sign."""
    is_move = eqn.primitive.name in _PERMUTES and len(eqn.invars) == 1
    is_move = is_move and has_gradient(eqn.invars[0]) and has_gradient(eqn.outvars[0])
    return is_move and not _rounds(eqn)


class _Dependence(enum.Enum):
    """A variable's dependence on the cotangents: none, zero, linear, or not known to be linear."""

    NONE = enum.auto()
    ZERO = enum.auto()
    LINEAR = enum.auto()
    UNKNOWN = enum.auto()


_Dependences: TypeAlias = list[_Dependence]
_FREE = (_Dependence.NONE, _Dependence.ZERO)
_SUMMABLE = (_Dependence.ZERO, _Dependence.LINEAR)


def _dependences(jaxpr: core.Jaxpr, inputs: Sequence[_Dependence]) -> _Dependences:
    """Derive the outputs' dependences from the inputs'."""
    consts = [_Dependence.NONE] * len(jaxpr.constvars)
    return walk(jaxpr, consts, inputs, _of_literal, lambda eqn, ins, _: _of_equation(eqn, ins))


def _of_literal(value: Any) -> _Dependence:
    return _Dependence.ZERO if _is_zero(value) else _Dependence.NONE


def _is_zero(value: Any) -> bool:
    known = concrete(value)
    return known is not None and not known.any()


def _of_equation(eqn: core.JaxprEqn, inputs: _Dependences) -> _Dependences:
    name = eqn.primitive.name
    if all(one in _FREE for one in inputs):
        is_zero = name in _MOVES and inputs[0] is _Dependence.ZERO
        return [_Dependence.ZERO if is_zero else _Dependence.NONE] * len(eqn.outvars)
    if name in CALLS or name in CUSTOM_RULES:
        return _of_call(eqn, inputs)
    if name in ("cond", "scan", "while"):
        return _CONTROL_FLOW[name](eqn, inputs)
    rule = _RULES.get(name)
    is_linear = rule is not None and not _rounds(eqn) and rule(inputs)
    known = _Dependence.LINEAR if is_linear else _Dependence.UNKNOWN
    return [known if has_gradient(v) else _Dependence.UNKNOWN for v in eqn.outvars]


def _of_call(eqn: core.JaxprEqn, inputs: _Dependences) -> _Dependences:
    # A custom rule defines a derivative. Here the function itself runs.
    jaxpr = next(inner_jaxprs(eqn), None)
    sizes = len(eqn.invars), len(eqn.outvars)
    if jaxpr is None or (len(jaxpr.invars), len(jaxpr.outvars)) != sizes:
        return [_Dependence.UNKNOWN] * len(eqn.outvars)
    return _dependences(jaxpr, inputs)


def _of_cond(eqn: core.JaxprEqn, inputs: _Dependences) -> _Dependences:
    index, *operands = inputs
    if index not in _FREE:
        return [_Dependence.UNKNOWN] * len(eqn.outvars)
    branches = [_dependences(branch.jaxpr, operands) for branch in eqn.params["branches"]]
    return [_either(outs) for outs in zip(*branches, strict=True)]


def _either(outs: Sequence[_Dependence]) -> _Dependence:
    """Join the dependences of variables, one of which is chosen independently of the cotangents."""
    different = set(outs)
    if len(different) == 1:
        return different.pop()
    if different <= set(_FREE):
        return _Dependence.NONE
    return _Dependence.LINEAR if different <= set(_SUMMABLE) else _Dependence.UNKNOWN


def _of_scan(eqn: core.JaxprEqn, inputs: _Dependences) -> _Dependences:
    body, _ = inner_jaxpr(eqn)
    num_consts, num_carry = scan_counts(eqn)
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    xs = inputs[num_consts + num_carry :]

    def step(carry: _Dependences) -> _Dependences:
        return _dependences(body, [*consts, *carry, *xs])

    carry = _settled(lambda carry: step(carry)[:num_carry], carry)
    return [*carry, *step(carry)[num_carry:]]


def _of_while(eqn: core.JaxprEqn, inputs: _Dependences) -> _Dependences:
    params = eqn.params
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = inputs[:of_cond], inputs[of_cond : of_cond + of_body]
    body, cond = params["body_jaxpr"].jaxpr, params["cond_jaxpr"].jaxpr
    carry = _settled(
        lambda carry: _dependences(body, [*body_consts, *carry]), inputs[of_cond + of_body :]
    )
    (goes_on,) = _dependences(cond, [*cond_consts, *carry])
    return carry if goes_on in _FREE else [_Dependence.UNKNOWN] * len(carry)


def _settled(step: Callable[[_Dependences], _Dependences], carry: _Dependences) -> _Dependences:
    """Find a carry's dependences after any number of steps; each step can only add some."""
    while True:
        new = [_either(both) for both in zip(carry, step(carry), strict=True)]
        if new == carry:
            return carry
        carry = new


_CONTROL_FLOW = {"cond": _of_cond, "scan": _of_scan, "while": _of_while}


def _all_summable(inputs: _Dependences) -> bool:
    return all(one in _SUMMABLE for one in inputs)


def _one_of_all(inputs: _Dependences) -> bool:
    """Tell whether just one factor of a product depends on the cotangent, and linearly."""
    is_one = inputs.count(_Dependence.LINEAR) == 1
    return is_one and sum(one in _FREE for one in inputs) == len(inputs) - 1


def _first(inputs: _Dependences) -> bool:
    return inputs[0] is _Dependence.LINEAR and all(one in _FREE for one in inputs[1:])


def _last(inputs: _Dependences) -> bool:
    return inputs[-1] is _Dependence.LINEAR and all(one in _FREE for one in inputs[:-1])


def _all_but_first(inputs: _Dependences) -> bool:
    return inputs[0] in _FREE and _all_summable(inputs[1:])


def _first_two(inputs: _Dependences) -> bool:
    return _all_summable(inputs[:2]) and all(one in _FREE for one in inputs[2:])


def _first_and_third(inputs: _Dependences) -> bool:
    return _all_summable([inputs[0], inputs[2]]) and inputs[1] in _FREE


# These return each entry once.
_PERMUTES = (
    *("convert_element_type", "copy", "copy_p", "expand_dims", "neg", "reshape", "rev"),
    *("squeeze", "transpose"),
)
# These move, repeat or add entries, so they map zeros to zeros.
_MOVES = (
    *("broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "neg", "reshape"),
    *("reduce_sum", "rev", "slice", "squeeze", "transpose", "pvary", "pcast"),
)
_RULES: dict[str, Callable[[_Dependences], bool]] = {
    **dict.fromkeys(_MOVES, _all_summable),
    **dict.fromkeys(
        ("add", "add_any", "sub", "concatenate", "pad", "complex", "real", "imag", "conj"),
        _all_summable,
    ),
    **dict.fromkeys(("cumsum", "reduce_window_sum", "fft"), _all_summable),
    **dict.fromkeys(("split", "stack", "tile", "unstack"), _all_summable),
    **dict.fromkeys(("psum", "all_gather", "all_to_all", "ppermute"), _all_summable),
    **dict.fromkeys(("copy_p", "sharding_constraint", "stop_gradient"), _all_summable),
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated"), _one_of_all),
    **dict.fromkeys(("div", "gather", "dynamic_slice"), _first),
    "triangular_solve": _last,
    "select_n": _all_but_first,
    "dynamic_update_slice": _first_two,
    **dict.fromkeys(("scatter-add", "scatter_add", "scatter"), _first_and_third),
}
