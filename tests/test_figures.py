"""Numbers on README.md, the guide's pages and the page of results are the measured ones."""

from __future__ import annotations

import json
import pathlib
import statistics

import numpy as np
import pytest

from benchmarks import headlines, summary
from benchmarks.cifar100 import accumulation_cifar100, alexnet_cifar100, find_bad_data
from benchmarks.common.cache import RunsCache
from benchmarks.common.statistics import describe_difference, paired_difference
from benchmarks.engine import accelerators, cost, scaling, sharded
from benchmarks.peers import report
from benchmarks.thresholds import auto_report, auto_rules, by_layer_report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs" / "pages" / "guide").glob("*.md"))
}
# Without line breaks, to search for sentences.
WHEN, SHORT = (" ".join(page.split()) for page in (GUIDE["when"], README))
ON_BOTH_PAGES = pytest.mark.parametrize("said", [WHEN, SHORT], ids=["guide", "README"])
CIFAR = json.loads((ROOT / "benchmarks/results/alexnet_cifar100.json").read_text())


def test_costs_of_accumulation_are_those_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/accumulation.json").read_text())["rows"]
    ours = [row for row in rows if "accumulate_clipped" in row["case"]]
    said = " ".join(GUIDE["accumulation"].split())
    for row in (row for row in ours if row["part"] == "train step"):
        low, middle, high = row["ratio_quartiles"]
        assert f"{middle:.2f} ({low:.2f}–{high:.2f})" in said
        assert f"with {row['samples']}" in said
    (update,) = (row for row in ours if row["part"] == "update")
    assert f"move {update['bytes_ratio']:.2f} times the bytes" in said


def test_intervals_of_the_tail_index_are_those_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/tail_index.json").read_text())["rows"]
    said = " ".join(GUIDE["thresholds"].split())
    # Without mixtures, which have their own sentence.
    rows = [row for row in rows if "30%" not in row["law"] and "5%" not in row["law"]]
    coverages = [100 * row["coverage"][1] for row in rows if row["index"]]
    assert f"{min(coverages):.1f} % to {max(coverages):.1f} % of the 95 % intervals" in said
    widths = {row["norms"]: row["width"] for row in rows if row["law"] == "Student-t 1.5"}
    spans = f"spans {widths[2_000]:.2f} of the index with 2,000 of them and {widths[10_000]:.2f}"
    assert spans in said
    for size, words in (
        (10_000, "{0:.0f} % to {1:.0f} % of their samples are called light, and at most {2:.0f} %"),
        (2_000, "with 2,000 it is {0:.0f} % to {1:.0f} %, and {2:.0f} %"),
    ):
        shares = {True: [], False: []}
        for row in (row for row in rows if row["norms"] == size):
            shares[row["index"] is None].append(100 * row["shares"]["light"][1])
        assert words.format(min(shares[True]), max(shares[True]), max(shares[False])) in said
    assert all(row["clipped_of_512"] < 1 for row in rows)


def test_page_of_results_is_that_of_the_committed_measurements():
    page = (ROOT / "benchmarks/results/README.md").read_text(encoding="utf-8")
    assert page == summary.page()


def test_automatic_threshold_does_as_the_guide_says():
    result = json.loads((ROOT / "benchmarks/results/auto_threshold.json").read_text())
    said = " ".join(GUIDE["thresholds"].split())
    assert auto_report.rules_to_markdown(result).strip() in GUIDE["thresholds"]
    rows = result["rows"]
    held_out = [row for row in rows if row["cell"]["is_held_out"]]
    assert f"chosen on {len(rows) - len(held_out)} conditions, {len(held_out)} others" in said
    chosen_on = [row for row in rows if not row["cell"]["is_held_out"]]
    rules = {name for name in rows[0]["tuned"] if name not in auto_rules.TUNED}
    never = {name for name in rules if not any(sum(row["failures"][name]) for row in chosen_on)}
    assert never == {auto_rules.AUTO}  # "the only rule that never fails there"
    missed = [row["label"] for row in rows if auto_report.verdict(row) == "missed"]
    assert f"whole interval is below the aim: {'; '.join(missed)}." in said
    failures = np.array([row["failures"][auto_rules.AUTO] for row in held_out])
    by_momentum = failures[[row["cell"]["optimizer"] == "momentum" for row in held_out]]
    said_number = f"{failures.sum()} trials fail, of the text and the policy, {by_momentum.sum()}"
    assert said_number in said
    assert not np.any(by_momentum[:, 3:])  # "at lower learning rates"


@pytest.mark.parametrize("kind", ["symmetric", "one-sided", "Gaussian"])
def test_automatic_threshold_in_theory_is_that_of_the_committed_measurement(kind: str):
    result = json.loads((ROOT / "benchmarks/results/automatic_theory.json").read_text())
    ratios = [
        row["ratio"]
        for row in result["ratios"]
        if kind in row["noise"] and (row["other"], row["statistic"]) == ("PS-Clip-SGD", "mean")
    ]
    said = " ".join(GUIDE["thresholds"].split())
    assert f"{min(ratios):.2f} to {max(ratios):.2f} under {kind} noise" in said


def test_thresholds_by_layer_are_those_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/by_layer.json").read_text())["rows"]
    (text,) = (row for row in rows if row["task"] == "GPT")
    difference = describe_difference(text["differences"][by_layer_report.LAYER])
    assert f"With constant thresholds the GPT is *below* by {difference} points" in WHEN
    others = [
        difference
        for row in rows
        for name, difference in row["differences"].items()
        if row is not text or name == by_layer_report.LAYER_AUTO
    ]
    assert len(others) >= 5
    assert all(low < 0 < high for low, high in (own["interval"] for own in others))


@ON_BOTH_PAGES
def test_heavy_pixels_are_those_of_the_committed_measurement(said: str):
    heavy = CIFAR["noises"]["heavy pixels"]
    difference = heavy["methods"]["per-sample, constant"]["difference"]
    assert heavy["best_baseline"] == "batch clipping"
    assert f"above batch clipping by {describe_difference(difference)} points" in said
    low, high = heavy["methods"]["per-sample, growing"]["difference"]["interval"]
    assert low < 0 < high
    assert "the growing one's interval includes 0" in said
    for name in ("SGD", "momentum"):
        trials = heavy["methods"][name]["trials"]
        assert all(t["validation_accuracy"] < alexnet_cifar100.FAILED for t in trials)
    for name in ("batch clipping", "per-sample, constant", "per-sample, growing"):
        assert min(heavy["methods"][name]["test_accuracies"]) > 0.4


@ON_BOTH_PAGES
def test_failed_trials_are_those_of_the_committed_measurement(said: str):
    given, batch, unclipped = (
        tuple(map(sum, zip(*(headlines.failures(CIFAR)[name] for name in names), strict=True)))
        for names in (
            ("per-sample, constant", "per-sample, growing"),
            ("batch clipping",),
            ("SGD", "momentum"),
        )
    )
    failed = (
        f"{given[0]} of {given[1]} trials ended no better than chance, "
        f"with batch clipping {batch[0]} of {batch[1]}, "
        f"with SGD and momentum SGD {unclipped[0]} of {unclipped[1]}"
    )
    assert failed in said


@ON_BOTH_PAGES
def test_steps_on_a_gpu_take_what_was_measured(said: str):
    ways = CIFAR["steps"]["ways"]
    engine, stacked = (ways[way]["ratio_quartiles"][1] for way in ("engine", "vmap"))
    assert f"takes {engine:.2f} times as long as a plain one" in said
    assert f"stacks gradients {stacked:.2f} times" in said


def test_light_tails_gain_what_the_committed_measurement_says():
    clean = CIFAR["noises"]["clean"]
    assert clean["best_baseline"] == "batch clipping"
    growing, constant = (
        clean["methods"][f"per-sample, {kind}"]["difference"] for kind in ("growing", "constant")
    )
    assert growing["interval"][0] < 0 < growing["interval"][1]
    assert constant["interval"][1] < 0  # "a constant one loses"
    words = f"the constant one *below* batch clipping by {describe_difference(constant)}"
    assert words in WHEN
    wrong = CIFAR["noises"]["40% labels"]["methods"]
    for kind in ("growing", "constant"):
        own = wrong[f"per-sample, {kind}"]["test_accuracies"]
        against = {
            name: paired_difference(own, wrong[name]["test_accuracies"])["interval"]
            for name in alexnet_cifar100.BASELINES
        }
        assert against["SGD"][0] < 0 < against["SGD"][1]  # level with it
        assert min(against["momentum"][0], against["batch clipping"][0]) > 0.02  # far above


def test_results_on_cifar_are_those_of_the_committed_measurement():
    assert alexnet_cifar100.to_markdown(CIFAR) in GUIDE["when"]
    assert headlines.against_best_baseline(CIFAR) in README
    indices = {
        noise: [
            tail["index"]
            for epochs in found["tails"].values()
            for tail in epochs.values()
            if tail is not None and tail["index"] is not None
        ]
        for noise, found in CIFAR["noises"].items()
    }
    low, high = min(indices["heavy pixels"]), max(indices["heavy pixels"])
    assert f"the index is {low:.1f} to {high:.1f}" in WHEN
    assert all(min(own) > 7 for noise, own in indices.items() if noise != "heavy pixels")
    runs = RunsCache(alexnet_cifar100.DEFAULTS.runs)
    wide = runs[{"steps": "alexnet", "width": 1.0, "batch_size": 128}]["ways"]
    assert wide["plain"]["seconds_quartiles"][1] == pytest.approx(0.9e-3, abs=0.05e-3)
    engine_ratio, stacked_ratio = (wide[way]["ratio_quartiles"][1] for way in ("engine", "vmap"))
    assert f"at full width {engine_ratio:.2f} and {stacked_ratio:.2f} times" in WHEN


def test_map_is_that_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/clipping_map.json").read_text())["rows"]
    against = {row["label"]: row["differences"]["batch clipping"] for row in rows}
    plain, moving = "n = 128, no momentum, 6 epochs", "n = 128, momentum 0.9, 6 epochs"
    for sign, label, words in (
        (1, f"heavy pixels, {plain}", "is above batch clipping by {} points without momentum"),
        (1, f"heavy pixels, {moving}", "and by {} with it,"),
        (1, "heavy pixels, n = 32, momentum 0.9, 6 epochs", "at n = 32 by {}; at n = 512"),
        (1, f"40% labels, {plain}", "it is above by {} without momentum"),
        (-1, f"40% labels, {moving}", "and *below* by {} with it, after 18 epochs"),
        (-1, "40% labels, n = 128, momentum 0.9, 18 epochs", "after 18 epochs by {}. On"),
    ):
        assert min(sign * end for end in against[label]["interval"]) > 0
        assert words.format(describe_difference(against[label])) in WHEN
    cannot_tell = [label for label in against if label.startswith("clean,")]
    assert len(cannot_tell) == 4
    for label in [*cannot_tell, "heavy pixels, n = 512, momentum 0.9, 6 epochs"]:
        low, high = against[label]["interval"]
        assert low < 0 < high


def test_the_loss_that_readme_names_is_that_of_the_map():
    rows = json.loads((ROOT / "benchmarks/results/clipping_map.json").read_text())["rows"]
    (own,) = (r for r in rows if r["label"] == "40% labels, n = 128, momentum 0.9, 6 epochs")
    difference = own["differences"]["batch clipping"]
    assert difference["interval"][1] < 0
    assert f"*below* batch clipping, by {describe_difference(difference)}" in SHORT


def test_sweep_is_that_of_the_committed_measurement():
    results = ROOT / "benchmarks/results/threshold_sweep.json"
    clean, heavy = json.loads(results.read_text())["rows"]
    means = {
        float(name.removeprefix("α = ")): 100 * statistics.fmean(accuracies)
        for name, accuracies in heavy["test_accuracies"].items()
        if name.startswith("α")
    }
    shares = {name: 100 * share for name, share in heavy["clipped_shares"].items()}
    last = means.pop(30.0)
    assert (min(means), max(means)) == (0.1, 10.0)
    assert f"which clip {shares['α = 0.1']:.0f} to {shares['α = 10']:.0f} % of the samples" in WHEN
    assert f"ends between {min(means.values()):.1f} and {max(means.values()):.1f} % with" in WHEN
    assert f"= 30 ends at {last:.1f} %, no clipping at chance" in WHEN
    assert set(heavy["test_accuracies"]["no clipping"]) == {0.01}
    differences = clean["differences"]
    largest = min(100 * own["mean"] for own in differences.values())
    assert f"clipping costs up to {-largest:.2f} points" in WHEN
    for name in ("α = 10", "α = 30"):
        low, high = differences[name]["interval"]
        assert low < 0 < high


def test_accumulation_is_that_of_the_committed_measurement():
    results = ROOT / "benchmarks/results/accumulation_cifar100.json"
    result = json.loads(results.read_text())
    after = {row["label"]: row["differences"]["clipped after"] for row in result["rows"]}
    for sign, label, words in (
        (1, "heavy pixels, K = 16", "it is above clipping after by {} points with 16"),
        (-1, "heavy pixels, K = 4", "and *below* by {} with 4, where"),
    ):
        assert min(sign * end for end in after[label]["interval"]) > 0
        assert words.format(describe_difference(after.pop(label))) in WHEN
    tuned_trials = ("tune", "heavy pixels", "clipped before")
    first, second, *_ = sorted(
        (
            100 * record["curves"]["validation_accuracy"][-1]
            for record in RunsCache(accumulation_cifar100.DEFAULTS.runs).records()
            if (record.get("stage"), record.get("noise"), record.get("method")) == tuned_trials
            and record["setting"]["num_microbatches"] == 4
        ),
        reverse=True,
    )
    assert f"its two best trials were tied ({first:.1f} and {second:.1f} %)" in WHEN
    assert len(after) == 2
    assert all(own["interval"][0] < 0 < own["interval"][1] for own in after.values())
    for steps in result["steps"].values():
        ratio = steps["ways"]["clipped before"]["ratio_quartiles"][1]
        assert f"A step takes {ratio:.2f} times as long" in WHEN


def test_what_finds_wrong_labels_is_that_of_the_committed_measurement():
    result = json.loads((ROOT / "benchmarks/results/find_bad_data.json").read_text())
    assert find_bad_data.to_markdown(result).strip() in GUIDE["outliers"]
    assert "for wrong labels **the loss is the better finder**" in GUIDE["outliers"]
    for row in result["rows"]:
        assert row["best"] == "loss"
        assert all(against["interval"][0] > 0.2 for against in row["best_against"].values())
        # "names a fifth of the test images rightly"
        assert 0.19 < statistics.fmean(row["test_accuracies"]) < 0.23
    clipped, unclipped = (
        statistics.fmean(find_bad_data.final_areas(row, "loss")) for row in result["rows"]
    )
    assert abs(clipped - unclipped) < 0.01  # "matters little"


@pytest.mark.parametrize(
    ("to_markdown", "path"),
    [
        (cost.to_markdown, "benchmarks/results/engine.json"),
        (report.to_markdown, "benchmarks/peers/results/peers.json"),
    ],
)
def test_tables_are_those_of_the_committed_measurements(to_markdown, path):
    table = to_markdown(json.loads((ROOT / path).read_text())["rows"]).strip()
    assert table in GUIDE["engine"]


def test_costs_on_accelerators_are_those_of_the_committed_compilations():
    result = json.loads((ROOT / "benchmarks/results/accelerators.json").read_text())
    table = accelerators.to_markdown(result).strip()
    assert table in GUIDE["engine"]
    header, _, *every = table.splitlines()
    lines = README.splitlines()
    start = lines.index(header) + 2
    shown = lines[start : lines.index("", start)]
    assert len(shown) == 3
    assert set(shown) <= set(every)


def test_bytes_by_layer_are_those_of_the_committed_compilations():
    result = json.loads((ROOT / "benchmarks/results/accelerators.json").read_text())
    moved = [
        row["ratios"]["bytes"]
        for row in result["ratios"]
        if (row["target"], row["mode"]) == ("h100", "by_layer")
    ]
    assert len(moved) == 6
    said = f"moves {min(moved):.2f} to {max(moved):.2f} times the bytes of a plain gradient"
    assert said in " ".join(GUIDE["engine"].split())


def test_what_chips_send_is_that_of_the_committed_compilations():
    result = json.loads((ROOT / "benchmarks/results/sharded.json").read_text())
    assert sharded.to_markdown(result).strip() in GUIDE["distributed"]
    tensor_parallel = [row for row in result["ratios"] if row["layout"] == "tensor parallel"]
    one_pass, by_layer = (
        max(row["ratios"]["sent"] for row in tensor_parallel if row["mode"] == mode)
        for mode in ("one_pass", "by_layer")
    )
    said = " ".join(GUIDE["distributed"].split())
    assert f"{one_pass:.2f} times as much in one pass, and {by_layer:.2f} times by layer" in said
    simulated = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())
    assert simulated["rows"] == scaling.simulate(result["rows"])
    assert scaling.to_markdown(simulated).strip() in GUIDE["distributed"]


def test_the_dearest_on_a_cpu_is_that_of_the_committed_measurement():
    rows = json.loads((ROOT / "benchmarks/results/engine.json").read_text())["rows"]
    modes = [row["modes"] for row in rows if row["experiment"] == "zoo"]
    one_pass, two_pass = (
        max(mode[name]["ratio_quartiles"][1] for mode in modes) for name in ("one_pass", "two_pass")
    )
    slowest = f"one pass takes at most {one_pass:.2f} times as long as a plain gradient"
    assert f"{slowest}, two passes {two_pass:.2f}" in SHORT


def test_the_models_of_other_libraries_are_as_many_as_agree():
    found = json.loads((ROOT / "benchmarks/results/third_party.json").read_text())["summary"]
    number, libraries = found["outcomes"]["ok"], found["libraries"]
    assert found["outcomes"].keys() == {"ok"}
    assert f"{number} tiny models of {libraries} other libraries [all agree]" in SHORT
