"""Converts parameters between Flax and PyTorch, without importing either."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def torch_name(name: str) -> str:
    """Returns a parameter's name in PyTorch, where modules have Flax's names."""
    *modules, last = name.split("/")
    if not modules:  # a bare array in Flax; in PyTorch an embedding of the positions
        return f"{last}.weight"
    is_weight = last in ("kernel", "scale", "embedding")
    return ".".join([*modules, "weight" if is_weight else last])


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith("/bias"):
        return (int(np.prod(shape)),)
    if not name.endswith("/kernel"):
        return shape
    if is_convolution(shape):
        return shape[3], shape[2], *shape[:2]
    num_inputs = fan_in(name, shape)
    return int(np.prod(shape)) // num_inputs, num_inputs


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    # A product that joins the heads has two input axes; all others have their input axis first.
    return int(np.prod(shape[: 2 if name.endswith("/out/kernel") else 1]))


def is_convolution(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Converts a parameter from Flax's layout to PyTorch's.

    Args:
      name: the name in Flax, "Dense_0/kernel".
      array: convolutions [height, width, in, out]; products [inputs…, outputs…].
    """
    if name.endswith("/kernel") and is_convolution(array.shape):
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    shape = torch_shape(name, array.shape)
    if name.endswith("/kernel"):
        return np.ascontiguousarray(array.reshape(shape[::-1]).T)
    return array.reshape(shape)


def from_torch(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts a parameter or its gradient from PyTorch's layout to Flax's.

    Args:
      name: the name in Flax.
      array: the array in PyTorch's layout.
      shape: the shape in Flax.
    """
    if name.endswith("/kernel") and is_convolution(shape):
        return array.transpose(2, 3, 1, 0)
    return (array.T if name.endswith("/kernel") else array).reshape(shape)


def count_blocks(names: Iterable[str]) -> int:
    return len({name.split("/")[0] for name in names if name.startswith("Block_")})
