"""Messages of the train steps for Flax, the models and the methods."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import psclip_optax as psc
from psclip_optax import training
from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.run import methods
from psclip_optax.training.steps import linen_eval_step, linen_train_step, nnx_train_step
from tests.messages.rows import PARAMS, RULE, Row, X, Y, loss


def step(loss=loss, tx=None, batch=(X, Y), call: Any = None, **options: Any):
    tx = optax.chain(psc.per_sample_clip(1.0), optax.sgd(0.1)) if tx is None else tx
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    return linen_train_step(loss, **options)(state, *batch, **call or {})


def with_dropout():
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, psc.ps_clip_sgd(0.1, 1.0, 2.0), wrt=nnx.Param)
    return nnx_train_step(lambda model, x: model(x).sum())(model, optimizer, X)


def swapped():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, psc.ps_clip_sgd(0.1, 1.0, 2.0), wrt=nnx.Param)
    return nnx_train_step(lambda model, x: model(x)[0])(optimizer, model, X)


ROWS = [
    # Train steps
    Row(
        lambda: getattr(training, "linen_step"),  # noqa: B009
        AttributeError,
        "module 'psclip_optax.training' has no attribute 'linen_step'",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="clip"),
        ValueError,
        "gradients is one of 'per_sample', 'mean', 'clipped', got 'clip'",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="mean", threshold=1.0),
        ValueError,
        'gradients="clipped" takes one of threshold and threshold_from, or neither, the others '
        "take none, got gradients='mean', threshold=1.0, threshold_from=None; per_sample_clip has its "
        "threshold in the optimizer",
    ),
    Row(
        lambda: linen_train_step(loss, microbatch_size=2),
        ValueError,
        'gradients="per_sample" stacks the whole batch; microbatch_size is of "clipped" and '
        '"mean", got 2',
    ),
    Row(
        lambda: linen_train_step(psc.clipped_value_and_grad(loss, 1.0), mode="vmap", has_aux=True),
        ValueError,
        "a gradient function that is built has its options already, got mode, has_aux beside it; "
        "give them to what builds it, as in linen_train_step("
        "psclip_optax.clipped_value_and_grad(loss, threshold, has_aux=True))",
    ),
    Row(
        lambda: linen_train_step(psc.clipped_value_and_grad(loss, 1.0, in_axes=(0, None))),
        ValueError,
        "a train step takes batches with the samples on axis 0, of all devices together, got a "
        "clipped_value_and_grad with in_axes=(0, None) and axis_name=None; leave both out, close "
        "over what samples share, and shard the batch by its jax.sharding",
    ),
    Row(
        lambda: linen_train_step(
            psc.clipped_value_and_grad(loss), threshold=1.0, threshold_from=lambda _: 1.0
        ),
        ValueError,
        "a train step takes one of threshold and threshold_from, or neither, got threshold=1.0, "
        "threshold_from=⟨a function⟩",
    ),
    Row(
        lambda: linen_train_step(psc.clipped_grad(loss, 1.0)),
        TypeError,
        "a train step logs the loss too, but clipped_grad leaves it out; pass "
        "psclip_optax.clipped_value_and_grad(loss, threshold)",
    ),
    Row(
        lambda: step(tx=optax.sgd(0.1)),
        ValueError,
        'gradients="per_sample", which is meant where no threshold is given, has stacked '
        "gradients [n, …] for one per_sample_clip in the optimizer, whose state holds 0 "
        "PerSampleClipState. For any optimizer pass threshold=… to the step, or write "
        "optax.chain(psclip_optax.track_norms(), …) for the automatic one; or write "
        "optax.chain(psclip_optax.per_sample_clip(threshold), …) or psclip_optax.ps_clip_sgd(…), "
        'or gradients="mean", which clips nothing',
    ),
    Row(
        lambda: step(gradients="mean"),
        ValueError,
        'gradients="mean" and "clipped" give the optimizer gradients of the parameters\' own '
        "shapes, but its per_sample_clip would take their first axis for samples. Write "
        'gradients="per_sample", or leave per_sample_clip out of the optimizer',
    ),
    Row(
        lambda: step(tx=optax.sgd(0.1), threshold=RULE),
        ValueError,
        "an AdaptiveThreshold has its state in the optimizer's, where one track_norms of the "
        "same rule keeps it; this one holds 0 TrackNormsState. Write "
        "optax.chain(psclip_optax.track_norms(rule), …) with the rule that the step has",
    ),
    Row(
        lambda: step(tx=psc.track_norms(psc.min_norm_threshold()), threshold=RULE),
        ValueError,
        "an AdaptiveThreshold has its state in the optimizer's, where one track_norms of the "
        "same rule keeps it; this one holds 1 TrackNormsState, of another rule. Write "
        "optax.chain(psclip_optax.track_norms(rule), …) with the rule that the step has",
    ),
    Row(
        lambda: step(batch=(X, Y[:3])),
        ValueError,
        "the batch arguments are arrays (or pytrees of them) with the n samples on the first "
        "axis of each, got shapes [[4, 3], [3]]; give each sample its own entry, e.g. "
        "jax.random.split(key, n) for a key, and close over what all samples share",
    ),
    Row(
        lambda: step(batch=(X, jax.random.key(0))),
        ValueError,
        "the batch arguments are arrays (or pytrees of them) with the n samples on the first "
        "axis of each, got shapes [[4, 3], []]; give each sample its own entry, e.g. "
        "jax.random.split(key, n) for a key, and close over what all samples share",
    ),
    Row(
        lambda: linen_train_step(1.0, gradients="mean"),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got 1.0",
    ),
    Row(
        lambda: linen_eval_step(None),
        TypeError,
        "the loss is a function loss(params, *example) and comes before the threshold, got None",
    ),
    Row(
        lambda: step(lambda params, x, y: x @ params["w"]),
        TypeError,
        "the loss is of ONE example and returns a scalar, got float32[2]; average what is left "
        "of it, write has_aux=True if it returns (loss, aux), or take [0] of what "
        "model(x[None]) returns",
    ),
    Row(
        lambda: step(lambda params, x, y: jnp.sum(x > 0)),
        TypeError,
        "the loss is a real floating-point scalar, got int32[]; cast an integer with "
        ".astype(float), and take the real part of what is complex",
    ),
    Row(
        lambda: step(lambda params, x, y: loss(params, x, y) * 1j),
        TypeError,
        "the loss is a real floating-point scalar, got complex64[]; cast an integer with "
        ".astype(float), and take the real part of what is complex",
    ),
    Row(
        lambda: step(lambda params, x, y: "loss"),
        TypeError,
        "the loss is of ONE example and returns a scalar, got a str; average what is left of "
        "it, write has_aux=True if it returns (loss, aux), or take [0] of what model(x[None]) "
        "returns",
    ),
    Row(
        lambda: step(lambda params, x, y: (loss(params, x, y), {"x": x}), has_aux=True),
        TypeError,
        "aux['x'] is float32[3], but expected a scalar of one example, for its mean over the "
        "samples is logged; reduce it, for instance by .mean()",
    ),
    Row(
        lambda: step(lambda params, x, y: (loss(params, x, y), {"name": "x"}), has_aux=True),
        TypeError,
        "aux['name'] is a str, but expected an array; aux is averaged over the samples, so "
        "leave out, or reduce, what is no number",
    ),
    Row(
        lambda: step(has_aux=True),
        TypeError,
        "with has_aux=True the loss returns (loss, aux), got float32[]; return the pair, or "
        "write has_aux=False",
    ),
    Row(
        lambda: linen_train_step(loss, mode="fast"),
        ValueError,
        "mode is one of 'auto', 'one_pass', 'two_pass', 'vmap', got 'fast'",
    ),
    Row(
        lambda: linen_train_step(loss, threshold_from=1.0),
        TypeError,
        "threshold_from is a function from the optimizer's state to the threshold, got 1.0; a "
        "threshold itself is passed as threshold",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="mean", return_norms=True),
        ValueError,
        "return_norms is of gradients=\"clipped\", got gradients='mean', whose step has no norms "
        "to return; give the step a threshold, jnp.inf to clip nothing",
    ),
    Row(
        lambda: linen_train_step(loss, gradients="mean", microbatch_size=2, clip_at="micro-batch"),
        ValueError,
        "clip_at is of gradients=\"clipped\", got 'micro-batch' with gradients='mean'; give the "
        "step a threshold, or leave clip_at out",
    ),
    Row(
        lambda: step(tx=optax.sgd(0.1), gradients="mean", call={"positions": np.arange(1, 5)}),
        ValueError,
        "positions are of samples that are clipped one by one; a step with "
        'gradients="mean" or clip_at="micro-batch" has no use for them: leave them out',
    ),
    Row(
        lambda: linen_train_step(loss)(PARAMS, X, Y),
        TypeError,
        "the step is called as step(state, *batch) with a "
        "flax.training.train_state.TrainState, got a dict; make one by "
        "TrainState.create(apply_fn=…, params=…, tx=…)",
    ),
    Row(
        swapped,
        TypeError,
        "the step is called as step(model, optimizer, *batch) with an nnx.Optimizer, got a "
        "Optimizer and a Linear; make one by nnx.Optimizer(model, tx, wrt=nnx.Param)",
    ),
    Row(
        with_dropout,
        ValueError,
        "the loss reads the model's state, but this one writes to '⟨path⟩', of which each "
        "sample would have its own value. For dropout pass one key a sample as an argument of "
        "the batch and write model(x, rngs=nnx.Rngs(dropout=key)); for batch normalisation take"
        " nnx.GroupNorm or nnx.LayerNorm, or use_running_average=True; return what you want to "
        "record as aux",
    ),
    # Models and methods
    Row(
        lambda: build_model("vgg", 10),
        ValueError,
        "name is one of 'mlp', 'small_cnn', 'alexnet', 'resnet18', got 'vgg'",
    ),
    Row(
        lambda: build_model("mlp", "10"),
        ValueError,
        "num_classes is an int of at least 1, got '10'",
    ),
    Row(
        lambda: build_model("mlp", 10, width=0.0),
        ValueError,
        "build_model expects `width` > 0 and < inf, got 0",
    ),
    Row(
        lambda: build_model("mlp", 10, dropout_rate=1.0),
        ValueError,
        "build_model expects `dropout_rate` >= 0 and < 1, got 1",
    ),
    Row(
        lambda: build_model("alexnet", 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))),
        ValueError,
        "AlexNet takes images [..., H, W, C] with H and W at least 16, got shape [1, 8, 8, 1]; "
        'resize them, or take "mlp" or "resnet18"',
    ),
    Row(
        lambda: methods.method_that_clips("adam", "batch"),
        ValueError,
        "name: expected one of 'sgd', 'momentum', 'batch-clip', 'ps-clip', 'ps-clip-constant', "
        "'ps-clip-auto', 'ps-clip-median', got 'adam'",
    ),
    Row(
        lambda: methods.learning_rate_schedule("linear", 4),
        ValueError,
        "name: expected 'cosine' or 'constant', got 'linear'",
    ),
]
