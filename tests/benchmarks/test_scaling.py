import json

import pytest

from benchmarks.common.machine import describe_machine
from benchmarks.engine import scaling

CLOCK, WITHIN, BETWEEN = 1.5e9, 100e9, 3.1e9


def row(topology, mode, **changes):
    return {
        "topology": topology,
        "layout": "fsdp",
        "job": "model",
        "name": "Model",
        "mode": mode,
        "fits": True,
        "samples": 2 * scaling.num_chips({"topology": topology}),
        "cycles": 3_000_000,
        "bytes": {"all-gather": 2e9, "all-reduce": 5e8, "collective-permute": 3e8},
        "argument_bytes": 31_000_000,
        **changes,
    }


PLAIN = [row("2x2", "plain"), row("16x16", "plain")]


def step_of(rows, mode, chips):
    [found] = [one for one in rows if (one["mode"], one["chips"]) == (mode, chips)]
    return found


def test_a_step_is_the_formula_by_hand():
    (few, many) = (step_of(scaling.simulate(PLAIN), "plain", chips) for chips in (4, 1024))
    assert few["computing"] == pytest.approx(3e6 / CLOCK)
    assert few["sending"] == pytest.approx((3 / 4 * 2e9 + 2 * 3 / 4 * 5e8 + 3e8) / WITHIN)
    # 1,024 chips are 4 pods.
    within = (255 / 256 * 2e9 + 2 * 255 / 256 * 5e8 + 3e8) / WITHIN
    assert many["sending"] == pytest.approx(within + 2 * 3 / 4 * 31e6 / BETWEEN)
    assert many["samples_per_chip"] == 2
    total = many["computing"] + many["sending"]
    assert many["efficiency"] == pytest.approx((few["computing"] + few["sending"]) / total)


def test_a_mode_is_compared_with_the_plain_gradient_of_as_many_chips():
    ours = row("16x16", "one_pass", cycles=6_000_000)
    rows = scaling.simulate([*PLAIN, ours])
    found, plain = (step_of(rows, mode, 4096) for mode in ("one_pass", "plain"))
    # Sending takes longer than computing, so that overlap hides what the mode computes.
    assert plain["sending"] > found["computing"] == 2 * plain["computing"]
    assert found["overlapped"] == 1
    total = plain["computing"] + plain["sending"]
    assert found["apart"] == pytest.approx(1 + plain["computing"] / total)


def test_programs_that_cannot_be_compared_are_left_out():
    others = [
        row("4x4", "one_pass"),  # no plain gradient for 16 chips
        row("16x16", "two_pass", fits=False),
        row("16x16", "one_pass", layout="tensor parallel"),
        row("2x2", "plain", job="small", name="Small"),  # not compiled for a pod
    ]
    rows = scaling.simulate([*PLAIN, *others])
    assert {(one["job"], one["mode"]) for one in rows} == {("model", "plain")}
    assert [one["chips"] for one in rows] == [4, 256, 512, 1024, 2048, 4096]


def test_the_command_writes_its_result(tmp_path, capsys):
    source = tmp_path / "sharded.json"
    rows = [*PLAIN, row("16x16", "by_layer", cycles=3_300_000)]
    source.write_text(json.dumps({"machine": describe_machine(), "rows": rows}))
    scaling.main(source, tmp_path)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "scaling.json").read_text())
    by_layer = step_of(result["rows"], "by_layer", 256)
    assert "by_layer" in capsys.readouterr().out
    line = scaling.to_markdown(result).splitlines()[-1]
    assert f"| {by_layer['efficiency']:.0%} | 1.00–{by_layer['apart']:.2f} |" in line


def test_missing_programs_are_named(tmp_path):
    source = tmp_path / "sharded.json"
    source.write_text(json.dumps({"machine": {}, "rows": PLAIN[:1]}))
    with pytest.raises(SystemExit, match=r"expected fsdp programs for 256 chips in .*16x16"):
        scaling.main(source, tmp_path)
