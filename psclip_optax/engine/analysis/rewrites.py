"""Rewrite a loss to avoid computing weights from parameters: x (A B) as (x A) B.

W may be a sum, a product of two matrices, or scaled along axes of the operation's output. Then the
operation is applied to the parts of W: x (g v / ‖v‖) is x v, scaled afterwards. And a slice of one
row at an index that depends on data becomes a look-up. So the parameters themselves meet data, in
operations with fast routes. The function and its gradient are the same up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.arrays import is_narrow
from psclip_optax.engine.analysis.equations import body_parameter
from psclip_optax.engine.analysis.operations import convolution_leaving, product_axes
from psclip_optax.engine.analysis.sites import OfParameters, Role, Usage
from psclip_optax.engine.analysis.views import Path, aval, run_equation

_Read: TypeAlias = Callable[[Any], Any]


class _Product(NamedTuple):
    """A product without blocks: its axes that contract W with x, and x's other axes in y.

    Attributes:
      x: the variable or literal with which W is multiplied.
      contracted: for each contracted axis of W, the axis of x.
      leaving: for each axis of x that is also an axis of y, the axis of y.
      precision: the precision of the product.
    """

    x: Any
    contracted: dict[int, int]
    leaving: dict[int, int]
    precision: Any


class _Use(NamedTuple):
    """An operation y = op(W, x), linear in W.

    Attributes:
      apply: a function from (a function that reads variables, W) to y.
      leaving: for each axis of W that is also an axis of y, the axis of y.
      product: the operation as a product, if it is a product without blocks.
      ndim: the number of y's axes.
    """

    apply: Callable[[_Read, Any], Any]
    leaving: dict[int, int]
    product: _Product | None
    ndim: int


Expanded: TypeAlias = Callable[[_Read], Any]


class _Scope(NamedTuple):
    """Holds the variables of one jaxpr: the equations that compute them, and their roles."""

    makers: dict[core.Var, core.JaxprEqn]
    roles: dict[core.Var, Role]
    num_leaves: int

    def maker(self, atom: Any) -> core.JaxprEqn | None:
        return None if isinstance(atom, core.Literal) else self.makers.get(atom)

    def is_plain(self, atom: Any) -> bool:
        """Tell whether an atom is a view of a parameter, or does not depend on parameters."""
        role = None if isinstance(atom, core.Literal) else self.roles.get(atom)
        if not isinstance(role, OfParameters):
            return True
        return role.view is not None and role.view.weight < self.num_leaves


def rewritten(closed: core.ClosedJaxpr, usage: Usage) -> core.ClosedJaxpr:
    """Decompose a loss's operations on computed weights, as far as there are rules.

    Args:
      closed: the loss for one example.
      usage: what becomes of the parameters in it.
    """
    if not usage.to_rewrite:
        return closed
    return closed.replace(jaxpr=_rewrite(closed.jaxpr, usage, ()))


def _rewrite(jaxpr: core.Jaxpr, usage: Usage, path: Path) -> core.Jaxpr:
    inside = [p for p in usage.to_rewrite if p[: len(path)] == path]
    if not inside:
        return jaxpr
    makers = {variable: eqn for eqn in jaxpr.eqns for variable in eqn.outvars}
    scope = _Scope(makers, usage.roles[path], usage.num_leaves)
    eqns = list(jaxpr.eqns)
    for i in {p[len(path)] for p in inside}:
        here = (*path, i)
        if here in usage.to_rewrite:
            eqns[i] = _rewrite_equation(eqns[i], usage.to_rewrite[here], scope)
        else:
            eqns[i] = _rewrite_inside(eqns[i], usage, here)
    return jaxpr.replace(eqns=eqns)


def _rewrite_inside(eqn: core.JaxprEqn, usage: Usage, path: Path) -> core.JaxprEqn:
    body = body_parameter(eqn)
    inner = eqn.params[body]
    if isinstance(inner, core.ClosedJaxpr):
        new: Any = inner.replace(jaxpr=_rewrite(inner.jaxpr, usage, path))
    else:
        new = _rewrite(inner, usage, path)
    return eqn.replace(params=eqn.params | {body: new})


def _rewrite_equation(eqn: core.JaxprEqn, operand: int, scope: _Scope) -> core.JaxprEqn:
    expanded = _form(eqn, operand, scope)
    if expanded is None:
        return eqn
    inputs = _inputs(expanded)
    out = aval(eqn.outvars[0])

    def run(*values: Any) -> Any:
        known = dict(zip(inputs, values, strict=True))
        return expanded(known.__getitem__).astype(out.dtype)

    shapes = [meshes.shape_of_type(aval(v)) for v in inputs]
    call = jax.make_jaxpr(jax.jit(run))(*shapes).jaxpr.eqns[0]
    inner = call.params["jaxpr"]
    sourced = [inside.replace(source_info=eqn.source_info) for inside in inner.jaxpr.eqns]
    params = call.params | {"jaxpr": inner.replace(jaxpr=inner.jaxpr.replace(eqns=sourced))}
    return call.replace(
        invars=inputs, outvars=eqn.outvars, params=params, source_info=eqn.source_info
    )


def _form(eqn: core.JaxprEqn, operand: int, scope: _Scope) -> Expanded | None:
    if eqn.primitive.name == "dynamic_slice":
        return _looked_up(eqn)
    use_of = _USES.get(eqn.primitive.name)
    return use_of and _expand(use_of(eqn, operand), eqn.invars[operand], scope)


def _looked_up(eqn: core.JaxprEqn) -> Expanded | None:
    """Express a slice of one row, at an index that depends on data, as the look-up of a row."""
    table, *starts = eqn.invars
    shape, sizes = aval(table).shape, tuple(eqn.params["slice_sizes"])
    axes = [axis for axis, size in enumerate(shape) if sizes[axis] != size]
    if len(axes) != 1 or sizes[axes[0]] != 1:
        return None
    dims = lax.GatherDimensionNumbers(tuple(range(len(shape))), (), tuple(axes))

    def expanded(read: _Read) -> Any:
        index = jnp.asarray(_value(read, starts[axes[0]]))[None]
        return lax.gather(_value(read, table), index, dims, sizes, mode="clip")

    return expanded


def _inputs(expanded: Expanded) -> list[core.Var]:
    """Find the variables that an expanded operation reads."""
    inputs: dict[core.Var, None] = {}

    def read(variable: core.Var) -> jax.Array:
        inputs[variable] = None
        zeros = jnp.zeros(aval(variable).shape, aval(variable).dtype)
        return meshes.varying(zeros, meshes.axes_of_type(aval(variable)))

    jax.eval_shape(lambda: expanded(read))
    return list(inputs)


# Describe the operations


def _of_product(eqn: core.JaxprEqn, operand: int) -> _Use:
    axes, precision = product_axes(eqn, operand), eqn.params["precision"]
    pairs = dict(zip(axes.w_contracted, axes.x_contracted, strict=True))
    leaving_of_x = dict(zip(axes.x_free, axes.y_x_free, strict=True))
    product = _Product(eqn.invars[1 - operand], pairs, leaving_of_x, precision)
    # Between two products, a sum in a wider dtype would be rounded.
    product = product if not axes.w_blocks and _have_one_dtype(eqn) else None
    return _Use(_applied(eqn, operand), axes.leaving, product, _ndim(eqn))


def _have_one_dtype(eqn: core.JaxprEqn) -> bool:
    return len({aval(atom).dtype for atom in (*eqn.invars, *eqn.outvars)}) == 1


def _of_convolution(eqn: core.JaxprEqn, operand: int) -> _Use:
    return _Use(_applied(eqn, operand), convolution_leaving(eqn), None, _ndim(eqn))


def _ndim(eqn: core.JaxprEqn) -> int:
    return aval(eqn.outvars[0]).ndim


def _applied(eqn: core.JaxprEqn, operand: int) -> Callable[[_Read, Any], Any]:
    def apply(read: _Read, w: Any) -> Any:
        operands = [w if i == operand else _value(read, a) for i, a in enumerate(eqn.invars)]
        (y,) = run_equation(eqn, operands)
        return y

    return apply


def _value(read: _Read, atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else read(atom)


_USES = {"dot_general": _of_product, "conv_general_dilated": _of_convolution}


# Expand the cases of W


def _expand(use: _Use, atom: Any, scope: _Scope) -> Expanded | None:
    """Apply an operation to the parts of W; None if there is no rule for a part."""
    maker, expanded = scope.maker(atom), None
    if maker is not None and maker.primitive.name in _RULES:
        expanded = _RULES[maker.primitive.name](use, maker, scope)
    if expanded is None and scope.is_plain(atom):
        return lambda read: use.apply(read, _value(read, atom))
    return expanded


def _transposed(use: _Use, maker: core.JaxprEqn, scope: _Scope) -> Expanded | None:
    permutation = maker.params["permutation"]
    product = use.product and use.product._replace(
        contracted={permutation[w]: x for w, x in use.product.contracted.items()}
    )
    before = _Use(
        lambda read, w: use.apply(read, lax.transpose(w, permutation)),
        {permutation[w]: y for w, y in use.leaving.items()},
        product,
        use.ndim,
    )
    return _expand(before, maker.invars[0], scope)


def _cast(use: _Use, maker: core.JaxprEqn, scope: _Scope) -> Expanded | None:
    (atom,), dtype = maker.invars, aval(maker.outvars[0]).dtype
    is_real = all(jnp.issubdtype(one, jnp.floating) for one in (dtype, aval(atom).dtype))
    if not is_real or is_narrow(dtype) or is_narrow(aval(atom).dtype):
        return None
    before = use._replace(apply=lambda read, w: use.apply(read, w.astype(dtype)))
    return _expand(before, atom, scope)


def _negated(use: _Use, maker: core.JaxprEqn, scope: _Scope) -> Expanded | None:
    expanded = _expand(use, maker.invars[0], scope)
    return None if expanded is None else lambda read: -expanded(read)


def _added(use: _Use, maker: core.JaxprEqn, scope: _Scope) -> Expanded | None:
    shape = aval(maker.outvars[0]).shape
    if any(aval(atom).shape != shape for atom in maker.invars):
        return None
    one, other = (_expand(use, atom, scope) for atom in maker.invars)
    if one is None or other is None:
        return None
    if maker.primitive.name == "sub":
        return lambda read: one(read) - other(read)
    return lambda read: one(read) + other(read)


def _scaled(use: _Use, maker: core.JaxprEqn, scope: _Scope) -> Expanded | None:
    divides, shape = maker.primitive.name == "div", aval(maker.outvars[0]).shape
    for core_of, scale_of in ((0, 1),) if divides else ((0, 1), (1, 0)):
        if aval(maker.invars[core_of]).shape != shape:  # a number, or a broadcast array
            continue
        scale = _scale(use, maker.invars[scale_of], scope)
        expanded = scale and _expand(use, maker.invars[core_of], scope)
        if scale is None or expanded is None:
            continue
        return _times(expanded, scale, divides)
    return None


def _times(expanded: Expanded, scale: Expanded, divides: bool) -> Expanded:
    if divides:
        return lambda read: expanded(read) / scale(read)
    return lambda read: expanded(read) * scale(read)


def _scale(use: _Use, atom: Any, scope: _Scope) -> Expanded | None:
    """Turn a scale of W into a scale of y; None unless it varies only along axes that y has."""
    maker = scope.maker(atom)
    places: Sequence[int] = range(aval(atom).ndim)
    if maker is not None and maker.primitive.name == "broadcast_in_dim":
        atom, places = maker.invars[0], maker.params["broadcast_dimensions"]
    over = {w: axis for axis, w in enumerate(places) if aval(atom).shape[axis] > 1}
    if not over.keys() <= use.leaving.keys():
        return None
    in_y = {use.leaving[w]: axis for w, axis in over.items()}
    order = [in_y[axis] for axis in sorted(in_y)]
    repeated = [axis for axis in range(use.ndim) if axis not in in_y]

    def scale(read: _Read) -> Any:
        value = jnp.asarray(_value(read, atom))
        ones = [axis for axis in range(value.ndim) if axis not in order]
        value = jnp.squeeze(value.transpose([*order, *ones]), range(len(order), value.ndim))
        return jnp.expand_dims(value, repeated)

    return scale


def _multiplied(use: _Use, maker: core.JaxprEqn, scope: _Scope) -> Expanded | None:
    """Multiply x by A or B, whichever it contracts with, and then by the other."""
    contracted, blocks = maker.params["dimension_numbers"]
    product, operands = use.product, maker.invars
    if product is None or blocks[0] or not _have_one_dtype(maker):
        return None
    if not all(map(scope.is_plain, operands)):
        return None
    free = [
        [axis for axis in range(aval(atom).ndim) if axis not in contracted[i]]
        for i, atom in enumerate(operands)
    ]
    bounds = (range(len(free[0])), range(len(free[0]), len(free[0]) + len(free[1])))
    first = next((i for i in (0, 1) if set(bounds[i]) == product.contracted.keys()), None)
    sizes = [math.prod(aval(atom).shape) for atom in operands]
    if first is None or sum(sizes) > aval(maker.outvars[0]).size:
        return None
    second = 1 - first
    into_x = [product.contracted[axis] for axis in bounds[first]]
    num_left = aval(product.x).ndim - len(into_x)
    num_inner = len(contracted[first])
    # Sorted, these are y's axes: the remaining axes of x, and the free axes of the second factor.
    places = [product.leaving[axis] for axis in sorted(product.leaving)]
    places += [use.leaving[axis] for axis in bounds[second]]

    def expanded(read: _Read) -> Any:
        x, one, other = (
            _value(read, atom) for atom in (product.x, operands[first], operands[second])
        )
        dot = functools.partial(lax.dot_general, precision=product.precision)
        inner = dot(x, one, ((into_x, free[first]), ((), ())))
        # The inner product's last axes are the contracted axes of A in ascending order.
        ascending = sorted(range(num_inner), key=contracted[first].__getitem__)
        theirs = [contracted[second][i] for i in ascending]
        mine = list(range(num_left, num_left + num_inner))
        y = dot(inner, other, ((mine, theirs), ((), ())))
        return y.transpose(sorted(range(len(places)), key=places.__getitem__))

    return expanded


_RULES: dict[str, Callable[[_Use, core.JaxprEqn, _Scope], Expanded | None]] = {
    "transpose": _transposed,
    "convert_element_type": _cast,
    "neg": _negated,
    "add": _added,
    "sub": _added,
    "mul": _scaled,
    "div": _scaled,
    "dot_general": _multiplied,
}
