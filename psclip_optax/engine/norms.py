"""Compute norms and weighted sums of the per-sample gradients of one weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psclip_optax import meshes
from psclip_optax.arrays import promoted
from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval
from psclip_optax.engine.parts import Parts, in_parts
from psclip_optax.engine.plan import LeafPlan, leaving_axes
from psclip_optax.engine.routes.route import Cotangents, Entered, over_samples
from psclip_optax.platforms import by_platform

# The number of entries of gradients of computed weights that are made at a time.
_MOST_PULLED_BACK = 2**22


def squared_norms(
    plan: LeafPlan, entered: Entered, cotangents: Cotangents, dtype: Any
) -> jax.Array:
    """Return ‖G_k‖² of a weight for each sample, shape [n].

    Args:
      plan: the weight's plan, which has sites.
      entered: the inputs of each site, [scans…, n, …].
      cotangents: the cotangents of each site's output, [scans…, n, …].
      dtype: the dtype of the result, in which sums are accumulated.
    """
    norms = [
        group.route.squared_norms(group.sites, entered, cotangents, dtype) for group in plan.groups
    ]
    return jnp.sum(jnp.stack(norms), axis=0)


def separable_squared_norms(
    plan: LeafPlan,
    parameter: jax.Array,
    entered: Entered,
    left: Cotangents,
    cotangents: Cotangents,
    slopes: Sequence[jax.Array],
    along: Sequence[jax.Array],
    dtype: Any,
) -> jax.Array:
    """Return ‖G_k + Σ_u D_u ⊙ c_uk‖² for each sample, shape [n], for weights u computed separably.

    The loss of sample k depends on a parameter W through its sites, with gradient G_k, and through
    computed weights u = f_u(W); its gradient with respect to u is c_uk.

    *The gradient.* Let u be separable along the axes i of W, and call the other axes j: u has only
    the axes i, and u_i depends only on the entries W_ij. So the pull-back of c is the product

        (J_uᵀ c)_ij = (∂u_i / ∂W_ij) c_i = (D_u ⊙ c)_ij,    D_u = J_uᵀ 1,

    with c repeated over j, and with one D_u for all samples. Then

        ‖g_k‖² = ‖G_k + Σ_u D_u ⊙ c_uk‖²
               = ‖G_k‖² + 2 Σ_u ⟨G_k, D_u ⊙ c_uk⟩ + Σ_u Σ_v ⟨D_u ⊙ c_uk, D_v ⊙ c_vk⟩.

    *The first term* comes from the routes. *The last term* is Σ_i c_uki c_vki (Σ_j D_uij D_vij),
    one product of matrices for all samples.

    *The middle term.* The operation is linear in W, and G_k is its transpose applied to dy_k, so
    ⟨G_k, V⟩ = ⟨dy_k, op(V, x_k)⟩ for every V. The axes i are also axes of the output y
    (`leaving_axes`), so op(D ⊙ c, x) = op(D, x) ⊙ c with c repeated over the other axes of y. Hence

        ⟨G_k, D ⊙ c⟩ = ⟨dy_k ⊙ c, op(D, x_k)⟩,

    and neither G_k nor D ⊙ c is computed for any sample. If W has several sites, the term is the
    sum over them.

    *The radial case.* Let u_i depend only on s_i = Σ_j W_ij². Then D_uij = 2 (∂u_i / ∂s_i) W_ij is
    a multiple m_ui W_ij, and Σ_u D_u ⊙ c_uk = W ⊙ c_k with c_k = Σ_u m_u ⊙ c_uk. The middle term is
    2 ⟨dy_k ⊙ c_k, y_k⟩ with y_k = op(W, x_k), which the forward pass has already computed. If a
    view adds something to W, y_k is that of the sum, so such a plan is not radial.

    Args:
      plan: the parameter's plan, which is separable.
      parameter: W.
      entered: the inputs of each site, [scans…, n, …].
      left: the output of each site, [scans…, n, …], if the plan is radial.
      cotangents: the cotangents of each site's output, [scans…, n, …].
      slopes: D_u for each u, with the parameter's shape.
      along: c_uk for each u, [n, …] over the plan's axes.
      dtype: the dtype of the result, in which sums are accumulated.
    """
    axes = sorted(plan.axes[0])
    order = [[of_u.index(axis) for axis in axes] for of_u in plan.axes]
    shape = [slopes[0].shape[axis] for axis in axes]
    along = [
        c.reshape(-1, *(slopes[0].shape[axis] for axis in of_u)).transpose(0, *(1 + i for i in o))
        for c, of_u, o in zip(along, plan.axes, order, strict=True)
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
            else [(over_samples(site)(d, *entered[site.path]), c) for d, c in terms]
        )
    ]
    of_sites = squared_norms(plan, entered, cotangents, dtype)
    return jnp.maximum(of_sites + 2 * sum(crossed) + sum(computed), 0)


def _of_parameter(
    terms: Sequence[tuple[jax.Array, jax.Array]], parameter: jax.Array, others: tuple[int, ...]
) -> jax.Array:
    """Return c_k = Σ_u m_u ⊙ c_uk, with which Σ_u D_u ⊙ c_uk = W ⊙ c_k, as D_u = m_u ⊙ W."""
    squares = jnp.sum(jnp.square(parameter), axis=others)
    inverse = jnp.where(squares == 0, 0, 1 / jnp.where(squares == 0, 1, squares))
    multiples = [jnp.sum(d.astype(parameter.dtype) * parameter, others) * inverse for d, _ in terms]
    return sum((m[None] * c for m, (_, c) in zip(multiples, terms, strict=True)), jnp.zeros(()))


def _scaled_product(
    site: Site, y: jax.Array, dy: jax.Array, c: jax.Array, axes: Any, dtype: Any
) -> jax.Array:
    """Return ⟨G_k, D ⊙ c_k⟩ = ⟨dy_k ⊙ c_k, y_k⟩ for each sample, with y = op(D, x)."""
    sample = site.sample_axis
    places = [sample, *(leaving_axes(site, axes) or ())]
    c = c.transpose(sorted(range(len(places)), key=places.__getitem__))
    others = [axis for axis in range(y.ndim) if axis not in places]
    c = jnp.expand_dims(c, others)
    return jnp.sum(
        (dy * y).astype(dtype) * c, axis=[axis for axis in range(y.ndim) if axis != sample]
    )


def pulled_back_squared_norms(
    pull_back: Callable[[list[jax.Array]], dict[int, jax.Array]],
    leaves: Sequence[tuple[LeafPlan, Any]],
    others: Sequence[tuple[LeafPlan, Any]],
    stacked: dict[int, jax.Array],
    entered: Entered,
    cotangents: Cotangents,
    dtype: Any,
) -> jax.Array:
    """Return Σ ‖g_k‖² over parameters from which weights are computed in any way, shape [n].

    The gradients are made and pulled back for few samples at a time.

    Args:
      pull_back: a function from gradients with respect to all computed weights to those with
        respect to all parameters.
      leaves: the plans of these parameters, and the parameters or their shapes and dtypes.
      others: the same of all computed weights.
      stacked: the gradients of each sample by automatic differentiation.
      entered: the inputs of each site, [scans…, n, …].
      cotangents: the cotangents of each site's output, [scans…, n, …].
      dtype: the dtype of the result, in which sums are accumulated.
    """
    needed = {weight for plan, _ in leaves for weight in plan.through}
    chosen = [*(plan for plan, _ in leaves), *(p for p, _ in others if p.weight in needed)]
    axes = {site.path: site.sample_axis for plan in chosen for site in plan.sites}
    direct = [plan.weight for plan in chosen if plan.is_direct]

    def squared_norm(sample: tuple[dict[int, jax.Array], Entered, Cotangents]) -> jax.Array:
        direct_gradients, x, dy = sample
        x = {path: tuple(jnp.expand_dims(e, axes[path]) for e in x[path]) for path in axes}
        dy = {path: jnp.expand_dims(dy[path], axis) for path, axis in axes.items()}
        one = jnp.ones(1, dtype)

        def gradient(plan: LeafPlan, shaped: Any) -> jax.Array | None:
            if plan.is_direct:
                return direct_gradients[plan.weight]
            return weighted_sum(plan, shaped, x, dy, one) if plan.groups else None

        zeros = [
            meshes.varying(
                jnp.zeros(shaped.shape, shaped.dtype), meshes.axes_of_type(_kind(shaped))
            )
            for _, shaped in others
        ]
        pulled = pull_back(
            [
                zero if plan.weight not in needed else added(zero, gradient(plan, shaped))
                for (plan, shaped), zero in zip(others, zeros, strict=True)
            ]
        )
        totals = [added(pulled[plan.weight], gradient(plan, shaped)) for plan, shaped in leaves]
        return sum((jnp.sum(jnp.square(t.astype(dtype))) for t in totals), jnp.zeros((), dtype))

    samples = (
        {weight: stacked[weight] for weight in direct},
        {
            path: tuple(jnp.moveaxis(x, axis, 0) for x in entered[path])
            for path, axis in axes.items()
        },
        {path: jnp.moveaxis(cotangents[path], axis, 0) for path, axis in axes.items()},
    )
    num_entries = sum(shaped.size for _, shaped in [*leaves, *others])
    num_entries += _num_made(pull_back, [shaped for _, shaped in others])
    num_samples = len(jax.tree.leaves(samples)[0])
    pulled_back = num_samples * num_entries / _MOST_PULLED_BACK
    return in_parts(
        jax.vmap(squared_norm),
        samples,
        jax.tree.map(lambda _: 0, samples),
        num_samples,
        Parts(pulled_back, pulled_back, pulled_back),
    )


def _num_made(function: Callable[[list[Any]], Any], arguments: list[Any]) -> int:
    """Count the entries of all arrays that a function computes, from arrays or their shapes."""
    shapes = [meshes.shape_of_type(_kind(one)) for one in arguments]
    jaxpr = jax.make_jaxpr(function)(shapes).jaxpr
    return sum(aval(v).size for eqn in jaxpr.eqns for v in eqn.outvars)


def _kind(weight: Any) -> Any:
    """Return the type of a weight, which may be given by its type alone."""
    return jax.typeof(weight) if isinstance(weight, jax.Array) else weight


def site_squared_norm(
    site: Site, entered: tuple[jax.Array, ...], dy: jax.Array, dtype: Any
) -> jax.Array:
    """Return ‖G‖² at one site for one sample, from its inputs and the output's cotangent."""
    both = {site.path: tuple(x[None] for x in entered)}, {site.path: dy[None]}
    return site.route.squared_norms([site], *both, dtype)[0]


def weighted_sum(
    plan: LeafPlan, parameter: Any, entered: Entered, cotangents: Cotangents, weights: jax.Array
) -> jax.Array:
    """Return Σ weights_k G_k like a plain backward pass, from weighted cotangents or inputs.

    Args:
      plan: the plan of a parameter or computed weight, which has sites.
      parameter: the parameter or computed weight, or its shape and dtype.
      entered: the inputs of each site, [scans…, n, …].
      cotangents: the cotangents of each site's output, [scans…, n, …].
      weights: the sample weights, shape [n].
    """

    def summed(weights: jax.Array) -> jax.Array:
        sides = [
            _weighted(site, entered[site.path], cotangents[site.path], weights)
            for site in plan.sites
        ]
        parts = [
            site.route.weighted_sum(site, *both)
            for site, both in zip(plan.sites, sides, strict=True)
        ]
        (total,) = jax.linear_transpose(lambda p: [of(p) for of, _ in parts], parameter)(
            [cotangent for _, cotangent in parts]
        )
        return total

    has_half = any(cotangents[site.path].dtype == jnp.float16 for site in plan.sites)
    return by_shares(summed, weights) if has_half else summed(weights)


def by_shares(summed: Callable[[jax.Array], Any], weights: jax.Array) -> Any:
    """Sum with the weights' shares of their own sum, and multiply the sums by it.

    Products of small weights and cotangents in float16 would underflow, the smaller the thresholds.
    """
    whole = jnp.sum(weights)
    shares = weights / jnp.where(whole > 0, whole, 1)

    def times_whole(total: jax.Array) -> jax.Array:
        wide = total.astype(promoted(total.dtype, whole.dtype))
        return (wide * whole).astype(total.dtype)

    return jax.tree.map(times_whole, summed(shares))


def added(gradient: jax.Array, other: jax.Array | None) -> jax.Array:
    """Add two parts of a gradient, one of which may have a wider dtype; None is 0."""
    if other is None:
        return gradient
    dtype = promoted(gradient.dtype, other.dtype)
    return gradient.astype(dtype) + other.astype(dtype)


def _weighted(
    site: Site, entered: tuple[jax.Array, ...], dy: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return both sides of a site's gradients, one of them times the weights."""
    axis = site.sample_axis

    def by_cotangents(entered: Any, dy: jax.Array, weights: jax.Array) -> Any:
        return entered, _scaled(dy, weights, axis)

    def by_input(entered: Any, dy: jax.Array, weights: jax.Array) -> Any:
        (x,) = entered
        return (_scaled(x, weights, axis),), _zeroed(dy, _beside(weights, dy, axis))

    is_smaller = site.route.may_weigh_input and 2 * entered[0].size <= dy.size
    # Weights would be rounded to the dtype of the input, which may be that of integers.
    is_alike = entered[0].dtype == dy.dtype
    if not (is_smaller and is_alike) or _fills_tiles(dy, axis):
        return by_cotangents(entered, dy, weights)
    # A TPU's compiler would copy weighted cotangents to merge their rows with those of others.
    return by_platform(entered, dy, weights, tpu=by_input, elsewhere=by_cotangents)


def _fills_tiles(array: jax.Array, sample_axis: int) -> bool:
    """Tell whether a sample's rows fill whole tiles of a TPU, of 8 rows each."""
    rows = array.ndim - 2
    return rows <= sample_axis or array.shape[rows] % 8 == 0


def _scaled(array: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    weights = _beside(weights, array, axis)
    scaled = array.astype(promoted(array.dtype, weights.dtype)) * weights
    return _zeroed(scaled, weights).astype(array.dtype)


def _beside(weights: jax.Array, array: jax.Array, axis: int) -> jax.Array:
    return jnp.expand_dims(weights, [i for i in range(array.ndim) if i != axis])


def _zeroed(array: jax.Array, weights: jax.Array) -> jax.Array:
    """Zero the samples with weight 0, whose inputs and cotangents may be non-finite."""
    return jnp.where(weights == 0, jnp.zeros((), array.dtype), array)
