"""Messages of what is recorded of single samples, and ranked."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import psclip_optax as psc
from psclip_optax.training.steps import linen_train_step
from tests.messages.rows import Row, loss

ONE_SHAPE = (
    "most_clipped expects index, scale, norm and loss of one shape, one entry for each time that a "
    "sample was in a batch"
)


def ranked(index: Any = (0, 1), scale: Any = (0.5, 1.0), norm: Any = (2.0, 1.0), **others: Any):
    return psc.tails.most_clipped(index, scale, norm, **others)


ROWS = [
    # Ranking
    Row(lambda: ranked(by="gamma"), ValueError, 'by is "scale", "norm" or "loss", got \'gamma\''),
    Row(
        lambda: ranked(by="loss"),
        ValueError,
        'by="loss" ranks by losses, but none were given; pass loss=…',
    ),
    Row(
        lambda: ranked(index=[[0, 1], [2]]),
        TypeError,
        "index: most_clipped expects an array of integers, got a list",
    ),
    Row(
        lambda: jax.jit(lambda scale: ranked(scale=scale))(np.ones(2)),
        TypeError,
        "scale: most_clipped expects an array of real numbers that is concrete, on the host, got a "
        "traced one; return it from the jitted function and call most_clipped outside of it",
    ),
    Row(
        lambda: ranked(index=np.array([0.0, 1.0])),
        TypeError,
        "index: most_clipped expects an array of integers, got float64[2]",
    ),
    Row(
        lambda: ranked(norm=np.ones((2, 3))),
        ValueError,
        f"{ONE_SHAPE}, got index [2], scale [2], norm [2, 3]; by group, ‖g_k‖ is the root of the "
        "sum of squares of its norms, as a train step with return_samples gives it",
    ),
    Row(
        lambda: ranked(scale=[np.nan, np.nan]),
        ValueError,
        f"{ONE_SHAPE}, but no sample counts; leave out batches of padding alone",
    ),
    Row(lambda: ranked(index=[-1, 0]), ValueError, "index: expected 0 or more, got -1"),
    Row(
        lambda: ranked(scale=[0.5, 1.5]),
        ValueError,
        "scale: expected factors in [0, 1], as ClipStats.scales, got 1.5",
    ),
    Row(lambda: ranked(norm=[-2.0, 1.0]), ValueError, "norm: expected 0 or more, got -2"),
    # Train steps
    Row(
        lambda: linen_train_step(loss, gradients="mean", return_samples=True),
        ValueError,
        "return_samples is of gradients=\"clipped\", got gradients='mean', whose step has no norms "
        "to return; give the step a threshold, jnp.inf to clip nothing",
    ),
    Row(
        lambda: linen_train_step(
            loss, threshold=1.0, clip_at="micro-batch", microbatch_size=2, return_samples=True
        ),
        ValueError,
        "return_samples tells what clipping did to each sample, got it with "
        "clip_at='micro-batch', which clips no samples; leave one of them out, or take "
        "return_norms for the norms of what is clipped",
    ),
]
