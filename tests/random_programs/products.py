"""Draw products of data and a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.random_programs.draft import Draft, Rule
from tests.random_programs.program import FREE, MOST_ENTRIES, MOVED, Run, Shape, Step


def _matched(d: Draft, one: Shape, other: Shape) -> list[tuple[int, int]]:
    """Draw pairs of axes of equal length, at least one if there is one."""
    pairs: list[tuple[int, int]] = []
    for i in d.shuffled(range(len(one))):
        taken = {j for _, j in pairs}
        free = [j for j, size in enumerate(other) if size == one[i] and j not in taken]
        if free and (not pairs or d.chance(0.5)):
            pairs.append((i, d.choose(free)))
    return pairs


def dot(d: Draft) -> Step:
    x = d.data(1)
    w = d.weight_sharing(d.shape_of(x))
    pairs = _matched(d, d.shape_of(x), d.shape_of(w))
    contracted = [pair for pair in pairs if d.chance(0.75)]
    batched = [pair for pair in pairs if pair not in contracted]
    swapped, dtype = d.chance(0.5), d.common_dtype(x, w)
    preferred = d.choose([None, jnp.float32]) if dtype == jnp.bfloat16 else None
    dims = tuple(
        tuple(tuple(pair[1 - k if swapped else k] for pair in part) for k in (0, 1))
        for part in (contracted, batched)
    )
    finish = d.bounded(math.prod(d.shape_of(x)[i] for i, _ in contracted))

    def run(x: Any, w: Any) -> Any:
        x, w = (lax.convert_element_type(array, dtype) for array in (x, w))
        one, other = (w, x) if swapped else (x, w)
        return finish(lax.dot_general(one, other, dims, preferred_element_type=preferred))  # pyright: ignore

    return Step("dot", (x, w), run, f"{dims} weight {'left' if swapped else 'right'} {dtype}")


def matmul(d: Draft) -> Step:
    x = d.data(1)
    size = d.shape_of(x)[-1]
    batch = d.shape_of(x)[:-2] if d.chance(0.3) else ()
    w, finish = d.weight((*batch, size, d.size())), d.bounded(size)
    return Step("matmul", (x, w), lambda x, w: finish(x @ w))


def einsum(d: Draft) -> Step:
    x = d.data(1)
    others = [d.weight_sharing(d.shape_of(x))]
    if d.chance(0.25):
        others.append(d.data(1, 2) if d.chance(0.5) else d.weight_sharing(d.shape_of(x)))
    names = d.shuffled([x, *others])
    sizes: dict[str, int] = {}
    terms = [_subscripts(d, d.shape_of(name), sizes) for name in names]
    limit = MOST_ENTRIES
    out = []
    for letter in d.shuffled(sizes):
        if d.chance(0.4) and sizes[letter] <= limit and len(out) < 4:
            out.append(letter)
            limit //= sizes[letter]
    spec = f"{','.join(terms)}->{''.join(out)}"
    finish = d.bounded(math.prod(size for letter, size in sizes.items() if letter not in out))
    return Step("einsum", tuple(names), lambda *a: finish(jnp.einsum(spec, *a)), spec)


def _subscripts(d: Draft, shape: Shape, sizes: dict[str, int]) -> str:
    term = ""
    for size in shape:
        # Rarely a letter twice in one term, which takes a diagonal.
        known = [
            k for k, length in sizes.items() if length == size and (k not in term or d.chance(0.1))
        ]
        letter = d.choose(known) if known and d.chance(0.8) else "abcdefghijklmnop"[len(sizes)]
        sizes.setdefault(letter, size)
        term += letter
    return term


def attention(d: Draft) -> Step:
    x = d.data(2, 2)
    dim, heads, size = d.shape_of(x)[1], d.integer(1, 3), d.integer(1, 3)
    kernels = [d.weight((dim, heads, size)) for _ in range(3)]
    last = d.weight((heads, size, d.size()))
    bias = d.chance(0.2)
    causal = d.chance(0.5)

    def run(x: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
        q, k, v = (jnp.einsum("td,dhe->hte", x, w) * dim**-0.5 for w in (q, k, v))
        scores = jnp.einsum("hte,hse->hts", q, k) * size**-0.5
        if causal:
            scores = jnp.where(np.tri(x.shape[0], dtype=bool), scores, -30.0)
        values = jnp.einsum("hts,hse->the", jax.nn.softmax(scores), v)
        return jnp.einsum("the,hed->td", values, o) * (heads * size) ** -0.5 + bias

    return Step("attention", (x, *kernels, last), run, f"causal={causal}")


def convolution(d: Draft) -> Step:
    spatial = d.integer(1, 2)
    x = d.data(spatial + 1, spatial + 2)
    shape = d.shape_of(x)
    has_images = len(shape) == spatial + 2
    shape = shape if has_images else (1, *shape)
    rank = spatial + 2
    lhs = tuple([*d.shuffled(range(rank))] if has_images else [0, *d.shuffled(range(1, rank))])
    rhs, out = (tuple(d.shuffled(range(rank))) for _ in range(2))
    images, channels, *sizes = (shape[axis] for axis in lhs)
    groups = d.choose([g for g in range(1, channels + 1) if channels % g == 0])
    by_images = images if groups == 1 and images > 1 and d.chance(0.1) else 1
    kernel = tuple(d.integer(1, 3) for _ in range(spatial))
    stride, dilation, lhs_dilation = zip(*(_steps(d) for _ in sizes), strict=True)
    padding = [
        _padding(d, *each) for each in zip(sizes, kernel, dilation, lhs_dilation, strict=True)
    ]
    num_out = groups * by_images * d.integer(1, 3)
    if d.mixture != "float64":
        # In float32 XLA's CPU backend reads outside the image if it is cropped and each group has
        # one channel on both sides, as in gradients of depthwise convolutions: any gradient is
        # wrong.
        padding = [(max(low, 0), max(high, 0)) for low, high in padding]
    own = (num_out, channels // groups, *kernel)
    laid_out = [0] * rank
    for size, axis in zip(own, rhs, strict=True):
        laid_out[axis] = size
    w = d.weight(tuple(laid_out))
    dtype, finish = d.common_dtype(x, w), d.bounded(math.prod(own[1:]))

    def run(x: Any, w: Any) -> Any:
        y = lax.conv_general_dilated(
            (x if has_images else x[None]).astype(dtype),
            w.astype(dtype),
            stride,
            padding,
            lhs_dilation,
            dilation,
            lax.ConvDimensionNumbers(lhs, rhs, out),
            feature_group_count=groups,
            batch_group_count=by_images,
        )
        return finish(y)

    details = (
        f"{stride=} {padding=} {lhs_dilation=} {dilation=} {lhs=} {rhs=} {out=} {groups=} "
        f"batch_groups={by_images} {dtype}"
    )
    return Step("convolution", (x, w), run, details)


def _steps(d: Draft) -> Sequence[int]:
    """Draw a stride, a kernel dilation and an image dilation; at most one of them exceeds 1."""
    # XLA aborts on some gradients of convolutions with several.
    return d.shuffled((1, 1, d.choose([1, 2, 3])))


def _padding(d: Draft, size: int, kernel: int, dilation: int, lhs_dilation: int) -> tuple[int, int]:
    low = d.integer(-1, 2)
    missing = (kernel - 1) * dilation + 1 - ((size - 1) * lhs_dilation + 1) - low
    return (low, max(missing, d.integer(-1, 2)))


def _finite_fill(d: Draft) -> dict[str, Any]:
    mode = d.choose(["clip", "fill", "wrap"])
    return {"mode": mode, "fill_value": d.choose([0.0, 0.5])} if mode == "fill" else {"mode": mode}


def take(d: Draft) -> Step:
    i, w = d.indices(), d.some_weight(MOVED)
    axis, options = d.integer(0, len(d.shape_of(w)) - 1), _finite_fill(d)
    finish = d.bounded(1)
    return Step(
        "take",
        (i, w),
        lambda i, w: finish(jnp.take(w, i, axis=axis, **options)),
        f"{axis=} {options}",
    )


def one_hot(d: Draft) -> Step:
    i, w = d.indices(), d.some_weight(MOVED)
    size = d.shape_of(w)[0]
    return Step(
        "one_hot",
        (i, w),
        lambda i, w: lax.tanh(jnp.tensordot(jax.nn.one_hot(i, size, dtype=w.dtype), w, 1)),
    )


# Other ways of indexing, by a scalar k and indices i and j of any shape.
LOOK_UPS: dict[str, Run] = {
    "two axes": lambda k, i, j, w: w.at[i, jnp.min(j)].get(mode="clip"),
    "two axes, filled": lambda k, i, j, w: w.at[i, k].get(mode="fill", fill_value=0),
    "entries": lambda k, i, j, w: w[jnp.mod(i, 2), ..., jnp.mod(k, w.shape[-1])],
    "windows": lambda k, i, j, w: jax.vmap(
        lambda start: lax.dynamic_slice_in_dim(w, start, (w.shape[0] + 1) // 2)
    )(jnp.ravel(i)),
    "windows of columns": lambda k, i, j, w: jax.vmap(
        lambda start: lax.dynamic_slice_in_dim(w, start, 1, axis=-1), out_axes=-1
    )(jnp.ravel(j)),
    "one row": lambda k, i, j, w: lax.dynamic_index_in_dim(w, k, 0, keepdims=False),
    "one column": lambda k, i, j, w: lax.dynamic_index_in_dim(w, k, 1),
    "along an axis": lambda k, i, j, w: jnp.take_along_axis(
        w, jnp.full((2, *w.shape[1:]), jnp.mod(k, w.shape[0])), 0
    ),
    "of each row": lambda k, i, j, w: jax.vmap(lambda row: jnp.take(row, i, 0, mode="clip"))(w),
    "one of each row": lambda k, i, j, w: jax.vmap(lambda row, k: row[k], in_axes=(0, None))(
        w, jnp.mod(k, w.shape[1])
    ),
    "of a flat table": lambda k, i, j, w: jnp.ravel(w)[jnp.mod(i * k, w.size)],
}


def look_up(d: Draft) -> Step:
    w, (name, run) = d.some_weight(MOVED, 2), d.choose([*LOOK_UPS.items()])
    return Step("look_up", (d.scalar_index(), d.indices(), d.indices(), w), run, name)


def tied(d: Draft) -> Step:
    """Draw a table that is used for look-ups and as the output matrix."""
    i, w = d.indices(), d.some_weight(MOVED, 2, 2)
    width, options = d.shape_of(w)[1], _finite_fill(d)

    def run(i: Any, w: Any) -> Any:
        hidden = lax.tanh(jnp.take(w, i, axis=0, **options))
        return jax.nn.log_softmax(hidden @ w.T * width**-0.5) / 2

    return Step("tied", (i, w), run, str(options))


def recurrent(d: Draft) -> Step:
    x = d.data(2, 2)
    inputs, units = d.shape_of(x)[1], d.integer(1, 4)
    w, u = d.weight((inputs, units)), d.weight((units, units))
    start = d.weight((units,), FREE)
    from_parameter, reverse = d.chance(0.4), d.chance(0.3)

    def run(x: Any, w: Any, u: Any, start: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            state = lax.tanh(row @ w * inputs**-0.5 + state @ u * units**-0.5).astype(start.dtype)
            return state, state

        first = start if from_parameter else jnp.zeros_like(start)
        return lax.scan(step, first, x, reverse=reverse)[1]

    return Step("recurrent", (x, w, u, start), run, f"{from_parameter=} {reverse=}")


def low_rank(d: Draft) -> Step:
    """Draw x (frozen + A B), in both orders of the products."""
    x = d.data(1)
    size, rank, out = d.shape_of(x)[-1], d.integer(1, 2), d.size()
    a, b = d.weight((size, rank)), d.weight((rank, out))
    frozen, apart = d.normal((size, out), np.float32), d.chance(0.5)

    def run(x: Any, a: Any, b: Any) -> Any:
        known = jnp.asarray(frozen, a.dtype)
        y = x @ known + (x @ a) @ b if apart else x @ (known + a @ b)
        return lax.tanh(y * size**-0.5)

    return Step("low_rank", (x, a, b), run, f"{apart=}")


PRODUCTS: dict[Rule, float] = {
    dot: 5,
    matmul: 2,
    einsum: 3,
    attention: 0.4,
    convolution: 3,
    take: 2,
    one_hot: 0.7,
    look_up: 1.5,
    tied: 0.7,
    recurrent: 0.5,
    low_rank: 0.7,
}
