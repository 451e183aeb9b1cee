"""Check the command: one clear line and status 2 for errors, and its files."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import psclip_optax
from psclip_optax.cli import main
from psclip_optax.training.command import doctor
from tests import slow

TINY = ["--width", "0.05", "--batch-size", "16", "--steps", "4"]


def assert_one_line_error(captured, *expected: str):
    assert captured.err.startswith("psclip: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    for text in expected:
        assert text in captured.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"psclip {psclip_optax.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_names_the_commands(argv: list[str], capsys):
    assert main(argv) == 0
    captured = capsys.readouterr()
    for command in ("compare", "train", "plot", "explain", "outliers", "doctor"):
        assert command in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", "dataset model method lr alpha beta steps seed out data-dir cache-dir width "
                  "dropout momentum batch-size schedule label-noise pixel-df augment eval-every "
                  "checkpoint-every log-every resume accumulate clip-at distributed coordinator "
                  "num-processes process-id distributed-timeout tensorboard record-samples"),
        ("compare", "dataset model data-dir steps batch-size num-seeds overwrite out "
                    "momentum-learning-rates batch-clip-learning-rates batch-clip-thresholds "
                    "ps-clip-learning-rates ps-clip-thresholds"),
        ("plot", "out"),
        ("explain", "dataset model width dropout batch-size engine accumulate clip-at"),
        ("outliers", "by top out overwrite data-dir cache-dir"),
        ("doctor", "cache-dir"),
    ],
)  # fmt: skip
def test_help_lists_the_options(command: str, options: str, capsys):
    assert main([command, "--help"]) == 0
    output = capsys.readouterr().out
    for option in options.split():
        assert f"--{option}" in output
    assert "(default: )" not in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--lr", "0"], ["--lr: expected a finite number above 0, got 0.0"]),
        (["train", "--lr", "nan"], ["--lr: expected a finite number above 0, got nan"]),
        (["train", "--alpha", "-1"], ["--alpha: expected a number of at least 0, got -1.0"]),
        (["train", "--beta", "0"], ["--beta: expected a number above 0, got 0.0"]),
        (["train", "--steps", "0"], ["--steps: expected at least 1, got 0"]),
        (["train", "--seed", "-1"], ["--seed: expected an integer from 0 to 4294967295, got -1"]),
        (["train", "--width", "inf"], ["--width"]),
        (["train", "--dropout", "1"], ["--dropout: expected a number in [0, 1), got 1.0"]),
        (["train", "--momentum", "1"], ["--momentum"]),
        (["train", "--batch-size", "0"], ["--batch-size"]),
        (["train", "--label-noise", "1.1"], ["--label-noise: expected a number in [0, 1]"]),
        (["train", "--pixel-df", "0"], ["--pixel-df"]),
        (["train", "--eval-every", "0"], ["--eval-every"]),
        (["train", "--checkpoint-every", "0"], ["--checkpoint-every"]),
        (["train", "--log-every", "0"], ["--log-every"]),
        (["train", "--accumulate", "0"], ["--accumulate: expected at least 1, got 0"]),
        (
            ["train", "--accumulate", "3"],
            ["--accumulate: expected a divisor of --batch-size 64, got 3"],
        ),
        (["compare", "--accumulate", "5"], ["--accumulate: expected a divisor"]),
        (
            ["train", "--method", "momentum", "--clip-at", "batch"],
            ["--clip-at: expected sample with --method momentum, got batch", "--method ps-clip"],
        ),
        (
            ["train", "--method", "ps-clip-auto", "--clip-at", "batch"],
            ["--clip-at: expected sample or micro-batch with --method ps-clip-auto, got batch"],
        ),
        (
            ["train", "--method", "sgd", "--clip-groups", "leaf"],
            ["--clip-groups: expected all with --method sgd, got leaf", "--method ps-clip"],
        ),
        (
            ["train", "--clip-at", "batch", "--clip-groups", "layer", "--alpha", "1"],
            ["--clip-groups: expected all with --clip-at batch, got layer", "micro-batch"],
        ),
        (
            ["train", "--method", "ps-clip-auto", "--beta", "3"],
            ["--beta: expected a number in [1, 2] with --method ps-clip-auto, got 3.0"],
        ),
        (["train", "--num-processes", "2"], ["--num-processes: expected --distributed with it"]),
        (
            ["train", "--distributed", "--coordinator", "127.0.0.1:1"],
            ["--coordinator: expected --num-processes and --process-id with it"],
        ),
        (
            [
                "train",
                "--distributed",
                "--coordinator",
                "127.0.0.1:1",
                "--num-processes",
                "2",
                "--process-id",
                "2",
            ],
            ["--process-id: expected less than --num-processes 2, got 2"],
        ),
        (["train", "--distributed-timeout", "0"], ["--distributed-timeout: expected at least 1"]),
        (["compare", "--num-seeds", "2"], ["--num-seeds: expected at least 3"]),
        (["compare", "--ps-clip-thresholds", "1"], ["momentum 9", "ps-clip 3 × 1 = 3"]),
        (["compare", "--ps-clip-thresholds", "1", "0", "2"], ["--ps-clip-thresholds", "got 0.0"]),
        (["plot"], ["plot: expected at least one folder that psclip train wrote, got none"]),
        (["plot", "run"], ["run: expected a folder that psclip train", "there is no such folder"]),
        (
            ["plot", "run", "--out", "a.jpg"],
            ["--out: expected a file that ends in .png, got a.jpg"],
        ),
        (["explain", "--width", "0"], ["--width: expected a finite number above 0, got 0.0"]),
        (["explain", "--accumulate", "3"], ["--accumulate: expected a divisor"]),
        (["explain", "--model", "alexnet"], ["--model alexnet: AlexNet takes images"]),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(
    argv: list[str], expected: list[str], capsys, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert_one_line_error(capsys.readouterr(), *expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--foo", "1"], ["Unrecognized options: --foo", "run psclip --help"]),
        (["train", "--methd", "sgd"], ["--methd", "Perhaps you meant", "--method"]),
        (["train", "--lr", "x"], ["--lr", "'x'", "Learning rate"]),
        (["train", "--lr"], ["Missing value for argument '--lr'", "run psclip train --help"]),
        (["explode"], ["explode", "subcommands: compare, train, plot, explain, outliers, doctor"]),
        (["explode", "--lr", "1"], ["explode", "subcommands: compare, train, plot"]),
        (["compare", "--dataset", "mnist"], ["'mnist'", "digits", "cifar100"]),
        (["train", "--method", "adam"], ["'adam'", "ps-clip-constant"]),
        (["train", "--seed", "1.5"], ["--seed", "'1.5'"]),
        (["train", "--clip-at", "step"], ["--clip-at", "'step'", "micro-batch"]),
        (["plot", "--foo"], ["Unrecognized options: --foo"]),
        (["explain", "--model", "vit"], ["'vit'", "resnet18", "run psclip explain --help"]),
        (["explain", "--clip-at", "batch"], ["--clip-at", "'batch'", "micro-batch"]),
        (["doctor", "--foo"], ["Unrecognized options: --foo"]),
    ],
)
def test_flags_that_cannot_be_read_are_told_by_tyro_and_nothing_is_written(
    argv: list[str], expected: list[str], capsys, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    told = " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""
    assert all(text in told for text in expected), told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", slow.but(["ascii"], ["utf-8", "ascii"]))
def test_bad_flag_is_told_in_any_encoding(encoding: str):
    completed = subprocess.run(
        [sys.executable, "-m", "psclip_optax", "train", "--bet", "1"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "FORCE_COLOR": "1"},
        timeout=120,
    )
    assert completed.returncode == 2
    told = completed.stderr.decode(encoding)
    assert "Unrecognized options: --bet" in told
    assert ("beta of the k-th sample's threshold alpha" in told) == (encoding == "ascii")
    assert "?" not in told


def in_a_process(*argv: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "psclip_optax", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("encoding", slow.but(["cp1252"], ["ascii", "cp1252"]))
def test_help_is_readable_in_any_encoding(encoding: str):
    running = in_a_process("train", "--help", PYTHONIOENCODING=encoding)
    output, complaint = running.communicate(timeout=120)
    assert (running.returncode, complaint) == (0, b"")
    told = " ".join(output.decode(encoding).split())
    assert "beta of the k-th sample's threshold alpha k^(1/beta)" in told
    assert "?" not in told


@pytest.mark.parametrize(
    "argv", slow.but([["train", "--help"]], [["train", "--help"], ["--version"]]), ids=" ".join
)
def test_a_reader_that_is_gone_is_no_error(argv: list[str]):
    running = in_a_process(*argv)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(timeout=120) == 1


@pytest.mark.parametrize(
    ("command", "platform"),
    slow.diagonal(["train", "compare", "explain"], ["nonsense", "cuda"], every=3),
)
def test_platform_that_is_not_installed_is_one_line(
    command: str, platform: str, tmp_path: pathlib.Path
):
    out = [] if command == "explain" else ["--out", str(tmp_path / "out")]
    running = in_a_process(command, *out, JAX_PLATFORMS=platform)
    _, complaint = running.communicate(timeout=300)
    told = complaint.decode().splitlines()
    if platform == "cuda" and running.returncode == 0:
        pytest.skip("there is a GPU")
    assert (running.returncode, len(told)) == (2, 1)
    assert told[0].startswith("psclip: error: JAX finds no device: ")
    assert platform in told[0]
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_jax_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def fail(config, console):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("psclip_optax.cli._explain", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["explain"])


@pytest.mark.parametrize("command", ["train", "compare"])
def test_unwritable_folder_is_one_line(command: str, capsys, tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    assert main([command, "--out", str(tmp_path / "file" / "run")]) == 2
    assert_one_line_error(capsys.readouterr(), "--out: cannot write to", "Not a directory")


@pytest.mark.parametrize("command", ["train", "compare"])
def test_missing_dataset_is_one_line(command: str, capsys, tmp_path: pathlib.Path):
    missing = ["--dataset", "cifar10", "--data-dir", str(tmp_path / "nowhere")]
    assert main([command, *missing, "--out", str(tmp_path / "out")]) == 2
    assert_one_line_error(capsys.readouterr(), "expected cifar-10-batches-py/", "--data-dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "compare", "plot", "explain"])
def test_missing_extra_is_one_line(command: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main([command]) == 2
    assert_one_line_error(capsys.readouterr(), "tyro", "pip install 'psclip_optax[train]'")


def test_train_tells_where_things_are_and_resumes(capsys, tmp_path: pathlib.Path):
    argv = ["train", *TINY, "--method", "momentum", "--checkpoint-every", "2", "--out"]
    assert main([*argv, str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "Test accuracy: " in output
    assert "diverged" not in output
    for name in ("config.json", "metrics.jsonl", "checkpoints"):
        assert f"{tmp_path / name}\n" in output
        assert (tmp_path / name).exists()
    assert main([*argv, str(tmp_path)]) == 2
    assert_one_line_error(capsys.readouterr(), "holds a run already", "--resume")
    assert main([*argv, str(tmp_path), "--resume", "--lr", "0.5"]) == 2
    assert_one_line_error(capsys.readouterr(), "--lr is 0.5, was 0.05")
    assert main([*argv, str(tmp_path), "--resume"]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [4, 4]


def test_train_tells_that_it_diverged(capsys, tmp_path: pathlib.Path):
    options = ["--method", "momentum", "--lr", "1e30", "--schedule", "constant"]
    assert main(["train", *TINY, *options, "--out", str(tmp_path)]) == 0
    assert "the run diverged" in capsys.readouterr().out


def test_plot_tells_where_the_figure_is(capsys, tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text('{"config": {"lr": 0.1}}')
    line = '{"kind": "train", "step": 10, "loss": 2.0, "clipped_share": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    figure = tmp_path / "new" / "figure.png"
    assert main(["plot", str(tmp_path), "--out", str(figure)]) == 0
    assert capsys.readouterr().out == f"Figure: {figure}\n"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_explain_prints_the_plan_as_it_is(capsys):
    argv = ["explain", "--model", "small_cnn", "--width", "0.25", "--engine", "two_pass"]
    assert main([*argv, "--batch-size", "16"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("mode two_pass")
    assert "16 samples" in output.splitlines()[0]
    assert re.search(
        r"^\['Conv_0'\]\['kernel'\] +float32\[3, 3, 1, 8\] +conv ", output, re.MULTILINE
    )


def test_doctor_tells_what_it_found(capsys, tmp_path: pathlib.Path):
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert f"psclip_optax {psclip_optax.__version__}" in output
    assert f"folder for downloads: {tmp_path}" in output
    assert "All is well" in output.splitlines()[-1]


def test_doctor_ends_with_1_where_something_is_wrong(capsys, monkeypatch: pytest.MonkeyPatch):
    wrong = doctor.Finding("wrong", "numbers: not the same")
    monkeypatch.setattr(doctor, "check_numbers", lambda: [wrong])
    assert main(["doctor"]) == 1
    assert "wrong  numbers: " in capsys.readouterr().out


def test_doctor_works_without_the_extra():
    script = """
import sys
sys.modules |= dict.fromkeys(["tyro", "rich", "flax", "grain", "orbax", "matplotlib", "sklearn",
                              "pooch", "requests", "tensorboardX"])
from psclip_optax.cli import main
sys.exit(main(["doctor"]))
"""
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    assert "All is well" in completed.stdout


def test_module_is_the_command():
    completed = subprocess.run(
        [sys.executable, "-m", "psclip_optax", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "usage: psclip" in completed.stdout
