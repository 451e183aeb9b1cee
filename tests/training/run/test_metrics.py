from __future__ import annotations

import json
import pathlib

import pytest

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.run.metrics import (
    append_record,
    cut_back,
    read_intact_records,
    read_records,
)

LINES = '{"step": 1, "loss": 0.25}\n{"step": 2, "loss": null}\n{"step": 2, "kind": "test"}\n'


def test_records_are_lines_of_valid_json(tmp_path: pathlib.Path):
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        append_record(file, {"step": 1, "loss": 0.25})
        append_record(file, {"step": 2, "loss": float("nan")})
        append_record(file, {"step": 2, "kind": "test"})
        assert path.read_text() == LINES, "a record is not on its way to the disk at once"


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', ""])
@pytest.mark.parametrize(("step", "num_kept"), [(0, 0), (1, 1), (2, 3), (5, 3)])
def test_cut_back_keeps_whole_records_up_to_the_step(
    torn: str, step: int, num_kept: int, tmp_path: pathlib.Path
):
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES + torn)
    kept = cut_back(path, step)
    assert kept == [json.loads(line) for line in LINES.splitlines()[:num_kept]]
    assert path.read_text() == "".join(LINES.splitlines(keepends=True)[:num_kept])


def test_there_may_be_no_file_yet(tmp_path: pathlib.Path):
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 3) == []
    assert read_records(path) == []
    assert read_intact_records(path) == []


RECORD = '{"kind": "train", "step": 1}'


@pytest.mark.parametrize("torn", ["", '{"kind": "tr', RECORD])
def test_a_torn_last_line_is_that_of_a_run_that_still_writes(torn: str, tmp_path: pathlib.Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{RECORD}\n{torn}")
    assert read_intact_records(path) == [{"kind": "train", "step": 1}]


@pytest.mark.parametrize("damaged", ['{"kind": "tr', "", "7", '{"step": 2}', '["kind", "step"]'])
def test_a_damaged_line_among_others_is_told(damaged: str, tmp_path: pathlib.Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{RECORD}\n{damaged}\n{RECORD}\n")
    with pytest.raises(UsageError, match=r"metrics.jsonl, line 2: expected a record with kind"):
        read_intact_records(path)
