"""Train one model in several processes, on JAX's distributed runtime.

Each process holds the whole model and its slice of every batch. The first one writes the files.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from psclip_optax.training.config.commands import TrainConfig, UsageError


class ProcessLostError(Exception):
    """Another process of this run has ended or does not respond.

    Examples:
      >>> raise ProcessLostError("another process of this run was lost")
      Traceback (most recent call last):
      psclip_optax.training.run.distributed.ProcessLostError: another process of this run was lost
    """


def join_processes(config: TrainConfig) -> None:
    """Waits for the other processes of a run, and connects to their devices.

    Call it before anything is computed. Afterwards each process detects within
    `distributed_timeout` if another has died or hangs.

    Args:
      config: the first process's address, the number of processes, and the index of this one.
        Fields that are None are read from the cluster's variables (Slurm, Open MPI, Kubernetes,
        Cloud TPU).

    Raises:
      UsageError: the other processes did not start in time, or the cluster does not describe them.
    """
    options: dict[str, Any] = {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
        "initialization_timeout": config.distributed_timeout,
    }
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        options["heartbeat_timeout_seconds"] = config.distributed_timeout  # JAX ≥ 0.7.1
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"--distributed: the processes did not come together: {reason}; start all of them "
            "within --distributed-timeout seconds, and where no cluster tells who they are, give "
            "each --coordinator HOST:PORT, --num-processes and its --process-id"
        ) from error


def is_first_process() -> bool:
    """Tells whether this is the process that writes and reports.

    Returns:
      A bool; True without `join_processes`.

    Examples:
      >>> is_first_process()
      True
    """
    return jax.process_index() == 0


def data_parallel_mesh() -> Mesh:
    """Makes a mesh of all devices of all processes, with one axis, "data".

    Returns:
      A mesh, in the order of the processes.

    Examples:
      >>> data_parallel_mesh().axis_names
      ('data',)
    """
    return Mesh(np.array(jax.devices()), ("data",))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Puts each process's slice of a batch on its devices, as one global batch.

    Args:
      mesh: the result of `data_parallel_mesh`.
      batch: a tree of arrays, samples on axis 0, a multiple of this process's devices.

    Returns:
      The tree of global arrays, sharded over "data".

    Examples:
      >>> batch = shard_batch(data_parallel_mesh(), {"label": np.zeros(jax.device_count())})
      >>> len(batch["label"].sharding.device_set) == jax.device_count()
      True
    """
    return _global(NamedSharding(mesh, P("data")), batch)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts values that are the same in all processes on all devices.

    Args:
      mesh: what `data_parallel_mesh` returned.
      tree: of arrays.

    Returns:
      The tree of global arrays.

    Examples:
      >>> replicate(data_parallel_mesh(), {"step": np.int32(0)})["step"].is_fully_replicated
      True
    """
    return _global(NamedSharding(mesh, P()), tree)


def _global(sharding: NamedSharding, tree: Any) -> Any:
    def put(leaf: Any) -> jax.Array:
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
        data = put(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(put, tree)


def told_by_first_process(number: int) -> int:
    """Broadcasts a number from the first process.

    Args:
      number: the number in this process; only that of the first process is used.

    Returns:
      The first process's number.

    Examples:
      >>> told_by_first_process(3)
      3
    """
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all(point: str) -> None:
    """Waits until every process has reached this point.

    Args:
      point: its name, the same in all.

    Examples:
      >>> wait_for_all("start")
    """
    multihost_utils.sync_global_devices(point)


@contextlib.contextmanager
def noticing_lost_processes() -> Generator[None]:
    """Turns the error of a failed sum over processes into one that says why.

    Raises:
      ProcessLostError: another process was lost.

    Examples:
      >>> with noticing_lost_processes():
      ...     pass
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        told = str(error).strip().splitlines()[0]
        raise ProcessLostError(
            f"process {jax.process_index()} of {jax.process_count()}: another one ended or does "
            f"not answer ({told}); end those that are left, and go on from the last checkpoint "
            "with --resume, with any number of processes"
        ) from error
