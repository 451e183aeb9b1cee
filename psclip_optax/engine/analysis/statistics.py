"""Find statistics over a batch axis of size 1, mostly batch normalisation in training mode.

A *batch axis* is an axis of size 1 in front of an example: its first axis, or one that the loss
adds there. A *statistic* is a reduction over it whose result has more than one number. The warning
is issued if a statistic is combined elementwise with data that still has the batch axis, as in
normalisation. A reduction that is not broadcast over the batch again (the mean of the losses, the
pooling of an image) does not couple samples. Neither does attention to a single token, although its
softmax is over an axis of size 1: its scores are for pairs of tokens, or have the tokens last.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from jax.extend import core, source_info_util

from psclip_optax.engine.analysis.equations import CALLS, inner_jaxpr, scan_counts
from psclip_optax.engine.analysis.views import Path, aval
from psclip_optax.engine.analysis.walk import walk


class FromExample(NamedTuple):
    """Says how a variable depends on the example.

    Attributes:
      batch_axes: its batch axes.
      statistics: the places of the statistics on which it depends.
    """

    batch_axes: frozenset[int] = frozenset()
    statistics: frozenset[str] = frozenset()


Origin: TypeAlias = FromExample | None  # None: it does not depend on the example
Rule: TypeAlias = Callable[[core.JaxprEqn, Sequence[frozenset[int]], Any], frozenset[int]]

_WITH_BODIES = (*CALLS, "custom_jvp_call", "custom_vjp_call", "scan", "while", "cond")
_SHOWN = 3


def warn_of_batch_statistics(closed: core.ClosedJaxpr, num_leaves: int) -> None:
    """Warn of statistics over a batch axis of size 1 in the loss for one example.

    Args:
      closed: the loss for one example.
      num_leaves: how many of its inputs are parameters; the others are the example.
    """
    of_example = [_of_input(aval(v).shape) for v in closed.jaxpr.invars[num_leaves:]]
    walk = _Walk({}, {})
    walk.jaxpr(closed.jaxpr, (*[None] * num_leaves, *of_example))
    if walk.found:
        warnings.warn(_message(list(walk.found)), UserWarning, stacklevel=_callers_level())


def _of_input(shape: tuple[int, ...]) -> FromExample:
    return FromExample(frozenset([0] if shape[:1] == (1,) else []))


def _message(found: Sequence[str]) -> str:
    places = [place for place in found if place] or ["a line that JAX does not report"]
    more = f"\n  and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return (
        "the loss of one example takes statistics over a batch axis of size 1, as batch "
        "normalisation in training mode does:\n  "
        + "\n  ".join(places[:_SHOWN])
        + more
        + "\nThe statistics of one sample alone are not those that training with batches computes; "
        "and those of a batch couple its samples, so that per-sample gradients do not exist. Take "
        "group or layer normalisation, or batch normalisation in evaluation mode "
        "(use_running_average=True)"
    )


def _callers_level() -> int:
    """Count the frames up to the caller of this package, maybe through JAX."""
    level, frame = 0, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("psclip_optax", "jax"):
        level, frame = level + 1, frame.f_back
    return level


class _Walk(NamedTuple):
    found: dict[str, None]
    known: dict[tuple[core.Jaxpr, tuple[Origin, ...]], list[Origin]]

    def jaxpr(self, jaxpr: core.Jaxpr, origins: tuple[Origin, ...]) -> list[Origin]:
        # A jaxpr that is called many times is walked only once.
        if (jaxpr, origins) not in self.known:
            self.known[jaxpr, origins] = self.eqns(jaxpr, origins)
        return self.known[jaxpr, origins]

    def eqns(self, jaxpr: core.Jaxpr, origins: tuple[Origin, ...]) -> list[Origin]:
        consts = [None] * len(jaxpr.constvars)
        return walk(jaxpr, consts, origins, lambda _: None, self.any_eqn)

    def any_eqn(
        self, eqn: core.JaxprEqn, origins: Sequence[Origin], path: Path
    ) -> Sequence[Origin]:
        del path
        return self.eqn(eqn, tuple(origins)) if any(origins) else [None] * len(eqn.outvars)

    def eqn(self, eqn: core.JaxprEqn, origins: tuple[Origin, ...]) -> list[Origin]:
        # The derivative of a broadcast is a sum. If the loss calls `grad`, it is not a statistic.
        is_transposed = "transpose(" in str(eqn.source_info.name_stack)
        if eqn.primitive.name in _WITH_BODIES and not is_transposed:
            return self.call(eqn, origins)
        self.meeting(eqn, origins)
        taken = {_place(eqn)} if _is_statistic(eqn, origins) and not is_transposed else set()
        statistics = frozenset(taken).union(*(origin.statistics for origin in origins if origin))
        axes = [origin.batch_axes if origin else frozenset() for origin in origins]
        rule = _RULES.get(eqn.primitive.name, _aligned)
        return [FromExample(rule(eqn, axes, aval(v).shape), statistics) for v in eqn.outvars]

    def meeting(self, eqn: core.JaxprEqn, origins: tuple[Origin, ...]) -> None:
        everything = frozenset().union(*(origin.statistics for origin in origins if origin))
        if not everything:
            return
        shape = aval(eqn.outvars[0]).shape
        for atom, origin in zip(eqn.invars, origins, strict=True):
            if origin and origin.batch_axes and aval(atom).shape == shape and math.prod(shape) > 1:
                self.found.update(dict.fromkeys(sorted(everything - origin.statistics)))

    def call(self, eqn: core.JaxprEqn, origins: tuple[Origin, ...]) -> list[Origin]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, origins)
        if name == "while":
            body, num_conditions = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_nconsts"]
            return self.loop(body, origins[num_conditions:], len(eqn.outvars))
        is_choice = name == "cond"
        bodies = [b.jaxpr for b in eqn.params["branches"]] if is_choice else [inner_jaxpr(eqn)[0]]
        outs = [self.jaxpr(body, _last(origins, body)) for body in bodies]
        return [_placed(_either(*origins), _place(eqn)) for origins in zip(*outs, strict=True)]

    def scan(self, eqn: core.JaxprEqn, origins: tuple[Origin, ...]) -> list[Origin]:
        num_consts, num_carry = scan_counts(eqn)
        start = num_consts + num_carry
        layers = tuple(_moved(origin, -1) for origin in origins[start:])
        outs = self.loop(inner_jaxpr(eqn)[0], origins[:start], num_carry, layers)
        return outs[:num_carry] + [_moved(origin, 1) for origin in outs[num_carry:]]

    def loop(
        self,
        body: core.Jaxpr,
        origins: tuple[Origin, ...],
        num_carry: int,
        layers: tuple[Origin, ...] = (),
    ) -> list[Origin]:
        consts, carry = origins[: len(origins) - num_carry], origins[len(origins) - num_carry :]
        outs = self.jaxpr(body, (*consts, *carry, *layers))
        # The carry from one step is an input of the next.
        carry = tuple(map(_either, carry, outs[:num_carry]))
        return self.jaxpr(body, (*consts, *carry, *layers))


def _last(origins: tuple[Origin, ...], body: core.Jaxpr) -> tuple[Origin, ...]:
    return origins[len(origins) - len(body.invars) :]


def _place(eqn: core.JaxprEqn) -> str:
    scope = str(eqn.source_info.name_stack)
    line = source_info_util.summarize(eqn.source_info)
    return f"{line} in {scope}" if scope else line


def _placed(origin: Origin, place: str) -> Origin:
    """Give statistics without a line, such as those in JAX's functions, the line of the call."""
    if origin is None or "" not in origin.statistics:
        return origin
    return origin._replace(statistics=origin.statistics - {""} | {place})


def _is_statistic(eqn: core.JaxprEqn, origins: tuple[Origin, ...]) -> bool:
    operand = origins[0]
    if eqn.primitive.name not in _REDUCTIONS or operand is None:
        return False
    # The last axis has features or keys, never samples.
    is_over_last = tuple(eqn.params["axes"]) == (len(aval(eqn.invars[0]).shape) - 1,)
    is_over_batch = not operand.batch_axes.isdisjoint(eqn.params["axes"])
    return is_over_batch and not is_over_last and math.prod(aval(eqn.outvars[0]).shape) > 1


def _either(*origins: Origin) -> Origin:
    some = [origin for origin in origins if origin]
    if not some:
        return None
    return FromExample(
        frozenset().union(*(origin.batch_axes for origin in some)),
        frozenset().union(*(origin.statistics for origin in some)),
    )


def _moved(origin: Origin, by: int) -> Origin:
    if origin is None:
        return None
    return origin._replace(batch_axes=frozenset(a + by for a in origin.batch_axes if a + by >= 0))


# Derive the batch axes of outputs from those of the inputs


def _aligned(eqn: core.JaxprEqn, axes: Sequence[frozenset[int]], shape: Any) -> frozenset[int]:
    alike = [
        of_input
        for atom, of_input in zip(eqn.invars, axes, strict=True)
        if len(aval(atom).shape) == len(shape)
    ]
    return frozenset(a for of_input in alike for a in of_input if shape[a] == 1)


def _renumbered(sources: Sequence[int | None], axes: frozenset[int]) -> frozenset[int]:
    """Find the output's axes that come from some of the input's axes, by the source of each."""
    return frozenset(i for i, source in enumerate(sources) if source in axes)


def _without(eqn: core.JaxprEqn, axes: frozenset[int], removed: Sequence[int]) -> frozenset[int]:
    ndim = len(aval(eqn.invars[0]).shape)
    return _renumbered([a for a in range(ndim) if a not in removed], axes)


def _broadcast(eqn: core.JaxprEqn, axes: Sequence[frozenset[int]], shape: Any) -> frozenset[int]:
    targets = eqn.params["broadcast_dimensions"]
    added = {0} if shape[:1] == (1,) and 0 not in targets else set()
    return frozenset(added | {targets[a] for a in axes[0] if shape[targets[a]] == 1})


def _reshaped(eqn: core.JaxprEqn, axes: Sequence[frozenset[int]], shape: Any) -> frozenset[int]:
    old = aval(eqn.invars[0]).shape
    if shape == (1, *old):
        return frozenset([0, *(a + 1 for a in axes[0])])
    for a in sorted(axes[0]):
        if shape == old[:a] + old[a + 1 :]:
            return _without(eqn, axes[0], [a])
    if shape[:1] != (1,):
        return frozenset()
    # Other reshapes change only the axes after the batch axis.
    return frozenset([0]) if 0 in axes[0] or old[:1] != (1,) else frozenset()


def _product(eqn: core.JaxprEqn, axes: Sequence[frozenset[int]], shape: Any) -> frozenset[int]:
    del shape
    contracted, batched = eqn.params["dimension_numbers"]
    free = [
        [a for a in range(len(aval(atom).shape)) if a not in (*contracted[side], *batched[side])]
        for side, atom in enumerate(eqn.invars)
    ]
    if all(of_side.intersection(rest) for of_side, rest in zip(axes, free, strict=True)):
        free = [[None] * len(rest) for rest in free]  # the outputs are pairs, not samples
    left = _renumbered([*batched[0], *free[0], *[None] * len(free[1])], axes[0])
    right = _renumbered([*batched[1], *[None] * len(free[0]), *free[1]], axes[1])
    return left | right


_REDUCTIONS = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("reduce_xor", "argmax", "argmin"),
    *("psum", "pmax", "pmin"),  # over the axis of a `vmap` inside the loss
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCTIONS, lambda eqn, axes, _: _without(eqn, axes[0], eqn.params["axes"])),
    "squeeze": lambda eqn, axes, _: _without(eqn, axes[0], eqn.params["dimensions"]),
    "transpose": lambda eqn, axes, _: _renumbered(eqn.params["permutation"], axes[0]),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "dot_general": _product,
}
