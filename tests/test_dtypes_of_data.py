"""Check data whose dtype differs from that of the parameters."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import psclip_optax as psc
from tests.numerics import assert_close, enable_x64, in_all_modes
from tests.passes import two_passes

N, ROWS, IN, OUT = 5, 3, 4, 20


def kernel():
    return jnp.asarray(np.random.default_rng(0).normal(size=(IN, OUT)), jnp.float32)


def complex_data(*shape):
    random = np.random.default_rng(1)
    return jnp.asarray(random.normal(size=shape) + 1j * random.normal(size=shape))


def scanned(kernel, z):
    layers = jnp.stack([kernel[:, :IN]] * 2)
    return lax.scan(lambda z, w: (z @ w, None), z, layers)[0]


PRODUCTS = {
    "product": lambda w, z: z @ w,
    "einsum": lambda w, z: jnp.einsum("...i,io->o...", z, w),
    "scan": scanned,
    "fft": lambda w, z: jnp.fft.fft(z.real) @ w,
    "convolution": lambda w, z: lax.conv_general_dilated(
        z[None], w[None].astype(z.dtype), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("by_layer", [False, True], ids=["together", "by layer"])
def test_complex_data(name, by_layer):
    def loss(params, z):
        return jnp.sum(jnp.abs(PRODUCTS[name](params["w"], z) + params["b"]) ** 2)

    with enable_x64(True):
        params = {"w": kernel().astype(float), "b": jnp.ones(())}
        threshold = psc.by_layer(params, 0.5) if by_layer else 0.5
        data = complex_data(N, ROWS, IN)
        results = in_all_modes(loss, threshold, ("one_pass", "two_pass", "vmap", "auto"))(
            params, data
        )
        for mode in ("one_pass", "two_pass", "auto"):
            assert_close(results[mode], results["vmap"], 1e-10)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool", "bfloat16", "float16"])
def test_the_dtype_of_data_does_not_round_weights_of_samples(dtype, monkeypatch):
    def of_tpu(*arguments, default, **on):
        return on.get("tpu", default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", of_tpu)
    x = jnp.asarray(np.random.default_rng(2).integers(0, 9, (N, ROWS, IN))).astype(dtype)

    def loss(w, x):
        return jnp.sum(jnp.sin(x @ w))

    results = jax.jit(in_all_modes(loss, 1.0))(kernel(), x)
    assert float(jnp.max(jnp.abs(results["vmap"][1]))) > 0
    assert_close(results["one_pass"][1], results["vmap"][1], 1e-5)


@pytest.mark.parametrize("threshold", [1e-1, 1e-5])
@pytest.mark.parametrize("mode", ["one_pass", "two passes", "by layer"])
def test_small_thresholds_do_not_underflow_in_half_precision(mode, threshold):
    random = np.random.default_rng(3)
    params = {"w": jnp.asarray(random.normal(size=(64, 64)) / 8, jnp.float32)}
    x = jnp.asarray(random.normal(size=(32, ROWS, 64)), jnp.float32)

    def loss(dtype):
        def run(params, x):
            y = jnp.tanh(x.astype(dtype) @ params["w"].astype(dtype))
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        return run

    limit = psc.by_layer(params, threshold) if mode == "by layer" else threshold
    own = {"two passes": "two_pass", "by layer": "auto"}.get(mode, mode)
    with two_passes() if mode == "two passes" else contextlib.nullcontext():
        half = jax.jit(psc.clipped_grad(loss(jnp.float16), limit, mode=own))(params, x)
    exact = psc.clipped_grad(loss(jnp.float32), limit, mode="vmap")(params, x)
    assert_close(half, exact, 5e-3)
