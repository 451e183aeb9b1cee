"""Compare many runs in one program with each run alone by Optax and stacked gradients."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import psclip_optax as psc
from benchmarks.cifar100 import (
    accumulation_cifar100,
    alexnet_cifar100,
    clipping_map,
    many_runs,
    threshold_sweep,
    tuned,
)
from benchmarks.cifar100.images import PADDING, shifted_and_mirrored
from benchmarks.cifar100.many_runs import NOISES, Data, Numbers, Run, Setting
from benchmarks.cifar100.tuned import Options, edges, enlarged_digits, stopped_accuracy
from benchmarks.common.cache import RunsCache, digest
from benchmarks.common.publishing import RESULTS
from psclip_optax.training.data.splits import Split
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss

STEPS, EPOCHS, SIZE, CLASSES = 3, 2, 16, 10
SETTING = Setting(width=0.05, batch_size=SIZE, augment=False)
RUNS = {
    "momentum": Numbers(0.05),
    "SGD": Numbers(0.3, momentum=0.0),
    "batch": Numbers(0.1, batch_threshold=0.5),
    "constant": Numbers(0.05, threshold=6.0),
    "growing": Numbers(0.05, threshold=4.0, exponent=0.5),
    "automatic": Numbers(0.05, scale=0.3),
}


@pytest.fixture(scope="module")
def data() -> Data:
    digits = enlarged_digits()
    parts = (slice(0, STEPS * SIZE), slice(100, 140), slice(200, 240))
    splits = (
        Split(jnp.asarray(digits.train.images[part]), jnp.asarray(digits.train.labels[part]))
        for part in parts
    )
    return Data(*splits, jnp.asarray(digits.pixel_mean), jnp.asarray(digits.pixel_std))


def optimizer_of(
    numbers: Numbers, automatic=many_runs.moment_rule, optimizer: str = "momentum"
) -> optax.GradientTransformation:
    if numbers.scale:
        threshold = automatic(numbers.scale)
    elif numbers.exponent:
        threshold = psc.growing_threshold(numbers.threshold, 1 / numbers.exponent)
    else:
        threshold = psc.constant_threshold(numbers.threshold)
    schedule = optax.cosine_decay_schedule(numbers.learning_rate, STEPS * EPOCHS)
    return optax.chain(
        psc.per_sample_clip(threshold),
        optax.clip_by_global_norm(numbers.batch_threshold),
        optax.adamw(schedule)
        if optimizer == "AdamW"
        else optax.sgd(schedule, momentum=numbers.momentum or None),
    )


def automatic_rule(scale) -> psc.AdaptiveThreshold:
    return psc.auto_threshold()


def means_of_parts(number: int, stacked: jax.Array) -> jax.Array:
    return jnp.mean(stacked.reshape(number, -1, *stacked.shape[1:]), axis=1)


@functools.cache
def gradients_of_samples():
    """A net, and the compiled losses and gradients of each sample of a batch."""
    model = build_model("alexnet", CLASSES, width=SETTING.width)
    plain = classification_loss(model)
    stacked = jax.vmap(jax.value_and_grad(lambda *x: plain(*x)[0]), (None, 0, 0))
    return model, jax.jit(stacked)


def trained_alone(
    tx: optax.GradientTransformation, data: Data, num_microbatches: int | None = None
) -> list[float]:
    """Return the loss of every epoch."""
    model, per_sample = gradients_of_samples()
    images = (data.train.images / 255.0 - data.mean) / data.std
    params = jax.jit(model.init)(jax.random.key(3), images[:1])["params"]
    state = tx.init(params)

    @jax.jit
    def stepped(params, state, grads):
        if num_microbatches:
            grads = jax.tree.map(functools.partial(means_of_parts, num_microbatches), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    losses = []
    for epoch in range(EPOCHS):
        order_key, _ = jax.random.split(many_runs._epoch_key(jnp.asarray(3), epoch))
        order = jax.random.permutation(order_key, STEPS * SIZE).reshape(STEPS, SIZE)
        own = []
        for indices in order:
            values, grads = per_sample(params, images[indices], data.train.labels[indices])
            params, state = stepped(params, state, grads)
            own.append(float(jnp.mean(values)))
        losses.append(float(np.mean(own)))
    return losses


def trained_together(names, data: Data, setting: Setting):
    runs = [Run("test", name, "clean", RUNS[name], EPOCHS, 3, setting) for name in names]
    return runs, many_runs.train_together(runs, data, CLASSES, len(RUNS))


@pytest.mark.slow
def test_runs_together_are_runs_alone(data):
    runs, records = trained_together(RUNS, data, SETTING)
    for run, record in zip(runs, records, strict=True):
        expected = trained_alone(optimizer_of(run.numbers), data)
        np.testing.assert_allclose(
            record["curves"]["loss"], expected, rtol=1e-3, err_msg=run.method
        )
    shares = [record["curves"]["clipped_share"][-1] for record in records]
    assert shares[:3] == [0, 0, 0]
    assert all(0 < share < 1 for share in shares[3:]), shares
    assert records[2]["curves"]["batch_clipped"][-1] > 0


@pytest.mark.slow
def test_a_new_rule_clips_the_first_batch_by_its_own_norms_and_counts_it_once(data):
    numbers = {"automatic": Numbers(0.3, scale=1.0), "SGD": RUNS["SGD"]}
    runs = [Run("test", name, "clean", own, EPOCHS, 3, SETTING) for name, own in numbers.items()]
    records = many_runs.train_together(runs, data, CLASSES, len(RUNS), automatic_rule)
    for run, record in zip(runs, records, strict=True):
        expected = trained_alone(optimizer_of(run.numbers, automatic_rule), data)
        np.testing.assert_allclose(record["curves"]["loss"], expected, rtol=1e-4)


@pytest.mark.slow
def test_adamw_is_that_of_optax(data):
    setting = dataclasses.replace(SETTING, optimizer="AdamW")
    numbers = {
        "momentum": Numbers(0.001),
        "batch": Numbers(0.002, batch_threshold=0.5),
        "constant": Numbers(0.002, threshold=6.0),
    }
    runs = [Run("test", name, "clean", own, EPOCHS, 3, setting) for name, own in numbers.items()]
    records = many_runs.train_together(runs, data, CLASSES, len(RUNS))
    for run, record in zip(runs, records, strict=True):
        expected = trained_alone(optimizer_of(run.numbers, optimizer="AdamW"), data)
        np.testing.assert_allclose(record["curves"]["loss"], expected, rtol=1e-3)


@pytest.mark.slow
def test_micro_batches_are_clipped_before_they_are_averaged(data):
    in_parts = dataclasses.replace(SETTING, num_microbatches=4)
    runs, records = trained_together(["growing", "momentum"], data, in_parts)
    for run, record in zip(runs, records, strict=True):
        expected = trained_alone(optimizer_of(run.numbers), data, 4)
        np.testing.assert_allclose(record["curves"]["loss"], expected, rtol=1e-3)
    assert records[0]["curves"]["clipped_share"][0] > 0


def test_convolutions_as_products_are_convolutions():
    model = build_model("alexnet", CLASSES, width=0.1)
    images = jax.random.normal(jax.random.key(0), (2, 20, 32, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, params)
    one, other = classification_loss(model), many_runs.build_loss(model)
    for image in images:
        np.testing.assert_allclose(other(params, image, 3)[0], one(params, image, 3)[0], rtol=1e-5)


def test_images_are_shifted_and_mirrored():
    images = jax.random.uniform(jax.random.key(0), (40, 8, 8, 1))
    found = shifted_and_mirrored(jax.random.key(1), images)
    pad = PADDING
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = set()
    for image, whole in zip(np.asarray(found), padded, strict=True):
        (where,) = (
            (i, j, step)
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
            for step in (1, -1)
            if np.array_equal(image, whole[i : i + 8, j : j + 8][:, ::step])
        )
        shifts.add(where)
    assert len(shifts) > 20


def test_noise_is_that_of_the_command(data):
    labels = many_runs.corrupted(data.train, NOISES["40% labels"], CLASSES, 1).labels
    share = np.mean(labels != np.asarray(data.train.labels))
    assert 0.2 < share < 0.6
    factors = many_runs.corrupted(data.train, NOISES["heavy pixels"], CLASSES, 1).factors
    assert 0.05 < np.mean(factors != 1) < 0.4
    clean = many_runs.corrupted(data.train, NOISES["clean"], CLASSES, 1)
    assert np.array_equal(clean.labels, data.train.labels)
    assert np.all(clean.factors == 1)


def test_a_run_that_diverged_has_no_tail():
    assert many_runs.tail_figures(np.array([1.0, np.nan])) is None
    light = many_runs.tail_figures(np.abs(np.random.default_rng(0).normal(size=5_000)))
    assert light["verdict"] == "light"


def test_what_decides_how_a_run_ends_is_in_its_digest():
    run = Run("final", "growing", "clean", RUNS["growing"], 2, 1, SETTING)
    others = [
        run._replace(seed=2),
        run._replace(epochs=3),
        run._replace(numbers=RUNS["constant"]),
        run._replace(setting=dataclasses.replace(SETTING, batch_size=8)),
        run._replace(setting=dataclasses.replace(SETTING, optimizer="AdamW")),
    ]
    assert len({digest(other.described()) for other in [run, *others]}) == 6
    assert digest(run.described()) == digest(Run(*run).described())


def test_stopping_early_looks_at_validation_alone():
    curves = {"validation_accuracy": [None, 0.4, None, 0.3], "test_accuracy": [0.9, 0.2, 0.8, 0.5]}
    assert stopped_accuracy({"curves": curves}) == 0.2


def test_winners_at_an_edge_are_told():
    def trial(rate, threshold):
        numbers = Numbers(rate, threshold=threshold)._asdict()
        return {"numbers": numbers | {"batch_threshold": None}}

    trials = [trial(rate, threshold) for rate in (0.1, 0.2, 0.4) for threshold in (1, 2, 3)]
    inside, outside = Numbers(0.2, threshold=2)._asdict(), Numbers(0.4, threshold=1)._asdict()
    assert edges({"chosen": inside, "trials": trials}) == []
    assert edges({"chosen": outside, "trials": trials}) == [
        "smallest threshold",
        "largest learning rate",
    ]


@pytest.mark.parametrize("noises", [(), ("clean", "rain")])
def test_unknown_noises_are_refused(noises):
    with pytest.raises(ValueError, match="noises are of clean, 20% labels"):
        many_runs.check_noises(noises)


def test_unknown_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cells are numbers from 0 to 1"):
        clipping_map.main(Options(tmp_path, quick=True), cells=(2,))


def test_no_chunk_is_begun_after_the_time(data, tmp_path):
    run = Run("test", "momentum", "clean", RUNS["momentum"], 1, 3, SETTING)
    with pytest.raises(TimeoutError, match="go on"):
        many_runs.run_all(
            [run],
            data,
            CLASSES,
            cache=RunsCache(tmp_path / "x"),
            together=6,
            console=Console(),
            seconds=-1,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "words"),
    [
        (alexnet_cifar100, ["per-sample, growing", "gradient of a train step", "tail index"]),
        (clipping_map, ["against no clipping", "no momentum"]),
        (accumulation_cifar100, ["clipped before", "K = 4"]),
        (threshold_sweep, ["against no clipping", "100.0 %"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_quick_runs_write_table_and_figure_and_are_not_repeated(
    benchmark, words, tmp_path, capsys, monkeypatch
):
    name = benchmark.__name__.rpartition(".")[2]
    options = dataclasses.replace(
        benchmark.DEFAULTS, runs=tmp_path / "runs.jsonl", out=tmp_path, quick=True
    )
    benchmark.main(options)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)
    first = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(many_runs, "train_together", None)
    benchmark.main(dataclasses.replace(options, out=tmp_path / "again"))
    assert json.loads((tmp_path / "again" / f"{name}.json").read_text()) == first


def test_every_method_has_as_many_different_trials():
    grids = [
        *(clipping_map.build_grids(cell) for cell in clipping_map.build_cells(6, quick=False)),
        *(
            accumulation_cifar100.build_grids(noise, number)
            for noise in ("clean", "heavy pixels")
            for number in (4, 16)
        ),
        threshold_sweep.build_grids(128),
        {name: method.grid for name, method in alexnet_cifar100.build_methods(128).items()},
    ]
    for grid in grids:
        assert len({len(points) for points in grid.values()}) == 1
        assert all(len(set(points)) == len(points) for points in grid.values())


@pytest.mark.parametrize(
    "benchmark",
    [accumulation_cifar100, alexnet_cifar100, clipping_map, threshold_sweep],
    ids=lambda benchmark: benchmark.__name__,
)
def test_committed_results_are_of_the_committed_runs(benchmark, tmp_path, monkeypatch):
    cifar = types.SimpleNamespace(num_classes=100, image_shape=(32, 32, 3))
    data = types.SimpleNamespace(train=types.SimpleNamespace(images=range(45_000)))
    monkeypatch.setattr(tuned, "load_dataset", lambda *_, **__: cifar)
    monkeypatch.setattr(tuned, "load_data", lambda *_: data)
    monkeypatch.setattr(many_runs, "train_together", None)  # because every run is stored
    read, described = set(), Run.described
    monkeypatch.setattr(
        Run, "described", lambda run: read.add(digest(described(run))) or described(run)
    )
    benchmark.main(dataclasses.replace(benchmark.DEFAULTS, out=tmp_path))
    lines = [json.loads(line) for line in benchmark.DEFAULTS.runs.read_text("ascii").splitlines()]
    assert [line["digest"] for line in lines] == [digest(line["run"]) for line in lines]
    assert {line["digest"] for line in lines if "seed" in line["run"]} == read
    name = benchmark.__name__.rpartition(".")[2] + ".json"
    written, committed = (json.loads((folder / name).read_text()) for folder in (tmp_path, RESULTS))
    assert jax.tree.structure(written) == jax.tree.structure(committed)
    for leaf, told in zip(*map(jax.tree.leaves, (written, committed)), strict=True):
        # Quantiles of different SciPy versions differ in the last digits.
        assert leaf == told if isinstance(told, str) else leaf == pytest.approx(told, rel=1e-9)
