"""Check that the printed plan is that of the train step."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import pytest

import psclip_optax as psc
from psclip_optax.training.command.explanation import explain
from psclip_optax.training.config.commands import ExplainConfig, UsageError
from psclip_optax.training.data.datasets import dataset_shape, load_dataset
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss
from tests.training.data.test_datasets import unpack
from tests.training.official_archives import OfficialArchive


def test_plan_is_the_engine_s_of_a_batch():
    digits = load_dataset("digits")
    model = build_model("small_cnn", 10, width=0.25)
    images, labels = digits.train.images[:8].astype("float32"), digits.train.labels[:8]
    params = model.init(jax.random.key(0), images)["params"]
    f = psc.clipped_value_and_grad(classification_loss(model), 1.0, has_aux=True, mode="two_pass")
    plan: Any = f
    expected = plan.explain(params, images, labels)
    config = ExplainConfig(model="small_cnn", width=0.25, batch_size=8, engine="two_pass")
    assert explain(config) == expected


@pytest.mark.parametrize(
    ("options", "mode", "num_samples"),
    [
        ({}, "one_pass", 64),
        ({"engine": "vmap", "batch_size": 16}, "vmap", 16),
        ({"accumulate": 4}, "one_pass", 16),
        ({"accumulate": 4, "clip_at": "micro-batch"}, "micro-batch", 16),
        ({"dropout": 0.5}, "one_pass", 64),
        ({"dataset": "cifar10", "model": "small_cnn", "width": 0.1}, "one_pass", 64),
    ],
)
def test_options_are_those_of_train(options: dict[str, Any], mode: str, num_samples: int):
    plan = explain(ExplainConfig(**options))
    assert (plan.mode, plan.num_samples) == (mode, num_samples)


def test_groups_are_those_of_train():
    config = {"model": "small_cnn", "width": 0.25, "batch_size": 8}
    together, by_layer, by_leaf = (
        explain(ExplainConfig(**config, clip_groups=groups)) for groups in ("all", "layer", "leaf")
    )
    assert {row.group for row in together.rows} == {None}
    assert [row.group for row in by_layer.rows] == [n for n in range(6) for _ in range(2)]
    assert [row.group for row in by_leaf.rows] == [*range(12)]
    assert all(row.is_fused for row in by_layer.rows)


def test_model_that_does_not_take_the_images_is_refused():
    with pytest.raises(UsageError, match="--model alexnet: AlexNet takes images"):
        explain(ExplainConfig(model="alexnet"))


def test_shapes_are_those_of_the_data(archive: OfficialArchive, tmp_path: pathlib.Path):
    unpack(archive, tmp_path)
    for dataset in (load_dataset(archive.dataset, data_dir=tmp_path), load_dataset("digits")):
        assert dataset_shape(dataset.name) == (dataset.image_shape, dataset.num_classes)
