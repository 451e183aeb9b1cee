"""Messages of configurations and the command."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from typing import Any
from unittest import mock

import jax

from psclip_optax.cli import main
from psclip_optax.training.config.commands import CompareConfig, UsageError
from psclip_optax.training.run import tensorboard
from tests.messages.rows import Printed, Row, check, in_folder


def without_a_device():
    with mock.patch.object(jax, "devices", side_effect=AssertionError):
        command("explain", _explain=AssertionError)


def without_tensorboard_x():
    with mock.patch.dict(sys.modules, {"tensorboardX": None}):
        tensorboard.check_tensorboard()


def command(*arguments: str, **patched: Any):
    with contextlib.ExitStack() as stack:
        for name, value in patched.items():
            stack.enter_context(mock.patch(f"psclip_optax.cli.{name}", side_effect=value))
        main(arguments)


ROWS = [
    # Configurations
    Row(
        lambda: check(lr=0.0),
        UsageError,
        "--lr: expected a finite number above 0, got 0.0",
    ),
    Row(
        lambda: check(accumulate=3),
        UsageError,
        "--accumulate: expected a divisor of --batch-size 64, got 3",
    ),
    Row(
        lambda: check(method="momentum", clip_at="batch"),
        UsageError,
        "--clip-at: expected sample with --method momentum, got batch; leave it out, or take "
        "--method ps-clip, ps-clip-constant, ps-clip-auto or ps-clip-median",
    ),
    Row(
        lambda: check(method="batch-clip", clip_groups="layer"),
        UsageError,
        "--clip-groups: expected all with --method batch-clip, got layer; leave it out, or take "
        "--method ps-clip, ps-clip-constant, ps-clip-auto or ps-clip-median",
    ),
    Row(
        lambda: check(method="ps-clip-median", alpha=2.0),
        UsageError,
        "--alpha: expected none with --method ps-clip-median, got 2.0; leave it out, or take "
        "--method ps-clip",
    ),
    Row(
        lambda: check(method="ps-clip-auto", beta=3.0),
        UsageError,
        "--beta: expected a number in [1, 2] with --method ps-clip-auto, got 3.0",
    ),
    Row(
        lambda: check(method="ps-clip-auto", clip_at="batch"),
        UsageError,
        "--clip-at: expected sample or micro-batch with --method ps-clip-auto, got batch",
    ),
    Row(
        lambda: check(num_processes=2),
        UsageError,
        "--num-processes: expected --distributed with it",
    ),
    Row(
        lambda: check(distributed=True, coordinator="127.0.0.1:1"),
        UsageError,
        "--coordinator: expected --num-processes and --process-id with it",
    ),
    Row(
        lambda: check(distributed=True, coordinator="127.0.0.1", num_processes=2, process_id=1),
        UsageError,
        "--coordinator: expected HOST:PORT, got 127.0.0.1",
    ),
    Row(
        lambda: check(distributed=True, coordinator="127.0.0.1:1", num_processes=2, process_id=2),
        UsageError,
        "--process-id: expected less than --num-processes 2, got 2",
    ),
    Row(
        lambda: check(CompareConfig, ps_clip_thresholds=(1.0,)),
        UsageError,
        "expected as many trials for every method, at least 1, got momentum 9, batch-clip 3 × 3"
        " = 9, ps-clip 3 × 1 = 3; give each the same budget with --momentum-learning-rates, "
        "--batch-clip-learning-rates, --batch-clip-thresholds, --ps-clip-learning-rates and "
        "--ps-clip-thresholds",
    ),
    Row(
        lambda: check(data_dir=pathlib.Path("data")),
        UsageError,
        "--data-dir: of cifar10 and cifar100 alone, got it with --dataset digits, which comes with"
        " scikit-learn",
    ),
    Row(
        without_tensorboard_x,
        UsageError,
        "--tensorboard: tensorboardX is not installed; pip install 'psclip_optax[tensorboard]'",
    ),
    # The command
    Row(
        lambda: command("train", "--lr", "0"),
        Printed,
        "psclip: error: --lr: expected a finite number above 0, got 0.0\n",
    ),
    Row(
        in_folder(
            lambda folder: command(
                "train", "--dataset", "cifar10", "--data-dir", "nowhere", "--out", str(folder)
            )
        ),
        Printed,
        "psclip: error: expected cifar-10-batches-py/ or cifar-10-python.tar.gz in nowhere, "
        "which is not a folder; pass --data-dir with the folder that holds it, or leave it out "
        "to download\n",
    ),
    Row(
        lambda: command("train", _parse=ModuleNotFoundError("No module named 'tyro'", name="tyro")),
        Printed,
        "psclip: error: tyro is not installed; pip install 'psclip_optax[train]'\n",
    ),
    Row(
        without_a_device,
        Printed,
        "psclip: error: JAX finds no device: expected one of ⟨platforms⟩, which this installation "
        "of JAX has no plugin for; install it, or unset JAX_PLATFORMS\n",
    ),
    Row(
        lambda: command("train", _parse=KeyboardInterrupt),
        Printed,
        "psclip: interrupted\n",
    ),
]
