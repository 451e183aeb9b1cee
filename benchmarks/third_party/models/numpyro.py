"""Takes probabilistic programs of NumPyro: posteriors and variational bounds, a datum a sample."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import log_density

from benchmarks.third_party.common import NUM_SAMPLES, Case, Model

KEY = jax.random.key(0)


def data(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (NUM_SAMPLES, *shape))


def bayesian_network(x: jax.Array, y: jax.Array) -> None:
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4,)}
    w1, b1, w2 = (
        numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)))
        for name, shape in shapes.items()
    )
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.3))
    numpyro.sample("y", dist.Normal(jnp.tanh(x @ w1 + b1) @ w2, noise), obs=y)


def posterior() -> Case:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return -log_density(bayesian_network, (x, y), {}, params)[0]

    params = {
        "w1": jnp.zeros((3, 4)),
        "b1": jnp.zeros(4),
        "w2": jnp.ones(4),
        "noise": jnp.asarray(1.0),
    }
    return Case(loss, params, (data(3), data()))


def bound(guide: Any) -> Case:
    """Computes the evidence's lower bound, with one key for all."""
    svi = SVI(bayesian_network, guide(bayesian_network), numpyro.optim.Adam(0.1), Trace_ELBO())
    batch = data(3), data()
    state = svi.init(KEY, *(leaf[0] for leaf in batch))

    def loss(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        elbo = Trace_ELBO()
        return elbo.loss(key, svi.constrain_fn(params), svi.model, svi.guide, x, y)

    unconstrained = svi.optim.get_params(state.optim_state)
    return Case(loss, unconstrained, (*batch, KEY), (0, 0, None))


def hidden_markov() -> Case:
    """Sums over the hidden states by a scan."""

    def loss(params: Any, ys: jax.Array) -> jax.Array:
        chain = dist.Categorical(logits=params["transition"])
        emitted = dist.Normal(params["mean"], jnp.exp(params["log_scale"]))

        def step(log_alpha: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
            moved = jax.nn.logsumexp(log_alpha[:, None] + jnp.log(chain.probs), 0)
            return moved + emitted.log_prob(y), None

        log_alpha, _ = jax.lax.scan(step, jnp.zeros(3), ys)
        return -jax.nn.logsumexp(log_alpha)

    params = {"transition": jnp.eye(3), "mean": jnp.arange(3.0), "log_scale": jnp.zeros(3)}
    return Case(loss, params, (data(6),))


def flow() -> Case:
    """Builds a mixture transformed by a spline, also for counts."""

    def loss(params: Any, x: jax.Array, count: jax.Array) -> jax.Array:
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=params["logits"]),
            dist.StudentT(3.0, params["loc"], jnp.exp(params["log_scale"])),
        )
        rate = dist.GammaPoisson(jnp.exp(params["a"]), jnp.exp(params["b"]))
        return -mixture.log_prob(x) - rate.log_prob(count)

    params = {name: jnp.arange(3.0) / 3 for name in ("logits", "loc", "log_scale")}
    params |= {"a": jnp.zeros(()), "b": jnp.zeros(())}
    return Case(loss, params, (data(), jnp.arange(NUM_SAMPLES)))


MODELS = {
    "Bayesian network, posterior": Model(posterior),
    "Bayesian network, ELBO": Model(lambda: bound(AutoNormal)),
    "Bayesian network, ELBO of a full covariance": Model(lambda: bound(AutoMultivariateNormal)),
    "hidden Markov model": Model(hidden_markov),
    "mixture and counts": Model(flow),
}
