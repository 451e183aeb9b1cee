"""Times the train steps of the methods of `benchmarks.cifar100.budgets`, for a single run."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax.training.train_state import TrainState

import psclip_optax as psc
from benchmarks.cifar100.budgets_report import AUTOMATIC, BATCH, CONSTANT, STACKED, UNCLIPPED
from benchmarks.cifar100.tuned import Trainer
from benchmarks.common.timing import quartiles
from benchmarks.engine.accumulation import Compiled, time_windows
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss
from psclip_optax.training.steps import linen_train_step

THRESHOLD = 1.0  # the time does not depend on it
STEPS_IN_WINDOW = 8


def build_ways() -> dict[str, tuple[optax.GradientTransformation, dict[str, Any]]]:
    """Builds the optimizer of each method, and the options of its train step."""
    momentum = optax.sgd(0.01, momentum=0.9)
    clipping_batches = optax.chain(optax.clip_by_global_norm(THRESHOLD), momentum)
    clipping_samples = optax.chain(psc.per_sample_clip(THRESHOLD), momentum)
    return {
        UNCLIPPED: (momentum, {"gradients": "mean"}),
        BATCH: (clipping_batches, {"gradients": "mean"}),
        CONSTANT: (momentum, {"threshold": THRESHOLD, "mode": "one_pass"}),
        AUTOMATIC: (optax.chain(psc.track_norms(), momentum), {"mode": "one_pass"}),
        STACKED: (clipping_samples, {}),
    }


def time_steps(batch_size: int, train: Trainer) -> dict[str, Any]:
    """Times windows of train steps, interleaved, and returns quartiles of the time of a step.

    Args:
      batch_size: samples in a step.
      train: the trainer, whose data and options define the model.
    """
    size, key = train.image_size, jax.random.key(0)
    model = build_model("alexnet", train.num_classes, width=train.options.width)
    images = jax.random.normal(key, (batch_size, size, size, 3))
    labels = jax.random.randint(key, (batch_size,), 0, train.num_classes)
    params = model.init(key, images[:1])["params"]
    loss = classification_loss(model)

    def build(tx: optax.GradientTransformation, options: dict[str, Any]) -> Compiled:
        step = linen_train_step(loss, has_aux=True, **options)
        # A step donates its state, so each gets its own copy of the parameters.
        own = jax.tree.map(lambda leaf: leaf.copy(), params)
        state = TrainState.create(apply_fn=model.apply, params=own, tx=tx)
        compiled = jax.jit(lambda *batch: step(*batch)[0], donate_argnums=0)
        return Compiled(compiled.lower(state, images, labels).compile(), state, (images, labels))

    seconds = time_windows(
        {name: build(*way) for name, way in build_ways().items()},
        train.options.rounds(),
        STEPS_IN_WINDOW,
    )
    baseline = seconds[UNCLIPPED]
    return {
        name: {
            "seconds_quartiles": [q / STEPS_IN_WINDOW for q in quartiles(own)],
            "ratio_quartiles": quartiles([t / b for t, b in zip(own, baseline, strict=True)]),
        }
        for name, own in seconds.items()
    }
