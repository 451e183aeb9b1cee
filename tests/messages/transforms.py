"""Messages of the Optax transformations, the estimates of tails and the optimizers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import psclip_optax as psc
from tests.messages.rows import MEAN, NORMS, PARAMS, STACK, Row, X, Y, clip, of_x, on_four_devices


def accumulate(grads: Any = MEAN, every: Any = 2, **options: Any):
    tx = psc.accumulate_clipped(optax.sgd(0.1), every, 1.0, **options)
    return tx.update(grads, tx.init(PARAMS), PARAMS)


def accumulate_by(accumulator_dtype: Any):
    return psc.accumulate_clipped(optax.sgd(0.1), 2, 1.0, accumulator_dtype=accumulator_dtype)


def beyond_memory():
    params = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    stacked = jax.ShapeDtypeStruct((1 << 22, 1 << 20), jnp.float32)
    tx = psc.per_sample_clip(1.0)
    jax.jit(tx.update).lower(stacked, jax.eval_shape(tx.init, params))


def clip_what_was_summed(params, x):
    grads = jax.vmap(jax.grad(of_x), (None, 0))(params, x)
    return clip(grads, options={"axis_name": "data"})


PUT_IT_FIRST = (
    "per_sample_clip changes shapes, so it is the first link of a chain, and whatever accumulates, "
    "masks or skips goes around the links after it: write "
    "`optax.chain(psc.per_sample_clip(…), optax.MultiSteps(…).gradient_transformation())` or "
    "`optax.chain(psc.per_sample_clip(…), optax.masked(…))`, not "
    "`optax.MultiSteps(optax.chain(psc.per_sample_clip(…), …))` or "
    "`optax.masked(psc.per_sample_clip(…))`"
)


ROWS = [
    # per_sample_clip
    Row(
        lambda: psc.per_sample_clip(1.0, sample_axis=0.5),
        TypeError,
        "sample_axis is a Python int, got 0.5; under optax.inject_hyperparams add "
        "static_args=('sample_axis',)",
    ),
    Row(
        lambda: optax.inject_hyperparams(psc.per_sample_clip)(1.0).init(PARAMS),
        TypeError,
        "sample_axis is a Python int, got Array(0, dtype=int32, weak_type=True); under "
        "optax.inject_hyperparams add static_args=('sample_axis',)",
    ),
    Row(
        lambda: on_four_devices(clip_what_was_summed),
        ValueError,
        "axis_name='data' says that each device has samples of its own, but "
        "per_sample_grads['b'] is the same on all devices of the mesh axis 'data': jax.shard_map "
        "has gradients of replicated parameters summed over them. Before "
        "jax.vmap(jax.grad(loss), …) make them each device's own, params = jax.lax.⟨pcast, or "
        "pvary before JAX 0.8⟩, or pass a stack that in_specs shard",
    ),
    Row(
        lambda: psc.per_sample_clip(1.0).init({"activation": jnp.tanh}),
        TypeError,
        "params['activation'] is a PjitFunction, but expected an array; part it off with "
        "eqx.partition or nnx.split, or close over it",
    ),
    Row(
        lambda: psc.per_sample_clip(1.0).update(STACK, optax.sgd(0.1).init(PARAMS)),
        TypeError,
        "per_sample_clip's update takes (per_sample_grads, state, params) with a "
        "PerSampleClipState from its init or its last update, got a tuple",
    ),
    Row(
        lambda: clip(wrap=lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)), params=PARAMS),
        ValueError,
        "a state of per_sample_clip is not for sums or means, but one has made an integer of its "
        "bool, as optax.contrib.sam around it does, whose other optimizer is given stacked "
        "gradients: write `optax.chain(psc.per_sample_clip(…), optax.contrib.sam(…))`. "
        + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip({}, params=PARAMS),
        ValueError,
        "per_sample_clip expects a stack of gradients for each parameter, got a tree without "
        "leaves, {}; pass what jax.vmap(jax.grad(loss), …) gives of the parameters",
    ),
    Row(
        lambda: clip({"w": X, "b": np.float32(1.0)}),
        ValueError,
        "per_sample_grads['b'] has no sample axis 0: it is float32[]. Stack per-sample "
        "gradients with jax.vmap(jax.grad(loss), in_axes=(None, 0)); a gradient that is already"
        " averaged can no longer be clipped per sample. " + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip(MEAN),
        ValueError,
        "all leaves have the same number of samples on axis 0, but they have [2, 3]: "
        "per_sample_grads['b']: float32[2], per_sample_grads['w']: float32[3, 2]. Stack them "
        "with jax.vmap(jax.grad(loss), …), or say where the samples are with sample_axis. "
        + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip({"w": X[None]}, params={"w": Y}),
        ValueError,
        "per_sample_grads['w'] is float32[1, 4, 3]: without its sample axis 0 that is [4, 3], "
        "but the parameter has shape [4]. Stack per-sample gradients with "
        "jax.vmap(jax.grad(loss), …). " + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip({"w": np.ones((4, 3), int)}),
        TypeError,
        "per_sample_grads['w'] is int64[4, 3], but expected a real floating-point array; "
        "gradients are of floating-point parameters: part it off with eqx.partition or "
        "nnx.split, or close over it",
    ),
    Row(
        lambda: clip({"w": "abc"}),
        TypeError,
        "per_sample_grads['w'] is a str, but expected an array; part it off with eqx.partition "
        "or nnx.split, or close over it",
    ),
    Row(
        lambda: clip(wrap=lambda tx: optax.masked(tx, {"w": True, "b": False})),
        ValueError,
        "per_sample_clip needs every leaf, for the norm is over a sample's whole gradient, but "
        "some came as optax.MaskedNode, from optax.masked or optax.partition. " + PUT_IT_FIRST,
    ),
    Row(
        lambda: clip(wrap=lambda tx: optax.MultiSteps(tx, 2), params=PARAMS),
        ValueError,
        "all leaves have the same number of samples on axis 0, but they have [2, 3]: "
        "per_sample_grads['b']: float32[2], per_sample_grads['w']: float32[3, 2]. Stack them "
        "with jax.vmap(jax.grad(loss), …), or say where the samples are with sample_axis. "
        + PUT_IT_FIRST,
    ),
    Row(
        beyond_memory,
        UserWarning,
        "a stack of 4194304 per-sample gradients takes 16384.0 GiB, and the devices have "
        "⟨memory⟩ GiB; psc.clipped_value_and_grad(loss, threshold) gives the same gradient from"
        " the loss itself without stacking any, or take fewer samples at a time",
    ),
    # accumulate_clipped
    Row(
        lambda: psc.accumulate_clipped(optax.sgd, 2, 1.0),
        TypeError,
        "accumulate_clipped takes an optax.GradientTransformation to give the accumulated "
        "gradient to, such as optax.sgd(0.1), got ⟨the function⟩",
    ),
    Row(
        lambda: accumulate(every=2.0),
        TypeError,
        "every_k_schedule is the int number of micro-batches in a window, or a function from "
        "the number of updates to it, got 2.0",
    ),
    Row(
        lambda: accumulate(every=0),
        ValueError,
        "every_k_schedule is the number of micro-batches in a window, at least 1, got 0",
    ),
    Row(
        lambda: accumulate(every=lambda step: 2.5),
        TypeError,
        "every_k_schedule is the int number of micro-batches in a window, or a function from "
        "the number of updates to it, got 2.5 from ⟨the function⟩",
    ),
    Row(
        lambda: accumulate(every=lambda step: 0),
        ValueError,
        "every_k_schedule is the number of micro-batches in a window, at least 1, got 0 from "
        "⟨the function⟩",
    ),
    Row(
        lambda: accumulate(should_skip_update_fn=True),
        TypeError,
        "should_skip_update_fn is None or a function such as optax.skip_not_finite, got True",
    ),
    Row(
        lambda: accumulate(accumulator_dtype=int),
        TypeError,
        "accumulator_dtype is a real floating-point dtype such as jnp.float32, or None for that"
        " of the parameters, got <class 'int'>",
    ),
    Row(
        lambda: optax.inject_hyperparams(accumulate_by)(accumulator_dtype=jnp.bfloat16).init(MEAN),
        TypeError,
        "accumulator_dtype is a dtype, got an array, as optax.inject_hyperparams makes of "
        "jnp.bfloat16 and all that is callable; add static_args=('accumulator_dtype',)",
    ),
    Row(
        lambda: psc.accumulate_clipped(optax.sgd(0.1), 2, 1.0).update(MEAN, ()),
        TypeError,
        "accumulate_clipped's update takes (grads, state, params) with an optax.MultiStepsState"
        " from its init or its last update, got a tuple",
    ),
    Row(
        lambda: accumulate({"w": MEAN["w"]}),
        ValueError,
        "gradients have the structure of the parameters that init saw, PyTreeDef({'b': *, 'w': *})"
        ", got PyTreeDef({'w': *})",
    ),
    Row(
        lambda: accumulate(STACK),
        ValueError,
        "grads['b'] is float32[4, 2], but its parameter has shape [2]: accumulate_clipped takes"
        " the mean gradient of a micro-batch. Average stacked per-sample gradients first, "
        "clipped with optax.chain(psc.per_sample_clip(…), psc.accumulate_clipped(…)) or not",
    ),
    Row(
        lambda: accumulate({"w": np.ones((3, 2), int), "b": MEAN["b"]}),
        TypeError,
        "grads['w'] is int64[3, 2], but expected a real floating-point array; gradients are of "
        "floating-point parameters: part it off with eqx.partition or nnx.split, or close over "
        "it",
    ),
    # tails
    Row(
        lambda: jax.jit(psc.tails.tail_index)(NORMS),
        TypeError,
        "psc.tails looks at concrete norms, on the host, but got traced ones; return the norms "
        "from the jitted function (ClipStats.norms) and call psc.tails outside of it",
    ),
    Row(
        lambda: psc.tails.tail_index(psc.ClipStats(Y, Y, Y[0], Y[0])),
        TypeError,
        "psc.tails expects norms of a real dtype and shape [n], one a sample, got a ClipStats",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS * 1j),
        TypeError,
        "psc.tails expects norms of a real dtype and shape [n], one a sample, got complex128[1000]",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS[None]),
        ValueError,
        "psc.tails expects norms of a real dtype and shape [n], one a sample, got float64[1, "
        "1000]; those of several batches go into one array by norms.ravel() or jnp.concatenate",
    ),
    Row(
        lambda: psc.tails.tail_index(np.append(NORMS, np.nan)),
        ValueError,
        "psc.tails expects finite norms, but 1 of 1001 are NaN or infinite; look at where they "
        "come from, or leave them out by norms[isfinite(norms)]",
    ),
    Row(
        lambda: psc.tails.tail_index(-NORMS),
        ValueError,
        "psc.tails expects norms ≥ 0, but 1000 of 1000 are negative, the least -2; of signed "
        "values pass the absolute ones",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS[:100]),
        ValueError,
        "psc.tails needs at least 500 positive norms for an interval that can be trusted, got "
        "100 in float64[100]; gather those of several batches",
    ),
    Row(
        lambda: psc.tails.tail_index(np.ones(1000)),
        ValueError,
        "the 26 largest norms are equal, so that they have no tail to estimate; pass the norms "
        "before clipping, in a dtype in which they do not saturate",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS, confidence=95),
        ValueError,
        "psc.tails expects `confidence` > 0 and < 1, got 95",
    ),
    Row(
        lambda: psc.tails.tail_index(NORMS, confidence="95%"),
        TypeError,
        "psc.tails expects a real number as `confidence`, got '95%'",
    ),
    Row(
        lambda: psc.tails.moment_scale(NORMS, p=np.inf),
        ValueError,
        "moment_scale expects `p` > 0 and < inf, got inf",
    ),
    Row(
        lambda: psc.tails.hill_estimator(NORMS, k=1000),
        ValueError,
        "hill_estimator expects 1 ≤ k < 1000, the number of positive norms, got 1000",
    ),
    Row(
        lambda: psc.tails.hill_estimator(NORMS, k=10.5),
        TypeError,
        "hill_estimator expects an int as `k`, got 10.5",
    ),
    # Optimizers
    Row(
        lambda: psc.ps_clip_sgd(0.1, 1.0),
        TypeError,
        "ps_clip_sgd expects both alpha and beta, or neither for psc.auto_threshold(), got "
        "alpha=1.0, beta=None",
    ),
]
