"""Describe arrays and dtypes for messages, and promote dtypes."""

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def dtype_of(value: Any) -> Any:
    """Return the dtype that JAX gives an array or a number, and None for anything else."""
    is_number = isinstance(value, bool | int | float | complex)
    if not is_number and not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return None
    try:
        return jnp.result_type(value)
    except (TypeError, ValueError):  # such as NumPy's strings
        return None


def is_narrow(dtype: Any) -> bool:
    """Tell whether a dtype is floating-point with fewer than 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def promoted(*dtypes: Any) -> Any:
    """Return the common dtype of all, also under `jax_numpy_dtype_promotion="strict"`.

    JAX does not promote float8 implicitly; bfloat16 represents each float8 number.
    """
    wide = [jnp.dtype(jnp.bfloat16) if is_narrow(dtype) else dtype for dtype in dtypes]
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, wide)


def is_integer(value: Any) -> bool:
    """Tell whether a value is an int of Python or NumPy; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def described(value: Any) -> str:
    """Write `float32[3, 2]` for an array or a number, else the name of its type."""
    # NumPy's own dtype: JAX would make float32 of float64.
    dtype = value.dtype if isinstance(value, np.ndarray) else dtype_of(value)
    if dtype is not None:
        name = "float0" if dtype == jax.dtypes.float0 else dtype
        return f"{name}{list(np.shape(value))}"
    return "None" if value is None else f"a {type(value).__name__}"


class _Unquoted(str):
    def __repr__(self) -> str:
        return str(self)


def described_tree(tree: Any) -> str:
    """Describe each leaf of a tree, as in `(float32[], {'x': float32[3]})`."""
    return str(jax.tree.map(lambda leaf: _Unquoted(described(leaf)), tree))


def as_array(value: Any, expected: str) -> jax.Array:
    """Convert a value to an array, or raise an error that says what was expected."""
    cause = None
    if value is not None:  # older JAX takes None for NaN
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError) as error:
            cause = error
    raise TypeError(f"{expected}, got {described(value)}") from cause


def array_leaves(name: str, tree: Any, advice: str) -> list[tuple[str, Any]]:
    """List each leaf of a tree of arrays, unconverted, with its name in messages."""
    leaves = [
        (name + jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    for path, leaf in leaves:
        if dtype_of(leaf) is None:
            raise TypeError(f"{path} is {described(leaf)}, but expected an array; {advice}")
    return leaves


PART_IT_OFF = "part it off with eqx.partition or nnx.split, or close over it"


def float_leaves(name: str, tree: Any) -> list[tuple[str, jax.Array]]:
    """List the leaves of a tree of real floating-point arrays, with their names in messages.

    Args:
      name: the tree's name in messages.
      tree: parameters or gradients.

    Raises:
      TypeError: a leaf is something else.
    """
    leaves = array_leaves(name, tree, PART_IT_OFF)
    for path, leaf in leaves:
        dtype = dtype_of(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise TypeError(
                f"{path} is {described(leaf)}, but expected a real floating-point array; "
                f"{_instead_of(dtype)}"
            )
    return [(path, jnp.asarray(leaf)) for path, leaf in leaves]


def _instead_of(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "take its real and imaginary parts as two"
    if jnp.issubdtype(dtype, jnp.floating):
        return "cast it to bfloat16 or wider"
    return f"gradients are of floating-point parameters: {PART_IT_OFF}"
