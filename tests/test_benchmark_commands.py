"""The laboratory's benchmarks as a user runs them: command, trainings, figure and JSON, with models of few weights."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks import adaptive_depth, depth_extrapolation, loop_design, parameter_efficiency, training_flops
from benchmarks.grid_tasks import Permutation

TINY = {"hidden": 4, "loops": 8}  # so that a quarter of them is a depth, of half of them too


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(benchmark, its own words) -> its JSON, of tiny models of every kind on permutations."""
    kinds = ("looped", "stacked", "single_pass")
    monkeypatch.setattr(Permutation, "models", {name: replace(Permutation.models[name], **TINY) for name in kinds})
    monkeypatch.setattr(Permutation, "ladder", dict.fromkeys(kinds, ((4, 8), (6, 8))))
    monkeypatch.setattr(adaptive_depth, "TOLERANCES", (1.0, 0.01))

    def command(benchmark, *words: str) -> dict:
        files = {"--json": tmp_path / "x.json", "--figure": tmp_path / "x.png", "--runs": tmp_path / "runs"}
        told = [str(word) for pair in files.items() for word in pair]
        benchmark.main(["--quick", "--task", "permutation", "--steps", "8", "--jobs", "1", *told, *words])
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
        result = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert result["quick"] and result["task"] == "permutation" and result["seeds"] == [0]
        assert result["headline"] and all(math.isfinite(value["value"]) for value in result["headline"].values())
        return result

    return command


def test_parameter_efficiency(run):
    result = run(parameter_efficiency, "--rates", "0.001", "0.002", "--rates-in-full")
    assert [(row["model"], row["hidden"]) for row in result["rows"]] == [
        (name, hidden) for name in ("looped", "stacked", "single_pass") for hidden in (4, 6)
    ]
    assert all(row["learning_rate"] in (0.001, 0.002) and row["steps"] == 8 for row in result["rows"])
    assert result["verdict"].startswith("up to 8 letters: at an error of ")
    measured = ["up to 8 letters", "5 steps in a row", "20 steps in a row", "50 steps in a row"]
    assert all(list(row["error"]) == measured == Permutation().measured for row in result["rows"])
    some = run(parameter_efficiency, "--models", "looped", "stacked")
    assert {row["model"] for row in some["rows"]} == {"looped", "stacked"} == set(some["options"]["models"])
    for names in (["looped"], ["stacked", "single_pass"], ["looped", "stacked", "nothing"]):
        with pytest.raises(SystemExit):
            run(parameter_efficiency, "--models", *names)
    sized = run(parameter_efficiency, "--models", "looped", "stacked", "--sizes", "4x4", "8x5")
    assert [(row["hidden"], row["loops"]) for row in sized["rows"]] == [(4, 4), (8, 5)] * 2
    for sizes in ("0x4", "32", "4x4x4", "8x2"):
        with pytest.raises(SystemExit):
            run(parameter_efficiency, "--sizes", sizes)


def test_loop_design(run, monkeypatch):
    depths, predict = [], loop_design.predict_errors
    monkeypatch.setattr(loop_design, "predict_errors", lambda *a: depths.append(a[3]) or predict(*a))
    result = run(loop_design)
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == list(loop_design.designs(Permutation())) and rows[loop_design.BASE]["injection"] == "zoh"
    assert all(set(row["error"]) == {*Permutation().measured, "9-16 letters", "17-32 letters"} for row in rows.values())
    two = rows["two layers abab"], rows["two layers aabb"]
    sizes = {name: row["parameters"] for name, row in rows.items() if row not in two}
    assert len(set(sizes.values())) == 1 < two[0]["parameters"] == two[1]["parameters"] > sizes[loop_design.BASE]
    assert two[0]["loops"] * two[0]["layers"][1] == TINY["loops"]
    assert all(f"{name}: " in result["verdict"] for name in list(rows)[1:])
    assert depths == [size * loop_design.DEEP for size in [8] * 8 + [4] * 2], "the same FLOPs for all"
    with pytest.raises(SystemExit):
        run(loop_design, "--rate-seeds", "0")


def test_depth_extrapolation(run):
    result = run(depth_extrapolation)
    looped = [row for row in result["rows"] if row["model"] == "looped"]
    assert [row["depth"] for row in looped] == depth_extrapolation.depths_of(Permutation.models["looped"])
    assert len(result["rows"]) == len(looped) + 2
    assert set(looped[0]["error"]) == {"1-2", "3-4", "5-8", "9-16", "17-32"}
    assert "for the controls' FLOPs of 8" in result["verdict"]


def test_adaptive_depth(run):
    result = run(adaptive_depth)
    full = adaptive_depth.FULL * TINY["loops"]
    rules = {row["rule"]: row for row in result["rows"]}
    assert {adaptive_depth.FIXED, "residual", "prediction", "gate"} <= set(rules)
    assert all(1.0 <= row["loops"] <= full for row in rules.values())
    assert f"{full} loops" in result["verdict"]


def test_training_flops(run):
    result = run(training_flops)
    by_name = {row["variant"]: row for row in result["rows"]}
    assert by_name["stacked"]["steps_to_goal"] is not None
    assert by_name["stacked"]["speedup"] == 1.0  # it is measured against itself
    assert all(row["flops_per_update"] > 0 and row["curve"] for row in by_name.values())


def test_training_flops_adds_seeds_to_an_earlier_result(run, tmp_path):
    """At its rates and beside its rows, which stay as they are; what is not of these recipes is refused."""
    one = run(training_flops)
    rows = [row | {"learning_rate": 0.003} for row in one["rows"]]
    known, wrong = tmp_path / "known.json", tmp_path / "wrong.json"
    known.write_text(json.dumps(one | {"quick": False, "rows": rows}), encoding="utf-8")

    def more(path, *words: str, steps: str = "8") -> None:
        told = ["--json", str(tmp_path / "two.json"), "--runs", str(tmp_path / "two"), "--jobs", "1", *words]
        training_flops.main(["--task", "permutation", "--steps", steps, "--more-of", str(path), *told])

    more(known, "--seeds", "2")
    two = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    assert two["rows"][: len(rows)] == rows and two["seeds"] == [0, 1] and "rates" not in two["options"]
    added = two["rows"][len(rows) :]
    assert [row["variant"] for row in added] == [row["variant"] for row in rows]
    assert {(row["seed"], row["learning_rate"]) for row in added} == {(1, 0.003)}
    assert {path.name.split("_")[5] for path in (tmp_path / "two" / "permutation").glob("*.pt")} == {"1"}
    assert all(row["goal"] == added[0]["error"] for row in added), "the new seed's own control"
    (tmp_path / "two.json").unlink()
    some = [{"rows": some} for some in ([], [{}], rows[1:], [row | {"variant": "gone"} for row in rows])]
    for change in ({"task": "sandpile"}, {"quick": True}, {"benchmark": "cost"}, *some):
        wrong.write_text(json.dumps(one | {"quick": False, "rows": rows} | change), encoding="utf-8")
        with pytest.raises(SystemExit):
            more(wrong)
    for words, steps in (((), "9"), (("--quick",), "8"), (("--loop", "looped, fixed depth"), "8")):
        with pytest.raises(SystemExit):
            more(known, *words, steps=steps)
    assert not (tmp_path / "two.json").exists()
