"""Every message that the package raises, warns of or prints, as its reader sees it.

A row is what provokes a message, as what it comes, and its whole text, where ⟨…⟩ stands for what
varies. The last tests hold the table against the source: no message is without a row.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import pathlib
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import psclip_optax as psc
from psclip_optax.cli import main
from psclip_optax.training import (
    archives,
    checkpoints,
    comparison,
    corruptions,
    datasets,
    distributed,
    files,
    methods,
    pipeline,
    plots,
    runs,
    tensorboard,
)
from psclip_optax.training.archives import DatasetError
from psclip_optax.training.configs import (
    CompareConfig,
    PlotConfig,
    TrainConfig,
    UsageError,
    check_config,
)
from psclip_optax.training.distributed import ProcessLostError
from psclip_optax.training.models import build_model
from psclip_optax.training.steps import linen_eval_step, linen_train_step, nnx_train_step
from tests.training.official_archives import cifar100, closed_port_url, serve

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(psc.__file__).parent


class Row(NamedTuple):
    provoke: Callable[[], Any]
    kind: type[BaseException]
    text: str


class Printed(Exception):  # noqa: N818
    """Stands for a message on stderr, which a command ends with."""


PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}
X, Y = np.ones((4, 3), np.float32), np.ones(4, np.float32)
STACK = {"w": np.ones((4, 3, 2), np.float32), "b": np.ones((4, 2), np.float32)}
MEAN = {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}
NORMS = np.linspace(1.0, 2.0, 1000)
RULE = psc.moment_threshold(1.5)
SPLIT = datasets.Split(np.zeros((6, 2, 2, 1), np.uint8), np.zeros(6, np.int32))


def loss(params, x, y):
    return jnp.sum(jnp.tanh(x @ params["w"]) + params["b"]) * y


def of_x(params, x):
    return loss(params, x, 1.0)


def grad(
    loss=loss, params=PARAMS, batch=(X, Y), threshold: Any = 1.0, call: Any = None, **options: Any
):
    return psc.clipped_grad(loss, threshold, **options)(params, *batch, **call or {})


def clip(
    grads: Any = STACK, threshold: Any = 1.0, wrap=lambda tx: tx, options: Any = None, **call: Any
):
    tx = wrap(psc.per_sample_clip(threshold, **options or {}))
    return tx.update(grads, tx.init(PARAMS), **call)


def track(rule: Any, norms: Any):
    tx = psc.track_norms(rule)
    return tx.update(MEAN, tx.init(PARAMS), norms=norms)


def accumulate(grads: Any = MEAN, every: Any = 2, **options: Any):
    tx = psc.accumulate_clipped(optax.sgd(0.1), every, 1.0, **options)
    return tx.update(grads, tx.init(PARAMS), PARAMS)


def accumulate_by(accumulator_dtype: Any):
    return psc.accumulate_clipped(optax.sgd(0.1), 2, 1.0, accumulator_dtype=accumulator_dtype)


def step(loss=loss, tx=None, batch=(X, Y), call: Any = None, **options: Any):
    tx = optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)) if tx is None else tx
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    return linen_train_step(loss, **options)(state, *batch, **call or {})


def with_dropout():
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, psc.ps_clip_sgd(0.1, 1.0, 2.0), wrt=nnx.Param)
    return nnx_train_step(lambda model, x: model(x).sum())(model, optimizer, X)


def swapped():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, psc.ps_clip_sgd(0.1, 1.0, 2.0), wrt=nnx.Param)
    return nnx_train_step(lambda model, x: model(x)[0])(optimizer, model, X)


def beyond_memory():
    params = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    stacked = jax.ShapeDtypeStruct((1 << 22, 1 << 20), jnp.float32)
    tx = psc.per_sample_clip(1.0)
    jax.jit(tx.update).lower(stacked, jax.eval_shape(tx.init, params))


def normalised(params, x):
    return jnp.sum((x - x.mean(0)) / (1 + x.std(0)) @ params["w"])


def printing(params, x):
    jax.debug.print("{}", x, ordered=True)
    return of_x(params, x)


def exported_with_symbols():
    (n,) = jax.export.symbolic_shape("n")
    run = jax.jit(lambda x: psc.clipped_grad(of_x, 1.0)(PARAMS, x))
    jax.export.export(run)(jax.ShapeDtypeStruct((n, 3), jnp.float32))


def verified_with_an_axis():
    f = psc.clipped_grad(of_x, 1.0, axis_name="i")
    jax.vmap(lambda x: f.verify(PARAMS, x).ok, axis_name="i")(X[None])


def four_devices(axis_type: AxisType):
    return jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])


def closing_over_a_sharded_array():
    mesh = four_devices(AxisType.Explicit)
    x, w = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((X, P("data")), (X[0], P())))
    f = psc.clipped_grad(lambda params, x: jnp.dot(params, x) * jnp.sum(w), 1.0)
    return jax.jit(f)(w, x)


def on_four_devices(function):
    sharded = jax.shard_map(
        function,
        mesh=four_devices(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return jax.eval_shape(sharded, PARAMS, X)


def clip_what_was_summed(params, x):
    grads = jax.vmap(jax.grad(of_x), (None, 0))(params, x)
    return clip(grads, options={"axis_name": "data"})


def batches(**options: Any):
    given = {"batch_size": 2, "seed": 0, "mean": [0.0], "std": [1.0]} | options
    return pipeline.train_batches(given.pop("split", SPLIT), **given)


def in_folder(provoke: Callable[[pathlib.Path], Any]) -> Callable[[], Any]:
    def provoke_in_folder() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return provoke(pathlib.Path(folder))

    return provoke_in_folder


def fetch(
    folder: pathlib.Path,
    path: str = "/toy",
    known_hash: str = "md5:" + "0" * 32,
    server: bool = True,
):
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1"}))
        running = stack.enter_context(serve()) if server else None
        if running:
            running.bodies["/toy"] = b"toy"
        url = running.url if running else closed_port_url()
        archives.fetch_archive(url + path, known_hash, "toy.tar.gz", folder)


def unpickle(content: Any):
    data = content if isinstance(content, bytes) else pickle.dumps(content)
    return archives.load_pickle(io.BytesIO(data), "toy")


def cifar(folder: pathlib.Path, file: str = "train", **changes: Any):
    archive = cifar100()
    for name, content in archive.contents.items():
        changed = content | {key.encode(): item for key, item in changes.items() if name == file}
        kept = {key: item for key, item in changed.items() if item is not None}
        (folder / name).write_bytes(pickle.dumps(kept))
    return datasets.load_dataset("cifar100", data_dir=folder)


def train(folder: pathlib.Path, found: dict[str, str] | None = None, **options: Any):
    for name, content in (found or {}).items():
        (folder / name).write_text(content)
    return runs.train(TrainConfig(out=folder, **options), Console(quiet=True))


def held_by_another(folder: pathlib.Path):
    with files.held_alone(folder):
        train(folder)


def with_a_folder_for_a_lock(folder: pathlib.Path):
    (folder / files.LOCK).mkdir()
    train(folder)


def not_of_the_first_process(folder: pathlib.Path):
    with (
        mock.patch.object(runs, "join_processes"),
        mock.patch.object(runs, "is_first_process", return_value=False),
        mock.patch.object(runs, "told_by_first_process", return_value=True),
    ):
        train(folder, distributed=True)


def without_a_device():
    with mock.patch.object(jax, "devices", side_effect=AssertionError):
        command("explain", _explain=AssertionError)


def written(**options: Any) -> str:
    """What `psclip train` writes of its configuration."""
    return files.to_json({"config": vars(TrainConfig(**options))})


def plot(folder: pathlib.Path, found: dict[str, str]):
    for name, content in found.items():
        (folder / name).write_text(content)
    plots.read_runs(folder)


def without_tensorboard_x():
    with mock.patch.dict(sys.modules, {"tensorboardX": None}):
        tensorboard.check_tensorboard()


def compare(folder: pathlib.Path, found: tuple[str, ...] = (), **options: Any):
    for name in found:
        (folder / name).write_text("")
    return comparison.compare(CompareConfig(out=folder, **options), Console(quiet=True))


def checkpoint(folder: pathlib.Path, free: int | None = None):
    state = TrainState.create(apply_fn=None, params=MEAN, tx=optax.sgd(0.1))
    with checkpoints.open_checkpoints(folder) as manager:
        usage = mock.Mock(free=shutil.disk_usage(folder).free if free is None else free)
        with mock.patch.object(shutil, "disk_usage", return_value=usage):
            checkpoints.save_checkpoint(manager, state)
        (folder / "0" / "digests.json").unlink()
        checkpoints.restore_newest(manager, state)


def joining_late():
    jax.devices()  # it has started, so that it is too late
    distributed.join_processes(TrainConfig(distributed=True))


def losing_a_process():
    with (
        mock.patch.object(jax, "process_count", return_value=2),
        distributed.noticing_lost_processes(),
    ):
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: connection closed by peer\nmore")


def writing(error: Exception):
    with files.noticing_what_cannot_be_written(pathlib.Path("run")):
        raise error


def command(*arguments: str, **patched: Any):
    with contextlib.ExitStack() as stack:
        for name, value in patched.items():
            stack.enter_context(mock.patch(f"psclip_optax.cli.{name}", side_effect=value))
        main(arguments)


def check(kind: Any = TrainConfig, **options: Any):
    check_config(kind(**options))


def under_a_file(folder: pathlib.Path) -> pathlib.Path:
    (folder / "file").write_text("")
    return folder / "file" / "below"


def archive_of_another(folder: pathlib.Path) -> pathlib.Path:
    (folder / "toy.tar.gz").write_bytes(cifar100().targz)
    return folder / "toy.tar.gz"


# As Python 3 pickles bytes for Python 2, but of an encoding that none has.
NOT_LATIN1 = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R."


PUT_IT_FIRST = (
    "per_sample_clip changes shapes, so it is the first link of a chain, and whatever accumulates, "
    "masks or skips goes around the links after it: write "
    "`optax.chain(psc.per_sample_clip(…), optax.MultiSteps(…).gradient_transformation())` or "
    "`optax.chain(psc.per_sample_clip(…), optax.masked(…))`, not "
    "`optax.MultiSteps(optax.chain(psc.per_sample_clip(…), …))` or "
    "`optax.masked(psc.per_sample_clip(…))`"
)

ROWS = [
    # Thresholds
    Row(
        lambda: psc.growing_threshold("1", 2.0),
        TypeError,
        "growing_threshold expects a real number as `alpha`, got '1'",
    ),
    Row(
        lambda: psc.constant_threshold(True),
        TypeError,
        "constant_threshold expects a real number as `value`, got True",
    ),
    Row(
        lambda: psc.constant_threshold(np.ones(4)),
        ValueError,
        "constant_threshold expects a real scalar as `value`, got float64[4]; for one threshold"
        " per sample pass a callable, `lambda k: taus[k - 1]`",
    ),
    Row(
        lambda: psc.growing_threshold(-1.0, 2.0),
        ValueError,
        "growing_threshold expects `alpha` >= 0, got -1",
    ),
    Row(
        lambda: psc.quantile_threshold(50),
        ValueError,
        "quantile_threshold expects `quantile` > 0 and < 1, got 50",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)("abc"),
        TypeError,
        "positions are 1-based integers k = 1, 2, …, of shape [n], got a str",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)(np.ones(3)),
        TypeError,
        "positions are 1-based integers k = 1, 2, …, but came as float32[3]; cast them with "
        ".astype(int)",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)(np.arange(3)),
        ValueError,
        "positions are 1-based, but the smallest that came is 0; write `jnp.arange(1, n + 1)`",
    ),
    Row(
        lambda: psc.growing_threshold(1.0, 2.0)(3),
        TypeError,
        "a threshold takes the positions of a batch's samples, an integer array of shape [n], "
        "but was called with a scalar. `optax.inject_hyperparams` does this to any callable, "
        "taking it for a schedule over steps: to schedule the numbers in a threshold, write "
        "`optax.inject_hyperparams(psc.ps_clip_sgd)(learning_rate=…, alpha=…, beta=…)`, or pass"
        " a number or a schedule as `threshold`; to keep it as it is, add "
        "static_args=('threshold',)",
    ),
    Row(
        lambda: clip(threshold=lambda k: None),
        TypeError,
        "a threshold gives one real norm per position, [4] of them from ⟨the function⟩, got None",
    ),
    Row(
        lambda: clip(threshold=optax.constant_schedule(1.0)),
        ValueError,
        "a threshold gives one real norm per position, [4] of them from ⟨the function⟩, got "
        "float32[]; a number stands for the same at all positions",
    ),
    Row(
        lambda: clip(threshold=lambda k: k > 2),
        ValueError,
        "a threshold gives one real norm per position, [4] of them from ⟨the function⟩, got "
        "bool[4]; a number stands for the same at all positions",
    ),
    Row(
        lambda: clip(threshold=lambda k: -1.0 * k),
        ValueError,
        "a threshold's norms are ≥ 0 and not NaN, but ⟨the function⟩ gave -1.0; write α ≥ 0, or"
        " clamp it with jnp.maximum(…, 0)",
    ),
    Row(
        lambda: clip(threshold=lambda: 1.0),
        TypeError,
        "⟨what was raised there⟩\nThe threshold ⟨the function⟩ was called with positions, "
        "int32[4], for a norm at each.",
    ),
    Row(
        lambda: grad(threshold=psc.growing_threshold),
        TypeError,
        "⟨what was raised there⟩\nThe threshold ⟨the function⟩ was called with positions, "
        "int32[4], for a norm at each.",
    ),
    Row(
        lambda: grad(threshold=RULE),
        TypeError,
        "an AdaptiveThreshold has a state, which is not kept here; expected a number or a "
        "callable from positions [n] to norms [n]. With clipped_value_and_grad(…, "
        "return_stats=True) keep it yourself: pass threshold=rule.threshold(state) to each "
        "call, then write state = rule.update(state, stats.norms, sample_mask). "
        "psc.per_sample_clip(rule) keeps it, and so do the train steps of an optimizer with "
        "psc.track_norms(rule)",
    ),
    # Adaptive thresholds
    Row(
        lambda: psc.track_norms(1.0),
        TypeError,
        "track_norms keeps the state of an AdaptiveThreshold, such as psc.moment_threshold(), "
        "got 1.0, which has none: give it to clipped_value_and_grad alone",
    ),
    Row(
        lambda: psc.track_norms(RULE).update(MEAN, psc.track_norms(RULE).init(PARAMS)),
        TypeError,
        "track_norms expects the norms of the batch: write tx.update(grads, state, params, "
        "norms=stats.norms, sample_mask=sample_mask), with the stats of "
        "clipped_value_and_grad(…, return_stats=True)",
    ),
    Row(
        lambda: psc.track_norms(RULE).update(MEAN, None, norms=Y),
        TypeError,
        "track_norms's update takes (grads, state, params) with a TrackNormsState from its init"
        " or its last update, got None",
    ),
    Row(
        lambda: RULE.update(RULE.init(), None),
        TypeError,
        "an adaptive threshold is updated with the norms of a batch, a float array of shape [n]"
        " such as stats.norms of psc.ClipStats, got None",
    ),
    Row(
        lambda: RULE.update(RULE.init(), X),
        ValueError,
        "an adaptive threshold is updated with the norms of a batch, a float array of shape [n]"
        " such as stats.norms of psc.ClipStats, got float32[4, 3]",
    ),
    Row(
        lambda: track({"w": RULE, "b": 1.0}, Y),
        ValueError,
        "a tree of adaptive thresholds is updated with the norms of a batch by group, a float array"
        " of shape [n, 2] such as stats.norms of psc.ClipStats, got float32[4]",
    ),
    Row(
        lambda: RULE.update(RULE.init(), -Y),
        ValueError,
        "norms are ≥ 0, but the smallest of float32[4] is -1.0; pass stats.norms of "
        "psc.ClipStats as they are",
    ),
    Row(
        lambda: RULE.update(psc.moment_threshold().init(), Y),
        TypeError,
        "an adaptive threshold's state comes from init() or update(state, norms) of the same "
        "rule, MomentState(moment=RunningMoment(weight=float32[], root=float32[]), tail=()), "
        "got MomentState(moment=RunningMoment(weight=float32[], root=float32[20]), "
        "tail=RunningMean(weight=float32[], mean=float32[]))",
    ),
    Row(
        lambda: RULE.threshold(None),
        TypeError,
        "an adaptive threshold's state comes from init() or update(state, norms) of the same "
        "rule, MomentState(moment=RunningMoment(weight=float32[], root=float32[]), tail=()), "
        "got None",
    ),
    Row(
        lambda: RULE.update(RULE.init(), Y, axis_name="data"),
        ValueError,
        "axis_name is the mesh axis (or a tuple of axes) of the jax.shard_map that this runs "
        "in, got 'data', which none around it maps; outside of shard_map leave it out: under "
        "jit a sharded batch needs no name",
    ),
    # clipped_value_and_grad: its options
    Row(
        lambda: psc.clipped_grad(1.0, loss),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got 1.0",
    ),
    Row(
        lambda: psc.clipped_grad(psc.growing_threshold(1.0, 1.5), loss),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got "
        "GrowingThreshold(alpha=1.0, beta=1.5)",
    ),
    Row(
        lambda: psc.clipped_grad(loss, None),
        TypeError,
        "a threshold is a number or a callable from positions [n] to norms [n], got None",
    ),
    Row(
        lambda: psc.clipped_grad(loss, psc.tails.suggest_threshold(NORMS)),
        TypeError,
        "a threshold is a number or a callable from positions [n] to norms [n], got "
        "SuggestedThreshold(⟨what it holds⟩) with a threshold of its own; pass its .threshold",
    ),
    Row(
        lambda: psc.clipped_grad(loss, {"w": 1.0, "b": {"c": "much"}}),
        TypeError,
        "a threshold is a number or a callable from positions [n] to norms [n], got 'much'\n"
        "It came as threshold['b']['c'], for a group of its own.",
    ),
    Row(
        lambda: grad(threshold={"w": 1.0}),
        ValueError,
        "a tree of thresholds is a prefix of the parameters' tree, one for each subtree that is "
        "clipped together, got {'w': ConstantThreshold(value=1.0)} for parameters {'b': float32[2],"
        " 'w': float32[3, 2]}; psc.by_layer(params, threshold) makes one",
    ),
    Row(
        lambda: psc.clipped_grad(loss, {"w": 1.0, "b": 1.0, "s": 1.0})(PARAMS | {"s": {}}, X, Y),
        ValueError,
        "threshold['s'] is for a group, but params['s'] has no arrays to clip, got {}; leave it in "
        "the prefix as it is, without a threshold",
    ),
    Row(
        lambda: psc.each_slice(0.5),
        TypeError,
        "each_slice expects a sequence of thresholds, one for each slice, such as [0.5] * 12, got "
        "0.5",
    ),
    Row(
        lambda: psc.each_slice([]),
        ValueError,
        "each_slice expects a threshold for each slice, got none",
    ),
    Row(
        lambda: grad(threshold={"w": psc.each_slice([0.5] * 4), "b": 1.0}),
        ValueError,
        "threshold['w'] has 4 thresholds, one for each slice along the leading axis of each leaf "
        "of params['w'], but one has shape [3, 2]; give each_slice as many as there are slices",
    ),
    Row(
        lambda: psc.by_layer(PARAMS, 1.0, depth=0),
        ValueError,
        "by_layer expects an int of at least 1 as `depth`, got 0",
    ),
    Row(
        lambda: psc.by_layer({"w": {}}, 1.0),
        ValueError,
        "by_layer makes groups of parameters, got a tree without any, {'w': {}}",
    ),
    Row(
        lambda: grad(norm_precision="highest"),
        TypeError,
        "norm_precision is a jax.lax.Precision, such as jax.lax.Precision.HIGHEST, or None for JAX's "
        "default, got 'highest'",
    ),
    Row(
        lambda: grad(reduction="max"),
        ValueError,
        'reduction is "mean" or "sum", got \'max\'',
    ),
    Row(
        lambda: grad(mode="fast"),
        ValueError,
        "mode is one of 'auto', 'one_pass', 'two_pass', 'vmap', got 'fast'",
    ),
    Row(
        lambda: grad(microbatch_size=2.0),
        ValueError,
        "microbatch_size is a positive int or None, got 2.0",
    ),
    Row(
        lambda: grad(memory_limit_bytes="1 GiB"),
        ValueError,
        "memory_limit_bytes is a positive int or None, got '1 GiB'",
    ),
    Row(
        lambda: grad(clip_at="batch"),
        ValueError,
        'clip_at is "sample" or "micro-batch", got \'batch\'',
    ),
    Row(
        lambda: grad(clip_at="micro-batch"),
        ValueError,
        'clip_at="micro-batch" needs microbatch_size, the number of samples in each; that of '
        "the whole batch clips the batch's mean gradient",
    ),
    Row(
        lambda: grad(on_nonfinite="raise"),
        ValueError,
        'on_nonfinite is "drop" or "propagate", got \'raise\'',
    ),
    Row(
        lambda: grad(axis_name="data"),
        ValueError,
        "axis_name is the mesh axis (or a tuple of axes) of the jax.shard_map that this runs "
        "in, got 'data', which none around it maps; outside of shard_map leave it out: under "
        "jit a sharded batch needs no name",
    ),
    Row(
        lambda: grad(in_axes=(None, 0, 0)),
        ValueError,
        "in_axes is an int, None, or a tuple with one of them (or a tree prefix) for each of "
        "the 2 arguments after params, got (None, 0, 0)",
    ),
    Row(
        lambda: grad(in_axes=("x", "y")),
        ValueError,
        "in_axes is an int, None, or a tuple with one of them (or a tree prefix) for each of "
        "the 2 arguments after params, got ('x', 'y')",
    ),
    # clipped_value_and_grad: its arguments
    Row(
        lambda: grad(batch=(X,), call={"y": Y}),
        TypeError,
        "f(params, *batch, sample_mask=None, positions=None, threshold=None) takes the loss's "
        "arguments by position, got 'y' by name; write f(params, x, y), in the order of "
        "loss(params, x, y)",
    ),
    Row(
        lambda: grad(params={"w": np.ones(3, int)}),
        TypeError,
        "params['w'] is int64[3], but expected a real floating-point array; gradients are of "
        "floating-point parameters: part it off with eqx.partition or nnx.split, or close over "
        "it",
    ),
    Row(
        lambda: grad(params={"w": np.ones(3) * 1j}),
        TypeError,
        "params['w'] is complex128[3], but expected a real floating-point array; take its real "
        "and imaginary parts as two",
    ),
    Row(
        lambda: grad(params={"key": jax.random.key(0)}),
        TypeError,
        "params['key'] is key<fry>[], but expected a real floating-point array; gradients are "
        "of floating-point parameters: part it off with eqx.partition or nnx.split, or close "
        "over it",
    ),
    Row(
        lambda: grad(params={"w": jnp.ones(3, jnp.float8_e5m2)}),
        TypeError,
        "params['w'] is float8_e5m2[3], but expected a real floating-point array; cast it to "
        "bfloat16 or wider",
    ),
    Row(
        lambda: grad(params={"w": X[0], "activation": jnp.tanh}),
        TypeError,
        "params['activation'] is a PjitFunction, but expected an array; part it off with "
        "eqx.partition or nnx.split, or close over it",
    ),
    Row(
        lambda: grad(params={}),
        ValueError,
        "params has no arrays to take gradients of, got {}; they are the first argument, "
        "f(params, *batch)",
    ),
    Row(
        lambda: grad(batch=(X, Y[:3])),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[4, 3] (axis 0), batch[1]: "
        "float32[3] (axis 0); write in_axes=None for an argument that all samples share, "
        "jnp.asarray(…) around a list of numbers, and jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=(X[0], Y[0])),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[3] (axis 0), batch[1]: "
        "float32[] (axis 0); write in_axes=None for an argument that all samples share, "
        "jnp.asarray(…) around a list of numbers, and jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=(X, [1.0, 2.0, 3.0, 4.0])),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[4, 3] (axis 0), batch[1][0]:"
        " float32[] (axis 0), batch[1][1]: float32[] (axis 0), batch[1][2]: float32[] (axis 0),"
        " batch[1][3]: float32[] (axis 0); write in_axes=None for an argument that all samples "
        "share, jnp.asarray(…) around a list of numbers, and jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=(X, [1.0] * 60)),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[4, 3] (axis 0), batch[1][0]:"
        " ⟨and so on⟩ batch[1][6]: float32[] (axis 0), and 53 more; write in_axes=None for an "
        "argument that all samples share, jnp.asarray(…) around a list of numbers, and "
        "jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=()),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got none; write in_axes=None for an argument that "
        "all samples share, jnp.asarray(…) around a list of numbers, and jax.random.split(key, "
        "n) for a key",
    ),
    Row(
        lambda: grad(batch=(X, "abc")),
        TypeError,
        "batch[1] is a str, but expected an array; batch arguments are arrays, or trees of "
        "them; close over what is none",
    ),
    Row(
        lambda: grad(call={"sample_mask": Y}),
        ValueError,
        "sample_mask has shape [4] (one flag a sample, True where it counts) and dtype bool, "
        "got float32[4]",
    ),
    Row(
        lambda: grad(call={"sample_mask": np.ones(3, bool)}),
        ValueError,
        "sample_mask has shape [4] (one flag a sample, True where it counts) and dtype bool, "
        "got bool[3]",
    ),
    Row(
        lambda: grad(call={"sample_mask": "all"}),
        TypeError,
        "sample_mask has shape [4] (one flag a sample, True where it counts) and dtype bool, "
        "got a str",
    ),
    Row(
        lambda: grad(call={"positions": np.arange(1, 4)}),
        ValueError,
        "positions has shape [4] (one 1-based integer a sample), got int32[3]",
    ),
    Row(
        lambda: grad(call={"positions": "abc"}),
        TypeError,
        "positions has shape [4] (one 1-based integer a sample), got a str",
    ),
    Row(
        lambda: grad(threshold=lambda k: 1.0 * k, call={"positions": np.arange(4)}),
        ValueError,
        "positions are 1-based, but the smallest that came is 0; write `jnp.arange(1, n + 1)`",
    ),
    Row(
        lambda: grad(call={"positions": Y}),
        TypeError,
        "positions are 1-based integers k = 1, 2, …, but came as float32[4]; cast them with "
        ".astype(int)",
    ),
    # clipped_value_and_grad: the loss
    Row(
        lambda: grad(lambda params, x, y: x @ params["w"]),
        TypeError,
        "the loss is of ONE example and returns a scalar, got float32[2]; average what is left "
        "of it, write has_aux=True if it returns (loss, aux), or keep_batch_dim=True if it is "
        "written for batches",
    ),
    Row(
        lambda: grad(lambda params, x, y: (loss(params, x, y), x)),
        TypeError,
        "the loss is of ONE example and returns a scalar, got (float32[], float32[3]); average "
        "what is left of it, write has_aux=True if it returns (loss, aux), or "
        "keep_batch_dim=True if it is written for batches",
    ),
    Row(
        lambda: grad(lambda params, x, y: "loss"),
        TypeError,
        "the loss is of ONE example and returns a scalar, got a str; average what is left of "
        "it, write has_aux=True if it returns (loss, aux), or keep_batch_dim=True if it is "
        "written for batches",
    ),
    Row(
        lambda: grad(lambda params, x, y: jnp.sum(x > 0)),
        TypeError,
        "the loss is a real floating-point scalar, got int32[]; cast an integer with "
        ".astype(float), and take the real part of what is complex",
    ),
    Row(
        lambda: grad(has_aux=True),
        TypeError,
        "with has_aux=True the loss returns (loss, aux), got float32[]; return the pair, or "
        "write has_aux=False",
    ),
    Row(
        lambda: grad(lambda params, x, y: (loss(params, x, y), {"name": "x"}), has_aux=True),
        TypeError,
        "aux['name'] is a str, but expected an array; aux is stacked over the samples, so close"
        " over what is no array",
    ),
    Row(
        lambda: grad(of_x),
        TypeError,
        "⟨what was raised there⟩\nThe loss was called for ONE example, as loss(params, "
        "float32[3], float32[]), without a batch axis; one that is written for batches needs "
        "keep_batch_dim=True.",
    ),
    Row(
        lambda: grad(lambda params, x, y: jnp.mean(loss(params, x, y), axis=0)),
        Exception,
        "⟨what was raised there⟩\nThe loss was called for ONE example, as loss(params, "
        "float32[3], float32[]), without a batch axis; one that is written for batches needs "
        "keep_batch_dim=True.",
    ),
    Row(
        lambda: grad(lambda params, x, y: float(jnp.mean(loss(params, x, y))), keep_batch_dim=True),
        TypeError,
        "⟨what was raised there⟩\nThe loss was called for ONE example, as loss(params, "
        "float32[1, 3], float32[1]), with an axis of size 1 for the batch, for keep_batch_dim "
        "is True.",
    ),
    Row(
        lambda: exported_with_symbols(),
        ValueError,
        "the engine lays out its work by the number of samples, got float32[n, 3]; export with "
        "numbers for sizes, or export psc.per_sample_clip of jax.vmap(jax.grad(loss)), which takes "
        "symbolic ones",
    ),
    Row(
        lambda: psc.clipped_grad(loss, 1.0).verify(PARAMS, X[:0], Y[:0]),
        ValueError,
        "verify compares samples, but the batch has none; pass one at least",
    ),
    Row(
        lambda: verified_with_an_axis(),
        ValueError,
        "verify compares one device's samples, but axis_name names mesh axes; verify the same "
        "function without axis_name, outside of jax.shard_map",
    ),
    Row(
        lambda: grad(printing, batch=(X,)),
        ValueError,
        "the loss has effects (OrderedDebug), as of io_callback, an ordered jax.debug.print or a "
        "collective over a mesh axis, which would happen an unknown number of times; take them "
        "out, or return what you want to see as aux",
    ),
    Row(
        lambda: on_four_devices(psc.clipped_grad(of_x, 1.0)),
        ValueError,
        "the loss varies over the mesh axis 'data' of jax.shard_map, but params['b'] does not, so "
        "that its gradient would come summed over the devices before it is clipped. For the "
        "clipped mean of all their samples pass axis_name='data'; for each device's own make the "
        "parameters its own first, params = jax.lax.⟨pcast, or pvary before JAX 0.8⟩",
    ),
    Row(
        lambda: psc.clipped_grad(normalised, 1.0, keep_batch_dim=True).explain(PARAMS, X),
        UserWarning,
        "the loss of one example takes statistics over a batch axis of size 1, as batch "
        "normalisation in training mode does:\n  ⟨file and line⟩ (normalised)\n  ⟨file and line⟩ "
        "(normalised)\nThe statistics of one sample alone are not those that training with "
        "batches computes; and those of a batch couple its samples, so that per-sample "
        "gradients do not exist. Take group or layer normalisation, or batch normalisation in "
        "evaluation mode (use_running_average=True)",
    ),
    Row(
        closing_over_a_sharded_array,
        ValueError,
        "of arrays on a mesh with Explicit axes gradients are clipped with Auto axes, but the "
        "loss or the threshold closes over some: pass them as arguments (a batch argument that "
        "all samples share has in_axes=None)",
    ),
    # per_sample_clip
    Row(
        lambda: psc.per_sample_clip(1.0, sample_axis=0.5),
        TypeError,
        "sample_axis is a Python int, got 0.5; under optax.inject_hyperparams add "
        "static_args=('sample_axis',)",
    ),
    Row(
        lambda: optax.inject_hyperparams(psc.per_sample_clip)(1.0).init(PARAMS),
        TypeError,
        "sample_axis is a Python int, got Array(0, dtype=int32, weak_type=True); under "
        "optax.inject_hyperparams add static_args=('sample_axis',)",
    ),
    Row(
        lambda: on_four_devices(clip_what_was_summed),
        ValueError,
        "axis_name='data' says that each device has samples of its own, but "
        "per_sample_grads['b'] is the same on all devices of the mesh axis 'data': jax.shard_map "
        "has gradients of replicated parameters summed over them. Before "
        "jax.vmap(jax.grad(loss), …) make them each device's own, params = jax.lax.⟨pcast, or "
        "pvary before JAX 0.8⟩, or pass a stack that in_specs shard",
    ),
    Row(
        lambda: psc.per_sample_clip(1.0).init({"activation": jnp.tanh}),
        TypeError,
        "params['activation'] is a PjitFunction, but expected an array; part it off with "
        "eqx.partition or nnx.split, or close over it",
    ),
    Row(
        lambda: psc.per_sample_clip(1.0).update(STACK, optax.sgd(0.1).init(PARAMS)),
        TypeError,
        "per_sample_clip's update takes (per_sample_grads, state, params) with a "
        "PerSampleClipState from its init or its last update, got a tuple",
    ),
    Row(
        lambda: clip(wrap=lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)), params=PARAMS),
        ValueError,
        "a state of per_sample_clip is not for sums or means, but one has made an integer of its "
        "bool, as optax.contrib.sam around it does, whose other optimizer is given stacked "
        "gradients: write `optax.chain(psc.per_sample_clip(…), optax.contrib.sam(…))`. "
        + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip({}, params=PARAMS),
        ValueError,
        "per_sample_clip expects a stack of gradients for each parameter, got a tree without "
        "leaves, {}; pass what jax.vmap(jax.grad(loss), …) gives of the parameters",
    ),
    Row(
        lambda: clip({"w": X, "b": np.float32(1.0)}),
        ValueError,
        "per_sample_grads['b'] has no sample axis 0: it is float32[]. Stack per-sample "
        "gradients with jax.vmap(jax.grad(loss), in_axes=(None, 0)); a gradient that is already"
        " averaged can no longer be clipped per sample. " + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip(MEAN),
        ValueError,
        "all leaves have the same number of samples on axis 0, but they have [2, 3]: "
        "per_sample_grads['b']: float32[2], per_sample_grads['w']: float32[3, 2]. Stack them "
        "with jax.vmap(jax.grad(loss), …), or say where the samples are with sample_axis. "
        + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip({"w": X[None]}, params={"w": Y}),
        ValueError,
        "per_sample_grads['w'] is float32[1, 4, 3]: without its sample axis 0 that is [4, 3], "
        "but the parameter has shape [4]. Stack per-sample gradients with "
        "jax.vmap(jax.grad(loss), …). " + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip({"w": np.ones((4, 3), int)}),
        TypeError,
        "per_sample_grads['w'] is int64[4, 3], but expected a real floating-point array; "
        "gradients are of floating-point parameters: part it off with eqx.partition or "
        "nnx.split, or close over it",
    ),
    Row(
        lambda: clip({"w": "abc"}),
        TypeError,
        "per_sample_grads['w'] is a str, but expected an array; part it off with eqx.partition "
        "or nnx.split, or close over it",
    ),
    Row(
        lambda: clip(wrap=lambda tx: optax.masked(tx, {"w": True, "b": False})),
        ValueError,
        "per_sample_clip needs every leaf, for the norm is over a sample's whole gradient, but "
        "some came as optax.MaskedNode, from optax.masked or optax.partition. " + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip(wrap=lambda tx: optax.MultiSteps(tx, 2), params=PARAMS),
        ValueError,
        "all leaves have the same number of samples on axis 0, but they have [2, 3]: "
        "per_sample_grads['b']: float32[2], per_sample_grads['w']: float32[3, 2]. Stack them "
        "with jax.vmap(jax.grad(loss), …), or say where the samples are with sample_axis. "
        + PUT_IT_FIRST,
    ),
    Row(
        beyond_memory,
        UserWarning,
        "a stack of 4194304 per-sample gradients takes 16384.0 GiB, and the devices have "
        "⟨memory⟩ GiB; psc.clipped_value_and_grad(loss, threshold) gives the same gradient from"
        " the loss itself without stacking any, or take fewer samples at a time",
    ),
    # accumulate_clipped
    Row(
        lambda: psc.accumulate_clipped(optax.sgd, 2, 1.0),
        TypeError,
        "accumulate_clipped takes an optax.GradientTransformation to give the accumulated "
        "gradient to, such as optax.sgd(0.1), got ⟨the function⟩",
    ),
    Row(
        lambda: accumulate(every=2.0),
        TypeError,
        "every_k_schedule is the int number of micro-batches in a window, or a function from "
        "the number of updates to it, got 2.0",
    ),
    Row(
        lambda: accumulate(every=0),
        ValueError,
        "every_k_schedule is the number of micro-batches in a window, at least 1, got 0",
    ),
    Row(
        lambda: accumulate(every=lambda step: 2.5),
        TypeError,
        "every_k_schedule is the int number of micro-batches in a window, or a function from "
        "the number of updates to it, got 2.5 from ⟨the function⟩",
    ),
    Row(
        lambda: accumulate(every=lambda step: 0),
        ValueError,
        "every_k_schedule is the number of micro-batches in a window, at least 1, got 0 from "
        "⟨the function⟩",
    ),
    Row(
        lambda: accumulate(should_skip_update_fn=True),
        TypeError,
        "should_skip_update_fn is None or a function such as optax.skip_not_finite, got True",
    ),
    Row(
        lambda: accumulate(accumulator_dtype=int),
        TypeError,
        "accumulator_dtype is a real floating-point dtype such as jnp.float32, or None for that"
        " of the parameters, got <class 'int'>",
    ),
    Row(
        lambda: optax.inject_hyperparams(accumulate_by)(accumulator_dtype=jnp.bfloat16).init(MEAN),
        TypeError,
        "accumulator_dtype is a dtype, got an array, as optax.inject_hyperparams makes of "
        "jnp.bfloat16 and all that is callable; add static_args=('accumulator_dtype',)",
    ),
    Row(
        lambda: psc.accumulate_clipped(optax.sgd(0.1), 2, 1.0).update(MEAN, ()),
        TypeError,
        "accumulate_clipped's update takes (grads, state, params) with an optax.MultiStepsState"
        " from its init or its last update, got a tuple",
    ),
    Row(
        lambda: accumulate({"w": MEAN["w"]}),
        ValueError,
        "gradients have the structure of the parameters that init saw, PyTreeDef({'b': *, 'w': *})"
        ", got PyTreeDef({'w': *})",
    ),
    Row(
        lambda: accumulate(STACK),
        ValueError,
        "grads['b'] is float32[4, 2], but its parameter has shape [2]: accumulate_clipped takes"
        " the mean gradient of a micro-batch. Average stacked per-sample gradients first, "
        "clipped with optax.chain(psc.per_sample_clip(…), psc.accumulate_clipped(…)) or not",
    ),
    Row(
        lambda: accumulate({"w": np.ones((3, 2), int), "b": MEAN["b"]}),
        TypeError,
        "grads['w'] is int64[3, 2], but expected a real floating-point array; gradients are of "
        "floating-point parameters: part it off with eqx.partition or nnx.split, or close over "
        "it",
    ),
    # tails
    Row(
        lambda: jax.jit(psc.tails.tail_index)(NORMS),
        TypeError,
        "psc.tails looks at concrete norms, on the host, but got traced ones; return the norms "
        "from the jitted function (ClipStats.norms) and call psc.tails outside of it",
    ),
    Row(
        lambda: psc.tails.tail_index(psc.ClipStats(Y, Y, Y[0], Y[0])),
        TypeError,
        "psc.tails expects norms of a real dtype and shape [n], one a sample, got a ClipStats",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS * 1j),
        TypeError,
        "psc.tails expects norms of a real dtype and shape [n], one a sample, got complex128[1000]",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS[None]),
        ValueError,
        "psc.tails expects norms of a real dtype and shape [n], one a sample, got float64[1, "
        "1000]; those of several batches go into one array by norms.ravel() or jnp.concatenate",
    ),
    Row(
        lambda: psc.tails.tail_index(np.append(NORMS, np.nan)),
        ValueError,
        "psc.tails expects finite norms, but 1 of 1001 are NaN or infinite; look at where they "
        "come from, or leave them out by norms[isfinite(norms)]",
    ),
    Row(
        lambda: psc.tails.tail_index(-NORMS),
        ValueError,
        "psc.tails expects norms ≥ 0, but 1000 of 1000 are negative, the least -2; of signed "
        "values pass the absolute ones",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS[:100]),
        ValueError,
        "psc.tails needs at least 500 positive norms for an interval that can be trusted, got "
        "100 in float64[100]; gather those of several batches",
    ),
    Row(
        lambda: psc.tails.tail_index(np.ones(1000)),
        ValueError,
        "the 26 largest norms are equal, so that they have no tail to estimate; pass the norms "
        "before clipping, in a dtype in which they do not saturate",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS, confidence=95),
        ValueError,
        "psc.tails expects `confidence` > 0 and < 1, got 95",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS, confidence="95%"),
        TypeError,
        "psc.tails expects a real number as `confidence`, got '95%'",
    ),
    Row(
        lambda: psc.tails.moment_scale(NORMS, p=np.inf),
        ValueError,
        "moment_scale expects `p` > 0 and < inf, got inf",
    ),
    Row(
        lambda: psc.tails.hill_estimator(NORMS, k=1000),
        ValueError,
        "hill_estimator expects 1 ≤ k < 1000, the number of positive norms, got 1000",
    ),
    Row(
        lambda: psc.tails.hill_estimator(NORMS, k=10.5),
        TypeError,
        "hill_estimator expects an int as `k`, got 10.5",
    ),
    # Optimizers
    Row(
        lambda: psc.ps_clip_sgd(0.1, 1.0),
        TypeError,
        "ps_clip_sgd expects both alpha and beta, or neither for psc.auto_threshold(), got "
        "alpha=1.0, beta=None",
    ),
    # Train steps
    Row(
        lambda: linen_train_step(loss, gradients="clip"),
        ValueError,
        "gradients is one of 'per_sample', 'mean', 'clipped', got 'clip'",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="mean", threshold=1.0),
        ValueError,
        'gradients="clipped" takes one of threshold and threshold_from, or neither, the others '
        "take none, got gradients='mean', threshold=1.0, threshold_from=None; per_sample_clip has its "
        "threshold in the optimizer",
    ),
    Row(
        lambda: linen_train_step(loss, microbatch_size=2),
        ValueError,
        'gradients="per_sample" stacks the whole batch; microbatch_size is of "clipped" and '
        '"mean", got 2',
    ),
    Row(
        lambda: step(tx=optax.sgd(0.1)),
        ValueError,
        'gradients="per_sample", which is meant where no threshold is given, has stacked '
        "gradients [n, …] for one per_sample_clip in the optimizer, whose state holds 0 "
        "PerSampleClipState. For any optimizer pass threshold=… to the step, or write "
        "optax.chain(psclip_optax.track_norms(), …) for the automatic one; or write "
        "optax.chain(psclip_optax.per_sample_clip(threshold), …) or psclip_optax.ps_clip_sgd(…), "
        'or gradients="mean", which clips nothing',
    ),
    Row(
        lambda: step(gradients="mean"),
        ValueError,
        'gradients="mean" and "clipped" give the optimizer gradients of the parameters\' own '
        "shapes, but its per_sample_clip would take their first axis for samples. Write "
        'gradients="per_sample", or leave per_sample_clip out of the optimizer',
    ),
    Row(
        lambda: step(tx=optax.sgd(0.1), threshold=RULE),
        ValueError,
        "an AdaptiveThreshold has its state in the optimizer's, where one track_norms of the "
        "same rule keeps it; this one holds 0 TrackNormsState. Write "
        "optax.chain(psclip_optax.track_norms(rule), …) with the rule that the step has",
    ),
    Row(
        lambda: step(tx=psc.track_norms(psc.min_norm_threshold()), threshold=RULE),
        ValueError,
        "an AdaptiveThreshold has its state in the optimizer's, where one track_norms of the "
        "same rule keeps it; this one holds 1 TrackNormsState, of another rule. Write "
        "optax.chain(psclip_optax.track_norms(rule), …) with the rule that the step has",
    ),
    Row(
        lambda: step(batch=(X, Y[:3])),
        ValueError,
        "the batch arguments are arrays (or pytrees of them) with the n samples on the first "
        "axis of each, got shapes [[4, 3], [3]]; give each sample its own entry, e.g. "
        "jax.random.split(key, n) for a key, and close over what all samples share",
    ),
    Row(
        lambda: step(batch=(X, jax.random.key(0))),
        ValueError,
        "the batch arguments are arrays (or pytrees of them) with the n samples on the first "
        "axis of each, got shapes [[4, 3], []]; give each sample its own entry, e.g. "
        "jax.random.split(key, n) for a key, and close over what all samples share",
    ),
    Row(
        lambda: linen_train_step(1.0, gradients="mean"),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got 1.0",
    ),
    Row(
        lambda: linen_eval_step(None),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got None",
    ),
    Row(
        lambda: step(lambda params, x, y: x @ params["w"]),
        TypeError,
        "the loss is of ONE example and returns a scalar, got float32[2]; average what is left "
        "of it, write has_aux=True if it returns (loss, aux), or take [0] of what "
        "model(x[None]) returns",
    ),
    Row(
        lambda: step(lambda params, x, y: jnp.sum(x > 0)),
        TypeError,
        "the loss is a real floating-point scalar, got int32[]; cast an integer with "
        ".astype(float), and take the real part of what is complex",
    ),
    Row(
        lambda: step(lambda params, x, y: loss(params, x, y) * 1j),
        TypeError,
        "the loss is a real floating-point scalar, got complex64[]; cast an integer with "
        ".astype(float), and take the real part of what is complex",
    ),
    Row(
        lambda: step(lambda params, x, y: "loss"),
        TypeError,
        "the loss is of ONE example and returns a scalar, got a str; average what is left of "
        "it, write has_aux=True if it returns (loss, aux), or take [0] of what model(x[None]) "
        "returns",
    ),
    Row(
        lambda: step(lambda params, x, y: (loss(params, x, y), {"x": x}), has_aux=True),
        TypeError,
        "aux['x'] is float32[3], but expected a scalar of one example, for its mean over the "
        "samples is logged; reduce it, for instance by .mean()",
    ),
    Row(
        lambda: step(lambda params, x, y: (loss(params, x, y), {"name": "x"}), has_aux=True),
        TypeError,
        "aux['name'] is a str, but expected an array; aux is averaged over the samples, so "
        "leave out, or reduce, what is no number",
    ),
    Row(
        lambda: step(has_aux=True),
        TypeError,
        "with has_aux=True the loss returns (loss, aux), got float32[]; return the pair, or "
        "write has_aux=False",
    ),
    Row(
        lambda: linen_train_step(loss, mode="fast"),
        ValueError,
        "mode is one of 'auto', 'one_pass', 'two_pass', 'vmap', got 'fast'",
    ),
    Row(
        lambda: linen_train_step(loss, threshold_from=1.0),
        TypeError,
        "threshold_from is a function from the optimizer's state to the threshold, got 1.0; a "
        "threshold itself is passed as threshold",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="mean", return_norms=True),
        ValueError,
        "return_norms is of gradients=\"clipped\", got gradients='mean', whose step has no norms "
        "to return; give the step a threshold, jnp.inf to clip nothing",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="mean", microbatch_size=2, clip_at="micro-batch"),
        ValueError,
        "clip_at is of gradients=\"clipped\", got 'micro-batch' with gradients='mean'; give the "
        "step a threshold, or leave clip_at out",
    ),
    Row(
        lambda: step(tx=optax.sgd(0.1), gradients="mean", call={"positions": np.arange(1, 5)}),
        ValueError,
        "positions are of samples that are clipped one by one; a step with "
        'gradients="mean" or clip_at="micro-batch" has no use for them: leave them out',
    ),
    Row(
        lambda: linen_train_step(loss)(PARAMS, X, Y),
        TypeError,
        "the step is called as step(state, *batch) with a "
        "flax.training.train_state.TrainState, got a dict; make one by "
        "TrainState.create(apply_fn=…, params=…, tx=…)",
    ),
    Row(
        swapped,
        TypeError,
        "the step is called as step(model, optimizer, *batch) with an nnx.Optimizer, got a "
        "Optimizer and a Linear; make one by nnx.Optimizer(model, tx, wrt=nnx.Param)",
    ),
    Row(
        with_dropout,
        ValueError,
        "the loss reads the model's state, but this one writes to '⟨path⟩', of which each "
        "sample would have its own value. For dropout pass one key a sample as an argument of "
        "the batch and write model(x, rngs=nnx.Rngs(dropout=key)); for batch normalisation take"
        " nnx.GroupNorm or nnx.LayerNorm, or use_running_average=True; return what you want to "
        "record as aux",
    ),
    # Models and methods
    Row(
        lambda: build_model("vgg", 10),
        ValueError,
        "name is one of 'mlp', 'small_cnn', 'alexnet', 'resnet18', got 'vgg'",
    ),
    Row(
        lambda: build_model("mlp", "10"),
        ValueError,
        "num_classes is an int of at least 1, got '10'",
    ),
    Row(
        lambda: build_model("mlp", 10, width=0.0),
        ValueError,
        "build_model expects `width` > 0 and < inf, got 0",
    ),
    Row(
        lambda: build_model("mlp", 10, dropout_rate=1.0),
        ValueError,
        "build_model expects `dropout_rate` >= 0 and < 1, got 1",
    ),
    Row(
        lambda: build_model("alexnet", 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))),
        ValueError,
        "AlexNet takes images [..., H, W, C] with H and W at least 16, got shape [1, 8, 8, 1]; "
        'resize them, or take "mlp" or "resnet18"',
    ),
    Row(
        lambda: methods.method_that_clips("adam", "batch"),
        ValueError,
        "name: expected one of 'sgd', 'momentum', 'batch-clip', 'ps-clip', 'ps-clip-constant', "
        "'ps-clip-auto', 'ps-clip-median', got 'adam'",
    ),
    Row(
        lambda: methods.learning_rate_schedule("linear", 4),
        ValueError,
        "name: expected 'cosine' or 'constant', got 'linear'",
    ),
    # Data
    Row(
        lambda: datasets.load_dataset("mnist"),
        DatasetError,
        "unknown dataset 'mnist'; expected one of digits, cifar10, cifar100",
    ),
    Row(
        lambda: datasets.load_dataset("digits", data_dir="data"),
        DatasetError,
        "digits comes with scikit-learn: leave out data_dir and url",
    ),
    Row(
        lambda: datasets.load_dataset("cifar10", data_dir="nowhere"),
        DatasetError,
        "expected cifar-10-batches-py/ or cifar-10-python.tar.gz in nowhere, which is not a "
        "folder; pass --data-dir with the folder that holds it, or leave it out to download",
    ),
    Row(
        in_folder(lambda folder: datasets.load_dataset("cifar10", data_dir=folder)),
        DatasetError,
        "expected cifar-10-batches-py/ or cifar-10-python.tar.gz in ⟨folder⟩; pass --data-dir "
        "with the folder that holds it, or leave it out to download",
    ),
    Row(
        lambda: datasets.train_validation_split(SPLIT, num_validation=6, seed=0),
        ValueError,
        "num_validation: expected an int, 0 to 5, so that some of the 6 examples are left to "
        "train on, got 6",
    ),
    Row(
        lambda: datasets.train_validation_split(SPLIT, num_validation=0.1, seed=0),
        ValueError,
        "num_validation: expected an int, 0 to 5, so that some of the 6 examples are left to "
        "train on, got 0.1",
    ),
    Row(
        lambda: datasets.random_generator(-1, "order"),
        ValueError,
        "seed: expected a non-negative int, got -1",
    ),
    Row(
        lambda: batches(seed=1.5),
        ValueError,
        "seed: expected a non-negative int, got 1.5",
    ),
    Row(
        lambda: datasets.check_images(SPLIT.images / 255),
        ValueError,
        "images: expected a NumPy array, uint8 or float32 [N, H, W, C], got float64[6, 2, 2, 1]",
    ),
    Row(
        lambda: datasets.check_split(SPLIT.images),
        ValueError,
        "split: expected a Split of images and labels, got uint8[6, 2, 2, 1]",
    ),
    Row(
        lambda: datasets.check_split(SPLIT._replace(labels=[0] * 6)),
        ValueError,
        "labels: expected a NumPy array, int32 [6], one label an image, got a list",
    ),
    Row(
        lambda: datasets.check_split(datasets.Split(*(part[:0] for part in SPLIT))),
        ValueError,
        "split: expected at least one example, got none",
    ),
    Row(
        lambda: batches(batch_size=0),
        ValueError,
        "batch_size: expected an int of at least 1, got 0",
    ),
    Row(
        lambda: batches(batch_size=3, process_count=2),
        ValueError,
        "batch_size: expected a multiple of process_count=2, got 3; take 2",
    ),
    Row(
        lambda: batches(process_index=2, process_count=2),
        ValueError,
        "expected 0 <= process_index < process_count, got process_index=2, process_count=2",
    ),
    Row(
        lambda: batches(mean=[0.0, 0.0]),
        ValueError,
        "mean: expected 1 finite numbers, one a channel, got [0. 0.]",
    ),
    Row(
        lambda: batches(std=[0.0]),
        ValueError,
        "std: expected positive numbers, got [0.]",
    ),
    Row(
        lambda: pipeline.iterate(batches(), -1, 2),
        ValueError,
        "expected a non-negative start_step and num_steps, got start_step=-1, num_steps=2",
    ),
    Row(
        lambda: corruptions.with_label_noise(SPLIT.labels, 1.5, 10, seed=0),
        ValueError,
        "with_label_noise expects `rate` >= 0 and <= 1, got 1.5",
    ),
    Row(
        lambda: corruptions.with_label_noise(SPLIT.labels, 0.5, 1, seed=0),
        ValueError,
        "num_classes: expected an int of at least 2, got 1",
    ),
    Row(
        lambda: corruptions.with_label_noise([0, 1], 0.5, 10, seed=0),
        ValueError,
        "labels: expected a NumPy array, int [N], got a list",
    ),
    Row(
        lambda: corruptions.with_label_noise(SPLIT.labels - 1, 0.5, 10, seed=0),
        ValueError,
        "labels: expected 0 to 9, got -1 to -1",
    ),
    Row(
        lambda: corruptions.with_student_t_pixels(SPLIT.images, 0.0, seed=0),
        ValueError,
        "with_student_t_pixels expects `degrees_of_freedom` > 0 and < inf, got 0",
    ),
    # Archives
    Row(
        in_folder(lambda folder: fetch(folder, known_hash="eb9058c3")),
        DatasetError,
        "expected a hash such as 'md5:<hex digest>', got 'eb9058c3'",
    ),
    Row(
        in_folder(lambda folder: fetch(folder, "/missing")),
        DatasetError,
        "cannot fetch ⟨url⟩/missing: the server answered 404 Not Found; try again, or pass "
        "--data-dir with an existing copy",
    ),
    Row(
        in_folder(lambda folder: fetch(folder, server=False)),
        DatasetError,
        "cannot fetch ⟨url⟩/toy: the server cannot be reached, or the connection was lost; try "
        "again, or pass --data-dir with an existing copy",
    ),
    Row(
        in_folder(lambda folder: fetch(folder)),
        DatasetError,
        "cannot use ⟨url⟩/toy: ⟨Pooch's words⟩; try again, or pass --data-dir with an existing "
        "copy",
    ),
    Row(
        in_folder(lambda folder: fetch(under_a_file(folder))),
        DatasetError,
        "cannot write ⟨folder⟩/file/below/toy.tar.gz: Not a directory; make room or choose "
        "another cache folder, or pass --data-dir with an existing copy",
    ),
    Row(
        in_folder(lambda folder: archives.read_pickles(folder, "toy", ["meta"])),
        DatasetError,
        "cannot read ⟨folder⟩: [Errno 2] No such file or directory: '⟨folder⟩/meta'; use a "
        "fresh copy of the official archive",
    ),
    Row(
        in_folder(
            lambda folder: archives.read_pickles(archive_of_another(folder), "toy", ["meta"])
        ),
        DatasetError,
        "⟨folder⟩/toy.tar.gz: expected toy/meta, not found; use a fresh copy of the official "
        "archive",
    ),
    Row(
        lambda: unpickle([1, 2]),
        DatasetError,
        "toy: expected a pickled dict, got a list; use a fresh copy of the official archive",
    ),
    Row(
        lambda: unpickle({"data": print}),
        DatasetError,
        "toy: refused to load 'builtins.print', which no array needs; use a fresh copy of the "
        "official archive",
    ),
    Row(
        lambda: unpickle({"data": np.array([1j])}),
        DatasetError,
        "toy: expected bool, int or float arrays, got dtype '<c16'; use a fresh copy of the "
        "official archive",
    ),
    Row(
        lambda: unpickle(b"no pickle"),
        DatasetError,
        "toy: not a readable pickle (UnpicklingError); use a fresh copy of the official archive",
    ),
    Row(
        lambda: unpickle(NOT_LATIN1),
        DatasetError,
        "toy: not a readable pickle (UnpicklingError); use a fresh copy of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, data=None)),
        DatasetError,
        "⟨folder⟩:train: expected the key b'data', got b'filenames', b'fine_labels'; use a "
        "fresh copy of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, data=[0, 1])),
        DatasetError,
        "⟨folder⟩:train: expected an array at b'data', got a list; use a fresh copy of the "
        "official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, data=np.zeros((7, 3), np.uint8))),
        DatasetError,
        "⟨folder⟩:train: expected b'data' of uint8 [N, 3072], got uint8[7, 3]; use a fresh copy"
        " of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, fine_labels=[0, 1])),
        DatasetError,
        "⟨folder⟩:train: expected a list of 7 at b'fine_labels', one label an image, got a list"
        " of 2; use a fresh copy of the official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, fine_labels=[100] * 7)),
        DatasetError,
        "⟨folder⟩:train: expected b'fine_labels' of 0 to 99, got 100; use a fresh copy of the "
        "official archive",
    ),
    Row(
        in_folder(lambda folder: cifar(folder, "meta", fine_label_names=[b"cat"])),
        DatasetError,
        "⟨folder⟩:meta: expected a list of 100 names (bytes) at b'fine_label_names', got "
        "[b'cat']; use a fresh copy of the official archive",
    ),
    # Runs, checkpoints and processes
    Row(
        in_folder(lambda folder: train(folder, {"config.json": "{}"})),
        UsageError,
        "--out: ⟨folder⟩ holds a run already (config.json); go on with --resume, or choose "
        "another folder",
    ),
    Row(
        in_folder(lambda folder: train(folder, {"compare.json": "{}"})),
        UsageError,
        "--out: ⟨folder⟩ holds what another command wrote (compare.json), and of a run and a "
        "comparison in one folder psclip plot shows the run alone; choose another folder",
    ),
    Row(
        in_folder(lambda folder: train(folder, resume=True)),
        UsageError,
        "--resume: no run in ⟨folder⟩, config.json is missing",
    ),
    Row(
        in_folder(lambda folder: train(folder, {"config.json": "{}"}, resume=True)),
        UsageError,
        "--resume: ⟨folder⟩/config.json is not what psclip train wrote",
    ),
    Row(
        in_folder(lambda folder: train(folder, {"config.json": '{"config": [1]}'}, resume=True)),
        UsageError,
        "--resume: ⟨folder⟩/config.json is not what psclip train wrote",
    ),
    Row(
        in_folder(
            lambda folder: train(
                folder, {"config.json": written(lr=1.0, model="small_cnn")}, resume=True
            )
        ),
        UsageError,
        "--resume: the run in ⟨folder⟩ was another one (--model is mlp, was small_cnn; --lr is "
        "0.05, was 1.0); repeat its flags, or choose another folder",
    ),
    # Plots
    Row(
        lambda: check(PlotConfig, runs=()),
        UsageError,
        "plot: expected at least one folder that psclip train wrote, got none",
    ),
    Row(
        lambda: check(PlotConfig, runs=(ROOT,), out=pathlib.Path("plot.pdf")),
        UsageError,
        "--out: expected a file that ends in .png, got plot.pdf",
    ),
    Row(
        in_folder(lambda folder: plots.read_runs(folder / "nowhere")),
        UsageError,
        "⟨folder⟩/nowhere: expected a folder that psclip train or psclip compare wrote, but "
        "there is no such folder",
    ),
    Row(
        in_folder(lambda folder: plots.read_runs(folder)),
        UsageError,
        "⟨folder⟩: expected a folder that psclip train or psclip compare wrote, but config.json "
        "and compare.json are missing",
    ),
    Row(
        in_folder(lambda folder: plot(folder, {"config.json": "{"})),
        UsageError,
        "⟨folder⟩/config.json: expected JSON, got ⟨Python's words⟩; leave this folder out, or make "
        "it anew",
    ),
    Row(
        in_folder(lambda folder: plot(folder, {"config.json": "[]"})),
        UsageError,
        "⟨folder⟩/config.json: expected an object with 'config' in it, as psclip wrote it; leave "
        "this folder out, or make it anew",
    ),
    Row(
        in_folder(lambda folder: plot(folder, {"config.json": written()})),
        UsageError,
        "⟨folder⟩: no record in metrics.jsonl yet; wait for the run's first --log-every steps",
    ),
    Row(
        in_folder(
            lambda folder: plot(
                folder,
                {"config.json": written(), "metrics.jsonl": '{"kind": "tr\n{"kind": "test"}\n'},
            )
        ),
        UsageError,
        "⟨folder⟩/metrics.jsonl, line 1: expected a record with kind and step, got "
        '\'{"kind": "tr\'; remove the line, or let psclip train --resume go on from the last '
        "checkpoint before it",
    ),
    Row(
        in_folder(lambda folder: train(folder, model="alexnet")),
        UsageError,
        "--model alexnet: AlexNet takes images [..., H, W, C] with H and W at least 16, got "
        'shape [1, 8, 8, 1]; resize them, or take "mlp" or "resnet18"',
    ),
    Row(
        in_folder(lambda folder: compare(folder, ("compare.json",))),
        UsageError,
        "--out: ⟨folder⟩ holds a result already (compare.json); choose another folder, or pass "
        "--overwrite",
    ),
    Row(
        in_folder(lambda folder: compare(folder, ("config.json", "metrics.jsonl"), overwrite=True)),
        UsageError,
        "--out: ⟨folder⟩ holds what another command wrote (config.json, metrics.jsonl), and of a "
        "run and a comparison in one folder psclip plot shows the run alone; choose another folder",
    ),
    Row(
        in_folder(lambda folder: compare(folder, validation_share=0.9999)),
        UsageError,
        "--validation-share: 0.9999 leaves nothing of the 1297 training images; take less",
    ),
    Row(
        in_folder(lambda folder: train(under_a_file(folder))),
        UsageError,
        "--out: cannot write to ⟨folder⟩/file/below: Not a directory; choose another folder",
    ),
    Row(
        in_folder(with_a_folder_for_a_lock),
        UsageError,
        "--out: cannot write to ⟨folder⟩: ⟨the system's words⟩; choose another folder",
    ),
    Row(
        in_folder(held_by_another),
        UsageError,
        "--out: another psclip is writing to ⟨folder⟩; wait until it ends, or choose another "
        "folder",
    ),
    Row(
        in_folder(not_of_the_first_process),
        UsageError,
        "--out: the first process may not write to ⟨folder⟩, and says why",
    ),
    Row(
        lambda: writing(OSError(28, "No space left on device")),
        UsageError,
        "--out: cannot write to run: No space left on device; the checkpoints before are whole:"
        " make room, and go on with --resume",
    ),
    Row(
        in_folder(lambda folder: checkpoint(folder, free=0)),
        OSError,
        "[Errno 28] No space left on device: '⟨folder⟩'",
    ),
    Row(
        in_folder(lambda folder: checkpoint(folder)),
        UsageError,
        "--resume: no checkpoint in ⟨folder⟩ is intact (steps 0); start again in another folder",
    ),
    Row(
        joining_late,
        UsageError,
        "--distributed: the processes did not come together: ⟨JAX's words⟩; start all of them "
        "within --distributed-timeout seconds, and where no cluster tells who they are, give "
        "each --coordinator HOST:PORT, --num-processes and its --process-id",
    ),
    Row(
        losing_a_process,
        ProcessLostError,
        "process 0 of 2: another one ended or does not answer (Gloo all-reduce failed: "
        "connection closed by peer); end those that are left, and go on from the last "
        "checkpoint with --resume, with any number of processes",
    ),
    # Configurations
    Row(
        lambda: check(lr=0.0),
        UsageError,
        "--lr: expected a finite number above 0, got 0.0",
    ),
    Row(
        lambda: check(accumulate=3),
        UsageError,
        "--accumulate: expected a divisor of --batch-size 64, got 3",
    ),
    Row(
        lambda: check(method="momentum", clip_at="batch"),
        UsageError,
        "--clip-at: expected sample with --method momentum, got batch; leave it out, or take "
        "--method ps-clip, ps-clip-constant, ps-clip-auto or ps-clip-median",
    ),
    Row(
        lambda: check(method="ps-clip-median", alpha=2.0),
        UsageError,
        "--alpha: expected none with --method ps-clip-median, got 2.0; leave it out, or take "
        "--method ps-clip",
    ),
    Row(
        lambda: check(method="ps-clip-auto", beta=3.0),
        UsageError,
        "--beta: expected a number in [1, 2] with --method ps-clip-auto, got 3.0",
    ),
    Row(
        lambda: check(method="ps-clip-auto", clip_at="batch"),
        UsageError,
        "--clip-at: expected sample or micro-batch with --method ps-clip-auto, got batch",
    ),
    Row(
        lambda: check(num_processes=2),
        UsageError,
        "--num-processes: expected --distributed with it",
    ),
    Row(
        lambda: check(distributed=True, coordinator="127.0.0.1:1"),
        UsageError,
        "--coordinator: expected --num-processes and --process-id with it",
    ),
    Row(
        lambda: check(distributed=True, coordinator="127.0.0.1", num_processes=2, process_id=1),
        UsageError,
        "--coordinator: expected HOST:PORT, got 127.0.0.1",
    ),
    Row(
        lambda: check(distributed=True, coordinator="127.0.0.1:1", num_processes=2, process_id=2),
        UsageError,
        "--process-id: expected less than --num-processes 2, got 2",
    ),
    Row(
        lambda: check(CompareConfig, ps_clip_thresholds=(1.0,)),
        UsageError,
        "expected as many trials for every method, at least 1, got momentum 9, batch-clip 3 × 3"
        " = 9, ps-clip 3 × 1 = 3; give each the same budget with --momentum-learning-rates, "
        "--batch-clip-learning-rates, --batch-clip-thresholds, --ps-clip-learning-rates and "
        "--ps-clip-thresholds",
    ),
    Row(
        lambda: check(data_dir=pathlib.Path("data")),
        UsageError,
        "--data-dir: of cifar10 and cifar100 alone, got it with --dataset digits, which comes with"
        " scikit-learn",
    ),
    Row(
        without_tensorboard_x,
        UsageError,
        "--tensorboard: tensorboardX is not installed; pip install 'psclip_optax[tensorboard]'",
    ),
    # The command
    Row(
        lambda: command("train", "--lr", "0"),
        Printed,
        "psclip: error: --lr: expected a finite number above 0, got 0.0\n",
    ),
    Row(
        in_folder(
            lambda folder: command(
                "train", "--dataset", "cifar10", "--data-dir", "nowhere", "--out", str(folder)
            )
        ),
        Printed,
        "psclip: error: expected cifar-10-batches-py/ or cifar-10-python.tar.gz in nowhere, "
        "which is not a folder; pass --data-dir with the folder that holds it, or leave it out "
        "to download\n",
    ),
    Row(
        lambda: command("train", _parse=ModuleNotFoundError("No module named 'tyro'", name="tyro")),
        Printed,
        "psclip: error: tyro is not installed; pip install 'psclip_optax[train]'\n",
    ),
    Row(
        without_a_device,
        Printed,
        "psclip: error: JAX finds no device: expected one of ⟨platforms⟩, which this installation "
        "of JAX has no plugin for; install it, or unset JAX_PLATFORMS\n",
    ),
    Row(
        lambda: command("train", _parse=KeyboardInterrupt),
        Printed,
        "psclip: interrupted\n",
    ),
]


@functools.cache
def seen(row: Row) -> tuple[str, frozenset[tuple[str, int]]]:
    """What a row's call tells, and the lines of the package that it ran."""
    lines = set()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        del event, argument
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    printed, tracer_before = io.StringIO(), sys.gettrace()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(printed):
        warnings.simplefilter("always")
        sys.settrace(trace)
        try:
            row.provoke()
            told = printed.getvalue()
        except row.kind as error:
            told = message_of(error)
        finally:
            sys.settrace(tracer_before)
    if issubclass(row.kind, Warning):
        told = "\n".join(str(one.message) for one in warned if one.category is row.kind)
    return told, frozenset(lines)


def message_of(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return "\n".join([str(error), *(note for note in notes if not note.startswith(JAX_NOTE))])


JAX_NOTE = "-----"  # that it has left out frames of its own


def pattern_of(text: str) -> str:
    """Of a row's text, whose parts in ⟨⟩ are anything."""
    return ".+?".join(map(re.escape, re.split("⟨.*?⟩", text)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.text[:60])
def test_a_mistake_is_told_in_these_words(row: Row):
    told, _ = seen(row)
    assert re.fullmatch(pattern_of(row.text), told, re.DOTALL), told


class Site(NamedTuple):
    """A place in the source that makes a message."""

    file: str
    function: str
    statement: str


def sites() -> Iterator[tuple[Site, tuple[str, int]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from sites_below(ast.parse(path.read_text(encoding="utf-8")), path, "")


def sites_below(node: ast.AST, path: pathlib.Path, function: str) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        if is_message(child):
            site = Site(str(path.relative_to(PACKAGE)), function, ast.unparse(child))
            yield site, (str(path), child.lineno)
        is_scope = isinstance(child, ast.FunctionDef)
        yield from sites_below(child, path, child.name if is_scope else function)


def is_message(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    on_stderr = any(ast.unparse(keyword.value) == "sys.stderr" for keyword in node.keywords)
    return called == "warnings.warn" or called.endswith(".add_note") or on_stderr


# What no row provokes: (file, function, how the statement begins), and why, or the test that does.
WITHOUT_ROW = {
    ("cli.py", "_status", "raise"): "passes on that something else is not installed",
    ("cli.py", "_run", "raise"): "passes on what is no lack of a device",
    ("cli.py", "_end_at_once", "print"): (
        "tests/training/test_distributed.py::"
        "test_a_lost_process_ends_the_run_and_one_process_goes_on_from_its_checkpoint"
    ),
    ("meshes.py", "with_auto_axes", "raise"): "passes on any other error of the function",
    ("training/distributed.py", "noticing_lost_processes", "raise"): (
        "passes on the error of a process that is alone"
    ),
    ("training/files.py", "noticing_what_cannot_be_written", "raise"): (
        "passes on what is no error of writing"
    ),
    ("training/runs.py", "_check_devices", "raise UsageError"): (
        "tests/training/test_distributed.py::test_a_batch_that_devices_cannot_share_is_refused"
    ),
}


def is_without_row(site: Site, key: tuple[str, str, str]) -> bool:
    file, function, beginning = key
    is_there = (site.file, site.function) == (file, function)
    # A bare `raise` begins as all others do.
    return is_there and re.match(rf"{re.escape(beginning)}(\(|$)", site.statement) is not None


def test_every_message_has_a_row():
    ran = frozenset[tuple[str, int]]().union(*(seen(row)[1] for row in ROWS))
    missing = {site for site, line in sites() if line not in ran}
    unexplained = {s for s in missing if not any(is_without_row(s, key) for key in WITHOUT_ROW)}
    assert not unexplained, "\n".join(map(str, sorted(unexplained)))
    needless = {key for key in WITHOUT_ROW if not any(is_without_row(s, key) for s in missing)}
    assert not needless


@pytest.mark.parametrize("test", [why for why in WITHOUT_ROW.values() if "::" in why])
def test_what_has_no_row_has_a_test(test: str):
    path, name = test.split("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")
