"""Explain the plan for a model of `psclip train`: `psclip explain`."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from psclip_optax.clipped_grad import clipped_value_and_grad
from psclip_optax.engine.explain import Plan
from psclip_optax.training.config.checks import check_config
from psclip_optax.training.config.commands import ExplainConfig, ModelConfig, TaskConfig
from psclip_optax.training.data.datasets import dataset_shape
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.run.groups import parameter_groups
from psclip_optax.training.run.methods import build_gradients
from psclip_optax.training.run.trainer import build_task_model


def explain(config: ExplainConfig) -> Plan:
    """Plans a train step: each parameter's route, its extra cost, and the reason.

    Nothing is trained or downloaded, because a plan needs only shapes.

    Args:
      config: names model, dataset, batch size, engine and clipping groups.

    Returns:
      The plan of `clipped_value_and_grad(…).explain`, to be printed. If the batch is processed in
      slices, the plan is for one slice.

    Raises:
      UsageError: a number is out of range, or the model does not accept the dataset's images.

    Examples:
      >>> plan = explain(ExplainConfig(model="small_cnn", width=0.25, batch_size=8))
      >>> sorted({row.route for row in plan.rows})
      ['conv', 'dense', 'direct']
    """
    check_config(config)
    shape = dataset_shape(config.dataset)
    model = build_task_model(config, shape)
    n, has_dropout = config.batch_size, config.dropout > 0
    image = jnp.zeros((n, *shape.image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), image[:1])
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["params"])
    keys = (jax.random.split(jax.random.key(0), n),) if has_dropout else ()
    # Options of the train step that choose the threshold do not change the plan.
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    options = build_gradients("ps-clip", TaskConfig(**own))
    groups = parameter_groups(config.clip_groups, params)
    value_and_grad = clipped_value_and_grad(
        classification_loss(model, dropout=has_dropout),
        math.inf if groups is None else jax.tree.map(lambda _: math.inf, groups),
        has_aux=True,
        mode=options["mode"],
        microbatch_size=options["microbatch_size"],
        clip_at=options["clip_at"],
    )
    labels = jnp.zeros(n, jnp.int32)
    return value_and_grad.explain(params, image, labels, *keys)
