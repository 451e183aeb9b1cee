"""Run programs from the command line, in another process that may abort, and print a summary."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import multiprocessing
import pathlib
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

# The beginning of a message if XLA cannot run vmap(grad) either.
NO_REFERENCE = "no reference: "


class Outcome(NamedTuple):
    """The result of a program.

    Attributes:
      seed: which program.
      mixture: its dtypes.
      operations: how many.
      checks: how it was run.
      ok: whether all errors are within the tolerance.
      error: the largest relative error of a gradient's leaf, the norms and the loss; infinite for a
        result that is not finite or an exception.
      seconds: for drawing, reference and checks.
      routes: the number of parameters on each route.
      message: the failed check, and its error.
    """

    seed: int
    mixture: str
    operations: int
    checks: tuple[str, ...]
    ok: bool
    error: float
    seconds: float
    routes: dict[str, int]
    message: str = ""

    @property
    def has_reference(self) -> bool:
        return not self.message.startswith(NO_REFERENCE)


class Source(NamedTuple):
    """A source of programs; functions of a module, because another process imports them by name.

    Attributes:
      draw: the program of a seed.
      check: the outcome of a seed's program.
      run_reference: runs only the reference.
      show: prints a seed's program, and a smaller one if it fails.
    """

    draw: Callable[[int], Any]
    check: Callable[[int], Outcome]
    run_reference: Callable[[int], None]
    show: Callable[[int, Console], None]


def _line(outcome: Outcome) -> str:
    # JSON has no infinity.
    error = outcome.error if math.isfinite(outcome.error) else None
    return json.dumps({**outcome._asdict(), "error": error})


def _read_back(path: pathlib.Path) -> dict[int, Outcome]:
    """Read the results of an earlier run; remove an incomplete last line."""
    if not path.exists():
        return {}
    whole = path.read_text().rpartition("\n")[0]
    path.write_text(f"{whole}\n" if whole else "")
    outcomes = [Outcome(**json.loads(line)) for line in whole.splitlines()]
    return {o.seed: o._replace(error=math.inf if o.error is None else o.error) for o in outcomes}


def run_programs(source: Source, seeds: Sequence[int], path: pathlib.Path) -> list[Outcome]:
    outcomes = _read_back(path)
    with path.open("a") as file, Worker() as worker:
        for seed in (seed for seed in seeds if seed not in outcomes):
            outcomes[seed] = outcome_of(source, seed, worker)
            print(_line(outcomes[seed]), file=file, flush=True)
    return [outcomes[seed] for seed in seeds]


class Worker(contextlib.AbstractContextManager["Worker"]):
    """Runs programs in another process, because XLA aborts on some of them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._pool = self._new()

    def _new(self) -> futures.ProcessPoolExecutor:
        return futures.ProcessPoolExecutor(1, self._context)

    def __call__(self, function: Callable[[int], Any], seed: int) -> Any:
        try:
            return self._pool.submit(function, seed).result()
        except futures.BrokenExecutor:
            self._pool = self._new()
            raise

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()


def outcome_of(source: Source, seed: int, worker: Callable[..., Any]) -> Outcome:
    try:
        return worker(source.check, seed)
    except futures.BrokenExecutor:
        program = source.draw(seed)
    try:
        worker(source.run_reference, seed)
    except futures.BrokenExecutor:
        message = f"{NO_REFERENCE}XLA aborts"
    else:
        message = "XLA aborts"
    size = len(program.operations)
    return Outcome(seed, program.mixture, size, (), False, math.inf, 0.0, {}, message)


def _print_tally(outcomes: Sequence[Outcome], console: Console) -> None:
    by_mixture: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_mixture.setdefault(outcome.mixture, []).append(outcome)
    columns = ("dtypes", "programs", "no reference", "operations", "failures", "largest error")
    table = Table(*columns, "seconds each")
    for name, drawn in [*by_mixture.items(), ("all", outcomes)]:
        own = [outcome for outcome in drawn if outcome.has_reference]
        if own:
            table.add_row(
                name,
                str(len(own)),
                str(len(drawn) - len(own)),
                str(sum(o.operations for o in own)),
                str(sum(not o.ok for o in own)),
                f"{max(o.error for o in own):.1e}",
                f"{sum(o.seconds for o in own) / len(own):.2f}",
            )
    console.print(table)
    routes = sum((collections.Counter(o.routes) for o in outcomes), collections.Counter())
    _print_counts("route", "parameters", routes, console)
    kinds = collections.Counter(kind_of(outcome) for outcome in outcomes if not outcome.ok)
    _print_counts("kind of failure", "programs", kinds, console)
    for outcome in outcomes:
        if not outcome.ok and outcome.has_reference:
            console.print(f"seed {outcome.seed}: {outcome.message}", markup=False, soft_wrap=True)


def _print_counts(what: str, of: str, counts: collections.Counter, console: Console) -> None:
    table = Table(what, of)
    for name, number in counts.most_common():
        table.add_row(name, str(number))
    console.print(table)


def kind_of(outcome: Outcome) -> str:
    """Return a failure's message without its numbers."""
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", outcome.message.partition("\n")[0])[:100]


def main_of(source: Source) -> Callable[..., None]:
    def main(
        count: int = 100,
        start: int = 0,
        out: pathlib.Path = pathlib.Path("random_programs.jsonl"),
        show: int | None = None,
    ) -> None:
        """Run random programs and print a summary, or show one program.

        Args:
          count: the number of programs.
          start: the first seed.
          out: file with a line for each program; programs in it are not run again.
          show: a seed, to print its program, and a smaller one if it fails.
        """
        console = Console()
        if show is not None:
            return source.show(show, console)
        return _print_tally(run_programs(source, range(start, start + count), out), console)

    return main


def shower(
    draw: Callable[[int], Any],
    check: Callable[[Any], Outcome],
    reduced: Callable[[Any, Callable[[Any], bool]], Any],
) -> Callable[[int, Console], None]:
    """Return a function that prints a seed's program, and a smaller one if it fails."""

    def show(seed: int, console: Console) -> None:
        program = draw(seed)
        outcome = check(program)
        console.print(f"{program}\n{outcome}", markup=False, highlight=False, soft_wrap=True)
        if not outcome.ok:
            smaller = reduced(program, lambda smaller: not check(smaller).ok)
            both = f"\nSmaller: {smaller}\n{check(smaller)}"
            console.print(both, markup=False, highlight=False, soft_wrap=True)

    return show
