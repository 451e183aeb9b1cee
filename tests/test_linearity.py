"""Check claims that a rule is linear in its cotangent numerically."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from psclip_optax.engine.analysis.linearity import unproven_rule, with_cotangents
from tests import slow
from tests.numerics import assert_close, clipped_mean, enable_x64, in_all_modes


def with_rule(backward):
    """Return the identity with a custom derivative: backward(residual, cotangent)."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, x), lambda x, c: (backward(x, c),))
    return same


def dynamic_scale(x, c):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * jnp.cos(x)), (0, c))[1]


def in_scan(x, c):
    return lax.scan(
        lambda total, row: (total + row * x, total), jnp.zeros_like(c), jnp.stack([c, c])
    )[0]


LINEAR = {
    "straight through": lambda x, c: c,
    "reversed": lambda x, c: -c,
    "scaled": lambda x, c: 0.5 * c * x,
    "masked": lambda x, c: jnp.where(jnp.abs(x) < 1, c, 0),
    "masked, padded": lambda x, c: jnp.pad(c, ((0, 1), (0, 0)))[:-1],
    "as tanh": lambda x, c: c * (1 - jnp.tanh(x) ** 2),
    "product": lambda x, c: (c @ x.T) @ x,
    "mean": lambda x, c: jnp.broadcast_to(c.mean(0), c.shape),
    "cumulated": lambda x, c: jnp.cumsum(c, 0) - c,
    "sorted": lambda x, c: c[jnp.argsort(x[:, 0])],
    "scattered": lambda x, c: jnp.zeros_like(c).at[jnp.argsort(x[:, 0])].add(c),
    "half precision": lambda x, c: c.astype(jnp.bfloat16).astype(c.dtype) if c.dtype == jnp.float32 else c,
    "scan": in_scan,
    "while": dynamic_scale,
    "cond": lambda x, c: lax.cond(x.sum() > 0, lambda: 2 * c, lambda: jnp.zeros_like(c)),
    "jit": lambda x, c: jax.jit(lambda c: c * 3)(c),
    "remat": lambda x, c: jax.checkpoint(lambda c: c * x)(c),
    "relu of the input": lambda x, c: c * jax.nn.relu(x),
    "other rule inside": lambda x, c: with_rule(lambda _, d: jnp.sign(d))(c) * 2,
    "Fourier": lambda x, c: jnp.fft.ifft(jnp.fft.fft(c) * 2).real,
    "update": lambda x, c: lax.dynamic_update_slice(jnp.zeros_like(c), c[:1], (0, 0)),
    "zero": lambda x, c: jnp.zeros_like(c),
    "stopped": lambda x, c: c * lax.stop_gradient(x),
}  # fmt: skip
NOT_LINEAR = {
    "clipped": lambda x, c: jnp.clip(c, -0.1, 0.1),
    "sign": lambda x, c: jnp.sign(c),
    "normalised": lambda x, c: c / jnp.linalg.norm(c),
    "rounded": lambda x, c: jnp.round(c * 8) / 8,
    "float8": lambda x, c: c.astype(jnp.float8_e4m3fn).astype(c.dtype),
    "reduced precision": lambda x, c: lax.reduce_precision(c, 5, 2),
    "integers": lambda x, c: (c * 8).astype(int).astype(c.dtype),
    "absolute": lambda x, c: jnp.abs(c),
    "squared": lambda x, c: c * c,
    "one more": lambda x, c: c + 1,
    "constant": lambda x, c: jnp.ones_like(c),
    "weight decay": lambda x, c: c + 0.1 * x,
    "thresholded": lambda x, c: jnp.where(jnp.abs(c) > 0.1, c, 0),
    "sorted by itself": lambda x, c: jnp.sort(c, 0),
    "indexed by itself": lambda x, c: jnp.zeros_like(c).at[jnp.argmax(c[:, 0])].add(c[0]),
    "divides": lambda x, c: x / (1 + c),
    "jit": lambda x, c: jax.jit(lambda c: jnp.tanh(c))(c),
    "scan": lambda x, c: lax.scan(lambda t, row: (jnp.maximum(t, row), None), 0 * c, jnp.stack([c, c]))[0],
    "scan of products": lambda x, c: lax.scan(lambda t, row: (t * row, None), c, jnp.stack([c, c]))[0],
    "while": lambda x, c: lax.while_loop(lambda c: jnp.abs(c).max() > 0.1, lambda c: c / 2, c),
    "cond": lambda x, c: lax.cond(c.sum() > 0, lambda: 2 * c, lambda: c),
    "cond with a constant": lambda x, c: lax.cond(x.sum() > 0, lambda: jnp.ones_like(c), lambda: c),
    "callback": lambda x, c: jax.pure_callback(lambda c: np.clip(c, -0.1, 0.1), c, c, vmap_method="expand_dims"),
}  # fmt: skip


def is_proven(function, *arguments):
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return unproven_rule(jaxpr, [True] * len(jaxpr.invars), [True] * len(jaxpr.outvars)) is None


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def is_linear(rule):
    """Tell whether the rule maps linear combinations to linear combinations."""
    c, d = X[::-1] + 0.3, jnp.cos(X)
    both = [
        (rule(X, s * c + t * d), s * rule(X, c) + t * rule(X, d))
        for s, t in [(3, -5), (-1, 0.2), (0.05, -0.3)]
    ]
    return all(np.allclose(one, other, rtol=2e-2, atol=2e-2) for one, other in both)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_rules_are_proven(name):
    assert is_linear(LINEAR[name])
    assert is_proven(lambda x: jnp.sum(with_rule(LINEAR[name])(x)), X)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_other_rules_are_not(name):
    assert not is_linear(NOT_LINEAR[name])
    assert not is_proven(lambda x: jnp.sum(with_rule(NOT_LINEAR[name])(x)), X)


clip = with_rule(NOT_LINEAR["clipped"])


def test_a_rule_is_found_in_whatever_calls_it():
    assert not is_proven(jax.jit(clip), X)
    assert not is_proven(jax.checkpoint(lambda x: jnp.sin(clip(x))), X)
    assert not is_proven(lambda x: lax.scan(lambda c, r: (c + clip(r), None), x[0], x)[0], X)
    assert not is_proven(lambda x: lax.cond(x.sum() > 0, clip, jnp.sin, x), X)
    assert not is_proven(jax.vmap(clip), X)


def test_a_rule_that_no_cotangent_passes_does_not_count():
    assert is_proven(lambda x: x + lax.stop_gradient(clip(x) - x), X)
    assert is_proven(lambda x: x * clip(jnp.ones(3)), X)
    assert is_proven(lambda x: x * (clip(x) > 0), X)
    fp8 = lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype)
    assert is_proven(lambda x: x + lax.stop_gradient(fp8(x) - x), X)
    assert not is_proven(fp8, X)


def test_a_rule_of_forward_derivatives_is_traced_too():
    @jax.custom_jvp
    def rounded(x):
        return x

    rounded.defjvp(lambda p, t: (p[0], lax.reduce_precision(t[0], 5, 2)))
    assert not is_proven(rounded, X)
    assert is_proven(jax.nn.relu, X)
    assert is_proven(jax.nn.logsumexp, X)


def test_rules_of_linear_calls_and_of_optimized_remat_are_traced_too():
    def call(transpose):
        return lambda x: jax.custom_derivatives.linear_call(lambda _, x: 2 * x, transpose, (), x)

    assert is_proven(call(lambda _, c: 3 * c), X)
    assert not is_proven(call(lambda _, c: jnp.clip(c, -1, 1)), X)

    def optimized(rule):
        @jax.custom_vjp
        def same(x):
            return x

        same.defvjp(lambda x: (x, x), lambda x, c: (rule(x, c),), optimize_remat=True)
        return lambda x: jnp.sin(same(x))

    assert is_proven(optimized(LINEAR["scaled"]), X)
    assert not is_proven(optimized(NOT_LINEAR["clipped"]), X)


def test_a_rule_that_raises_is_not_proven():
    def refuse(x, c):
        raise ValueError("not now")

    assert not is_proven(with_rule(refuse), X)


def test_variables_behind_stop_gradient_have_no_cotangents():
    jaxpr = jax.make_jaxpr(lambda x, y: (x * lax.stop_gradient(y), y))(1.0, 2.0).jaxpr
    x, y = jaxpr.invars
    assert with_cotangents(jaxpr, [True, False]) >= {x}
    assert y not in with_cotangents(jaxpr, [True, False])
    assert y in with_cotangents(jaxpr, [False, True])


# Consequences for the clipped gradient


def dense(rule, p, x):
    return jnp.sum(jnp.tanh(x @ rule(p["w"])) ** 2)


def looked_up(rule, p, x):
    ids = (jnp.abs(x) * 3).astype(int)
    return jnp.sum(jnp.sin(rule(p["w"])[ids]) @ p["v"])


def convolved(rule, p, x):
    kernel = rule(p["w"]).T[:, None]
    y = lax.conv_general_dilated(x[:, :1].T[None], kernel, (1,), "SAME")
    return jnp.sum(jnp.tanh(y) ** 2)


def recurrent(rule, p, x):
    step = lambda h, r: (jnp.tanh(r @ p["w"] @ p["v"] + h @ rule(p["w"]) @ p["v"]),) * 2
    return jnp.sum(lax.scan(step, jnp.zeros(3), x)[1] ** 2)


def between(rule, p, x):
    for _ in range(3):
        x = rule(jax.checkpoint(lambda x: jnp.tanh(x @ p["w"] @ p["w"].T) * 2)(x))
    return jnp.sum(jnp.square(x @ p["w"]))


def only_of_parameters(rule, p, x):
    return jnp.sum(x @ p["w"]) ** 2 + jnp.sum(rule(p["w"]) ** 2)


def of_a_computed_weight(rule, p, x):
    return jnp.sum(jnp.tanh(x @ rule(jnp.sin(p["w"]) * 2)) ** 2) + jnp.sum(x @ p["w"])


LOSSES = [dense, looked_up, convolved, recurrent, between, only_of_parameters, of_a_computed_weight]
RULES = {
    "clipped": NOT_LINEAR["clipped"],
    "float8": NOT_LINEAR["float8"],
    "reversed": LINEAR["reversed"],
}


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("loss", "rule"), slow.diagonal(LOSSES, RULES))
def test_gradients_and_norms_are_those_of_vmap_of_grad(loss, rule):
    rule = with_rule(RULES[rule])
    with enable_x64(True):
        rng = np.random.default_rng(0)
        p = {"w": jnp.asarray(rng.normal(size=(3, 4))), "v": jnp.asarray(rng.normal(size=(4, 3)))}
        x = jnp.asarray(rng.normal(size=(5, 6, 3)))
        of_rule = functools.partial(loss, rule)
        stack = jax.jit(jax.vmap(jax.grad(of_rule), (None, 0)))(p, x)
        norms = np.sqrt(sum((np.asarray(g).reshape(5, -1) ** 2).sum(1) for g in stack.values()))
        tau = np.median(norms)
        for _, grads, stats in in_all_modes(of_rule, tau)(p, x).values():
            np.testing.assert_allclose(stats.norms, norms, rtol=1e-12)
            assert_close(grads, clipped_mean(stack, [tau] * 5), 1e-12, floor=1e-3)


@pytest.mark.usefixtures("two_passes")
def test_linear_rules_stay_fast_and_others_say_why_not():
    x, w = jnp.ones((5, 64)), jnp.ones((64, 64))

    def plan_of(rule, mode="one_pass"):
        loss = lambda w, x: jnp.sum(jnp.tanh(x @ rule(w)))
        return psc.clipped_value_and_grad(loss, 1.0, mode=mode).explain(w, x)

    (row,) = plan_of(with_rule(LINEAR["straight through"])).rows
    assert row.route == "dense"
    (row,) = plan_of(clip).rows
    assert row.route == "direct"
    assert row.reason.startswith("passes a custom_vjp whose rule is not known to be linear")
    assert "test_linearity.py" in row.reason
    plan = plan_of(clip, mode="two_pass")
    assert plan.num_slices is not None
    assert "never two passes: the loss passes a custom_vjp" in str(plan)
    assert "never two passes" not in str(plan_of(jax.nn.relu, mode="two_pass"))


def test_a_parameter_behind_stop_gradient_costs_nothing():
    loss = lambda p, x: jnp.sum(x @ lax.stop_gradient(p["frozen"]) @ p["w"])
    p = {"frozen": jnp.ones((8, 8)), "w": jnp.ones((8, 2))}
    f = psc.clipped_value_and_grad(loss, 1.0)
    frozen, _ = f.explain(p, jnp.ones((3, 8))).rows
    assert frozen.reason == "does not reach the loss"
    assert (frozen.extra_flops, frozen.extra_bytes) == (0, 0)
    assert not jax.jit(f)(p, jnp.ones((3, 8)))[1]["frozen"].any()
