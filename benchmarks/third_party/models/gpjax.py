"""Takes Gaussian processes of GPJax, a data set a sample."""

from __future__ import annotations

from typing import Any

import gpjax
import jax
import paramax

from benchmarks.third_party.building import normal, of_equinox
from benchmarks.third_party.common import Case, Model


def marginal_likelihood(kernel: Any) -> Case:
    model = gpjax.Prior(kernel, gpjax.mean_functions.Constant()) * gpjax.likelihoods.Gaussian()

    def call(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        data = gpjax.Dataset(x, y[:, None])
        return -gpjax.objectives.conjugate_mll(paramax.unwrap(model), data)

    return of_equinox(model, normal(6, 2), normal(6, seed=2), call=call)


MODELS = {
    "Matérn kernel": Model(lambda: marginal_likelihood(gpjax.kernels.Matern32())),
    "sum of kernels": Model(
        lambda: marginal_likelihood(gpjax.kernels.RBF() + gpjax.kernels.Linear())
    ),
}
