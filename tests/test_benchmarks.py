"""The benchmarks' own arithmetic: data, scores and verdicts, on cases whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import adaptive_depth, depth_extrapolation, parameter_efficiency, sandpile_lab
from benchmarks.sandpile_lab import GridModel, Recipe, by_difficulty, right, world_steps
from envs.worlds.sandpile import topple
from loopwm.dynamics import LoopedDynamics


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(depth_extrapolation, "SIZES", (8,))


def test_steps_are_the_worlds_own_and_as_difficult_as_they_say():
    steps = world_steps(6, 8, 5)
    loaded = steps.pile.numpy() + steps.drop[:, 0].numpy().astype(np.int64)
    after, rounds, _ = topple(loaded)
    assert (after == steps.after.numpy()).all() and (rounds == steps.rounds.numpy()).all()
    assert (steps.drop.flatten(1).sum(1) == 1).all()
    assert [int(((rounds >= low) & (rounds <= high)).sum()) for low, high in sandpile_lab.BINS] == [6, 6, 6, 0, 0]


def test_score_by_difficulty():
    ok = torch.tensor([True, True, False, True, False])
    assert by_difficulty(ok, torch.tensor([0, 2, 3, 9, 40])) == {"0-0": 1.0, "1-3": 0.5, "9-16": 1.0, "17-99": 0.0}


def test_a_step_is_right_only_if_every_cell_is():
    steps = world_steps(4, 8, 6)

    class Oracle(torch.nn.Module):
        dynamics = LoopedDynamics(2, 1, 2)

        def forward(self, pile, drop, depth):
            logits = torch.nn.functional.one_hot(steps.after, 4).movedim(-1, 1).float()
            logits[0, :, 3, 3] = logits[0, :, 3, 3].roll(1)  # one cell of one step is wrong
            return logits, self.dynamics(torch.zeros(len(pile), 2), torch.zeros(len(pile), 1), 2)

    assert right(Oracle(), steps, 2)[0].tolist() == [False] + [True] * (len(steps) - 1)


@pytest.mark.parametrize("name", ["looped", "stacked", "wide", "single_pass"])
def test_a_run_is_kept_and_trained_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sandpile_lab, "world_steps", lambda *_: world_steps(6, 8, 5))
    recipe = Recipe(name, free_loops=4, steps=3)
    path = sandpile_lab.train(recipe, tmp_path)
    written = path.stat().st_mtime_ns
    assert sandpile_lab.train(recipe, tmp_path) == path and path.stat().st_mtime_ns == written
    fresh, trained = GridModel(recipe).state_dict(), sandpile_lab.load(recipe, tmp_path).state_dict()
    assert any(not torch.equal(fresh[key], trained[key]) for key in fresh)
    assert sandpile_lab.summary(recipe, tmp_path)["parameters"] == sum(
        p.numel() for p in GridModel(recipe).parameters()
    )
    assert recipe.name != replace(recipe, seed=1).name


def made_up(looped: float, stacked: float, deep: float) -> list[dict]:
    rows = []
    for name, recipe in depth_extrapolation.MODELS.items():
        for depth in depth_extrapolation.DEPTHS if recipe.dynamics == "looped" else (None,):
            score = deep if depth == depth_extrapolation.DEPTHS[-1] else looped
            score = score if name == "looped" else stacked if name == "stacked" else 0.1
            groups = {"4-8": 0.9, "9-16": score, "17-99": 0.0}
            rows += [{"model": name, "seed": s, "size": 8, "depth": depth, "right": groups} for s in (0, 1)]
    return rows


def test_the_verdict_says_who_won_and_whether_the_answer_was_kept():
    _, won = depth_extrapolation.verdict(made_up(0.6, 0.2, 0.6))
    assert "beats every control on 9-16 rounds (0.60 against 0.20 of stacked) and keeps its answers" in won
    _, lost = depth_extrapolation.verdict(made_up(0.2, 0.6, 0.1))
    assert "does not beat every control" in lost and "loses its answers" in lost


def test_halting_is_judged_at_the_widest_tolerance_within_the_loss():
    """On a model that is never right every tolerance is within the loss, so the widest is taken: one loop a step."""
    model, data = GridModel(Recipe("looped")), world_steps(3, 8, 7)
    model.dynamics.max_loops = 8
    found = adaptive_depth.measure(model, "x", adaptive_depth.rules(model)["prediction"], data, data, 1)
    assert found["tolerance"] == adaptive_depth.TOLERANCES[0] and found["loops"] == 1.0 and found["correlation"] == 0.0
    assert adaptive_depth.fixed_depth(model, data, data)["loops"] == 1.0


def test_paired_seconds_take_turns():
    calls = []
    adaptive_depth.paired_seconds(lambda: calls.append(1), lambda: calls.append(2), 3)
    assert calls == [1, 2] * 3


def test_parameters_of_equal_error_are_read_off_the_controls_front():
    points = [(100, 0.4), (200, 0.5), (10_000, 0.004), (1000, 0.04)]  # the second is beaten by the first
    assert parameter_efficiency.front(points) == [(100, 0.4), (1000, 0.04), (10_000, 0.004)]
    size, reached = parameter_efficiency.parameters_for(0.04 * 10**-0.5, points)
    assert reached and size == pytest.approx(1000 * 10**0.5)  # half way, in logarithms
    assert parameter_efficiency.parameters_for(0.9, points) == (pytest.approx(100), True)
    assert parameter_efficiency.parameters_for(0.001, points) == (pytest.approx(10_000), False)


def test_the_ratio_says_when_no_control_reaches_the_loop_and_when_the_loop_loses():
    def rows(error: float) -> list[dict]:
        controls = [("stacked", 1000, 0.1), ("wide", 2000, 0.3), ("single_pass", 50, 0.9)]
        return [{"dynamics": d, "parameters": n, "error": e} for d, n, e in [("looped", 500, error), *controls]]

    won = parameter_efficiency.verdict(rows(0.01))[1]
    assert "at least 2.0 times the 500 parameters" in won and "no control of the ladder reaches it" in won
    assert "0.1 times the 500" in (lost := parameter_efficiency.verdict(rows(0.95))[1]) and "needs more" in lost
