"""Compare a recipe's gradient with the expected one, by its heading.

Recipes use the same names: loss, params, x, y, threshold, f, tx, step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import psclip_optax as psc
from benchmarks.common.collectives import num_elements
from psclip_optax import groups
from psclip_optax.training import linen_train_step
from tests.numerics import assert_close, clipped_mean, growing

Names = dict[str, Any]


def keeping_gradients() -> optax.GradientTransformation:
    """Return an optimizer that changes nothing; its state is the last gradient."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return optax.tree.zeros_like(grads), grads

    return optax.GradientTransformation(optax.tree.zeros_like, update)


KEEPING = keeping_gradients()


def truth(
    names: Names,
    params: Any,
    *batch: Any,
    loss: Callable[..., Any] | None = None,
    threshold: Any = None,
    sample_mask: Any = None,
) -> Any:
    """Compute vmap(grad) of the recipe's loss, clipped sample by sample."""
    loss = loss or names["loss"]
    threshold = threshold or names["threshold"]

    def scalar_loss(*arguments: Any) -> Any:
        result = loss(*arguments)
        return result[0] if isinstance(result, tuple) else result

    in_axes = (None, *[0] * len(batch))
    stacked = jax.jit(jax.vmap(jax.grad(scalar_loss), in_axes))(params, *batch)
    n = len(jax.tree.leaves(batch)[0])
    taus = growing(float(threshold.alpha), float(threshold.beta), n)
    return clipped_mean(stacked, taus, sample_mask)


def check_linen(names: Names) -> None:
    state = names["state"]
    expected = truth(names, state.params, names["x"], names["y"])
    state = state.replace(tx=KEEPING, opt_state=KEEPING.init(state.params))
    state, *_ = names["step"](state, names["x"], names["y"])
    assert_close(state.opt_state, expected, 1e-4)


def check_nnx(names: Names) -> None:
    model = names["model"]
    batch = [names[name] for name in ("x", "y", "keys") if name in names]
    graphdef, params = nnx.split(model)
    loss = lambda params, *example: names["loss"](nnx.merge(graphdef, params), *example)
    expected = truth(names, params, *batch, loss=loss)
    optimizer = nnx.Optimizer(model, KEEPING, wrt=nnx.Param)
    names["step"](model, optimizer, *batch)
    structure = jax.tree.structure(expected)  # NNX wraps each leaf in a Variable
    assert_close(structure.unflatten(jax.tree.leaves(optimizer.opt_state)), expected, 1e-4)


def check_equinox(names: Names) -> None:
    import equinox as eqx

    params, static = eqx.partition(names["model"], eqx.is_inexact_array)
    loss = lambda params, *example: names["loss"](eqx.combine(params, static), *example)
    expected = truth(names, params, names["x"], names["y"], loss=loss)
    names["tx"] = KEEPING
    _, grads, *_ = names["step"](names["model"], KEEPING.init(params), names["x"], names["y"])
    assert_close(grads, expected, 1e-4)


def check_haiku(names: Names) -> None:
    params, x, y, key = names["params"], names["x"], names["y"], jax.random.key(5)
    expected = truth(names, params, jax.random.split(key, len(x)), x, y)
    names["tx"] = KEEPING
    _, grads, *_ = names["step"](params, KEEPING.init(params), key, x, y)
    assert_close(grads, expected, 1e-4)


def check_gpt(names: Names) -> None:
    tokens, mask = names["tokens"], names["mask"]
    assert mask.sum() == 4
    loss, length = jax.jit(names["loss"]), np.count_nonzero(tokens[0])
    assert length < tokens.shape[1]
    whole = loss(names["params"], tokens[0])
    assert float(whole) == pytest.approx(float(loss(names["params"], tokens[0, :length])), rel=1e-3)
    # Masked samples may have any value.
    tokens = np.where(mask[:, None], tokens, 1 + tokens[::-1] % 49)
    # Before training, so that samples are clipped.
    params = jax.jit(names["model"].init)(jax.random.key(1), tokens[0, 1:])
    threshold = psc.growing_threshold(2.0, 1.5)
    expected = truth(names, params, tokens, threshold=threshold, sample_mask=mask)
    names["tx"] = KEEPING
    _, grads, *_ = names["step"](params, KEEPING.init(params), tokens, mask)
    # Keys' biases have gradients of 0, up to rounding.
    assert_close(grads, expected, 1e-3, floor=1e-2)


def check_fsdp(names: Names) -> None:
    """Compare devices that share parameters and batch with one device and with a stack."""
    assert jax.device_count() == names["mesh"].size == 8
    params, rules, tokens, loss = (names[name] for name in ("params", "rules", "tokens", "loss"))
    tx = optax.chain(psc.track_norms(rules), KEEPING)

    def result(place: Callable[[Any], Any], tokens: Any) -> tuple[Any, Any]:
        state = TrainState.create(apply_fn=loss, params=jax.tree.map(np.array, params), tx=tx)
        step = linen_train_step(psc.clipped_value_and_grad(loss), threshold=rules)
        state, metrics = step(place(state), tokens)
        return state.opt_state[1], metrics

    grads, metrics = result(
        lambda state: jax.device_put(state, jax.tree.map(names["sharded"], state)), tokens
    )
    placed = names["state"].params
    for leaf in jax.tree.leaves([placed, names["state"].opt_state[1][0].mu]):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    once = psc.clipped_value_and_grad(
        loss,
        jax.tree.map(lambda _: 1.0, rules, is_leaf=groups.is_threshold),
        return_stats=True,
        on_nonfinite="propagate",  # without a loop that may make a pass again
    )
    assert all(row.is_fused for row in once.explain(placed, tokens).rows)
    mean_loss = lambda params, tokens: jax.vmap(loss, (None, 0))(params, tokens).mean()
    sent, by_plain = (
        num_elements(jax.jit(f).lower(placed, tokens).compile().as_text())
        for f in (once, jax.value_and_grad(mean_loss))
    )
    assert by_plain > 0
    assert sent <= 1.02 * by_plain + 32 * len(tokens) * 6, f"{sent} against {by_plain}"

    names["gathered"] = lambda tree: tree
    jax.clear_caches()  # of programs traced with a mesh
    alone = jax.device_put(tokens, jax.devices()[0])
    expected, expected_metrics = result(lambda state: state, alone)
    assert_close(grads, jax.tree.map(np.asarray, expected), 1e-4)
    for name, figures in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], figures, rtol=1e-4, err_msg=name)
    stacked = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, alone)
    clip = psc.per_sample_clip(rules)
    assert_close(grads, clip.update(stacked, clip.init(params))[0], 1e-4)


def check_batched(names: Names) -> None:
    of_one = lambda params, tokens: names["loss"](params, tokens[None])
    assert_close(names["grads"], truth(names, names["params"], names["tokens"], loss=of_one), 1e-4)


def check_step(names: Names, *arguments: Any, threshold: Any = None) -> None:
    params, x, y = names["params"], names["x"], names["y"]
    expected = truth(names, params, x, y, threshold=threshold)
    names["tx"] = KEEPING
    _, grads, *_ = names["step"](params, KEEPING.init(params), *arguments, x, y)
    assert_close(grads, expected, 1e-4)


def check_adamw(names: Names) -> None:
    check_step(names)
    params, x, y = names["params"], names["x"], names["y"]
    names["stacked_tx"] = optax.chain(psc.per_sample_clip(names["threshold"]), KEEPING)
    _, (_, grads) = names["stacked_step"](params, names["stacked_tx"].init(params), x, y)
    assert_close(grads, truth(names, params, x, y), 1e-4)


def check_schedule(names: Names) -> None:
    # From 100 to 1 in 100 steps.
    check_step(names, 90, threshold=psc.growing_threshold(100 - 0.99 * 90, 1.5))


def check_injected(names: Names) -> None:
    params, x, y, opt_state = (names[name] for name in ("params", "x", "y", "opt_state"))
    opt_state.hyperparams["learning_rate"] = jnp.asarray(1.0)
    moved, _ = names["step"](params, opt_state, x, y)
    threshold = psc.growing_threshold(1.0, 2.0)  # at the schedule's end, and set by hand
    assert_close(params - moved, truth(names, params, x, y, threshold=threshold), 1e-4)


def check_logs(names: Names) -> None:
    params, x, y, logs = (names[name] for name in ("params", "x", "y", "logs"))
    assert_close(names["grads"], truth(names, params, x, y), 1e-4)
    stacked = jax.vmap(jax.grad(names["loss"]), (None, 0, 0))(params, x, y)
    norms = np.linalg.norm(np.asarray(stacked, np.float64), axis=1)
    is_clipped = norms > growing(20.0, 1.5, 64)
    expected = {
        "threshold/first": 20.0,
        "threshold/last": 20 * 64 ** (2 / 3),
        "clipped/first half": is_clipped[:32].mean(),
        "clipped/second half": is_clipped[32:].mean(),
        "norm/median": np.median(norms),
        "norm/99 %": np.quantile(norms, 0.99),
        "norm/largest": norms.max(),
    }
    got = {name: float(value) for name, value in logs.items() if name != "loss"}
    assert got == pytest.approx(expected, rel=1e-4)


def check_adaptive(names: Names) -> None:
    params, x, y, rule = (names[name] for name in ("params", "x", "y", "rule"))
    tracked = names["opt_state"][0]
    threshold = rule.threshold(tracked.threshold_state)
    assert 0 < float(threshold.alpha) < 1000
    names["tx"] = optax.chain(psc.track_norms(rule), KEEPING)
    _, (_, grads), *_ = names["step"](params, (tracked, KEEPING.init(params)), x, y)
    assert_close(grads, truth(names, params, x, y, threshold=threshold), 1e-4)


def check_frozen(names: Names) -> None:
    assert_close(names["grads"], truth(names, names["params"], names["x"]), 1e-4)


def check_bfloat16(names: Names) -> None:
    expected = truth(names, names["params"], names["x"], names["y"])
    assert_close(names["grads"], expected, 3e-2)


def check_float16(names: Names) -> None:
    params, x, y, step = (names[name] for name in ("params", "x", "y", "step"))
    unscaled = lambda params, x, y: names["scaled_loss"](params, 1.0, x, y)
    expected = truth(names, params, x, y, loss=unscaled)
    names["tx"] = KEEPING
    untouched = KEEPING.init(params)
    for scale in (1.0, 2.0**10):
        _, grads, (new_scale, num_finite), _ = step(params, untouched, (scale, 0), x, y)
        assert_close(grads, expected, 2e-2)
        assert (float(new_scale), int(num_finite)) == (scale, 1)
    # A scale at which some samples overflow, but not the mean of the others.
    dropping = psc.clipped_grad(
        names["scaled_loss"], psc.growing_threshold(2.0**18, 1.5), in_axes=(None, 0, 0)
    )
    others = jax.jit(dropping)(params, 2.0**18, x, y)
    assert np.isfinite(optax.tree.norm(others))
    moved, kept, (new_scale, num_finite), _ = step(params, untouched, (2.0**18, 7), x, y)
    assert_close((moved, kept), jax.tree.map(np.asarray, (params, untouched)), 0.0)
    assert (float(new_scale), int(num_finite)) == (2.0**17, 0)


def check_before_or_after(names: Names) -> None:
    threshold = psc.growing_threshold(100.0, np.inf)
    expected = truth(names, names["params"], names["x"], names["y"], threshold=threshold)
    assert_close(names["grads"], expected, 1e-4)


def check_private(names: Names) -> None:
    """Compare the recipe's run with jax_privacy's clipping, and ε with dp_accounting."""
    import dp_accounting
    from jax_privacy import batch_selection, clipping

    x, y, clip_norm, tx = (names[name] for name in ("x", "y", "clip_norm", "tx"))
    theirs = clipping.clipped_grad(
        names["loss"], l2_clip_norm=clip_norm, batch_argnums=(1, 2), keep_batch_dim=False
    )

    @jax.jit
    def step(params: Any, opt_state: Any, x: Any, y: Any, mask: Any) -> Any:
        summed = theirs(params, x, y, is_padding_example=~mask)
        updates, opt_state = tx.update(summed, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = names["start"], tx.init(names["start"])
    for chosen in names["sampling"].batch_iterator(len(x), rng=0):
        padded = batch_selection.pad_to_multiple_of(chosen, 32)
        params, opt_state = step(params, opt_state, x[padded], y[padded], padded >= 0)
    assert_close(names["params"], jax.tree.map(np.asarray, params), 1e-4)
    # It contains noise, and the sum changes by no more than their sensitivity.
    whole, fewer = (names["f"](names["start"], x[i:], y[i:]) for i in (0, 1))
    noisy, _ = names["noise"].update(whole, names["noise"].init(whole))
    stddev = names["noise_multiplier"] * clip_norm
    added = np.concatenate(
        [np.ravel(leaf) for leaf in jax.tree.leaves(optax.tree.sub(noisy, whole))]
    )
    assert np.std(added) == pytest.approx(stddev, rel=0.2)
    moved = float(optax.tree.norm(optax.tree.sub(whole, fewer)))
    first = jax.grad(names["loss"])(names["start"], x[0], y[0])
    assert moved == pytest.approx(min(clip_norm, float(optax.tree.norm(first))), rel=1e-3)
    assert moved <= theirs.sensitivity() * (1 + 1e-5)
    step_event = dp_accounting.PoissonSampledDpEvent(
        names["batch_size"] / len(x), dp_accounting.GaussianDpEvent(names["noise_multiplier"])
    )
    accountant = dp_accounting.pld.PLDAccountant().compose(step_event, names["num_steps"])
    epsilon = names["accountant"].compute_epsilon(names["num_steps"], names["privacy"])
    assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


CHECKS: dict[str, Callable[[Names], None]] = {
    "Flax Linen, your own step": check_linen,
    "Flax Linen, this package's train step": check_linen,
    "Flax NNX, your own step": check_nnx,
    "Flax NNX, this package's train step": check_nnx,
    "Equinox": check_equinox,
    "Haiku, and a random key for each sample": check_haiku,
    "A GPT training loop": check_gpt,
    "Thresholds for each layer, under FSDP": check_fsdp,
    "A batched loss, left as it is": check_batched,
    "AdamW": check_adamw,
    "Muon": check_step,
    "A threshold on a schedule": check_schedule,
    "The same in the optimizer's state": check_injected,
    "Log thresholds and clipped shares": check_logs,
    "An adaptive threshold": check_adaptive,
    "Only the trainable part": check_step,
    "How a frozen leaf changes the norm": check_frozen,
    "bfloat16": check_bfloat16,
    "float16 with dynamic loss scaling": check_float16,
    "From jax_privacy": check_before_or_after,
    "A private step": check_private,
    "From optax.contrib.differentially_private_aggregate": check_before_or_after,
}
