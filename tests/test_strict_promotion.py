"""Check that the library's arithmetic works under strict promotion of dtypes and ranks."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psclip_optax as psc
from benchmarks.zoo.models import ZOO
from tests import slow
from tests.numerics import assert_close, enable_x64, heavy_tailed
from tests.random_programs.drawing import draw_program
from tests.random_programs.program import MIXTURES

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]]), "b": jnp.zeros(2, jnp.bfloat16)}
N = 8
BATCH = jnp.asarray(heavy_tailed(0, (N, 3))), jnp.asarray(heavy_tailed(1, (N,)))
MASK = jnp.arange(N) != 3
THRESHOLDS = {
    "number": 1.0,
    "growing": psc.growing_threshold(1.0, 1.5),
    "moment": psc.moment_threshold(1.5, initial=1.0),
    "moment of any order": psc.moment_threshold(initial=1.0),
    "quantile": psc.quantile_threshold(0.9, initial=1.0),
    "min norm": psc.min_norm_threshold(initial=1.0),
    "automatic": psc.auto_threshold(),
}


@contextlib.contextmanager
def promoting(dtypes, ranks):
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        yield


def never_promoting():
    return promoting("strict", "raise")


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"].astype(x.dtype))
    return jnp.square(hidden.sum() - y)


@pytest.fixture(scope="module")
def stacked():
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(PARAMS, *BATCH)
    return gradients | {"w": gradients["w"].at[5].set(jnp.nan)}


@pytest.mark.parametrize(
    "name", slow.but(["number", "moment of any order", "automatic"], THRESHOLDS)
)
def test_stacked_gradients(name, stacked):
    tx = optax.chain(psc.per_sample_clip(THRESHOLDS[name]), optax.sgd(0.1))

    def two_updates(stacked, state):
        updates, state = tx.update(stacked, state, PARAMS, sample_mask=MASK)
        return updates, tx.update(stacked, state, PARAMS)

    compiled = jax.jit(two_updates)
    with never_promoting():
        results = [run(stacked, tx.init(PARAMS)) for run in (two_updates, compiled)]
    assert_close(results, [compiled(stacked, tx.init(PARAMS))] * 2, 1e-6)


OPTIONS = {
    "plain": {},
    "slices": {"microbatch_size": 3},
    "micro-batches": {"microbatch_size": 3, "clip_at": "micro-batch"},
    "propagate": {"on_nonfinite": "propagate"},
}


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("name", "mode"), slow.diagonal(OPTIONS, ["one_pass", "two_pass", "vmap"]))
def test_from_the_loss(name, mode):
    options = OPTIONS[name]
    f = psc.clipped_value_and_grad(loss, THRESHOLDS["growing"], mode=mode, **options)
    masked = lambda params, *batch: f(params, *batch, sample_mask=MASK)
    both = lambda *arguments: (f(*arguments), masked(*arguments))

    with never_promoting():
        results = f(PARAMS, *BATCH), jax.jit(masked)(PARAMS, *BATCH)
    assert_close(results, jax.jit(both)(PARAMS, *BATCH), 1e-6)


def test_accumulation():
    tx = psc.accumulate_clipped(optax.sgd(1.0), 2, psc.growing_threshold(0.5, 1.5))

    def window():
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        return tx.update(PARAMS, state, PARAMS)[0]

    with promoting("standard", "raise"):  # Optax's arithmetic promotes dtypes
        updates = window()
    assert_close(updates, window(), 1e-6)


def test_tracked_norms():
    tx = psc.track_norms(THRESHOLDS["moment of any order"])
    with never_promoting():
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, norms=jnp.ones(N), sample_mask=MASK)
    np.testing.assert_allclose(state.threshold_state.moment.root, 1, rtol=1e-6)


# The engine's routes. Users' losses, which may promote, are not computed.


def traced(loss, params, *batch, **options):
    def own(*arguments):
        with promoting("standard", "allow"):
            return loss(*arguments)

    f = psc.clipped_value_and_grad(own, psc.growing_threshold(1.0, 1.5), **options)
    with never_promoting():
        return jax.eval_shape(f, params, *batch)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("name", "mode"), slow.diagonal(ZOO, ["one_pass", "two_pass"], every=2))
def test_zoo(name, mode):
    def params_and_gradients():
        model = ZOO[name]("small")
        _, grads = traced(model.loss, model.params, *model.batch(3), mode=mode)
        return model.params, grads

    params, grads = jax.eval_shape(params_and_gradients)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.filterwarnings("ignore:the loss of one example takes statistics")
@pytest.mark.parametrize(
    ("mode", "seeds"), slow.diagonal(["one_pass", "two_pass"], [range(15), range(15, 30)])
)
def test_random_programs(mode, seeds):
    programs = map(draw_program, seeds)
    # JAX calls a loss's custom rule, which may promote, only when differentiating.
    plain = [program for program in programs if not re.search("vjp|jvp", str(program))]
    assert len(plain) >= 3
    for program in plain:
        with enable_x64(MIXTURES[program.mixture].has_float64):
            _, grads = traced(program.loss, program.params, program.batch, mode=mode)
        dtypes = {name: leaf.dtype for name, leaf in grads.items()}
        assert dtypes == {name: leaf.dtype for name, leaf in program.params.items()}
