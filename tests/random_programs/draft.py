"""Draw values, shapes and dtypes for the operations of a program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.random_programs.program import (
    COMPUTED,
    FREE,
    MIXTURE_SHARES,
    MIXTURES,
    MOST_ENTRIES,
    MOST_PARAMETERS,
    MOVED,
    NUM_SAMPLES,
    Kind,
    Operation,
    Program,
    Run,
    Shape,
    Step,
    Value,
    scaled,
)


class Draft:
    """A program during drawing."""

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
        # Some are out of bounds.
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
        """Choose one of them, preferably one that is not used yet."""
        unused = [name for name in names if name not in self.taken]
        return self.choose(unused if unused and self.chance(0.6) else names)

    def data(self, low: int = 0, high: int = 4) -> str:
        # The examples have 1 to 3 axes, so there always is one.
        names = self.known("data", lambda value: low <= len(value.shape) <= high)
        # Half of the time new values, so that programs become deep. The smaller of two, because
        # parameters have fast routes only if they are larger than the outputs.
        names = names[-6:] if self.chance(0.5) else names
        return min(self.choose(names), self.choose(names), key=self.num_entries)

    def num_entries(self, name: str) -> int:
        return math.prod(self.shape_of(name))

    def scalar_index(self) -> str:
        return self.choose(self.known("index", lambda value: not value.shape))

    def indices(self) -> str:
        return self.choose(self.known("index"))

    def weight(self, shape: Shape, level: int = MOVED) -> str:
        """Return a weight of this shape for this level of use: an existing one or a new one."""
        names = self.known("weight", lambda value: value.shape == shape and value.level >= level)
        return self.picked(names) if self.reuses(names) else self.parameter(shape, level)

    def some_weight(self, level: int, low: int = 1, high: int = 4) -> str:
        names = self.known(
            "weight", lambda value: low <= len(value.shape) <= high and value.level >= level
        )
        shape = self.shape(self.integer(low, min(high, 3)))
        return self.picked(names) if self.reuses(names) else self.parameter(shape, level)

    def weight_sharing(self, shape: Shape, level: int = MOVED) -> str:
        """Return a weight that has an axis as long as one of `shape`."""
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
        """Return a scaling that makes sums of `num_terms` products as large as their factors."""
        finish: Run = lax.sin if self.chance(0.6) else lambda y: y
        return lambda y: finish(scaled(y, num_terms**-0.5))

    def add(self, step: Step, kind: Kind) -> str | None:
        """Add an operation, unless its value is too large or has too high a rank."""
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
