"""How much does the engine cost on accelerators? XLA compiles for them without the hardware.

    pip install -e '.[train,accelerators]'
    python -m benchmarks.engine.accelerators

Every mode is compiled and compared with `value_and_grad` of a mean loss that is written for a
batch. For a TPU, cycles are the compiler's estimates, with each step of a loop counted. For a GPU,
the benchmark counts kernels, the bytes that they read and write, and waits for the host. The
numbers rank programs; they do not replace measurements on hardware. Programs in the result are not
compiled again.
"""

from __future__ import annotations

import collections
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, cast

import jax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

import psclip_optax as psc
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table, publish
from benchmarks.common.style import tidy
from benchmarks.engine import real_models, targets
from benchmarks.engine.accumulation import mean_loss
from benchmarks.engine.real_models import by_layer
from benchmarks.engine.targets import TARGETS
from benchmarks.zoo.models import ZOO
from psclip_optax.options import Mode

MODES = ("one_pass", "two_pass", "by_layer", "vmap")
COLORS = {
    "one_pass": "#0072B2",
    "two_pass": "#E69F00",
    "by_layer": "#009E73",
    "vmap": "#999999",
}
# A program that fits into a chip's vector memory has no temporary memory, and so no ratio.
LEAST_BYTES = 2**22
# The number of samples in a batch of the zoo.
ZOO_SAMPLES = {"mlp": 512, "alexnet": 128, "lstm": 64, "recommender": 512}
# The columns of the guide: only "h100" has kernels and bytes.
_IN_THE_GUIDE = (
    ("v5e", "one_pass", ("cycles", "memory")),
    ("v5e", "two_pass", ("cycles", "memory")),
    ("v5e", "by_layer", ("cycles", "memory")),
    ("h100", "one_pass", ("kernels", "bytes", "memory")),
)
NOTE = (
    "Ratios to value_and_grad of the mean loss of the batch. TPUs: cycles by the compiler's own "
    "estimates. H100: kernels launched, bytes that they move, waits for the host. Memory: peak of "
    "temporary memory. Compile: tracing included, one compilation each."
)


class Job(NamedTuple):
    """A loss with the shapes of its arguments.

    Attributes:
      name: the name in tables.
      group: "real" or "zoo".
      loss: the loss for one example.
      batch_loss: the mean over a batch.
      arguments: shapes of (params, *batch).
    """

    name: str
    group: str
    loss: Callable[..., Any]
    batch_loss: Callable[..., Any]
    arguments: tuple[Any, ...]


def _real(build: Callable[..., real_models.Model], **options: Any) -> Callable[[bool], Job]:
    def job(quick: bool) -> Job:
        model = build("tiny" if quick else "full", **options)
        return Job(model.name, "real", model.loss, model.batch_loss, model.abstract())

    return job


def _of_zoo(name: str) -> Callable[[bool], Job]:
    def job(quick: bool) -> Job:
        model = ZOO[name]("small" if quick else "full")
        n = 4 if quick else ZOO_SAMPLES.get(name, 32)
        arguments = jax.eval_shape(lambda: (model.params, *model.batch(n)))
        return Job(f"{name}, n {n}", "zoo", model.loss, mean_loss(model.loss), arguments)

    return job


JOBS: dict[str, Callable[[bool], Job]] = {
    "alexnet": _real(real_models.alexnet),
    "vit_b16": _real(real_models.vit_b16),
    "resnet50": _real(real_models.resnet50),
    "bert_base": _real(real_models.bert_base),
    "gpt2": _real(real_models.gpt2),
    "gpt2_scanned": _real(real_models.gpt2, scanned=True),
    "llama_1b": _real(real_models.llama_1b),
    **{f"zoo_{name}": _of_zoo(name) for name in ZOO},
}


def measure(target: str, job: Job, mode: str) -> dict[str, Any]:
    """Compiles one mode, or "plain"; `fits` is False if the device's memory is too small."""
    try:
        cost = targets.cost_of(target, _function(job, mode), job.arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False}
    return {"fits": True, **cost._asdict()}


def _function(job: Job, mode: str) -> Callable[..., Any]:
    if mode == "plain":
        return jax.value_and_grad(job.batch_loss)
    if mode == "by_layer":
        return psc.clipped_value_and_grad(job.loss, by_layer(job.arguments[0], 1.0))
    return psc.clipped_value_and_grad(job.loss, 1.0, mode=cast("Mode", mode))


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {(row["target"], row["job"]): row for row in rows if row["mode"] == "plain"}

    def ratios(row: dict[str, Any]) -> dict[str, float]:
        base = plain[row["target"], row["job"]]
        if not (row["fits"] and base["fits"]):
            return {}
        memory = (max(one["temp_bytes"], LEAST_BYTES) for one in (row, base))
        of_target = ("cycles",) if row["cycles"] else ("kernels", "bytes")
        numbers = {name: row[name] / base[name] for name in (*of_target, "compile_seconds")}
        return numbers | {"memory": next(memory) / next(memory), "waits": row["waits"]}

    # While some programs are recompiled, the plain gradient of others may be missing.
    compared = [row for row in rows if (row["target"], row["job"]) in plain]
    return [row | {"ratios": ratios(row)} for row in compared if row["mode"] != "plain"]


def geometric_means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages the ratios of the zoo, by target and mode."""
    found: dict[tuple[str, str], list[dict[str, float]]] = collections.defaultdict(list)
    for row in rows:
        if row["group"] == "zoo" and row["ratios"]:
            found[row["target"], row["mode"]].append(row["ratios"])
    return [
        {
            "target": target,
            "job": f"zoo, {len(ratios)} models",
            "name": f"zoo, geometric mean of {len(ratios)}",
            "mode": mode,
            "fits": True,
            "ratios": {
                name: statistics.geometric_mean([one[name] for one in ratios])
                for name in ratios[0]
                if name != "waits"
            }
            | {"waits": max(one["waits"] for one in ratios)},
        }
        for (target, mode), ratios in found.items()
    ]


def to_table(result: dict[str, Any]) -> Table:
    table = Table(title=describe(result["machine"]), caption=NOTE, caption_justify="left")
    for name in ("target", "model", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("cycles", "kernels", "bytes", "waits", "memory", "compile"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(result):
        cells = [row["target"], row["name"], row["mode"]]
        if not row["ratios"]:
            table.add_row(*cells, "does not fit")
            continue
        named = ("cycles", "kernels", "bytes", "waits", "memory", "compile_seconds")
        table.add_row(*cells, *(_cell(row["ratios"].get(name)) for name in named))
    return table


def to_markdown(result: dict[str, Any]) -> str:
    """Writes the guide's table: the cost of each mode relative to a plain gradient, by model."""
    shown = [(t, mode, figure) for t, mode, figures in _IN_THE_GUIDE for figure in figures]
    columns = {(target, mode) for target, mode, _ in shown}
    found = {
        (row["name"], row["target"], row["mode"]): row
        for row in _rows(result)
        if (row["target"], row["mode"]) in columns
    }
    names = dict.fromkeys(name for name, *_ in found)
    heads = [
        f"{target}, `{mode}`: {' | '.join(figures)}" for target, mode, figures in _IN_THE_GUIDE
    ]
    cells = [
        [
            name,
            *(_figure(found.get((name, target, mode)), figure) for target, mode, figure in shown),
        ]
        for name in names
    ]
    header, _, *body = markdown_table([["model, samples", *heads], *cells]).splitlines()
    return "\n".join([header, "|---" * (1 + len(shown)) + "|", *body])


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [*result["ratios"], *result["means"]]


def _figure(row: dict[str, Any] | None, figure: str) -> str:
    if row is None or figure not in row["ratios"]:
        return "–" if row is None or row["fits"] else "does not fit"
    return _cell(row["ratios"][figure])


def _cell(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}" if isinstance(number, float) else str(number)


def draw(result: dict[str, Any]) -> Figure:
    """Draws the cycles, or the bytes of a GPU, of each model and mode."""
    rows = [row for row in result["ratios"] if row["ratios"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    shown = [target for target in TARGETS if any(row["target"] == target for row in rows)]
    figure = Figure(figsize=(5 + 0.35 * len(names), 3.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, target in zip(panels, shown, strict=True):
        for i, mode in enumerate(MODES):
            own = [row for row in rows if (row["target"], row["mode"]) == (target, mode)]
            ratios = [row["ratios"].get("cycles") or row["ratios"]["bytes"] for row in own]
            places = [names.index(row["name"]) + 0.2 * (i - 1.5) for row in own]
            axes.bar(places, ratios, 0.2, label=mode, color=COLORS[mode])
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_ylabel(f"{target}: {'bytes' if target == 'h100' else 'cycles'}\nto plain")
        axes.set_yscale("log")  # stacks may take a hundred times as much
        tidy(axes)
    panels[-1].set_xticks(range(len(names)), names, rotation=40, ha="right")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(MODES), frameon=False)
    return figure


def main(
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = RESULTS,
    target: Sequence[str] = TARGETS,
    model: Sequence[str] = tuple(JOBS),
    mode: Sequence[str] = MODES,
    rerun: bool = False,
    quick: bool = False,
) -> None:
    """Compiles the models for accelerators, and reports what the engine costs there.

    Args:
      out: folder for accelerators.json and accelerators.png.
      target: which of v5e, v6e and h100 to compile for.
      model: the models to compile.
      mode: the modes to compile, in addition to the plain gradient.
      rerun: whether to compile programs again that are in the result.
      quick: small models, to check that the benchmark works.
    """
    jax.config.update("jax_platforms", "cpu")
    path = out / "accelerators.json"
    wanted = [(t, j, m) for t in target for j in model for m in ("plain", *mode)]

    def row(point: tuple[str, str, str]) -> dict[str, Any]:
        job = JOBS[point[1]](quick)
        keys = {"target": point[0], "job": point[1], "mode": point[2]}
        return keys | {"name": job.name, "group": job.group} | measure(point[0], job, point[2])

    result = targets.compile_missing(
        path, wanted, lambda row: (row["target"], row["job"], row["mode"]), row, summary, rerun
    )
    publish(out, "accelerators", result, [to_table(result)], draw(result), width=110)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(
        rows, key=lambda row: (TARGETS.index(row["target"]), [*JOBS].index(row["job"]))
    )
    ratios = with_ratios(ordered)
    return {
        "machine": describe_machine(),
        "note": NOTE,
        "rows": ordered,
        "ratios": ratios,
        "means": geometric_means(ratios),
    }


if __name__ == "__main__":
    tyro.cli(main)
