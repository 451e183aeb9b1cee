"""Compute norms for a layer with a custom derivative rule whose gradient for W is a product.

Layers that quantise or fuse have a `jax.custom_vjp` with the weight as an argument. Its backward
pass is traced. If the gradient with respect to W is L(x)ᵀ R(x, dy), possibly with its entries
moved, and R is linear in dy, the norms are those of any product. Other rules have no route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from psclip_optax.arrays import promoted
from psclip_optax.engine.analysis.equations import CUSTOM_RULES, needed_equations
from psclip_optax.engine.analysis.linearity import backward_of, linear_in, moves_entries
from psclip_optax.engine.analysis.operations import product_axes
from psclip_optax.engine.analysis.sites import Site, viewed
from psclip_optax.engine.analysis.views import as_function, aval
from psclip_optax.engine.analysis.walk import inlined
from psclip_optax.engine.routes import dense
from psclip_optax.engine.routes.route import Cotangents, Entered, Route, of_one_sample


class _Product(NamedTuple):
    """The product that computes the gradient with respect to W.

    Attributes:
      eqn: the product's equation in the backward pass.
      factors: a function from dy and the inputs to both operands, for one sample.
      moved: a function from the product to the gradient.
    """

    eqn: core.JaxprEqn
    factors: Callable[..., list[jax.Array]]
    moved: Callable[[jax.Array], list[jax.Array]]


class Custom(Route):
    """The route for products in a user's derivative rule."""

    name = "custom"

    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        is_custom = eqn.primitive.name in CUSTOM_RULES and len(eqn.outvars) == 1
        return is_custom and _product(eqn, operand) is not None

    def joins(self, sites: Sequence[Site]) -> bool:
        return len(sites) == 1 and sites[0].route is self

    def leaving_axes(self, site: Site) -> dict[int, int] | None:
        del site
        return None

    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        (site,) = sites
        _, factors = _factors(site, entered[site.path], cotangents[site.path])
        return dense.squared_norms(factors, dtype)

    def entries_made(self, sites: Sequence[Site]) -> int:
        (site,) = sites
        entered, cotangents = of_one_sample(sites)
        made = jax.eval_shape(
            lambda *sides: _factors(site, *sides)[1], entered[site.path], cotangents[site.path]
        )
        return dense.entries_made_of(made)

    def weighted_sum(
        self, site: Site, entered: tuple[jax.Array, ...], weighted: jax.Array
    ) -> tuple[Callable[[Any], Any], jax.Array]:
        product, (left, right) = _factors(site, entered, weighted)
        dtype = promoted(left.dtype, right.dtype)
        rows = ((1, 3), (1, 3))  # samples and rows; layers and blocks do not change
        total = lax.dot_general(
            left.astype(dtype),
            right.astype(dtype),
            (rows, ((0, 2), (0, 2))),
            precision=product.eqn.params["precision"],
        )
        layers = [entered[0].shape[axis] for axis in site.scan_axes[0]]
        out = aval(product.eqn.outvars[0])
        total = total.astype(out.dtype).reshape(-1, *out.shape)
        (gradient,) = jax.vmap(product.moved)(total)
        return viewed(site), gradient.reshape(*layers, *gradient.shape[1:])


CUSTOM = Custom()


def _product(eqn: core.JaxprEqn, operand: int) -> _Product | None:
    """Find the product in a rule's backward pass that computes the gradient of one operand."""
    backward = backward_of(eqn, [i == operand for i in range(len(eqn.invars))])
    if backward is None or len(backward.jaxpr.outvars) != 1:
        return None
    jaxpr = inlined(backward).jaxpr
    makers = {v: one for one in jaxpr.eqns for v in one.outvars}
    moves: list[core.JaxprEqn] = []
    at = jaxpr.outvars[0]
    while at in makers and moves_entries(makers[at]):
        moves.append(makers[at])
        at = makers[at].invars[0]
    product = makers.get(at)
    if product is None or product.primitive.name != "dot_general" or jaxpr.constvars:
        return None
    dy, *inputs = jaxpr.invars
    needed = needed_equations(jaxpr, product.invars)
    read = {v for one in [*needed, product] for v in one.invars if isinstance(v, core.Var)}
    entering = [v for i, v in enumerate(inputs) if i != operand]
    if inputs[operand] in read or any(isinstance(v, core.Literal) for v in product.invars):
        return None
    factors = core.ClosedJaxpr(jaxpr.replace(eqns=needed, outvars=list(product.invars)), ())
    if not _is_told_apart(factors, dy):
        return None
    return _Product(
        eqn=product,
        factors=as_function(needed, [dy, *entering], product.invars),
        moved=as_function(moves[::-1], [at], jaxpr.outvars),
    )


def _is_told_apart(factors: core.ClosedJaxpr, dy: core.Var) -> bool:
    """Tell whether one factor does not depend on dy, and the other is linear in dy."""
    one, other = linear_in(factors.jaxpr, [v is dy for v in factors.jaxpr.invars])
    return {one, other} == {True, None}


def _factors(
    site: Site, entered: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[_Product, dense.Factors]:
    product = _product(site.eqn, site.operand)
    assert product is not None  # else `takes` would have refused the equation
    run = product.factors
    for _ in range(site.sample_axis + 1):
        run = jax.vmap(run)
    left, right = run(dy, *entered)
    axes = product_axes(product.eqn, 0)
    layered, steps = site.scan_axes

    def arranged(array: jax.Array, *axes_of_step: list[int]) -> jax.Array:
        blocks, rows, columns = dense.behind_samples(site, axes_of_step)
        return dense.in_groups(array, layered, [site.sample_axis], blocks, steps + rows, columns)

    return product, dense.Factors(
        arranged(left, axes.w_blocks, axes.w_contracted, axes.w_free),
        arranged(right, axes.x_blocks, axes.x_contracted, axes.x_free),
    )
