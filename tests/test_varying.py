"""Check that whatever the clipping makes under shard_map varies over the mesh as JAX wants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from tests import slow
from tests.numerics import assert_close, enable_x64

GROWING = psc.growing_threshold(0.5, 1.5)
N, ROWS, WIDTH = 8, 3, 8

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices, which tests/conftest.py makes of a CPU alone"
)


def whole(call, num_inputs):
    """Map a function of parameters and of a batch over a mesh with one axis."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    in_specs = (P(), *[P("data")] * (num_inputs - 1))
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P())


def partly(call, num_inputs):
    """Map it over one axis of a mesh, and leave the other axis to the compiler."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    in_specs = (P(), *[P("data")] * (num_inputs - 1))
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P(), axis_names={"data"})


def arrays(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape)) for shape in shapes]


def assert_maps(build, params, *batch, mapped=whole, call=lambda f: f):
    """Compare a clipped function that is mapped over a mesh with the one for the whole batch."""
    expected = jax.jit(call(build(axis_name=None)))(params, *batch)
    found = jax.jit(mapped(call(build(axis_name="data")), 1 + len(batch)))(params, *batch)
    assert_close(found, expected, 1e-9)


# Groups that are clipped in the backward pass


def two_layers(params, x):
    return jnp.sum(jnp.square(jnp.tanh(jnp.tanh(x @ params["first"]) @ params["last"])))


def scanned_layers(params, x):
    step = lambda hidden, w: (jnp.tanh(hidden @ w), None)
    return jnp.sum(jnp.square(jax.lax.scan(step, x, params["layers"])[0] @ params["last"]))


def with_mask(f):
    return lambda params, x: f(params, x, sample_mask=jnp.ones(len(x), bool))


def with_positions(f):
    return lambda params, x: f(params, x, positions=jnp.ones(len(x), int))


CONSTANT = {"first": 0.5, "last": 1.0}


@pytest.mark.parametrize(
    ("threshold", "options", "call"),
    [
        (CONSTANT, {}, lambda f: f),
        (CONSTANT, {"on_nonfinite": "propagate"}, lambda f: f),
        (CONSTANT, {"microbatch_size": 1}, lambda f: f),
        (CONSTANT, {}, with_mask),
        ({"first": GROWING, "last": GROWING}, {}, with_positions),
    ],
    ids=["constant", "propagate", "micro-batches", "mask", "positions"],
)
def test_groups_with_thresholds_that_all_devices_share(threshold, options, call):
    with enable_x64(True):
        first, last, x = arrays((WIDTH, WIDTH), (WIDTH, WIDTH), (N, ROWS, WIDTH))
        params = {"first": first, "last": last}
        build = lambda **own: psc.clipped_grad(two_layers, threshold, **options, **own)
        assert build().explain(params, x).mode == "fused"
        assert_maps(build, params, x, call=call)


def test_slices_with_thresholds_that_all_devices_share():
    with enable_x64(True):
        layers, last, x = arrays((2, WIDTH, WIDTH), (WIDTH, 1), (N, ROWS, WIDTH))
        params = {"layers": layers, "last": last}
        threshold = {"layers": psc.each_slice([0.5, 1.0]), "last": 0.2}
        build = lambda **own: psc.clipped_grad(scanned_layers, threshold, **own)
        assert build().explain(params, x).mode == "fused"
        assert_maps(build, params, x)


# Weights that are computed from parameters and pulled back


def activated(params, x):
    return jnp.sum(jnp.square(jnp.tanh(x @ jnp.tanh(params["first"]) @ params["last"])))


def factored(params, x):
    return jnp.sum(jnp.square(jnp.tanh(x @ jnp.tanh(params["first"] @ params["last"]))))


def meeting(params, x):
    thin, flat = params["last"][:, :1], params["last"][:1]
    return jnp.sum(jnp.tanh(x @ (params["first"] @ thin @ flat)))


def table_of_scaled_rows(params, x):
    row = params["first"][jnp.argmax(x[0])] @ params["last"]
    scaled = params["first"] * params["last"][:, :1] * x[0, 0]
    return jnp.sum(jnp.tanh(row)) + jnp.sum(jnp.tanh(scaled))


def two_kinds(params, x):
    normalised = params["last"] / jnp.linalg.norm(params["last"], axis=0)
    hidden = jnp.tanh(x @ jnp.tanh(params["first"]))
    return jnp.sum(jnp.square(hidden @ normalised))


def square_params_and_batch():
    first, last, x = arrays((WIDTH, WIDTH), (WIDTH, WIDTH), (N, ROWS, WIDTH))
    return {"first": first, "last": last}, x


PULLED_BACK = [activated, factored, meeting, table_of_scaled_rows, two_kinds]


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("loss", "mode"), slow.diagonal(PULLED_BACK, ["one_pass", "two_pass"]))
def test_weights_that_are_pulled_back(loss, mode):
    with enable_x64(True):
        build = functools.partial(psc.clipped_grad, loss, 1.0, mode=mode)
        assert_maps(build, *square_params_and_batch())


# A mesh of which shard_map maps only some axes


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda both, dy: (dy @ both[1].T, both[0].T @ dy))


def with_unit_axes(params, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x[:1] @ params["first"]) @ params["last"]))


def convolved(params, x):
    kernel = params["first"].reshape(WIDTH, 1, WIDTH)
    hidden = jax.lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME", feature_group_count=8)
    return jnp.sum(jnp.tanh(hidden)) + jnp.sum(jnp.tanh(x @ params["last"]))


def by_condition(params, x):
    return jax.lax.cond(
        x[0, 0] > 0,
        lambda: jnp.sum(jnp.tanh(x @ params["first"])),
        lambda: jnp.sum(jnp.tanh(x @ params["last"])),
    )


def sliced(params, x):
    return jnp.sum(jnp.tanh(x + params["first"][:ROWS]) @ params["last"])


def hoisted(params, x):
    def step(hidden, x):
        return jnp.tanh(hidden @ (params["first"] / jnp.linalg.norm(params["first"])) + x), None

    return jnp.sum(jax.lax.scan(step, params["last"][0], x)[0])


def rewritten(params, x):
    normalised = params["first"] / jnp.linalg.norm(params["first"], axis=0)
    return jnp.sum(jnp.tanh(x * params["last"][0] @ normalised))


def with_a_rule(params, x):
    return jnp.sum(jnp.tanh(product(jnp.tanh(product(x, params["first"])), params["last"])))


LOSSES = [
    *(two_layers, with_unit_axes, convolved, by_condition, sliced, hoisted, rewritten),
    *(with_a_rule, meeting, table_of_scaled_rows),
]
OPTIONS = [
    {"mode": "one_pass"},
    {"mode": "two_pass"},
    {"mode": "vmap"},
    {"threshold": CONSTANT},
    {"microbatch_size": 1},
    {"memory_limit_bytes": 1},
    {"threshold": CONSTANT, "microbatch_size": 1},
]


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("loss", "options"), slow.diagonal(LOSSES, OPTIONS))
def test_a_part_of_the_mesh(loss, options):
    with enable_x64(True):
        build = functools.partial(psc.clipped_grad, loss, **{"threshold": 1.0, **options})
        assert_maps(build, *square_params_and_batch(), mapped=partly)


def without_flops(plan):
    """Return the rows of a plan without counts that depend on a mesh's other axes."""
    return [dataclasses.replace(row, extra_flops=0.0) for row in plan.rows]


@pytest.mark.parametrize(("mapped", "num_devices"), [(whole, 8), (partly, 4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_plans_under_shard_map_are_those_of_one_device(loss, mapped, num_devices):
    f, found = psc.clipped_grad(loss, 1.0, axis_name="data"), []

    def call(params, x):
        found.append(without_flops(f.explain(params, x)))
        return params

    params, x = square_params_and_batch()
    jax.eval_shape(mapped(call, 2), params, x)
    expected = psc.clipped_grad(loss, 1.0).explain(params, x[: N // num_devices])
    assert found == [without_flops(expected)]
