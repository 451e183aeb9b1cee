"""Find statistics over a batch axis of size 1: batch normalisation in training mode, mostly.

A *batch axis* is one of size 1 in front of an example: its own first axis, or one that the loss
puts there. A *statistic* is a reduction over it that leaves more than one number. It is warned of
where it meets, entry by entry, data that still has the batch axis, as to normalise a batch: a
reduction that is not spread over the batch again (the mean of the losses, the pooling of an image)
is no sign that samples are coupled. Nor is attention to a single token, whose softmax is over an
axis of size 1: its scores are of pairs of tokens, or have the tokens last.
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
    """What is known of a variable that depends on the example.

    Attributes:
      batch_axes: its batch axes.
      statistics: where the statistics were taken that it depends on.
    """

    batch_axes: frozenset[int] = frozenset()
    statistics: frozenset[str] = frozenset()


Kind: TypeAlias = FromExample | None  # None: does not depend on the example
Rule: TypeAlias = Callable[[core.JaxprEqn, Sequence[frozenset[int]], Any], frozenset[int]]

_WITH_BODIES = (*CALLS, "custom_jvp_call", "custom_vjp_call", "scan", "while", "cond")
_SHOWN = 3


def warn_of_batch_statistics(closed: core.ClosedJaxpr, num_leaves: int) -> None:
    """Warns of statistics over a batch axis of size 1 in the loss of one example.

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
    places = [place for place in found if place] or ["a line that JAX does not tell"]
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
    """The stack level of whoever called this package, maybe through JAX, for the caller."""
    level, frame = 0, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("psclip_optax", "jax"):
        level, frame = level + 1, frame.f_back
    return level


class _Walk(NamedTuple):
    found: dict[str, None]
    known: dict[tuple[core.Jaxpr, tuple[Kind, ...]], list[Kind]]

    def jaxpr(self, jaxpr: core.Jaxpr, kinds: tuple[Kind, ...]) -> list[Kind]:
        # A jaxpr that is called many times is walked once.
        if (jaxpr, kinds) not in self.known:
            self.known[jaxpr, kinds] = self.eqns(jaxpr, kinds)
        return self.known[jaxpr, kinds]

    def eqns(self, jaxpr: core.Jaxpr, kinds: tuple[Kind, ...]) -> list[Kind]:
        consts = [None] * len(jaxpr.constvars)
        return walk(jaxpr, consts, kinds, lambda _: None, self.any_eqn)

    def any_eqn(self, eqn: core.JaxprEqn, kinds: Sequence[Kind], path: Path) -> Sequence[Kind]:
        del path
        return self.eqn(eqn, tuple(kinds)) if any(kinds) else [None] * len(eqn.outvars)

    def eqn(self, eqn: core.JaxprEqn, kinds: tuple[Kind, ...]) -> list[Kind]:
        # The derivative of a broadcast is a sum: that of a user's own `grad` is no statistic.
        is_transposed = "transpose(" in str(eqn.source_info.name_stack)
        if eqn.primitive.name in _WITH_BODIES and not is_transposed:
            return self.call(eqn, kinds)
        self.meeting(eqn, kinds)
        taken = {_place(eqn)} if _is_statistic(eqn, kinds) and not is_transposed else set()
        statistics = frozenset(taken).union(*(kind.statistics for kind in kinds if kind))
        axes = [kind.batch_axes if kind else frozenset() for kind in kinds]
        rule = _RULES.get(eqn.primitive.name, _kept)
        return [FromExample(rule(eqn, axes, aval(v).shape), statistics) for v in eqn.outvars]

    def meeting(self, eqn: core.JaxprEqn, kinds: tuple[Kind, ...]) -> None:
        everything = frozenset().union(*(kind.statistics for kind in kinds if kind))
        if not everything:
            return
        shape = aval(eqn.outvars[0]).shape
        for atom, kind in zip(eqn.invars, kinds, strict=True):
            if kind and kind.batch_axes and aval(atom).shape == shape and math.prod(shape) > 1:
                self.found.update(dict.fromkeys(sorted(everything - kind.statistics)))

    def call(self, eqn: core.JaxprEqn, kinds: tuple[Kind, ...]) -> list[Kind]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, kinds)
        if name == "while":
            body, num_conditions = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_nconsts"]
            return self.loop(body, kinds[num_conditions:], len(eqn.outvars))
        is_choice = name == "cond"
        bodies = [b.jaxpr for b in eqn.params["branches"]] if is_choice else [inner_jaxpr(eqn)[0]]
        outs = [self.jaxpr(body, _last(kinds, body)) for body in bodies]
        return [_placed(_either(*kinds), _place(eqn)) for kinds in zip(*outs, strict=True)]

    def scan(self, eqn: core.JaxprEqn, kinds: tuple[Kind, ...]) -> list[Kind]:
        num_consts, num_carry = scan_counts(eqn)
        start = num_consts + num_carry
        layers = tuple(_moved(kind, -1) for kind in kinds[start:])
        outs = self.loop(inner_jaxpr(eqn)[0], kinds[:start], num_carry, layers)
        return outs[:num_carry] + [_moved(kind, 1) for kind in outs[num_carry:]]

    def loop(
        self,
        body: core.Jaxpr,
        kinds: tuple[Kind, ...],
        num_carry: int,
        layers: tuple[Kind, ...] = (),
    ) -> list[Kind]:
        consts, carry = kinds[: len(kinds) - num_carry], kinds[len(kinds) - num_carry :]
        outs = self.jaxpr(body, (*consts, *carry, *layers))
        # What a step leaves enters the next one.
        carry = tuple(map(_either, carry, outs[:num_carry]))
        return self.jaxpr(body, (*consts, *carry, *layers))


def _last(kinds: tuple[Kind, ...], body: core.Jaxpr) -> tuple[Kind, ...]:
    return kinds[len(kinds) - len(body.invars) :]


def _place(eqn: core.JaxprEqn) -> str:
    scope = str(eqn.source_info.name_stack)
    line = source_info_util.summarize(eqn.source_info)
    return f"{line} in {scope}" if scope else line


def _placed(kind: Kind, place: str) -> Kind:
    """With the line of a call for what JAX tells no line of, as inside its own functions."""
    if kind is None or "" not in kind.statistics:
        return kind
    return kind._replace(statistics=kind.statistics - {""} | {place})


def _is_statistic(eqn: core.JaxprEqn, kinds: tuple[Kind, ...]) -> bool:
    operand = kinds[0]
    if eqn.primitive.name not in _REDUCTIONS or operand is None:
        return False
    # Features or keys come last, samples never do.
    is_over_last = tuple(eqn.params["axes"]) == (len(aval(eqn.invars[0]).shape) - 1,)
    is_over_batch = not operand.batch_axes.isdisjoint(eqn.params["axes"])
    return is_over_batch and not is_over_last and math.prod(aval(eqn.outvars[0]).shape) > 1


def _either(*kinds: Kind) -> Kind:
    some = [kind for kind in kinds if kind]
    if not some:
        return None
    return FromExample(
        frozenset().union(*(kind.batch_axes for kind in some)),
        frozenset().union(*(kind.statistics for kind in some)),
    )


def _moved(kind: Kind, by: int) -> Kind:
    if kind is None:
        return None
    return kind._replace(batch_axes=frozenset(a + by for a in kind.batch_axes if a + by >= 0))


# Where an operation leaves the batch axes of its inputs


def _kept(eqn: core.JaxprEqn, axes: Sequence[frozenset[int]], shape: Any) -> frozenset[int]:
    alike = [
        own
        for atom, own in zip(eqn.invars, axes, strict=True)
        if len(aval(atom).shape) == len(shape)
    ]
    return frozenset(a for own in alike for a in own if shape[a] == 1)


def _renumbered(sources: Sequence[int | None], axes: frozenset[int]) -> frozenset[int]:
    """From the input's axis behind each of the output's axes."""
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
    # Of other reshapes those of what comes behind the batch axis.
    return frozenset([0]) if 0 in axes[0] or old[:1] != (1,) else frozenset()


def _product(eqn: core.JaxprEqn, axes: Sequence[frozenset[int]], shape: Any) -> frozenset[int]:
    del shape
    contracted, batched = eqn.params["dimension_numbers"]
    free = [
        [a for a in range(len(aval(atom).shape)) if a not in (*contracted[side], *batched[side])]
        for side, atom in enumerate(eqn.invars)
    ]
    if all(own.intersection(rest) for own, rest in zip(axes, free, strict=True)):
        free = [[None] * len(rest) for rest in free]  # of pairs, not of samples
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
