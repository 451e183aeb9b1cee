"""Check that scans with cotangents written in place differentiate like `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from psclip_optax.engine import in_place
from psclip_optax.engine.analysis.equations import inner_jaxprs
from tests.numerics import assert_close, enable_x64

LENGTH, N, WIDTH = 3, 4, 5
needs_empty = pytest.mark.skipif(not hasattr(lax, "empty"), reason="needs lax.empty, of JAX 0.8")


def arrays(seed=0):
    random = np.random.default_rng(seed)
    kernels = jnp.asarray(random.normal(size=(LENGTH, WIDTH, WIDTH)))
    return kernels, jnp.asarray(random.normal(size=(N, WIDTH)))


def layer(x, kernel):
    x = jnp.tanh(x @ kernel)
    return x, jnp.sum(x)


def scanned(kernels, x, copy=None, **options):
    """Scan over layers, in place if there is a copy of them."""
    (x, _), ys = in_place.scan(
        lambda carry, kernel: (
            (layer(carry[0], kernel)[0], carry[1] + 1),
            layer(*carry[:1], kernel)[1],
        ),
        (x, 0),
        kernels,
        [copy],
        length=LENGTH,
        **options,
    )
    return jnp.sum(x**2) + jnp.sum(ys * jnp.arange(LENGTH))


@needs_empty
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}], ids=str)
def test_gradients_of_each_sample(options):
    with enable_x64(True):
        kernels, x = arrays()

        def gradients(in_place_: bool):
            def of_sample(kernels, x):
                copy = kernels if in_place_ else None
                return jax.grad(lambda k: scanned(k, x, copy, **options))(kernels)

            return jax.jit(jax.vmap(of_sample, (None, 0)))(kernels, x)

        assert_close(gradients(True), gradients(False), 1e-12)


@needs_empty
@pytest.mark.parametrize("over", [jax.grad, jax.jacfwd, jax.hessian])
def test_can_be_differentiated_again(over):
    with enable_x64(True):
        kernels, x = arrays()

        def total(in_place_: bool):
            def of_sample(kernels, x):
                copy = kernels if in_place_ else None
                return jax.grad(lambda k: scanned(k, x, copy))(kernels)

            return lambda scale: jnp.sum(jax.vmap(of_sample, (None, 0))(scale * kernels, x) ** 2)

        assert_close(over(total(True))(1.5), over(total(False))(1.5), 1e-10)


def loss(params, x):
    def block(x, params):
        def inner(x, kernel):
            return jnp.sin(x @ kernel), None

        x, _ = lax.scan(jax.checkpoint(inner), x, params["inner"])
        return x @ params["kernel"] + params["bias"], None

    x, _ = lax.scan(block, x, params["blocks"])
    return jnp.sum(x**2) + jnp.sum(params["blocks"]["kernel"][1]) ** 2


def nested():
    random = np.random.default_rng(1)
    shapes = {"inner": (LENGTH, 2, WIDTH, WIDTH), "kernel": (LENGTH, WIDTH, WIDTH)}
    blocks = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    blocks["bias"] = jnp.zeros((LENGTH, WIDTH))
    return {"blocks": blocks}, jnp.asarray(random.normal(size=(N, 2, WIDTH)))


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_nested_scans_and_weights_used_elsewhere(mode):
    with enable_x64(True):
        params, x = nested()
        x = x.at[2].set(jnp.nan)
        f, stack = (
            jax.jit(psc.clipped_value_and_grad(loss, 0.5, mode=m, return_stats=True))
            for m in (mode, "vmap")
        )
        (_, grads, stats), (_, expected, of_stack) = f(params, x), stack(params, x)
        assert_close(grads, expected, 1e-10)
        np.testing.assert_allclose(stats.norms, of_stack.norms, rtol=1e-10)


def test_under_shard_map():
    with enable_x64(True):
        params, x = nested()
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        f = psc.clipped_value_and_grad(loss, 0.5, mode="one_pass", axis_name="data")
        shared = jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
        )
        expected = jax.jit(psc.clipped_value_and_grad(loss, 0.5, mode="vmap"))(params, x)
        assert_close(shared(params, x), expected, 1e-10)


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, [v.aval.shape for v in eqn.outvars]
        for inner in inner_jaxprs(eqn):
            yield from primitives(inner)


@needs_empty
def test_stacks_of_all_samples_are_not_filled_first():
    params, x = nested()
    f = psc.clipped_value_and_grad(loss, 0.5, mode="one_pass")
    found = list(primitives(jax.make_jaxpr(f)(params, x).jaxpr))
    stack = [(N, LENGTH, WIDTH)]  # of the biases, which have no site
    assert ("empty", stack) in found
    assert all(name != "scatter" for name, _ in found)
