"""Check the configurations of the commands of `psclip`, before any work starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from psclip_optax.training.config.commands import (
    CompareConfig,
    Config,
    ModelConfig,
    PlotConfig,
    TaskConfig,
    TrainConfig,
    UsageError,
)
from psclip_optax.training.data.register import DATASETS


class _Range(NamedTuple):
    expected: str
    contains: Callable[[Any], bool]


_POSITIVE = _Range("a finite number above 0", lambda x: 0 < x < math.inf)


_ABOVE_ZERO = _Range("a number above 0", lambda x: x > 0)


_NOT_NEGATIVE = _Range("a number of at least 0", lambda x: x >= 0)


_PROPER_RATE = _Range("a number in [0, 1)", lambda x: 0 <= x < 1)


_COUNT = _Range("at least 1", lambda n: n >= 1)


_RANGES = {
    "width": _POSITIVE,
    "dropout": _PROPER_RATE,
    "batch_size": _COUNT,
    "momentum": _PROPER_RATE,
    "accumulate": _COUNT,
    "beta": _ABOVE_ZERO,
    "label_noise": _Range("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "pixel_df": _POSITIVE,
    "seed": _Range("an integer from 0 to 4294967295", lambda n: 0 <= n < 2**32),
    "lr": _POSITIVE,
    "alpha": _NOT_NEGATIVE,
    "steps": _COUNT,
    "eval_every": _COUNT,
    "checkpoint_every": _COUNT,
    "log_every": _COUNT,
    "num_processes": _COUNT,
    "process_id": _NOT_NEGATIVE,
    "distributed_timeout": _COUNT,
    "top": _Range("an integer from 1 to 400", lambda n: 1 <= n <= 400),
    "num_seeds": _Range("at least 3, for a standard error", lambda n: n >= 3),
    "validation_share": _Range("a number between 0 and 1", lambda x: 0 < x < 1),
    "momentum_learning_rates": _POSITIVE,
    "batch_clip_learning_rates": _POSITIVE,
    "batch_clip_thresholds": _POSITIVE,
    "ps_clip_learning_rates": _POSITIVE,
    "ps_clip_thresholds": _POSITIVE,
}


_CLIPPING_SAMPLES = "--method ps-clip, ps-clip-constant, ps-clip-auto or ps-clip-median"


def check_config(config: Config) -> None:
    """Checks every option before any work starts.

    Args:
      config: the configuration of a command.

    Raises:
      UsageError: a number is out of its range, the grids of `compare` differ in size, flags
        contradict each other, there is nothing to plot, or the figure is not a PNG.

    Examples:
      >>> check_config(TrainConfig(lr=-1.0))
      Traceback (most recent call last):
      psclip_optax.training.config.commands.UsageError: --lr: expected a finite number ...
    """
    for name, value in vars(config).items():
        values = value if isinstance(value, tuple) else (value,)
        for number in values:
            if name in _RANGES and number is not None and not _RANGES[name].contains(number):
                raise UsageError(f"{flag(name)}: expected {_RANGES[name].expected}, got {number}")
    if isinstance(config, ModelConfig):
        _check_parts(config)
    if isinstance(config, TaskConfig):
        _check_data(config)
    if isinstance(config, CompareConfig):
        _check_grids(config)
    if isinstance(config, TrainConfig):
        _check_training(config)
    if isinstance(config, PlotConfig):
        _check_plot(config)


def _check_parts(config: ModelConfig) -> None:
    if config.batch_size % config.accumulate:
        raise UsageError(
            f"--accumulate: expected a divisor of --batch-size {config.batch_size}, got "
            f"{config.accumulate}"
        )


def _check_data(config: TaskConfig) -> None:
    comes_with = DATASETS[config.dataset].comes_with
    if config.data_dir is not None and comes_with is not None:
        with_files = [name for name, source in DATASETS.items() if source.comes_with is None]
        raise UsageError(
            f"--data-dir: of {' and '.join(with_files)} alone, got it with --dataset "
            f"{config.dataset}, which comes with {comes_with}"
        )


def _check_plot(config: PlotConfig) -> None:
    if not config.runs:
        raise UsageError("plot: expected at least one folder that psclip train wrote, got none")
    if config.out.suffix.lower() != ".png":
        raise UsageError(f"--out: expected a file that ends in .png, got {config.out}")


def _check_training(config: TrainConfig) -> None:
    if config.clip_at != "sample" and not config.method.startswith("ps-clip"):
        raise UsageError(
            f"--clip-at: expected sample with --method {config.method}, got {config.clip_at}; "
            f"leave it out, or take {_CLIPPING_SAMPLES}"
        )
    if config.record_samples and not (
        config.method.startswith("ps-clip") and config.clip_at == "sample"
    ):
        raise UsageError(
            "--record-samples: expected a --method that clips each sample, with --clip-at sample, "
            f"got --method {config.method} --clip-at {config.clip_at}; to record momentum SGD, "
            "clip nothing by --method ps-clip --alpha inf"
        )
    if config.clip_groups != "all":
        _check_groups(config)
    if config.method == "ps-clip-auto" and not 1 <= config.beta <= 2:
        raise UsageError(
            f"--beta: expected a number in [1, 2] with --method ps-clip-auto, got {config.beta}"
        )
    if config.method in ("ps-clip-auto", "ps-clip-median"):
        _check_following(config)
    _check_processes(config)


def _check_groups(config: TrainConfig) -> None:
    if not config.method.startswith("ps-clip"):
        beside, other = f"--method {config.method}", _CLIPPING_SAMPLES
    elif config.clip_at == "batch":
        beside, other = "--clip-at batch", "--clip-at sample or micro-batch"
    else:
        return
    raise UsageError(
        f"--clip-groups: expected all with {beside}, got {config.clip_groups}; leave it out, or "
        f"take {other}"
    )


def _check_following(config: TrainConfig) -> None:
    if config.clip_at == "batch":
        raise UsageError(
            f"--clip-at: expected sample or micro-batch with --method {config.method}, got batch"
        )
    if config.method == "ps-clip-median" and config.alpha is not None:
        raise UsageError(
            f"--alpha: expected none with --method ps-clip-median, got {config.alpha}; leave it "
            "out, or take --method ps-clip"
        )


def _check_processes(config: TrainConfig) -> None:
    told = {
        "coordinator": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }
    given = [flag(name) for name, value in told.items() if value is not None]
    if given and not config.distributed:
        raise UsageError(f"{given[0]}: expected --distributed with it")
    if given and len(given) < len(told):
        missing = [flag(name) for name, value in told.items() if value is None]
        raise UsageError(f"{given[0]}: expected {' and '.join(missing)} with it")
    if config.coordinator is not None and not re.fullmatch(r".+:\d+", config.coordinator):
        raise UsageError(f"--coordinator: expected HOST:PORT, got {config.coordinator}")
    if config.process_id is not None and config.process_id >= (config.num_processes or 0):
        raise UsageError(
            f"--process-id: expected less than --num-processes {config.num_processes}, got "
            f"{config.process_id}"
        )


def flag(name: str) -> str:
    """Names the command-line flag of a field: `--batch-size` for `batch_size`.

    Args:
      name: a field of a configuration.

    Returns:
      The flag.

    Examples:
      >>> flag("batch_size")
      '--batch-size'
    """
    return "--" + name.replace("_", "-")


def _check_grids(config: CompareConfig) -> None:
    sizes = {
        "momentum": (len(config.momentum_learning_rates),),
        "batch-clip": (len(config.batch_clip_learning_rates), len(config.batch_clip_thresholds)),
        "ps-clip": (len(config.ps_clip_learning_rates), len(config.ps_clip_thresholds)),
    }
    if len(set(map(math.prod, sizes.values()))) > 1 or math.prod(sizes["momentum"]) == 0:
        found = ", ".join(
            f"{name} {' × '.join(map(str, size))} = {math.prod(size)}"
            if len(size) > 1
            else f"{name} {size[0]}"
            for name, size in sizes.items()
        )
        raise UsageError(
            f"expected as many trials for every method, at least 1, got {found}; give each the "
            "same budget with --momentum-learning-rates, --batch-clip-learning-rates, "
            "--batch-clip-thresholds, --ps-clip-learning-rates and --ps-clip-thresholds"
        )
