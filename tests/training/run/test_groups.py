"""Check `psclip train --clip-groups`: the groups, their records, and resuming."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psclip_optax as psc
from psclip_optax.training.config.commands import ClipGroupsName, MethodName, UsageError
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.plot.plots import draw_runs, labels_of, read_runs
from psclip_optax.training.run.distributed import data_parallel_mesh
from psclip_optax.training.run.groups import parameter_groups, recorded
from psclip_optax.training.run.methods import Hyperparams
from psclip_optax.training.run.trainer import (
    Trainer,
    build_task_model,
    build_trainer,
    dropout_key,
    training_batches,
)
from tests import slow
from tests.training.run.test_runs import assert_same_run, records, run, run_until_killed, tiny

POINT = Hyperparams(learning_rate=0.1, threshold=0.8, beta=1.5)
NUM_STEPS = 3
LAYERS = ["Dense_0", "Dense_1", "Dense_2"]


def shapes_of(name: Any) -> Any:
    size = 8 if name == "mlp" else 32
    model = build_model(name, 10, width=0.05)
    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    return jax.eval_shape(init)


def by_hand(method: str, groups: str, params: Any) -> Any:
    """Return the prefix for a method: shares of a threshold, or a rule for each group."""
    rules: dict[str, Any] = {
        "ps-clip-auto": psc.moment_threshold(POINT.beta, scale=POINT.threshold),
        "ps-clip-median": psc.auto_threshold(),
    }
    number = len(jax.tree.leaves(params)) if groups == "leaf" else len(LAYERS)
    share = POINT.threshold / math.sqrt(number)
    beta = math.inf if method == "ps-clip-constant" else POINT.beta
    one = rules.get(method, psc.growing_threshold(share, beta))
    return {
        name: dict.fromkeys(own, one) if groups == "leaf" else one for name, own in params.items()
    }


def trainer_of(method: MethodName, groups: ClipGroupsName, mesh: Any = None) -> tuple[Trainer, Any]:
    config, digits = tiny(pathlib.Path(), schedule="constant"), load_dataset("digits")
    model = build_task_model(config, digits)
    trainer = build_trainer(
        method, model, digits, config, NUM_STEPS, mesh, return_norms=True, clip_groups=groups
    )
    return trainer, (model, training_batches(digits.train, digits, config, 0))


def trained(trainer: Trainer, batches: Any) -> tuple[Any, list[Any]]:
    state, logs = trainer.init(0, POINT), []
    for step in range(NUM_STEPS):
        state, metrics = trainer.step(state, dropout_key(0), batches[step])
        logs.append(jax.device_get(metrics))
    return state, logs


@pytest.mark.parametrize(
    ("method", "groups"),
    slow.diagonal(
        ["ps-clip", "ps-clip-constant", "ps-clip-auto", "ps-clip-median"], ["layer", "leaf"]
    ),
)
def test_methods_clip_groups_as_per_sample_clip_does(method: Any, groups: Any):
    trainer, (model, batches) = trainer_of(method, groups)
    loss = classification_loss(model)
    params = trainer.init(0, POINT).params
    clip = psc.per_sample_clip(by_hand(method, groups, params))
    tx = optax.chain(clip, optax.sgd(POINT.learning_rate, momentum=0.9))
    gradient = jax.grad(lambda *args: loss(*args)[0])

    @jax.jit
    def stepped(params: Any, opt_state: Any, *batch: Any) -> Any:
        stacked = jax.vmap(gradient, (None, 0, 0))(params, *batch)
        updates, opt_state = tx.update(stacked, opt_state, params)
        norms = jax.vmap(optax.tree.norm)(stacked)
        return optax.apply_updates(params, updates), opt_state, norms

    opt_state, norms = tx.init(params), None
    for step in range(NUM_STEPS):
        images, labels = batches[step]["image"], batches[step]["label"]
        params, opt_state, norms = stepped(params, opt_state, images, labels)
    state, logs = trained(trainer, batches)
    chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-6)
    figures = opt_state[0]
    np.testing.assert_allclose(logs[-1]["median_norm"], figures.median_norm, rtol=1e-4)
    np.testing.assert_array_equal(logs[-1]["num_clipped"], figures.num_clipped)
    np.testing.assert_allclose(logs[-1]["norms"], norms, rtol=1e-4)
    assert logs[-1]["num_clipped"].max() > 0


@pytest.mark.parametrize("method", slow.but(["ps-clip-median"], ["ps-clip", "ps-clip-median"]))
def test_devices_that_share_a_batch_clip_the_same_groups(method: Any):
    alone, (_, batches) = trainer_of(method, "layer")
    shared, _ = trainer_of(method, "layer", data_parallel_mesh())
    results = [trained(trainer, batches) for trainer in (alone, shared)]
    chex.assert_trees_all_close(*(state.params for state, _ in results), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(*(logs for _, logs in results), rtol=1e-4, atol=1e-6)


def test_a_layer_is_a_module_with_parameters_of_its_own():
    nested = parameter_groups("layer", shapes_of("resnet18"))
    names = jax.tree.leaves(nested)
    assert len(set(names)) == len(names)
    params = shapes_of("resnet18")
    parts = jax.tree.structure(nested).flatten_up_to(params)
    assert all("kernel" in part or "scale" in part for part in parts)
    leaves = jax.tree.leaves(parameter_groups("leaf", params))
    assert len(leaves) == len(jax.tree.leaves(params)) > len(names)
    assert parameter_groups("all", params) is None


def test_a_leaf_beside_modules_is_a_group_of_its_own():
    params = {"position": 1.0, "block": {"kernel": 1.0, "bias": 0.0}}
    assert parameter_groups("layer", params) == {"position": "position", "block": "block"}


@pytest.mark.parametrize("method", slow.but(["ps-clip-median"], ["ps-clip-auto", "ps-clip-median"]))
def test_killed_run_by_layer_goes_on_to_the_same_bits(
    method: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {"method": method, "clip_groups": "layer"}
    expected, _ = run(tiny(tmp_path / "one", **options))
    run_until_killed(tiny(tmp_path / "two", **options), 8, monkeypatch)
    resumed, _ = run(tiny(tmp_path / "two", **options, resume=True))
    assert_same_run(resumed, expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Run with all parameters together, and by layer."""
    root = tmp_path_factory.mktemp("pair")
    for groups in ("all", "layer"):
        run(tiny(root / groups, method="ps-clip-median", clip_groups=groups, tensorboard=True))
    return {groups: root / groups for groups in ("all", "layer")}


def test_records_hold_each_group_and_the_whole(pair: dict[str, pathlib.Path]):
    whole, by_layer = ([r for r in records(pair[g]) if r["kind"] == "train"] for g in pair)
    assert "groups" not in whole[0]
    # In the first batch both have the same gradients.
    for name in ("norm_q50", "norm_max", "num_norms", "num_samples", "num_nonfinite"):
        assert by_layer[0][name] == pytest.approx(whole[0][name], rel=1e-5)
    for record in by_layer:
        assert list(record["groups"]) == LAYERS
        shares = [own["clipped_share"] for own in record["groups"].values()]
        assert record["clipped_share"] == pytest.approx(np.mean(shares))
        assert not {"median_norm", "max_norm", "threshold_scale"} & record.keys()
    first = by_layer[0]["groups"]
    assert all(own["threshold_scale"] > 0 for own in first.values())
    assert (
        math.hypot(*(own["max_norm"] for own in first.values())) >= by_layer[0]["norm_max"] - 1e-4
    )
    config = json.loads((pair["layer"] / "config.json").read_text())["config"]
    assert config["clip_groups"] == "layer"


def test_runs_by_group_are_drawn_beside_others(pair: dict[str, pathlib.Path]):
    found = [one for folder in pair.values() for one in read_runs(folder)]
    assert labels_of(found) == ["clip-groups all", "clip-groups layer"]
    clipped = draw_runs(found).axes[2]
    # Two runs with details: a thin line and its running mean each.
    shares = [r["clipped_share"] for r in records(pair["layer"]) if r["kind"] == "train"]
    np.testing.assert_allclose(clipped.lines[2].get_ydata(), shares)


def test_tensorboard_shows_each_group(pair: dict[str, pathlib.Path]):
    pytest.importorskip("tensorboard", reason="reads what was written for it")
    from tests.training.run.test_tensorboard import scalars

    found = scalars(pair["layer"] / "tensorboard")
    record = [r for r in records(pair["layer"]) if r["kind"] == "train"][-1]
    for name, own in record["groups"].items():
        for figure in ("clipped_share", "median_norm", "threshold_scale"):
            assert found[f"train/{figure}/{name}", record["step"]] == pytest.approx(own[figure])


def test_a_run_of_an_earlier_version_goes_on_with_all_groups_together(
    pair: dict[str, pathlib.Path],
):
    path = pair["all"] / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["clip_groups"], content["config"]["record_samples"]
    path.write_text(json.dumps(content))
    same: dict[str, Any] = {"method": "ps-clip-median", "tensorboard": True, "resume": True}
    run(tiny(pair["all"], **same))
    with pytest.raises(UsageError, match="--clip-groups is leaf, was all"):
        run(tiny(pair["all"], clip_groups="leaf", **same))


def test_what_is_not_finite_is_null_in_a_group():
    metrics = {
        "loss": np.float32(1),
        "clipped_share": np.array([0.0, 1.0]),
        "max_norm": np.array([np.inf, 1]),
    }
    assert recorded(metrics, ["a", "b"])["groups"]["a"]["max_norm"] == math.inf
    assert recorded({"loss": np.float32(1)}, None) == {"loss": 1.0}


@pytest.mark.parametrize("clip_at", slow.but(["micro-batch"], ["sample", "micro-batch"]))
def test_progress_says_what_is_clipped(clip_at: str, tmp_path: pathlib.Path):
    options: dict[str, Any] = {"clip_groups": "leaf", "clip_at": clip_at, "accumulate": 4}
    _, told = run(tiny(tmp_path, method="ps-clip", steps=2, **options))
    assert "per-sample clipping, running median, by leaf" in told
    (record, *_) = records(tmp_path)
    assert len(record["groups"]) == 6
