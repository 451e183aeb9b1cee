import json

import pytest

from benchmarks.engine import accumulation


@pytest.mark.slow
def test_quick_run_writes_its_table_and_figure(tmp_path, capsys):
    accumulation.main(out=tmp_path, quick=True)
    result = json.loads((tmp_path / "accumulation.json").read_text())
    assert [(row["part"], row["case"]) for row in result["rows"]] == [
        (part, case) for part in accumulation.PARTS for case in accumulation.CASES
    ]
    for row in result["rows"]:
        low, middle, high = row["ratio_quartiles"]
        assert 0 < low <= middle <= high
        if row["case"] == accumulation.BASELINE:
            assert (low, high, row["bytes_ratio"]) == (1, 1, 1)
    assert (tmp_path / "accumulation.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "train step, n = 4" in printed
    assert all(case in printed for case in accumulation.CASES)


def test_an_update_reads_the_gradient_once_more():
    _, unclipped, clipped = [], {}, {}
    for name, tx in accumulation.optimizers().items():
        case = accumulation.update_alone(MODEL, tx, MODEL.params)
        (clipped if "before" in name else unclipped)[name] = accumulation.bytes_accessed(case)
    extra = clipped.popitem()[1] / unclipped[accumulation.BASELINE]
    assert extra == pytest.approx(1, abs=0.35)


MODEL = accumulation.ZOO["mlp"]("small")
