"""Compiles for accelerators without the hardware, and reads the programs' costs.

XLA's compilers for TPUs and NVIDIA GPUs run on any machine: `pip install '.[accelerators]'`.
"""

from __future__ import annotations

import functools
import os
import pathlib
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.common import hlo
from benchmarks.engine.on_gpu_results import read_rows
from psclip_optax.training.output.files import to_json, write_atomically

PointT = TypeVar("PointT", bound=Hashable)

# The machine has no TPU, and libtpu would search for one; several processes may compile at once.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_H100 = pathlib.Path(__file__).with_name("h100.txtpb")
TARGETS = ("v5e", "v6e", "h100")
# Without a card to try tiles on, Triton finds none for some products; cuBLAS computes all of them.
_OPTIONS: dict[str, dict[str, str | bool]] = {"h100": {"xla_gpu_enable_triton_gemm": False}}


class Cost(NamedTuple):
    """The cost of a compiled program.

    Attributes:
      cycles: cycles of a TPU, by the compiler's estimates; 0 for a GPU.
      kernels: the number of kernels that a GPU launches; 0 for a TPU.
      bytes: the bytes that these kernels read and write.
      waits: how often a GPU waits for the host.
      temp_bytes: the peak of the temporary memory.
      compile_seconds: the time of compilation, including tracing.
    """

    cycles: int
    kernels: int
    bytes: int
    waits: int
    temp_bytes: int
    compile_seconds: float


@functools.cache
def devices(target: str, topology: str = "2x2") -> Any:
    """Returns the devices of a target; for a TPU, row by row of the topology."""
    os.environ.update(_ENVIRONMENT)
    if target == "h100":
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology="1x1x1",
            target_config=_H100.read_text(),
        ).devices
    name = f"{target}:{topology}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def on_one_device(target: str, tree: Any) -> Any:
    """Places the shapes of a tree on one device of the target."""
    sharding = SingleDeviceSharding(devices(target)[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def compile_for(target: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    lowered = jax.jit(function).lower(*on_one_device(target, arguments))
    return lowered.compile(compiler_options=_OPTIONS.get(target, {}))


def cost_of(target: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Cost:
    """Compiles a function of arrays with these shapes, and reads its cost.

    Raises:
      jax.errors.JaxRuntimeError: the program does not fit into the device's memory.
    """
    start = time.perf_counter()
    program = compile_for(target, function, arguments)
    seconds = time.perf_counter() - start
    text = program.as_text()
    gpu = hlo.gpu_cost(text) if target == "h100" else hlo.GpuCost(0, 0, 0)
    cycles = 0 if target == "h100" else hlo.tpu_cycles(text)
    return Cost(cycles, *gpu, program.memory_analysis().temp_size_in_bytes, seconds)


def compile_missing(
    path: pathlib.Path,
    wanted: Sequence[PointT],
    point_of: Callable[[dict[str, Any]], PointT],
    measure: Callable[[PointT], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    rerun: bool,
) -> dict[str, Any]:
    """Compiles the points that a result lacks, and writes it after each.

    Args:
      path: the result's file.
      wanted: the points to compile.
      point_of: a function from a row to its point.
      measure: a function that compiles a point, to its row.
      summary: a function from all rows to the result.
      rerun: whether to compile points again that are in the result.

    Returns:
      The result.
    """
    rows = [row for row in read_rows(path) if not (rerun and point_of(row) in wanted)]
    done = {point_of(row) for row in rows}
    result = summary(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    for point in (point for point in wanted if point not in done):
        rows.append(measure(point))
        result = summary(rows)
        write_atomically(path, f"{to_json(result, indent=2)}\n".encode())
    return result
