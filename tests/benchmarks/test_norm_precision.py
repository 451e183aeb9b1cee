"""Check the benchmark of the precision of norms, and the guide's numbers."""

import json
import pathlib
import re

from benchmarks.common.publishing import RESULTS
from benchmarks.engine import norm_precision
from benchmarks.zoo.models import ZOO

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "pages" / "guide" / "engine.md"


def test_fewer_bits_are_further_off(tmp_path):
    norm_precision.main(out=tmp_path, models=("lora",), samples=4)
    (row,) = json.loads((tmp_path / "norm_precision.json").read_text())["rows"]
    coarse, fine = (row["errors"][form][0] for form in ("bfloat16", "TF32"))
    assert 1e-7 < fine < coarse < 1e-2


def test_the_guide_has_the_largest_errors_that_were_found():
    rows = json.loads((RESULTS / "norm_precision.json").read_text())["rows"]
    assert [row["model"] for row in rows] == list(ZOO)
    said = re.search(
        r"at most\s(\S+) with bfloat16 operands and (\S+) with TF32", GUIDE.read_text()
    )
    assert said is not None
    for form, number in zip(("bfloat16", "TF32"), said.groups(), strict=True):
        largest = max(row["errors"][form][1] for row in rows)
        assert f"{largest:.1e}" == f"{float(number):.1e}"
