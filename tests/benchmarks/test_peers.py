import importlib.util
import json
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util

from benchmarks.peers import report, run, weights, worker
from benchmarks.peers.common import PEERS, Inputs
from benchmarks.peers.jax_peers import as_names, as_tree
from benchmarks.peers.reference import DTYPES, errors_of, limit, prepare, thresholds_with
from benchmarks.zoo.models import ZOO

ROOT = pathlib.Path(__file__).parents[2]
MISSING = [
    name for name in ("jax_privacy", "opacus", "torch") if not importlib.util.find_spec(name)
]


def command(out, *options):
    words = ["--quick", "--out", str(out), "--time-limit-seconds", "300", *options]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *words], capture_output=True, text=True, cwd=ROOT
    )


# Weights


@pytest.fixture(scope="module", params=["alexnet", "gpt"])
def params(request):
    shapes = jax.eval_shape(lambda: ZOO[request.param]("small").params)
    return {
        name: np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }


def test_weights_go_to_torch_and_back(params):
    for name, array in params.items():
        there = weights.to_torch(name, array)
        assert there.shape == weights.torch_shape(name, array.shape)
        np.testing.assert_array_equal(weights.from_torch(name, there, array.shape), array)
    assert len(set(map(weights.torch_name, params))) == len(params)


def test_names_are_of_torch():
    names = {
        "Conv_0/kernel": "Conv_0.weight",
        "Block_1/LayerNorm_0/scale": "Block_1.LayerNorm_0.weight",
        "Embed_0/embedding": "Embed_0.weight",
        "Dense_0/bias": "Dense_0.bias",
        "position": "position.weight",
    }
    assert {name: weights.torch_name(name) for name in names} == names


@pytest.mark.parametrize(
    ("name", "kernel", "subscripts"),
    [
        ("Dense_0/kernel", (5, 7), "ni,io->no"),
        ("attention/query/kernel", (5, 2, 3), "ni,ihk->nhk"),
        ("attention/out/kernel", (2, 3, 5), "nhk,hko->no"),
    ],
)
def test_products_are_the_same_with_a_torch_weight(name, kernel, subscripts):
    rng = np.random.default_rng(0)
    w = rng.normal(size=kernel)
    x = rng.normal(size=(4, *kernel[: len(subscripts.split(",")[0]) - 1]))
    expected = np.einsum(subscripts, x, w).reshape(4, -1)
    np.testing.assert_allclose(x.reshape(4, -1) @ weights.to_torch(name, w).T, expected)


def test_convolutions_are_output_first():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert weights.to_torch("Conv_0/kernel", kernel)[4, 3, 1, 2] == kernel[1, 2, 3, 4]


# References


def test_inputs_survive_their_file(tmp_path):
    arrays = {"Dense_0/kernel": np.ones((2, 3)), "position": np.zeros(2, np.float32)}
    inputs = Inputs("gpt", "small", 0.3, arrays, (np.arange(6).reshape(3, 2), np.ones(3)))
    inputs.save(tmp_path / "inputs.npz")
    loaded = Inputs.load(tmp_path / "inputs.npz")
    assert loaded[:3] == inputs[:3]
    assert loaded.num_samples == 3
    chex.assert_trees_all_equal(loaded[3:], inputs[3:])
    assert loaded.params["position"].dtype == np.float32


def test_named_arrays_are_a_tree():
    named = {"a/b": np.ones(2), "c": np.zeros(3)}
    assert set(traverse_util.flatten_dict(as_tree(named), sep="/")) == set(named)
    chex.assert_trees_all_equal(as_names(as_tree(named)), named)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_thresholds_stand_for_a_norm_with_epsilon(epsilon):
    norms, clip = np.array([0.5, 0.95, 0.999, 1.0, 1.001, 7.0]), 1.0
    taus = thresholds_with(epsilon, clip, norms)
    expected = np.minimum(1, clip / (norms + epsilon))
    np.testing.assert_allclose(np.minimum(1, taus / norms), expected, rtol=1e-14)


@pytest.mark.slow
def test_errors_tell_loss_from_gradients(tmp_path):
    references = prepare(tmp_path, "gpt", "small", 4, {0.0, 0.1})
    for dtype, reference in references.items():
        inputs = Inputs.load(tmp_path / f"{dtype}.npz")
        assert {str(array.dtype) for array in inputs.params.values()} == {dtype}
        assert np.sum(reference.norms > inputs.threshold) == 2
        own, other = reference.gradients[0.0], reference.gradients[0.1]
        assert errors_of(reference, 0.0, reference.loss, own) == {"loss": 0, "gradients": 0}
        wrong = errors_of(reference, 0.0, 1.5 * reference.loss, other)
        assert wrong["loss"] == pytest.approx(0.5)
        assert wrong["gradients"] > limit(PEERS["opacus_hooks"], dtype, "gradients")
    assert not jax.config.jax_enable_x64


# Rows


def row(model, peer, **others):
    errors = {dtype: {"loss": 0.0, "gradients": 1e-12} for dtype in DTYPES}
    figures = {
        "plain_seconds_quartiles": [1.0, 1.0, 1.0],
        "seconds_quartiles": [2.0, 3.0, 4.0],
        "ratio_quartiles": [2.0, 3.0, 4.0],
        "peak_bytes_ratio": 1.5,
        "peak_bytes": 3,
    }
    kept = {} if "skipped" in others else figures
    return {"model": model, "samples": 8, "peer": peer, "errors": errors} | kept | others


def rows():
    return [
        row("alexnet", "ours"),
        row("alexnet", "jax_privacy", skipped="a step took 99 s", first_ratio=41.7),
        row("gpt", "ours"),
        row("gpt", "opacus_hooks", skipped="not there"),
    ]


def test_rows_keep_the_order_and_a_peer_is_there_once_a_model():
    kept = []
    for new in [*reversed(rows()), row("gpt", "ours", samples=16)]:
        kept = run.add_row(kept, new)
    assert [(r["model"], r["peer"], r["samples"]) for r in kept] == [
        ("alexnet", "ours", 8),
        ("alexnet", "jax_privacy", 8),
        ("gpt", "ours", 16),
        ("gpt", "opacus_hooks", 8),
    ]
    assert run.Task("gpt", 16, "ours").is_in(kept)
    assert not run.Task("gpt", 8, "ours").is_in(kept)


def test_markdown_has_a_line_a_peer():
    lines = report.to_markdown(rows()).splitlines()
    assert lines == [
        "| library | AlexNet-CIFAR, n = 8: time | memory | GPT, n = 8: time | memory |",
        "|---|---|---|---|---|",
        "| psclip_optax (JAX) | 3.00 (2.00–4.00) | 1.50 | 3.00 (2.00–4.00) | 1.50 |",
        "| jax_privacy (JAX) | about 42 | – | – | – |",
        "| Opacus, hooks (PyTorch) | – | – | – | – |",
    ]


def test_tables_and_figure_take_every_kind_of_row():
    machine = run.describe_machine() | run.versions()
    broken = row("gpt", "fastdp", skipped="nothing", failed="ended with status 1", errors={})
    every = [*rows(), broken]
    assert report.to_table(machine, every).row_count == 5
    assert report.to_errors(every).row_count == 5
    report.draw(machine, every).draw_without_rendering()
    report.draw(machine, []).draw_without_rendering()


def test_disagreement_and_failure_are_problems():
    assert report.problems(rows()) == []
    wrong = {"float32": {"loss": 0.0, "gradients": 2e-5}}
    undefined = {"float64": {"loss": float("nan"), "gradients": 0.0}}
    broken = row("gpt", "fastdp", skipped="nothing", failed="ended with status 1", errors={})
    found = report.problems(
        [row("gpt", "ours", errors=wrong), row("gpt", "optax", errors=undefined), broken]
    )
    assert len(found) == 3
    assert "gradients in float32 is 2.0e-05" in found[0]
    assert "loss in float64 is nan" in found[1]
    assert "status 1" in found[2]


def test_ratios_are_of_the_same_round():
    measured = {
        "seconds": [[1.0, 2.0, 4.0], [2.0, 6.0, 4.0]],
        "peak_bytes": [10, 30],
        "temp_bytes": None,
    }
    figures = run.figures_of(measured)
    assert figures["ratio_quartiles"] == [1.5, 2.0, 2.5]
    assert figures["peak_bytes_ratio"] == 3
    assert "temp_bytes" not in figures
    assert "peak_bytes" not in run.figures_of(measured | {"peak_bytes": [0, 30]})
    assert "peak_bytes" not in run.figures_of(measured | {"peak_bytes": [None, None]})


def test_what_is_too_slow_says_so():
    options = run.Options(rounds=9, time_limit_seconds=60)
    assert "60 s" in run.too_slow({}, options)["skipped"]
    slow = run.too_slow({"first_seconds": [0.5, 20.0]}, options)
    assert slow["first_ratio"] == 40
    assert "20.0 s" in slow["skipped"]


@pytest.mark.skipif(not worker.CLEAR_REFS.exists(), reason="the peak is read from Linux's /proc")
def test_peak_is_what_a_step_adds():
    size = 50_000_000
    # Memory freed before does not count; memory freed during the step does.
    np.ones(2 * size, np.uint8)
    assert 0.9 * size < worker.peak_bytes(lambda: np.ones(size, np.uint8).sum()) < 1.3 * size


# The command


@pytest.mark.slow
def test_peers_of_the_main_environment_agree(tmp_path):
    peers = ["--models", "gpt", "--peers", "ours", "optax"]
    first = command(tmp_path, *peers)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "peers.json").read_text())
    check_rows(result["rows"], ["ours", "optax"])
    assert {"jax-privacy", "torch", "opacus"} <= result["settings"]["machine"].keys()
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    second = command(tmp_path, *peers)
    assert second.returncode == 0, second.stderr
    assert "Preparing" not in second.stdout
    assert json.loads((tmp_path / "peers.json").read_text()) == result


@pytest.mark.skipif(bool(MISSING), reason=f"not importable: {', '.join(MISSING)}")
@pytest.mark.slow
def test_all_peers_agree(tmp_path):
    peers = [key for key in PEERS if key != "fastdp" or importlib.util.find_spec("fastDP")]
    done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    for model in ("alexnet", "gpt"):
        check_rows([row for row in rows if row["model"] == model and row["peer"] in peers], peers)


def check_rows(rows, peers):
    assert [row["peer"] for row in rows] == peers
    for row in rows:
        assert row["clipped_share"] == 0.5
        assert 0 < row["ratio_quartiles"][0] <= row["ratio_quartiles"][1]
        for dtype in DTYPES:
            for what, error in row["errors"][dtype].items():
                assert error <= limit(PEERS[row["peer"]], dtype, what)
        if row["framework"] == "jax":
            assert row["temp_bytes_ratio"] > 0


def test_a_peer_that_breaks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_worker", lambda *_: "ended with status 1: Oops")
    monkeypatch.setattr(run, "read_errors", lambda *_: {})
    norms = np.array([1.0, 2.0])
    references = {"float32": run.Reference(1.0, norms, {})}
    options = run.Options(3, 60)
    broken = run.measure(run.Task("gpt", 2, "ours"), tmp_path, references, options)
    assert broken["failed"] == "ended with status 1: Oops"
    assert report.problems([broken])
    monkeypatch.setitem(
        run.PEERS, "ours", PEERS["ours"]._replace(module="psclip_optax_does_not_exist")
    )
    absent = run.measure(run.Task("gpt", 2, "ours"), tmp_path, references, options)
    assert absent["skipped"] == "psclip_optax_does_not_exist is not importable"
    assert not report.problems([absent])


def test_unknown_peers_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="nobody"):
        run.main(out=tmp_path, peers=("nobody",))
