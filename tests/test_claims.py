"""Check the analyses' claims about jaxprs numerically, on random programs.

Each analysis may answer that it does not know. A claim must be true.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from psclip_optax.engine.analysis import views
from psclip_optax.engine.analysis.computed import is_radial, separable_axes
from psclip_optax.engine.analysis.equations import CALLS
from psclip_optax.engine.plan import plan_weights
from tests.numerics import enable_x64

NUM_PROGRAMS, NUM_STEPS = 150, 6
SHAPE = (3, 4)

# Functions from a pool of arrays to a new array, drawn with a generator.


def elementwise(rng, pool):
    ops = [jnp.tanh, jnp.abs, jnp.square, jnp.exp, lambda a: -a, lambda a: a * 2, jnp.sign]
    ops += [lambda a: a**2, lambda a: 1 / (1 + a**2), lambda a: a - 0.3, lambda a: a * a, jnp.sqrt]
    ops += [lambda a: a.astype(jnp.float32), lambda a: lax.stop_gradient(a) * a]
    return rng.choice(np.array(ops, object))(pick(rng, pool))


def of_two(rng, pool):
    ops = [jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, lambda a, b: a / (1.5 + b * b)]
    ops += [lambda a, b: jnp.where(a > 0, a, b)]
    one = pick(rng, pool)
    others = [a for a in pool if a.shape == one.shape]
    return rng.choice(np.array(ops, object))(one, pick(rng, others))


def with_constant(rng, pool):
    a = pick(rng, pool)
    return a - jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)


def summed(rng, pool):
    a = pick(rng, pool)
    axes = tuple(i for i in range(a.ndim) if rng.random() < 0.6)
    reduce = rng.choice(np.array([jnp.sum, jnp.mean, jnp.max, jnp.linalg.norm, jnp.var], object))
    if reduce is jnp.linalg.norm and rng.random() < 0.5:
        axes = (0,)
    if reduce is jnp.linalg.norm:
        return jnp.sqrt(jnp.sum(a * a, axis=axes, keepdims=True))
    return reduce(a, axis=axes, keepdims=bool(rng.random() < 0.7))


def broadcast(rng, pool):
    a = pick(rng, pool)
    return jnp.broadcast_to(a, SHAPE) if a.shape in ((1, 4), (3, 1), (4,), ()) else a


def moved(rng, pool):
    a = pick(rng, pool)
    ops = [
        lambda a: a.T,
        lambda a: a[None],
        lambda a: a.reshape(-1),
        lambda a: a[::-1] if a.ndim else a,
    ]
    ops += [lambda a: a.reshape(a.shape[::-1]), lambda a: jnp.concatenate([a.ravel(), a.ravel()])]
    return rng.choice(np.array(ops, object))(a)


def multiplied(rng, pool):
    a = pick(rng, pool)
    if a.ndim != 2:
        return a
    others = [b for b in pool if b.shape == a.shape]
    fixed = jnp.cos(jnp.arange(a.shape[1] ** 2, dtype=a.dtype)).reshape(a.shape[1], a.shape[1])
    ops = [lambda: a @ fixed, lambda: jnp.einsum("ij,ij->i", a, lax.stop_gradient(a) + 1)]
    ops += [lambda: jnp.einsum("ij,ij->i", a, pick(rng, others)), lambda: a @ a.T @ a]
    return rng.choice(np.array(ops, object))()


STEPS = [
    elementwise,
    elementwise,
    of_two,
    of_two,
    with_constant,
    summed,
    summed,
    broadcast,
    moved,
    multiplied,
]


def pick(rng, pool):
    return pool[rng.integers(len(pool))]


def random_function(seed):
    """Return a random function of one array, whose result is that of its last step."""

    def function(parameters):
        rng = np.random.default_rng(seed)
        (w,) = parameters
        pool = [w]
        for _ in range(rng.integers(1, NUM_STEPS)):
            pool.append(rng.choice(np.array(STEPS, object))(rng, pool))
        return [pool[-1].astype(w.dtype)]

    return function


W = np.random.default_rng(7).normal(size=SHAPE)


def pulled(function, *cotangents):
    pull_back = lambda w, c: jax.vjp(function, [w])[1]([c])[0][0]
    return np.asarray(jax.jit(jax.vmap(pull_back, (None, 0)))(W, np.stack(cotangents)))


def test_separable_and_radial_claims_are_so():
    claimed = {"separable": 0, "radial": 0}
    with enable_x64(True):
        kinds = [jax.ShapeDtypeStruct(SHAPE, jnp.float64)]
        for seed in range(NUM_PROGRAMS):
            function = random_function(seed)
            axes = separable_axes(function, kinds, 0)
            (out,) = jax.eval_shape(function, kinds)
            c = np.random.default_rng(seed).normal(size=out.shape)
            if axes is None:
                continue
            claimed["separable"] += 1
            slope, got = pulled(function, np.ones_like(c), c)
            if not np.isfinite(slope).all():
                continue
            along = c.reshape([SHAPE[a] for a in axes])
            along = along.transpose(np.argsort(axes)) if axes else along
            spread = along.reshape([SHAPE[a] if a in axes else 1 for a in range(2)])
            np.testing.assert_allclose(got, slope * spread, rtol=1e-5, atol=1e-6, err_msg=str(seed))
            if is_radial(function, kinds, 0, axes):
                claimed["radial"] += 1
                ratio = slope / W
                others = tuple(a for a in range(2) if a not in axes)
                mean = ratio.mean(axis=others, keepdims=True)
                np.testing.assert_allclose(ratio, mean + 0 * ratio, rtol=1e-5, err_msg=str(seed))
    assert claimed["separable"] > 20
    assert claimed["radial"] >= 3


KNOWN_RADIAL = {
    "norm of columns": lambda w: jnp.sqrt(jnp.sum(w * w, axis=0)),
    "norm": lambda w: jnp.sqrt(jnp.sum(w**2)),
    "of absolutes": lambda w: jnp.sum(jnp.square(jnp.abs(w)), axis=1),
    "and then any function": lambda w: jnp.tanh(3 / (1 + jnp.sum(jnp.square(w), axis=0))),
}
NOT_RADIAL = {
    "from another point": lambda w: jnp.sum((w - 0.5) ** 2),
    "variance": jnp.var,
    "standard deviation": lambda w: jnp.std(w, axis=0),
    "fourth powers": lambda w: jnp.sum(jnp.square(w * w)),
    "of a function": lambda w: jnp.sum(jnp.square(jnp.tanh(w))),
    "twice": lambda w: jnp.sum(jnp.square(2 * w) * w),
    "of some": lambda w: jnp.sum(jnp.square(w[:2])),
    "of integers": lambda w: jnp.sum(jnp.square(w.astype(int))).astype(w.dtype),
    "weighted": lambda w: jnp.sum(jnp.square(w * jnp.arange(4.0))),
    "absolutes": lambda w: jnp.sum(jnp.abs(w)),
    "signed squares": lambda w: jnp.sum(w * jnp.abs(w)),
    "squares of squares": lambda w: jnp.sum(jnp.square(jnp.square(w))),
    "sums squared": lambda w: jnp.sum(jnp.square(jnp.sum(w, axis=0))),
}


@pytest.mark.parametrize("name", [*KNOWN_RADIAL, *NOT_RADIAL])
def test_radial_is_claimed_of_sums_of_squares_alone(name):
    function = {**KNOWN_RADIAL, **NOT_RADIAL}[name]
    w = jnp.asarray(W, jnp.float32)
    axes = {(4,): (1,), (3,): (0,)}.get(jax.eval_shape(function, w).shape, ())
    claims = is_radial(lambda p: [function(p[0])], [w], 0, axes)
    assert claims == (name in KNOWN_RADIAL)


# Views


def stepped(rng, a):
    """Draw one step of a view."""
    cut = lambda size: sorted(rng.integers(0, size + 1, 2))
    if a.ndim and a.size > 2 and rng.random() < 0.4:
        bounds = [cut(size) if rng.random() < 0.5 else (0, size) for size in a.shape]
        if all(stop > start for start, stop in bounds):
            strides = [int(rng.integers(1, 3)) for _ in bounds]
            return lax.slice(a, *zip(*bounds, strict=True), strides)
    ops = [
        lambda a: a.T,
        lambda a: a.reshape(-1),
        lambda a: a[None],
        lambda a: lax.rev(a, (0,)) if a.ndim else a,
    ]
    ops += [
        lambda a: a.astype(jnp.float32),
        lambda a: jnp.split(a, 2)[1] if a.ndim and a.shape[0] % 2 == 0 else a,
    ]
    ops += [lambda a: jnp.broadcast_to(a, (2, *a.shape)), lambda a: a.astype(jnp.float8_e5m2)]
    return rng.choice(np.array(ops, object))(a)


def random_view(seed, shape):
    def function(w):
        rng = np.random.default_rng(seed)
        for _ in range(rng.integers(1, 5)):
            w = stepped(rng, w)
        return w

    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return function, view_of(closed.jaxpr, shape)


def view_of(jaxpr, shape):
    view = views.View(0, (), (), tuple(range(len(shape))))
    known = {jaxpr.invars[0]: view}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS:
            return None
        outs = views.views_after(eqn, known.get(eqn.invars[0]))
        known.update(zip(eqn.outvars, outs or [None] * len(eqn.outvars), strict=True))
    return known[jaxpr.outvars[0]]


def test_views_move_entries_and_disjoint_ones_share_none():
    shape = (4, 6)
    entries = jnp.arange(1, 25, dtype=jnp.float32).reshape(shape)
    found, num_disjoint = [], 0
    for seed in range(300):
        function, view = random_view(seed, shape)
        if view is None:
            continue
        moved = np.asarray(function(entries)).ravel()
        is_each_once = len(set(moved)) == len(moved)
        assert is_each_once or view.is_repeated, seed
        assert set(moved) <= set(np.asarray(entries).ravel()), seed
        found.append((seed, set(moved), view))
    for i, (one_seed, one, view) in enumerate(found):
        for other_seed, other, other_view in found[:i]:
            if views.are_disjoint(view, other_view):
                num_disjoint += 1
                assert not one & other, (one_seed, other_seed)
            if view.frame == other_view.frame:
                assert one == other, (one_seed, other_seed)
    assert len(found) > 100
    assert num_disjoint > 20


# Weights side by side


def pieces(rng, w):
    options = [
        lambda w: w,
        lambda w: w.T,
        lambda w: w[:2],
        lambda w: w[2:],
        lambda w: w.reshape(2, -1),
    ]
    options += [
        lambda w: jnp.broadcast_to(w, (2, *w.shape)),
        lambda w: w.astype(jnp.float8_e4m3fn),
        lambda w: 2 * w,
    ]
    return rng.choice(np.array(options, object))(w).astype(w.dtype).ravel()


def test_joined_weights_hold_each_entry_once():
    num_joined = 0
    with enable_x64(True):
        for seed in range(NUM_PROGRAMS):

            def joined(p, seed=seed):
                rng = np.random.default_rng(seed)
                parts = [pieces(rng, p[rng.integers(3)]) for _ in range(rng.integers(1, 4))]
                return jnp.concatenate(parts)

            def loss(p, x, joined=joined):
                w = joined(p)
                return jnp.sum(jnp.tanh(x[:, : w.size] @ w))

            rng = np.random.default_rng(seed)
            p = [jnp.asarray(rng.normal(size=(4, 4))) for _ in range(3)]
            x = jnp.asarray(rng.normal(size=(3, 200)))
            plans = plan_weights(jax.make_jaxpr(lambda p, x: loss(p, x))(p, x), 3)
            for plan, one in zip(plans.others, plans.computed, strict=True):
                if plan.norm != "own":
                    continue
                num_joined += 1
                assert one.is_joined
                c = jnp.asarray(rng.normal(size=one.aval.shape))
                own = jax.vjp(joined, p)[1](c)[0]
                squares = sum(float(jnp.sum(jnp.square(leaf))) for leaf in own)
                assert math.isclose(squares, float(jnp.sum(c * c)), rel_tol=1e-9), seed
    assert num_joined > 10
