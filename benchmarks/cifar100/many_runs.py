"""Train many classifiers at once, so that a tuning grid costs little more than one run on a GPU.

All methods of the comparisons are the same program with different numbers: plain SGD clips at ∞, a
constant threshold grows with exponent 0. So runs of all methods are vmapped together, and differ in
nothing else. A finished run is stored, and not run again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

import psclip_optax as psc
from benchmarks.cifar100.images import normalized, shifted_and_mirrored
from benchmarks.cifar100.runs import (
    NOISES,
    QUANTILES,
    Data,
    Example,
    Numbers,
    Run,
    Setting,
    as_json,
    corrupted,
    record_of,
    tail_figures,
)
from benchmarks.common.cache import RunsCache
from benchmarks.common.machine import describe_machine
from psclip_optax.training.data.splits import Split
from psclip_optax.training.models.classifiers import build_model

MOMENT = 1.5  # p of the automatic threshold, which grows like k^(1/p)
EVALUATION_BATCH_SIZE = 500


def check_noises(noises: Sequence[str]) -> None:
    unknown = [noise for noise in noises if noise not in NOISES]
    if unknown or not noises:
        raise ValueError(f"noises are of {', '.join(NOISES)}, got {', '.join(unknown) or 'none'}")


class State(NamedTuple):
    """The state of a run between two steps."""

    params: Any
    opt_state: Any
    rule: Any
    step: jax.Array


def convolutions_as_products(
    call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Intercepts `nn.Conv` to compute one product of the kernel with unfolded windows.

    Under vmap over runs, a convolution whose kernels differ becomes a grouped convolution, for
    which libraries have no fast kernel; a product becomes a batched product.
    """
    conv = context.module
    if not isinstance(conv, nn.Conv) or context.method_name != "__call__":
        return call(*args, **kwargs)
    (x,) = args
    kernel, bias = (conv.get_variable("params", name) for name in ("kernel", "bias"))
    height, width, channels, features = kernel.shape
    stride = conv.strides if isinstance(conv.strides, int) else 1
    (rows, rows_pad), (columns, columns_pad) = (
        _same_padding(size, window, stride)
        for size, window in zip(x.shape[-3:-1], (height, width), strict=True)
    )
    padding = [(0, 0)] * (x.ndim - 3) + [rows_pad, columns_pad, (0, 0)]
    padded = jnp.pad(x, padding)
    windows = jnp.concatenate(
        [
            padded[
                ...,
                i : i + stride * (rows - 1) + 1 : stride,
                j : j + stride * (columns - 1) + 1 : stride,
                :,
            ]
            for i in range(height)
            for j in range(width)
        ],
        axis=-1,
    )
    return windows @ kernel.reshape(height * width * channels, features) + bias


def _same_padding(size: int, window: int, stride: int) -> tuple[int, tuple[int, int]]:
    """Computes outputs, and zeros before and after, as XLA does for "SAME"."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + window - size, 0)
    return outputs, (total // 2, total - total // 2)


def build_loss(
    model: nn.Module, dtype: str = "float32", *, as_products: bool = True
) -> Callable[..., Any]:
    """Builds the loss and accuracy for one image, by default with few convolutions."""

    def loss(params: Any, image: jax.Array, label: Any) -> Any:
        params, image = jax.tree.map(lambda x: x.astype(dtype), (params, image))
        with (
            nn.intercept_methods(convolutions_as_products)
            if as_products
            else contextlib.nullcontext()
        ):
            logits = model.apply({"params": params}, image[None])[0].astype(jnp.float32)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return value, (jnp.argmax(logits) == label).astype(jnp.float32)

    return loss


class Program(NamedTuple):
    """The compiled functions over R runs at once.

    Attributes:
      init: seeds [R] → state.
      epoch: (state, numbers, examples, keys, total steps, data) → state, statistics of the epoch.
      accuracy: (parameters, images, labels) → accuracy and mean loss, [R].
    """

    init: Callable[..., State]
    epoch: Callable[..., Any]
    accuracy: Callable[..., Any]


def moment_rule(scale: Any) -> psc.AdaptiveThreshold[Any]:
    return psc.moment_threshold(MOMENT, scale=scale)


def build_optimizer(name: str, momentum: Any) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer with a learning rate of 1; updates are scaled by the rate later."""
    return optax.adamw(1.0) if name == "AdamW" else optax.sgd(1.0, momentum=momentum)


@functools.cache
def build_program(
    setting: Setting,
    num_classes: int,
    image_shape: tuple[int, ...],
    automatic: Callable[[Any], psc.AdaptiveThreshold[Any]] = moment_rule,
) -> Program:
    """Builds the program that trains runs of one setting; it compiles at its first call.

    Args:
      setting: the setting that the runs share.
      num_classes: number of labels.
      image_shape: [H, W, C].
      automatic: scale → rule of the runs whose scale is not 0.
    """
    model = build_model("alexnet", num_classes, width=setting.width)
    loss = build_loss(model, setting.dtype)
    number = setting.num_microbatches
    value_and_grad = psc.clipped_value_and_grad(
        loss,
        jnp.inf,
        has_aux=True,
        mode="one_pass",
        return_stats=True,
        on_nonfinite="propagate",  # no method drops samples, because plain SGD does not either
        clip_at="micro-batch" if number else "sample",
        microbatch_size=setting.batch_size // number if number else None,
    )

    def threshold_of(numbers: Numbers, state: State) -> Callable[[jax.Array], jax.Array]:
        following = automatic(numbers.scale).threshold(state.rule)

        def threshold(positions: jax.Array) -> jax.Array:
            given = numbers.threshold * positions.astype(jnp.float32) ** numbers.exponent
            return jnp.where(numbers.scale > 0, following(positions), given)

        return threshold

    def init(seed: jax.Array) -> State:
        params = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]
        opt_state = build_optimizer(setting.optimizer, 0.0).init(params)
        return State(params, opt_state, automatic(1.0).init(), jnp.int32(0))

    def step(
        state: State, numbers: Numbers, images: jax.Array, labels: jax.Array, total: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        threshold = threshold_of(numbers, state)
        # The first batch may already have updated the rule; it must count once.
        fresh = automatic(numbers.scale).init()
        before = jax.tree.map(lambda a, b: jnp.where(state.step == 0, a, b), fresh, state.rule)
        (value, correct), gradient, stats = value_and_grad(
            state.params, images, labels, threshold=threshold
        )
        norm = optax.tree.norm(gradient)
        scale = jnp.minimum(1, numbers.batch_threshold / jnp.maximum(norm, 1e-30))
        rate = numbers.learning_rate * (1 + jnp.cos(jnp.pi * state.step / total)) / 2
        tx = build_optimizer(setting.optimizer, numbers.momentum)
        clipped = optax.tree.scale(scale, gradient)
        updates, opt_state = tx.update(clipped, state.opt_state, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(rate, updates))
        rule = automatic(numbers.scale).update(before, stats.norms)
        figures = {
            "loss": value,
            "accuracy": jnp.mean(correct),
            "gradient_norm": norm,
            "clipped_share": stats.num_clipped / stats.norms.size,
            "batch_clipped": (scale < 1).astype(jnp.float32),
            "norms": stats.norms,
        }
        return State(params, opt_state, rule, state.step + 1), figures

    def knowing(state: State, numbers: Numbers, images: jax.Array, labels: jax.Array) -> State:
        """Updates a rule that has no threshold yet by the norms of the first batch."""
        rule = automatic(numbers.scale)
        if rule.is_new is None:
            return state
        *_, stats = value_and_grad(state.params, images, labels)
        shown, is_new = rule.update(state.rule, stats.norms), rule.is_new(state.rule)
        return state._replace(
            rule=jax.tree.map(lambda a, b: jnp.where(is_new, a, b), shown, state.rule)
        )

    def epoch(
        state: State,
        numbers: Numbers,
        example: Example,
        key: jax.Array,
        total: jax.Array,
        data: Data,
    ) -> tuple[State, dict[str, jax.Array], jax.Array]:
        order_key, augmentation_key = jax.random.split(key)
        num_steps = len(data.train.images) // setting.batch_size
        order = jax.random.permutation(order_key, len(data.train.images))
        batches = order[: num_steps * setting.batch_size].reshape(num_steps, -1)

        def prepared(indices: jax.Array, index: Any) -> tuple[jax.Array, jax.Array]:
            images = normalized(data.train.images[indices], example.factors[indices], data)
            if setting.augment:
                images = shifted_and_mirrored(jax.random.fold_in(augmentation_key, index), images)
            return images, example.labels[indices]

        def body(state: State, batch: tuple[jax.Array, jax.Array]) -> Any:
            return step(state, numbers, *prepared(*batch), total)

        state = knowing(state, numbers, *prepared(batches[0], 0))
        state, figures = lax.scan(body, state, (batches, jnp.arange(num_steps)))
        norms = figures.pop("norms").reshape(-1)
        means = jax.tree.map(jnp.mean, figures)
        return state, means | {"quantiles": jnp.quantile(norms, jnp.array(QUANTILES))}, norms

    def accuracy(params: Any, split: Split, data: Data) -> tuple[jax.Array, jax.Array]:
        size = min(EVALUATION_BATCH_SIZE, len(split.images))
        num_batches = len(split.images) // size

        def body(_: None, batch: Split) -> Any:
            images = normalized(batch.images, jnp.ones(size), data)
            return None, jax.vmap(loss, (None, 0, 0))(params, images, batch.labels)

        batches = jax.tree.map(
            lambda x: x[: num_batches * size].reshape(num_batches, size, *x.shape[1:]), split
        )
        _, (losses, correct) = lax.scan(body, None, batches)
        return jnp.mean(correct), jnp.mean(losses)

    return Program(
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(epoch, (0, 0, 0, 0, 0, None)), donate_argnums=0),
        jax.jit(jax.vmap(accuracy, (0, None, None))),
    )


def run_all(
    runs: list[Run],
    data: Data,
    num_classes: int,
    *,
    cache: RunsCache,
    together: int,
    console: Console,
    seconds: float = float("inf"),
    automatic: Callable[[Any], psc.AdaptiveThreshold[Any]] = moment_rule,
) -> list[dict[str, Any]]:
    """Trains the runs that are not finished yet, and returns the records of all, in order.

    Args:
      runs: the runs to train.
      data: the data to train on.
      num_classes: number of labels.
      cache: the cache of finished runs.
      together: the number of runs that are trained at once.
      console: the console for the progress.
      seconds: the time limit, after which no chunk is started.
      automatic: scale → rule of the runs whose scale is not 0.

    Raises:
      TimeoutError: the time limit is reached before all runs are finished.
    """
    pending = [run for run in runs if run.described() not in cache]
    start = time.perf_counter()
    for chunk in _chunks(pending, together):
        if time.perf_counter() - start > seconds:
            raise TimeoutError(f"{seconds:.0f} s are over; repeat the command to go on")
        began = time.perf_counter()
        trained = train_together(chunk, data, num_classes, together, automatic)
        for run, found in zip(chunk, trained, strict=True):
            norms = found.pop("norms")
            if run.watches_tails:
                found["tails"] = {epoch: tail_figures(own) for epoch, own in norms.items()}
            cache.add(run.described(), as_json(found))
        elapsed = time.perf_counter() - began
        epochs = sum(run.epochs for run in chunk)
        console.print(
            f"{len(chunk)} runs of {chunk[0].stage}, {chunk[0].noise}: {elapsed:.1f} s, "
            f"{elapsed / epochs:.3f} s an epoch"
        )
    return [run.described() | cache[run.described()] for run in runs]


def _chunks(runs: list[Run], together: int) -> Iterator[list[Run]]:
    """Groups runs that share a compiled program and the number of epochs, in order."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.setting, run.epochs), []).append(run)
    for group in groups.values():
        for first in range(0, len(group), together):
            yield group[first : first + together]


def train_together(
    runs: list[Run],
    data: Data,
    num_classes: int,
    together: int,
    automatic: Callable[[Any], psc.AdaptiveThreshold[Any]] = moment_rule,
) -> list[dict[str, Any]]:
    """Trains runs of one setting and length, and returns the record of each."""
    # The same number as in other chunks, so that nothing is recompiled.
    padded = runs + [runs[-1]] * (together - len(runs))
    setting, epochs = runs[0].setting, runs[0].epochs
    image_shape = tuple(data.train.images.shape[1:])
    program = build_program(setting, num_classes, image_shape, automatic)
    own = [corrupted(data.train, NOISES[run.noise], num_classes, run.seed) for run in padded]
    examples = Example(*(jnp.asarray(np.stack(field)) for field in zip(*own, strict=True)))
    columns = zip(*(run.numbers for run in padded), strict=True)
    numbers = Numbers(*(jnp.asarray(column, jnp.float32) for column in columns))
    seeds = jnp.asarray([run.seed for run in padded])
    state = program.init(seeds)
    total = jnp.full(len(padded), epochs * (len(data.train.images) // setting.batch_size))
    curves: list[dict[str, np.ndarray]] = []
    start = time.perf_counter()
    for index in range(epochs):
        keys = jax.vmap(lambda seed, index=index: _epoch_key(seed, index))(seeds)
        state, figures, norms = program.epoch(state, numbers, examples, keys, total, data)
        figures = dict(figures)
        if _is_watched(index, epochs):
            figures |= _accuracies(program, state.params, data)
        if _is_kept(index, epochs):
            figures["norms"] = np.asarray(norms)
        curves.append(jax.tree.map(np.asarray, figures))
    seconds = (time.perf_counter() - start) / len(runs)
    machine = describe_machine()
    return [
        record_of(curves, place) | {"seconds": seconds, "machine": machine}
        for place in range(len(runs))
    ]


def _epoch_key(seed: jax.Array, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), index)


def _is_watched(index: int, epochs: int) -> bool:
    """Tells whether an epoch is watched: every second one, and the last."""
    return (epochs - 1 - index) % 2 == 0


def _is_kept(index: int, epochs: int) -> bool:
    """Tells whether the tail of an epoch's norms is estimated: epochs 1, 2, 4, … and the last."""
    return index + 1 == epochs or (index + 1) & index == 0


def _accuracies(program: Program, params: Any, data: Data) -> dict[str, jax.Array]:
    named = {"validation": data.validation, "test": data.test}
    return {
        f"{name}_{figure}": value
        for name, split in named.items()
        for figure, value in zip(
            ("accuracy", "loss"), program.accuracy(params, split, data), strict=True
        )
    }
