"""Build the model, train step, batches and evaluation of `psclip train` and `psclip compare`."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import psclip_optax
from psclip_optax.training.config.commands import (
    ClipGroupsName,
    MethodName,
    ModelConfig,
    TaskConfig,
    UsageError,
)
from psclip_optax.training.data.corruptions import corrupt
from psclip_optax.training.data.pipeline import Batch, evaluation_batches, iterate, train_batches
from psclip_optax.training.data.splits import Dataset, DatasetShape, Split
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.run.distributed import (
    replicate,
    shard_batch,
)
from psclip_optax.training.run.groups import parameter_groups, whole_norms
from psclip_optax.training.run.methods import (
    METHODS,
    Hyperparams,
    build_gradients,
    build_optimizer,
    gradient_figures,
    learning_rate_of,
    learning_rate_schedule,
    method_that_clips,
    with_hyperparams,
)
from psclip_optax.training.steps import Metrics, linen_train_step

_EVALUATION_BATCH_SIZE = 500


_LIBRARIES = ("jax", "jaxlib", "optax", "flax", "grain", "orbax-checkpoint", "numpy")


class Trainer(NamedTuple):
    """A method on a model, compiled once for all seeds, learning rates and thresholds.

    Attributes:
      init: (seed, hyperparams) → the initial state.
      step: (state, key, batch) → the next state and metrics, which are scalars or, by group,
        arrays; the state is donated. "norms" and "samples" are among the metrics if requested.
      groups: the groups of parameters, as named by `parameter_groups`.
    """

    init: Callable[[int, Hyperparams], TrainState]
    step: Callable[[TrainState, jax.Array, dict[str, Any]], tuple[TrainState, Metrics]]
    groups: Any = None


def build_task_model(config: ModelConfig, dataset: Dataset | DatasetShape) -> nn.Module:
    """Builds the classifier, and checks that it accepts the images of the data set.

    Args:
      config: names the model, its width and dropout rate.
      dataset: the data set, or its shapes.

    Returns:
      A Linen module.

    Raises:
      UsageError: the model does not accept these images.

    Examples:
      >>> from psclip_optax.training import load_dataset
      >>> build_task_model(TaskConfig(model="alexnet"), load_dataset("digits"))
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: --model alexnet: AlexNet takes images ...
    """
    model = build_model(
        config.model, dataset.num_classes, width=config.width, dropout_rate=config.dropout
    )
    try:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    except ValueError as error:
        raise UsageError(f"--model {config.model}: {error}") from error
    return model


def build_trainer(
    name: MethodName,
    model: nn.Module,
    dataset: Dataset,
    config: TaskConfig,
    num_steps: int,
    mesh: Mesh | None = None,
    *,
    return_norms: bool = False,
    return_samples: bool = False,
    clip_groups: ClipGroupsName = "all",
) -> Trainer:
    """Builds a method's initialisation and train step.

    Args:
      name: one of `METHODS`.
      model: the classifier.
      dataset: the data set, for the shape of an image.
      config: names dropout rate, momentum and schedule.
      num_steps: length of a run, for the schedule.
      mesh: the mesh of the devices that share each batch; None for one device. With a mesh a batch
        is this process's slice, and a step's results are on all devices.
      return_norms: whether the metrics of per-sample methods include "norms", those of the clipped
        gradients, `[n]`, or one for each micro-batch.
      return_samples: whether the metrics include "samples", as in `gradient_function`, with the
        "index" of each; only for methods that clip samples.
      clip_groups: which parameters are clipped together.

    Returns:
      The trainer. A batch is a dict with `image`, `label` and `position`, and `index` if samples
      are returned, as from `train_batches`. The key is the dropout key; each sample's key is
      derived from it by step and position.

    Examples:
      >>> from psclip_optax.training import load_dataset
      >>> digits, config = load_dataset("digits"), TaskConfig(width=0.1)
      >>> trainer = build_trainer("ps-clip", build_task_model(config, digits), digits, config, 10)
      >>> batch = training_batches(digits.train, digits, config, seed=0)[0]
      >>> state = trainer.init(0, Hyperparams(learning_rate=0.1, threshold=1.0, beta=1.5))
      >>> state, metrics = trainer.step(state, jax.random.key(0), batch)
      >>> int(state.step), int(metrics["num_samples"])
      (1, 64)
    """
    name = method_that_clips(name, config.clip_at)
    schedule = learning_rate_schedule(config.schedule, num_steps)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: _initial_params(key, model, dataset.image_shape))
    groups = parameter_groups(clip_groups, shapes)
    tx = build_optimizer(
        name,
        Hyperparams(0.0, 0.0, 1.0),
        momentum=config.momentum,
        schedule=schedule,
        groups=groups,
    )
    has_dropout = config.dropout > 0
    loss = classification_loss(model, dropout=has_dropout)
    return_norms = return_norms and METHODS[name].threshold is not None
    gradients = build_gradients(name, config, groups)
    by_sample = gradients.get("clip_at") == "sample"
    returned = {"return_norms": return_norms, "return_samples": return_samples}
    update = linen_train_step(loss, has_aux=True, **returned, **gradients)

    def init(seed: int, hyperparams: Hyperparams) -> TrainState:
        params = _initial_params(jax.random.key(seed), model, dataset.image_shape)
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        opt_state = with_hyperparams(state.opt_state, hyperparams)
        # An array from the start: with a Python number the step would be compiled twice.
        state = state.replace(step=jnp.int32(0), opt_state=opt_state)
        return state if mesh is None else replicate(mesh, state)

    everywhere = None if mesh is None else NamedSharding(mesh, P())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def compiled_step(
        state: TrainState, key: jax.Array, image: Any, label: Any, position: Any, index: Any = None
    ) -> tuple[TrainState, Metrics]:
        keys = (_sample_keys(key, state.step, position),) if has_dropout else ()
        learning_rate = learning_rate_of(state.opt_state) * schedule(state.step)
        positions = position if by_sample else None
        state, metrics = update(state, image, label, *keys, positions=positions)
        if index is not None:  # of the whole batch, if processes share it
            metrics = metrics | {"samples": metrics["samples"] | {"index": index}}
        metrics = metrics | gradient_figures(state.opt_state)
        if return_norms:
            metrics["norms"] = whole_norms(metrics["norms"])
        return state, _named_metrics(metrics) | {"learning_rate": learning_rate}

    def step(state: TrainState, key: jax.Array, batch: Batch) -> tuple[TrainState, Metrics]:
        names = ("image", "label", "position", *["index"] * return_samples)
        arrays = tuple(batch[name] for name in names)
        if mesh is not None:
            arrays, key = shard_batch(mesh, arrays), replicate(mesh, key)
        return compiled_step(state, key, *arrays)

    return Trainer(init, step, groups)


def dropout_key(seed: int) -> jax.Array:
    """Makes the key of a run's dropout, which differs from that of the initial parameters.

    Args:
      seed: seed of the run.

    Returns:
      A scalar key, for `Trainer.step`.

    Examples:
      >>> bool(dropout_key(0) == jax.random.key(0))
      False
    """
    return jax.random.fold_in(jax.random.key(seed), 1)


def training_batches(
    split: Split,
    dataset: Dataset,
    config: TaskConfig,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset[Batch]:
    """Corrupts a training split and batches it.

    Args:
      split: clean examples.
      dataset: whose pixels' mean and standard deviation normalise the images.
      config: names the corruption, the batch size and the augmentation.
      seed: seed of the corruption and of the order.
      process_index: which slice of each batch to load.
      process_count: the number of slices.

    Returns:
      The result of `train_batches`.

    Examples:
      >>> from psclip_optax.training import load_dataset
      >>> digits = load_dataset("digits")
      >>> training_batches(digits.train, digits, TaskConfig(), seed=0)[0]["image"].shape
      (64, 8, 8, 1)
    """
    corrupted = corrupt(
        split,
        num_classes=dataset.num_classes,
        label_noise=config.label_noise,
        pixel_df=config.pixel_df,
        seed=seed,
    )
    return train_batches(
        corrupted,
        batch_size=config.batch_size,
        seed=seed,
        mean=dataset.pixel_mean,
        std=dataset.pixel_std,
        augment=config.augment,
        process_index=process_index,
        process_count=process_count,
    )


def build_evaluation(
    eval_step: Callable[..., Metrics], split: Split, dataset: Dataset, mesh: Mesh | None = None
) -> Callable[[Any], dict[str, float]]:
    """Builds the evaluation on a split.

    Args:
      eval_step: what `linen_eval_step` returned, for the `classification_loss` of a model.
      split: clean examples.
      dataset: whose pixels' mean and standard deviation normalise the images.
      mesh: the mesh of the devices that share each batch and have the parameters; None for one
          device.

    Returns:
      A function from parameters to `loss`, the mean cross-entropy, and `accuracy`.

    Examples:
      >>> from psclip_optax.training import linen_eval_step, load_dataset
      >>> digits = load_dataset("digits")
      >>> model = build_task_model(TaskConfig(), digits)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, *digits.image_shape)))
      >>> eval_step = linen_eval_step(classification_loss(model), has_aux=True)
      >>> figures = build_evaluation(eval_step, digits.test, digits)(variables["params"])
      >>> 0 <= figures["accuracy"] < 0.5
      True
    """
    num_devices = 1 if mesh is None else mesh.size
    batches = evaluation_batches(
        split,
        batch_size=-(-_EVALUATION_BATCH_SIZE // num_devices) * num_devices,
        mean=dataset.pixel_mean,
        std=dataset.pixel_std,
        process_index=0 if mesh is None else jax.process_index(),
        process_count=1 if mesh is None else jax.process_count(),
    )

    def evaluate(params: Any) -> dict[str, float]:
        shares = (batch for _, batch in iterate(batches, 0, len(batches)))
        whole = shares if mesh is None else (shard_batch(mesh, batch) for batch in shares)
        sums = [
            eval_step(params, batch["image"], batch["label"], sample_mask=batch["mask"])
            for batch in whole
        ]
        total = {name: sum(float(part[name]) for part in sums) for name in ("loss", "aux", "count")}
        return {
            "loss": total["loss"] / total["count"],
            "accuracy": total["aux"] / total["count"],
        }

    return evaluate


def provenance() -> dict[str, Any]:
    """Returns the versions and the device that produced a result.

    Returns:
      A dict that can be written as JSON.

    Examples:
      >>> sorted(provenance())
      ['device', 'platform', 'python', 'versions']
    """
    device = jax.devices()[0]
    return {
        "versions": {
            "psclip_optax": psclip_optax.__version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{len(jax.devices())} × {device.platform} ({device.device_kind})",
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _initial_params(key: jax.Array, model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    return model.init(key, jnp.zeros((1, *image_shape)))["params"]


def _sample_keys(key: jax.Array, step: Any, positions: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, step)))(positions)


def _named_metrics(metrics: Metrics) -> Metrics:
    # The step's mean is over the finite losses, and 0 if there is none, which would look like a
    # perfect fit in a run that diverged.
    number = metrics.get("num_microbatches", metrics.get("num_samples", 1))
    is_finite = metrics["num_nonfinite"] < number
    named = {name: value for name, value in metrics.items() if name != "aux"}
    return named | {
        "loss": jnp.where(is_finite, metrics["loss"], jnp.nan),
        "accuracy": metrics["aux"],
    }
