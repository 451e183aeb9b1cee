"""Draw programs from JAX's operations, whether the engine has routes for them or not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import rules
from tests.numerics import enable_x64
from tests.random_programs.draft import Draft as RandomDraft
from tests.random_programs.program import FREE, MIXTURES, NUM_SAMPLES, Run, Shape, Step
from tests.random_programs.program import Program as RandomProgram

MIXTURE = "float64"
# Rarely with several dtypes, because then only large errors are visible.
PARAMS = ("float64", "float32", "bfloat16")
LEAST_OPERATIONS, MOST_OPERATIONS = 2, 6
# The exception of a rule without operands of this size.
UNFIT = (TypeError, ValueError, IndexError, ZeroDivisionError, NotImplementedError, AssertionError)


class Program(RandomProgram):
    """A program whose loss may read parameters and values computed from them alone."""

    @property
    def read(self) -> list[str]:
        taken = {name for operation in self.operations for name in operation.step.inputs}
        return [o.output for o in self.operations if o.output not in taken]

    def jaxpr(self) -> Any:
        """Return the jaxpr of the loss for one example."""
        example = {name: array[0] for name, array in self.batch.items()}
        with enable_x64(True):
            return jax.make_jaxpr(self.loss)(self.params, example)


class Draft(RandomDraft):
    """A program during drawing, in which parameters are used as freely as data."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.seed, self.mixture = seed, MIXTURE
        self.dtypes = MIXTURES[MIXTURE]
        if self.chance(0.1):
            self.dtypes = self.dtypes._replace(params=PARAMS, data=PARAMS)
        self.values, self.params, self.batch = {}, {}, {}
        self.operations, self.taken = [], set()
        self.wanted: str | None = None
        # Arrays without entries in few programs, because these compute little.
        self.chance_of_none = 0.15 if self.chance(0.08) else 0.0
        for rank in (1, 2, self.integer(0, 3)):
            self.example(self.shape(rank))
        for shape in ((), (self.size(),), (2, 2)):
            self.index(shape)
        masks = self.rng.random((NUM_SAMPLES, self.integer(1, 3))) < 0.7
        self._new_input("b", "mask", self.batch, masks, masks.shape[1:])

    def size(self) -> int:
        return 0 if self.chance(self.chance_of_none) else super().size()

    def normal(self, shape: Shape, dtype: Any) -> Any:
        return (0.6 * super().normal(shape, np.float64)).astype(jnp.dtype(dtype))

    def bounded(self, num_terms: int) -> Run:
        return super().bounded(max(num_terms, 1))

    def pick(self, table: dict[str, Run]) -> tuple[str, Run]:
        """Return the requested entry of a table, once, or any."""
        wanted, self.wanted = self.wanted, None
        name = wanted if wanted in table else self.choose([*table])
        return name, table[name]

    def mask(self) -> str:
        return self.choose(self.known("mask"))

    def any(self, low: int = 0, high: int = 4) -> str:
        """Return data, or parameters or values computed from them."""
        made = [
            name
            for name in self.values
            if name[0] == "v" and low <= len(self.shape_of(name)) <= high
        ]
        if made and self.chance(0.6):
            return self.picked(made)
        return self.data(low, high) if self.chance(0.5) else self.any_weight(low, high)

    def any_weight(self, low: int = 0, high: int = 4) -> str:
        if low == 0 and self.chance(0.1):
            return self.weight((), FREE)
        return self.some_weight(FREE, max(low, 1), high)

    def like(self, name: str) -> str:
        """Return another value of this shape, or the same."""
        shape = self.shape_of(name)
        fits = [
            n for n, v in self.values.items() if v.shape == shape and v.kind in ("data", "weight")
        ]
        if self.chance(0.6):
            return self.choose(fits)
        return self.weight(shape, FREE) if self.chance(0.6) else self.example(shape)

    def square(self) -> str:
        fits = [
            n
            for n, v in self.values.items()
            if v.kind in ("data", "weight") and len(v.shape) == 2 and v.shape[0] == v.shape[1]
        ]
        if fits and self.chance(0.5):
            return self.choose(fits)
        shape = (self.size(),) * 2
        return self.weight(shape, FREE) if self.chance(0.6) else self.example(shape)

    def example(self, shape: Shape) -> str:
        array = self.normal((NUM_SAMPLES, *shape), self.choose(self.dtypes.data))
        return self._new_input("x", "data", self.batch, array, shape)

    def add_any(self, step: Step) -> None:
        kinds = {self.values[name].kind for name in step.inputs}
        self.add(step, "weight" if kinds == {"weight"} else "data")

    def program(self) -> Program:
        return Program(self.seed, self.mixture, self.params, self.batch, tuple(self.operations))


def _step(d: Draft) -> Step:
    if not d.operations and d.chance(0.97):
        return rules.in_turn(d)
    return rules.wrapped(d) if d.chance(0.45) else rules.any_rule(d)


def draw_program(seed: int) -> Program:
    """Return the program of a seed, which is always the same."""
    with enable_x64(True):
        d = Draft(seed)
        target = d.integer(LEAST_OPERATIONS, MOST_OPERATIONS)
        while len(d.operations) < target:
            try:
                d.add_any(_step(d))
            except UNFIT:
                continue
        d.parameter(d.shape(2), FREE)  # one that nothing uses
        return d.program()


def primitives_of(closed: Any) -> set[str]:
    """Return the names of all primitives in a jaxpr."""
    return {eqn.primitive.name for eqn in every_equation(closed.jaxpr)}


def every_equation(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves([*eqn.params.values()], is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)
