"""Random per-sample losses, and a check of the clipped gradient of each against `vmap(grad)`.

    python -m tests.random_programs --count 5000 --start 0 --out programs.jsonl

A program is a list of operations over a pool of named values, drawn from one integer seed: data
(`x0`), indices (`i0`), parameters (`w0`), and what is computed from them (`v0`). Its loss reads
what no later operation takes. `--show SEED` prints a program and, if it fails, a smaller one.
"""

from __future__ import annotations

import collections
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import psclip_optax as psc
from psclip_optax.engine.modes import two_pass
from tests.fuzz.command import NO_REFERENCE, Outcome, Source, main_of, shower
from tests.numerics import clipped_mean, enable_x64, growing

Kind: TypeAlias = Literal["data", "index", "weight"]
Mode: TypeAlias = Literal["one_pass", "two_pass"]
Shape: TypeAlias = tuple[int, ...]
Run: TypeAlias = Callable[..., Any]

NUM_SAMPLES = 4
BETA = 3.0
LEAST_OPERATIONS, MOST_OPERATIONS = 30, 33
MOST_PARAMETERS = 10
MOST_ENTRIES = 100
NUM_UNJITTED = 4
# Compiled programs are kept until then.
CLEAR_EVERY = 25
MODES: tuple[Mode, ...] = ("one_pass", "two_pass")
# How freely a parameter may be used. A use that the engine has no route for makes the whole
# parameter take the fallback, so that with one level for all nothing else would be tested.
MOVED, COMPUTED, FREE = 0, 1, 2


class Mixture(NamedTuple):
    """The dtypes of a program: of parameters, of data, and of what it computes in."""

    params: tuple[str, ...]
    data: tuple[str, ...]
    tolerance: float
    floor: float

    @property
    def has_float64(self) -> bool:
        return "float64" in self.params


# A leaf whose gradient vanishes is held against this share of the largest entry of all leaves.
FLOOR = 1e-2
# An entry of bfloat16 has a relative error of 2⁻⁹ = 0.002. The reference rounds to it wherever the
# program does, but sums in other orders and rounds each sample's gradient, so that both differ
# from the exact gradient, and from each other, by several such errors. Where large cotangents meet
# and cancel, small gradients have the errors of large ones.
IN_BFLOAT16 = (5e-2, 1e-1)
MIXTURES = {
    "float64": Mixture(("float64",), ("float64",), 1e-10, FLOOR),
    "float32": Mixture(("float32",), ("float32",), 1e-5, FLOOR),
    "float64, float32": Mixture(("float64", "float32"), ("float64", "float32"), 1e-5, FLOOR),
    "bfloat16": Mixture(("bfloat16",), ("bfloat16", "float32"), *IN_BFLOAT16),
    "float32 in bfloat16": Mixture(("float32",), ("bfloat16",), *IN_BFLOAT16),
    "float32, bfloat16": Mixture(("float32", "bfloat16"), ("float32",), *IN_BFLOAT16),
}
MIXTURE_SHARES = (0.3, 0.3, 0.1, 0.1, 0.1, 0.1)


class Value(NamedTuple):
    kind: Kind
    shape: Shape
    dtype: Any
    level: int = FREE


class Step(NamedTuple):
    """An operation that was drawn: its name, the names of its inputs, and what it does."""

    name: str
    inputs: tuple[str, ...]
    run: Run
    details: str = ""


class Operation(NamedTuple):
    output: str
    value: Value
    step: Step

    def __str__(self) -> str:
        kind, shape = self.value.kind, list(self.value.shape)
        call = f"{self.step.name}({', '.join(self.step.inputs)})"
        return f"{self.output}: {kind} {self.value.dtype}{shape} = {call} {self.step.details}"


class Program(NamedTuple):
    seed: int
    mixture: str
    params: dict[str, Any]
    batch: dict[str, Any]
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        inputs = [
            f"{name}: {array.dtype}{list(array.shape[skip:])}"
            for part, skip in ((self.params, 0), (self.batch, 1))
            for name, array in part.items()
        ]
        head = f"seed {self.seed}, {self.mixture}, {len(self.operations)} operations"
        return "\n".join([head, *inputs, *map(str, self.operations)])

    @property
    def read(self) -> list[str]:
        """The data that no operation takes."""
        taken = {name for operation in self.operations for name in operation.step.inputs}
        made = [o.output for o in self.operations if o.value.kind == "data"]
        return [name for name in made if name not in taken]

    def loss(self, params: dict[str, Any], example: dict[str, Any]) -> Any:
        values = {**params, **example}
        for output, _, step in self.operations:
            values[output] = step.run(*(values[name] for name in step.inputs))
        dtype = jnp.float64 if MIXTURES[self.mixture].has_float64 else jnp.float32
        # A NaN in x0 shall reach the loss in every program.
        first = 0 * jnp.sum(example["x0"]).astype(dtype)
        return first + _readout([values[name] for name in self.read], dtype)


def _readout(values: Sequence[Any], dtype: Any) -> Any:
    """A sum over all entries with fixed weights; of values as large as each other."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=value.size) / math.sqrt(value.size) for value in values]
    flat = [lax.convert_element_type(lax.reshape(v, (v.size,)), dtype) for v in values]
    if not flat:
        return jnp.zeros((), dtype)
    known = jnp.asarray(np.concatenate(weights), dtype)
    return lax.dot(known, lax.sin(lax.concatenate(flat, 0)))


# JAX's own operators rather than NumPy's where nothing depends on it: they are traced faster.


def scaled(x: Any, factor: float) -> Any:
    return lax.mul(x, lax.full_like(x, factor))


def fitted(x: Any, like: Any) -> Any:
    """The entries of x, repeated or cut off, in the shape and dtype of another array."""
    flat = lax.reshape(lax.convert_element_type(x, like.dtype), (x.size,))
    flat = lax.concatenate([flat] * -(-like.size // x.size), 0)
    return lax.reshape(lax.slice(flat, (0,), (like.size,)), like.shape)


def mixed(x: Any, y: Any) -> Any:
    """The mean of x and as many entries of y."""
    return scaled(lax.add(x, lax.tanh(fitted(y, x))), 0.5)


class Draft:
    """A program that is being drawn."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.mixture = str(self.rng.choice(list(MIXTURES), p=MIXTURE_SHARES))
        self.dtypes = MIXTURES[self.mixture]
        self.values: dict[str, Value] = {}
        self.params: dict[str, Any] = {}
        self.batch: dict[str, Any] = {}
        self.operations: list[Operation] = []
        self.taken: set[str] = set()
        for shape in ((self.size(),), self.shape(2), self.shape(3)):
            self.example(shape)
        for shape in ((), (self.size(),), (2, 2)):
            self.index(shape)

    # Chance

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def size(self) -> int:
        return int(self.rng.choice([1, 2, 3, 4, 5], p=[0.06, 0.14, 0.25, 0.3, 0.25]))

    def shape(self, rank: int) -> Shape:
        return tuple(self.size() for _ in range(rank))

    def shuffled(self, items: Iterable[Any]) -> list[Any]:
        items = list(items)
        return [items[i] for i in self.rng.permutation(len(items))]

    def normal(self, shape: Shape, dtype: Any) -> Any:
        return np.asarray(self.rng.normal(size=shape), np.float32).astype(jnp.dtype(dtype))

    # Inputs

    def example(self, shape: Shape) -> None:
        array = self.normal((NUM_SAMPLES, *shape), self.choose(self.dtypes.data))
        self._new_input("x", "data", self.batch, array, shape)

    def index(self, shape: Shape) -> None:
        # Some lie outside of what is indexed.
        array = self.rng.integers(-2, 7, (NUM_SAMPLES, *shape)).astype(np.int32)
        self._new_input("i", "index", self.batch, array, shape)

    def parameter(self, shape: Shape, level: int) -> str:
        levels = {MOVED: (MOVED, MOVED, MOVED, COMPUTED, FREE), COMPUTED: (COMPUTED, FREE)}
        array = self.normal(shape, self.choose(self.dtypes.params))
        own = self.choose(levels.get(level, (FREE,)))
        return self._new_input("w", "weight", self.params, array, shape, own)

    def _new_input(
        self, letter: str, kind: Kind, holder: dict, array: Any, shape: Shape, level: int = FREE
    ) -> str:
        name = f"{letter}{sum(known[0] == letter for known in self.values)}"
        holder[name] = array
        self.values[name] = Value(kind, shape, array.dtype, level)
        return name

    # Values of the pool

    def known(self, kind: Kind, fits: Callable[[Value], bool] = lambda value: True) -> list[str]:
        return [n for n, value in self.values.items() if value.kind == kind and fits(value)]

    def reuses(self, names: list[str]) -> bool:
        return bool(names) and (len(self.params) >= MOST_PARAMETERS or self.chance(0.6))

    def unused_weights(self, level: int) -> list[str]:
        names = self.known("weight", lambda value: value.level >= level and len(value.shape) > 0)
        return [name for name in names if name not in self.taken]

    def picked(self, names: list[str]) -> str:
        """One of them, rather one that nothing takes yet."""
        unused = [name for name in names if name not in self.taken]
        return self.choose(unused if unused and self.chance(0.6) else names)

    def data(self, low: int = 0, high: int = 4) -> str:
        # The examples have 1 to 3 axes, so that there always is one.
        names = self.known("data", lambda value: low <= len(value.shape) <= high)
        # New values, so that programs become deep, as often as any. The smaller of two, for
        # parameters take the fast routes only where they are larger than what they make.
        names = names[-6:] if self.chance(0.5) else names
        return min(self.choose(names), self.choose(names), key=self.num_entries)

    def num_entries(self, name: str) -> int:
        return math.prod(self.shape_of(name))

    def scalar_index(self) -> str:
        return self.choose(self.known("index", lambda value: not value.shape))

    def indices(self) -> str:
        return self.choose(self.known("index"))

    def weight(self, shape: Shape, level: int = MOVED) -> str:
        """A weight of this shape that may be used so: one that there is, or a new parameter."""
        names = self.known("weight", lambda value: value.shape == shape and value.level >= level)
        return self.picked(names) if self.reuses(names) else self.parameter(shape, level)

    def some_weight(self, level: int, low: int = 1, high: int = 4) -> str:
        names = self.known(
            "weight", lambda value: low <= len(value.shape) <= high and value.level >= level
        )
        shape = self.shape(self.integer(low, min(high, 3)))
        return self.picked(names) if self.reuses(names) else self.parameter(shape, level)

    def weight_sharing(self, shape: Shape, level: int = MOVED) -> str:
        """A weight that has an axis as long as one of `shape`."""
        names = self.known(
            "weight",
            lambda value: value.level >= level and not set(value.shape).isdisjoint(shape),
        )
        unused = [name for name in self.unused_weights(level) if self.num_entries(name) <= 25]
        if unused and self.chance(0.3):
            return self.choose(unused)
        if self.reuses(names):
            return self.picked(names)
        own = list(self.shape(int(self.rng.choice([1, 2, 3, 4], p=[0.15, 0.5, 0.25, 0.1]))))
        own[self.integer(0, len(own) - 1)] = self.choose(shape)
        return self.parameter(tuple(own), level)

    def shape_of(self, name: str) -> Shape:
        return self.values[name].shape

    def common_dtype(self, *names: str) -> Any:
        dtypes = [self.values[name].dtype for name in names]
        return self.choose([functools.reduce(jnp.promote_types, dtypes), *dtypes])

    def level_of(self, names: Iterable[str]) -> int:
        return min(self.values[name].level for name in names)

    def bounded(self, num_terms: int) -> Run:
        """What makes sums of products of so many terms about as large as their factors."""
        finish: Run = lax.sin if self.chance(0.6) else lambda y: y
        return lambda y: finish(scaled(y, num_terms**-0.5))

    def add(self, step: Step, kind: Kind) -> str | None:
        """Adds an operation, unless its value is too large or of too high a rank."""
        inputs = [self.values[name] for name in step.inputs]
        shaped = jax.eval_shape(
            step.run, *(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs)
        )
        if shaped.size > MOST_ENTRIES or shaped.ndim > 4:
            return None
        level = self.level_of(step.inputs) if kind == "weight" else FREE
        value = Value(kind, shaped.shape, shaped.dtype, level)
        name = f"v{len(self.operations)}"
        self.operations.append(Operation(name, value, step))
        self.values[name] = value
        self.taken.update(step.inputs)
        return name

    def program(self) -> Program:
        return Program(self.seed, self.mixture, self.params, self.batch, tuple(self.operations))


Rule: TypeAlias = Callable[[Draft], Step]


# Products of data and a weight


def _matched(d: Draft, one: Shape, other: Shape) -> list[tuple[int, int]]:
    """Pairs of axes of equal length, at least one where there is one."""
    pairs: list[tuple[int, int]] = []
    for i in d.shuffled(range(len(one))):
        taken = {j for _, j in pairs}
        free = [j for j, size in enumerate(other) if size == one[i] and j not in taken]
        if free and (not pairs or d.chance(0.5)):
            pairs.append((i, d.choose(free)))
    return pairs


def dot(d: Draft) -> Step:
    x = d.data(1)
    w = d.weight_sharing(d.shape_of(x))
    pairs = _matched(d, d.shape_of(x), d.shape_of(w))
    contracted = [pair for pair in pairs if d.chance(0.75)]
    batched = [pair for pair in pairs if pair not in contracted]
    swapped, dtype = d.chance(0.5), d.common_dtype(x, w)
    preferred = d.choose([None, jnp.float32]) if dtype == jnp.bfloat16 else None
    dims = tuple(
        tuple(tuple(pair[1 - k if swapped else k] for pair in part) for k in (0, 1))
        for part in (contracted, batched)
    )
    finish = d.bounded(math.prod(d.shape_of(x)[i] for i, _ in contracted))

    def run(x: Any, w: Any) -> Any:
        x, w = (lax.convert_element_type(array, dtype) for array in (x, w))
        one, other = (w, x) if swapped else (x, w)
        return finish(lax.dot_general(one, other, dims, preferred_element_type=preferred))  # pyright: ignore

    return Step("dot", (x, w), run, f"{dims} weight {'left' if swapped else 'right'} {dtype}")


def matmul(d: Draft) -> Step:
    x = d.data(1)
    size = d.shape_of(x)[-1]
    batch = d.shape_of(x)[:-2] if d.chance(0.3) else ()
    w, finish = d.weight((*batch, size, d.size())), d.bounded(size)
    return Step("matmul", (x, w), lambda x, w: finish(x @ w))


def einsum(d: Draft) -> Step:
    x = d.data(1)
    others = [d.weight_sharing(d.shape_of(x))]
    if d.chance(0.25):
        others.append(d.data(1, 2) if d.chance(0.5) else d.weight_sharing(d.shape_of(x)))
    names = d.shuffled([x, *others])
    sizes: dict[str, int] = {}
    terms = [_subscripts(d, d.shape_of(name), sizes) for name in names]
    limit = MOST_ENTRIES
    out = []
    for letter in d.shuffled(sizes):
        if d.chance(0.4) and sizes[letter] <= limit and len(out) < 4:
            out.append(letter)
            limit //= sizes[letter]
    spec = f"{','.join(terms)}->{''.join(out)}"
    finish = d.bounded(math.prod(size for letter, size in sizes.items() if letter not in out))
    return Step("einsum", tuple(names), lambda *a: finish(jnp.einsum(spec, *a)), spec)


def _subscripts(d: Draft, shape: Shape, sizes: dict[str, int]) -> str:
    term = ""
    for size in shape:
        # Seldom a letter twice in one term, which takes a diagonal.
        known = [
            k for k, length in sizes.items() if length == size and (k not in term or d.chance(0.1))
        ]
        letter = d.choose(known) if known and d.chance(0.8) else "abcdefghijklmnop"[len(sizes)]
        sizes.setdefault(letter, size)
        term += letter
    return term


def attention(d: Draft) -> Step:
    x = d.data(2, 2)
    dim, heads, size = d.shape_of(x)[1], d.integer(1, 3), d.integer(1, 3)
    kernels = [d.weight((dim, heads, size)) for _ in range(3)]
    last = d.weight((heads, size, d.size()))
    bias = d.chance(0.2)
    causal = d.chance(0.5)

    def run(x: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
        q, k, v = (jnp.einsum("td,dhe->hte", x, w) * dim**-0.5 for w in (q, k, v))
        scores = jnp.einsum("hte,hse->hts", q, k) * size**-0.5
        if causal:
            scores = jnp.where(np.tri(x.shape[0], dtype=bool), scores, -30.0)
        values = jnp.einsum("hts,hse->the", jax.nn.softmax(scores), v)
        return jnp.einsum("the,hed->td", values, o) * (heads * size) ** -0.5 + bias

    return Step("attention", (x, *kernels, last), run, f"causal={causal}")


def convolution(d: Draft) -> Step:
    spatial = d.integer(1, 2)
    x = d.data(spatial + 1, spatial + 2)
    shape = d.shape_of(x)
    has_images = len(shape) == spatial + 2
    shape = shape if has_images else (1, *shape)
    rank = spatial + 2
    lhs = tuple([*d.shuffled(range(rank))] if has_images else [0, *d.shuffled(range(1, rank))])
    rhs, out = (tuple(d.shuffled(range(rank))) for _ in range(2))
    images, channels, *sizes = (shape[axis] for axis in lhs)
    groups = d.choose([g for g in range(1, channels + 1) if channels % g == 0])
    by_images = images if groups == 1 and images > 1 and d.chance(0.1) else 1
    kernel = tuple(d.integer(1, 3) for _ in range(spatial))
    stride, dilation, lhs_dilation = zip(*(_steps(d) for _ in sizes), strict=True)
    padding = [
        _padding(d, *each) for each in zip(sizes, kernel, dilation, lhs_dilation, strict=True)
    ]
    num_out = groups * by_images * d.integer(1, 3)
    if d.mixture != "float64":
        # In float32 XLA's CPU backend reads outside of the image where it is cut off and each group
        # has one channel on both sides, as in gradients of depthwise ones: any gradient is wrong.
        padding = [(max(low, 0), max(high, 0)) for low, high in padding]
    own = (num_out, channels // groups, *kernel)
    laid_out = [0] * rank
    for size, axis in zip(own, rhs, strict=True):
        laid_out[axis] = size
    w = d.weight(tuple(laid_out))
    dtype, finish = d.common_dtype(x, w), d.bounded(math.prod(own[1:]))

    def run(x: Any, w: Any) -> Any:
        y = lax.conv_general_dilated(
            (x if has_images else x[None]).astype(dtype),
            w.astype(dtype),
            stride,
            padding,
            lhs_dilation,
            dilation,
            lax.ConvDimensionNumbers(lhs, rhs, out),
            feature_group_count=groups,
            batch_group_count=by_images,
        )
        return finish(y)

    details = (
        f"{stride=} {padding=} {lhs_dilation=} {dilation=} {lhs=} {rhs=} {out=} {groups=} "
        f"batch_groups={by_images} {dtype}"
    )
    return Step("convolution", (x, w), run, details)


def _steps(d: Draft) -> Sequence[int]:
    """A stride, a dilation of the kernel and one of the image, of which one is more than 1."""
    # XLA aborts on some gradients of convolutions with several.
    return d.shuffled((1, 1, d.choose([1, 2, 3])))


def _padding(d: Draft, size: int, kernel: int, dilation: int, lhs_dilation: int) -> tuple[int, int]:
    low = d.integer(-1, 2)
    missing = (kernel - 1) * dilation + 1 - ((size - 1) * lhs_dilation + 1) - low
    return (low, max(missing, d.integer(-1, 2)))


def _finite_fill(d: Draft) -> dict[str, Any]:
    mode = d.choose(["clip", "fill", "wrap"])
    return {"mode": mode, "fill_value": d.choose([0.0, 0.5])} if mode == "fill" else {"mode": mode}


def take(d: Draft) -> Step:
    i, w = d.indices(), d.some_weight(MOVED)
    axis, options = d.integer(0, len(d.shape_of(w)) - 1), _finite_fill(d)
    finish = d.bounded(1)
    return Step(
        "take",
        (i, w),
        lambda i, w: finish(jnp.take(w, i, axis=axis, **options)),
        f"{axis=} {options}",
    )


def one_hot(d: Draft) -> Step:
    i, w = d.indices(), d.some_weight(MOVED)
    size = d.shape_of(w)[0]
    return Step(
        "one_hot",
        (i, w),
        lambda i, w: lax.tanh(jnp.tensordot(jax.nn.one_hot(i, size, dtype=w.dtype), w, 1)),
    )


# Other ways to look up, by a scalar k and indices i and j of any shape.
LOOK_UPS: dict[str, Run] = {
    "two axes": lambda k, i, j, w: w.at[i, jnp.min(j)].get(mode="clip"),
    "two axes, filled": lambda k, i, j, w: w.at[i, k].get(mode="fill", fill_value=0),
    "entries": lambda k, i, j, w: w[jnp.mod(i, 2), ..., jnp.mod(k, w.shape[-1])],
    "windows": lambda k, i, j, w: jax.vmap(
        lambda start: lax.dynamic_slice_in_dim(w, start, (w.shape[0] + 1) // 2)
    )(jnp.ravel(i)),
    "windows of columns": lambda k, i, j, w: jax.vmap(
        lambda start: lax.dynamic_slice_in_dim(w, start, 1, axis=-1), out_axes=-1
    )(jnp.ravel(j)),
    "one row": lambda k, i, j, w: lax.dynamic_index_in_dim(w, k, 0, keepdims=False),
    "one column": lambda k, i, j, w: lax.dynamic_index_in_dim(w, k, 1),
    "along an axis": lambda k, i, j, w: jnp.take_along_axis(
        w, jnp.full((2, *w.shape[1:]), jnp.mod(k, w.shape[0])), 0
    ),
    "of each row": lambda k, i, j, w: jax.vmap(lambda row: jnp.take(row, i, 0, mode="clip"))(w),
    "one of each row": lambda k, i, j, w: jax.vmap(lambda row, k: row[k], in_axes=(0, None))(
        w, jnp.mod(k, w.shape[1])
    ),
    "of a flat table": lambda k, i, j, w: jnp.ravel(w)[jnp.mod(i * k, w.size)],
}


def look_up(d: Draft) -> Step:
    w, (name, run) = d.some_weight(MOVED, 2), d.choose([*LOOK_UPS.items()])
    return Step("look_up", (d.scalar_index(), d.indices(), d.indices(), w), run, name)


def tied(d: Draft) -> Step:
    """A table that is looked up and is the output matrix."""
    i, w = d.indices(), d.some_weight(MOVED, 2, 2)
    width, options = d.shape_of(w)[1], _finite_fill(d)

    def run(i: Any, w: Any) -> Any:
        hidden = lax.tanh(jnp.take(w, i, axis=0, **options))
        return jax.nn.log_softmax(hidden @ w.T * width**-0.5) / 2

    return Step("tied", (i, w), run, str(options))


def recurrent(d: Draft) -> Step:
    x = d.data(2, 2)
    inputs, units = d.shape_of(x)[1], d.integer(1, 4)
    w, u = d.weight((inputs, units)), d.weight((units, units))
    start = d.weight((units,), FREE)
    from_parameter, reverse = d.chance(0.4), d.chance(0.3)

    def run(x: Any, w: Any, u: Any, start: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            state = lax.tanh(row @ w * inputs**-0.5 + state @ u * units**-0.5).astype(start.dtype)
            return state, state

        first = start if from_parameter else jnp.zeros_like(start)
        return lax.scan(step, first, x, reverse=reverse)[1]

    return Step("recurrent", (x, w, u, start), run, f"{from_parameter=} {reverse=}")


def low_rank(d: Draft) -> Step:
    """x (frozen + A B), in both orders of the products."""
    x = d.data(1)
    size, rank, out = d.shape_of(x)[-1], d.integer(1, 2), d.size()
    a, b = d.weight((size, rank)), d.weight((rank, out))
    frozen, apart = d.normal((size, out), np.float32), d.chance(0.5)

    def run(x: Any, a: Any, b: Any) -> Any:
        known = jnp.asarray(frozen, a.dtype)
        y = x @ known + (x @ a) @ b if apart else x @ (known + a @ b)
        return lax.tanh(y * size**-0.5)

    return Step("low_rank", (x, a, b), run, f"{apart=}")


PRODUCTS: dict[Rule, float] = {
    dot: 5,
    matmul: 2,
    einsum: 3,
    attention: 0.4,
    convolution: 3,
    take: 2,
    one_hot: 0.7,
    look_up: 1.5,
    tied: 0.7,
    recurrent: 0.5,
    low_rank: 0.7,
}


# Uses of a weight in anything else


BROADCASTS: dict[str, Run] = {
    "x + w": lambda x, w: x + w,
    "x w": lambda x, w: x * w,
    "w - x": lambda x, w: w - x,
    "x / (1 + w²)": lambda x, w: x / (1 + w * w),
    "sin(x w)": lambda x, w: lax.sin(x * w),
    "logaddexp(x, w)": jnp.logaddexp,
    "x w + w": lambda x, w: x * w + w,
    "(x - w)²": lambda x, w: jnp.square(x - w) / 4,
    "x where w > 0": lambda x, w: jnp.where(w > 0, x, w),
}


def broadcast(d: Draft) -> Step:
    x = d.data(1)
    shape = d.shape_of(x)[d.integer(0, len(d.shape_of(x))) :]
    w = d.weight(tuple(1 if d.chance(0.2) else size for size in shape), FREE)
    name, run = d.choose([*BROADCASTS.items()])
    return Step("broadcast", (x, w), lambda x, w: lax.tanh(run(x, w)), name)


# Of data x of any shape, resized to what is needed, and a weight of rank 1 or more.
FREE_USES: dict[str, Run] = {
    "penalty": lambda x, w: lax.sin(jnp.mean(x)) + jnp.mean(w * w),
    "scattered into": lambda x, w: w.at[0].add(jnp.mean(x).astype(w.dtype)),
    "written over": lambda x, w: lax.dynamic_update_slice_in_dim(w, fitted(x, w[:1]), 0, 0),
    "concatenated": lambda x, w: jnp.concatenate([w, fitted(x, w)]),
    "quadratic": lambda x, w: lax.tanh(jnp.sum(fitted(x, w) * w) * w),
    "softmax of the sum": lambda x, w: jax.nn.softmax(fitted(x, w) + w),
    "layer norm": lambda x, w: w * jax.nn.standardize(fitted(x, w), epsilon=0.1),
    "its sign": lambda x, w: jnp.sign(w) * fitted(x, w),
    "chosen by its largest": lambda x, w: lax.sin(jnp.ravel(x)[jnp.argmax(w) % x.size]) + w[0],
    "left of a convolution": lambda x, w: lax.conv_general_dilated(
        jnp.reshape(w, (1, 1, -1)), fitted(x, jnp.zeros((1, 1, 2), w.dtype)), (1,), "SAME"
    ),
    "cumulated": lambda x, w: lax.tanh(jnp.cumsum(w * fitted(x, w), 0)),
}


def free_use(d: Draft) -> Step:
    x = d.data()
    w, (name, run) = d.some_weight(FREE), d.choose([*FREE_USES.items()])
    return Step("free_use", (x, w), run, name)


FREE_STEPS: dict[Rule, float] = {broadcast: 2, free_use: 1}


# Weights from weights


def _some_slice(d: Draft, size: int) -> slice:
    start = d.integer(0, size - 1)
    return d.choose([slice(start, None), slice(start, None, 2), slice(None, None, -1)])


def _move_one(d: Draft, shape: Shape) -> tuple[str, Run]:
    """An operation that moves, leaves out or repeats entries of one array."""
    rank, axis = len(shape), d.integer(0, len(shape) - 1)
    order, slices = d.shuffled(range(rank)), tuple(_some_slice(d, size) for size in shape)
    index, picked = d.integer(0, shape[axis] - 1), [d.integer(0, shape[axis] - 1) for _ in range(3)]
    parts, piece = [d.integer(0, shape[axis])], d.integer(0, 1)
    piece = piece if 0 < parts[0] < shape[axis] else int(parts[0] == 0)
    half = (shape[axis] + 1) // 2
    target = _regrouped(d, shape)
    ways: dict[str, Run] = {
        f"transpose {order}": lambda w: w.transpose(order),
        f"reshape {target}": lambda w: w.reshape(target),
        f"{slices}": lambda w: w[slices],
        f"reverse {axis}": lambda w: jnp.flip(w, axis),
        f"dynamic_slice {index} of {axis}": lambda w: lax.dynamic_slice_in_dim(
            w, index, half, axis
        ),
        f"split {parts} of {axis}, {piece}": lambda w: jnp.split(w, parts, axis)[piece],
        f"expand {axis}": lambda w: jnp.expand_dims(w, axis),
        f"index {index} of {axis}": lambda w: lax.index_in_dim(w, index, axis, keepdims=False),
        f"take {picked} of {axis}": lambda w: jnp.take(w, jnp.array(picked), axis),
        f"tile {axis}": lambda w: jnp.concatenate([w, w], axis),
        f"roll {axis}": lambda w: jnp.roll(w, 1, axis),
        f"pad {axis}": lambda w: jnp.pad(w, [(a == axis, 0) for a in range(rank)]),
        "broadcast": lambda w: jnp.broadcast_to(w, (2, *w.shape)),
        "jit, checkpoint": jax.jit(
            lambda w: jax.checkpoint(jnp.swapaxes, static_argnums=(1, 2))(w, 0, axis)
        ),
    }
    return d.choose([*ways.items()])


def _regrouped(d: Draft, shape: Shape) -> Shape:
    """Another shape of as many entries."""
    size, target = math.prod(shape), []
    while size > 1 and len(target) < 3:
        target.append(d.choose([k for k in range(1, size + 1) if size % k == 0]))
        size //= target[-1]
    return (*target, size) if size > 1 or not target else tuple(target)


def moved(d: Draft) -> Step:
    w = d.some_weight(MOVED)
    name, run = _move_one(d, d.shape_of(w))
    return Step("moved", (w,), run, name)


def cast(d: Draft) -> Step:
    w = d.some_weight(MOVED)
    dtype = d.choose(d.dtypes.params + d.dtypes.data)
    return Step("cast", (w,), lambda w: w.astype(dtype), dtype)


def joined(d: Draft) -> Step:
    """Several weights stacked or concatenated, or what is taken out of the stack again."""
    first = d.some_weight(MOVED, 1, 3)
    others = [d.weight(d.shape_of(first)) for _ in range(d.integer(1, 2))]
    axis, way = (
        d.integer(0, len(d.shape_of(first)) - 1),
        d.choose(["stack", "concatenate", "piece"]),
    )
    ways: dict[str, Run] = {
        "stack": lambda *w: jnp.stack(w, axis),
        "concatenate": lambda *w: jnp.concatenate(w, axis),
        "piece": lambda *w: jnp.stack(w)[1],
    }
    return Step("joined", (first, *others), ways[way], f"{way} {axis}")


def _square(w: Any) -> Any:
    return w.T @ w if w.ndim == 2 else w * w


COMPUTATIONS: dict[str, Run] = {
    "scaled": lambda w: 0.5 * w,
    "negative": jnp.negative,
    "tanh": lax.tanh,
    "square": lambda w: _square(w) / math.sqrt(w.shape[0]),
    "standardised": lambda w: (w - w.mean(0)) / jnp.sqrt(w.var(0) + 0.3),
    "normed": lambda w: w / jnp.sqrt(jnp.sum(w * w, -1, keepdims=True) + 0.3),
    "softmax": lambda w: jax.nn.softmax(w, axis=0),
    "lower part": lambda w: jnp.tril(w) if w.ndim == 2 else jnp.cumsum(w, 0) / w.shape[0],
    "times its stopped self": lambda w: w * lax.stop_gradient(w),
    "stopped": lax.stop_gradient,
    "half stopped": lambda w: w.at[0].set(lax.stop_gradient(w[0])),
    "its positive part": lambda w: w * (w > 0),
    "rounded straight through": lambda w: w + lax.stop_gradient(jnp.round(2 * w) / 2 - w),
    "summed": lambda w: w.sum(0) / math.sqrt(w.shape[0]),
    "diagonal matrix": lambda w: jnp.diag(jnp.ravel(w)[:4]),
    "scanned alone": lambda w: lax.scan(lambda c, row: (lax.tanh(c + row), c * row), w[0], w)[1],
    "custom vjp": lambda w: with_other_vjp(lax.sin)(w),
    "custom jvp": lambda w: with_other_jvp(lax.sin)(w),
    "jit": jax.jit(lambda w: jax.jit(jnp.sin)(w) * 0.8),
    "checkpoint": lambda w: jax.checkpoint(lambda w: lax.sin(w) * w)(w),
    "cond": lambda w: lax.cond(jnp.mean(w) > 0, lax.sin, lax.tanh, w),
    "while": lambda w: w * lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0) / 3,
}


def computed(d: Draft) -> Step:
    w = d.some_weight(COMPUTED)
    name, run = d.choose([*COMPUTATIONS.items()])
    return Step("computed", (w,), run, name)


def masked(d: Draft) -> Step:
    w = d.some_weight(COMPUTED)
    mask = d.rng.random(d.shape_of(w)) < 0.6
    return Step("masked", (w,), lambda w: w * mask)


# Of weights whose shapes are alike.
COMBINATIONS: dict[str, Run] = {
    "sum": lambda v, w: v + w,
    "product": lambda v, w: v * w,
    "weight norm": lambda v, w: w * v / jnp.sqrt(jnp.sum(v * v) / v.size + 0.3),
    "A Bᵀ": lambda v, w: jnp.tensordot(v, w, ([-1], [-1])) / math.sqrt(v.shape[-1]),
    "frozen + A Bᵀ": lambda v, w: 0.5 + jnp.tensordot(v, w, ([0], [0])) / math.sqrt(v.shape[0]),
    "outer": lambda v, w: jnp.outer(v[..., 0], w[..., 0]),
    "chosen by the other": lambda v, w: jnp.where(v > 0, v, w),
    "interpolated": lambda v, w: 0.3 * v + 0.7 * lax.sin(w),
    "stacked": lambda v, w: jnp.stack([v, 2 * w]),
}


def combined(d: Draft) -> Step:
    v = d.some_weight(COMPUTED, 1, 3)
    w = d.weight(d.shape_of(v), COMPUTED)
    name, run = d.choose([*COMBINATIONS.items()])
    return Step("combined", (v, w), run, name)


WEIGHTS: dict[Rule, float] = {
    moved: 4,
    cast: 0.7,
    joined: 1.2,
    computed: 1.5,
    masked: 0.5,
    combined: 1.2,
}


# Data from data


DATA: dict[str, Run] = {
    "tanh": lax.tanh,
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "standardised": lambda x: jax.nn.standardize(x, epsilon=0.1),
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(-1) / math.sqrt(x.shape[-1]),
    "transpose": jnp.transpose,
    "flat": jnp.ravel,
    "outer": lambda x: lax.sin(jnp.outer(x.ravel()[:5], x.ravel()[:4])),
    "image": lambda x: fitted(x, jnp.zeros((2, 5, 4), x.dtype)),
    "sequence": lambda x: fitted(x, jnp.zeros((5, 3), x.dtype)),
    "Gram matrix": lambda x: lax.tanh(x @ x.T) if x.ndim == 2 else lax.cos(x),
    "cumulated": lambda x: jnp.cumsum(x, 0) / x.shape[0],
    "every other": lambda x: x[::2],
    "reversed": lambda x: x[::-1],
    "stopped": lax.stop_gradient,
    "half stopped": lambda x: x + lax.stop_gradient(x),
    "custom jvp": lambda x: with_other_jvp(lax.sin)(x),
    "custom vjp": lambda x: with_other_vjp(lax.sin)(x),
    "gelu": jax.nn.gelu,
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
}


def data_alone(d: Draft) -> Step:
    x = d.data(1)
    name, run = d.choose([*DATA.items()])
    return Step("data_alone", (x,), run, name)


def data_joined(d: Draft) -> Step:
    x, y = d.data(1, 3), d.data()
    ways: dict[str, Run] = {
        "product": lambda x, y: lax.mul(x, lax.tanh(fitted(y, x))),
        "residual": mixed,
        "concatenated": lambda x, y: jnp.concatenate([x.ravel()[:12], y.ravel()[:8]]),
    }
    name, run = d.choose([*ways.items()])
    return Step("data_joined", (x, y), run, name)


def data_cast(d: Draft) -> Step:
    x, dtype = d.data(), d.choose(d.dtypes.params + d.dtypes.data)
    return Step("data_cast", (x,), lambda x: x.astype(dtype), dtype)


DATA_STEPS: dict[Rule, float] = {data_alone: 2, data_joined: 1, data_cast: 0.4}


# What may stand around a product


def with_other_vjp(run: Run) -> Run:
    """The same function with a derivative rule that is not its derivative."""

    @jax.custom_vjp
    def other(*inputs: Any) -> Any:
        return run(*inputs)

    def backward(pull_back: Any, dy: Any) -> Any:
        return tuple(x if x.dtype == jax.dtypes.float0 else 0.7 * x for x in pull_back(dy))

    other.defvjp(lambda *inputs: jax.vjp(run, *inputs), backward)
    return other


def with_other_jvp(run: Run) -> Run:
    @jax.custom_jvp
    def other(*inputs: Any) -> Any:
        return run(*inputs)

    @other.defjvp
    def _(inputs: Any, tangents: Any) -> Any:
        y, dy = jax.jvp(run, inputs, tangents)
        return y, 1.3 * dy

    return other


def _is_layered(d: Draft, name: str) -> bool:
    return d.values[name].kind == "weight" and len(d.shape_of(name)) < 4 and d.chance(0.6)


def _layers(d: Draft, step: Step, length: int) -> tuple[Step, tuple[bool, ...]]:
    """The step with some of its weights replaced by as many layers of them, and which."""
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
    """A scan with weights as constants and as layers; its state is the step's data, if any."""
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
    """A loop that has weights in its initial state: unchanged, or decaying."""
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
    """vmap or lax.map, over copies of the data and over stacks of the weights."""
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
    """A branch by data, with other uses of the same weights in the other branches."""
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
    """What the step gives goes into it again, with the same weights."""
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


# Whole programs


def _drawn(d: Draft, shares: dict[Any, float]) -> Any:
    total = sum(shares.values())
    return d.rng.choice(np.array([*shares], object), p=[s / total for s in shares.values()])


def wrapped(d: Draft) -> Step:
    """A product, and up to three things around it."""
    step = _drawn(d, PRODUCTS)(d)
    for probability in (0.35, 0.35, 0.2):
        if not d.chance(probability):
            break
        step = _drawn(d, WRAPPERS)(d, step)
    return step


def any_data(d: Draft) -> Step:
    return _drawn(d, DATA_STEPS)(d)


def free(d: Draft) -> Step:
    return _drawn(d, FREE_STEPS)(d)


def any_weight(d: Draft) -> Step:
    return _drawn(d, WEIGHTS)(d)


PARTS: dict[Rule, float] = {wrapped: 3.5, any_weight: 2.5, any_data: 2.5, free: 0.5}


def draw_program(seed: int) -> Program:
    """The program of a seed, always the same."""
    with enable_x64(MIXTURES[Draft(seed).mixture].has_float64):
        d = Draft(seed)
        target = d.integer(LEAST_OPERATIONS, MOST_OPERATIONS)
        while len(d.operations) < target:
            part = _drawn(d, PARTS)
            d.add(part(d), "weight" if part is any_weight else "data")
        d.parameter(d.shape(2), FREE)  # one that nothing uses
        return d.program()


# Checks


class Reference(NamedTuple):
    """vmap(grad)'s losses [n], stacked gradients, and norms [n]."""

    losses: np.ndarray
    stacked: dict[str, np.ndarray]
    norms: np.ndarray


@functools.cache
def _quick_compilation() -> dict[str, Any]:
    """Options with which XLA compiles a small program for a CPU in a quarter of the time."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    return {name: value for name, value in options.items() if _is_known(name, value)}


def _is_known(name: str, value: Any) -> bool:
    """Whether this XLA has the option: each version has others."""
    try:
        jax.jit(jnp.sin, compiler_options={name: value})(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _compiled(function: Run) -> Run:
    return jax.jit(function, compiler_options=_quick_compilation())


class NoReferenceError(Exception):
    """There is nothing to compare with.

    XLA has no kernel for something in the program itself, as for some products of bfloat16, or the
    plain gradient of the mean loss is wrong, as of JAX 0.7.0's looks up of a column.
    """


def reference_of(program: Program) -> Reference:
    stacked_grads = jax.vmap(jax.value_and_grad(program.loss), in_axes=(None, 0))
    try:
        losses, stacked = jax.block_until_ready(
            _compiled(stacked_grads)(program.params, program.batch)
        )
    except jax.errors.JaxRuntimeError as error:
        raise NoReferenceError(error) from error
    losses = np.asarray(losses, np.float64)
    stacked = {name: np.asarray(leaf, np.float64) for name, leaf in stacked.items()}
    squares = [np.sum(leaf.reshape(NUM_SAMPLES, -1) ** 2, axis=1) for leaf in stacked.values()]
    return Reference(losses, stacked, np.sqrt(sum(squares, np.zeros(NUM_SAMPLES))))


def check_plain_gradient(program: Program, reference: Reference, tolerance: float) -> None:
    """Raises NoReferenceError where JAX itself disagrees with the mean of the stacked gradients."""

    def mean_loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jax.vmap(program.loss, in_axes=(None, 0))(params, batch))

    if not all(np.isfinite(leaf).all() for leaf in reference.stacked.values()):
        return
    gradient = _compiled(jax.grad(mean_loss))(program.params, program.batch)
    means = {name: leaf.mean(axis=0) for name, leaf in reference.stacked.items()}
    sizes = {name: np.abs(leaf).mean(axis=0) for name, leaf in reference.stacked.items()}
    error = relative_error(gradient, means, sizes, MIXTURES[program.mixture].floor)
    if not error <= tolerance:
        raise NoReferenceError(f"the plain gradient of the mean loss is off by {error:.2g}")


def relative_error(actual: Any, expected: Any, sizes: Any = None, floor: float = FLOOR) -> float:
    """The largest error of an entry, relative to the largest entry of its leaf.

    Args:
      actual: a tree.
      expected: another one.
      sizes: of what the expected values are sums of, where these may cancel.
      floor: the least that counts as a leaf's largest entry, as a share of all leaves' largest.
    """
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        return math.inf
    trees = (actual, expected, expected if sizes is None else sizes)
    leaves = [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees]
    largest = [np.abs(size).max(initial=0) for size in leaves[2]]
    smallest = max(floor * max(largest), 1e-30)
    errors = [
        np.abs(got - want).max(initial=0) / max(own, smallest)
        if got.shape == want.shape
        else math.inf
        for got, want, own in zip(leaves[0], leaves[1], largest, strict=True)
    ]
    return float(max(errors)) if np.isfinite(errors).all() else math.inf


class Check(NamedTuple):
    """How a program is run: all of it jitted, or its first operations un-jitted, which is slow."""

    mode: Mode
    jitted: bool
    on_nonfinite: Literal["drop", "propagate"]

    def __str__(self) -> str:
        return f"{self.mode}{'' if self.jitted else ', un-jitted'}, {self.on_nonfinite}"


def checks_of(seed: int) -> list[Check]:
    # "drop" compiles the backward pass twice, so that it comes less often.
    mode, other = MODES[seed % 2], MODES[1 - seed % 2]
    jitted = Check(mode, True, "drop" if seed // 2 % 3 == 0 else "propagate")
    return [jitted, Check(other, False, "drop")] if seed // 2 % 20 == 0 else [jitted]


def errors_of(program: Program, how: Check, reference: Reference, clip: Run) -> dict[str, float]:
    """Errors at a threshold that clips half of the samples, at one that clips none, and of a drop.

    Without clipping the result is the plain mean of the gradients.
    """
    f = clip(program.loss, 1.0, mode=how.mode, on_nonfinite=how.on_nonfinite, return_stats=True)

    def run(params: Any, batch: Any, alpha: Any) -> Any:
        return f(params, batch, threshold=psc.growing_threshold(alpha, BETA))

    run = _compiled(run) if how.jitted else run
    alpha = float(np.median(reference.norms / growing(1, BETA, NUM_SAMPLES)))
    finite = np.ones(NUM_SAMPLES, bool)
    errors = {
        "clipped": _error(run, program.batch, program, reference, alpha, finite),
        "plain": _error(run, program.batch, program, reference, math.inf, finite),
    }
    if how.on_nonfinite == "drop" and not _spreads_nan(program):
        finite = np.arange(NUM_SAMPLES) != 1
        batch = {**program.batch, "x0": program.batch["x0"].copy()}
        batch["x0"][~finite] = np.nan
        errors["dropped"] = _error(run, batch, program, reference, alpha, finite)
    return errors


def _spreads_nan(program: Program) -> bool:
    # XLA's CPU backend may compute the convolutions' gradients of all samples in one, so that a NaN
    # in one spreads to the others: with vmap(grad), and where autodiff is the route.
    return any("convolution" in str(operation) for operation in program.operations)


def _error(
    run: Run, batch: Any, program: Program, reference: Reference, alpha: float, finite: np.ndarray
) -> float:
    """The largest error of the gradients, the norms and the mean loss."""
    value, grads, stats = run(program.params, batch, alpha)
    if any(grads[name].dtype != array.dtype for name, array in program.params.items()):
        return math.inf
    stacked = {
        name: np.where(finite.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, np.nan)
        for name, leaf in reference.stacked.items()
    }
    losses, taus = reference.losses[finite], growing(alpha, BETA, NUM_SAMPLES)
    sizes = jax.tree.map(np.abs, stacked)
    floor = MIXTURES[program.mixture].floor
    return max(
        relative_error(grads, clipped_mean(stacked, taus), clipped_mean(sizes, taus), floor),
        relative_error(np.asarray(stats.norms)[finite], reference.norms[finite]),
        # The mean alone may vanish.
        relative_error(np.append(losses, value), np.append(losses, losses.mean())),
    )


def check(
    program: Program, clip: Run = psc.clipped_value_and_grad, with_routes: bool = False
) -> Outcome:
    """Compares what `clip` gives with the reference."""
    started = time.perf_counter()
    mixture, checks = MIXTURES[program.mixture], checks_of(program.seed)
    errors, routes = {}, {}
    # Two passes even where slices would do, as in all programs as small as these.
    two_passes = mock.patch.multiple(two_pass, MOST_SLICES=0, MOST_KEPT=math.inf)
    with enable_x64(mixture.has_float64), warnings.catch_warnings(), two_passes:
        # What is random may look like batch statistics of one sample.
        warnings.filterwarnings("ignore", "the loss of one example takes statistics")
        try:
            for how in checks:
                part = program if how.jitted else shortened(program)
                reference = reference_of(part)
                found = errors_of(part, how, reference, clip)
                if max(found.values()) > mixture.tolerance:
                    check_plain_gradient(part, reference, mixture.tolerance)
                errors |= {f"{how}, {what}": error for what, error in found.items()}
            routes = _routes(program) if with_routes else {}
        except NoReferenceError as error:
            errors[f"{NO_REFERENCE}{error}"[:500]] = math.inf
        except Exception as error:
            errors[f"{type(error).__name__}: {error}"[:500]] = math.inf
    wrong = [f"{what}: {e:.2g}" for what, e in errors.items() if not e <= mixture.tolerance]
    return Outcome(
        program.seed,
        program.mixture,
        len(program.operations),
        tuple(map(str, checks)),
        not wrong,
        max(errors.values()),
        round(time.perf_counter() - started, 3),
        routes,
        "; ".join(wrong),
    )


def shortened(program: Program, length: int = NUM_UNJITTED) -> Program:
    return _only(program, program.operations[:length])


def _only(program: Program, operations: Sequence[Operation]) -> Program:
    """The program with these operations, and the parameters that they take."""
    taken = {name for operation in operations for name in operation.step.inputs}
    params = {name: array for name, array in program.params.items() if name in taken}
    return program._replace(params=params or program.params, operations=tuple(operations))


def _routes(program: Program) -> dict[str, int]:
    explain: Any = psc.clipped_value_and_grad(program.loss, 1.0).explain  # pyright: ignore
    rows: list[Any] = []
    # Traced, so that nothing is computed.
    jax.eval_shape(lambda *a: rows.extend(explain(*a).rows), program.params, program.batch)
    return dict(collections.Counter(row.route for row in rows))


def reduced(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A smaller program that still fails: without operations that can be left out."""
    for operation in reversed(program.operations):
        smaller = _without(program, operation.output)
        if operation in program.operations and smaller.read and fails(smaller):
            program = smaller
    return program


def _without(program: Program, name: str) -> Program:
    """The program without an operation and all that depend on it."""
    gone, operations = {name}, []
    for operation in program.operations:
        if operation.output in gone or not gone.isdisjoint(operation.step.inputs):
            gone.add(operation.output)
        else:
            operations.append(operation)
    return _only(program, operations)


# The command


def _checked(seed: int) -> Outcome:
    if seed % CLEAR_EVERY == 0:
        jax.clear_caches()
    return check(draw_program(seed), with_routes=True)


def _run_reference(seed: int) -> None:
    program = draw_program(seed)
    with enable_x64(MIXTURES[program.mixture].has_float64):
        for how in checks_of(seed):
            reference_of(program if how.jitted else shortened(program))


SOURCE = Source(draw_program, _checked, _run_reference, shower(draw_program, check, reduced))


if __name__ == "__main__":
    tyro.cli(main_of(SOURCE))
