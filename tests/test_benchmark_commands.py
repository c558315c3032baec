"""The laboratory's benchmarks as a user runs them: command, trainings, figure and JSON, with models of few weights."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import adaptive_depth, depth_extrapolation, lab, loop_design, parameter_efficiency, training_flops
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


@pytest.fixture
def asked(monkeypatch):
    """Of every prediction for an error: (module that asked, role of the data, loops asked for or None, the model's)."""
    roles = {lab.TRAINING: "training", lab.VALIDATION: "validation", lab.TEST: "test", lab.IN_A_ROW: "in a row"}
    made, found = [], []

    def spying(name):
        make = getattr(Permutation, name)

        def spy(self, each, second, seed, *rest):
            data = make(self, each, second, seed, *rest)
            made.append((data, roles[seed]))
            return data

        monkeypatch.setattr(Permutation, name, spy)

    spying("examples")
    spying("sequence")

    def inputs(data):
        return (data if isinstance(data, lab.Examples) else data[0]).inputs[0]

    def role(data) -> str:  # by what is in it: a benchmark may have changed the order
        rows = inputs(data)
        same = [
            role for made_of, role in made if len(inputs(made_of)) == len(rows) and inputs(made_of).sum() == rows.sum()
        ]
        return same[0] if same else "nobody's"

    for module in (lab, parameter_efficiency, depth_extrapolation, adaptive_depth):
        for name in ("predict_errors", "open_loop_errors"):
            if hasattr(module, name) and not (module is lab and name == "open_loop_errors"):
                ask = getattr(module, name)

                def spy(task, model, data, depth, *rest, ask=ask, module=module):
                    found.append((module.__name__.rpartition(".")[2], role(data), depth, model.training))
                    return ask(task, model, data, depth, *rest)

                monkeypatch.setattr(module, name, spy)
    return found


def test_errors_are_of_test_data_and_choices_of_validation_data(run, asked, monkeypatch, tmp_path):
    """At the controls' depth, or as deep as a benchmark says; what is chosen or logged while training is neither."""
    monkeypatch.setattr(
        lab.ProcessPoolExecutor, "submit", lambda pool, train, *a: SimpleNamespace(result=partial(train, *a))
    )
    loops = TINY["loops"]
    run(parameter_efficiency, "--rates", "0.001", "0.002", "--rates-in-full")
    by = {(module, role) for module, role, *_ in asked}
    assert by == {("lab", "validation"), ("parameter_efficiency", "test"), ("parameter_efficiency", "in a row")}
    depths = {depth for module, role, depth, _ in asked if module == "parameter_efficiency"}
    assert depths == {loops, None}, "a loop is read at the controls' FLOPs"
    assert {depth for module, _, depth, _ in asked if module == "lab"} == {2 * loops, None}
    assert not any(training for *_, training in asked)
    asked.clear()
    run(depth_extrapolation)
    assert {(module, role) for module, role, *_ in asked} == {("depth_extrapolation", "test")}
    asked.clear()
    run(adaptive_depth)
    halting = [role for module, role, depth, _ in asked if module == "adaptive_depth" and depth is None]
    assert set(halting) == {"validation", "test"}, "a tolerance is chosen on the one and read on the other"
    asked.clear()
    args = SimpleNamespace(rates=[0.001, 0.002], jobs=1, device="cpu")
    recipes = {"looped": replace(Permutation.models["looped"], steps=8)}
    chosen = lab.choose_rates(Permutation(), recipes, tmp_path / "rates", args)
    assert chosen["looped"].learning_rate in args.rates and {role for _, role, *_ in asked} == {"validation"}


def test_loops_and_controls_train_alike(monkeypatch, tmp_path):
    """On the same rows in the same order, at the learning rate that was asked for."""
    seen, rates = [], []
    task = Permutation()
    monkeypatch.setattr(Permutation, "training_set", lambda self: self.examples(30, 8, 1))
    loss, adam = Permutation.loss, lab.torch.optim.Adam
    monkeypatch.setattr(
        Permutation,
        "loss",
        lambda self, m, r, batch, rng: seen.append(batch.inputs[0].clone()) or loss(self, m, r, batch, rng),
    )
    monkeypatch.setattr(lab.torch.optim, "Adam", lambda parameters, rate: rates.append(rate) or adam(parameters, rate))
    for name in ("stacked", "single_pass", "looped, fixed depth", "untied, letter by letter"):
        lab.train(task, replace(Permutation.models[name], **TINY, steps=6, learning_rate=0.003), tmp_path)
    runs = [seen[i : i + 6] for i in range(0, 24, 6)]
    assert rates == [0.003] * 4
    for other in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], other, strict=True))
    easy, hard = (int(batch[:, 25:, 0].sum((1, 2)).max()) for batch in (runs[0][0], runs[0][-1]))
    assert easy < hard, "short words first, for all"


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
