"""benchmarks.cost, of the loop: the slope's arithmetic, memory that can be counted by hand, and the command, tiny."""

import json
import os

import numpy as np
import pytest
import torch

from agents import PlannerAgent
from benchmarks import cost, loop_cost, update_cost
from benchmarks.loop_cost import (
    MEAN,
    MOST,
    USES,
    Effort,
    Use,
    conclude,
    equal_mean_schedule,
    equal_mean_tolerance,
    further_loop,
    inputs,
    interleaved,
    make,
    measure_group,
    median_interval,
    pick,
)
from benchmarks.memory import peak_bytes
from loopwm.dynamics import DYNAMICS

CPU = torch.device("cpu")
TINY = Effort((8,), (1, 4, 16), ("act", "train"), 0.0)


def test_slope_of_a_further_loop():
    loops = [1, 2, 4, 16]
    line = np.array([2.0 + 0.5 * (t - 1) for t in loops])
    rounds = np.stack([line, 3.0 * line, line[0] + 4.0 * (line - line[0])])  # a slower machine changes nothing
    assert further_loop(loops, rounds).tolist() == pytest.approx([0.25, 0.25, 1.0])
    assert further_loop([4, 1], np.array([[5.0, 2.0]])).tolist() == pytest.approx([0.5]), "in any order"
    noisy = line + np.array([0.0, 0.1, -0.1, 0.0])
    assert further_loop(loops, noisy[None])[0] == pytest.approx(np.polyfit(loops, noisy, 1)[0] / 2.0)


def test_median_and_its_interval():
    given = median_interval([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert given["value"] == 3.0 and 1.0 <= given["low"] < 3.0 < given["high"] <= 1000.0
    assert median_interval([2.0] * 5) == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_every_call_is_timed_once_a_round():
    counts = [0, 0, 0]

    def call(i):
        counts[i] += 1

    taken = interleaved([lambda i=i: call(i) for i in range(3)], 0.0, CPU)
    assert taken.shape == (5, 3) and (taken > 0).all() and counts == [7, 7, 7]


def test_peak_memory_by_hand():
    before = torch.ones(1000)

    def two_at_once():
        a = before + 1.0  # 4000 bytes
        b = a * 2.0  # 4000 more
        del a
        c = b[:10].view(2, 5)  # no memory
        return c.sum() + before.t().sum()  # 4 bytes each, and their sum

    assert peak_bytes(two_at_once, CPU) == 8000
    assert peak_bytes(lambda: before.mul_(1.0), CPU) == 0, "in place, where memory was there before"
    assert peak_bytes(lambda: [before + i for i in range(3)], CPU) == 12000

    weight = torch.ones(1000, requires_grad=True)
    deep, shallow = (peak_bytes(lambda n=n: _deep(weight, n), CPU) for n in (20, 10))
    assert deep - shallow == 10 * 4000, "what backward needs is kept"


def _deep(x, times):
    for _ in range(times):
        x = x.sin()
    return x.sum().item()


def test_memory_of_the_loop_grows_with_depth_only_where_gradients_are_kept():
    groups = {name: measure_group(name, 8, TINY, CPU) for name in ("act", "train")}
    acting, training = (
        [case["peak_bytes"] for case in group["cases"] if case["dynamics"] == "looped" and not case["adaptive"]]
        for group in groups.values()
    )
    assert acting[1] == acting[2] and training[0] < training[1] < training[2]
    for group in groups.values():
        assert {case["dynamics"] for case in group["cases"]} == set(DYNAMICS)
        assert pick(group, loops=MEAN, adaptive=False, dynamics="looped")["of_mean"]["value"] == 1.0
        assert pick(group, loops=MOST, adaptive=False)["of_most"]["value"] == 1.0


def test_adaptive_depth_is_compared_at_equal_mean():
    looped = make("looped", 16, CPU)
    for use in (Use(1, calls=32), Use(64)):
        z, action = inputs(use, 16, CPU)
        assert z.shape == (use.calls, use.batch, 16) and action.shape == (use.calls, use.batch, 6)
        tolerance, mean = equal_mean_tolerance(looped, z, action)
        assert abs(mean - MEAN) < 0.25 and looped.halting.tolerance == tolerance
        loops = looped(z.flatten(0, 1), action.flatten(0, 1)).loops
        assert float(loops.double().mean()) == mean and loops.unique().numel() > 2
    schedule, mean = equal_mean_schedule(looped, 64)
    assert float(schedule.loops.double().mean()) == mean and abs(mean - MEAN) < 0.1


def test_deep_cases_of_wide_models_are_left_out_but_never_the_cap():
    dear = TINY._replace(loops=(1, 4, 16, 64), flops=0.0)
    loops = [case.loops for case in loop_cost.cases(USES["plan"], 8, dear, CPU) if case.dynamics == "looped"]
    assert loops[:3] == [1, 4, 16] and 64 not in loops


def test_the_verdict_follows_the_figures():
    def figure(value):
        return {"value": value, "low": value, "high": value}

    def row(width, slope, of_mean):
        case = {
            "dynamics": "looped",
            "loops": 4.1,
            "adaptive": True,
            "of_mean": figure(of_mean),
            "of_most": figure(0.5),
        }
        control = case | {"dynamics": "wide", "adaptive": False, "of_mean": figure(0.75)}
        return {"use": "act", "width": width, "slope": figure(slope), "cases": [case, control]}

    headline, verdict = conclude([row(64, 0.3, 1.2), row(1024, 0.7, 0.9)])
    assert "0.30 (act)" in verdict and "in 1 of 2 cases, worst 0.70 (act, width 1024)" in verdict
    assert "0.90 to 1.20 times 4 loops" in verdict and "0.50 times 16 loops" in verdict
    assert headline["wide / 4 loops, act, width 64"]["value"] == 0.75
    assert headline["adaptive / 4 loops, act, width 64"]["value"] == 1.2


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)  # not the tests' process
    monkeypatch.setattr(loop_cost, "QUICK", TINY)
    result, figure = tmp_path / "x.json", tmp_path / "x.png"
    cost.main(["--of", "loop", "--quick", "--json", str(result), "--figure", str(figure)])
    given = json.loads(result.read_text())
    assert given["benchmark"] == "cost" and figure.stat().st_size > 10_000
    assert [row["use"] for row in given["rows"]] == ["act", "train"]
    assert "of a prediction with one" in given["verdict"]


def test_what_updates_and_actions_take(monkeypatch):
    tiny = "encoder.latent_dim=8 agent.batch_size=8 agent.model_batch_size=4 agent.plan_samples=16"
    done = {"update": 0, "act": 0}

    def counted(name, method):
        def call(*args, **kw):
            done[name] += 1
            return method(*args, **kw)

        return call

    calls = []

    def seconds(call, device):  # an update takes 4 s and an action 1 s on this clock
        before = dict(done)
        call()
        calls.append(call)
        return 4.0 * (done["update"] - before["update"]) + (done["act"] - before["act"])

    for name in done:
        monkeypatch.setattr(PlannerAgent, name, counted(name, getattr(PlannerAgent, name)))
    monkeypatch.setattr(loop_cost, "seconds_of", seconds)
    rows = []
    monkeypatch.setattr(update_cost, "report", lambda name, args, seeds, found, *_: rows.extend(found))
    update_cost.main(["--quick", "--variant", tiny, f"{tiny} agent.model_every=4 agent.update_ratio=0.5"])
    # Seven rounds of whole cycles: the policy is updated every second time, the second setting's model every fourth.
    assert done == {"update": 7 * (2 + 4), "act": 7 * 2}
    in_turn = [{(id(call.__self__), call.__name__) for call in calls[i : i + 4]} for i in range(0, 28, 4)]
    assert len(in_turn[0]) == 4 and in_turn == in_turn[:1] * 7  # not one setting after the other
    assert [(row["update_ms"], row["action_ms"]) for row in rows] == [(4000.0, 1000.0)] * 2
    assert [row["frames_per_second"] for row in rows] == [0.4, 0.7]  # 2 frames in 5 s and in 3 s, rounded
    assert rows[0]["parameters"] > 0 and rows[0]["device"] == "one CPU thread"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--variant", "agent.batchsize=3"], "did you mean"),
        (["--variant", "", "agent.batchsize=3"], "did you mean"),
        (["--device", "gpu"], "argument --device"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_measured(words, said, capsys, monkeypatch):
    monkeypatch.setattr(update_cost, "Case", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as ended:
        update_cost.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
