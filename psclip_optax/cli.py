"""The command `psclip`: compare methods, train with one of them, and look at the results."""

from __future__ import annotations

import functools
import operator
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from psclip_optax import __version__
from psclip_optax.training.command.encodings import spelling_out
from psclip_optax.training.config.checks import check_config
from psclip_optax.training.config.commands import (
    CompareConfig,
    Config,
    DoctorConfig,
    ExplainConfig,
    OutliersConfig,
    PlotConfig,
    TrainConfig,
    UsageError,
)

# Tyro does not wrap a description: lines of up to 60 columns.
_DESCRIPTION = """Per-sample gradient clipping for JAX and Optax.

`psclip --version` prints the version."""
_COMMANDS = {
    "compare": CompareConfig,
    "train": TrainConfig,
    "plot": PlotConfig,
    "explain": ExplainConfig,
    "outliers": OutliersConfig,
    "doctor": DoctorConfig,
}
_EXIT_WRONG, _EXIT_LOST, _EXIT_CLOSED, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 1, 1, 2, 130
_TRAIN_EXTRA = {
    "filelock",
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
      The exit status: 0 on success; 1 if `doctor` found something wrong or the reader of the output
      closed the pipe; 2 after one line on stderr that says what is wrong, or after Tyro's message
      if flags cannot be read; 130 if interrupted. A process that lost the other processes of its
      run ends at once, with 1 and one line on stderr.

    Examples:
      >>> main(["--version"])
      psclip ...
      0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with spelling_out():
        return _status(arguments or ["--help"])


def _status(arguments: list[str]) -> int:
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe is handled
        return status
    except BrokenPipeError:
        # Otherwise Python would print an error at exit about output that it could not write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_CLOSED
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
    if arguments == ["--version"]:
        print(f"psclip {__version__}")
        return 0
    # Recognised without a parser: it has to work without the extra that installs the parser.
    try:
        config = DoctorConfig() if arguments == ["doctor"] else _parse(arguments)
    except SystemExit as stop:  # Tyro has printed help or an error
        return int(stop.code or 0)
    check_config(config)
    if isinstance(config, DoctorConfig):
        return _doctor(config)
    # Imported here, because these import Flax, Grain, Orbax and Matplotlib.
    from rich.console import Console

    from psclip_optax.training.command.doctor import why_no_device
    from psclip_optax.training.data.archives import DatasetError
    from psclip_optax.training.run.distributed import ProcessLostError

    command = {
        CompareConfig: _compare,
        TrainConfig: _train,
        PlotConfig: _plot,
        ExplainConfig: _explain,
        OutliersConfig: _outliers,
    }[type(config)]
    try:
        command(config, Console())
    except DatasetError as error:
        raise UsageError(str(error)) from error
    except (RuntimeError, AssertionError) as error:
        reason = why_no_device()
        if reason is None:
            raise
        raise UsageError(reason) from error
    except ProcessLostError as error:
        _end_at_once(f"psclip: error: {error}")
    return 0


def _end_at_once(message: str) -> NoReturn:
    # A normal exit would wait for the lost processes.
    print(message, file=sys.stderr, flush=True)
    os._exit(_EXIT_LOST)


def _parse(arguments: list[str]) -> Config:
    """Reads the configuration; exits after printing help or an error."""
    import tyro

    # An argument without a default, the folders to plot, is positional.
    subcommands = [
        Annotated[config, tyro.conf.subcommand(name), tyro.conf.PositionalRequiredArgs]
        for name, config in _COMMANDS.items()
    ]
    commands: Any = functools.reduce(operator.or_, subcommands)
    return tyro.cli(commands, prog="psclip", description=_DESCRIPTION, args=arguments)


def _compare(config: Any, console: Any) -> None:
    from psclip_optax.training.compare.comparison import compare

    compare(config, console)


def _train(config: Any, console: Any) -> None:
    from psclip_optax.training.run.distributed import is_first_process
    from psclip_optax.training.run.runs import train

    result = train(config, console)
    if not is_first_process():
        return
    console.print(f"Test accuracy: {result.accuracy:.1%}", highlight=False)
    if result.loss is None:
        console.print(
            "The loss on the test set is not finite: the run diverged. Take a smaller --lr, or a "
            "--method that clips; psclip plot shows from where on.",
            soft_wrap=True,
        )
    for what, name in (
        ("Configuration", "config.json"),
        ("Metrics", "metrics.jsonl"),
        ("Checkpoints", "checkpoints"),
        *[("Samples", "samples")] * config.record_samples,
        *[("TensorBoard", "tensorboard")] * config.tensorboard,
    ):
        console.print(f"{what}: {result.out / name}", highlight=False, soft_wrap=True)


def _plot(config: Any, console: Any) -> None:
    from psclip_optax.training.plot.plots import plot

    console.print(f"Figure: {plot(config)}", highlight=False, soft_wrap=True)


def _explain(config: Any, console: Any) -> None:
    from psclip_optax.training.command.explanation import explain

    # Printed unchanged: a table must not be wrapped, and its brackets are not markup.
    console.out(explain(config), highlight=False)


def _outliers(config: Any, console: Any) -> None:
    from psclip_optax.training.command.outliers import outliers
    from psclip_optax.training.output.files import OUTLIERS

    out = outliers(config)
    for what, name in zip(("Samples", "Classes", "Page", "Figure"), OUTLIERS, strict=True):
        console.print(f"{what}: {out / name}", highlight=False, soft_wrap=True)


def _doctor(config: DoctorConfig) -> int:
    from psclip_optax.training.command.doctor import diagnose, report

    findings = diagnose(config)
    print(report(findings))
    return _EXIT_WRONG if any(finding.verdict == "wrong" for finding in findings) else 0
