"""Run extreme batches through stacked gradients and all modes, and compare written results."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psclip_optax as psc
from tests import slow
from tests.numerics import enable_x64

NAN, INF = float("nan"), float("inf")
MODES = ["one_pass", "two_pass", "vmap"]


def loss(params, x, extra):
    """Return a loss whose gradient is the sample x itself: for an array, or leaf by leaf."""
    products = jax.tree.map(lambda w, x: jnp.dot(x, w), params, x)
    return sum(jax.tree.leaves(products)) + extra


class Row(NamedTuple):
    """A batch of samples x, with its expected results.

    Attributes:
      x: a sample a row, or a dict of such arrays.
      gradient: the expected clipped mean.
      num_nonfinite, num_clipped: the expected counts.
      value: the expected mean loss at parameters of 0 (NaN: not compared).
      tau: the constant threshold.
      mask: the sample mask; None for all.
      extra: added to each sample's loss.
      dtype: the dtype of x and the parameters.
      stacked: what `per_sample_clip` returns, if different: gradient, num_nonfinite, num_clipped.
    """

    x: Any
    gradient: Any
    num_nonfinite: int = 0
    num_clipped: int = 0
    value: float = 0.0
    tau: float = 1.0
    mask: list[bool] | None = None
    extra: list[float] | None = None
    dtype: Any = jnp.float32
    stacked: tuple[Any, int, int] | None = None


ROWS = {
    "NaN in one input": Row([[3, 4], [NAN, 0]], [0.3, 0.4], 1, 1),
    "∞ in one input": Row([[INF, 4], [3, 4]], [0.3, 0.4], 1, 1),
    "-∞ and NaN": Row([[-INF, NAN], [0.5, 0], [3, 4]], [1.1 / 3, 0.8 / 3], 1, 1),
    "NaN in one loss alone": Row(
        [[3, 4], [0, 5]], [0.3, 0.4], 1, 1, extra=[0, NAN], stacked=([0.3, 0.9], 0, 2)
    ),
    "∞ in one loss alone": Row(
        [[3, 4], [0, 5]], [0.3, 0.4], 1, 1, 7.0, extra=[7, INF], stacked=([0.3, 0.9], 0, 2)
    ),
    "NaN in all samples": Row([[NAN, 0], [0, NAN]], [0, 0], 2),
    "NaN in all losses": Row(
        [[3, 4], [0, 5]], [0, 0], 2, 0, extra=[NAN, NAN], stacked=([0.3, 0.9], 0, 2)
    ),
    "zero gradients": Row([[0, 0], [0, 0]], [0, 0]),
    "zero gradients, τ = 0": Row([[0, 0], [0, 0]], [0, 0], tau=0.0),
    "τ = 0": Row([[3, 4], [0, 0]], [0, 0], 0, 1, tau=0.0),
    "τ = ∞": Row([[3, 4], [5, 0]], [4, 2], tau=INF),
    "τ = ∞, NaN": Row([[3, 4], [NAN, 0]], [1.5, 2], 1, tau=INF),
    "a norm of exactly τ": Row([[3, 4]], [3, 4], tau=5.0),
    "n = 1": Row([[3, 4]], [0.6, 0.8], 0, 1),
    "n = 1, NaN": Row([[NAN, 4]], [0, 0], 1),
    "all masked": Row([[3, 4], [0, 5]], [0, 0], mask=[False, False]),
    "all masked, NaN": Row([[NAN, 4], [0, INF]], [0, 0], mask=[False, False]),
    "one real sample and padding of NaN": Row(
        [[NAN, NAN], [3, 4], [INF, NAN]], [0.6, 0.8], 0, 1, mask=[False, True, False]
    ),
    "one NaN sample and padding of real ones": Row(
        [[3, 4], [NAN, 4], [0, 5]], [0, 0], 1, mask=[False, True, False]
    ),
    "padding whose loss is NaN": Row(
        [[3, 4], [0, 5]], [0.6, 0.8], 0, 1, 2.0, mask=[True, False], extra=[2, NAN]
    ),
    # Squares of 1e30 overflow float32; the engine counts such a sample as not finite.
    "a norm of 1e30": Row([[1e30, 0], [0, 5]], [0, 0.5], 1, 1, stacked=([0.5, 0.5], 0, 2)),
    "the largest float32": Row(
        [[3.4e38, 3.4e38], [0, 5]], [0, 0.5], 1, 1,
        stacked=([0.5 * 2**-0.5, 0.5 + 0.5 * 2**-0.5], 0, 2),
    ),
    "norms just within float32's squares": Row([[1.5e19, 0], [0, 5]], [0.5, 0.5], 0, 2),
    "a norm of 1e-30": Row([[1e-30, 0], [0, 5]], [5e-31, 0.5], 0, 1),
    "a norm of 5e-25 above τ": Row([[3e-25, 4e-25], [0, 0]], [3e-26, 4e-26], 0, 1, tau=1e-25),
    "one of 5 too, above a tiny τ": Row([[3e-25, 4e-25], [3, 4]], [6e-26, 8e-26], 0, 2, tau=1e-25),
    "a norm of 5e-25, τ = 0": Row([[3e-25, 4e-25], [0, 0]], [0, 0], tau=0.0, stacked=([0, 0], 0, 1)),
    "subnormal entries": Row([[1e-39, 0], [0, 5]], [0, 0.5], 0, 1),
    "float16, squares beyond its range": Row([[300, 400], [0, 5]], [0.3, 0.9], 0, 2, dtype=jnp.float16),
    "float16, its largest": Row([[65504, 0], [0, 1]], [0.5, 0.5], 0, 1, dtype=jnp.float16),
    "float16, a mean of large ones": Row([[60000, 0]] * 8, [60000, 0], tau=INF, dtype=jnp.float16),
    "bfloat16": Row([[3, 4], [0, 5]], [0.3, 0.9], 0, 2, dtype=jnp.bfloat16),
    "bfloat16, sums that saturate": Row([[1, 0]] * 1024, [1, 0], tau=INF, dtype=jnp.bfloat16),
    "bfloat16, NaN": Row([[3, 4], [NAN, 5]], [0.3, 0.4], 1, 1, dtype=jnp.bfloat16),
    "float64": Row([[3e100, 4e100], [0, 5]], [0.3, 0.9], 0, 2, dtype=jnp.float64),
    "float64, NaN": Row([[3, 4], [NAN, 5]], [0.3, 0.4], 1, 1, dtype=jnp.float64),
    "a float16 leaf beside a float32 one": Row(
        {"a": [[3], [0]], "b": [[4], [5]]}, {"a": [0.3], "b": [0.9]}, 0, 2,
        dtype={"a": jnp.float16, "b": jnp.float32},
    ),
    "NaN in the float16 leaf": Row(
        {"a": [[NAN], [3]], "b": [[4], [4]]}, {"a": [0.3], "b": [0.4]}, 1, 1,
        dtype={"a": jnp.float16, "b": jnp.float32},
    ),
    "bfloat16, float32 and float64 leaves": Row(
        {"a": [[2], [0]], "b": [[1], [0]], "c": [[2], [0]]},
        {"a": [1 / 3], "b": [1 / 6], "c": [1 / 3]}, 0, 1,
        dtype={"a": jnp.bfloat16, "b": jnp.float32, "c": jnp.float64},
    ),
}  # fmt: skip


def arrays_of(row):
    if not isinstance(row.x, dict):
        return jnp.asarray(row.x, row.dtype)
    return {name: jnp.asarray(x, row.dtype[name]) for name, x in row.x.items()}


def zeros_of(x):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), x)


def assert_result(grads, expected, params, num_nonfinite, num_clipped, counted):
    for leaf, want, own in zip(
        jax.tree.leaves(grads), leaves_of(expected), jax.tree.leaves(params), strict=True
    ):
        assert leaf.dtype == own.dtype
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64),
            want,
            rtol=2 * float(jnp.finfo(leaf.dtype).eps),
            atol=1e-38,
        )
    assert (int(counted.num_nonfinite), int(counted.num_clipped)) == (num_nonfinite, num_clipped)


def leaves_of(expected):
    leaves = expected.values() if isinstance(expected, dict) else [expected]
    return [np.asarray(leaf, np.float64) for leaf in leaves]


WAYS = list(
    itertools.product([*({"mode": mode} for mode in MODES), {"microbatch_size": 1}], [True, False])
)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("name", "way"), slow.diagonal(ROWS, WAYS, every=2), ids=str)
def test_from_the_loss(name, way):
    options, jit = way
    row = ROWS[name]
    with enable_x64(True):
        x = arrays_of(row)
        n = len(jax.tree.leaves(x)[0])
        if n > 8 and options == {"microbatch_size": 1}:
            options = {"microbatch_size": 100}
        extra = jnp.asarray(row.extra or [0.0] * n, jnp.float32)
        params = zeros_of(x)
        f = psc.clipped_value_and_grad(loss, row.tau, return_stats=True, **options)
        mask = None if row.mask is None else np.array(row.mask)
        value, grads, stats = (jax.jit(f) if jit else f)(params, x, extra, sample_mask=mask)
        own = (row.gradient, row.num_nonfinite, row.num_clipped)
        if options.get("mode") == "vmap" and row.stacked and row.extra is None:
            own = row.stacked
        gradient, num_nonfinite, num_clipped = own
        assert_result(grads, gradient, params, num_nonfinite, num_clipped, stats)
        np.testing.assert_allclose(value, row.value, rtol=1e-6)


@pytest.mark.parametrize(("name", "jit"), slow.diagonal(ROWS, [True, False]))
def test_from_stacked_gradients(name, jit):
    row = ROWS[name]
    with enable_x64(True):
        stacked = arrays_of(row)
        params = zeros_of(stacked)
        tx = psc.per_sample_clip(row.tau)
        mask = None if row.mask is None else np.array(row.mask)
        update = jax.jit(tx.update) if jit else tx.update
        grads, state = update(stacked, tx.init(params), params, sample_mask=mask)
        own = (row.gradient, row.num_nonfinite, row.num_clipped)
        gradient, num_nonfinite, num_clipped = row.stacked or own
        assert_result(grads, gradient, params, num_nonfinite, num_clipped, state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool_])
def test_parameters_that_are_not_real_are_refused(dtype, mode):
    params, x = {"w": jnp.zeros(2, dtype)}, jnp.ones((3, 2))
    f = psc.clipped_value_and_grad(lambda p, x: jnp.sum(x * p["w"]).real, 1.0, mode=mode)
    with pytest.raises(
        TypeError, match=rf"params\['w'\] is {jnp.dtype(dtype)}\[2\], but expected a real"
    ):
        f(params, x)
    tx = psc.per_sample_clip(1.0)
    stacked = {"w": jnp.zeros((3, 2), dtype)}
    with pytest.raises(
        TypeError, match=rf"\['w'\] is {jnp.dtype(dtype)}\[3, 2\], but expected a real"
    ):
        tx.update(stacked, tx.init({"w": jnp.zeros(2)}))


def test_a_stack_beyond_memory_is_warned_of_before_the_allocator_fails():
    params = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    stacked = jax.ShapeDtypeStruct((1 << 22, 1 << 20), jnp.float32)  # 16 TiB
    tx = psc.per_sample_clip(1.0)
    state = jax.eval_shape(tx.init, params)
    with pytest.warns(UserWarning, match=r"16384\.0 GiB, .*psc\.clipped_value_and_grad\(loss"):
        jax.jit(tx.update).lower(stacked, state)


def test_a_stack_that_fits_is_not_warned_of(recwarn):
    tx = psc.per_sample_clip(1.0)
    jax.jit(tx.update)(jnp.ones((3, 2)), tx.init(jnp.ones(2)))
    assert not recwarn


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "not jitted"])
def test_no_sample_at_all_gives_zeros(jit):
    tx = psc.per_sample_clip(1.0)
    update = jax.jit(tx.update) if jit else tx.update
    grads, state = update(jnp.zeros((0, 2)), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(grads, [0.0, 0.0])
    assert int(state.num_samples) == 0
    for mode in MODES:
        f = psc.clipped_value_and_grad(loss, 1.0, mode=mode)
        value, grads = (jax.jit(f) if jit else f)(jnp.zeros(2), jnp.zeros((0, 2)), jnp.zeros(0))
        np.testing.assert_array_equal(grads, [0.0, 0.0])
        assert float(value) == 0.0


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_a_norm_too_small_to_be_told_from_a_traced_threshold_is_counted(mode):
    x = jnp.array([[3e-25, 4e-25], [3, 4]])
    f = psc.clipped_value_and_grad(lambda w, x: jnp.dot(w, x), 1.0, mode=mode, return_stats=True)
    run = jax.jit(lambda tau: f(jnp.zeros(2), x, threshold=tau))
    _, grads, stats = run(1e-25)
    np.testing.assert_allclose(grads, [3e-26, 4e-26], rtol=1e-6)
    assert (int(stats.num_nonfinite), int(stats.num_clipped)) == (1, 1)
    _, grads, stats = run(1.0)
    np.testing.assert_allclose(grads, [0.3, 0.4], rtol=1e-6)
    assert (int(stats.num_nonfinite), int(stats.num_clipped)) == (0, 1)
