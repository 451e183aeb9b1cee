"""Defines a model of another library, for the worker and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Dtype = Literal["float64", "float32"]
Mode = Literal["one_pass", "two_pass"]
# Largest relative error that rounding explains.
LIMITS: dict[Dtype, float] = {"float64": 1e-11, "float32": 1e-4}
MODES: tuple[Mode, ...] = ("one_pass", "two_pass")
NUM_SAMPLES = 4  # so that the median of the norms clips exactly half of them


class Case(NamedTuple):
    """A loss of one example, with all of its arguments.

    Attributes:
      loss: `loss(params, *example)`.
      params: initial parameters.
      batch: the arguments after `params`, of NUM_SAMPLES samples.
      in_axes: where each argument of `batch` has its samples.
      spread: the scale of noise that is added to the parameters, since gradients vanish or agree
        where a library starts from zeros. 0 where parameters must stay as they are.
    """

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    in_axes: Any = 0
    spread: float = 0.1


class Model(NamedTuple):
    """A model: how its case is built, and the dtype in which the library can compute it."""

    build: Callable[[], Case]
    dtype: Dtype = "float64"
