import copy
import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import psclip_optax as psc
from tests.numerics import enable_x64

K = jnp.arange(1, 6)


@given(
    alpha=st.floats(0, 1e6), beta=st.floats(0.5, 100), n=st.integers(0, 40), start=st.integers(1, 9)
)
def test_growing_threshold_is_alpha_times_a_root_of_the_position(alpha, beta, n, start):
    positions = np.arange(start, start + n)
    taus = psc.growing_threshold(alpha, beta)(positions)
    assert taus.shape == (n,)
    np.testing.assert_allclose(taus, alpha * positions ** (1 / beta), rtol=3e-6, atol=1e-37)


def test_constant_threshold_is_the_same_everywhere():
    np.testing.assert_array_equal(psc.constant_threshold(2.5)(K), np.full(5, 2.5))


@pytest.mark.parametrize("position_dtype", [jnp.int32, jnp.uint8])
def test_positions_of_any_integer_dtype(position_dtype):
    np.testing.assert_allclose(psc.growing_threshold(1.0, 2.0)(K.astype(position_dtype)), K**0.5)


@pytest.mark.parametrize("beta", [1e-3, 1e-30, 0.5, math.inf])
def test_zero_and_infinity_are_legal(beta):
    np.testing.assert_array_equal(psc.growing_threshold(0.0, beta)(K), np.zeros(5))
    np.testing.assert_array_equal(psc.growing_threshold(math.inf, beta)(K), np.full(5, np.inf))
    np.testing.assert_array_equal(psc.growing_threshold(3.0, math.inf)(K), np.full(5, 3.0))


def test_float64_when_enabled():
    with enable_x64(True):
        taus = psc.growing_threshold(3.0, 1.5)(jnp.arange(1, 1001))
        assert taus.dtype == jnp.float64
        np.testing.assert_allclose(taus, 3.0 * np.arange(1, 1001) ** (1 / 1.5), rtol=1e-15)


def test_strict_promotion_accepts_numbers_of_any_float_dtype():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        taus = psc.growing_threshold(jnp.bfloat16(2), jnp.float16(2))(K)
    np.testing.assert_allclose(taus, 2 * np.sqrt(np.arange(1, 6)), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: psc.growing_threshold(-1.0, 2.0), "expects `alpha` >= 0, got -1"),
        (lambda: psc.growing_threshold(1.0, 0.0), "expects `beta` > 0, got 0"),
        (lambda: psc.growing_threshold(1.0, -2), "expects `beta` > 0, got -2"),
        (lambda: psc.growing_threshold(math.nan, 2.0), "expects `alpha` >= 0, got nan"),
        (lambda: psc.growing_threshold(1.0, jnp.nan), "expects `beta` > 0, got nan"),
        (lambda: psc.constant_threshold(-0.5), "expects `value` >= 0, got -0.5"),
        (lambda: psc.constant_threshold(np.float32("nan")), "expects `value` >= 0, got nan"),
        (lambda: psc.constant_threshold(jnp.ones(3)), r"real scalar as `value`, got float32\[3\]"),
        (lambda: psc.constant_threshold(1j), "expects a real number as `value`, got 1j"),
        (lambda: psc.constant_threshold("5"), "expects a real number as `value`, got '5'"),
        (lambda: psc.growing_threshold(None, 2.0), "expects a real number as `alpha`, got None"),
        (lambda: psc.growing_threshold(True, 2.0), "expects a real number as `alpha`, got True"),
        (lambda: dataclasses.replace(psc.growing_threshold(1.0, 2.0), alpha=-1.0), "`alpha` >= 0"),
        (lambda: psc.growing_threshold(1.0, 2.0)(jnp.arange(5)), "the smallest that came is 0"),
        (lambda: psc.growing_threshold(1.0, 2.0)(jnp.ones(3)), r"came as float32\[3\]"),
        (lambda: psc.growing_threshold(1.0, 2.0)(3), "inject_hyperparams.*psc.ps_clip_sgd"),
        (lambda: psc.constant_threshold(1.0)(jnp.int32(3)), "inject_hyperparams.*psc.ps_clip_sgd"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_inject_hyperparams_over_a_threshold_says_what_to_write():
    tx = optax.inject_hyperparams(psc.per_sample_clip)(psc.growing_threshold(1.0, 2.0))
    with pytest.raises(TypeError, match=r"inject_hyperparams\(psc.ps_clip_sgd\)"):
        tx.init({"w": jnp.zeros(3)})


def test_is_a_pytree_whose_numbers_may_be_traced():
    threshold = psc.growing_threshold(2.0, 2.0)
    assert jax.tree.leaves(threshold) == [2.0, 2.0]
    keys = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(threshold)
    ]
    assert keys == [".alpha", ".beta"]
    np.testing.assert_allclose(jax.jit(lambda t: t(K))(threshold), 2 * np.sqrt(K), rtol=1e-6)
    many = jax.vmap(lambda a: psc.growing_threshold(a, 2.0)(K))(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(many, np.outer([1, 3], np.sqrt(K)), rtol=1e-6)


def test_derivative_with_respect_to_the_threshold_may_be_negative():
    grads = jax.grad(lambda t: -t(K).sum())(psc.growing_threshold(0.0, 2.0))
    np.testing.assert_allclose(grads.alpha, -np.sqrt(K).sum(), rtol=1e-6)
    assert grads.beta == 0


def test_copies_and_pickles():
    threshold = psc.growing_threshold(2.0, 3.0)
    assert pickle.loads(pickle.dumps(threshold)) == copy.deepcopy(threshold) == threshold
    assert dataclasses.replace(threshold, alpha=5.0) == psc.growing_threshold(5.0, 3.0)
