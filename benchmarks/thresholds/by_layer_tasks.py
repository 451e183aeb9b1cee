"""Defines the tasks of `benchmarks.thresholds.by_layer`: AlexNet on images, a GPT on text.

Nothing here runs on its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cifar100.images import normalized, shifted_and_mirrored
from benchmarks.cifar100.many_runs import NOISES, build_loss, corrupted
from benchmarks.cifar100.runs import load_data
from benchmarks.zoo.models import GPT
from psclip_optax.training.data.splits import Dataset
from psclip_optax.training.models.classifiers import build_model

Arrays: TypeAlias = tuple[Any, ...]
IMAGES_IN_BATCH, WINDOWS_IN_BATCH = 32, 16
LENGTH = 64  # predicted characters in a window
HELD_OUT = 0.1  # share of the text for validation, and the same for the test
WEIGHT_DECAY = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A learning task.

    Attributes:
      name: the name in tables.
      conditions: the conditions of the training data.
      init: key → parameters.
      loss: (parameters, *example) → loss, accuracy.
      batches: (condition, seed, number of steps) → arrays [n, …] for each step.
      examples: (key, *arrays) → the loss's arguments, with images shifted and mirrored.
      held_out: the loss's arguments, by "validation" and "test".
      optimizer: the optimizer without its learning rate.
      steps: the steps of tested runs; trials have half as many.
      rates: the learning rates for thresholds of about the norm.
      feels_scale: whether a step is proportional to its gradient; then rates are larger for small
        thresholds.
      described: the description of data and model in a finished run.
    """

    name: str
    conditions: tuple[str, ...]
    init: Callable[[jax.Array], Any]
    loss: Callable[..., Any]
    batches: Callable[[str, int, int], Iterator[Arrays]]
    examples: Callable[..., Arrays]
    held_out: dict[str, Arrays]
    optimizer: optax.GradientTransformation
    steps: int
    rates: tuple[float, ...]
    feels_scale: bool
    described: dict[str, Any]


def indices(num_examples: int, batch_size: int, seed: int, steps: int) -> Iterator[np.ndarray]:
    """Yields batches of a random order, then of another one, and so on."""
    rng = np.random.default_rng([seed, 1])
    order = np.zeros(0, int)
    for _ in range(steps):
        if len(order) < batch_size:
            order = rng.permutation(num_examples)
        yield order[:batch_size]
        order = order[batch_size:]


def alexnet(dataset: Dataset, width: float, num_validation: int, steps: int) -> Task:
    """Makes the task of AlexNet with momentum SGD under the noises of the other comparisons."""
    data = load_data(dataset, num_validation)
    model = build_model("alexnet", dataset.num_classes, width=width)
    images = np.asarray(data.train.images)

    def batches(condition: str, seed: int, steps: int) -> Iterator[Arrays]:
        own = corrupted(data.train, NOISES[condition], dataset.num_classes, seed)
        for chosen in indices(len(images), IMAGES_IN_BATCH, seed, steps):
            yield images[chosen], own.labels[chosen], own.factors[chosen]

    def examples(key: jax.Array, images: Any, labels: Any, factors: Any) -> Arrays:
        return shifted_and_mirrored(key, normalized(images, factors, data)), labels

    held_out = {
        name: (normalized(split.images, jnp.ones(len(split.images)), data), split.labels)
        for name, split in (("validation", data.validation), ("test", data.test))
    }
    return Task(
        name="AlexNet",
        # The largest differences come first, because the time limit may end the list.
        conditions=("heavy pixels", "clean", "40% labels", "20% labels"),
        init=lambda key: model.init(key, jnp.zeros((1, *dataset.image_shape)))["params"],
        loss=build_loss(model, as_products=False),
        batches=batches,
        examples=examples,
        held_out=held_out,
        optimizer=optax.trace(0.9),
        steps=steps,
        rates=(0.005, 0.015, 0.05),
        feels_scale=True,
        described={"data": dataset.name, "width": width, "batch_size": IMAGES_IN_BATCH},
    )


def corpus() -> str:
    """Reads the topics of Python's `help`, each paragraph once, because they quote one another."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return "\n\n".join(dict.fromkeys(text.split("\n\n")))


def language_model(dim: int, layers: int, steps: int) -> Task:
    """Makes the task of a GPT with AdamW on the characters of a text, a fifth of it held out."""
    text = corpus()
    vocabulary = sorted(set(text))
    number_of = {character: number for number, character in enumerate(vocabulary)}
    tokens = np.array([number_of[character] for character in text], np.int32)
    ends = [round(share * len(tokens)) for share in (1 - 2 * HELD_OUT, 1 - HELD_OUT)]
    training, validation, test = np.split(tokens, ends)
    model = GPT(len(vocabulary), dim, layers, heads=4, tied=False, scanned=False)

    def loss(params: Any, window: jax.Array) -> Any:
        logits: Any = model.apply({"params": params}, window[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[1:])
        return losses.mean(), jnp.mean(jnp.argmax(logits, axis=-1) == window[1:])

    def batches(condition: str, seed: int, steps: int) -> Iterator[Arrays]:
        del condition
        windows = np.lib.stride_tricks.sliding_window_view(training, LENGTH + 1)
        for chosen in indices(len(windows), WINDOWS_IN_BATCH, seed, steps):
            yield (windows[chosen],)

    return Task(
        name="GPT",
        conditions=("text",),
        init=lambda key: model.init(key, jnp.zeros(LENGTH, int))["params"],
        loss=loss,
        batches=batches,
        examples=lambda key, windows: (windows,),
        held_out={"validation": (side_by_side(validation),), "test": (side_by_side(test),)},
        optimizer=optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(WEIGHT_DECAY)),
        steps=steps,
        rates=(0.001, 0.003, 0.01),
        feels_scale=False,
        described={
            "data": hashlib.sha256(text.encode()).hexdigest()[:16],
            "characters": len(text),
            "dim": dim,
            "layers": layers,
            "batch_size": WINDOWS_IN_BATCH,
        },
    )


def side_by_side(tokens: np.ndarray) -> jax.Array:
    """Makes windows that predict each character at most once."""
    number = (len(tokens) - 1) // LENGTH
    starts = LENGTH * np.arange(number)[:, None]
    return jnp.asarray(tokens[starts + np.arange(LENGTH + 1)])
