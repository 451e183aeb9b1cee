"""Defines a model of another library, for the worker and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Dtype = Literal["float64", "float32"]
Mode = Literal["one_pass", "two_pass"]
# The largest relative error that rounding can explain.
LIMITS: dict[Dtype, float] = {"float64": 1e-11, "float32": 1e-4}
MODES: tuple[Mode, ...] = ("one_pass", "two_pass")
NUM_SAMPLES = 4  # so that the median of the norms clips exactly half of them


class Case(NamedTuple):
    """A loss for one example, with all its arguments.

    Attributes:
      loss: `loss(params, *example)`.
      params: initial parameters.
      batch: the arguments after `params`, of NUM_SAMPLES samples.
      in_axes: the axis of samples of each argument of `batch`.
      spread: the scale of noise added to the parameters, because gradients vanish or agree if a
        library starts from zeros. 0 if parameters must not change.
    """

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    in_axes: Any = 0
    spread: float = 0.1


class Model(NamedTuple):
    """A model: a function that builds its case, and the dtype that the library supports."""

    build: Callable[[], Case]
    dtype: Dtype = "float64"
