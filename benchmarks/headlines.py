"""Summarises the results: README's table, and the lines on top of the page of results."""

from __future__ import annotations

import collections
import json
from typing import Any

from benchmarks.cifar100.alexnet_report import FAILED
from benchmarks.common.publishing import RESULTS, markdown_table
from benchmarks.common.statistics import describe_difference, describe_mean

GROWING, CONSTANT = "per-sample, growing", "per-sample, constant"
HEAVY = "heavy pixels"


def read(name: str) -> dict[str, Any]:
    """Reads the result of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def against_best_baseline(result: dict[str, Any]) -> str:
    """Writes README's table: the growing threshold and the best baseline.

    Args:
      result: the content of alexnet_cifar100.json.
    """
    rows = [["training data", "best baseline", GROWING, "difference"]]
    for noise, found in result["noises"].items():
        best, methods = found["best_baseline"], found["methods"]
        baseline, ours = (describe_mean(methods[m]["test_accuracies"]) for m in (best, GROWING))
        difference = describe_difference(methods[GROWING]["difference"])
        rows.append([noise, f"{baseline} ({best})", ours, difference])
    return markdown_table(rows)


def failures(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Counts trials that ended no better than chance, and all trials, of each method.

    Args:
      result: the content of alexnet_cifar100.json.
    """
    counts: dict[str, list[bool]] = collections.defaultdict(list)
    for found in result["noises"].values():
        for name, own in found["methods"].items():
            counts[name] += [t["validation_accuracy"] < FAILED for t in own["trials"]]
    return {name: (sum(failed), len(failed)) for name, failed in counts.items()}


def describe_failures(result: dict[str, Any], *names: str) -> str:
    """Writes "failed of all" for several methods together."""
    failed, total = map(sum, zip(*(failures(result)[name] for name in names), strict=True))
    return f"{failed} of {total}"


def dearest_model() -> str:
    """Names the model on which one pass is slowest relative to a plain gradient."""
    times = {
        row["model"]: row["modes"]["one_pass"]["ratio_quartiles"][1]
        for row in read("engine")["rows"]
        if row["experiment"] == "zoo"
    }
    dearest = max(times, key=lambda model: times[model])
    ratio = f"{times[dearest]:.2f} times as long as a plain gradient"
    return f"{ratio} ({len(times)} models; {dearest})"


def five_lines() -> str:
    """Writes the findings, one item for each question."""
    cifar, models = read("alexnet_cifar100"), read("third_party")["summary"]
    gains = {
        (noise, name): describe_difference(found["methods"][name]["difference"])
        for noise, found in cifar["noises"].items()
        for name in (GROWING, CONSTANT)
    }
    light = ", ".join(
        f"{noise} {gains[noise, GROWING]}" for noise in cifar["noises"] if noise != HEAVY
    )
    given, batch, unclipped = (
        describe_failures(cifar, *names)
        for names in ((GROWING, CONSTANT), ("batch clipping",), ("SGD", "momentum"))
    )
    best = cifar["noises"][HEAVY]["best_baseline"]
    agreeing = f"{models['outcomes']['ok']} of {models['models']} models"
    return f"""\
- **Theory**: on noise with known heavy tails the clipped mean's error stays within the guarantee,
  and PS-Clip-SGD beats tuned SGD, global clipping and normalised SGD. So does a constant threshold.
- **Heavy tails**, CIFAR-100 with heavy pixels: methods that do not clip do not train. Relative to
  the best baseline, {best}, a constant threshold gains {gains[HEAVY, CONSTANT]} points,
  a growing one {gains[HEAVY, GROWING]}.
- **Light tails**, the growing threshold relative to the best baseline: {light}.
- **Learning rates**: {given} trials with a constant or growing per-sample threshold ended no
  better than chance, {batch} with batch clipping, {unclipped} with SGD and momentum SGD.
- **Engine**: {agreeing} of {models["libraries"]} other libraries agree with `vmap(grad)`.
  On two CPU cores one pass takes at most {dearest_model()}.
"""
