"""Compute norms of dot_general's gradients: G = Lᵀ R in each of B blocks, L [T, a] and R [T, c].

‖G‖² is also the sum of the entries of (L Lᵀ) ⊙ (R Rᵀ). The two Gram matrices take T² (a + c)
multiply-adds, G itself T a c. The cheaper of the two is computed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.arrays import promoted
from psclip_optax.engine.analysis.operations import ProductAxes, product_axes
from psclip_optax.engine.analysis.sites import Site, viewed
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.routes.route import Cotangents, Entered, Route, of_one_sample


class Form(NamedTuple):
    """Lists the axes of the frame that are the product's blocks, left columns and right columns.

    Each tuple is in ascending order.
    """

    blocks: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]


class Factors(NamedTuple):
    """The factors left [layers, n, B, T, a] and right [layers, n, B, T, c] of gradients."""

    left: jax.Array
    right: jax.Array


class Dense(Route):
    """The route for products: norms from both factors of a gradient, or from the gradient."""

    name = "dense"
    may_be_small = True
    may_weigh_input = True

    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        del operand
        return eqn.primitive.name == "dot_general"

    def joins(self, sites: Sequence[Site]) -> bool:
        if any(site.route is not self for site in sites):
            return False
        forms = [form(site) for site in sites]
        return all(_may_join(forms[0], other) for other in forms)

    def leaving_axes(self, site: Site) -> dict[int, int]:
        return product_axes(site.eqn, site.operand).leaving

    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        return squared_norms(factors(sites, entered, cotangents), dtype)

    def entries_made(self, sites: Sequence[Site]) -> int:
        return entries_made_of(_shapes_of_factors(sites))

    def entries_made_on_tpu(self, sites: Sequence[Site]) -> int:
        made = _shapes_of_factors(sites)
        *_, num_blocks, num_rows, _ = made.left.shape
        return num_blocks * num_rows**2 if _takes_gram(made.left, made.right) else 0

    def weighted_sum(
        self, site: Site, entered: tuple[jax.Array, ...], weighted: jax.Array
    ) -> tuple[Callable[[Any], Any], jax.Array]:
        (x,) = entered
        if meshes.is_explicit(x):  # the product's type would need a sharding
            return super().weighted_sum(site, entered, weighted)
        return viewed(site), _summed_gradient(site, x, weighted)


DENSE = Dense()


def _shapes_of_factors(sites: Sequence[Site]) -> Factors:
    return jax.eval_shape(functools.partial(factors, sites), *of_one_sample(sites))


def entries_made_of(factors: Factors) -> int:
    """Count the entries of one layer's Gram matrices or gradients, from the factors' shapes."""
    *_, num_blocks, num_rows, a = factors.left.shape
    gram, gradient = 2 * num_rows**2, a * factors.right.shape[-1]
    return 0 if num_rows == 1 else num_blocks * min(gram, gradient)


def _axes(site: Site) -> ProductAxes:
    return product_axes(site.eqn, site.operand).sorted_by(site.view.axes)


def form(site: Site) -> Form:
    axes, frame = _axes(site), site.view.axes
    in_frame = lambda in_w: tuple(frame[axis] for axis in in_w)  # noqa: E731
    return Form(in_frame(axes.w_blocks), in_frame(axes.w_contracted), in_frame(axes.w_free))


def factors(sites: Sequence[Site], entered: Entered, cotangents: Cotangents) -> Factors:
    """Return both factors of the sum of the gradients at sites that join."""
    like = form(sites[0])
    parts = [_factors(site, entered[site.path][0], cotangents[site.path], like) for site in sites]
    return _joined(parts)


def _factors(site: Site, x: jax.Array, dy: jax.Array, like: Form) -> Factors:
    """Return both factors in the order of `like`, whose left may be this site's right."""
    axes = _axes(site)
    layered, steps = site.scan_axes

    def arranged(array: jax.Array, *axes_of_step: list[int]) -> jax.Array:
        blocks, rows, columns = behind_samples(site, axes_of_step)
        return in_groups(array, layered, [site.sample_axis], blocks, steps + rows, columns)

    entering = arranged(x, axes.x_blocks, axes.x_free, axes.x_contracted)
    leaving = arranged(dy, axes.y_blocks, axes.y_x_free, axes.y_w_free)
    is_swapped = form(site).left != like.left
    return Factors(leaving, entering) if is_swapped else Factors(entering, leaving)


def behind_samples(site: Site, groups: Sequence[list[int]]) -> list[list[int]]:
    """Renumber axes of one step of one sample as axes of the whole array, after the samples'."""
    return [[site.sample_axis + 1 + axis for axis in group] for group in groups]


def in_groups(array: jax.Array, *groups: list[int]) -> jax.Array:
    """Merge the axes of each group into one axis."""
    shape = [math.prod(array.shape[axis] for axis in group) for group in groups]
    return array.transpose([*itertools.chain(*groups)]).reshape(shape)


def _summed_gradient(site: Site, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Compute Σ_k G_k with respect to W, [layers…, *W], in one product over samples, steps, rows.

    Automatic differentiation computes the same product in the other order, (dyᵀ x)ᵀ. For this,
    XLA's CPU backend copies dy, which in a recurrent net takes as long as the product itself.
    """
    axes, w = _axes(site), aval(site.eqn.invars[site.operand])
    layered, steps = site.scan_axes
    dtype = promoted(x.dtype, dy.dtype)

    def arranged(array: jax.Array, *axes_of_step: list[int]) -> jax.Array:
        blocks, rows, columns = behind_samples(site, axes_of_step)
        # If the axis of steps came first in the merged axis, sharded samples would all be gathered.
        apart = [[axis] for axis in (*steps, site.sample_axis)]
        return in_groups(array.astype(dtype), layered + blocks, *apart, rows, columns)

    sides = [
        (axes.w_contracted, arranged(x, axes.x_blocks, axes.x_free, axes.x_contracted)),
        (axes.w_free, arranged(dy, axes.y_blocks, axes.y_x_free, axes.y_w_free)),
    ]
    (first, left), (second, right) = sorted(sides, key=lambda side: side[0])  # in W's order
    batch = (0,)
    if left.shape[0] == 1:
        left, right, batch = left[0], right[0], ()
    rows = tuple(range(len(batch), left.ndim - 1))
    total = lax.dot_general(
        left, right, ((rows, rows), (batch, batch)), precision=site.eqn.params["precision"]
    )
    order, layers = [*axes.w_blocks, *first, *second], [x.shape[axis] for axis in layered]
    total = total.reshape(*layers, *(w.shape[axis] for axis in order)).astype(w.dtype)
    places = [len(layers) + order.index(axis) for axis in range(w.ndim)]
    return total.transpose([*range(len(layers)), *places])


def _may_join(one: Form, other: Form) -> bool:
    """Tell whether the gradients of two sites in one frame are products with the same axes."""
    return one.blocks == other.blocks and {one.left, one.right} == {other.left, other.right}


def _joined(parts: Sequence[Factors]) -> Factors:
    """Concatenate the factors of several sites into the factors of the gradients' sum."""
    if len(parts) == 1:
        return parts[0]
    left, right = (jnp.concatenate(sides, axis=3) for sides in zip(*parts, strict=True))
    return Factors(left, right)


def squared_norms(factors: Factors, dtype: Any) -> jax.Array:
    """Return ‖G_k‖² for each sample, [n]."""
    if factors.left.shape[0] == 1:
        return _squared_norms_of_layer(Factors(factors.left[0], factors.right[0]), dtype)

    def add(total: jax.Array, layer: Factors) -> tuple[jax.Array, None]:
        return total + _squared_norms_of_layer(layer, dtype), None

    # If the axis of layers came first in the merged axis, sharded samples would all be gathered.
    zero = jnp.zeros_like(factors.left[0, :, 0, 0, 0], dtype)
    return lax.scan(add, zero, factors)[0]


def _squared_norms_of_layer(factors: Factors, dtype: Any) -> jax.Array:
    """Return ‖G_k‖² of one layer, from left [n, B, T, a] and right [n, B, T, c]."""
    left, right = factors
    *parts, num_rows, _ = left.shape
    # One batch axis: XLA's CPU backend takes three times as long with two.
    left, right = (side.reshape(math.prod(parts), num_rows, -1) for side in factors)
    if num_rows == 1:
        squares = [jnp.sum(jnp.square(side.astype(dtype)), axis=(1, 2)) for side in (left, right)]
        norms = squares[0] * squares[1]
    elif _takes_gram(left, right):
        norms = jnp.maximum(_products_of_grams(left, right, dtype), 0)
    else:
        norms = jnp.sum(jnp.square(product(left, right, 1, dtype)), axis=(1, 2))
    return jnp.sum(norms.reshape(parts), axis=1)


def _products_of_grams(left: jax.Array, right: jax.Array, dtype: Any) -> jax.Array:
    """Return ⟨L Lᵀ, R Rᵀ⟩ for each of m matrices L [m, T, a] and R [m, T, c]."""
    if not meshes.has_several_axes((left, right)):
        grams = (product(side, side, 2, dtype) for side in (left, right))
        return jnp.sum(math.prod(grams), axis=(1, 2))
    # If devices share columns, they would sum Gram matrices over the devices before multiplying
    # them. Most often they share the wider side's columns. ⟨L Lᵀ R, R⟩ is a sum over these columns,
    # local to each device.
    narrow, wide = sorted((left, right), key=lambda side: side.shape[-1])
    gram, wide = product(narrow, narrow, 2, dtype), wide.astype(dtype)
    spread = lax.dot_general(gram, wide, (((2,), (1,)), ((0,), (0,))))
    return jnp.sum(spread * wide, axis=(1, 2))


def _takes_gram(left: Any, right: Any) -> bool:
    """Tell whether Gram matrices of [..., T, a] and [..., T, c] cost less than the gradient."""
    num_rows, a, c = *left.shape[-2:], right.shape[-1]
    return num_rows > 1 and num_rows * (a + c) < a * c


def by_sample(factors: Factors) -> Factors:
    """Reshape factors to [n, layers · B, T, …]."""
    left, right = (side.swapaxes(0, 1) for side in factors)
    n, _, _, num_rows, _ = left.shape
    return Factors(*(side.reshape(n, -1, num_rows, side.shape[-1]) for side in (left, right)))


def product(one: jax.Array, other: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """Multiply matrices [m, …, …] over `axis` of both, accumulated in `dtype`."""
    dims = (((axis,), (axis,)), ((0,), (0,)))
    return lax.dot_general(one, other, dims, preferred_element_type=dtype)
