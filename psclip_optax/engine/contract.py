"""Norms and weighted sums of the per-sample gradients of one parameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from psclip_optax.arrays import promoted
from psclip_optax.engine.analysis.sites import Site, of_parameter, operate, viewed
from psclip_optax.engine.plan import Group, LeafPlan, leaving_axes, route_of
from psclip_optax.engine.routes import conv, dense, embedding
from psclip_optax.engine.taps import Taps

# How many entries of what enters and leaves the sites of a weight norms are taken of at a time.
_MOST_AT_ONCE = 2**22
# How many entries of gradients with respect to computed weights are made at a time.
_MOST_PULLED_BACK = 2**22


def squared_norms(plan: LeafPlan, entered: Taps, cotangents: Taps, dtype: Any) -> jax.Array:
    """‖G_k‖² of the parameter for each sample, shape [n].

    Args:
      plan: the parameter's, with sites.
      entered: what entered each site, [scans…, n, …].
      cotangents: those of what left each site, [scans…, n, …].
      dtype: of the result, in which sums are accumulated.
    """
    norms = [_norms_in_parts(group, entered, cotangents, dtype) for group in plan.groups]
    return jnp.sum(jnp.stack(norms), axis=0)


def _norms_in_parts(group: Group, entered: Taps, cotangents: Taps, dtype: Any) -> jax.Array:
    """Some samples after the others, so that what is made on the way takes little memory."""
    if group.route == "conv":  # which does so by itself
        return _group_norms(group, entered, cotangents, dtype)
    axes = {site.path: site.sample_axis for site in group.sites}
    sides = tuple({path: side[path] for path in axes} for side in (entered, cotangents))
    path, axis = next(iter(axes.items()))
    num_samples = cotangents[path].shape[axis]
    size = sum(array.size for side in sides for array in side.values())

    def norms(sides: tuple[Taps, Taps]) -> jax.Array:
        return _group_norms(group, *sides, dtype)

    return _in_parts(norms, sides, (axes, axes), num_samples, size / _MOST_AT_ONCE)


def _in_parts(
    function: Callable[[Any], jax.Array], trees: Any, axes: Any, num_samples: int, at_least: float
) -> jax.Array:
    """The function's result [n], made in at least so many parts if the samples can be so parted.

    A part has every so many-th sample, as many of each device as of the others: consecutive ones of
    samples that devices share would have to move.

    Args:
      function: of trees of arrays, to one number for each sample.
      trees: of the arrays.
      axes: of the samples in each of them.
      num_samples: n.
      at_least: of one device's samples.
    """
    devices = jax.device_count() if num_samples % jax.device_count() == 0 else 1
    num_parts = _divisor(num_samples // devices, at_least / devices)
    if num_parts == 1:
        return function(trees)

    def part(i: jax.Array) -> jax.Array:
        def own(array: jax.Array, axis: int) -> jax.Array:
            split = (num_samples // num_parts, num_parts)
            parted = array.reshape(*array.shape[:axis], *split, *array.shape[axis + 1 :])
            return lax.dynamic_index_in_dim(parted, i, axis + 1, keepdims=False)

        return function(jax.tree.map(own, trees, axes))

    return lax.map(part, jnp.arange(num_parts)).T.reshape(num_samples)


def _divisor(number: int, at_least: float) -> int:
    return next((d for d in range(1, number) if number % d == 0 and d >= at_least), number)


def separable_squared_norms(
    plan: LeafPlan,
    parameter: jax.Array,
    entered: Taps,
    left: Taps,
    cotangents: Taps,
    slopes: Sequence[jax.Array],
    along: Sequence[jax.Array],
    dtype: Any,
) -> jax.Array:
    """‖G_k + Σ_u D_u ⊙ c_uk‖² for each sample, shape [n], for weights u computed separably.

    Args:
      plan: the parameter's.
      parameter: it.
      entered: what entered each site, [scans…, n, …].
      left: what left each site, [scans…, n, …], if the plan is radial.
      cotangents: those of what left each site, [scans…, n, …].
      slopes: D_u, like the parameter: what u's cotangents of 1 are pulled back to.
      along: c_uk, the gradients with respect to u, [n, …] over the plan's axes.
      dtype: of the result, in which sums are accumulated.
    """
    axes = sorted(plan.axes[0])
    order = [[own.index(axis) for axis in axes] for own in plan.axes]
    shape = [slopes[0].shape[axis] for axis in axes]
    along = [
        c.reshape(-1, *(slopes[0].shape[axis] for axis in own)).transpose(0, *(1 + i for i in o))
        for c, own, o in zip(along, plan.axes, order, strict=True)
    ]
    others = tuple(axis for axis in range(slopes[0].ndim) if axis not in axes)
    terms = list(zip(slopes, along, strict=True))
    computed = [
        (c * e).astype(dtype).reshape(-1, math.prod(shape))
        @ jnp.sum((d * f).astype(dtype), axis=others).ravel()
        for (d, c), (f, e) in itertools.product(terms, repeat=2)
    ]
    crossed = [
        _scaled_product(site, y, cotangents[site.path], c, axes, dtype)
        for site in plan.sites
        for y, c in (
            [(left[site.path], _of_parameter(terms, parameter.astype(dtype), others))]
            if plan.is_radial
            else [(_over_samples(site)(d, entered[site.path]), c) for d, c in terms]
        )
    ]
    own = squared_norms(plan, entered, cotangents, dtype)
    return jnp.maximum(own + 2 * sum(crossed) + sum(computed), 0)


def _of_parameter(
    terms: Sequence[tuple[jax.Array, jax.Array]], parameter: jax.Array, others: tuple[int, ...]
) -> jax.Array:
    """c_k of W ⊙ c_k = Σ_u D_u ⊙ c_uk, where each D_u is a multiple of W over the other axes."""
    squares = jnp.sum(jnp.square(parameter), axis=others)
    inverse = jnp.where(squares == 0, 0, 1 / jnp.where(squares == 0, 1, squares))
    multiples = [jnp.sum(d.astype(parameter.dtype) * parameter, others) * inverse for d, _ in terms]
    return sum((m[None] * c for m, (_, c) in zip(multiples, terms, strict=True)), jnp.zeros(()))


def _scaled_product(
    site: Site, y: jax.Array, dy: jax.Array, c: jax.Array, axes: Any, dtype: Any
) -> jax.Array:
    """⟨G_k, D ⊙ c_k⟩ = ⟨dy_k ⊙ c_k, y_k⟩ with y = op(D, x), as it is scaled where D is."""
    sample = site.sample_axis
    places = [sample, *(sample + 1 + axis for axis in leaving_axes(site, axes) or ())]
    c = c.transpose(sorted(range(len(places)), key=places.__getitem__))
    others = [axis for axis in range(y.ndim) if axis not in places]
    c = jnp.expand_dims(c, others)
    return jnp.sum(
        (dy * y).astype(dtype) * c, axis=[axis for axis in range(y.ndim) if axis != sample]
    )


def _over_samples(site: Site) -> Callable[[Any, jax.Array], jax.Array]:
    """From the parameter and what enters, [scans…, n, …], to what leaves the site, alike."""
    axis = site.sample_axis
    return jax.vmap(of_parameter(site, operate(site)), in_axes=(None, axis), out_axes=axis)


def pulled_back_squared_norms(
    pull_back: Callable[[list[jax.Array]], dict[int, jax.Array]],
    leaves: Sequence[LeafPlan],
    others: Sequence[tuple[LeafPlan, Any]],
    stacked: dict[int, jax.Array],
    entered: Taps,
    cotangents: Taps,
    dtype: Any,
) -> jax.Array:
    """Σ ‖g_k‖² over parameters from which weights are computed in any way, shape [n].

    The gradients are made and pulled back for few samples at a time.

    Args:
      pull_back: from gradients with respect to all computed weights to those of all parameters.
      leaves: the plans of these parameters.
      others: the plans, shapes and dtypes of all computed weights.
      stacked: gradients of each sample by automatic differentiation.
      entered: what entered each site, [scans…, n, …].
      cotangents: those of what left each site, [scans…, n, …].
      dtype: of the result, in which sums are accumulated.
    """
    needed = {weight for plan in leaves for weight in plan.through}
    chosen = [plan for plan, _ in others if plan.weight in needed]
    axes = {site.path: site.sample_axis for plan in chosen for site in plan.sites}
    direct = [plan.weight for plan in [*leaves, *chosen] if plan.is_direct]

    def squared_norm(sample: tuple[dict[int, jax.Array], Taps, Taps]) -> jax.Array:
        own, x, dy = sample
        x, dy = (
            {path: jnp.expand_dims(side[path], axis) for path, axis in axes.items()}
            for side in (x, dy)
        )
        one = jnp.ones(1, dtype)

        def gradient(plan: LeafPlan, kind: Any) -> jax.Array:
            if plan.weight not in needed:
                return jnp.zeros(kind.shape, kind.dtype)
            if plan.is_direct:
                return own[plan.weight]
            return weighted_sum(plan, kind, x, dy, one)

        pulled = pull_back([gradient(plan, kind) for plan, kind in others])
        totals = [added(pulled[plan.weight], own.get(plan.weight)) for plan in leaves]
        return sum((jnp.sum(jnp.square(t.astype(dtype))) for t in totals), jnp.zeros((), dtype))

    samples = (
        {weight: stacked[weight] for weight in direct},
        *(
            {path: jnp.moveaxis(side[path], axis, 0) for path, axis in axes.items()}
            for side in (entered, cotangents)
        ),
    )
    num_entries = sum(kind.size for plan, kind in others if plan.weight in needed)
    num_samples = len(jax.tree.leaves(samples)[0])
    return _in_parts(
        jax.vmap(squared_norm),
        samples,
        jax.tree.map(lambda _: 0, samples),
        num_samples,
        num_samples * num_entries / _MOST_PULLED_BACK,
    )


def site_squared_norm(site: Site, x: jax.Array, dy: jax.Array, dtype: Any) -> jax.Array:
    """‖G‖² at one site for one sample, from what entered and the cotangent of what left it."""
    route = route_of(site)
    return _group_norms(Group(route, (site,)), {site.path: x[None]}, {site.path: dy[None]}, dtype)[
        0
    ]


def _group_norms(group: Group, entered: Taps, cotangents: Taps, dtype: Any) -> jax.Array:
    def samples_first(site: Site) -> tuple[Site, jax.Array, jax.Array]:
        x, dy = entered[site.path], cotangents[site.path]
        return site, jnp.moveaxis(x, site.sample_axis, 0), jnp.moveaxis(dy, site.sample_axis, 0)

    def rows(sites: Sequence[Site]) -> embedding.Rows:
        return embedding.joined([embedding.rows(*samples_first(site)) for site in sites])

    def factors(sites: Sequence[Site], like: dense.Form) -> dense.Factors:
        both = [(entered[site.path], cotangents[site.path]) for site in sites]
        pairs = zip(sites, both, strict=True)
        return dense.joined([dense.factors(site, *own, like) for site, own in pairs])

    sites = group.sites
    if group.route == "dense":
        return dense.squared_norms(factors(sites, dense.form(sites[0])), dtype)
    if group.route == "embedding":
        return embedding.squared_norms(rows(sites), dtype)
    if group.route == "conv":
        pixels = conv.joined([conv.pixels(*samples_first(site)) for site in sites])
        return conv.squared_norms(pixels, conv.window(sites[0]), dtype)
    gathers, products = group.gathers, group.products
    taken, form = rows(gathers), dense.form(products[0])
    both = factors(products, form)
    left, right = dense.by_sample(both)
    is_left = form.left == (embedding.row_axis(gathers[0]),)
    over_rows, over_columns = (left, right) if is_left else (right, left)
    crossed = embedding.twice_inner_products(taken, over_rows, over_columns, dtype)
    own = dense.squared_norms(both, dtype)
    return jnp.maximum(own + embedding.squared_norms(taken, dtype) + crossed, 0)


def weighted_sum(
    plan: LeafPlan, parameter: Any, entered: Taps, cotangents: Taps, weights: jax.Array
) -> jax.Array:
    """Σ weights_k G_k: what a plain backward pass does, with the weighted cotangents.

    Args:
      plan: the parameter's, with sites.
      parameter: it, or its shape and dtype.
      entered: what entered each site, [scans…, n, …].
      cotangents: those of what left each site, [scans…, n, …].
      weights: one for each sample, shape [n].
    """
    weighted = [_scaled(cotangents[site.path], weights, site.sample_axis) for site in plan.sites]
    parts = [
        _seen_by_parameter(site, entered[site.path], dy)
        for site, dy in zip(plan.sites, weighted, strict=True)
    ]
    (total,) = jax.linear_transpose(lambda p: [of(p) for of, _ in parts], parameter)(
        [cotangent for _, cotangent in parts]
    )
    return total


def _seen_by_parameter(
    site: Site, x: jax.Array, dy: jax.Array
) -> tuple[Callable[[Any], Any], jax.Array]:
    """A function linear in the parameter, and the cotangent of what it gives."""
    if route_of(site) == "dense" and not _is_explicit(x):
        return viewed(site), dense.summed_gradient(site, x, dy)
    return lambda parameter: _over_samples(site)(parameter, x), dy


def _is_explicit(array: jax.Array) -> bool:
    """Whether the array's type says how it is sharded: then the product's type would have to."""
    mesh = jax.typeof(array).sharding.mesh
    return not mesh.empty and bool(mesh.explicit_axes)


def added(gradient: jax.Array, other: jax.Array | None) -> jax.Array:
    """The sum of two parts of a gradient, of which one may be in a wider dtype; None is 0."""
    if other is None:
        return gradient
    dtype = promoted(gradient.dtype, other.dtype)
    return gradient.astype(dtype) + other.astype(dtype)


def _scaled(array: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    weights = jnp.expand_dims(weights, [i for i in range(array.ndim) if i != axis])
    scaled = array.astype(promoted(array.dtype, weights.dtype)) * weights
    # What has weight 0 may not be finite.
    return jnp.where(weights == 0, 0, scaled).astype(array.dtype)
