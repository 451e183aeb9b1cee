"""Draw wrappers around a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.random_programs.derivatives import with_other_jvp, with_other_vjp
from tests.random_programs.draft import Draft
from tests.random_programs.program import FREE, Step, fitted, mixed


def _is_layered(d: Draft, name: str) -> bool:
    return d.values[name].kind == "weight" and len(d.shape_of(name)) < 4 and d.chance(0.6)


def _layers(d: Draft, step: Step, length: int) -> tuple[Step, tuple[bool, ...]]:
    """Replace some of a step's weights by stacks of `length` layers, and tell which."""
    layered = tuple(_is_layered(d, name) for name in step.inputs)
    names = [
        _stack_of(d, name, length) if is_layered else name
        for name, is_layered in zip(step.inputs, layered, strict=True)
    ]
    return step._replace(inputs=tuple(names)), layered


def _stack_of(d: Draft, name: str, length: int) -> str:
    shape = d.shape_of(name)
    if d.chance(0.4):
        parts = (name, *(d.weight(shape) for _ in range(length - 1)))
        stacked = d.add(Step("stacked", parts, lambda *w: jnp.stack(w)), "weight")
        if stacked is not None:
            return stacked
    return d.weight((length, *shape))


def _first_data(d: Draft, step: Step) -> int | None:
    kinds = [d.values[name].kind for name in step.inputs]
    return kinds.index("data") if "data" in kinds else None


def _chosen(flags: Sequence[bool], inputs: Sequence[Any]) -> list[Any]:
    return [x for x, flag in zip(inputs, flags, strict=True) if flag]


def _merged(flags: Sequence[bool], chosen: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    own = iter(chosen)
    return [next(own) if flag else x for x, flag in zip(inputs, flags, strict=True)]


def looped(d: Draft, step: Step) -> Step:
    """Draw a scan with weights as constants and as layers; its carry is the step's data, if any."""
    length, reverse, unroll = d.integer(1, 3), d.chance(0.3), d.choose([1, 1, 2])
    step, layered = _layers(d, step, length)
    at, returns_all = _first_data(d, step), d.chance(0.4)

    def run(*inputs: Any) -> Any:
        first = jnp.zeros(()) if at is None else inputs[at]

        def body(state: Any, layers: Any) -> Any:
            own = _merged(layered, layers, inputs)
            if at is not None:
                own[at] = state
            y = step.run(*own)
            return mixed(state, y), y

        state, ys = lax.scan(
            body, first, _chosen(layered, inputs), length, reverse=reverse, unroll=unroll
        )
        return ys if returns_all or at is None else state

    return Step(
        f"scan({step.name})",
        step.inputs,
        run,
        f"{step.details} {length=} {layered=} {reverse=} {unroll=} {returns_all=}",
    )


def carried(d: Draft, step: Step) -> Step:
    """Draw a loop with weights in its initial carry, which are unchanged or decay."""
    at, length, changes = _first_data(d, step), d.integer(1, 3), d.chance(0.5)
    if at is None:
        return step
    is_carried = tuple(
        value.kind == "weight" and value.level >= FREE
        for value in (d.values[name] for name in step.inputs)
    )

    def run(*inputs: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            x, carried = state
            own = _merged(is_carried, carried, inputs)
            own[at] = x
            return mixed(x, step.run(*own)), [w - w / 4 for w in carried] if changes else carried

        return lax.fori_loop(0, length, body, (inputs[at], _chosen(is_carried, inputs)))[0]

    return Step(f"carry({step.name})", step.inputs, run, f"{step.details} {length=} {changes=}")


def mapped(d: Draft, step: Step) -> Step:
    """Draw vmap or lax.map, over copies of the data and over stacks of the weights."""
    length, by_loop = d.integer(1, 3), d.chance(0.3)
    step, layered = _layers(d, step, length)
    at = _first_data(d, step)
    axes = [0 if flag or i == at else None for i, flag in enumerate(layered)]
    if not any(axis == 0 for axis in axes):
        return step

    def run(*inputs: Any) -> Any:
        all_inputs = list(inputs)
        if at is not None:
            copies = [lax.cos(k + inputs[at]) for k in range(length)]
            all_inputs[at] = jnp.stack(copies).astype(inputs[at].dtype)
        if not by_loop:
            return jax.vmap(step.run, in_axes=axes)(*all_inputs)
        flags = [axis == 0 for axis in axes]
        one = lambda own: step.run(*_merged(flags, own, inputs))
        return lax.map(one, _chosen(flags, all_inputs))

    name = f"{'map' if by_loop else 'vmap'}({step.name})"
    return Step(name, step.inputs, run, f"{step.details} {length=} {layered=}")


def branched(d: Draft, step: Step) -> Step:
    """Draw a branch by data, with other uses of the same weights in the other branches."""
    num_branches, run = d.integer(2, 3), step.run
    others = [lambda *inputs: 0.5 * run(*inputs), lambda *inputs: jnp.zeros_like(run(*inputs))]

    def whole(index: Any, *inputs: Any) -> Any:
        branches = [run, *others[: num_branches - 1]]
        same = [lambda *a, f=f: f(*a).astype(jax.eval_shape(run, *a).dtype) for f in branches]
        if num_branches == 2:
            return lax.cond(index > 2, *same, *inputs)
        return lax.switch(index, same, *inputs)

    inputs = (d.scalar_index(), *step.inputs)
    return Step(f"cond({step.name})", inputs, whole, f"{step.details} {num_branches=}")


def inner_gradient(d: Draft, step: Step) -> Step:
    at = _first_data(d, step)
    if at is None:
        return step
    total = lambda *inputs: jnp.sum(lax.sin(step.run(*inputs)).astype(inputs[at].dtype))
    return Step(f"grad({step.name})", step.inputs, jax.grad(total, argnums=at), step.details)


def twice(d: Draft, step: Step) -> Step:
    """Apply the step to its own result, with the same weights."""
    at = _first_data(d, step)
    if at is None:
        return step

    def run(*inputs: Any) -> Any:
        x = inputs[at]
        again = lax.tanh(fitted(step.run(*inputs), x))
        return step.run(*inputs[:at], again, *inputs[at + 1 :])

    return Step(f"twice({step.name})", step.inputs, run, step.details)


def half_stopped(d: Draft, step: Step) -> Step:
    at = d.integer(0, len(step.inputs) - 1)
    run = lambda *inputs: step.run(*inputs[:at], lax.stop_gradient(inputs[at]), *inputs[at + 1 :])
    return Step(f"stop({step.name})", step.inputs, run, f"{step.details} stopped={at}")


def remembered(d: Draft, step: Step) -> Step:
    policies = jax.checkpoint_policies
    policy = d.choose([None, policies.dots_saveable, policies.everything_saveable])
    run = jax.checkpoint(step.run, policy=policy, prevent_cse=d.chance(0.5))
    return step._replace(name=f"checkpoint({step.name})", run=run)


def jitted(d: Draft, step: Step) -> Step:
    inner = jax.jit(step.run)
    run = jax.jit(lambda *inputs: inner(*inputs)) if d.chance(0.5) else inner
    return step._replace(name=f"jit({step.name})", run=run)


def with_other_rule(d: Draft, step: Step) -> Step:
    # JAX cannot transpose the rule of a branch that is chosen for each sample.
    ways = [with_other_vjp] if "cond" in step.name else [with_other_vjp, with_other_jvp]
    way = d.choose(ways)
    return step._replace(name=f"{way.__name__}({step.name})", run=way(step.run))


WRAPPERS: dict[Callable[[Draft, Step], Step], float] = {
    looped: 3,
    carried: 0.7,
    mapped: 1.5,
    branched: 0.7,
    inner_gradient: 0.5,
    twice: 1,
    half_stopped: 0.4,
    remembered: 1.2,
    jitted: 1.2,
    with_other_rule: 0.7,
}
