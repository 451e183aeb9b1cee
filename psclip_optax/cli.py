"""The command `psclip`: compare the methods, or train with one of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from psclip_optax import __version__
from psclip_optax.training.configs import CompareConfig, TrainConfig, UsageError, check_config

_DESCRIPTION = """Per-sample gradient clipping for JAX and Optax.

`psclip compare` shows it against momentum SGD and batch clipping; `psclip --version` tells the \
version."""
_EXIT_LOST, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130
_TRAIN_EXTRA = {
    "flax",
    "grain",
    "matplotlib",
    "orbax",
    "pooch",
    "requests",
    "rich",
    "sklearn",
    "tyro",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the arguments after the command's name; those of the process by default.

    Returns:
      The exit status: 0; 2 after one line on stderr that says what is wrong; 130 when interrupted.
      A process that lost the others of its run ends at once, with 1 and one line on stderr.

    Example:
      >>> main(["--version"])
      psclip ...
      0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"psclip {__version__}")
        return 0
    try:
        return _run(arguments or ["--help"])
    except UsageError as error:
        print(f"psclip: error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_EXTRA:
            raise
        print(
            f"psclip: error: {error.name} is not installed; pip install 'psclip_optax[train]'",
            file=sys.stderr,
        )
        return _EXIT_USAGE
    except KeyboardInterrupt:
        print("psclip: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _run(arguments: list[str]) -> int:
    config = _parse(arguments)
    if config is None:
        return 0
    check_config(config)
    # Here, because these import Flax, Grain, Orbax and Matplotlib.
    from rich.console import Console

    from psclip_optax.training.archives import DatasetError
    from psclip_optax.training.distributed import ProcessLostError

    command = _compare if isinstance(config, CompareConfig) else _train
    try:
        command(config, Console())
    except DatasetError as error:
        raise UsageError(str(error)) from error
    except ProcessLostError as error:
        _end_at_once(f"psclip: error: {error}")
    return 0


def _end_at_once(message: str) -> NoReturn:
    # Python's own end would wait for the processes that are lost.
    print(message, file=sys.stderr, flush=True)
    os._exit(_EXIT_LOST)


def _parse(arguments: list[str]) -> CompareConfig | TrainConfig | None:
    """The configuration; None where help was asked for and printed."""
    import tyro

    commands: Any = (
        Annotated[CompareConfig, tyro.conf.subcommand("compare")]
        | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(commands, prog="psclip", description=_DESCRIPTION, args=arguments)
    except SystemExit as stop:
        if not stop.code:
            return None
        command = f"{arguments[0]} " if arguments[0] in ("compare", "train") else ""
        raise UsageError(
            f"{_in_one_line(complaint.getvalue())} (see psclip {command}--help)"
        ) from stop


def _in_one_line(complaint: str) -> str:
    """What Tyro says between its first two rules, without the box and the colours around it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", complaint)
    # The rules are of hyphens where the output's encoding has no better.
    _, told, *_ = [*re.split(r"^.*──.*$|^[ -]*-[ -]*$", plain, flags=re.MULTILINE), plain]
    message = " ".join(told.replace("│", " ").split())
    return message[:1].lower() + message[1:]


def _compare(config: Any, console: Any) -> None:
    from psclip_optax.training.comparison import compare

    compare(config, console)


def _train(config: Any, console: Any) -> None:
    from psclip_optax.training.distributed import is_first_process
    from psclip_optax.training.runs import train

    result = train(config, console)
    if not is_first_process():
        return
    console.print(f"Test accuracy: {result.accuracy:.1%}", highlight=False)
    for what, name in (
        ("Configuration", "config.json"),
        ("Metrics", "metrics.jsonl"),
        ("Checkpoints", "checkpoints"),
    ):
        console.print(f"{what}: {result.out / name}", highlight=False, soft_wrap=True)
