"""Draw operands for the entries of the tables, and describe operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.fuzz import computed_tables, lax_tables, library_tables
from tests.fuzz.lax_tables import Run, positive, real_parts
from tests.random_programs import drawing, products, program, wrappers
from tests.random_programs.program import Step

if TYPE_CHECKING:
    from tests.fuzz.programs import Draft

Rule: TypeAlias = "Callable[[Draft], Step]"

FLOATING = ("data", "weight")
COMPUTED = computed_tables.COMPUTED
ELEMENTWISE = {**lax_tables.ELEMENTWISE, **library_tables.ELEMENTWISE}
PAIRS = {**lax_tables.PAIRS, **library_tables.PAIRS}
ALONG = {**lax_tables.ALONG, **library_tables.ALONG}


def _finished(d: Draft, run: Run) -> Run:
    """Return the function, half of the time with bounded results."""
    finish: Run = d.choose([lax.sin, lambda y: 0.7 * y, lambda y: y, lambda y: y])
    return lambda *inputs: finish(run(*inputs))


def elementwise(d: Draft) -> Step:
    x, (name, run) = d.any(), d.pick(ELEMENTWISE)
    return Step(name, (x,), _finished(d, run))


def pair(d: Draft) -> Step:
    x, (name, run) = d.any(), d.pick(PAIRS)
    return Step(name, (x, d.like(x)), _finished(d, run))


def along(d: Draft) -> Step:
    x, (name, run) = d.any(1), d.pick(ALONG)
    axis = d.integer(0, len(d.shape_of(x)) - 1)
    return Step(name, (x,), _finished(d, lambda x: run(x, axis)), f"{axis=}")


def indexed(d: Draft) -> Step:
    x, (name, run) = d.any(1), d.pick(lax_tables.INDEXED)
    return Step(name, (x, d.like(x), d.indices()), _finished(d, run))


def matrices(d: Draft) -> Step:
    x, (name, run) = d.square(), d.pick(library_tables.MATRICES)
    return Step(name, (x, d.like(x)), _finished(d, run))


def regulariser(d: Draft) -> Step:
    w, (name, run) = d.any_weight(1), d.pick(computed_tables.REGULARISERS)
    return Step(name, (w,), run)


def computed(d: Draft) -> Step:
    w, (name, run) = d.some_weight(program.COMPUTED), d.pick(COMPUTED)
    return Step(name, (w,), run)


def difference(d: Draft) -> Step:
    v, (name, run) = (
        d.some_weight(program.COMPUTED),
        d.pick(computed_tables.DIFFERENCES),
    )
    return Step(name, (v, d.weight(d.shape_of(v), program.COMPUTED)), run)


def ruled(d: Draft) -> Step:
    x, (name, run) = d.any(), d.pick(computed_tables.RULES)
    return Step(f"rule: {name}", (x,), run)


def cast(d: Draft) -> Step:
    x, (name, run) = d.any(), d.pick(computed_tables.CASTS)
    return Step(f"cast: {name}", (x,), run)


def selected(d: Draft) -> Step:
    x = d.any()
    run = lambda mask, x, y: jnp.where(jnp.all(mask), x, y) * (1 + jnp.sum(mask))
    return Step("selected by data", (d.mask(), x, d.like(x)), run)


def _looked_up(d: Draft, w: str, length: int) -> tuple[str, Run]:
    ways: dict[str, Run] = {
        "w[i]": lambda w, i: w[i],
        "dynamic_index_in_dim": lambda w, i: lax.dynamic_index_in_dim(w, i, 0, False),
        "take": lambda w, i: jnp.take(w, i, 0),
        "one_hot": lambda w, i: jnp.tensordot(jax.nn.one_hot(i, length, dtype=w.dtype), w, 1),
    }
    return d.choose([*ways.items()])


def scan_over_indices(d: Draft) -> Step:
    """Draw a scan that takes layers from stacked weights by the step's index."""
    x, length = d.data(1, 2), d.integer(1, 3)
    size = d.shape_of(x)[-1]
    w, b = d.weight((length, size, size)), d.weight((length, size))
    (name, take), by_fori = _looked_up(d, w, length), d.chance(0.4)

    def run(x, w, b):
        layer = lambda i, x: lax.tanh(x @ take(w, i) / 2 + take(b, i))
        if by_fori:
            return lax.fori_loop(0, length, layer, x)
        return lax.scan(lambda x, i: (layer(i, x), jnp.sum(x)), x, jnp.arange(length))[0]

    return Step("scan over indices", (x, w, b), run, f"{name} {length=} {by_fori=}")


def mixture_of_experts(d: Draft) -> Step:
    x, i = d.data(1, 2), d.scalar_index()
    size = d.shape_of(x)[-1]
    w = d.weight((3, size, d.size()))
    ways: dict[str, Run] = {
        "switch": lambda x, i, w: lax.switch(i, [lambda x, k=k: x @ w[k] for k in range(3)], x),
        "w[i]": lambda x, i, w: x @ w[jnp.clip(i, 0, 2)],
        "gated": lambda x, i, w: jnp.einsum(
            "k,...d,kdq->...q", jax.nn.softmax(jnp.arange(3.0) * i / 4), x, w
        ),
        "cond": lambda x, i, w: lax.cond(i > 2, lambda x: x @ w[0], lambda x: 2 * (x @ w[1]), x),
    }
    name, run = d.choose([*ways.items()])
    return Step("experts", (x, i, w), _finished(d, run), name)


def product(d: Draft) -> Step:
    """Draw a product of data and parameters, like `random_programs`."""
    return drawing.drawn(d, products.PRODUCTS)(d)


def in_complex_numbers(d: Draft) -> Step:
    x = d.data(1)
    size = d.shape_of(x)[-1]
    w, v = d.weight((size, 3)), d.weight((size, 3))
    ways: dict[str, Run] = {
        "complex weight": lambda x, w, v: jnp.abs((x + 1j * lax.cos(x)) @ lax.complex(w, v) + 2),
        "cast weight": lambda x, w, v: jnp.abs(x.astype(complex) @ w.astype(complex) + 1j * v[0]),
        "spectrum": lambda x, w, v: jnp.fft.irfft(
            jnp.fft.rfft(x) @ lax.complex(w, v)[: size // 2 + 1], 4
        ),
        "weight's spectrum": lambda x, w, v: jnp.abs(x @ jnp.fft.fft(w, axis=0)) + x @ v,
        "conjugate": lambda x, w, v: real_parts(x @ jnp.conj(lax.complex(w, v))),
    }
    name, run = d.choose([*ways.items()])
    return Step("complex", (x, w, v), _finished(d, lambda *a: run(*a) / (1 + size)), name)


def random_by_sample(d: Draft) -> Step:
    """Draw random numbers from a key in the example."""
    x = d.any()
    ways: dict[str, Run] = {
        "dropout": lambda k, x: x * jax.random.bernoulli(k, 0.7, x.shape),
        "noise": lambda k, x: x + 0.1 * jax.random.normal(k, x.shape, x.dtype),
        "two keys": lambda k, x: x * jax.random.uniform(jax.random.split(k)[1], x.shape),
        "permuted": lambda k, x: jax.random.permutation(k, x.ravel()),
    }
    name, run = d.choose([*ways.items()])
    key = lambda i: jax.random.key(jnp.abs(i.astype(jnp.int32)))
    return Step("random", (d.scalar_index(), x), lambda i, x: run(key(i), x), name)


def scaled_weight(d: Draft) -> Step:
    """Draw a weight and a scale along one of its axes, from itself or another weight."""
    w = d.some_weight(program.COMPUTED)
    shape = d.shape_of(w)
    axis = d.integer(0, len(shape) - 1)
    others = tuple(a for a in range(len(shape)) if a != axis)
    v = d.weight((shape[axis],), program.COMPUTED)
    sizes: dict[str, Run] = {
        "sum of squares": lambda w: 0.3 + jnp.sum(w * w, others),
        "sum of squares of a difference": lambda w: 0.3 + jnp.sum(jnp.square(w - 0.5), others),
        "norm": lambda w: jnp.sqrt(0.2 + jnp.sum(w * w, others)),
        "largest": lambda w: 0.3 + jnp.max(jnp.abs(w), others, initial=0),
        "first": lambda w: positive(jnp.sum(w, others)),
        "rounded": lambda w: lax.reduce_precision(0.3 + jnp.sum(w * w, others), 8, 7),
        "stopped": lambda w: 0.3 + jnp.sum(w * lax.stop_gradient(w), others),
        "one": lambda w: jnp.ones(shape[axis]),
    }
    size_name, size = d.choose([*sizes.items()])
    ways: dict[str, Run] = {
        "w v": lambda w, v: w * v,
        "w + v": lambda w, v: w + v,
        "w / |w|": lambda w, v: w / v,
        "w - v": lambda w, v: w - v,
    }
    name, run = d.choose([*ways.items()])
    lay = lambda v: jnp.expand_dims(v, others)
    whole = lambda w, v: run(run(w, lay(size(w))), lay(0.5 + v * v))
    return Step("scaled weight", (w, v), whole, f"{name} {size_name} {axis=}")


def unusual_call(d: Draft) -> Step:
    x = d.any()
    ways: dict[str, Run] = {
        "sequential_vmap": lambda x: x * _one_by_one(lax.stop_gradient(x)),
        "platform_dependent": lambda x: lax.platform_dependent(x, cpu=lax.sin, default=lax.cos),
        "custom_gradient": jax.custom_gradient(lambda x: (lax.sin(x), lambda dy: 0.5 * dy)),
        "closure_convert": lambda x: jax.closure_convert(lambda y: lax.sin(x * y), x)[0](
            x, *jax.closure_convert(lambda y: lax.sin(x * y), x)[1]
        ),
        "named_call": jax.named_call(lambda x: x * lax.sin(x), name="named"),
        "linearize": lambda x: jax.linearize(lax.sin, x)[1](x),
        "vjp": lambda x: jax.vjp(lambda x: x * lax.sin(x), x)[1](x)[0],
        "while_loop of what is stopped": lambda x: x * lax.while_loop(
            lambda y: jnp.sum(y * y) > 1, lambda y: y / 2, lax.stop_gradient(x)
        ),
        "saved by name": jax.checkpoint(
            lambda x: lax.sin(checkpoint_name(lax.sin(x), "kept")),
            policy=jax.checkpoint_policies.save_only_these_names("kept"),
        ),
    }  # fmt: skip
    name, run = d.choose([*ways.items()])
    return Step("unusual", (x,), run, name)


_one_by_one = jax.custom_batching.sequential_vmap(lambda x: lax.sin(x) + 1)


def _nested_remat(d: Draft, step: Step) -> Step:
    inner = jax.checkpoint(step.run)
    run = jax.checkpoint(lambda *inputs: lax.sin(inner(*inputs)))
    return step._replace(name=f"remat(remat({step.name}))", run=run)


def _ruled_within(d: Draft, step: Step) -> Step:
    name, rule = d.pick(computed_tables.RULES)
    return step._replace(name=f"{name}({step.name})", run=lambda *inputs: rule(step.run(*inputs)))


def _cast_within(d: Draft, step: Step) -> Step:
    name, cast = d.pick(computed_tables.CASTS)
    return step._replace(name=f"{name}({step.name})", run=lambda *inputs: cast(step.run(*inputs)))


def _led(d: Draft, step: Step) -> Step:
    """Apply another operation to one of the step's operands first."""
    at = d.choose([i for i, name in enumerate(step.inputs) if d.values[name].kind in FLOATING])
    tables = d.choose([COMPUTED, computed_tables.RULES, computed_tables.CASTS, ELEMENTWISE])
    name, lead = d.choose([*tables.items()])
    operand = d.values[step.inputs[at]]
    led = jax.eval_shape(lead, jax.ShapeDtypeStruct(operand.shape, operand.dtype))
    if led.shape != operand.shape:
        raise ValueError("of another shape")
    run = lambda *inputs: step.run(*inputs[:at], lead(inputs[at]), *inputs[at + 1 :])
    return step._replace(name=f"{step.name} of {name} {at}", run=run)


WRAPPERS = {
    **wrappers.WRAPPERS,
    _led: 6,
    _nested_remat: 1,
    _ruled_within: 1,
    _cast_within: 0.5,
}


def wrapped(d: Draft) -> Step:
    step = any_rule(d)
    for probability in (1.0, 0.3):
        if d.chance(probability):
            step = drawing.drawn(d, WRAPPERS)(d, step)
    return step


def any_rule(d: Draft) -> Step:
    return drawing.drawn(d, RULES)(d)


RULES: dict[Rule, float] = {
    elementwise: 2.5,
    pair: 2,
    along: 2.5,
    indexed: 1.5,
    matrices: 2,
    regulariser: 0.7,
    computed: 1.5,
    difference: 1.2,
    ruled: 1,
    cast: 0.7,
    selected: 0.3,
    scan_over_indices: 0.5,
    mixture_of_experts: 0.5,
    in_complex_numbers: 0.5,
    random_by_sample: 0.4,
    scaled_weight: 1.2,
    unusual_call: 0.7,
    product: 7,
}

# Each entry of a table in turn is the first operation of a program.
_TABLES: tuple[tuple[Rule, dict[str, Run]], ...] = (
    (elementwise, ELEMENTWISE),
    (pair, PAIRS),
    (along, ALONG),
    (indexed, lax_tables.INDEXED),
    (matrices, library_tables.MATRICES),
    (regulariser, computed_tables.REGULARISERS),
    (computed, COMPUTED),
    (difference, computed_tables.DIFFERENCES),
    (ruled, computed_tables.RULES),
    (cast, computed_tables.CASTS),
)
ENTRIES = [(rule, name) for rule, table in _TABLES for name in table]


def in_turn(d: Draft) -> Step:
    rule, d.wanted = ENTRIES[d.seed % len(ENTRIES)]
    return rule(d)
