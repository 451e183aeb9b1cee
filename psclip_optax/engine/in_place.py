"""Scan so that the cotangents of what is scanned over are written without a buffer of zeros.

The backward pass of `lax.scan` writes the cotangents of its steps into zeros, from the last step to
the first. XLA drops the zeros for a loop that counts up, but not for one that counts down, and
filling the stacked gradients of layers takes a TPU as long as one of their products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax import meshes

# JAX 0.7 cannot make an array without filling it.
_empty = getattr(lax, "empty", None)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    copies: Sequence[jax.Array | None],
    **options: Any,
) -> tuple[Any, Any]:
    """Scan like `lax.scan`, and write cotangents of some leaves of xs into an unfilled buffer.

    Such a leaf has a shadow of the same shape in the carry, which no step changes, so that its
    cotangent is carried backward: it starts as an unfilled buffer, and each step writes the
    cotangent of its own slice. The slices themselves are taken from a copy without a cotangent.

    Args:
      step: a function from carry and slices of xs to a carry and results.
      init: the first carry.
      xs: the arrays to scan over.
      copies: for each leaf of xs whose cotangent is to be written in this way, the same array,
        but not from what is differentiated; None for the others. The leaf itself has to depend on
        what is differentiated.
      **options: `length`, `reverse` and `unroll` of `lax.scan`.
    """
    leaves, tree = jax.tree.flatten(xs)
    both = list(zip(leaves, copies, strict=True))
    shadows = [None if copy is None else _shadow(leaf) for leaf, copy in both]
    slices = [leaf if copy is None else copy for leaf, copy in both]

    def step_with_shadows(carry: Any, of_step: Any) -> Any:
        (shadows, carry), (leaves, i) = carry, of_step
        linked = [
            (None, leaf) if shadow is None else _linked(shadow, leaf, i)
            for shadow, leaf in zip(shadows, leaves, strict=True)
        ]
        carry, ys = step(carry, jax.tree.unflatten(tree, [leaf for _, leaf in linked]))
        return ([shadow for shadow, _ in linked], carry), ys

    indices = jnp.arange(options["length"])
    (shadows, carry), ys = lax.scan(
        step_with_shadows, (shadows, init), (slices, indices), **options
    )
    return _with_buffers((carry, ys), [shadow for shadow in shadows if shadow is not None])


def is_possible(leaf: jax.Array) -> bool:
    """Tell whether an unfilled buffer for a leaf's cotangent can be made."""
    # On an explicit mesh it would need the sharding of the cotangent, which is not known.
    return _empty is not None and not meshes.is_explicit(leaf)


@jax.custom_vjp
def _shadow(leaf: jax.Array) -> jax.Array:
    """Return zeros whose cotangent is that of the leaf."""
    return _zeros_like(leaf)


def _zeros_like(leaf: jax.Array) -> jax.Array:
    return meshes.varying(jnp.zeros_like(leaf), meshes.axes_of(leaf))


_shadow.defvjp(lambda leaf: (_zeros_like(leaf), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def _linked(shadow: jax.Array, leaf: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a shadow and slice i of its array, whose cotangent goes to that of the shadow."""
    del i
    return shadow, leaf


def _linked_forward(shadow: jax.Array, leaf: jax.Array, i: jax.Array) -> Any:
    return (shadow, leaf), i


def _linked_backward(i: jax.Array, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    return _written(*cotangents, i), None, None


_linked.defvjp(_linked_forward, _linked_backward)


@jax.custom_batching.custom_vmap
def _written(buffer: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, value, i, 0)


@_written.def_vmap
def _written_for_each(
    size: int, are_batched: Any, buffer: jax.Array, value: jax.Array, i: jax.Array
) -> tuple[jax.Array, bool]:
    """Write for all samples at once. The rule of JAX would scatter."""
    assert not are_batched[2], "all samples are in the same step"
    both = (
        array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
        for array, is_batched in zip((buffer, value), are_batched[:2], strict=True)
    )
    return lax.dynamic_update_index_in_dim(*both, i, 1), True


def _with_buffers(results: Any, shadows: Sequence[jax.Array]) -> Any:
    """Return the results of a scan; in the backward pass, make buffers for the shadows first."""
    leaves, tree = jax.tree.flatten(results)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not shadows or not places:
        return results
    kinds = [jax.typeof(shadow) for shadow in shadows]

    @jax.custom_vjp
    def joined(leaf: jax.Array, shadows: Sequence[jax.Array]) -> jax.Array:
        del shadows
        return leaf

    def backward(_: None, cotangent: jax.Array) -> Any:
        like = lax.stop_gradient(cotangent)
        return cotangent, [_buffer(kind, kind.shape)(like) for kind in kinds]

    joined.defvjp(lambda leaf, _: (leaf, None), backward)
    leaves[places[0]] = joined(leaves[places[0]], shadows)
    return jax.tree.unflatten(tree, leaves)


def _buffer(kind: Any, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Return a function that makes a buffer of this type and shape.

    The buffer has an axis for each `vmap` over the function's argument, and for no other: the rule
    of JAX would give it one for each `vmap` around, also for the one of `jax.jacfwd`.
    """
    empty = _empty
    assert empty is not None

    @jax.custom_batching.custom_vmap
    def buffer(like: jax.Array) -> jax.Array:
        del like
        return meshes.varying(empty(shape, kind.dtype), meshes.axes_of_type(kind))

    @buffer.def_vmap
    def for_each(size: int, _: Any, like: jax.Array) -> tuple[jax.Array, bool]:
        return _buffer(kind, (size, *shape))(like[0]), True

    return buffer
