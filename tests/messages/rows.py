"""Define the rows of the tables, and helpers that provoke messages."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psclip_optax as psc
from psclip_optax.training.config.checks import check_config
from psclip_optax.training.config.commands import TrainConfig


class Row(NamedTuple):
    provoke: Callable[[], Any]
    kind: type[BaseException]
    text: str


class Printed(Exception):  # noqa: N818
    """Represents a message on stderr with which a command ends."""


PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}


X, Y = np.ones((4, 3), np.float32), np.ones(4, np.float32)


STACK = {"w": np.ones((4, 3, 2), np.float32), "b": np.ones((4, 2), np.float32)}


MEAN = {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}


NORMS = np.linspace(1.0, 2.0, 1000)


RULE = psc.moment_threshold(1.5)


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


def four_devices(axis_type: AxisType):
    return jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])


def on_four_devices(function):
    sharded = jax.shard_map(
        function,
        mesh=four_devices(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return jax.eval_shape(sharded, PARAMS, X)


def in_folder(provoke: Callable[[pathlib.Path], Any]) -> Callable[[], Any]:
    def provoke_in_folder() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return provoke(pathlib.Path(folder))

    return provoke_in_folder


def check(kind: Any = TrainConfig, **options: Any):
    check_config(kind(**options))


def under_a_file(folder: pathlib.Path) -> pathlib.Path:
    (folder / "file").write_text("")
    return folder / "file" / "below"
