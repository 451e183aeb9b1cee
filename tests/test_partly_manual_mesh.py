"""Check shard_map where thresholds are the same on all devices, or where only one axis is manual."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests.numerics import assert_close, enable_x64

N, ROWS, WIDTH = 8, 3, 8


def case():
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(random.normal(size=(WIDTH, WIDTH))) for name in ("k", "c")}
    return params, jnp.asarray(random.normal(size=(N, ROWS, WIDTH)))


def two_layers(p, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ p["k"]) @ p["c"]) ** 2)


def convolved(p, x):
    dimensions = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x[None], p["k"][None], (1,), "SAME", dimension_numbers=dimensions)
    return jnp.sum(jnp.tanh(y[0] @ p["c"]))


LOSSES = {
    "two layers": two_layers,
    "computed weight": lambda p, x: jnp.sum(jnp.tanh(x @ jnp.tanh(p["k"]) @ p["c"]) ** 2),
    "product of weights": lambda p, x: jnp.sum(jnp.tanh(x @ jnp.tanh(p["k"] @ p["c"])) ** 2),
    "rewritten": lambda p, x: jnp.sum(jnp.tanh(x @ (p["k"] @ p["c"][:, :1] @ p["c"][:1])) ** 2),
    "axis of size 1": lambda p, x: jnp.sum(jnp.tanh(x[None] @ p["k"]) ** 2) + jnp.sum(p["c"]),
    "branch": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda: jnp.sum(jnp.tanh(x @ p["k"])), lambda: jnp.sum(x @ p["c"])
    ),
    "slices": lambda p, x: jnp.sum(jnp.tanh(x[:, :4] @ p["k"][:4] + x[:, 4:] @ p["c"][4:])),
    "convolution": convolved,
}

MESHES = {"one axis": ((8,), ("d",)), "partly manual": ((4, 2), ("d", "m"))}


def check(loss, threshold_of, layout, mode, **options):
    shape, names = MESHES[layout]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    with enable_x64(True):
        params, x = case()
        threshold = threshold_of(params)
        f = psc.clipped_grad(loss, threshold, mode=mode, axis_name="d", **options)
        shared = jax.shard_map(
            f, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), axis_names={"d"}
        )
        expected = psc.clipped_grad(loss, threshold, mode="vmap")(params, x)
        assert_close(jax.jit(shared)(params, x), expected, 1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("layout", "mode"), [("one axis", "one_pass"), ("partly manual", "one_pass")]
)
def test_all_together(name, layout, mode):
    check(LOSSES[name], lambda _: 1.0, layout, mode)


@pytest.mark.parametrize("mode", ["vmap", "two_pass"])
@pytest.mark.parametrize("name", ["axis of size 1", "branch", "convolution"])
def test_other_modes_on_a_partly_manual_mesh(name, mode):
    check(LOSSES[name], lambda _: 1.0, "partly manual", mode)


@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize(
    ("threshold_of", "options"),
    [
        (lambda params: psc.by_layer(params, 1.0), {}),
        (lambda params: psc.by_layer(params, 1.0), {"on_nonfinite": "propagate"}),
        (lambda params: psc.by_layer(params, 1.0), {"microbatch_size": 1}),
        (lambda _: {"k": psc.each_slice([1.0] * WIDTH), "c": 1.0}, {}),
        (lambda params: psc.by_layer(params, psc.growing_threshold(1.0, 2.0)), {}),
    ],
    ids=["constant", "propagated", "micro-batches", "slices", "growing"],
)
def test_by_group(threshold_of, options, layout):
    check(two_layers, threshold_of, layout, "auto", **options)
