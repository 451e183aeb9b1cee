"""Check the benchmark for a GPU on any device: its shapes, its file and its tables."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks.cifar100 import many_runs, on_gpu_training
from benchmarks.common.cache import RunsCache
from benchmarks.engine import on_gpu, on_gpu_engine, real_models
from benchmarks.engine.on_gpu_engine import Job, zoo_model
from benchmarks.engine.on_gpu_results import results_of_this_card

JOBS = [
    Job("time", "mlp", zoo_model("mlp", 512), ("two_pass", "vmap")),
    Job("error", "mlp", zoo_model("mlp", 512)),
]


class Net(nn.Module):
    """Compiles in a second, where AlexNet takes twenty."""

    num_classes: int

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape(*x.shape[:-3], -1)
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(8)(x)))


@pytest.fixture
def results(tmp_path):
    return results_of_this_card(tmp_path)


@pytest.mark.slow
def test_engine_writes_what_it_measures_and_measures_it_once(results, monkeypatch, capsys):
    on_gpu_engine.measure_all(results, JOBS, "tiny", 2, float("inf"))
    timed, compared = results.rows()
    assert list(timed["modes"]) == ["plain", "one_pass", "one_pass, propagate"]
    for own in timed["modes"].values():
        low, middle, high = own["ratio_quartiles"]
        assert 0 < low <= middle <= high
        assert own["temp_bytes"] > 0
        assert own["compile_ratio"] > 0
    assert compared["errors"]["one_pass"]["largest"] < 1e-5
    assert compared["errors"]["one_pass"]["median"] <= compared["errors"]["one_pass"]["largest"]
    assert {"device", "driver", "jax", "xla_platform"} <= timed["machine"].keys()
    monkeypatch.setattr(on_gpu_engine, "measure", lambda *_: pytest.fail("measured again"))
    on_gpu_engine.measure_all(results, JOBS, "tiny", 2, float("inf"))
    on_gpu_engine.measure_all(results, JOBS, "full", 2, end=0.0)  # after the time limit
    capsys.readouterr()
    on_gpu.main(out=results.path.parent, report=True)
    printed = capsys.readouterr().out
    assert "| mlp (zoo) | 4 | one_pass, propagate |" in printed
    assert "| mlp (zoo) | 4 | vmap(grad) |" in printed


def test_stacked_gradients_are_left_out_where_they_take_long_unless_asked_for():
    jobs = {(job.what, job.name): job for job in on_gpu_engine.jobs_of((), ("vit_b16",))}
    assert jobs["time", "gpt2"].leaves_out == ("vmap",)
    assert jobs["time", "vit_b16"].leaves_out == ()
    assert [job.what for job in on_gpu_engine.jobs_of(("alexnet",), ())] == ["time", "error"]


def test_a_mode_without_memory_is_left_out_and_a_needed_one_is_not(monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\nmore")

    def fail(*_):
        raise error

    monkeypatch.setattr(on_gpu_engine, "compile_step", fail)
    failed = on_gpu_engine.compile_steps({"vmap": fail}, ())
    assert failed == {"vmap": {"failed": "RESOURCE_EXHAUSTED: too large"}}
    assert on_gpu_engine.ratios(failed["vmap"], {}) == {}
    with pytest.raises(jax.errors.JaxRuntimeError):
        on_gpu_engine.compile_steps({"one_pass": fail}, ())


@pytest.mark.slow
def test_training_tunes_tests_and_goes_on_where_it_stopped(results, monkeypatch, capsys):
    for module in (many_runs, on_gpu_training):
        monkeypatch.setattr(module, "build_model", lambda _, num_classes, width: Net(num_classes))
    monkeypatch.setattr(many_runs, "convolutions_as_products", lambda call, a, k, _: call(*a, **k))
    plan = on_gpu_training.Plan(None, epochs=(1,), seeds=2, together=4, tiny=True, end=float("inf"))
    on_gpu_training.train_all(results, plan._replace(end=0.0))
    assert not results.runs.exists()
    assert list(results.rows()[0]["ways"]) == list(on_gpu_training.METHODS)
    on_gpu_training.train_all(results, plan)
    records = RunsCache(results.runs).records()
    stages = [record["stage"] for record in records]
    assert (stages.count("tune"), stages.count("final")) == (8, 8)
    assert all(r["images"] == {"train": 72, "validation": 8, "test": 40} for r in records)
    written = results.runs.read_text()
    monkeypatch.setattr(on_gpu_training, "train_together", lambda *_: pytest.fail("trained again"))
    on_gpu_training.train_all(results, plan)
    assert results.runs.read_text() == written
    capsys.readouterr()
    on_gpu.main(out=results.path.parent, report=True)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 1 | 72 | ") for line in lines) == 4


def test_all_methods_have_as_many_trials_over_three_decades():
    grids = on_gpu_training.make_grids(128)
    assert list(grids) == list(on_gpu_training.METHODS)
    assert {len(points) for points in grids.values()} == {20}
    taus = [point.threshold for point in grids[on_gpu_training.GROWING]]
    assert max(taus) / min(taus) == pytest.approx(1000)


def test_data_is_whatever_parts_a_folder_has(tmp_path):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    for name in ("cifar100_train_part0of5", "cifar100_train_part3of5", "cifar100_test"):
        np.savez(tmp_path / f"{name}.npz", images=images, fine_labels=np.arange(4, dtype=np.uint8))
    data = on_gpu_training.read_parts(tmp_path)
    assert (len(data.train.images), len(data.test.images)) == (8, 4)
    assert data.train.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    with pytest.raises(SystemExit, match="--data-dir"):
        on_gpu_training.read_parts(None)


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (real_models.alexnet(), 23.64),
        (real_models.vit_b16(), 86.6),
        (real_models.gpt2(), 124.5),
        (real_models.gpt2(scanned=True), 124.5),
        (real_models.resnet50(), 25.56),
        (real_models.bert_base(), 109.2),
        (real_models.llama_1b(), 1100.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_real_models_have_their_size_and_losses_one_value_an_example(model, millions):
    params, *batch = model.abstract()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, rel=0.001)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert {array.shape[0] for array in batch} == {model.n}
    losses = jax.eval_shape(jax.vmap(model.loss, (None, *[0] * len(batch))), params, *batch)
    assert (losses.shape, losses.dtype) == ((model.n,), np.dtype("float32"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_full_size_is_not_begun_on_a_cpu(tmp_path):
    with pytest.raises(SystemExit, match="no GPU"):
        on_gpu.main(out=tmp_path)


def test_a_job_that_fails_costs_the_others_nothing(results, monkeypatch):
    def fail_first(job, *_):
        if job.what == "time":
            raise ValueError("no such kernel")
        return {"what": job.what, "name": job.name, "size": "tiny"}

    monkeypatch.setattr(on_gpu_engine, "measure", fail_first)
    on_gpu_engine.measure_all(results, JOBS, "tiny", 2, float("inf"))
    assert [row["what"] for row in results.rows()] == ["error"]


def test_results_are_valid_json(results):
    results.add({"what": "step", "name": "alexnet", "size": "tiny", "ways": {"x": float("nan")}})
    assert json.loads(results.path.read_text())["rows"][0]["ways"] == {"x": None}
