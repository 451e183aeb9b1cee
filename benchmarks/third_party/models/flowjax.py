"""Takes normalising flows of FlowJAX."""

from __future__ import annotations

from typing import Any

import paramax
from flowjax import bijections, distributions, flows

from benchmarks.third_party.building import KEY, normal, of_equinox
from benchmarks.third_party.common import Case, Model

BASE = distributions.StandardNormal((3,))


def density(flow: Any) -> Case:
    """Builds a density; arrays that the library wraps as not trainable stay fixed."""

    def call(flow, x):
        return -paramax.unwrap(flow).log_prob(x)

    return of_equinox(flow, normal(3), call=call)


def masked_autoregressive() -> Any:
    return flows.masked_autoregressive_flow(
        KEY,
        base_dist=BASE,
        transformer=bijections.RationalQuadraticSpline(knots=4, interval=3),
        flow_layers=2,
        nn_width=6,
    )


def conditional() -> Case:
    flow = flows.coupling_flow(KEY, base_dist=BASE, cond_dim=2, flow_layers=2, nn_width=6)

    def call(flow, x, given):
        return -paramax.unwrap(flow).log_prob(x, given)

    return of_equinox(flow, normal(3), normal(2, seed=2), call=call)


def triangular() -> Any:
    return flows.triangular_spline_flow(KEY, base_dist=BASE, flow_layers=2, knots=4)


MODELS = {
    "masked autoregressive, splines": Model(lambda: density(masked_autoregressive())),
    "coupling, conditional": Model(conditional),
    "block neural autoregressive": Model(
        lambda: density(flows.block_neural_autoregressive_flow(KEY, base_dist=BASE))
    ),
    "triangular splines": Model(lambda: density(triangular())),
}
