"""How much does per-sample clipping cost on this GPU, and what does it gain at full width?

    python -m benchmarks.engine.on_gpu                                           # 8 minutes
    python -m benchmarks.engine.on_gpu --what training --data-dir FOLDER         # 5 minutes
    python -m benchmarks.engine.on_gpu --report

Writes benchmarks/results/on_gpu_CARD.json and, for training, on_gpu_CARD.runs.jsonl. Each result is
written at once and not measured again: repeat the command to resume.
"""

from __future__ import annotations

import pathlib
import time
from typing import Literal

import tyro

from benchmarks.cifar100 import on_gpu_training
from benchmarks.common.publishing import RESULTS
from benchmarks.engine import on_gpu_engine
from benchmarks.engine.on_gpu_results import described, read_rows, results_of_this_card, say

MINUTES = {"engine": 8, "training": 5}


def to_markdown(out: pathlib.Path) -> str:
    """Writes the tables of every card's results in a folder."""
    parts = []
    for path in sorted(out.glob("on_gpu_*.json")):
        rows = read_rows(path)
        machines = dict.fromkeys(described(row["machine"]) for row in rows)
        parts += [f"{'; '.join(machines)}\n", on_gpu_engine.to_markdown(rows)]
        parts.append(on_gpu_training.to_markdown(rows, path.with_suffix(".runs.jsonl")))
    return "\n".join(filter(None, parts))


def main(
    what: Literal["engine", "training"] = "engine",
    out: pathlib.Path = RESULTS,
    minutes: float | None = None,
    rounds: int = 12,
    models: tuple[str, ...] = (),
    stacked: tuple[str, ...] = (),
    data_dir: pathlib.Path | None = None,
    epochs: tuple[int, ...] = on_gpu_training.EPOCHS,
    seeds: int = on_gpu_training.SEEDS,
    together: int = on_gpu_training.TOGETHER,
    tiny: bool = False,
    report: bool = False,
) -> None:
    """Measures the cost of per-sample clipping on this GPU, and its gain at full width.

    Args:
      what: times and errors of the engine, or training runs of AlexNet on CIFAR-100.
      out: folder for the results.
      minutes: start nothing after this time; 8 for the engine and 5 for training by default.
      rounds: timed rounds.
      models: the models for the engine; all by default.
      stacked: models whose stacked gradients are timed too, although they take long to compile.
      data_dir: folder with parts of CIFAR-100, *train*.npz and *test*.npz, each with `images`
        [N, 32, 32, 3] of uint8 and `fine_labels`; for training.
      epochs: lengths of training, each tuned separately.
      seeds: the number of seeds of each tuned method, a multiple of 5.
      together: the number of runs trained at once, a multiple of the number of methods.
      tiny: small models and random data, to check that the script works.
      report: measure nothing; print the tables of the results in the folder.
    """
    if report:
        print(to_markdown(out))
        return
    end = time.perf_counter() + 60 * (minutes or MINUTES[what])
    results = results_of_this_card(out)
    say(described(results.machine))
    if results.machine["platform"] == "cpu" and not tiny:
        raise SystemExit("JAX finds no GPU here, and a CPU would take hours; --tiny takes minutes")
    if what == "engine":
        size = "tiny" if tiny else "full"
        jobs = on_gpu_engine.jobs_of(models, stacked)
        on_gpu_engine.measure_all(results, jobs, size, rounds, end)
    else:
        plan = on_gpu_training.Plan(data_dir, epochs, seeds, together, tiny, end)
        on_gpu_training.train_all(results, plan)
    print(to_markdown(out))


if __name__ == "__main__":
    tyro.cli(main)
