"""Messages of `clipped_value_and_grad` about its options and its arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from tests.messages.rows import NORMS, PARAMS, Row, X, Y, grad, loss

ROWS = [
    # clipped_value_and_grad: its options
    Row(
        lambda: psc.clipped_grad(1.0, loss),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got 1.0",
    ),
    Row(
        lambda: psc.clipped_grad(psc.growing_threshold(1.0, 1.5), loss),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got "
        "GrowingThreshold(alpha=1.0, beta=1.5)",
    ),
    Row(
        lambda: grad(threshold=None),
        TypeError,
        "a threshold is a number or a callable from positions [n] to norms [n], got None both for "
        "the function and for the call; pass clipped_value_and_grad(loss, threshold), or "
        "threshold=… to the call",
    ),
    Row(
        lambda: psc.clipped_grad(loss, psc.tails.suggest_threshold(NORMS)),
        TypeError,
        "a threshold is a number or a callable from positions [n] to norms [n], got "
        "SuggestedThreshold(⟨what it holds⟩) with a threshold of its own; pass its .threshold",
    ),
    Row(
        lambda: psc.clipped_grad(loss, {"w": 1.0, "b": {"c": "much"}}),
        TypeError,
        "a threshold is a number or a callable from positions [n] to norms [n], got 'much'\n"
        "It came as threshold['b']['c'], for a group of its own.",
    ),
    Row(
        lambda: grad(threshold={"w": 1.0}),
        ValueError,
        "a tree of thresholds is a prefix of the parameters' tree, one for each subtree that is "
        "clipped together, got {'w': ConstantThreshold(value=1.0)} for parameters {'b': float32[2],"
        " 'w': float32[3, 2]}; psc.by_layer(params, threshold) makes one",
    ),
    Row(
        lambda: psc.clipped_grad(loss, {"w": 1.0, "b": 1.0, "s": 1.0})(PARAMS | {"s": {}}, X, Y),
        ValueError,
        "threshold['s'] is for a group, but params['s'] has no arrays to clip, got {}; leave it in "
        "the prefix as it is, without a threshold",
    ),
    Row(
        lambda: psc.each_slice(0.5),
        TypeError,
        "each_slice expects a sequence of thresholds, one for each slice, such as [0.5] * 12, got "
        "0.5",
    ),
    Row(
        lambda: psc.each_slice([]),
        ValueError,
        "each_slice expects a threshold for each slice, got none",
    ),
    Row(
        lambda: grad(threshold={"w": psc.each_slice([0.5] * 4), "b": 1.0}),
        ValueError,
        "threshold['w'] has 4 thresholds, one for each slice along the leading axis of each leaf "
        "of params['w'], but one has shape [3, 2]; give each_slice as many as there are slices",
    ),
    Row(
        lambda: psc.by_layer(PARAMS, 1.0, depth=0),
        ValueError,
        "by_layer expects an int of at least 1 as `depth`, got 0",
    ),
    Row(
        lambda: psc.by_layer({"w": {}}, 1.0),
        ValueError,
        "by_layer makes groups of parameters, got a tree without any, {'w': {}}",
    ),
    Row(
        lambda: grad(norm_precision="highest"),
        TypeError,
        "norm_precision is a jax.lax.Precision, such as jax.lax.Precision.HIGHEST, or None for JAX's "
        "default, got 'highest'",
    ),
    Row(
        lambda: grad(reduction="max"),
        ValueError,
        'reduction is "mean" or "sum", got \'max\'',
    ),
    Row(
        lambda: grad(mode="fast"),
        ValueError,
        "mode is one of 'auto', 'one_pass', 'two_pass', 'vmap', got 'fast'",
    ),
    Row(
        lambda: grad(microbatch_size=2.0),
        ValueError,
        "microbatch_size is a positive int or None, got 2.0",
    ),
    Row(
        lambda: grad(memory_limit_bytes="1 GiB"),
        ValueError,
        "memory_limit_bytes is a positive int or None, got '1 GiB'",
    ),
    Row(
        lambda: grad(clip_at="batch"),
        ValueError,
        'clip_at is "sample" or "micro-batch", got \'batch\'',
    ),
    Row(
        lambda: grad(clip_at="micro-batch"),
        ValueError,
        'clip_at="micro-batch" needs microbatch_size, the number of samples in each; that of '
        "the whole batch clips the batch's mean gradient",
    ),
    Row(
        lambda: grad(on_nonfinite="raise"),
        ValueError,
        'on_nonfinite is "drop" or "propagate", got \'raise\'',
    ),
    Row(
        lambda: grad(axis_name="data"),
        ValueError,
        "axis_name is the mesh axis (or a tuple of axes) of the jax.shard_map that this runs "
        "in, got 'data', which none around it maps; outside of shard_map leave it out: under "
        "jit a sharded batch needs no name",
    ),
    Row(
        lambda: grad(in_axes=(None, 0, 0)),
        ValueError,
        "in_axes is an int, None, or a tuple with one of them (or a tree prefix) for each of "
        "the 2 arguments after params, got (None, 0, 0)",
    ),
    Row(
        lambda: grad(in_axes=("x", "y")),
        ValueError,
        "in_axes is an int, None, or a tuple with one of them (or a tree prefix) for each of "
        "the 2 arguments after params, got ('x', 'y')",
    ),
    # clipped_value_and_grad: its arguments
    Row(
        lambda: grad(batch=(X,), call={"y": Y}),
        TypeError,
        "f(params, *batch, sample_mask=None, positions=None, threshold=None) takes the loss's "
        "arguments by position, got 'y' by name; write f(params, x, y), in the order of "
        "loss(params, x, y)",
    ),
    Row(
        lambda: grad(params={"w": np.ones(3, int)}),
        TypeError,
        "params['w'] is int64[3], but expected a real floating-point array; gradients are of "
        "floating-point parameters: part it off with eqx.partition or nnx.split, or close over "
        "it",
    ),
    Row(
        lambda: grad(params={"w": np.ones(3) * 1j}),
        TypeError,
        "params['w'] is complex128[3], but expected a real floating-point array; take its real "
        "and imaginary parts as two",
    ),
    Row(
        lambda: grad(params={"key": jax.random.key(0)}),
        TypeError,
        "params['key'] is key<fry>[], but expected a real floating-point array; gradients are "
        "of floating-point parameters: part it off with eqx.partition or nnx.split, or close "
        "over it",
    ),
    Row(
        lambda: grad(params={"w": jnp.ones(3, jnp.float8_e5m2)}),
        TypeError,
        "params['w'] is float8_e5m2[3], but expected a real floating-point array; cast it to "
        "bfloat16 or wider",
    ),
    Row(
        lambda: grad(params={"w": X[0], "activation": jnp.tanh}),
        TypeError,
        "params['activation'] is a PjitFunction, but expected an array; part it off with "
        "eqx.partition or nnx.split, or close over it",
    ),
    Row(
        lambda: grad(params={}),
        ValueError,
        "params has no arrays to take gradients of, got {}; they are the first argument, "
        "f(params, *batch)",
    ),
    Row(
        lambda: grad(batch=(X, Y[:3])),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[4, 3] (axis 0), batch[1]: "
        "float32[3] (axis 0); write in_axes=None for an argument that all samples share, "
        "jnp.asarray(…) around a list of numbers, and jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=(X[0], Y[0])),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[3] (axis 0), batch[1]: "
        "float32[] (axis 0); write in_axes=None for an argument that all samples share, "
        "jnp.asarray(…) around a list of numbers, and jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=(X, [1.0, 2.0, 3.0, 4.0])),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[4, 3] (axis 0), batch[1][0]:"
        " float32[] (axis 0), batch[1][1]: float32[] (axis 0), batch[1][2]: float32[] (axis 0),"
        " batch[1][3]: float32[] (axis 0); write in_axes=None for an argument that all samples "
        "share, jnp.asarray(…) around a list of numbers, and jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=(X, [1.0] * 60)),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got batch[0]: float32[4, 3] (axis 0), batch[1][0]:"
        " ⟨and so on⟩ batch[1][6]: float32[] (axis 0), and 53 more; write in_axes=None for an "
        "argument that all samples share, jnp.asarray(…) around a list of numbers, and "
        "jax.random.split(key, n) for a key",
    ),
    Row(
        lambda: grad(batch=()),
        ValueError,
        "f(params, *batch) takes the samples on the axes that in_axes names, the same number in"
        " each argument and in one at least, got none; write in_axes=None for an argument that "
        "all samples share, jnp.asarray(…) around a list of numbers, and jax.random.split(key, "
        "n) for a key",
    ),
    Row(
        lambda: grad(batch=(X, "abc")),
        TypeError,
        "batch[1] is a str, but expected an array; batch arguments are arrays, or trees of "
        "them; close over what is none",
    ),
    Row(
        lambda: grad(call={"sample_mask": Y}),
        ValueError,
        "sample_mask has shape [4] (one flag a sample, True where it counts) and dtype bool, "
        "got float32[4]",
    ),
    Row(
        lambda: grad(call={"sample_mask": np.ones(3, bool)}),
        ValueError,
        "sample_mask has shape [4] (one flag a sample, True where it counts) and dtype bool, "
        "got bool[3]",
    ),
    Row(
        lambda: grad(call={"sample_mask": "all"}),
        TypeError,
        "sample_mask has shape [4] (one flag a sample, True where it counts) and dtype bool, "
        "got a str",
    ),
    Row(
        lambda: grad(call={"positions": np.arange(1, 4)}),
        ValueError,
        "positions has shape [4] (one 1-based integer a sample), got int32[3]",
    ),
    Row(
        lambda: grad(call={"positions": "abc"}),
        TypeError,
        "positions has shape [4] (one 1-based integer a sample), got a str",
    ),
    Row(
        lambda: grad(threshold=lambda k: 1.0 * k, call={"positions": np.arange(4)}),
        ValueError,
        "positions are 1-based, but the smallest that came is 0; write `jnp.arange(1, n + 1)`",
    ),
    Row(
        lambda: grad(call={"positions": Y}),
        TypeError,
        "positions are 1-based integers k = 1, 2, …, but came as float32[4]; cast them with "
        ".astype(int)",
    ),
]
