"""Check the numbers of what is chosen for accelerators, which a CPU can compute as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from benchmarks.zoo.models import ZOO
from tests import slow
from tests.numerics import assert_close, enable_x64, in_float64
from tests.small_zoo import small

QUICK = ["alexnet", "mixture_of_experts"]


@pytest.fixture
def chosen(monkeypatch):
    """Choose as on a TPU; collect the functions that only a TPU takes."""
    functions = []

    def of_tpu(*arguments, default, **on):
        if "tpu" in on:
            functions.append(on["tpu"])
        return on.get("tpu", default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", of_tpu)
    return functions


def with_nan(batch):
    """Make the second sample NaN, if the model takes numbers."""
    return [
        jnp.asarray(array).at[1].set(jnp.nan) if np.issubdtype(array.dtype, np.floating) else array
        for array in batch
    ]


@pytest.mark.parametrize("name", slow.but(QUICK, ZOO))
def test_what_a_tpu_takes_has_the_numbers_of_a_stack(name, chosen):
    with enable_x64(True):
        model = small(name)
        params, batch = in_float64(model.params), with_nan(in_float64(model.batch(4)))
        each = psc.by_layer(params, 0.1)

        def results(mode, threshold, *arguments):
            f = psc.clipped_value_and_grad(model.loss, threshold, mode=mode, return_stats=True)
            return f(*arguments)

        @jax.jit
        def engine(*arguments):
            return results("one_pass", 0.1, *arguments), results("auto", each, *arguments)

        @jax.jit
        def stacked(*arguments):
            return results("vmap", 0.1, *arguments), results("vmap", each, *arguments)

        assert not chosen
        pairs = zip(engine(params, *batch), stacked(params, *batch), strict=True)
        assert chosen
        for (value, grads, stats), (expected, stack, of_stack) in pairs:
            assert_close(grads, stack, 1e-10, floor=1e-3)
            np.testing.assert_allclose(value, expected, rtol=1e-12)
            np.testing.assert_allclose(stats.norms, of_stack.norms, rtol=1e-9, atol=1e-12)
            assert np.any(np.asarray(stats.scales) < 1)


def test_a_tpu_weighs_a_products_input_if_it_is_the_smaller_side(chosen):
    params = {"wide": jnp.linspace(-1, 1, 9 * 40).reshape(9, 40), "narrow": jnp.ones((40, 9)) / 9}
    x = jnp.sin(jnp.arange(4 * 2 * 9.0)).reshape(4, 2, 9).at[1, 0, 3].set(jnp.nan)

    def loss(params, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ params["wide"]) @ params["narrow"]))

    engine, stacked = (psc.clipped_grad(loss, 2.0, mode=mode) for mode in ("one_pass", "vmap"))
    grads = jax.jit(engine)(params, x)
    assert [function.__name__ for function in chosen].count("by_input") == 1  # for "wide" alone
    assert_close(grads, stacked(params, x), 1e-5)
