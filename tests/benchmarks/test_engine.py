import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.engine import cost
from benchmarks.engine.cost import (
    MODES,
    add_row,
    count_flops,
    largest_error,
    slices_that_fit,
    summarise,
)

ROOT = pathlib.Path(__file__).parents[2]
QUARTILES = ("seconds_quartiles", "ratio_quartiles")
FIGURES = ("temp_bytes", "temp_ratio", "flops", "flops_ratio", "compile_seconds", "compile_ratio")


def run(out, *options):
    command = [
        sys.executable,
        "-m",
        "benchmarks.engine.cost",
        "--quick",
        "--out",
        str(out),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    first = run(out, "--models", "mlp", "lstm", "--sweep", "n")
    assert first.returncode == 0, first.stderr
    return out, first.stdout, json.loads((out / "engine.json").read_text())


@pytest.mark.slow
def test_writes_every_figure_of_every_mode(finished):
    out, printed, result = finished
    machine = result["settings"]["machine"]
    assert {"cpu", "cores", "platform", "device", "jax", "jaxlib", "xla_platform", "date"} <= (
        machine.keys()
    )
    assert machine["jax"] == jax.__version__
    zoo = {row["model"]: row for row in result["rows"] if row["experiment"] == "zoo"}
    assert list(zoo) == ["mlp", "lstm"]
    for row in zoo.values():
        assert set(row["modes"]) == set(MODES)
        assert row["cotangent_bytes"] > 0
        for figures in row["modes"].values():
            for name in QUARTILES:
                low, middle, high = figures[name]
                assert 0 < low <= middle <= high
            assert all(figures[name] > 0 for name in FIGURES)
        for mode in ("one_pass", "two_pass"):
            assert row["modes"][mode]["error"] < 1e-4
        assert row["modes"]["one_pass"]["temp_per_allowed"] > 0
        assert row["modes"]["plain"]["flops_ratio"] == 1
    means = result["summary"]["geometric_mean_of_time"]
    assert set(means) == {"one_pass", "two_pass", "by_layer", "vmap"}
    assert all(mean["models"] == 2 for mean in means.values())
    assert "geometric mean" in printed
    assert (out / "engine.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_a_sweep_compares_one_pass_with_plain(finished):
    points = [row for row in finished[2]["rows"] if row["experiment"] == "n"]
    assert [row["samples"] for row in points] == [2, 4]
    for row in points:
        assert row["modes"]["one_pass"]["ratio_quartiles"][0] > 0
        assert row["modes"]["vmap"].keys() == {"skipped"}
    assert finished[2]["summary"]["largest_per_smallest_ratio"]["n of mlp"] >= 1


@pytest.mark.slow
def test_finished_models_are_not_measured_again(finished):
    out, printed, result = finished
    assert printed.count("Measuring") == 4
    second = run(out, "--models", "mlp")
    assert second.returncode == 0, second.stderr
    assert "Measuring" not in second.stdout
    assert json.loads((out / "engine.json").read_text()) == result
    other = run(out, "--rounds", "5")
    assert other.returncode != 0
    assert "--rerun" in other.stderr


@pytest.mark.parametrize("unroll", [1, 2])
def test_flops_count_every_step_of_a_scan(unroll):
    size, steps = 16, 7
    product = 2 * size**3

    def scanned(x, ws):
        return lax.scan(lambda x, w: (x @ w, None), x, ws, unroll=unroll)[0]

    x, ws = jnp.ones((size, size)), jnp.ones((steps, size, size))
    assert jax.jit(scanned).lower(x, ws).cost_analysis()["flops"] < steps * product  # pyright: ignore
    assert count_flops(scanned, (x, ws)) == pytest.approx(steps * product, rel=0.01)
    # With the value: XLA may not count the last step's product, which only the value needs.
    gradient = jax.value_and_grad(lambda *args: scanned(*args).sum(), argnums=(0, 1))
    assert count_flops(gradient, (x, ws)) == pytest.approx(3 * steps * product, rel=0.01)


def test_flops_count_nested_scans_wherever_they_are():
    size, outer, inner = 16, 3, 5

    @jax.checkpoint
    def body(x, w):
        return lax.fori_loop(0, inner, lambda _, x: jnp.tanh(x) @ w, x), None

    def function(x, ws):
        return lax.cond(x[0, 0] > 0, lambda: lax.scan(jax.jit(body), x, ws)[0], lambda: x)

    arguments = jnp.ones((size, size)), jnp.ones((outer, size, size))
    expected = outer * inner * (2 * size**3 + size**2)
    assert count_flops(function, arguments) == pytest.approx(expected, rel=0.05)


def test_errors_are_relative_to_each_leaf_and_keep_nan():
    reference = {"a": jnp.array([1.0, 100.0]), "b": jnp.array([2.0]), "zero": jnp.zeros(2)}
    assert largest_error(reference, reference) == 0
    assert largest_error(reference | {"b": jnp.array([2.2])}, reference) == pytest.approx(0.1)
    assert largest_error(reference | {"zero": jnp.full(2, 0.01)}, reference) == pytest.approx(0.01)
    assert not largest_error(reference | {"a": jnp.array([1.0, jnp.nan])}, reference) < 1


def test_slices_are_equal_and_fit():
    assert slices_that_fit(128, 10) == 1
    assert slices_that_fit(128, 94_600_000) == 4
    assert slices_that_fit(7, 10**9) == 7
    assert slices_that_fit(2, 10**10) == 2


@pytest.mark.slow
def test_stacks_that_do_not_fit_still_serve_as_the_reference(monkeypatch):
    monkeypatch.setattr(cost, "MOST_STACKED_BYTES", 500)
    measured = cost.measure(cost.Point("zoo", "weight_norm", 6), "small", 2, 1)
    assert "more than" in measured["modes"]["vmap"]["skipped"]
    assert measured["modes"]["one_pass"]["error"] < 1e-5
    assert measured["modes"]["two_pass"]["error"] < 1e-5
    machine = cost.describe_machine()
    assert cost.to_table(machine, [measured]).row_count == 8
    cost.draw(machine, [measured])


def row(experiment, model, samples, ratio=1.0, length=None):
    not_run = {mode: {"skipped": ""} for mode in ("two_pass", "by_layer")}
    modes = {"one_pass": {"ratio_quartiles": [ratio] * 3}, **not_run}
    return {
        "experiment": experiment,
        "model": model,
        "samples": samples,
        "length": length,
        "modes": modes | {"vmap": {"skipped": "too large"}},
    }


def test_rows_keep_the_order_and_a_model_is_in_the_zoo_once():
    rows = []
    for new in (
        row("n", "mlp", 8),
        row("zoo", "lora", 4),
        row("zoo", "mlp", 4),
        row("zoo", "mlp", 8),
    ):
        rows = add_row(rows, new)
    assert [(r["experiment"], r["model"], r["samples"]) for r in rows] == [
        ("zoo", "mlp", 8),
        ("zoo", "lora", 4),
        ("n", "mlp", 8),
    ]


def test_summary_is_over_what_ran():
    rows = [
        row("zoo", "mlp", 4, 1.0),
        row("zoo", "lora", 4, 4.0),
        row("n", "mlp", 8, 1.2),
        row("n", "mlp", 16, 1.5),
    ]
    summary = summarise(rows)
    assert summary["geometric_mean_of_time"] == {
        "one_pass": {"ratio": pytest.approx(2), "models": 2}
    }
    assert summary["largest_per_smallest_ratio"] == {"n of mlp": pytest.approx(1.25)}
