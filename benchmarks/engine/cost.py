"""How much does per-sample clipping cost, relative to a plain gradient?

    python -m benchmarks.engine.cost --sweep n length

Results are relative to `jax.value_and_grad` of the mean loss in the same process and round, for
each model of the zoo. Prints a table and writes benchmarks/results/engine.json and .png. A model in
the JSON is not measured again, so repeat the command to resume.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import psclip_optax as psc
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, load
from benchmarks.common.timing import Case, quartiles, time_interleaved
from benchmarks.engine.cost_report import (
    NOTE,
    draw,
    label,
    summarise,
    to_markdown,
    to_table,
)
from benchmarks.engine.real_models import by_layer
from benchmarks.zoo.models import ZOO, Model, Size, gpt
from psclip_optax.engine.flops import count_flops
from psclip_optax.training.output.files import write_atomically

Mode = Literal["plain", "one_pass", "two_pass", "by_layer", "vmap"]
Sweep = Literal["n", "length"]

# Sizes at which a step of a plain gradient takes about a second on two cores.
SAMPLES = {
    "mlp": 512,
    "alexnet": 128,
    "resnet18": 32,
    "vit": 32,
    "gpt": 16,
    "gpt_tied": 16,
    "gpt_scanned": 16,
    "lstm": 128,
    "recommender": 128,
    "separable_cnn": 32,
    "dilated_cnn": 64,
    "unet": 64,
    "mixture_of_experts": 128,
    "lora": 128,
    "weight_norm": 512,
}
QUICK_MODELS = ("mlp", "lstm")
MOST_STACKED_BYTES = 4e9
# The error of a leaf whose gradient vanishes up to rounding is relative to this share of the
# largest entry of all leaves.
ERROR_FLOOR = 1e-2
MODES: tuple[Mode, ...] = ("plain", "one_pass", "two_pass", "by_layer", "vmap")


class Point(NamedTuple):
    """The subject of one row of the results.

    Attributes:
      experiment: "zoo", or the sweep that the row belongs to.
      model: its name in the zoo.
      samples: the number of samples in the batch.
      length: the length of the sequence, if not the model's default.
    """

    experiment: Literal["zoo", "n", "length"]
    model: str
    samples: int
    length: int | None = None


class Program(NamedTuple):
    """A compiled step, and the times of tracing and compiling."""

    compiled: Any
    compile_seconds: list[float]


# Measurements


def make_points(
    models: Iterable[str], samples: dict[str, int], sweeps: Iterable[Sweep], quick: bool
) -> list[Point]:
    numbers = {**(dict.fromkeys(SAMPLES, 4) if quick else SAMPLES), **samples}
    by_sweep = {
        "n": [
            Point("n", model, n)
            for model in (("mlp",) if quick else ("alexnet", "mlp"))
            for n in ((2, 4) if quick else (8, 16, 32, 64, 128, 256, 512))
        ],
        "length": [
            Point("length", "gpt_tied", 2 if quick else 8, length)
            for length in ((4, 8) if quick else (32, 64, 128, 256, 512, 1024))
        ],
    }
    zoo = [Point("zoo", model, numbers[model]) for model in models]
    return zoo + [point for sweep in sweeps for point in by_sweep[sweep]]


def build(point: Point, size: Size) -> Model:
    if point.length is None:
        return ZOO[point.model](size)
    return gpt(tied=True, scanned=False, length=point.length)(size)


def step(loss: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """Builds a function of (params, threshold, *batch) that returns (value, grads, …)."""
    if mode == "by_layer":
        return step_by_layer(loss)
    if mode != "plain":
        clipped = psc.clipped_value_and_grad(loss, 1.0, mode=mode, return_stats=True)
        return lambda params, tau, *batch: clipped(params, *batch, threshold=tau)

    def plain(params: Any, tau: Any, *batch: Any) -> Any:
        del tau

        def mean_loss(params: Any) -> jax.Array:
            return jax.vmap(lambda *example: loss(params, *example))(*batch).mean()

        return jax.value_and_grad(mean_loss)(params)

    return plain


def step_by_layer(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a function of (params, threshold, *batch) with a threshold for each layer."""

    def clipped(params: Any, tau: Any, *batch: Any) -> Any:
        function = psc.clipped_value_and_grad(loss, by_layer(params, tau), return_stats=True)
        return function(params, *batch)

    return clipped


def compile_interleaved(
    steps: dict[Any, Callable[..., Any]], arguments: tuple[Any, ...], rounds: int
) -> dict[Any, Program]:
    programs: dict[Any, Program] = {}
    for _ in range(rounds):
        for mode, function in steps.items():
            # Caches from tracing another mode would shorten this trace, and its garbage would
            # lengthen it.
            jax.clear_caches()
            gc.collect()
            start = time.perf_counter()
            compiled = jax.jit(function).lower(*arguments).compile()
            before = programs[mode].compile_seconds if mode in programs else []
            programs[mode] = Program(compiled, [*before, time.perf_counter() - start])
    return programs


# Errors


def largest_error(grads: Any, reference: Any) -> float:
    """Returns the largest error of a leaf relative to its largest entry; NaN if any is."""
    wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(reference)]
    largest = np.array([np.abs(leaf).max(initial=0) for leaf in wanted])
    errors = [
        np.abs(np.asarray(leaf) - want).max(initial=0)
        for leaf, want in zip(jax.tree.leaves(grads), wanted, strict=True)
    ]
    scales = np.maximum(largest, ERROR_FLOOR * largest.max()) + np.finfo(np.float32).tiny
    return float(np.max(np.array(errors) / scales))


def gradients_in_slices(
    loss: Callable[..., Any], arguments: tuple[Any, ...], num_slices: int
) -> Any:
    """Stacks gradients of one slice of the batch after another, clips and averages them."""
    params, tau, *batch = arguments
    program = jax.jit(step(loss, "vmap"))
    total = None
    for i in range(num_slices):
        grads = program(params, tau, *(array[i::num_slices] for array in batch))[1]
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    return jax.tree.map(lambda leaf: leaf / num_slices, total)


def slices_that_fit(samples: int, parameter_bytes: int) -> int:
    """Returns the smallest number of equal slices whose stacked gradients are not too large."""
    divisors = (count for count in range(1, samples) if samples % count == 0)
    fits = (n for n in divisors if samples // n * parameter_bytes <= MOST_STACKED_BYTES)
    return next(fits, samples)


# One row


def measure(point: Point, size: Size, rounds: int, compilations: int) -> dict[str, Any]:
    model = build(point, size)
    batch = model.batch(point.samples)
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    skipped = skip_reasons(point, parameter_bytes)
    steps = {mode: step(model.loss, mode) for mode in MODES if mode not in skipped}
    arguments = (model.params, jnp.float32(jnp.inf), *batch)
    is_zoo = point.experiment == "zoo"
    programs = compile_interleaved(steps, arguments, compilations if is_zoo else 1)
    tau = jnp.median(programs["one_pass"].compiled(*arguments)[2].norms)  # clips half of them
    arguments = (model.params, tau, *batch)
    cases = {mode: Case(program.compiled, arguments) for mode, program in programs.items()}
    seconds = time_interleaved(cases, rounds)
    figures = {
        mode: figures_of(programs[mode], seconds[mode], count_flops(steps[mode], arguments))
        for mode in steps
    }
    add_ratios(figures, seconds, programs)
    cotangents = cotangent_bytes(model, batch)
    allowed = 1.1 * (figures["plain"]["temp_bytes"] + cotangents)
    figures["one_pass"]["temp_per_allowed"] = figures["one_pass"]["temp_bytes"] / allowed
    if is_zoo:
        add_errors(figures, programs, model.loss, arguments, parameter_bytes)
    return {
        **point._asdict(),
        "date": describe_machine()["date"],
        "parameter_bytes": parameter_bytes,
        "cotangent_bytes": cotangents,
        "threshold": float(tau),
        "modes": figures | {mode: {"skipped": reason} for mode, reason in skipped.items()},
    }


def cotangent_bytes(model: Model, batch: tuple[Any, ...]) -> int:
    clipped: Any = psc.clipped_value_and_grad(model.loss, 1.0)
    return sum(row.extra_bytes for row in clipped.explain(model.params, *batch).rows)


def skip_reasons(point: Point, parameter_bytes: int) -> dict[str, str]:
    if point.experiment != "zoo":
        return dict.fromkeys(("two_pass", "by_layer", "vmap"), "not part of a sweep")
    stacked = point.samples * parameter_bytes
    if stacked <= MOST_STACKED_BYTES:
        return {}
    limit = f"{MOST_STACKED_BYTES / 1e9:.0f} GB"
    return {"vmap": f"stacked gradients take {stacked / 1e9:.1f} GB, more than {limit}"}


def figures_of(program: Program, seconds: list[float], flops: float) -> dict[str, Any]:
    return {
        "seconds_quartiles": quartiles(seconds),
        "temp_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
        "flops": flops,
        "compile_seconds": statistics.median(program.compile_seconds),
    }


def add_ratios(
    figures: dict[Any, dict[str, Any]],
    seconds: dict[str, list[float]],
    programs: dict[Any, Program],
) -> None:
    compiling = {mode: program.compile_seconds for mode, program in programs.items()}
    for mode, of_mode in figures.items():
        of_mode["ratio_quartiles"] = ratio_quartiles(seconds[mode], seconds["plain"])
        of_compiling = ratio_quartiles(compiling[mode], compiling["plain"])
        of_mode["compile_ratio_quartiles"] = of_compiling
        of_mode["compile_ratio"] = of_compiling[1]
        for quantity, unit in (("temp", "_bytes"), ("flops", "")):
            of_plain = figures["plain"][quantity + unit]
            of_mode[quantity + "_ratio"] = of_mode[quantity + unit] / of_plain


def ratio_quartiles(seconds: list[float], of_plain: list[float]) -> list[float]:
    ratios = [own / plain for own, plain in zip(seconds, of_plain, strict=True)]
    return quartiles(ratios) if len(ratios) > 1 else ratios * 3


def add_errors(
    figures: dict[Any, dict[str, Any]],
    programs: dict[Any, Program],
    loss: Callable[..., Any],
    arguments: tuple[Any, ...],
    parameter_bytes: int,
) -> None:
    # In slices, gradients that do not fit as one stack have a reference as well.
    if "vmap" in programs:
        reference = programs["vmap"].compiled(*arguments)[1]
    else:
        num_slices = slices_that_fit(len(arguments[2]), parameter_bytes)
        reference = gradients_in_slices(loss, arguments, num_slices)
    for mode in ("one_pass", "two_pass"):
        figures[mode]["error"] = largest_error(programs[mode].compiled(*arguments)[1], reference)


# The file of results


def is_of(row: dict[str, Any], point: Point) -> bool:
    return all(row[name] == value for name, value in point._asdict().items())


def add_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a row in order, replacing one of the same model and batch; the zoo has one per model."""
    others = [other for other in rows if slot(other) != slot(row)]
    return sorted([*others, row], key=slot)


def slot(row: dict[str, Any]) -> tuple[int, ...]:
    experiment = ("zoo", "n", "length").index(row["experiment"])
    model = list(ZOO).index(row["model"])
    in_sweep = (row["samples"], row["length"] or 0) if experiment else ()
    return experiment, model, *in_sweep


def write(path: pathlib.Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    result = {"settings": settings, "note": NOTE, "summary": summarise(rows), "rows": rows}
    write_atomically(path, f"{json.dumps(result, indent=2)}\n".encode())


def main(
    out: pathlib.Path = RESULTS,
    models: tuple[str, ...] | None = None,
    samples: dict[str, int] | None = None,
    sweep: tuple[Sweep, ...] = (),
    rounds: int | None = None,
    compilations: int | None = None,
    quick: bool = False,
    rerun: bool = False,
    markdown: bool = False,
) -> None:
    """Measures the cost of per-sample clipping, relative to a plain gradient.

    Args:
      out: folder for engine.json and engine.png.
      models: models of the zoo; all by default, none with an empty --models.
      samples: batch sizes that replace the default ones, as in --samples alexnet 64 mlp 32.
      sweep: also measure ratios over the number of samples, or over the length of the sequence.
      rounds: timed rounds; 9 by default.
      compilations: compilations of each mode, whose median is reported; 5 by default, and 1 in a
        sweep.
      quick: two small models and few rounds, to check that the benchmark works.
      rerun: also measure what is in the file already.
      markdown: measure nothing; print the guide's table from the file.
    """
    if markdown:
        print(to_markdown(json.loads((out / "engine.json").read_text())["rows"]))
        return
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    chosen = models if models is not None else QUICK_MODELS if quick else tuple(SAMPLES)
    size: Size = "small" if quick else "full"
    rounds = rounds or (3 if quick else 9)
    compilations = compilations or (1 if quick else 5)
    machine = describe_machine() | {
        "jaxlib": importlib.metadata.version("jaxlib"),
        "xla_platform": jax.devices()[0].client.platform_version,
    }
    measured = {"rounds": rounds, "compilations": compilations, "size": size}
    settings = {"machine": machine, **measured}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "engine.json"
    rows = load(path, settings, rerun)
    console = Console()
    if not console.is_terminal:
        console.width = 126  # that of the table
    for point in make_points(chosen, samples or {}, sweep, quick):
        if not rerun and any(is_of(row, point) for row in rows):
            continue
        console.print(f"Measuring {label(point._asdict())}", style="dim")
        rows = add_row(rows, measure(point, size, rounds, compilations))
        write(path, settings, rows)
    console.print(to_table(machine, rows))
    draw(machine, rows).savefig(out / "engine.png", dpi=160)


if __name__ == "__main__":
    tyro.cli(main)
