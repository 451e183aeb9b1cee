"""Run a loss with taps at its sites, whose cotangents determine the gradient there.

A *tap* is an array of zeros added to a site's output. Its cotangent is that of the output, and the
site's inputs (and output, if requested) are stored: they are returned with the loss. A *probe* is a
zero whose cotangent is the squared norm of the gradient at its site, so nothing is stored. An
*operation* replaces all equations of a segment. Equations without any of these run unchanged,
including custom derivative rules, rematerialisation and control flow.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax.engine import in_place
from psclip_optax.engine.analysis.equations import (
    CALLS,
    CHECKPOINTS,
    checkpointed,
    inner_jaxpr,
    parted,
    scan_counts,
)
from psclip_optax.engine.analysis.segments import Segment
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import Path, as_function, aval, run_equation

# Maps paths to the zeros of taps and probes, and to the operands of operations.
Taps: TypeAlias = dict[Path, Any]
Axes: TypeAlias = dict[Path, int]
Side: TypeAlias = Literal["entering", "leaving"]
Kept: TypeAlias = dict[tuple[Path, Side], tuple[jax.Array, ...]]
SquaredNorm: TypeAlias = Callable[[Site, tuple[jax.Array, ...], jax.Array], jax.Array]


class Action(NamedTuple):
    """A change to a loss at one site: a tap or a probe.

    Attributes:
      operand: the index of the input of the site's equation that is W.
      zero: the array of zeros whose cotangent is wanted, with an axis for each scan around it.
      num_scans: the number of scans around it.
      is_layered: whether each step of these scans has a different W.
      keeps: which of x ("entering") and y ("leaving") are stored.
      run: a function from the zero, W and x of one step to y.
    """

    operand: int
    zero: jax.Array
    num_scans: int
    is_layered: bool
    keeps: tuple[Side, ...]
    run: Callable[..., Any]


class Operation(NamedTuple):
    """The operation that replaces a segment's equations.

    Attributes:
      segment: the segment that it replaces.
      run: a function from its operands and the segment's inputs to the segment's outputs.
    """

    segment: Segment
    run: Callable[..., list[Any]]


def tap(site: Site, *, keeps_y: bool = False) -> Action:
    """Store a site's inputs, and its output if requested, and expose the output's cotangent."""
    keeps: tuple[Side, ...] = ("entering", "leaving") if keeps_y else ("entering",)
    op, y = site.route.operation(site), aval(site.leaving)
    zero, is_layered = jnp.zeros((*site.scans, *y.shape), y.dtype), all(site.layered)

    def run(zero: jax.Array, *operands: Any) -> jax.Array:
        return op(*operands) + zero

    return Action(site.operand, zero, len(site.scans), is_layered, keeps, run)


def probe(site: Site, squared_norm: SquaredNorm, dtype: Any) -> Action:
    """Store nothing, and expose the squared norm of the gradient at a site.

    Args:
      site: a site with a different W in each step of each scan around it.
      squared_norm: a function from (site, x, dy) of one step, without a sample axis, to a scalar.
      dtype: the dtype of that scalar.
    """
    op, one_step = site.route.operation(site), site._replace(scans=(), layered=())

    @jax.custom_vjp
    def probed(zero: jax.Array, y: jax.Array, x: tuple[Any, ...]) -> jax.Array:
        del zero, x
        return y

    def forward(zero: jax.Array, y: jax.Array, x: tuple[Any, ...]) -> Any:
        del zero
        return y, x

    def backward(x: tuple[Any, ...], dy: jax.Array) -> Any:
        return squared_norm(one_step, x, dy), dy, None

    probed.defvjp(forward, backward)

    def run(zero: jax.Array, w: Any, *x: Any) -> jax.Array:
        return probed(zero, op(w, *x), x)

    return Action(site.operand, jnp.zeros(site.scans, dtype), len(site.scans), True, (), run)


def _as_array(value: Any) -> jax.Array:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def run_with(
    closed: core.ClosedJaxpr,
    inputs: Sequence[Any],
    zeros: Taps,
    actions: Mapping[Path, Action | Operation],
    given: dict[tuple[Path, int], Any],
    layers: Mapping[tuple[Path, int], jax.Array] | None = None,
) -> tuple[list[Any], Kept]:
    """Run a jaxpr, and return its outputs and the arrays stored by the actions at its sites.

    Args:
      closed: the jaxpr.
      inputs: its inputs.
      zeros: each action's array of zeros, and each operation's operands.
      actions: the action at each site, and the operation that replaces each segment.
      given: values to use for outputs of equations, by the equation's path and the output's index.
      layers: weights that scans take layer by layer, not from what is differentiated, by the scan's
        path and the index among its xs. Their cotangents and those of taps are written in place;
        None if none are.
    """
    return _Runner(actions, given, layers).jaxpr(closed.jaxpr, closed.consts, inputs, zeros, ())


class _Stretch:
    """A run of successive equations without taps, as one jaxpr."""

    def __init__(self, eqns: Sequence[core.JaxprEqn], needed_later: set[core.Var]):
        made = {var for eqn in eqns for var in eqn.outvars}
        read = (var for eqn in eqns for var in eqn.invars if not isinstance(var, core.Literal))
        self.inputs = list(dict.fromkeys(var for var in read if var not in made))
        self.outputs = [var for eqn in eqns for var in eqn.outvars if var in needed_later]
        self.run = as_function(eqns, self.inputs, self.outputs)


_Part: TypeAlias = core.JaxprEqn | Segment | _Stretch


def _parts(
    jaxpr: core.Jaxpr, tapped: set[int], segments: dict[int, Segment]
) -> Iterator[tuple[int, _Part]]:
    """Return the equations in order: those with taps, segments, and the stretches between them.

    Args:
      jaxpr: the jaxpr.
      tapped: the indices of equations with taps in them.
      segments: the segments, by the index of their last equation, at which they run.
    """
    needed: set[Any] = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    parts: list[tuple[int, _Part]] = []
    between: list[core.JaxprEqn] = []
    inside = frozenset().union(*(segment.equations for segment in segments.values()))

    def add(i: int, part: _Part, inputs: Sequence[Any]) -> None:
        parts.append((i, part))
        needed.update(var for var in inputs if not isinstance(var, core.Literal))

    def add_between(i: int) -> None:
        if between:
            stretch = _Stretch(between[::-1], set(needed))
            between.clear()
            add(i, stretch, stretch.inputs)

    for i in reversed(range(len(jaxpr.eqns))):
        if i in segments:
            add_between(i)
            add(i, segments[i], segments[i].inputs)
        elif i in tapped and i not in inside:
            add_between(i)
            add(i, jaxpr.eqns[i], jaxpr.eqns[i].invars)
        elif i not in inside:
            between.append(jaxpr.eqns[i])
    add_between(0)
    return reversed(parts)


class _Runner(NamedTuple):
    actions: Mapping[Path, Action | Operation]
    given: dict[tuple[Path, int], Any]
    layers: Mapping[tuple[Path, int], jax.Array] | None

    def jaxpr(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Any],
        taps: Taps,
        path: Path,
    ) -> tuple[list[Any], Kept]:
        values: dict[core.Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        kept: Kept = {}
        others = (p for p, _ in (*self.given, *(self.layers or ())))
        of_interest = [*taps, *(p for p in others if p[: len(path)] == path and p != path)]
        tapped = {p[len(path)] for p in of_interest}
        segments = {i: one for i in tapped if (one := self.segment((*path, i)))}
        for i, part in _parts(jaxpr, tapped, segments):
            here = (*path, i)
            if isinstance(part, _Stretch):
                outs, variables = part.run(*map(read, part.inputs)), part.outputs
            elif isinstance(part, Segment):
                run = self.actions[here].run
                outs, variables = run(taps[here], *map(read, part.inputs)), part.outputs
            else:
                inside = {p: tap for p, tap in taps.items() if p[: len(here)] == here}
                outs, new = self.eqn(part, [*map(read, part.invars)], inside, here)
                variables = part.outvars
                kept |= new
            values.update(zip(variables, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], kept

    def segment(self, path: Path) -> Segment | None:
        action = self.actions.get(path)
        return action.segment if isinstance(action, Operation) else None

    def eqn(
        self, eqn: core.JaxprEqn, inputs: list[Any], taps: Taps, path: Path
    ) -> tuple[list[Any], Kept]:
        given = {output: value for (p, output), value in self.given.items() if p == path}
        if given:
            return self.computed(eqn, inputs, given), {}
        if path not in taps:
            return _NESTED[eqn.primitive.name](self, eqn, inputs, taps, path)
        action = self.actions[path]
        assert isinstance(action, Action)
        w, x = inputs[action.operand], [x for i, x in enumerate(inputs) if i != action.operand]
        y = action.run(taps[path], w, *x)
        sides: dict[Side, Any] = {"entering": tuple(map(_as_array, x)), "leaving": (y,)}
        return [y], {(path, side): sides[side] for side in action.keeps}

    def computed(self, eqn: core.JaxprEqn, inputs: list[Any], given: dict[int, Any]) -> list[Any]:
        if len(given) == len(eqn.outvars):
            return [given[output] for output in range(len(given))]
        return [given.get(output, value) for output, value in enumerate(run_equation(eqn, inputs))]

    def call(
        self, eqn: core.JaxprEqn, inputs: list[Any], taps: Taps, path: Path
    ) -> tuple[list[Any], Kept]:
        jaxpr, consts = inner_jaxpr(eqn)
        return self.jaxpr(jaxpr, consts, inputs, taps, path)

    def checkpoint(
        self, eqn: core.JaxprEqn, inputs: list[Any], taps: Taps, path: Path
    ) -> tuple[list[Any], Kept]:
        shared = _Shared()

        def call(inputs: list[Any], taps: Taps) -> tuple[list[Any], list[jax.Array]]:
            outs, kept = self.call(eqn, inputs, taps, path)
            return outs, shared.once(kept)

        outs, once = checkpointed(eqn, call)(inputs, taps)
        return outs, shared.of_all(once)

    def copy_of_tap(self, path: Path, zero: jax.Array) -> jax.Array | None:
        """Return the zeros of a tap whose cotangent a scan writes in place, else None."""
        action = self.actions[path]
        # A scan over time, whose steps share W, would write its steps apart from each other.
        is_layered = isinstance(action, Action) and action.is_layered
        is_in_place = self.layers is not None and is_layered and in_place.is_possible(zero)
        return jnp.zeros_like(zero) if is_in_place else None

    def scan(
        self, eqn: core.JaxprEqn, inputs: list[Any], taps: Taps, path: Path
    ) -> tuple[list[Any], Kept]:
        params, (body, body_consts) = eqn.params, inner_jaxpr(eqn)
        num_consts, num_carry = scan_counts(eqn)
        consts, init, xs = parted(inputs, num_consts, num_carry)
        weights = [(self.layers or {}).get((path, place)) for place in range(len(xs))]
        zeros, tree = jax.tree.flatten(taps)
        of_leaves = [p for p in sorted(taps) for _ in jax.tree.leaves(taps[p])]
        copies = [self.copy_of_tap(p, zero) for p, zero in zip(of_leaves, zeros, strict=True)]
        axes = [() if one is not None else (0, 1) for one in copies]
        shared = _Shared()
        units: list[int] = []

        def step(carry: list[Any], xs_and_zeros: tuple[list[Any], list[Any]]) -> Any:
            xs, zeros = xs_and_zeros
            operands = [*consts, *carry, *xs]
            taps = jax.tree.unflatten(tree, map(lax.squeeze, zeros, axes))
            outs, kept = self.jaxpr(body, body_consts, operands, taps, path)
            once = shared.once(kept)
            units[:] = _units_that_tell_apart(once)
            apart = [lax.expand_dims(x, range(n)) for x, n in zip(once, units, strict=True)]
            return outs[:num_carry], (outs[num_carry:], apart)

        padded = [[1 + axis for axis in of] for of in axes]
        carry, (ys, apart) = in_place.scan(
            step,
            list(init),
            (list(xs), list(map(lax.expand_dims, zeros, padded))),
            [*weights, *copies],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        once = [lax.squeeze(x, range(1, 1 + n)) for x, n in zip(apart, units, strict=True)]
        return [*carry, *ys], shared.of_all(once)


def _units_that_tell_apart(arrays: Sequence[jax.Array]) -> list[int]:
    """Number the arrays of each shape; each gets as many axes of size 1, to make shapes differ.

    A scan writes the results of its steps into a buffer of zeros. XLA merges buffers of the same
    shape, and then has to copy the merged buffer for each, which takes a TPU as long as a product.
    """
    seen: collections.Counter[Any] = collections.Counter()
    numbers: list[int] = []
    for array in arrays:
        seen[array.shape, array.dtype] += 1
        number = seen[array.shape, array.dtype]
        numbers.append(number if number < 2 else 1 + number)  # the cotangents have two
    return numbers


class _Shared:
    """The arrays that sites store, without copies of an input that sites share (attention)."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, Side], list[int]] = {}

    def once(self, kept: Kept) -> list[jax.Array]:
        once = {id(array): array for arrays in kept.values() for array in arrays}
        order = {identity: i for i, identity in enumerate(once)}
        for place, arrays in kept.items():
            self._places[place] = [order[id(array)] for array in arrays]
        return list(once.values())

    def of_all(self, once: list[jax.Array]) -> Kept:
        return {place: tuple(once[i] for i in places) for place, places in self._places.items()}


_Nested = Callable[[_Runner, core.JaxprEqn, list[Any], Taps, Path], tuple[list[Any], Kept]]
_NESTED: dict[str, _Nested] = {
    **dict.fromkeys(CALLS, _Runner.call),
    **dict.fromkeys(CHECKPOINTS, _Runner.checkpoint),
    "scan": _Runner.scan,
}
