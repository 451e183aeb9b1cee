import itertools
import json

import jax
import numpy as np
import pytest

from benchmarks.thresholds import by_layer, by_layer_report, by_layer_tasks


@pytest.fixture(scope="module")
def gpt():
    return by_layer_tasks.language_model(16, 1, steps=4)


@pytest.mark.slow
def test_quick_run_writes_its_table_and_figure_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    options = by_layer.Options(runs=tmp_path / "runs.jsonl", out=tmp_path, quick=True)
    by_layer.main(options)
    result = json.loads((tmp_path / "by_layer.json").read_text())
    (row,) = result["rows"]
    for ours, other in by_layer.PAIRS.items():
        means = [np.mean(row["methods"][name]["accuracies"]) for name in (ours, other)]
        assert row["differences"][ours]["mean"] == pytest.approx(means[0] - means[1])
        assert len(row["methods"][ours]["trials"]) == len(row["methods"][other]["trials"])
    assert (tmp_path / "by_layer.png").read_bytes().startswith(b"\x89PNG")
    assert row["label"] in capsys.readouterr().out
    monkeypatch.setattr(by_layer, "train", lambda *_: pytest.fail("trained again"))
    by_layer.main(options)
    assert by_layer_report.to_markdown(result).count("\n") == 3


def norms_of(stacked):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(stacked)]
    return np.sqrt(sum(np.square(leaf).reshape(len(leaf), -1).sum(1) for leaf in leaves))


@pytest.mark.slow
def test_thresholds_are_in_units_of_the_whole_gradients_first_norms(gpt):
    key, batches = jax.random.key(0), gpt.batches("text", 0, 1)
    arrays = next(batches)
    params = jax.jit(gpt.init)(key)
    stacked, _ = jax.jit(jax.vmap(jax.grad(gpt.loss, has_aux=True), (None, 0)))(params, *arrays)
    expected = 2.0 * np.median(norms_of(stacked))
    carries = {
        name: by_layer.build_program(gpt, name).start(key, 2.0, *arrays)
        for name in (by_layer.ALL, by_layer.LAYER_AUTO)
    }
    for carry in carries.values():
        assert float(carry.limit) == pytest.approx(expected, rel=1e-4)
    # The automatic rules have already seen the first batch, each the norms of its group.
    medians = {name: float(own.median) for name, own in carries[by_layer.LAYER_AUTO].rule.items()}
    norms = {name: norms_of(stacked[name]) for name in stacked}
    assert medians.keys() == norms.keys()
    for name, median in medians.items():
        ordered = np.sort(norms[name])
        assert ordered[7] * 0.98 <= median <= ordered[8] * 1.02


def test_sentences_are_of_the_intervals():
    def row(task, *differences):
        points = [(0.01, 1, 2), (0.02, 1, 3), (0.0, 1, 4), (0.0, 2, 4)]
        trials = [{"accuracy": a, "threshold": t, "rate": r} for a, t, r in points]
        own = {"losses": [1.0, 3.0], "trials": trials, "chosen": {"threshold": 1, "rate": 3}}
        return {
            "task": task,
            "label": task,
            "methods": dict.fromkeys(by_layer.METHODS, own),
            "differences": {
                ours: {"interval": interval}
                for ours, interval in zip(by_layer.PAIRS, differences, strict=True)
            },
        }

    rows = [row("GPT", [0.1, 0.2], [-1, 1]), row("AlexNet", [-0.2, -0.1], [-2, 1])]
    better, worse, neither, failures, edges, bits = by_layer_report.sentences({"rows": rows})
    assert better == "By layer, above one threshold: GPT"
    assert worse == "By layer, below one threshold: AlexNet"
    assert neither.endswith("not distinguishable from one threshold, automatic: GPT; AlexNet")
    assert failures.startswith(
        "Trials of AlexNet that end no better than chance: 3 of 4 one threshold"
    )
    assert edges.startswith("Of 4 winners with constant thresholds 4 have the smaller one, and 0 ")
    assert bits.startswith(f"Bits a character of the held-out text: {2 / np.log(2):.3f} one")


def test_learning_rates_are_raised_where_a_step_is_as_long_as_its_gradient(gpt):
    rates = lambda task: [point.rate for point in by_layer.points_of(task, by_layer.LAYER)]
    assert rates(gpt) == [*gpt.rates, *gpt.rates]
    momentum = by_layer_tasks.alexnet(by_layer.enlarged_digits(), 0.05, 200, steps=4)
    low, high = by_layer.THRESHOLDS
    assert rates(momentum) == pytest.approx(
        [rate / low for rate in momentum.rates] + [*momentum.rates]
    )
    assert low < 1 < high


def test_text_is_held_out_and_each_character_is_predicted_once(gpt):
    paragraphs = by_layer_tasks.corpus().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    windows = {name: np.asarray(own[0]) for name, own in gpt.held_out.items()}
    for own in windows.values():
        np.testing.assert_array_equal(own[1:, 0], own[:-1, -1])
    trained = next(gpt.batches("text", 0, 1))[0].tolist()
    rows = {tuple(row) for own in windows.values() for row in own.tolist()}
    assert not rows & set(map(tuple, trained))


def test_batches_are_an_order_and_then_another_one():
    first = list(itertools.islice(by_layer_tasks.indices(10, 5, 0, 4), 4))
    assert sorted(np.concatenate(first[:2])) == sorted(np.concatenate(first[2:])) == list(range(10))
    assert not np.array_equal(first[0], first[2])
    again = list(by_layer_tasks.indices(10, 5, 0, 4))
    np.testing.assert_array_equal(first, again)
