"""What does clipping per sample cost, against a plain gradient?

    python -m benchmarks.engine.cost --sweep n length

For each model of the zoo, `jax.value_and_grad` of the mean loss in the same process and
round is the unit. Prints a table and writes benchmarks/results/engine.json and .png. A model that
is in the JSON already is not measured again, so an interrupted run goes on where it stopped.
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import psclip_optax as psc
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, load
from benchmarks.common.style import show_ticks, tidy
from benchmarks.common.timing import Case, quartiles, time_interleaved
from benchmarks.zoo.models import ZOO, Model, Size, gpt
from psclip_optax.engine.flops import count_flops
from psclip_optax.training.output.files import write_atomically

Mode = Literal["plain", "one_pass", "two_pass", "vmap"]
Sweep = Literal["n", "length"]

COMPILATIONS = 5
NOTE = (
    "Time: ratio to the plain gradient's in the same round, median (quartiles). Temp: temporary "
    "memory of the compiled program; allowed is 1.1 × (plain + the sites' cotangents). FLOPs: "
    "XLA's count with every scan unrolled, and of a branch the dearer side. Compile: tracing "
    f"included, median of {COMPILATIONS} ratios (of one in a sweep). Error: of the gradients, half "
    "of the samples clipped, against stacked ones in float32; relative to the largest entry of "
    "each leaf, largest over the leaves."
)
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
# A leaf whose gradient vanishes but for rounding is held against this share of the largest entry of
# all leaves.
ERROR_FLOOR = 1e-2
MODES: tuple[Mode, ...] = ("plain", "one_pass", "two_pass", "vmap")
# Okabe and Ito's colours, which the colour-blind can tell apart; hatched for print in grey.
STYLES = {"one_pass": ("#0072B2", ""), "two_pass": ("#56B4E9", "///"), "vmap": ("#D55E00", "...")}
LINES = {"alexnet": ("#0072B2", "o"), "mlp": ("#D55E00", "s"), "gpt_tied": ("#009E73", "^")}


class Point(NamedTuple):
    """The subject of one row of the results.

    Attributes:
      experiment: "zoo", or the sweep that the row belongs to.
      model: its name in the zoo.
      samples: in the batch.
      length: of the sequence, where it is not the model's own.
    """

    experiment: Literal["zoo", "n", "length"]
    model: str
    samples: int
    length: int | None = None


class Program(NamedTuple):
    """A compiled step, and how long tracing and compiling took, each time."""

    compiled: Any
    compile_seconds: list[float]


# What is measured


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
    if mode != "plain":
        clipped = psc.clipped_value_and_grad(loss, 1.0, mode=mode, return_stats=True)
        return lambda params, tau, *batch: clipped(params, *batch, threshold=tau)

    def plain(params: Any, tau: Any, *batch: Any) -> Any:
        del tau

        def mean_loss(params: Any) -> jax.Array:
            return jax.vmap(lambda *example: loss(params, *example))(*batch).mean()

        return jax.value_and_grad(mean_loss)(params)

    return plain


def compile_interleaved(
    steps: dict[Any, Callable[..., Any]], arguments: tuple[Any, ...], rounds: int
) -> dict[Any, Program]:
    programs: dict[Any, Program] = {}
    for _ in range(rounds):
        for mode, function in steps.items():
            # What tracing another mode has left would shorten this one's, or lengthen it by the
            # collection of its garbage.
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
    """Returns the fewest slices of equal size whose stacked gradients are not too large."""
    divisors = (count for count in range(1, samples) if samples % count == 0)
    fits = (n for n in divisors if samples // n * parameter_bytes <= MOST_STACKED_BYTES)
    return next(fits, samples)


# One row


def measure(point: Point, size: Size, rounds: int) -> dict[str, Any]:
    model = build(point, size)
    batch = model.batch(point.samples)
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    skipped = skip_reasons(point, parameter_bytes)
    steps = {mode: step(model.loss, mode) for mode in MODES if mode not in skipped}
    arguments = (model.params, jnp.float32(jnp.inf), *batch)
    is_zoo, is_quick = point.experiment == "zoo", size == "small"
    compilations = COMPILATIONS if is_zoo and not is_quick else 1
    programs = compile_interleaved(steps, arguments, compilations)
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
        return dict.fromkeys(("two_pass", "vmap"), "not part of a sweep")
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
    # Through slices the gradients that do not fit as one stack have a reference as well.
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
    """Adds a row in order, in place of one of the same model and batch; the zoo has one a model."""
    others = [other for other in rows if slot(other) != slot(row)]
    return sorted([*others, row], key=slot)


def slot(row: dict[str, Any]) -> tuple[int, ...]:
    experiment = ("zoo", "n", "length").index(row["experiment"])
    model = list(ZOO).index(row["model"])
    in_sweep = (row["samples"], row["length"] or 0) if experiment else ()
    return experiment, model, *in_sweep


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Averages the time over the zoo geometrically, and fits how the ratio varies in each sweep."""
    means = {}
    for mode in STYLES:
        ratios = [figures["ratio_quartiles"][1] for _, figures in in_zoo(rows, mode)]
        if ratios:
            means[mode] = {"ratio": statistics.geometric_mean(ratios), "models": len(ratios)}
    variation = {}
    for (sweep, model), points in sweeps_of(rows).items():
        ratios = [row["modes"]["one_pass"]["ratio_quartiles"][1] for row in points]
        variation[f"{sweep} of {model}"] = max(ratios) / min(ratios)
    return {"geometric_mean_of_time": means, "largest_per_smallest_ratio": variation}


def in_zoo(rows: list[dict[str, Any]], mode: str) -> list[tuple[int, dict[str, Any]]]:
    """Lists the figures of a mode with the index of their model, where it ran."""
    zoo = [row for row in rows if row["experiment"] == "zoo"]
    figures = [(index, row["modes"][mode]) for index, row in enumerate(zoo)]
    return [(index, of_mode) for index, of_mode in figures if "skipped" not in of_mode]


def sweeps_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["experiment"] != "zoo":
            sweeps.setdefault((row["experiment"], row["model"]), []).append(row)
    return sweeps


def write(path: pathlib.Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    result = {"settings": settings, "note": NOTE, "summary": summarise(rows), "rows": rows}
    write_atomically(path, f"{json.dumps(result, indent=2)}\n".encode())


# Table


def label(row: dict[str, Any]) -> str:
    length = "" if row["length"] is None else f", T = {row['length']}"
    return f"{row['model']}, n = {row['samples']}{length}"


def to_table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    caption = "\n".join([NOTE, *reasons_to_show(rows)])
    table = Table(title=describe(machine), caption=caption, caption_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for name in ("ms", "time/plain", "temp", "of allowed", "FLOPs", "compile", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown = {mode: f for mode, f in row["modes"].items() if is_shown(row, f)}
        for i, (mode, figures) in enumerate(shown.items()):
            is_last = i == len(shown) - 1
            table.add_row("" if i else label(row), mode, *cells(figures), end_section=is_last)
    summary = summarise(rows)
    for mode, mean in summary["geometric_mean_of_time"].items():
        table.add_row(f"geometric mean of {mean['models']}", mode, "", f"{mean['ratio']:.2f}")
    for sweep, ratio in summary["largest_per_smallest_ratio"].items():
        table.add_row(f"over {sweep}", "one_pass", "", f"largest/smallest {ratio:.2f}")
    return table


def is_shown(row: dict[str, Any], figures: dict[str, Any]) -> bool:
    return row["experiment"] == "zoo" or "skipped" not in figures


def reasons_to_show(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"– {label(row)}, {mode}: {figures['skipped']}"
        for row in rows
        for mode, figures in row["modes"].items()
        if row["experiment"] == "zoo" and "skipped" in figures
    ]


def cells(figures: dict[str, Any]) -> list[str]:
    if "skipped" in figures:
        return ["–"] * 7
    low, middle, high = figures["ratio_quartiles"]
    is_unit = low == high == 1
    return [
        f"{1e3 * figures['seconds_quartiles'][1]:.1f}",
        "1" if is_unit else f"{middle:.2f} ({low:.2f}–{high:.2f})",
        f"{figures['temp_bytes'] / 1e6:.1f} MB" if is_unit else f"{figures['temp_ratio']:.2f}",
        f"{figures['temp_per_allowed']:.2f}" if "temp_per_allowed" in figures else "",
        f"{figures['flops'] / 1e9:.2f} G" if is_unit else f"{figures['flops_ratio']:.3f}",
        f"{figures['compile_seconds']:.1f} s" if is_unit else f"{figures['compile_ratio']:.2f}",
        f"{figures['error']:.0e}" if "error" in figures else "",
    ]


# Figure


def draw(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    labels = [label(row) for row in rows if row["experiment"] == "zoo"]
    sweeps = sweeps_of(rows)
    heights = [1 + 0.52 * len(labels)] * bool(labels) + [3.2] * bool(sweeps)
    figure = Figure(figsize=(11, 1 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(max(1, len(heights)), 2, height_ratios=heights or None)
    if labels:
        times, memory = (figure.add_subplot(grid[0, column]) for column in range(2))
        draw_bars(times, rows, "ratio_quartiles", labels)
        draw_bars(memory, rows, "temp_ratio", [""] * len(labels))
        times.set_xlabel("Time, relative to the plain gradient (median, quartiles)")
        memory.set_xlabel("Temporary memory, relative to the plain gradient's")
        handles, names = times.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(STYLES), frameon=False)
    for column, (sweep, name) in enumerate([("n", "Samples"), ("length", "Sequence length")]):
        lines = {model: points for (own, model), points in sweeps.items() if own == sweep}
        if lines:
            axes = figure.add_subplot(grid[len(heights) - 1, column])
            draw_sweep(axes, lines, "samples" if sweep == "n" else "length")
            axes.set_xlabel(name)
    figure.suptitle(describe(machine), fontsize=10, x=0.01, ha="left")
    return figure


def draw_bars(axes: Axes, rows: list[dict[str, Any]], quantity: str, labels: list[str]) -> None:
    axes.set_xscale("log")
    for k, (mode, (colour, hatch)) in enumerate(STYLES.items()):
        figures = in_zoo(rows, mode)
        if not figures:
            continue
        heights = [index + 0.27 * (k - 1) for index, _ in figures]
        values = [of_mode[quantity] for _, of_mode in figures]
        low, middle, high = zip(*(as_quartiles(value) for value in values), strict=True)
        spread = [np.subtract(middle, low), np.subtract(high, middle)]
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        # From 1 on: to the left is cheaper than a plain gradient, to the right dearer.
        widths = np.subtract(middle, 1)
        axes.barh(heights, widths, 0.25, left=1, label=mode, linewidth=0, **style)
        if quantity == "ratio_quartiles":
            axes.errorbar(middle, heights, xerr=spread, fmt="none", ecolor="black", capsize=2)
        for height, value, end in zip(heights, middle, high, strict=True):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{value:.2f}", (max(end, 1), height), fontsize=7, **place)
    for k, mode in enumerate(STYLES):
        for index in set(range(len(labels))) - {index for index, _ in in_zoo(rows, mode)}:
            axes.annotate("– not run", (1.02, index + 0.27 * (k - 1)), fontsize=7, va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high * 1.3, 2))
    show_ticks(axes.xaxis, axes.get_xlim())
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def as_quartiles(value: Any) -> tuple[float, float, float]:
    return tuple(value) if isinstance(value, list) else (value, value, value)


def draw_sweep(axes: Axes, lines: dict[str, list[dict[str, Any]]], along: str) -> None:
    for model, points in lines.items():
        colour, marker = LINES[model]
        places = [row[along] for row in points]
        ratios = [row["modes"]["one_pass"]["ratio_quartiles"] for row in points]
        low, middle, high = zip(*ratios, strict=True)
        fixed = "" if along == "samples" else f", n = {points[0]['samples']}"
        axes.plot(places, middle, color=colour, marker=marker, label=model + fixed)
        axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.8, low), max(1.6, high))
    axes.set_ylabel("Time of one_pass,\nrelative to the plain gradient")
    axes.legend(frameon=False)
    tidy(axes)


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Writes the guide's table: what each mode costs against a plain gradient, by model.

    Args:
      rows: the rows of engine.json.
    """
    columns = ["model, samples"]
    columns += [f"`{mode}`: time | memory" for mode in ("one_pass", "two_pass", "vmap")]
    lines = [f"| {' | '.join(columns)} |", "|---" * 7 + "|"]
    for row in rows:
        if row["experiment"] == "zoo":
            modes = [_markdown(row["modes"][mode]) for mode in ("one_pass", "two_pass", "vmap")]
            lines.append(f"| {row['model']}, {row['samples']} | {' | '.join(modes)} |")
    return "\n".join(lines)


def _markdown(figures: dict[str, Any]) -> str:
    if "skipped" in figures:
        return "– | –"
    low, median, high = figures["ratio_quartiles"]
    return f"{median:.2f} ({low:.2f}–{high:.2f}) | {figures['temp_ratio']:.2f}"


def main(
    out: pathlib.Path = RESULTS,
    models: tuple[str, ...] | None = None,
    samples: dict[str, int] | None = None,
    sweep: tuple[Sweep, ...] = (),
    rounds: int | None = None,
    quick: bool = False,
    rerun: bool = False,
    markdown: bool = False,
) -> None:
    """Measures what clipping per sample costs, against a plain gradient.

    Args:
      out: folder for engine.json and engine.png.
      models: of the zoo; all by default, none after an empty --models.
      samples: batch sizes other than the usual ones, as in --samples alexnet 64 mlp 32.
      sweep: also the ratio over the number of samples, or over the length of the sequence.
      rounds: timed rounds; 9 by default.
      quick: two small models and few rounds, to check that the benchmark works.
      rerun: measure also what is in the file already.
      markdown: measure nothing, and print the guide's table from the file.
    """
    if markdown:
        print(to_markdown(json.loads((out / "engine.json").read_text())["rows"]))
        return
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    chosen = models if models is not None else QUICK_MODELS if quick else tuple(SAMPLES)
    size: Size = "small" if quick else "full"
    rounds = rounds or (3 if quick else 9)
    machine = describe_machine() | {
        "jaxlib": importlib.metadata.version("jaxlib"),
        "xla_platform": jax.devices()[0].client.platform_version,
    }
    settings = {"machine": machine, "rounds": rounds, "size": size}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "engine.json"
    rows = load(path, settings, rerun)
    console = Console()
    if not console.is_terminal:
        console.width = 126  # the table's
    for point in make_points(chosen, samples or {}, sweep, quick):
        if not rerun and any(is_of(row, point) for row in rows):
            continue
        console.print(f"Measuring {label(point._asdict())}", style="dim")
        rows = add_row(rows, measure(point, size, rounds))
        write(path, settings, rows)
    console.print(to_table(machine, rows))
    draw(machine, rows).savefig(out / "engine.png", dpi=160)


if __name__ == "__main__":
    tyro.cli(main)
