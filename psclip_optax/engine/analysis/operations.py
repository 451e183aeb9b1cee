"""Describe the axes of an operation y = op(W, x), for all analyses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from psclip_optax.engine.analysis.views import aval

# Elementwise operations: each entry of the result depends only on the same entry of the operands.
ELEMENTWISE = (
    *("abs", "add", "add_any", "cbrt", "clamp", "convert_element_type", "copy", "cos", "div"),
    *("erf", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "max", "min"),
    *("mul", "neg", "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square"),
    *("sub", "tanh"),
)


class ProductAxes(NamedTuple):
    """The axes of W, x and y in a dot_general: blocks, contracted, free in x, free in W.

    Corresponding axes have the same index in their lists: `w_blocks[i]` is `y_blocks[i]`.
    """

    w_blocks: list[int]
    x_blocks: list[int]
    y_blocks: list[int]
    w_contracted: list[int]
    x_contracted: list[int]
    x_free: list[int]
    y_x_free: list[int]
    w_free: list[int]
    y_w_free: list[int]

    @property
    def leaving(self) -> dict[int, int]:
        """Return, for each axis of W that is also an axis of y, the axis of y."""
        in_w, in_y = [*self.w_blocks, *self.w_free], [*self.y_blocks, *self.y_w_free]
        return dict(zip(in_w, in_y, strict=True))

    def sorted_by(self, key: Sequence[int]) -> ProductAxes:
        """Sort block, contracted and free axes, each by the key of W's axis."""
        w_blocks, x_blocks, y_blocks = _sorted(key, self.w_blocks, self.x_blocks, self.y_blocks)
        w_contracted, x_contracted = _sorted(key, self.w_contracted, self.x_contracted)
        w_free, y_w_free = _sorted(key, self.w_free, self.y_w_free)
        return ProductAxes(
            w_blocks=w_blocks,
            x_blocks=x_blocks,
            y_blocks=y_blocks,
            w_contracted=w_contracted,
            x_contracted=x_contracted,
            x_free=self.x_free,
            y_x_free=self.y_x_free,
            w_free=w_free,
            y_w_free=y_w_free,
        )


def _sorted(key: Sequence[int], first: Sequence[int], *others: Sequence[int]) -> list[list[int]]:
    order = sorted(range(len(first)), key=lambda i: key[first[i]])
    return [[axes[i] for i in order] for axes in (first, *others)]


def product_axes(eqn: core.JaxprEqn, operand: int) -> ProductAxes:
    """Find the axes of a dot_general, given the index of the operand that is W."""
    contracted, blocks = eqn.params["dimension_numbers"]
    w, x = operand, 1 - operand
    free = [
        [axis for axis in range(aval(atom).ndim) if axis not in (*contracted[i], *blocks[i])]
        for i, atom in enumerate(eqn.invars)
    ]
    starts = (len(blocks[0]), len(blocks[0]) + len(free[0]))
    in_y = [[start + i for i in range(len(axes))] for start, axes in zip(starts, free, strict=True)]
    return ProductAxes(
        w_blocks=list(blocks[w]),
        x_blocks=list(blocks[x]),
        y_blocks=list(range(len(blocks[w]))),
        w_contracted=list(contracted[w]),
        x_contracted=list(contracted[x]),
        x_free=free[x],
        y_x_free=in_y[x],
        w_free=free[w],
        y_w_free=in_y[w],
    )


def convolution_leaving(eqn: core.JaxprEqn) -> dict[int, int]:
    """Return, for each axis of a convolution's kernel that is also an axis of y, the axis of y."""
    dims = eqn.params["dimension_numbers"]
    return {dims.rhs_spec[0]: dims.out_spec[1]}
