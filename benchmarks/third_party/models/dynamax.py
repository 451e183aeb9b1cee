"""Takes state-space models of Dynamax: the likelihood of a series, by filtering."""

from __future__ import annotations

from typing import Any

from dynamax.hidden_markov_model import GaussianHMM
from dynamax.linear_gaussian_ssm import LinearGaussianSSM

from benchmarks.third_party.building import KEY, normal
from benchmarks.third_party.common import Case, Model


def likelihood(model: Any) -> Case:
    # Covariances and probabilities get no noise, which would make them invalid.
    params, _ = model.initialize(KEY)

    def loss(params, series):
        return -model.marginal_log_prob(params, series)

    return Case(loss, params, (normal(6, 2),), spread=0)


MODELS = {
    "linear Gaussian": Model(lambda: likelihood(LinearGaussianSSM(3, 2))),
    "Gaussian hidden Markov": Model(lambda: likelihood(GaussianHMM(3, 2))),
}
