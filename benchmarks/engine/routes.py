"""How much do losses cost that used to need stacked gradients?

    python -m benchmarks.engine.routes

Each loss uses a parameter in a way that needs a special route, or another form of the loss.
"one_pass", "two_pass" and "vmap" are compiled and timed in interleaved calls, and compared with
`value_and_grad` of the mean loss.
"""

from __future__ import annotations

import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from matplotlib.figure import Figure
from rich.table import Table

import psclip_optax as psc
from benchmarks.common.machine import describe, describe_machine
from benchmarks.common.publishing import RESULTS, publish
from benchmarks.common.style import tidy
from benchmarks.common.timing import Case, quartiles, time_interleaved

MODES = ("one_pass", "two_pass", "vmap")
LABELS = {"one_pass": "one pass", "two_pass": "two passes", "vmap": "vmap"}


class Size(NamedTuple):
    """Layers, width, positions of a sample, samples and experts."""

    layers: int = 6
    width: int = 128
    positions: int = 16
    samples: int = 32
    experts: int = 8


SMALL = Size(2, 8, 4, 4, 2)


def block(w: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ w)


def normed(w: Any) -> Any:
    return w / jnp.linalg.norm(w, axis=0)


@jax.custom_vjp
def layer_of_its_own(x: Any, w: Any) -> Any:
    return x @ w


layer_of_its_own.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g)
)


def straight_through(w: Any) -> Any:
    scale = jnp.max(jnp.abs(w), axis=0) / 127
    return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)


def spectral(w: Any) -> Any:
    return w / jnp.linalg.norm(w @ jnp.ones(w.shape[1]))


def scanned(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda w, x: lax.scan(lambda x, own: (block(make(own), x), None), x, w)[0]


def by_index(w: Any, x: Any) -> Any:
    return lax.scan(lambda x, i: (block(w[i], x), None), x, jnp.arange(len(w)))[0]


def by_counter(w: Any, x: Any) -> Any:
    return lax.fori_loop(0, len(w), lambda i, x: block(w[i], x), x)


def chosen_by_data(w: Any, x: Any) -> Any:
    def step(x: Any, own: Any) -> tuple[Any, None]:
        return lax.cond(x[0, 0] > 0, block, lambda _, x: x, own, x), None

    return lax.scan(step, x, w)[0]


def normed_slices(w: Any, x: Any) -> Any:
    for i in range(len(w)):
        x = block(normed(w[i]), x)
    return x


def custom(w: Any, x: Any) -> Any:
    return lax.scan(lambda x, own: (x + jnp.tanh(layer_of_its_own(x, own)), None), x, w)[0]


def experts(w: Any, x: Any) -> Any:
    chosen = jnp.argmax(x[:, : len(w)], axis=-1)
    order = jnp.argsort(chosen)
    y = lax.ragged_dot(x[order], w, jnp.bincount(chosen, length=len(w)))
    return x.at[order].add(y)


def position_table(table: Any, x: Any) -> Any:
    return jnp.tanh(x + table[: len(x)])


# The net of each loss, and the shape of its one parameter.
NETS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Size], tuple[int, ...]]]] = {
    "layers by index": (by_index, lambda s: (s.layers, s.width, s.width)),
    "layers by counter": (by_counter, lambda s: (s.layers, s.width, s.width)),
    "layers chosen by data": (chosen_by_data, lambda s: (s.layers, s.width, s.width)),
    "weight norm in a scan": (scanned(normed), lambda s: (s.layers, s.width, s.width)),
    "int8 in a scan": (scanned(straight_through), lambda s: (s.layers, s.width, s.width)),
    "spectral norm in a scan": (scanned(spectral), lambda s: (s.layers, s.width, s.width)),
    "weight norm of slices": (normed_slices, lambda s: (s.layers, s.width, s.width)),
    "softmax over a weight": (
        lambda w, x: x @ jax.nn.softmax(w, 0),
        lambda s: (s.width, 4 * s.width),
    ),
    "custom_vjp": (custom, lambda s: (s.layers, s.width, s.width)),
    "experts": (experts, lambda s: (s.experts, s.width, s.width)),
    "position table": (position_table, lambda s: (64 * s.positions, s.width)),
}


def measure(name: str, size: Size, rounds: int) -> dict[str, Any]:
    """Compiles and times all modes of one loss and a plain gradient."""
    net, shape = NETS[name]
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], shape(size)) / size.width**0.5
    x = jax.random.normal(keys[1], (size.samples, size.positions, size.width))

    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(jnp.square(net(w, x)))

    def mean_loss(w: Any, x: Any) -> Any:
        of_one = functools.partial(loss, w)
        # JAX cannot batch ragged_dot: one sample after the other.
        return jnp.mean(lax.map(of_one, x) if name == "experts" else jax.vmap(of_one)(x))

    compiled_from = {"plain": jax.value_and_grad(mean_loss)}
    compiled_from |= {m: psc.clipped_value_and_grad(loss, 1.0, mode=m) for m in MODES}
    programs, found = {}, {}
    for mode, function in compiled_from.items():
        try:
            programs[mode] = jax.jit(function).lower(w, x).compile()
        except NotImplementedError:  # JAX cannot batch the operation
            continue
        found[mode] = {"bytes": programs[mode].memory_analysis().temp_size_in_bytes}
    seconds = time_interleaved({m: Case(p, (w, x)) for m, p in programs.items()}, rounds)
    plain = seconds["plain"]
    for mode, own in seconds.items():
        found[mode]["seconds"] = statistics.median(own)
        found[mode]["ratio"] = quartiles([a / b for a, b in zip(own, plain, strict=True)])
    plan = psc.clipped_value_and_grad(loss, 1.0, mode="one_pass").explain(w, x)
    return {
        "loss": name,
        "route": plan.rows[0].route,
        "modes": found,
        "stack": x.shape[0] * w.nbytes,
    }


def to_table(result: dict[str, Any]) -> Table:
    machine = describe(result["machine"])
    table = Table(title=f"Memory in MB and time to a plain gradient's, {machine}")
    table.add_column("loss")
    table.add_column("route")
    table.add_column("one stack")
    table.add_column("plain")
    for mode in MODES:
        table.add_column(LABELS[mode])
    for row in result["rows"]:
        found = row["modes"]
        cells = [_megabytes(row["stack"]), _megabytes(found["plain"]["bytes"])]
        cells += [_cell(found[mode]) if mode in found else "fails in JAX" for mode in MODES]
        table.add_row(row["loss"], row["route"], *cells)
    return table


def _megabytes(number: float) -> str:
    return f"{number / 1e6:.1f}"


def _cell(found: dict[str, Any]) -> str:
    low, median, high = found["ratio"]
    return f"{_megabytes(found['bytes'])}, {median:.2f} ({low:.2f} to {high:.2f})"


def draw(result: dict[str, Any]) -> Figure:
    """Draws the memory of each mode relative to that of a plain gradient."""
    rows = result["rows"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, mode in enumerate(("plain", *MODES)):
        shown = [
            (at, row["modes"][mode]["bytes"]) for at, row in enumerate(rows) if mode in row["modes"]
        ]
        places = [at + 0.2 * (i - 1.5) for at, _ in shown]
        axes.bar(places, [max(b, 1) / 1e6 for _, b in shown], 0.2, label=LABELS.get(mode, mode))
    axes.set_yscale("log")
    axes.set_ylabel("temporary memory, MB")
    axes.set_xticks(range(len(rows)), [row["loss"] for row in rows], rotation=30, ha="right")
    axes.legend(ncols=4)
    tidy(axes)
    figure.suptitle(describe(result["machine"]))
    return figure


def main(
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = RESULTS,
    rounds: int = 15,
    quick: bool = False,
) -> None:
    """Measures the losses that need a special route, or another form.

    Args:
      out: where routes.json and routes.png are written.
      rounds: the number of interleaved calls that are timed.
      quick: tiny losses, to check that the benchmark works.
    """
    size = SMALL if quick else Size()
    rows = [measure(name, size, rounds) for name in NETS]
    result = {"machine": describe_machine(), "size": size._asdict(), "rounds": rounds, "rows": rows}
    publish(out, "routes", result, [to_table(result)], draw(result), 160)


if __name__ == "__main__":
    tyro.cli(main)
