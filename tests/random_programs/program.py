"""Define the parts of a random program, and its dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

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
# How freely a parameter may be used. A use without a route makes the whole parameter use the
# fallback, so with one level for all only the fallback would be tested.
MOVED, COMPUTED, FREE = 0, 1, 2


class Mixture(NamedTuple):
    """The dtypes of a program: of parameters, of data, and of computation."""

    params: tuple[str, ...]
    data: tuple[str, ...]
    tolerance: float
    floor: float

    @property
    def has_float64(self) -> bool:
        return "float64" in self.params


# The error of a leaf whose gradient vanishes is relative to this share of the largest entry of all
# leaves.
FLOOR = 1e-2
# An entry of bfloat16 has a relative error of 2⁻⁹ = 0.002. The reference rounds to it wherever the
# program does, but sums in other orders and rounds each sample's gradient, so both differ from the
# exact gradient, and from each other, by several such errors. If large cotangents cancel, small
# gradients have the errors of large ones.
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
    """A drawn operation: its name, the names of its inputs, and its function."""

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
        """Return the data that no operation uses."""
        taken = {name for operation in self.operations for name in operation.step.inputs}
        made = [o.output for o in self.operations if o.value.kind == "data"]
        return [name for name in made if name not in taken]

    def loss(self, params: dict[str, Any], example: dict[str, Any]) -> Any:
        values = {**params, **example}
        for output, _, step in self.operations:
            values[output] = step.run(*(values[name] for name in step.inputs))
        dtype = jnp.float64 if MIXTURES[self.mixture].has_float64 else jnp.float32
        # A NaN in x0 must reach the loss in every program.
        first = 0 * jnp.sum(example["x0"]).astype(dtype)
        return first + _readout([values[name] for name in self.read], dtype)


def _readout(values: Sequence[Any], dtype: Any) -> Any:
    """Sum all entries with fixed weights, after scaling values to equal size."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=value.size) / math.sqrt(value.size) for value in values]
    flat = [lax.convert_element_type(lax.reshape(v, (v.size,)), dtype) for v in values]
    if not flat:
        return jnp.zeros((), dtype)
    known = jnp.asarray(np.concatenate(weights), dtype)
    return lax.dot(known, lax.sin(lax.concatenate(flat, 0)))


# JAX's operators rather than NumPy's where the choice does not matter: they are traced faster.


def scaled(x: Any, factor: float) -> Any:
    return lax.mul(x, lax.full_like(x, factor))


def fitted(x: Any, like: Any) -> Any:
    """Repeat or truncate the entries of x to the shape and dtype of another array."""
    flat = lax.reshape(lax.convert_element_type(x, like.dtype), (x.size,))
    flat = lax.concatenate([flat] * -(-like.size // x.size), 0)
    return lax.reshape(lax.slice(flat, (0,), (like.size,)), like.shape)


def mixed(x: Any, y: Any) -> Any:
    """Return the mean of x and equally many entries of y."""
    return scaled(lax.add(x, lax.tanh(fitted(y, x))), 0.5)
