"""Compare 8 virtual devices with one, for stacks and the engine, and check their traffic."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from benchmarks.common.collectives import collectives, moving_operations, num_bytes, num_elements
from psclip_optax import meshes
from psclip_optax.engine.routes import route
from tests import slow
from tests.numerics import assert_close, enable_x64, in_float64
from tests.small_zoo import small

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # JAX < 0.8
MODES = ["one_pass", "two_pass", "vmap"]
LAYOUTS = ["data parallel", "sharded parameters", "tensor parallel"]
THRESHOLD = psc.growing_threshold(0.5, 1.5)
N = 32

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices, which tests/conftest.py makes of a CPU alone"
)


def mesh_of(layout, axis_type=AxisType.Auto):
    shape, names = ((4, 2), ("data", "model")) if layout == "tensor parallel" else ((8,), ("data",))
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


def params_sharding(mesh, layout, leaf):
    if layout == "data parallel":
        return NamedSharding(mesh, P())
    name = "model" if layout == "tensor parallel" else "data"
    axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape[name] == 0]
    return NamedSharding(mesh, P(*[None] * axes[-1], name) if axes else P())


def placed(mesh, layout, params, batch):
    shardings = jax.tree.map(functools.partial(params_sharding, mesh, layout), params)
    return jax.device_put(params, shardings), jax.device_put(batch, NamedSharding(mesh, P("data")))


# A sequence through a look-up and a product, and a vector through two products


def sequence_loss(params, tokens, y):
    hidden = jnp.tanh(params["table"][tokens] @ params["w"] + params["b"])
    return jnp.square(hidden.sum() - y)


def vector_loss(params, x, y):
    hidden = jnp.tanh(jnp.dot(x, params["w"]) + params["b"])
    return jnp.square(jnp.dot(hidden, params["v"]).sum() - y)


def sequences(n=N):
    random = np.random.default_rng(0)
    shapes = {"table": (32, 8), "w": (8, 16), "b": (16,)}
    params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    return params, (jnp.asarray(random.integers(0, 32, (n, 5))), outliers(random, n))


def vectors(n=N):
    random = np.random.default_rng(0)
    shapes = {"w": (8, 16), "b": (16,), "v": (16, 8)}
    params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    return params, (jnp.asarray(random.standard_t(1.5, (n, 8))), outliers(random, n))


def outliers(random, n):
    return jnp.asarray(random.standard_t(1.5, n)).at[3].set(jnp.nan)  # a sample to drop


MASK = np.arange(N) % 7 != 5


def finite(stats):
    """Return the statistics without the non-finite norm, which is compared separately."""
    return stats._replace(norms=jnp.nan_to_num(stats.norms, posinf=-1.0, nan=-1.0))


SLICED = [
    *({"mode": mode} for mode in MODES),
    {"mode": "one_pass", "microbatch_size": 8},
    {"mode": "two_pass", "microbatch_size": 8},
    {"mode": "vmap", "microbatch_size": 8},
    {"mode": "one_pass", "microbatch_size": 5},
    {"clip_at": "micro-batch", "microbatch_size": 4},
]


def assert_same(got, expected):
    assert_close(got[:2], expected[:2], 1e-10)
    assert_close(finite(got[2]), finite(expected[2]), 1e-10)
    assert int(expected[2].num_nonfinite) == 1


def in_words(options):
    return "-".join(map(str, options.values()))


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("layout", "options"), slow.diagonal(LAYOUTS, SLICED, every=2), ids=str)
def test_sharded_by_jit(layout, options):
    with enable_x64(True):
        params, batch = sequences()
        f = jax.jit(
            psc.clipped_value_and_grad(sequence_loss, THRESHOLD, return_stats=True, **options)
        )
        expected = f(params, *batch, sample_mask=MASK)
        mesh = mesh_of(layout)
        params, (*batch, mask) = placed(mesh, layout, params, (*batch, MASK))
        assert_same(f(params, *batch, sample_mask=mask), expected)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("mode", "size", "layout", "is_set"),
    slow.diagonal(MODES, [None, 8], ["data parallel", "tensor parallel"], [False, True]),
)
def test_explicit_mesh(mode, size, layout, is_set):
    with enable_x64(True):
        params, batch = vectors()
        f = jax.jit(
            psc.clipped_value_and_grad(
                vector_loss, THRESHOLD, mode=mode, microbatch_size=size, return_stats=True
            )
        )
        expected = f(params, *batch, sample_mask=MASK)
        mesh = mesh_of(layout, AxisType.Explicit)
        params, (*batch, mask) = placed(mesh, layout, params, (*batch, MASK))
        if not is_set:
            assert_same(f(params, *batch, sample_mask=mask), expected)
            return
        with set_mesh(mesh):
            assert_same(f(params, *batch, sample_mask=mask), expected)


def test_explicit_mesh_with_a_traced_threshold_under_vmap_and_not_jitted():
    with enable_x64(True):
        params, batch = vectors()
        f = psc.clipped_value_and_grad(vector_loss, 1.0, return_stats=True)
        expected = jax.jit(f)(params, *batch, threshold=psc.growing_threshold(0.5, 1.5))
        mesh = mesh_of("tensor parallel", AxisType.Explicit)
        params, batch = placed(mesh, "tensor parallel", params, batch)

        def call(params, alpha, *batch):
            return f(params, *batch, threshold=psc.growing_threshold(alpha, 1.5))

        got = jax.jit(call)(params, 0.5, *batch)
        assert_same(got, expected)
        assert [leaf.sharding.spec for leaf in jax.tree.leaves(got[1])] == [
            leaf.sharding.spec for leaf in jax.tree.leaves(params)
        ]
        assert got[2].norms.sharding.spec == P("data")
        assert_same(call(params, 0.5, *batch), expected)
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
        both = jax.jit(jax.vmap(call, (0, None, *[None] * len(batch))))(twice, 0.5, *batch)
        assert_same(jax.tree.map(lambda leaf: leaf[1], both), expected)
        assert "dense" in str(f.explain(params, *batch))


def test_explicit_mesh_that_the_loss_closes_over_is_refused():
    params, batch = vectors()
    mesh = mesh_of("data parallel", AxisType.Explicit)
    params, batch = placed(mesh, "data parallel", params, batch)
    f = psc.clipped_value_and_grad(lambda w, x, y: vector_loss(params | {"w": w}, x, y), 1.0)
    with pytest.raises(ValueError, match=r"closes over some: pass them as arguments.*in_axes=None"):
        jax.jit(f)(params["w"], *batch)


@pytest.mark.parametrize(
    ("layout", "axis_type"),
    slow.diagonal(LAYOUTS, [AxisType.Auto, AxisType.Explicit]),
    ids=str,
)
def test_sharded_stack(layout, axis_type):
    with enable_x64(True):
        params, batch = vectors()
        stacked = jax.jit(jax.vmap(jax.grad(vector_loss), (None, 0, 0)))(params, *batch)
        tx = psc.per_sample_clip(THRESHOLD)
        update = jax.jit(tx.update)
        grads, state = update(stacked, tx.init(params), sample_mask=MASK)
        mesh = mesh_of(layout, axis_type)
        own = functools.partial(params_sharding, mesh, layout)

        def placed_stack(leaf):
            spec = [] if layout == "sharded parameters" else own(leaf[0]).spec
            return jax.device_put(leaf, NamedSharding(mesh, P("data", *spec)))

        mask = jax.device_put(MASK, NamedSharding(mesh, P("data")))
        got, got_state = update(
            jax.tree.map(placed_stack, stacked), tx.init(params), sample_mask=mask
        )
        assert_close(got, grads, 1e-10)
        assert_close(got_state, state, 1e-10)


# Under shard_map


def varying(params, axis_name):
    return jax.tree.map(lambda leaf: meshes.varying(leaf, axis_name), params)


def specs_of_stats():
    return psc.ClipStats(P("data"), P("data"), P(), P())


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("options", "masked_and_checked"),
    slow.diagonal(
        [
            *({"mode": mode} for mode in MODES),
            {"mode": "one_pass", "microbatch_size": 1},
            {"mode": "two_pass", "microbatch_size": 3},
            {"mode": "vmap", "microbatch_size": 2},
            {"clip_at": "micro-batch", "microbatch_size": 2},
        ],
        list(itertools.product([True, False], repeat=2)),
        every=2,
    ),
    ids=str,
)
def test_shard_map(options, masked_and_checked):
    masked, check_vma = masked_and_checked
    build = functools.partial(
        psc.clipped_value_and_grad, sequence_loss, THRESHOLD, return_stats=True, **options
    )
    with enable_x64(True):
        params, batch = sequences()
        mask = MASK if masked else None
        expected = jax.jit(build())(params, *batch, sample_mask=mask)
        f = build(axis_name="data")
        call = lambda params, tokens, y, mask: f(params, tokens, y, sample_mask=mask)
        sharded = jax.shard_map(
            call,
            mesh=mesh_of("data parallel"),
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=(P(), P(), specs_of_stats()),
            check_vma=check_vma,
        )
        assert_same(jax.jit(sharded)(params, *batch, mask), expected)


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("mapped", "mode"), slow.diagonal([jax.vmap, jax.pmap], MODES))
def test_an_axis_of_vmap_or_pmap_stands_for_one_of_a_mesh(mapped, mode):
    with enable_x64(True):
        params, batch = sequences()
        plain = psc.clipped_value_and_grad(sequence_loss, THRESHOLD)
        expected = jax.jit(plain)(params, *batch)
        f = psc.clipped_value_and_grad(sequence_loss, THRESHOLD, mode=mode, axis_name="data")
        shards = jax.tree.map(lambda leaf: leaf.reshape(4, N // 4, *leaf.shape[1:]), batch)
        run = mapped(lambda *batch: f(params, *batch), axis_name="data")
        found = jax.jit(run)(*shards) if mapped is jax.vmap else run(*shards)
        for device in range(4):
            assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], found), expected, 1e-10)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_aux_and_two_axes(check_vma):
    loss = lambda params, tokens, y: (sequence_loss(params, tokens, y), tokens[0])
    with enable_x64(True):
        params, batch = sequences()
        plain = psc.clipped_value_and_grad(loss, THRESHOLD, has_aux=True)
        expected = jax.jit(plain)(params, *batch)
        names = ("data", "model")
        f = psc.clipped_value_and_grad(loss, THRESHOLD, has_aux=True, axis_name=names)
        sharded = jax.shard_map(
            f,
            mesh=mesh_of("tensor parallel"),
            in_specs=(P(), P(names), P(names)),
            out_specs=((P(), P(names)), P()),
            check_vma=check_vma,
        )
        assert_close(jax.jit(sharded)(params, *batch), expected, 1e-10)


@pytest.mark.parametrize(("masked", "check_vma"), slow.diagonal([True, False], [True, False]))
def test_stack_under_shard_map(masked, check_vma):
    with enable_x64(True):
        params, batch = sequences()
        stacked = jax.jit(jax.vmap(jax.grad(sequence_loss), (None, 0, 0)))(params, *batch)
        mask = MASK if masked else None
        tx = psc.per_sample_clip(THRESHOLD)
        expected = tx.update(stacked, tx.init(params), params, sample_mask=mask)
        tx = psc.per_sample_clip(THRESHOLD, axis_name="data")
        call = lambda stacked, state, mask: tx.update(stacked, state, params, sample_mask=mask)
        sharded = jax.shard_map(
            call,
            mesh=mesh_of("data parallel"),
            in_specs=(P("data"), P(), P("data")),
            out_specs=(P(), P()),
            check_vma=check_vma,
        )
        assert int(expected[1].num_nonfinite) == 1
        assert_close(jax.jit(sharded)(stacked, tx.init(params), mask), expected, 1e-10)


def row_loss(params, i, x):
    row = jax.lax.dynamic_index_in_dim(params["table"], i, 0, keepdims=False)
    return jnp.tanh(row @ params["w"] * params["scale"]).sum() * x[0, 0]


def normalised_loss(params, i, x):
    weight = params["w"] / jnp.linalg.norm(params["w"])
    return jnp.sum(jnp.tanh(x * params["scale"] @ weight) @ params["table"].T)


def scanned_loss(params, i, x):
    def step(carry, x):
        return jnp.tanh(carry @ params["w"] + x * params["scale"]), None

    return jax.lax.scan(step, params["table"][0], x)[0].sum() * x[0, 0]


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("loss", "mode"),
    slow.diagonal([row_loss, normalised_loss, scanned_loss], ["one_pass", "two_pass"]),
)
def test_equations_that_are_rewritten_or_computed_vary_as_before(loss, mode):
    with enable_x64(True):
        random = np.random.default_rng(0)
        shapes = {"table": (7, 5), "w": (5, 5), "scale": (5,)}
        params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
        batch = np.arange(16) % 7, random.standard_t(1.5, (16, 3, 5))
        build = functools.partial(psc.clipped_grad, loss, THRESHOLD, mode=mode)
        sharded = jax.shard_map(
            build(axis_name="data"),
            mesh=mesh_of("data parallel"),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
        expected = jax.jit(build())(params, *batch)
        assert_close(jax.jit(sharded)(params, *batch), expected, 1e-10)


def test_memory_is_estimated_under_shard_map():
    params, batch = sequences()
    sharded = jax.shard_map(
        psc.clipped_grad(sequence_loss, THRESHOLD, axis_name="data", memory_limit_bytes=1),
        mesh=mesh_of("data parallel"),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    assert jax.tree.map(jnp.shape, jax.eval_shape(sharded, params, *batch)) == jax.tree.map(
        jnp.shape, params
    )


@pytest.mark.parametrize(
    ("axis_name", "axes", "missing", "wanted"),
    [
        (None, ("data",), "'data'", "'data'"),
        (None, ("data", "model"), r"\('data', 'model'\)", r"\('data', 'model'\)"),
        ("data", ("data", "model"), "'model'", r"\('data', 'model'\)"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_shard_map_would_sum_are_refused(mode, axis_name, axes, missing, wanted):
    params, batch = sequences()
    sharded = jax.shard_map(
        psc.clipped_grad(sequence_loss, THRESHOLD, mode=mode, axis_name=axis_name),
        mesh=mesh_of("tensor parallel"),
        in_specs=(P(), P(axes), P(axes)),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=f"mesh axis {missing} .* pass axis_name={wanted};"):
        jax.eval_shape(sharded, params, *batch)


def test_what_all_samples_of_a_device_share_varies_the_loss_too():
    sharded = jax.shard_map(
        psc.clipped_grad(lambda w, x, scale: jnp.dot(w, x) * scale[0], 1.0, in_axes=(0, None)),
        mesh=mesh_of("data parallel"),
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="the loss varies over the mesh axis 'data'"):
        jax.eval_shape(sharded, jnp.ones(3), jnp.ones((4, 3)), jnp.ones(8))


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("mode", MODES)
def test_each_device_clips_its_own_where_parameters_vary_too(mode):
    f = psc.clipped_grad(sequence_loss, THRESHOLD, mode=mode)
    with enable_x64(True):
        params, batch = sequences()
        by_device = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
        expected = jax.jit(jax.vmap(f, (None, 0, 0)))(params, *by_device)

        def own(params, *batch):
            return jax.tree.map(lambda leaf: leaf[None], f(varying(params, "data"), *batch))

        sharded = jax.shard_map(
            own,
            mesh=mesh_of("data parallel"),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
        )
        assert_close(jax.jit(sharded)(params, *batch), expected, 1e-10)


def from_stack(params, *batch, own=lambda params: params):
    tx = psc.per_sample_clip(THRESHOLD, axis_name="data")
    stacked = jax.vmap(jax.grad(sequence_loss), (None, 0, 0))(own(params), *batch)
    return tx.update(stacked, tx.init(params))[0]


def test_a_stack_that_shard_map_has_summed_is_refused():
    with enable_x64(True):
        params, batch = sequences()
        tx = psc.per_sample_clip(THRESHOLD)
        stacked = jax.vmap(jax.grad(sequence_loss), (None, 0, 0))(params, *batch)
        expected, _ = tx.update(stacked, tx.init(params))
        sharded = functools.partial(
            jax.shard_map,
            mesh=mesh_of("data parallel"),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
        with pytest.raises(ValueError, match=r"summed over them.* params = jax.lax.p(cast|vary)"):
            jax.eval_shape(sharded(from_stack), params, *batch)
        of_own = functools.partial(from_stack, own=lambda params: varying(params, "data"))
        assert_close(jax.jit(sharded(of_own))(params, *batch), expected, 1e-10)
        assert_close(jax.jit(sharded(from_stack, check_vma=False))(params, *batch), expected, 1e-10)


# The zoo


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(
    ("name", "mode", "layout"),
    slow.diagonal(
        ["weight_norm", "alexnet", "gpt_tied", "gpt_scanned", "lstm"],
        ["one_pass", "two_pass"],
        ["data parallel", "sharded parameters"],
        every=5,
    ),
)
def test_zoo_is_that_of_one_device_and_sends_no_more_than_a_plain_gradient(name, mode, layout):
    n = 16
    with enable_x64(True):
        model = small(name)
        params, batch = in_float64(model.params), in_float64(model.batch(n))
        threshold = psc.growing_threshold(0.1, 1.5)
        expected = jax.jit(psc.clipped_value_and_grad(model.loss, threshold))(params, *batch)
        mesh = mesh_of(layout)
        loss = gathering(mesh, model.loss) if layout == "sharded parameters" else model.loss
        params, batch = placed(mesh, layout, params, batch)
        f = jax.jit(psc.clipped_value_and_grad(loss, threshold, mode=mode))
        compiled = f.lower(params, *batch).compile()
        assert_close(compiled(params, *batch), expected, 1e-10, floor=1e-3)
        plain = plain_gradient(loss).lower(params, *batch).compile().as_text()
        sent, by_plain = num_elements(compiled.as_text()), num_elements(plain)
        assert by_plain > 0
        assert sent <= 1.5 * by_plain + 16 * n, f"{sent} against {by_plain}"


def slices_of(tree):
    """Make each layer of a stack a group."""
    return psc.each_slice([0.1] * len(jax.tree.leaves(tree)[0]))


@pytest.mark.parametrize(
    ("name", "groups", "layout"),
    [
        pytest.param("alexnet", "by leaf", "data parallel", marks=pytest.mark.slow),
        pytest.param("gpt_tied", "by layer", "sharded parameters", marks=pytest.mark.slow),
        ("mlp", "by layer", "sharded parameters"),
        pytest.param("gpt_scanned", "by leaf", "sharded parameters", marks=pytest.mark.slow),
        ("gpt_scanned", "by layer", "data parallel"),
    ],
)
def test_zoo_by_group_is_that_of_one_device_and_sends_no_more(name, groups, layout):
    n = 16
    with enable_x64(True):
        model = small(name)
        params, batch = in_float64(model.params), in_float64(model.batch(n))
        threshold = jax.tree.map(lambda _: psc.growing_threshold(0.1, 1.5), params)
        if groups == "by layer":
            threshold = psc.by_layer(params, 0.3)
            stacks = ["CheckpointBlock_0"] if name == "gpt_scanned" else []
            threshold |= {stack: slices_of(params[stack]) for stack in stacks}
        run = functools.partial(psc.clipped_value_and_grad, threshold=threshold, return_stats=True)
        expected = jax.jit(run(model.loss, mode="vmap"))(params, *batch)
        assert run(model.loss).explain(params, *batch).mode == "fused"
        mesh = mesh_of(layout)
        loss = gathering(mesh, model.loss) if layout == "sharded parameters" else model.loss
        params, batch = placed(mesh, layout, params, batch)
        assert_close(jax.jit(run(loss))(params, *batch), expected, 1e-9, floor=1e-3)
        # Without a loop that may repeat a pass, whose collectives are not counted.
        once = jax.jit(run(loss, on_nonfinite="propagate")).lower(params, *batch).compile()
        plain = plain_gradient(loss).lower(params, *batch).compile().as_text()
        sent, by_plain = num_elements(once.as_text()), num_elements(plain)
        most = 1.02 * by_plain + 32 * n * expected[2].norms.shape[1]
        assert sent <= most, f"{sent} against {by_plain}"


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 8}], ids=in_words)
def test_groups_under_shard_map(options):
    with enable_x64(True):
        params, batch = sequences()
        prefix = {"table": 0.2, "w": THRESHOLD, "b": 0.3}
        f = functools.partial(psc.clipped_value_and_grad, sequence_loss, prefix, return_stats=True)
        expected = jax.jit(f(mode="vmap"))(params, *batch, sample_mask=MASK)
        by_sample = P("data")
        specs = (P(), P(), psc.ClipStats(by_sample, by_sample, P(), P()))

        def run(params, batch, mask):
            return f(axis_name="data", **options)(params, *batch, sample_mask=mask)

        sharded = jax.shard_map(
            run,
            mesh=mesh_of("data parallel"),
            in_specs=(P(), by_sample, by_sample),
            out_specs=specs,
        )
        assert_same(jax.jit(sharded)(params, batch, jnp.asarray(MASK)), expected)


@pytest.mark.parametrize("name", slow.but(["alexnet"], ["alexnet", "gpt", "lstm"]))
def test_two_passes_send_the_gradient_once_as_users_have_them(name):
    n, layout = 16, "data parallel"
    model = small(name)
    params, batch = placed(mesh_of(layout), layout, model.params, model.batch(n))
    f = jax.jit(psc.clipped_value_and_grad(model.loss, THRESHOLD, mode="two_pass"))
    sent = num_elements(f.lower(params, *batch).compile().as_text())
    plain = plain_gradient(model.loss).lower(params, *batch).compile().as_text()
    assert sent <= 1.5 * num_elements(plain) + 16 * n


def gathering(mesh, loss):
    """Constrain a loss as under FSDP: parameters are gathered where they are used, not samples."""

    def gathered_loss(params, *example):
        everywhere = NamedSharding(mesh, P())
        return loss(jax.lax.with_sharding_constraint(params, everywhere), *example)

    return gathered_loss


def plain_gradient(loss):
    def mean_loss(params, *batch):
        return jnp.mean(jax.vmap(loss, (None, *[0] * len(batch)))(params, *batch))

    return jax.jit(jax.value_and_grad(mean_loss))


# Slices of a sharded batch


@pytest.mark.parametrize(
    ("mode", "sizes"),
    slow.diagonal(["one_pass", "two_pass"], [(32, 16), (160, 8)]),  # unrolled, and in a loop
    ids=str,
)
def test_slices_of_a_sharded_batch_stay_sharded(mode, sizes):
    n, size = sizes
    with enable_x64(True):
        params, batch = sequences(n)
        f = jax.jit(
            psc.clipped_value_and_grad(
                sequence_loss, THRESHOLD, mode=mode, microbatch_size=size, return_stats=True
            )
        )
        mask = np.arange(n) != 5
        expected = f(params, *batch, sample_mask=mask)
        layout = "data parallel"
        params, (*batch, mask) = placed(mesh_of(layout), layout, params, (*batch, mask))
        compiled = f.lower(params, *batch, sample_mask=mask).compile()
        assert_same(compiled(params, *batch, sample_mask=mask), expected)
        moved = moving_operations(compiled.as_text())
        assert not moved, "samples move between devices\n" + "\n".join(moved)


@pytest.mark.parametrize("operation", ["all-gather", "all-to-all", "collective-permute-start"])
def test_operations_that_move_samples_are_found(operation):
    text = f"""%branch.1 (x: f32[4]) -> f32[16] {{
  ROOT %a = f32[16]{{0}} all-gather(%x), dimensions={{0}}
}}

%body.1 (x: f32[4]) -> f32[16] {{
  ROOT %a = f32[16]{{0}} all-gather(%x), dimensions={{0}}
}}

ENTRY %main (x: f32[4]) -> f32[16] {{
  %sum = (f32[], f32[2,3]{{1,0}}) all-reduce(%y, %z), to_apply=%add
  %part = f32[4]{{0}} reduce-scatter(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %moved = f32[16]{{0}} {operation}(%x), dimensions={{0}}
  %loop = f32[16]{{0}} while(%x), condition=%flag.1, body=%body.1
  ROOT %c = f32[16]{{0}} conditional(%i, %x, %x), branch_computations={{%kept.1, %branch.1}}
}}"""
    assert moving_operations(text) == [f"%moved = f32[16]{{0}} {operation}(%x), dimensions={{0}}"]
    assert [one.num_elements for one in collectives(text)] == [7, 16, 16]
    assert [one.num_bytes for one in collectives(text)] == [28, 64, 64]
    assert num_elements(text) == 39


def test_what_a_loop_sends_counts_as_often_as_it_is_run():
    text = """%inner.1 (x: bf16[4]) -> bf16[4] {
  ROOT %a = bf16[4]{0} all-reduce(%x), to_apply=%add
}

%outer.1 (x: bf16[4]) -> bf16[4] {
  ROOT %w = bf16[4]{0} while(%x), condition=%c.1, body=%inner.1, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (x: bf16[4]) -> bf16[4] {
  %a = bf16[4]{0} all-reduce(%x), to_apply=%add
  ROOT %w = bf16[4]{0} while(%a), condition=%c.2, body=%outer.1, backend_config={"known_trip_count":{"n":"3"}}
}"""
    assert [one.times for one in collectives(text)] == [15, 1]
    assert num_elements(text) == 64
    assert num_bytes(text) == 128


# Known meshes


def mesh_of_four():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


def mesh_of_four_by_two():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_devices_are_counted_by_the_mesh_that_arrays_are_on():
    array = jnp.ones((8, 2))
    assert meshes.num_sharing([array], 8) == jax.device_count()
    assert meshes.num_sharing([array], 6) == 1
    on_four = jax.device_put(array, NamedSharding(mesh_of_four(), P("data")))
    assert meshes.num_sharing([array, on_four], 8) == 4
    assert meshes.num_sharing([on_four], 6) == 1
    found = []
    of_each = jax.shard_map(
        lambda x: found.append(meshes.num_sharing(x, 8)) or x,
        mesh=mesh_of("tensor parallel"),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    jax.eval_shape(jax.jit(of_each), array)
    assert found == [2]  # those of "model", because each device along "data" has a separate array


@pytest.mark.parametrize(
    ("num_samples", "name", "expected"),
    [
        (8, None, 8),  # by both axes
        (12, None, 4),  # by one axis or the other: 4 is a multiple of 2
        (6, None, 2),
        (7, None, 1),
        (8, "model", 2),
        (8, ("data", "model"), 8),
        (6, "data", 1),  # 4 devices cannot share 6 samples
        (8, "other", 8),  # an axis of vmap, which the mesh does not have
    ],
)
def test_samples_may_be_shared_along_some_axes_of_a_mesh(num_samples, name, expected):
    array = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh_of_four_by_two(), P("data")))
    assert meshes.num_sharing([array], num_samples, name) == expected


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("mesh", [mesh_of_four, mesh_of_four_by_two])
def test_samples_stay_where_they_are_on_a_part_of_the_devices(mesh, mode, monkeypatch):
    monkeypatch.setattr(route, "_MOST_READ_ON_CPU", 500)  # so that norms are made in parts
    n = 20  # samples that four devices share, and eight cannot
    params, batch = sequences(n)
    sharding = NamedSharding(mesh(), P("data"))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in batch]
    f = psc.clipped_grad(sequence_loss, THRESHOLD, mode=mode)
    moved = moving_operations(jax.jit(f).lower(params, *shapes).compile().as_text())
    assert not moved, "samples move between devices\n" + "\n".join(moved)


def two_layers_loss(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - y))


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_products_of_gram_matrices_are_summed_where_their_columns_are(mode):
    n, num_rows, width = 16, 24, 64
    mesh = mesh_of("tensor parallel")
    shardings = {
        "up": NamedSharding(mesh, P(None, "model")),
        "down": NamedSharding(mesh, P("model", None)),
    }
    random = np.random.default_rng(0)
    params = {
        "up": random.normal(size=(width, 4 * width)),
        "down": random.normal(size=(4 * width, width)),
    }
    batch = random.standard_t(1.5, (2, n, num_rows, width))
    with enable_x64(True):
        f = functools.partial(psc.clipped_value_and_grad, two_layers_loss, 1e-3, mode=mode)
        expected = jax.jit(f(return_stats=True))(params, *batch)
        placed_params = jax.tree.map(jax.device_put, params, shardings)
        placed_batch = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch]
        compiled = jax.jit(f(return_stats=True)).lower(placed_params, *placed_batch).compile()
        assert_close(compiled(placed_params, *placed_batch), expected, 1e-10)
        by_plain = plain_gradient(two_layers_loss).lower(placed_params, *placed_batch).compile()
    sent, plain = num_elements(compiled.as_text()), num_elements(by_plain.as_text())
    # The activations of each pass are summed over "model"; of the norms only n numbers are.
    of_a_pass = n // 4 * num_rows * width
    assert sent <= plain + 32 * n + (of_a_pass if mode == "two_pass" else 0)


def layers_loss(params, x, y):
    def layer(x, weights):
        up, down = weights
        return x + jnp.tanh(x @ up) @ down, None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
    return jnp.mean(jnp.square(x - y))


def test_two_passes_gather_rematerialised_layers_once_more_than_a_plain_gradient():
    n, num_layers, num_rows, width = 16, 5, 24, 16  # gradients no larger than the outputs
    mesh = mesh_of_four()
    by_column, by_sample = (
        NamedSharding(mesh, P(None, None, "data")),
        NamedSharding(mesh, P("data")),
    )
    random = np.random.default_rng(0)
    weights = random.normal(size=(2, num_layers, width, width)) / width
    batch = random.standard_t(1.5, (2, n, num_rows, width))
    f = functools.partial(psc.clipped_value_and_grad, mode="two_pass", return_stats=True)
    with enable_x64(True):
        expected = jax.jit(f(layers_loss, 1e-3))(tuple(weights), *batch)
        params = jax.device_put(tuple(weights), by_column)
        placed_batch = [jax.device_put(x, by_sample) for x in batch]

        def loss(params, x, y):
            """Constrain activations, so that parameters are gathered where they are used."""
            everywhere = NamedSharding(mesh, P())
            constrained = lambda x: jax.lax.with_sharding_constraint(x, everywhere)
            return layers_loss(params, constrained(x), constrained(y))

        own = f(loss, 1e-3, spmd_axis_name="data")
        plan = own.explain(params, *placed_batch)
        assert {row.route for row in plan.rows} == {"dense"}
        compiled = jax.jit(own).lower(params, *placed_batch).compile()
        assert_close(compiled(params, *placed_batch), expected, 1e-10)
        plain = plain_gradient(layers_loss).lower(params, *placed_batch).compile()

    def gathered(program):
        of_weights = [c for c in collectives(program.as_text()) if c.name == "all-gather"]
        return sum(c.num_elements * c.times for c in of_weights)

    assert gathered(plain) > 0
    # In the forward and in both backward passes; a plain gradient has one backward pass.
    assert gathered(compiled) <= 1.5 * gathered(plain)
