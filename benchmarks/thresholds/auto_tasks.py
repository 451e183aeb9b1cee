"""Defines the conditions on which `benchmarks.thresholds.auto_threshold` trains.

Nothing here runs by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cifar100.runs import NOISES, Noise
from psclip_optax.training.data.corruptions import with_label_noise, with_student_t_pixels
from psclip_optax.training.data.datasets import load_dataset
from psclip_optax.training.data.splits import train_validation_split

NUM_VALIDATION = 300  # of the digits
FEATURES, NUM_TRAIN, NUM_HELD_OUT = 20, 1200, 800  # of randomly drawn data
MANY = 30_000  # training samples, if most steps should have new ones
CONTEXT = 3  # characters from which the next one is predicted
ACTIONS = 8
CHANCE_OF_REWARD = 1 / ACTIONS


class Split(NamedTuple):
    """Inputs [N, …], and labels or targets, arrays [N]."""

    inputs: Any
    targets: Any


class Data(NamedTuple):
    """The training data of one seed, and the held-out data."""

    train: Split
    validation: Split
    test: Split


class Kind(NamedTuple):
    """A kind of task.

    Attributes:
      num_outputs: the outputs of the net.
      loss: (outputs, target of one sample) → loss.
      score: (outputs [N, outputs], targets) → at most 1.
      chance: a net that has learned next to nothing scores less.
    """

    num_outputs: int
    loss: Callable[[jax.Array, Any], jax.Array]
    score: Callable[[jax.Array, Any], jax.Array]
    chance: float = 0.2


class Condition(NamedTuple):
    """A condition: the data of a task.

    Attributes:
      kind: one of KINDS.
      load: a function from a seed to the data.
      is_heavy: whether the gradients' tail index is below 2 by construction.
    """

    kind: str
    load: Callable[[int], Data]
    is_heavy: bool = False


# The kinds


def named_rightly(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(outputs, axis=-1) == labels)


def explained(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes R², or 0 if it is negative."""
    errors = jnp.mean(jnp.square(outputs[:, 0] - targets))
    return jnp.maximum(1 - errors / jnp.var(targets), 0)


def weighted_cross_entropy(outputs: jax.Array, target: tuple[jax.Array, jax.Array]) -> jax.Array:
    label, weight = target
    return weight * optax.softmax_cross_entropy_with_integer_labels(outputs, label)


def reinforce(outputs: jax.Array, target: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Computes −(R − b) log π(a) for an action drawn from the policy itself."""
    best, noise, uniform = target
    below = jnp.cumsum(jax.nn.softmax(jax.lax.stop_gradient(outputs)))
    action = jnp.minimum(jnp.sum(below < uniform), ACTIONS - 1)
    advantage = (action == best) + noise - CHANCE_OF_REWARD
    return -advantage * jax.nn.log_softmax(outputs)[action]


def of_label(score: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Scores by the first of several targets."""
    return lambda outputs, targets: score(outputs, targets[0])


CHARACTERS = sorted({character for text in topics.values() for character in text})
KINDS = {
    "digits": Kind(10, optax.softmax_cross_entropy_with_integer_labels, named_rightly),
    "regression": Kind(1, lambda out, target: jnp.square(out[0] - target) / 2, explained),
    # 22 % of the characters are spaces.
    "text": Kind(len(CHARACTERS), weighted_cross_entropy, of_label(named_rightly), 0.25),
    "policy": Kind(ACTIONS, reinforce, of_label(named_rightly)),
}


# The data


def digits(noise: Noise, seed: int, salt_and_pepper: bool = False) -> Data:
    dataset = load_dataset("digits")
    train, validation = train_validation_split(dataset.train, num_validation=NUM_VALIDATION, seed=0)
    labels = with_label_noise(train.labels, noise.label_noise, dataset.num_classes, seed)
    images = train.images
    if noise.pixel_df is not None:
        images = with_student_t_pixels(images, noise.pixel_df, seed)
    if salt_and_pepper:
        images = with_salt_and_pepper(images, seed)

    def flat(images: np.ndarray, labels: np.ndarray) -> Split:
        unit = images * np.float32(1 / 255 if images.dtype == np.uint8 else 1)
        normalized = (unit - dataset.pixel_mean) / dataset.pixel_std
        return Split(normalized.reshape(len(unit), -1).astype(np.float32), labels)

    test = flat(dataset.test.images, dataset.test.labels)
    return Data(flat(images, labels), flat(validation.images, validation.labels), test)


def with_salt_and_pepper(images: np.ndarray, seed: int) -> np.ndarray:
    """Sets 40 % of the pixels of a fifth of the images to black or white."""
    rng = np.random.default_rng([seed, 2])
    is_hit = (rng.random((len(images), 1, 1, 1)) < 0.2) & (rng.random(images.shape) < 0.4)
    return np.where(is_hit, images.max() * rng.integers(2, size=images.shape), images).astype(
        images.dtype
    )


def regression(df: float | None, seed: int) -> Data:
    """Makes targets tanh(2 u·x) + 0.3 x_1 with |u| = 1, with noise / 2 in the training data."""
    weights = np.random.default_rng(0).normal(size=FEATURES)
    weights *= 2 / np.linalg.norm(weights)
    rng = np.random.default_rng(seed + 1)
    inputs = rng.normal(size=(NUM_TRAIN + 2 * NUM_HELD_OUT, FEATURES)).astype(np.float32)
    targets = np.tanh(inputs @ weights) + 0.3 * inputs[:, 0]
    noise = rng.normal(size=NUM_TRAIN) if df is None else rng.standard_t(df, NUM_TRAIN)
    targets[:NUM_TRAIN] += noise / 2
    return in_parts(inputs, targets.astype(np.float32))


def in_parts(inputs: np.ndarray, targets: Any) -> Data:
    """Splits off the validation and the test data, which come last."""
    parts = np.split(np.arange(len(inputs)), [-2 * NUM_HELD_OUT, -NUM_HELD_OUT])
    samples = Split(inputs, targets)
    return Data(*(jax.tree.map(lambda x, own=own: x[own], samples) for own in parts))


def text(seed: int) -> Data:
    """Makes windows of the topics of Python's `help`; training losses have Student-t factors."""
    number_of = {character: number for number, character in enumerate(CHARACTERS)}
    tokens = np.array([number_of[c] for name in sorted(topics) for c in topics[name]], np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)
    rng = np.random.default_rng([seed, 3])
    held_out = round(0.8 * len(windows))
    own = windows[
        np.append(
            rng.integers(held_out - CONTEXT, size=MANY),
            rng.integers(held_out, len(windows), size=2 * NUM_HELD_OUT),
        )
    ]
    weights = np.abs(rng.standard_t(1.5, len(own))).astype(np.float32)
    return in_parts(own[:, :-1], (own[:, -1], weights))


def policy(seed: int) -> Data:
    """Makes contexts with one best action of a linear teacher, and Student-t noise of returns."""
    teacher = np.random.default_rng(0).normal(size=(FEATURES, ACTIONS))
    rng = np.random.default_rng([seed, 4])
    inputs = rng.normal(size=(MANY + 2 * NUM_HELD_OUT, FEATURES)).astype(np.float32)
    best = np.argmax(inputs @ teacher, axis=1).astype(np.int32)
    noise = rng.standard_t(1.5, len(inputs)).astype(np.float32) / 2
    uniforms = rng.random(len(inputs)).astype(np.float32)
    return in_parts(inputs, (best, noise, uniforms))


# Conditions on which the automatic threshold was chosen, and others.
CHOSEN_ON = {
    **{
        name: Condition("digits", functools.partial(digits, noise))
        for name, noise in NOISES.items()
    },
    "heavy pixels": Condition("digits", functools.partial(digits, NOISES["heavy pixels"]), True),
    "Gaussian targets": Condition("regression", functools.partial(regression, None)),
    "heavy targets": Condition("regression", functools.partial(regression, 1.5), True),
}
HELD_OUT = {
    "10% labels": Condition("digits", functools.partial(digits, Noise(label_noise=0.1))),
    "salt and pepper": Condition(
        "digits", functools.partial(digits, Noise(), salt_and_pepper=True)
    ),
    "heavier targets": Condition("regression", functools.partial(regression, 1.2), True),
    "heavy losses of text": Condition("text", text, True),
    "heavy returns": Condition("policy", policy, True),
}
CONDITIONS = CHOSEN_ON | HELD_OUT


def load(condition: str, seeds: int) -> Data:
    """Loads the data of all seeds, stacked on the first axis."""
    own = [CONDITIONS[condition].load(seed) for seed in range(seeds)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *own)


# The nets


def features(inputs: jax.Array) -> jax.Array:
    """Encodes characters as flat one-hot vectors; other inputs do not change."""
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        return inputs
    return jax.nn.one_hot(inputs, len(CHARACTERS)).reshape(*inputs.shape[:-1], -1)


def initial_params(key: jax.Array, sizes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(own, (into, out)) * (2 / into) ** 0.5, jnp.zeros(out))
        for own, into, out in zip(keys, sizes, sizes[1:], strict=False)
    ]


def outputs(params: Any, inputs: jax.Array) -> jax.Array:
    *hidden, (kernel, bias) = params
    inputs = features(inputs)
    for own_kernel, own_bias in hidden:
        inputs = jax.nn.relu(inputs @ own_kernel + own_bias)
    return inputs @ kernel + bias


def score(kind: Kind, params: Any, split: Split) -> jax.Array:
    """Computes the score; 0 if an output is not finite."""
    out = outputs(params, split.inputs)
    return jnp.where(jnp.all(jnp.isfinite(out)), kind.score(out, split.targets), 0)
