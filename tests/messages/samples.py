"""Messages about recording, ranking and showing single samples."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np

import psclip_optax as psc
from psclip_optax.training.command.outliers import outliers
from psclip_optax.training.config.commands import OutliersConfig, UsageError
from psclip_optax.training.run.samples import RECORD, read_samples
from psclip_optax.training.steps import linen_train_step
from tests.messages.rows import Row, check, in_folder, loss

ONE_SHAPE = (
    "most_clipped expects index, scale, norm and loss of one shape, one entry for each time that a "
    "sample was in a batch"
)


def ranked(index: Any = (0, 1), scale: Any = (0.5, 1.0), norm: Any = (2.0, 1.0), **others: Any):
    return psc.tails.most_clipped(index, scale, norm, **others)


def of_run(folder: pathlib.Path, *indices: int, recorded: bool = True, **options: Any):
    """Run the command on a run on digits that recorded one sample per step."""
    told = {"dataset": "digits", "label_noise": 0.0, "pixel_df": None, "seed": 0}
    folders = {"data_dir": None, "cache_dir": None}
    (folder / "config.json").write_text(json.dumps({"config": told | folders}))
    if recorded:
        (folder / "samples").mkdir()
    for step, index in enumerate(indices, 1):
        write_part(folder / "samples", step, index)
    return outliers(OutliersConfig(run=folder, top=1, **options))


def write_part(folder: pathlib.Path, step: int, index: int = 0):
    records = np.array([(step, index, 0.5, 2.0, 1.0)], RECORD)
    np.save(folder / f"{step:08}-{step:08}.npy", records)


def with_a_gap(folder: pathlib.Path):
    for step in (1, 3):
        write_part(folder, step)
    return read_samples(folder)


def damaged(folder: pathlib.Path):
    (folder / "00000001-00000004.npy").write_bytes(b"torn")
    return read_samples(folder)


def of_other_steps(folder: pathlib.Path):
    write_part(folder, 2)
    (folder / "00000002-00000002.npy").rename(folder / "00000001-00000001.npy")
    return read_samples(folder)


def of_another_dtype(folder: pathlib.Path):
    np.save(folder / "00000001-00000001.npy", np.zeros(3))
    return read_samples(folder)


def twice(folder: pathlib.Path):
    out = folder / "outliers"
    out.mkdir()
    (out / "outliers.csv").touch()
    of_run(folder, 0)


DAMAGED = (
    "⟨folder⟩.npy: expected as many records of each step from 1 to {last}, as psclip train wrote "
    "them, but the file is damaged; train again in another folder"
)

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
    # Records of a run
    Row(
        lambda: check(record_samples=True, method="momentum"),
        UsageError,
        "--record-samples: expected a --method that clips each sample, with --clip-at sample, got "
        "--method momentum --clip-at sample; to record momentum SGD, clip nothing by --method "
        "ps-clip --alpha inf",
    ),
    Row(
        in_folder(with_a_gap),
        UsageError,
        "⟨folder⟩: expected a part that begins at step 2, got 00000003-00000003.npy; what was "
        "recorded between is lost, so that means over the run would be wrong: train again in "
        "another folder",
    ),
    Row(in_folder(damaged), UsageError, DAMAGED.format(last=4)),
    Row(in_folder(of_other_steps), UsageError, DAMAGED.format(last=1)),
    Row(in_folder(of_another_dtype), UsageError, DAMAGED.format(last=1)),
    # The command
    Row(
        lambda: check(OutliersConfig, run=pathlib.Path("run"), top=0),
        UsageError,
        "--top: expected an integer from 1 to 400, got 0",
    ),
    Row(
        lambda: outliers(OutliersConfig(run=pathlib.Path("nowhere"))),
        UsageError,
        "nowhere: expected a folder that psclip train wrote, config.json is missing",
    ),
    Row(
        in_folder(lambda folder: of_run(folder, recorded=False)),
        UsageError,
        "⟨folder⟩: this run did not record its samples, samples/ is missing; train with psclip "
        "train --record-samples",
    ),
    Row(
        in_folder(lambda folder: of_run(folder)),
        UsageError,
        "⟨folder⟩: no samples in samples/ yet; wait for the run's first --checkpoint-every steps",
    ),
    Row(
        in_folder(twice),
        UsageError,
        "--out: ⟨folder⟩ holds a result already (outliers.csv); choose another folder, or pass "
        "--overwrite",
    ),
    Row(
        in_folder(lambda folder: of_run(folder, 1297)),
        UsageError,
        "⟨folder⟩: expected samples 0 to 1296 of digits, got 1297; pass --data-dir with the data "
        "that the run had",
    ),
]
