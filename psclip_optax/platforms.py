"""Choose an implementation by platform, if CPUs and accelerators need different ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

from psclip_optax.thresholds import concrete

_Result = TypeVar("_Result")


def by_platform(
    *arguments: Any, elsewhere: Callable[..., _Result], **on: Callable[..., _Result]
) -> _Result:
    """Call one of several functions with the same result, chosen by the platform of lowering.

    Args:
      *arguments: the arguments of the functions.
      elsewhere: the function for all platforms that are not named.
      **on: the functions for platforms, such as `cpu` and `tpu`.
    """
    first = jax.tree.leaves(arguments)[0]
    if concrete(first.ravel()[:0]) is None:
        return lax.platform_dependent(*arguments, **on, default=elsewhere)
    # Outside of jit a traced choice would be compiled again in each call.
    return on.get(jax.default_backend(), elsewhere)(*arguments)
