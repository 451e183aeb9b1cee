"""Measures times, memory and errors of the engine on one GPU, for `benchmarks.engine.on_gpu`."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import psclip_optax as psc
from benchmarks.common.publishing import markdown_table
from benchmarks.common.timing import Case, quartiles, time_interleaved
from benchmarks.engine import real_models
from benchmarks.engine.accumulation import mean_loss
from benchmarks.engine.on_gpu_results import Results, say
from benchmarks.engine.real_models import Model, Size
from benchmarks.zoo.models import ZOO

Step = Callable[..., Any]

NOTE = (
    "Ratios to `value_and_grad` of the mean loss in the same round of an interleaved run, at JAX's "
    "default matmul precision: median (quartiles). Memory: temporary memory of the compiled "
    "program, ratio. Compile: tracing included, ratio of one compilation each; the plain one comes "
    "first, and tunes kernels that the others share. Half of the samples are clipped."
)
ERRORS_NOTE = (
    "Relative error of samples' norms at the default precision, median and largest of the batch, "
    'against `vmap(grad)` with matmul precision "highest". Beside it that of `vmap(grad)` itself '
    "at the default precision: what the loss's own products bring."
)
MODES: dict[str, dict[str, Any]] = {
    "one_pass": {"mode": "one_pass"},
    "one_pass, propagate": {"mode": "one_pass", "on_nonfinite": "propagate"},
    "two_pass": {"mode": "two_pass"},
    "vmap": {"mode": "vmap"},
}
NEEDED = ("plain", "one_pass")
WINDOW_SECONDS, MOST_CALLS = 0.03, 20
# The number of samples whose gradients are stacked at once for the reference norms.
TOGETHER = 8


class Job(NamedTuple):
    """One measurement.

    Attributes:
      what: "time" of all modes, or "error" of the norms.
      name: the name of the model.
      build: a function from a size to the model.
      leaves_out: modes that are measured only on request.
    """

    what: Literal["time", "error"]
    name: str
    build: Callable[[Size], Model]
    leaves_out: tuple[str, ...] = ()


def zoo_model(name: str, n: int) -> Callable[[Size], Model]:
    def build(size: Size) -> Model:
        full = size == "full"
        model = ZOO[name]("full" if full else "small")
        label = f"{name} (zoo)"
        # The zoo draws its parameters and batches from fixed keys.
        samples = n if full else 4
        losses = model.loss, mean_loss(model.loss)
        return Model(label, *losses, lambda _: model.params, lambda _, n: model.batch(n), samples)

    return build


def scanned_gpt2(size: Size) -> Model:
    return real_models.gpt2(size, scanned=True)


def small_gpt2(size: Size) -> Model:
    return real_models.gpt2("small" if size == "full" else size)._replace(name="GPT-2, small")


# The most important jobs come first, because the time limit may end the list.
JOBS = (
    Job("time", "alexnet", real_models.alexnet),
    Job("time", "vit_b16", real_models.vit_b16, ("vmap",)),
    Job("time", "gpt2_scanned", scanned_gpt2, ("vmap",)),
    Job("error", "alexnet", real_models.alexnet),
    Job("error", "gpt2_small", small_gpt2),
    Job("time", "gpt2", real_models.gpt2, ("vmap",)),
    Job("error", "gpt_tied", zoo_model("gpt_tied", 16)),
    Job("time", "mlp", zoo_model("mlp", 512)),
    Job("time", "resnet18", zoo_model("resnet18", 32), ("vmap",)),
)


# Time, memory, compilation


def plain_step(batch_loss: Step) -> Step:
    gradient = jax.value_and_grad(batch_loss)
    return lambda params, threshold, *batch: gradient(params, *batch)


def clipped_step(loss: Step, **options: Any) -> Step:
    """Builds (params, threshold, *batch) → value, gradient, statistics."""
    clipped = psc.clipped_value_and_grad(loss, 1.0, return_stats=True, **options)
    return lambda params, tau, *batch: clipped(params, *batch, threshold=tau)


def steps_of(model: Model, leaves_out: tuple[str, ...]) -> dict[str, Step]:
    chosen = {name: options for name, options in MODES.items() if name not in leaves_out}
    clipped = {name: clipped_step(model.loss, **options) for name, options in chosen.items()}
    return {"plain": plain_step(model.batch_loss), **clipped}


def make_arguments(model: Model, threshold: float = float("inf")) -> tuple[Any, ...]:
    """Makes (params, threshold, *batch) on the default device."""
    # The hardware's random generator: the default one takes longer to compile than the measured
    # step.
    keys = jax.random.split(jax.random.key(0, impl="rbg"))
    batch = jax.jit(model.make_batch, static_argnums=1)(keys[1], model.n)
    return jax.jit(model.make_params)(keys[0]), jnp.float32(threshold), *batch


def compile_step(step: Step, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Compiles a program, and returns it with its measurements after a first call."""
    # Caches from tracing another mode would shorten the compilation of this one.
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    program: Any = jax.jit(step).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(program(*arguments))
    memory = program.memory_analysis().temp_size_in_bytes
    return {"program": program, "compile_seconds": seconds, "temp_bytes": memory}


def compile_steps(steps: dict[str, Step], arguments: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """Compiles each mode's program, or records why that failed."""
    modes = {}
    for name, step in steps.items():
        try:
            modes[name] = compile_step(step, arguments)
            say(f"  {name}: compiled in {modes[name]['compile_seconds']:.1f} s")
        except jax.errors.JaxRuntimeError as error:  # out of memory, if gradients are stacked
            if name in NEEDED:
                raise
            modes[name] = {"failed": first_line(error)}
            say(f"  {name}: {first_line(error)}")
    return modes


def repeated(program: Step, calls: int) -> Step:
    """Repeats a call, because a single one takes less time than its dispatch."""
    return lambda *arguments: [program(*arguments) for _ in range(calls)]


def calls_in_window(program: Step, arguments: tuple[Any, ...]) -> int:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return int(np.clip(WINDOW_SECONDS / (time.perf_counter() - start), 1, MOST_CALLS))


def measure_time(model: Model, leaves_out: tuple[str, ...], rounds: int) -> dict[str, Any]:
    arguments = make_arguments(model)
    modes = compile_steps(steps_of(model, leaves_out), arguments)
    programs = {name: own.pop("program") for name, own in modes.items() if "program" in own}
    norms = programs["one_pass"](*arguments)[2].norms
    arguments = (arguments[0], jnp.median(norms), *arguments[2:])
    calls = calls_in_window(programs["plain"], arguments)
    cases = {name: Case(repeated(program, calls), arguments) for name, program in programs.items()}
    for name, seconds in time_interleaved(cases, rounds).items():
        modes[name]["seconds"] = [window / calls for window in seconds]
    for own in modes.values():
        own |= ratios(own, modes["plain"])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
    return {"n": model.n, "parameters": parameters, "calls": calls, "modes": modes}


def ratios(own: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Divides a mode's measurements by the plain gradient's; empty for a mode that failed."""
    if "failed" in own:
        return {}
    pairs = zip(own["seconds"], plain["seconds"], strict=True)
    return {
        "seconds_quartiles": quartiles(own["seconds"]),
        "ratio_quartiles": quartiles([mine / other for mine, other in pairs]),
        "compile_ratio": own["compile_seconds"] / plain["compile_seconds"],
        "temp_ratio": own["temp_bytes"] / max(plain["temp_bytes"], 1),
    }


# Errors


def stacked_norms(loss: Step, together: int) -> Step:
    """Builds (params, *batch) → the norm of each sample's gradient."""

    def norms(params: Any, *batch: Any) -> jax.Array:
        def norm(example: Any) -> jax.Array:
            return optax.tree.norm(jax.grad(loss)(params, *example))

        return jax.lax.map(norm, batch, batch_size=together)

    return norms


def measure_error(model: Model) -> dict[str, Any]:
    params, tau, *batch = make_arguments(model)
    stacked = stacked_norms(model.loss, min(model.n, TOGETHER))
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(jax.jit(stacked)(params, *batch), float)
    clipped = jax.jit(clipped_step(model.loss, mode="one_pass"))
    ways = {
        "one_pass": clipped(params, tau, *batch)[2].norms,
        "vmap(grad)": jax.jit(stacked)(params, *batch),
    }
    errors = {name: np.abs(np.asarray(norms) / exact - 1) for name, norms in ways.items()}
    return {
        "n": model.n,
        "largest_norm": exact.max(),
        "smallest_norm": exact.min(),
        "errors": {
            name: {"median": np.median(error), "largest": error.max()}
            for name, error in errors.items()
        },
    }


def measure(job: Job, size: Size, rounds: int) -> dict[str, Any]:
    model = job.build(size)
    found = (
        measure_time(model, job.leaves_out, rounds) if job.what == "time" else measure_error(model)
    )
    return {"what": job.what, "name": job.name, "size": size, "label": model.name} | found


def jobs_of(models: tuple[str, ...], stacked: tuple[str, ...]) -> list[Job]:
    """Lists the jobs of these models, or of all; models in `stacked` run all modes."""
    return [
        job._replace(leaves_out=()) if job.name in stacked else job
        for job in JOBS
        if not models or job.name in models
    ]


def measure_all(results: Results, jobs: list[Job], size: Size, rounds: int, end: float) -> None:
    """Makes the measurements that the file lacks, until the time limit."""
    finished = {(row["what"], row["name"], row["size"]) for row in results.rows()}
    for job in jobs:
        if (job.what, job.name, size) in finished:
            continue
        if time.perf_counter() > end:
            say(f"The time is over: {job.what} of {job.name} is left out")
            continue
        say(f"{job.what} of {job.name}")
        start = time.perf_counter()
        try:
            results.add(measure(job, size, rounds))
        except Exception:  # a failure must not stop the other jobs
            traceback.print_exc()
        say(f"  {time.perf_counter() - start:.1f} s")


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


# Tables


def times_to_markdown(rows: list[dict[str, Any]]) -> str:
    table = [["model", "n", "mode", "ms", "time", "memory", "compile"]]
    for row in rows:
        if row["what"] != "time":
            continue
        for mode, own in row["modes"].items():
            table.append([row["label"], str(row["n"]), mode, *time_cells(mode, own)])
    return f"{markdown_table(table)}\n{NOTE}\n" if len(table) > 1 else ""


def time_cells(mode: str, own: dict[str, Any]) -> list[str]:
    if "failed" in own:
        return ["–", own["failed"], "–", "–"]
    ms = f"{1e3 * statistics.median(own['seconds']):.3f}"
    if mode == "plain":
        return [ms, "1", f"{own['temp_bytes'] / 2**20:.1f} MiB", f"{own['compile_seconds']:.1f} s"]
    low, middle, high = own["ratio_quartiles"]
    ratio = f"{middle:.3f} ({low:.3f}–{high:.3f})"
    return [ms, ratio, f"{own['temp_ratio']:.2f}", f"{own['compile_ratio']:.2f}"]


def errors_to_markdown(rows: list[dict[str, Any]]) -> str:
    table = [["model", "n", "norms of", "median error", "largest error"]]
    for row in rows:
        if row["what"] != "error":
            continue
        for way, own in row["errors"].items():
            figures = [f"{own[name]:.1e}" for name in ("median", "largest")]
            table.append([row["label"], str(row["n"]), way, *figures])
    return f"{markdown_table(table)}\n{ERRORS_NOTE}\n" if len(table) > 1 else ""


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Writes two tables: the cost of each mode, and the errors of its norms."""
    return "\n".join(filter(None, (times_to_markdown(rows), errors_to_markdown(rows))))
