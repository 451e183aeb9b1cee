"""Jitted train and evaluation steps for Flax: Linen's `TrainState` and NNX's `Optimizer`.

Both faces share everything but how parameters are taken out of a model and put back. A loss is for
one example; how it becomes gradients is a `_Gradients`, of which there is one for each name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

from psclip_optax.arrays import array_leaves, described
from psclip_optax.clipped_grad import ClipAt, Mode, check_loss, clipped_value_and_grad
from psclip_optax.clipping import batch_figures, beside, check_positions, check_sample_mask
from psclip_optax.engine.calls import value_and_aux
from psclip_optax.engine.units import Unit
from psclip_optax.groups import in_groups_of
from psclip_optax.thresholds import AdaptiveThreshold, Threshold
from psclip_optax.thresholds.auto import auto_threshold
from psclip_optax.thresholds.tracking import TrackNormsState, state_for_batch
from psclip_optax.transforms import PerSampleClipState

Gradients: TypeAlias = Literal["clipped", "per_sample", "mean"]
Metrics: TypeAlias = dict[str, Any]
_Loss: TypeAlias = Callable[..., Any]
_Threshold: TypeAlias = Threshold | AdaptiveThreshold | jax.typing.ArrayLike


class _Batch(NamedTuple):
    """The batch arguments, n samples on the first axis of every leaf, and which of them count."""

    examples: tuple[Any, ...]
    sample_mask: jax.Array | None
    positions: jax.Array | None

    def counts(self) -> jax.Array:
        number = len(jax.tree.leaves(self.examples)[0])
        return jnp.ones(number, bool) if self.sample_mask is None else self.sample_mask


class _Computed(NamedTuple):
    """Gradients for the optimizer, and what there is to log.

    Attributes:
      logs: what the loss logged, stacked [n].
      gradients: stacked [n, …], or of the parameters' own shapes.
      extra_args: further arguments of the optimizer's update.
      figures: of the clipping, where it is done already; "norms" among them where asked for.
    """

    logs: Metrics
    gradients: Any
    extra_args: dict[str, Any]
    figures: Metrics


class _Gradients(NamedTuple):
    """One way from a loss to gradients.

    Attributes:
      compute: (logged loss, params, batch, state of the optimizer) → gradients.
      stacked: Whether the gradients still have their sample axis, for per_sample_clip to take.
      by_position: Whether each sample is clipped at the threshold of its position.
    """

    compute: Callable[[_Loss, Any, _Batch, Any], _Computed]
    stacked: bool
    by_position: bool


def _per_sample_gradients(loss: _Loss, params: Any, batch: _Batch, opt_state: Any) -> _Computed:
    del opt_state
    gradients, logs = _over_samples(jax.grad(loss, has_aux=True), params, batch.examples)
    extra_args = {"sample_mask": batch.sample_mask, "positions": batch.positions}
    return _Computed(logs, gradients, extra_args, {})


def _mean_gradients(loss: _Loss, params: Any, batch: _Batch, opt_state: Any) -> _Computed:
    del opt_state
    examples = _with_samples_for_padding(batch)

    def mean_loss(params: Any) -> tuple[jax.Array, Metrics]:
        losses, logs = _over_samples(loss, params, examples)
        counts = _counts(losses, batch.sample_mask)
        return _sum(losses, counts) / _at_least_one(counts), logs

    gradients, logs = jax.grad(mean_loss, has_aux=True)(params)
    return _Computed(logs, gradients, {}, {})


def _clipped_gradients(threshold_from: Callable[[Any], Any], how: _How) -> _Gradients:
    def compute(loss: _Loss, params: Any, batch: _Batch, opt_state: Any) -> _Computed:
        given = threshold_from(opt_state)
        is_adaptive = isinstance(given, AdaptiveThreshold)
        value_and_grad = clipped_value_and_grad(
            loss,
            jnp.inf if is_adaptive else given,
            has_aux=True,
            mode=how.mode,
            microbatch_size=how.microbatch_size,
            clip_at=how.clip_at,
            return_stats=True,
        )
        by_sample = how.clip_at == "sample"
        value_and_grad = functools.partial(
            value_and_grad,
            params,
            *batch.examples,
            sample_mask=batch.sample_mask,
            positions=batch.positions,
        )
        counts = batch.counts()
        units = Unit(1 if by_sample else how.microbatch_size or counts.size).counting(counts)
        threshold = given
        if is_adaptive:
            state = _tracked_state(given, opt_state)
            limits = in_groups_of(given.threshold(state), jnp.inf)
            measure = lambda: value_and_grad(threshold=limits)[-1].norms  # noqa: E731
            own = state_for_batch(given, state, measure, units)
            threshold = given.threshold(own)
        (_, logs), gradients, stats = value_and_grad(threshold=threshold)
        finite = jnp.all(jnp.isfinite(stats.norms).reshape(units.size, -1), axis=1)
        figures = batch_figures(stats, units, units & finite)._asdict()
        if not by_sample:
            number = {"num_microbatches": figures["num_samples"]}
            figures |= number | {"num_samples": jnp.sum(counts, dtype=jnp.int32)}
        if how.return_norms:
            figures["norms"] = jnp.where(beside(units, stats.norms), stats.norms, jnp.nan)
        if not is_adaptive:
            return _Computed(logs, gradients, {}, figures)
        figures["threshold_scale"] = threshold(jnp.ones(1, int))[0]
        extra_args = {"norms": stats.norms, "sample_mask": units}
        return _Computed(logs, gradients, extra_args, figures)

    return _Gradients(compute, stacked=False, by_position=how.clip_at == "sample")


def _tracked_state(rule: AdaptiveThreshold, opt_state: Any) -> Any:
    """What `track_norms` keeps in the optimizer's state."""
    expected = jax.eval_shape(rule.init)
    tracked = [node.threshold_state for node in _nodes(opt_state, TrackNormsState)]
    if len(tracked) != 1 or not _are_alike(tracked[0], expected):
        raise ValueError(
            "an AdaptiveThreshold has its state in the optimizer's, where one track_norms of the "
            f"same rule keeps it; this one holds {len(tracked)} TrackNormsState"
            f"{', of another rule' if len(tracked) == 1 else ''}. Write "
            "optax.chain(psclip_optax.track_norms(rule), …) with the rule that the step has"
        )
    # As in _clip_states: the leaves are what NNX has in Variables.
    return jax.tree.unflatten(jax.tree.structure(expected), jax.tree.leaves(tracked))


def _are_alike(state: Any, expected: Any) -> bool:
    # Not by their structures, which NNX's Variables are a part of.
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(expected)
    return type(state) is type(expected) and [*map(jnp.shape, leaves)] == [*map(jnp.shape, wanted)]


def _mean_gradients_in_parts(microbatch_size: int) -> _Gradients:
    """Of micro-batches one after the other, none of them clipped."""

    def compute(loss: _Loss, params: Any, batch: _Batch, opt_state: Any) -> _Computed:
        del opt_state
        value_and_grad = clipped_value_and_grad(
            loss,
            jnp.inf,
            has_aux=True,
            microbatch_size=microbatch_size,
            clip_at="micro-batch",
            on_nonfinite="propagate",
        )
        (_, logs), gradients = value_and_grad(
            params, *batch.examples, sample_mask=batch.sample_mask
        )
        return _Computed(logs, gradients, {}, {})

    return _Gradients(compute, stacked=False, by_position=False)


_GRADIENTS = {
    "per_sample": _Gradients(_per_sample_gradients, stacked=True, by_position=True),
    "mean": _Gradients(_mean_gradients, stacked=False, by_position=False),
}


class _How(NamedTuple):
    """What `clipped_value_and_grad` is told, apart from the threshold, and what is kept of it."""

    mode: Mode
    microbatch_size: int | None
    clip_at: ClipAt
    return_norms: bool


def _chosen_gradients(
    loss: _Loss,
    name: str | None,
    threshold: Any,
    threshold_from: Callable[[Any], Any] | None,
    how: _How,
) -> Callable[[Any], _Gradients]:
    """From the optimizer's state to the gradients that it is to have."""
    named = _named_gradients(loss, name, threshold, threshold_from, how)
    if name is not None or threshold is not None or threshold_from is not None:
        return lambda opt_state: named
    automatic = _clipped_gradients(lambda _: auto_threshold(), how)

    def chosen(opt_state: Any) -> _Gradients:
        tracks_norms = _nodes(opt_state, TrackNormsState) and not _clip_states(opt_state)
        return automatic if tracks_norms else named

    return chosen


def _named_gradients(
    loss: _Loss,
    name: str | None,
    threshold: Any,
    threshold_from: Callable[[Any], Any] | None,
    how: _How,
) -> _Gradients:
    # For its checks, of what does not come to it as well.
    clipped_value_and_grad(
        loss, jnp.inf, mode=how.mode, microbatch_size=how.microbatch_size, clip_at=how.clip_at
    )
    known = ", ".join(map(repr, [*_GRADIENTS, "clipped"]))
    has_threshold = threshold is not None or threshold_from is not None
    name = name or ("clipped" if has_threshold else "per_sample")
    if name not in (*_GRADIENTS, "clipped"):
        raise ValueError(f"gradients is one of {known}, got {name!r}")
    if (has_threshold and name != "clipped") or None not in (threshold, threshold_from):
        raise ValueError(
            'gradients="clipped" takes one of threshold and threshold_from, or neither, the others '
            f"take none, got gradients={name!r}, {threshold=}, {threshold_from=}; per_sample_clip "
            "has its threshold in the optimizer"
        )
    if threshold_from is not None and not callable(threshold_from):
        raise TypeError(
            "threshold_from is a function from the optimizer's state to the threshold, got "
            f"{threshold_from!r}; a threshold itself is passed as threshold"
        )
    if name == "clipped":
        given = auto_threshold() if threshold is None else threshold
        return _clipped_gradients(threshold_from or (lambda _: given), how)
    if how.clip_at != "sample":
        raise ValueError(
            f'clip_at is of gradients="clipped", got {how.clip_at!r} with gradients={name!r}; give '
            "the step a threshold, or leave clip_at out"
        )
    if how.return_norms:
        raise ValueError(
            f'return_norms is of gradients="clipped", got gradients={name!r}, whose step has no '
            "norms to return; give the step a threshold, jnp.inf to clip nothing"
        )
    if how.microbatch_size is None:
        return _GRADIENTS[name]
    if name == "per_sample":
        raise ValueError(
            'gradients="per_sample" stacks the whole batch; microbatch_size is of "clipped" and '
            f'"mean", got {how.microbatch_size}'
        )
    return _mean_gradients_in_parts(how.microbatch_size)


def _over_samples(function: _Loss, params: Any, examples: tuple[Any, ...]) -> Any:
    return jax.vmap(function, in_axes=(None, *[0] * len(examples)))(params, *examples)


def _with_samples_for_padding(batch: _Batch) -> tuple[Any, ...]:
    # Padding may hold anything, and weight 0 does not help: the gradient of 0 · ∞ is NaN.
    if batch.sample_mask is None:
        return batch.examples
    own = jnp.arange(batch.sample_mask.size)
    index = jnp.where(batch.sample_mask, own, jnp.argmax(batch.sample_mask))
    return jax.tree.map(lambda leaf: leaf[index], batch.examples)


def _counts(losses: jax.Array, sample_mask: jax.Array | None) -> jax.Array:
    return jnp.ones(losses.shape, bool) if sample_mask is None else sample_mask


def _sum(values: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(counts, values, 0))


def _at_least_one(counts: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(counts), 1)


def _mean_logs(logs: Metrics, sample_mask: jax.Array | None) -> Metrics:
    counts = _counts(logs["loss"], sample_mask) & jnp.isfinite(logs["loss"])
    return jax.tree.map(lambda values: _sum(values, counts) / _at_least_one(counts), logs)


def _logged(loss: _Loss, has_aux: bool) -> _Loss:
    """The loss with itself and its aux as aux, so that what follows has one case, not two."""

    def logged(params: Any, *example: Any) -> tuple[jax.Array, Metrics]:
        result = loss(params, *example)
        value, aux = value_and_aux(result, has_aux, "take [0] of what model(x[None]) returns")
        _check_logs(aux)
        return value, {"loss": value} | ({"aux": aux} if has_aux else {})

    return logged


def _check_logs(aux: Any) -> None:
    advice = "aux is averaged over the samples, so leave out, or reduce, what is no number"
    for name, leaf in array_leaves("aux", aux, advice):
        if jnp.shape(leaf):
            raise TypeError(
                f"{name} is {described(leaf)}, but expected a scalar of one example, for its mean "
                "over the samples is logged; reduce it, for instance by .mean()"
            )


def _checked_batch(examples: tuple[Any, ...], sample_mask: Any, positions: Any) -> _Batch:
    shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(examples)]
    if not shapes or [] in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "the batch arguments are arrays (or pytrees of them) with the n samples on the first "
            f"axis of each, got shapes {shapes}; give each sample its own entry, e.g. "
            "jax.random.split(key, n) for a key, and close over what all samples share"
        )
    n = shapes[0][0]
    return _Batch(
        examples,
        None if sample_mask is None else check_sample_mask(sample_mask, n),
        None if positions is None else check_positions(positions, n),
    )


def _check_use_of_positions(positions: Any, by_position: bool) -> None:
    if positions is not None and not by_position:
        raise ValueError(
            "positions are of samples that are clipped one by one; a step with "
            'gradients="mean" or clip_at="micro-batch" has no use for them: leave them out'
        )


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            "the step is called as step(state, *batch) with a "
            f"flax.training.train_state.TrainState, got {described(state)}; make one by "
            "TrainState.create(apply_fn=…, params=…, tx=…)"
        )


def _check_pair(model: Any, optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "the step is called as step(model, optimizer, *batch) with an nnx.Optimizer, got "
            f"{described(model)} and {described(optimizer)}; make one by "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)"
        )


def _nodes(opt_state: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _clip_states(opt_state: Any) -> list[PerSampleClipState]:
    """Without the states of their thresholds."""
    # NNX wraps every array of an optimizer's state in a Variable; the leaves are what is inside.
    nodes = _nodes(opt_state, PerSampleClipState)
    return [
        PerSampleClipState(*jax.tree.leaves(node._replace(threshold_state=()))) for node in nodes
    ]


def _check_optimizer(opt_state: Any, stacked: bool) -> None:
    number = len(_clip_states(opt_state))
    if stacked and number != 1:
        raise ValueError(
            'gradients="per_sample", which is meant where no threshold is given, has stacked '
            "gradients [n, …] for one per_sample_clip in the optimizer, whose state holds "
            f"{number} PerSampleClipState. For any optimizer pass threshold=… to the step, or "
            "write optax.chain(psclip_optax.track_norms(), …) for the automatic one; or write "
            "optax.chain(psclip_optax.per_sample_clip(threshold), …) or "
            'psclip_optax.ps_clip_sgd(…), or gradients="mean", which clips nothing'
        )
    if not stacked and number:
        raise ValueError(
            'gradients="mean" and "clipped" give the optimizer gradients of the parameters\' own '
            "shapes, but its per_sample_clip would take their first axis for samples. Write "
            'gradients="per_sample", or leave per_sample_clip out of the optimizer'
        )


def _metrics(computed: _Computed, batch: _Batch, opt_state: Any) -> Metrics:
    states = _clip_states(opt_state)
    figures = states[0]._asdict() if states else computed.figures
    unlogged = ("num_updates", "all_finite", "threshold_state")
    figures = {name: value for name, value in figures.items() if name not in unlogged}
    if figures:
        number = figures.get("num_microbatches", figures["num_samples"])
        figures["clipped_share"] = figures["num_clipped"] / jnp.maximum(number, 1)
    return _mean_logs(computed.logs, batch.sample_mask) | figures


def linen_train_step(
    loss: Callable[..., Any],
    *,
    gradients: Gradients | None = None,
    has_aux: bool = False,
    threshold: _Threshold | None = None,
    threshold_from: Callable[[Any], _Threshold] | None = None,
    mode: Mode = "auto",
    microbatch_size: int | None = None,
    clip_at: ClipAt = "sample",
    return_norms: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds a jitted train step over Flax's `TrainState`.

    The state is donated: its buffers, the initial parameters among them, are reused for the new
    state and must not be read afterwards.

    Args:
      loss: `loss(params, *example)`, a scalar for one example; map no batch axis over it.
      gradients: "clipped", the default where a threshold is given or `state.tx` has a
        [`psclip_optax.track_norms`][], gives any Optax optimizer the clipped mean gradient of
        [`psclip_optax.clipped_value_and_grad`][]. "per_sample", the default without either, gives
        `state.tx` the stacked gradients [n, …] and the mask and positions; its first link is
        [`psclip_optax.per_sample_clip`][]. "mean" gives the gradient of the mean loss, for
        baselines.
      has_aux: Whether the loss gives a pair (loss, aux), aux a pytree of scalars.
      threshold: For "clipped": a number, a threshold such as `psclip_optax.growing_threshold`, or
        an adaptive one such as `psclip_optax.moment_threshold()`, whose state is that of a
        [`psclip_optax.track_norms`][] of the same rule in the chain of `state.tx`. None is
        [`psclip_optax.auto_threshold`][], that of a `track_norms()`.
      threshold_from: Instead of it, a function from the optimizer's state to the threshold, for one
        that is scheduled or tuned.
      mode: For "clipped", as for [`psclip_optax.clipped_value_and_grad`][].
      microbatch_size: For "clipped" and "mean": the batch is worked through in slices of at most
        this many samples.
      clip_at: For "clipped": "sample", or "micro-batch" for the mean gradient of each slice; then
        there are no `positions`, and "num_microbatches" is among the metrics, of which
        "num_clipped" and "num_nonfinite" speak.
      return_norms: For "clipped": whether "norms" is among the metrics, float [n] (of micro-batches
        one for each), the gradient norms before clipping; NaN for padding.

    Returns:
      `step(state, *batch, sample_mask=None, positions=None) -> (state, metrics)`. Every leaf of
      the batch has n samples on its first axis. `sample_mask`, bool [n], is False for padding;
      `positions`, int [n], replaces 1, 2, … as the samples' positions ("mean" takes none).
      Metrics are scalars: "loss" and, leaf by leaf, "aux", means over the samples that count and
      whose loss is finite; where samples are clipped also the
      figures of [`psclip_optax.transforms.PerSampleClipState`][], and "clipped_share"; with an
      adaptive threshold "threshold_scale", τ_1 of this step. Means over no sample are 0.

    Raises:
      ValueError: On unknown `gradients` or options, or a threshold where it has no use; in the
        step, on batch arguments of unequal sizes, a mask or positions not of shape [n], positions
        where they have no use, or an optimizer that does not fit the gradients.
      TypeError: If the loss or `threshold_from` is no function; in the step, if the state is no
        `TrainState`, the loss is no real scalar, or a leaf of its aux no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> from flax.training.train_state import TrainState
      >>> def loss(params, x, y):
      ...     return (params["w"] * x - y) ** 2
      >>> tx = psc.ps_clip_sgd(learning_rate=1.0, alpha=1.0, beta=2.0)
      >>> state = TrainState.create(apply_fn=loss, params={"w": jnp.array(0.0)}, tx=tx)
      >>> step = linen_train_step(loss)
      >>> state, metrics = step(state, jnp.ones(2), jnp.array([1.0, 100.0]))
      >>> print(f"{state.params['w']:.4f}, clipped at 1 and √2: {metrics['num_clipped']}")
      1.2071, clipped at 1 and √2: 2

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    choose = _chosen_gradients(
        loss,
        gradients,
        threshold,
        threshold_from,
        _How(mode, microbatch_size, clip_at, return_norms),
    )
    logged_loss = _logged(loss, has_aux)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, *examples: Any, sample_mask: Any = None, positions: Any = None
    ) -> tuple[TrainState, Metrics]:
        _check_state(state)
        kind = choose(state.opt_state)
        _check_optimizer(state.opt_state, kind.stacked)
        _check_use_of_positions(positions, kind.by_position)
        batch = _checked_batch(examples, sample_mask, positions)
        computed = kind.compute(logged_loss, state.params, batch, state.opt_state)
        # Not `apply_gradients`: it passes no further arguments on to the optimizer.
        updates, opt_state = state.tx.update(
            computed.gradients, state.opt_state, state.params, **computed.extra_args
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, _metrics(computed, batch, opt_state)

    return step


def nnx_train_step(
    loss: Callable[..., Any],
    *,
    gradients: Gradients | None = None,
    has_aux: bool = False,
    threshold: _Threshold | None = None,
    threshold_from: Callable[[Any], _Threshold] | None = None,
    mode: Mode = "auto",
    microbatch_size: int | None = None,
    clip_at: ClipAt = "sample",
    return_norms: bool = False,
) -> Callable[..., Metrics]:
    """Builds a jitted train step over an NNX model and its `nnx.Optimizer`.

    Both are updated in place, and their old buffers donated. Trained are the parameters that the
    optimizer's `wrt` selects; all other state of the model is read only, for each sample would
    write its own.

    Args:
      loss: `loss(model, *example)`, a scalar for one example; map no batch axis over it.
        Randomness comes as an argument of the batch, one key a sample:
        `model(x, rngs=nnx.Rngs(dropout=key))`.
      gradients: "clipped", "per_sample" or "mean", as for
        [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      has_aux: Whether the loss gives a pair (loss, aux), aux a pytree of scalars.
      threshold: As for [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      threshold_from: As for [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      mode: As for [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      microbatch_size: As for [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      clip_at: As for [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      return_norms: As for [`linen_train_step`][psclip_optax.training.steps.linen_train_step].

    Returns:
      `step(model, optimizer, *batch, sample_mask=None, positions=None) -> metrics`, with the batch,
      the mask, the positions and the metrics of
      [`linen_train_step`][psclip_optax.training.steps.linen_train_step].

    Raises:
      ValueError: On unknown `gradients` or options, or a threshold where it has no use; in the
        step, on batch arguments of unequal sizes, a mask or positions not of shape [n], positions
        where they have no use, an optimizer that does not fit the gradients, or a loss that writes
        to the model's state (batch statistics, the counters of `nnx.Rngs`).
      TypeError: If the loss or `threshold_from` is no function; in the step, if there is no
        `nnx.Optimizer` in its place, the loss is no real scalar, or a leaf of its aux no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import psclip_optax as psc
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, psc.ps_clip_sgd(0.1, alpha=1.0, beta=2.0), wrt=nnx.Param)
      >>> def loss(model, x, y):
      ...     return (model(x)[0] - y) ** 2
      >>> step = nnx_train_step(loss)
      >>> metrics = step(model, optimizer, jnp.ones([4, 3]), jnp.full(4, 100.0))
      >>> int(metrics["num_samples"]), float(metrics["clipped_share"])
      (4, 1.0)

    References:
      Nobile and Grohs, [Robust and Fast Training via Per-Sample
      Clipping](https://arxiv.org/abs/2605.02701), 2026.
    """
    choose = _chosen_gradients(
        loss,
        gradients,
        threshold,
        threshold_from,
        _How(mode, microbatch_size, clip_at, return_norms),
    )

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(
        model: Any,
        optimizer: nnx.Optimizer,
        *examples: Any,
        sample_mask: Any = None,
        positions: Any = None,
    ) -> Metrics:
        _check_pair(model, optimizer)
        kind = choose(optimizer.opt_state)
        _check_optimizer(optimizer.opt_state, kind.stacked)
        _check_use_of_positions(positions, kind.by_position)
        batch = _checked_batch(examples, sample_mask, positions)
        graphdef, params, rest = nnx.split(model, optimizer.wrt, ...)
        logged_loss = _logged(_loss_of_params(loss, graphdef, rest), has_aux)
        computed = kind.compute(logged_loss, params, batch, optimizer.opt_state)
        optimizer.update(model, computed.gradients, **computed.extra_args)
        return _metrics(computed, batch, optimizer.opt_state)

    return step


def _loss_of_params(loss: _Loss, graphdef: Any, rest: Any) -> _Loss:
    def loss_of_params(params: Any, *example: Any) -> Any:
        # Flax lets only the trace that made a variable write to it. With variables made here, a
        # loss that writes comes to the check below, which says what to do instead.
        own_rest = jax.tree.map(lambda value: value, rest)
        model = nnx.merge(graphdef, params, own_rest)
        before = _values_by_path(model)
        result = loss(model, *example)
        _check_unwritten(before, _values_by_path(model))
        return result

    return loss_of_params


def _values_by_path(model: Any) -> dict[str, list[Any]]:
    variables = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): jax.tree.leaves(variable) for path, variable in variables}


def _check_unwritten(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> None:
    # By identity: under tracing, a variable that was written to holds another tracer.
    identities = {path: list(map(id, values)) for path, values in before.items()}
    written = [path for path in after if list(map(id, after[path])) != identities.get(path)]
    if written:
        raise ValueError(
            "the loss reads the model's state, but this one writes to "
            f"{', '.join(map(repr, written))}, of which each sample would have its own value. For "
            "dropout pass one key a sample as an argument of the batch and write "
            "model(x, rngs=nnx.Rngs(dropout=key)); for batch normalisation take nnx.GroupNorm or "
            "nnx.LayerNorm, or use_running_average=True; return what you want to record as aux"
        )


def linen_eval_step(loss: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Metrics]:
    """Builds a jitted evaluation step that gives sums, exact also for a padded last batch.

    Args:
      loss: `loss(params, *example)`, a scalar for one example, as for
        [`linen_train_step`][psclip_optax.training.steps.linen_train_step].
      has_aux: Whether the loss gives a pair (loss, aux), aux a pytree of scalars.

    Returns:
      `step(params, *batch, sample_mask=None) -> sums`: a dict of scalars, "loss" and, leaf by leaf,
      "aux", summed over the samples that count, and their number, "count". Add the dicts of all
      batches and divide by the count. A sample whose loss is not finite counts, so that a model
      that diverged is seen to have.

    Raises:
      ValueError: In the step, on batch arguments of unequal sizes or a mask not of shape [n].
      TypeError: If the loss is no function; in the step, if it is no real scalar, or a leaf of its
        aux no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> step = linen_eval_step(lambda params, x: params * x)
      >>> padded = jnp.array([1.0, 2.0, 0.0])
      >>> sums = step(jnp.array(3.0), padded, sample_mask=jnp.array([True, True, False]))
      >>> float(sums["loss"] / sums["count"])
      4.5
    """
    check_loss(loss)
    logged_loss = _logged(loss, has_aux)

    @jax.jit
    def step(params: Any, *examples: Any, sample_mask: Any = None) -> Metrics:
        batch = _checked_batch(examples, sample_mask, None)
        losses, logs = _over_samples(logged_loss, params, batch.examples)
        counts = _counts(losses, batch.sample_mask)
        sums = jax.tree.map(lambda values: _sum(values, counts), logs)
        return sums | {"count": jnp.sum(counts)}

    return step
