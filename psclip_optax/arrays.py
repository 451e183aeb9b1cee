"""Arrays and dtypes: what came, in the words of messages, and what dtypes convert to."""

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def dtype_of(value: Any) -> Any:
    """The dtype that JAX gives an array or a number; None for what is neither."""
    is_number = isinstance(value, bool | int | float | complex)
    if not is_number and not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return None
    try:
        return jnp.result_type(value)
    except (TypeError, ValueError):  # such as NumPy's strings
        return None


def is_narrow(dtype: Any) -> bool:
    """Whether it is a floating-point dtype of under 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def promoted(*dtypes: Any) -> Any:
    """What all convert to, also under `jax_numpy_dtype_promotion="strict"`.

    JAX lets float8 convert to nothing by itself; bfloat16 holds each of its numbers.
    """
    wide = [jnp.dtype(jnp.bfloat16) if is_narrow(dtype) else dtype for dtype in dtypes]
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, wide)


def is_integer(value: Any) -> bool:
    """Whether it is an int of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def described(value: Any) -> str:
    """`float32[3, 2]` of an array or a number, else the name of its type."""
    # NumPy's own, before JAX makes float32 of float64.
    dtype = value.dtype if isinstance(value, np.ndarray) else dtype_of(value)
    if dtype is not None:
        name = "float0" if dtype == jax.dtypes.float0 else dtype
        return f"{name}{list(np.shape(value))}"
    return "None" if value is None else f"a {type(value).__name__}"


class _Unquoted(str):
    def __repr__(self) -> str:
        return str(self)


def described_tree(tree: Any) -> str:
    """The tree with each leaf described, as in `(float32[], {'x': float32[3]})`."""
    return str(jax.tree.map(lambda leaf: _Unquoted(described(leaf)), tree))


def as_array(value: Any, expected: str) -> jax.Array:
    """The value as an array; what cannot be one is refused with what was expected."""
    cause = None
    if value is not None:  # which older JAX takes for NaN
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError) as error:
            cause = error
    raise TypeError(f"{expected}, got {described(value)}") from cause


def array_leaves(name: str, tree: Any, advice: str) -> list[tuple[str, Any]]:
    """Each leaf of a tree of arrays, as it came, with what messages call it."""
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
    """The leaves of a tree of real floating-point arrays, as arrays, with what messages call each.

    Args:
      name: of the tree, in messages.
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
