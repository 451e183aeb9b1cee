"""Takes transport costs and potentials of OTT."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from ott.geometry import pointcloud
from ott.neural.networks import icnn
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
from ott.tools import soft_sort

from benchmarks.third_party.building import normal, of_linen
from benchmarks.third_party.common import Case, Model


def transported(implicit: bool) -> Case:
    """Computes the cost between a sample's points and trained points."""
    options = {} if implicit else {"implicit_diff": None}

    def loss(params: Any, points: jax.Array) -> jax.Array:
        moved = jnp.tanh(points @ params["w"])
        geometry = pointcloud.PointCloud(moved, params["anchors"], epsilon=0.5)
        problem = linear_problem.LinearProblem(geometry)
        solver = sinkhorn.Sinkhorn(threshold=1e-9, max_iterations=300, **options)
        return solver(problem).reg_ot_cost

    params = {"w": jnp.eye(2, 3), "anchors": normal(4, 3)[0]}
    return Case(loss, params, (normal(5, 2),))


def ranked() -> Case:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        ranks = soft_sort.ranks(jnp.tanh(x @ params["w"]) @ params["v"], epsilon=0.1)
        return jnp.square(ranks - jnp.arange(4.0)).sum()

    return Case(loss, {"w": normal(3, 4)[0], "v": jnp.arange(4.0)}, (normal(4, 3),))


MODELS = {
    "Sinkhorn, implicit": Model(lambda: transported(True)),
    "Sinkhorn, unrolled": Model(lambda: transported(False)),
    "soft ranks": Model(ranked),
    "convex network": Model(lambda: of_linen(icnn.ICNN(dim_data=3, dim_hidden=(6, 5)), normal(3))),
}
