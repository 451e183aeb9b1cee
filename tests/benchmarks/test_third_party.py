import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import summary
from benchmarks.third_party import compare, report, run, worker
from benchmarks.third_party.common import MODES, NUM_SAMPLES, Case, Model
from benchmarks.third_party.libraries import LIBRARIES, Library

FOLDER = pathlib.Path(run.__file__).parent


def dense(dtype="float64"):
    params = {"w": np.ones((3, 2)), "b": np.zeros(2)}
    x = jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 3))
    loss = lambda params, x: jnp.square(jnp.tanh(x @ params["w"]) + params["b"]).sum()
    return Model(lambda: Case(loss, params, (x,)), dtype)


def row(model, outcome="ok", error=1e-16, **others):
    errors = {mode: {"norms": 0.0, "gradients": error} for mode in MODES}
    figures = {"parameters": 1234, "share_of_routes": {"dense": 0.75, "direct": 0.25}}
    kept = {"errors": errors} if outcome != "failed" else {"stage": "build", "message": "E: a|b"}
    return {"model": model, "dtype": "float64", "outcome": outcome} | figures | kept | others


def records():
    first = {"library": "flax", "models_of": "flax", "version": "1.2", "jax": "0.9"}
    return [
        first | {"rows": [row("MLP"), row("RNN", "wrong", 0.5), row("CNN", "failed")]},
        {"library": "jraph", "models_of": "jraph", "failed": "no such version", "rows": []},
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_model_of_our_own_is_ok(dtype):
    found = compare.compare(dense(dtype))
    assert (found["outcome"], found["parameters"], found["dtype"]) == ("ok", 8, dtype)
    assert sum(found["share_of_routes"].values()) == pytest.approx(1)
    assert set(found["errors"]) == set(MODES)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("broken", ["gradients", "norms"])
@pytest.mark.parametrize("by", [1 + 1e-8, np.nan])
def test_what_is_wrong_is_told(monkeypatch, broken, by):
    clipped = compare.clipped

    def wrong(*arguments):
        grads, norms = clipped(*arguments)
        if broken == "norms":
            return grads, norms * by
        return grads | {"w": grads["w"] * by}, norms

    monkeypatch.setattr(compare, "clipped", wrong)
    assert compare.compare(dense())["outcome"] == "wrong"


def test_what_raises_is_told_with_its_stage():
    def absent():
        raise ImportError("no such layer\nand more")

    case = Case(lambda params, x: params * x * jnp.nan, np.ones(()), (np.ones(NUM_SAMPLES),))
    found = compare.compare(Model(absent))
    assert (found["stage"], found["message"]) == ("build", "ImportError: no such layer")
    assert compare.compare(Model(lambda: case))["stage"] == "vmap(grad)"


def test_half_of_the_samples_are_clipped():
    with compare.enable_x64(True):
        case = compare.prepared(dense().build(), "float64")
        _, norms = compare.reference(case)
    assert sum(norms > np.median(norms)) == NUM_SAMPLES / 2


def test_every_library_has_a_file_of_models_and_every_file_a_library():
    names = {path.stem for path in (FOLDER / "models").glob("*.py")} - {"__init__"}
    assert {library.models for library in LIBRARIES} == names
    assert len({library.models for library in LIBRARIES}) == len(LIBRARIES)


def test_distribution_is_without_its_version():
    assert Library("a", ("a-b==4.55.*", "flax")).distribution == "a-b"


def test_the_last_row_of_a_model_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    worker.write(path, {"model": "MLP"} | worker.ENDED)
    worker.write(path, row("MLP"))
    worker.write(path, {"model": "RNN"} | worker.ENDED)
    assert [found["outcome"] for found in worker.rows_in(path).values()] == ["ok", "failed"]


def test_a_model_that_ends_the_process_does_not_end_the_others(tmp_path):
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'if [ ! -e "$6" ]; then echo \'{"model": "MLP", "outcome": "failed"}\' > "$6"; exit 9; fi\n'
        'echo \'{"model": "RNN", "outcome": "ok"}\' >> "$6"\n'
    )
    script.chmod(0o755)
    rows = run.run_worker(script, Library("flax", ("flax",)), tmp_path / "rows.jsonl", 60)
    assert [found["outcome"] for found in rows] == ["failed", "ok"]


def test_a_library_without_rows_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "installed", lambda *_: None)
    monkeypatch.setattr(run, "run_worker", lambda *_: [])
    monkeypatch.setattr(run, "VERSIONS", "print('[1, 2]')")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    found = run.tried(Library("flax", ("flax",)), tmp_path, 60)
    assert (found["failed"], found["rows"]) == ("its models cannot be imported", [])


def test_records_keep_the_order_of_the_libraries(tmp_path):
    kept = []
    for record in [*reversed(records()), records()[0] | {"version": "2"}]:
        kept = run.add_record(kept, record)
    assert [(record["models_of"], record.get("version")) for record in kept] == [
        ("flax", "2"),
        ("jraph", None),
    ]
    run.write(tmp_path / "third_party.json", kept)
    assert run.load(tmp_path / "third_party.json") == kept


def test_what_is_done_is_not_tried_again_and_wrong_gradients_are_an_error(tmp_path, capsys):
    run.write(tmp_path / "third_party.json", records())
    with pytest.raises(SystemExit, match="wrong"):
        run.main(out=tmp_path, libraries=("flax", "jraph"))
    assert "Trying" not in capsys.readouterr().out


def test_table_has_a_line_a_model():
    assert report.to_markdown(records()).splitlines()[2:] == [
        "| flax 1.2 | 0.9 | MLP | 1,234 | dense 75%, direct 25% | float64 | 0e+00 | 1e-16 | ok |",
        "| flax 1.2 | 0.9 | RNN | 1,234 | dense 75%, direct 25% | float64 | 0e+00 | 5e-01 | wrong |",
        "| flax 1.2 | 0.9 | CNN | 1,234 | dense 75%, direct 25% | float64 | – | – | build fails: E: a\\|b |",
        "| jraph | – | – | – | – | – | – | – | not tried: no such version |",
    ]
    assert report.summarise(records()) == {
        "libraries": 1,
        "models": 3,
        "outcomes": {"ok": 1, "wrong": 1, "failed": 1},
        "largest_error": {"float64": 0.5, "float32": 0.0},
    }


def test_committed_results_are_complete_and_right():
    result = json.loads((summary.RESULTS / "third_party.json").read_text())
    assert [record["models_of"] for record in result["libraries"]] == [
        library.models for library in LIBRARIES
    ]
    assert report.summarise(result["libraries"]) == result["summary"]
    assert result["summary"]["libraries"] >= 20
    assert all(record["rows"] for record in result["libraries"])
    assert "wrong" not in result["summary"]["outcomes"]
