"""The benchmarks' own arithmetic: data, scores and verdicts, on cases whose answer is known."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    adaptive_depth,
    depth_extrapolation,
    lab,
    loop_training,
    parameter_efficiency,
    training_flops,
)
from benchmarks.grid_tasks import Permutation, Sandpile, WordReader, avalanches, words
from benchmarks.in_turn import InTurn, Untied
from benchmarks.lab import Examples, Recipe, open_loop_errors, predict_errors
from benchmarks.tasks import TASKS, WITH_DIFFICULTY
from benchmarks.token_tasks import TokenPermutation
from benchmarks.vector_tasks import Control, TimeWarp
from envs.worlds.permutation import GENERATORS, PERMUTATIONS
from envs.worlds.sandpile import topple
from loopwm.dynamics import DYNAMICS, GateHalting, LoopedDynamics, RepeatedDynamics, gate_loss
from loopwm.dynamics.halting.gate import remaining_drop

DEPTHS = ("trained depth", "32 loops", "settled")  # of the errors of benchmarks.loop_training


class SmallSandpile(Sandpile):
    """With few examples, on the trained size alone."""

    sizes = (8,)

    def training_set(self) -> Examples:
        return self.examples(6, self.trained, 5)

    def examples(self, each, longest, seed, size=None) -> Examples:
        return super().examples(min(each, 8), longest, seed, size)


def test_avalanches_are_the_worlds_own_and_as_difficult_as_they_say():
    steps = avalanches(6, 8, 5, 8)
    pile, drop = steps.inputs
    after, rounds, _ = topple(pile.numpy() + drop[:, 0].numpy().astype(np.int64))
    assert (after == steps.target.numpy()).all() and (rounds == steps.difficulty.numpy()).all()
    assert (drop.flatten(1).sum(1) == 1).all()
    counts = [int(rows.sum()) for rows in lab.groups(Sandpile(), steps.difficulty).values()]
    assert counts == [6, 6, 6]


@pytest.mark.parametrize("world", [Sandpile, Permutation, TimeWarp])
def test_steps_in_a_row_follow_one_another_and_are_no_harder_than_in_training(world, tmp_path):
    """Each begins where the one before ended; what a model that errs nowhere would be given is what was there."""
    task = SmallTimeWarp(tmp_path, "cartpole-swingup") if world is TimeWarp else world()
    sequence = task.sequence(30, 12, lab.IN_A_ROW)
    assert [len(step) for step in sequence] == [30] * 12
    for step, after in zip(sequence, sequence[1:], strict=False):
        answer = nn.functional.one_hot(step.target).movedim(-1, 1).float() if task.exact else step.target
        for carried, there in zip(task.carried(after.inputs, answer), after.inputs, strict=True):
            torch.testing.assert_close(carried, there)
        assert not torch.equal(step.inputs[0], after.inputs[0])
    difficulty = torch.stack([step.difficulty for step in sequence])
    assert difficulty.max() <= 8 == task.trained and difficulty.unique().numel() >= 7


def test_piles_in_a_row_are_the_worlds_own():
    for step in Sandpile().sequence(40, 30, 0):
        (pile, drop), rounds = step.inputs, step.difficulty
        told, counted, _ = topple(pile.numpy() + drop[:, 0].numpy().astype(np.int64))
        assert (told == step.target.numpy()).all() and (counted == rounds.numpy()).all()
        assert (drop.flatten(1).sum(1) == 1).all()


class Rule(nn.Module):
    """The sandpile's own rule, but for one grain too many in the first pile at its ``slip``-th call (from 0)."""

    def __init__(self, slip: int):
        super().__init__()
        self.dynamics = LoopedDynamics(2, 1, 4, 1, 1)  # to be frozen; asked nothing
        self.slip, self.calls = slip, 0

    def forward(self, pile, drop, depth):
        loaded = pile.numpy() + drop[:, 0].numpy().astype(np.int64)
        loaded[0, 3, 3] += self.calls == self.slip
        self.calls += 1
        stable = torch.from_numpy(topple(loaded)[0]).long()
        return nn.functional.one_hot(stable, 4).movedim(-1, 1).float(), None


def test_an_error_open_loop_stays_in_what_follows():
    """Different recurrent piles stay different under the same drops (Dhar 1990), so a slip is never forgotten."""
    task, sequence = Sandpile(), Sandpile().sequence(10, 12, 0)
    assert not open_loop_errors(task, Rule(slip=99), sequence, 1).any(), "the rule itself errs nowhere"
    errors = open_loop_errors(task, Rule(slip=4), sequence, 1)
    assert errors.shape == (10, 12) and not errors[1:].any()
    assert errors[0].tolist() == [0.0] * 4 + [1.0] * 8
    second = open_loop_errors(task, Rule(slip=14), sequence, 1, batch=5)  # of two fives
    assert not second[[0, 1, 2, 3, 4, 6, 7, 8, 9]].any() and second[5].tolist() == [0.0] * 2 + [1.0] * 10


def test_words_are_the_worlds_own_products():
    """Read back from the row: the state's matrix, then one letter a cell, composed here by hand."""
    steps = words(5, 16, 3)
    row, end = steps.inputs
    assert row.shape == (20, 29, 1, 17) and (end.sum((1, 2, 3)) == 1).all()
    assert lab.groups(Permutation(), steps.difficulty).keys() == {"1-2", "3-4", "5-8", "9-16"}
    for i, k in enumerate(steps.difficulty.tolist()):
        product = row[i, :25, 0, 0].view(5, 5).argmax(1).numpy()
        assert (row[i, :, 0, 1:].sum(0) == (torch.arange(16) < k)).all() and end[i, 0, 0, k] == 1
        for letter in row[i, 25:, 0, 1 : k + 1].argmax(0).tolist():
            product = product[GENERATORS[letter]]
        assert (product == steps.target[i].numpy()).all()
    assert len(PERMUTATIONS) == 120


def test_the_answer_of_a_word_is_read_off_where_it_ends():
    model, steps = Permutation().model(Recipe("stacked", hidden=4, loops=2)), words(4, 8, 3)
    row, end = steps.inputs
    logits, out = model(row, end)
    cells = model.decoder(out.z_next)
    i, k = 5, int(steps.difficulty[5])
    torch.testing.assert_close(logits[i].mT.flatten(), cells[i, :, 0, k])  # (row i, class) as the matrix has them


def test_a_word_of_tokens_is_told_its_places_and_read_off_where_it_ends():
    torch.manual_seed(0)
    model, steps = TokenPermutation().model(Recipe("stacked", hidden=4, loops=2, block="transformer")), words(4, 8, 3)
    z, told = model.eval().read(*steps.inputs)
    letters = model.encode(steps.inputs[0]).flatten(2).mT  # (B, 9, D)
    assert z.shape == (len(steps), 9, 4) and told.shape == (len(steps), 9, 1)
    torch.testing.assert_close(z, letters + model.position[:9])
    assert (told.squeeze(2).argmax(1) == steps.difficulty).all()
    cells = model.decoder(model.dynamics(z, told).z_next.mT.unsqueeze(2))
    i, k = 5, int(steps.difficulty[5])
    torch.testing.assert_close(model(*steps.inputs)[0][i].mT.flatten(), cells[i, :, 0, k])

    seen, tokens = set(), set()
    for _ in range(40):  # in training at places of any start, beside any number of tokens that hold nothing
        z, told = model.train().read(*steps.inputs)
        tokens.add(z.shape[1])
        assert told.shape == (*z.shape[:2], 1) and (told.squeeze(2).argmax(1) == steps.difficulty).all()
        places = torch.cdist(z[:, :9] - letters, model.position).argmin(2)  # (B, 9)
        assert (places == places[:, :1] + torch.arange(9)).all()
        seen |= set(places.flatten().tolist())
    assert set(range(33)) <= seen and min(tokens) < 14 and max(tokens) > 28
    assert torch.cdist(model.position, model.position).add(torch.eye(66)).min() > 0.1  # no two places are alike


@pytest.mark.parametrize("task", [Sandpile(), Permutation()])
def test_the_wide_control_of_a_grid_sees_all_of_it_at_the_loops_flops(task):
    torch.manual_seed(0)
    data = task.examples(2, task.trained, 3)
    models = {name: task.model(task.models[name]) for name in ("looped", "wide", "wide, sees all")}
    flops = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model.dynamics(model.encoder(torch.zeros(1, model.encoder.in_channels, 8, 8)), torch.zeros(1, 1, 8, 8), 16)
        flops[name] = counter.get_total_flops()
    assert flops["wide, sees all"] >= 0.97 * flops["looped"]  # more, where most of its kernel lies beyond the edges
    for name, far in (("wide", False), ("wide, sees all", True)):
        model = models[name]
        for cell in model.dynamics.cells:
            nn.init.normal_(cell.write.weight)
        z = model.encoder(torch.randn(1, model.encoder.in_channels, *data.inputs[1].shape[2:]))
        z.detach_().requires_grad_()
        model.dynamics(z, data.inputs[1][:1]).z_next[..., -1, -1].sum().backward()
        assert bool((z.grad[..., 0, 0] != 0).any()) is far


def test_score_by_difficulty():
    wrong = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
    found = lab.by_difficulty(Sandpile(), wrong, torch.tensor([0, 2, 3, 9, 40]))
    assert found == {"0": 0.0, "1-3": 0.5, "9-16": 0.0, "17-99": 1.0}


def test_a_step_is_right_only_if_every_cell_is():
    steps = avalanches(4, 8, 6, 8)

    class Oracle(torch.nn.Module):
        dynamics = LoopedDynamics(2, 1, 2)

        def forward(self, pile, drop, depth):
            logits = torch.nn.functional.one_hot(steps.target, 4).movedim(-1, 1).float()
            logits[0, :, 3, 3] = logits[0, :, 3, 3].roll(1)  # one cell of one step is wrong
            return logits, self.dynamics(torch.zeros(len(pile), 2), torch.zeros(len(pile), 1), 2)

    errors, loops = predict_errors(Sandpile(), Oracle(), steps, 2)
    assert errors.tolist() == [1.0] + [0.0] * (len(steps) - 1) and (loops == 2).all()


def test_longer_words_come_later():
    difficulty = np.array([3, 1, 8, 2, 5, 1])
    order = np.argsort(difficulty, kind="stable")
    task, rng = Permutation(), np.random.default_rng(0)

    def hardest(progress: float) -> int:
        return int(difficulty[lab.rows_at(task, difficulty[order], order, progress, rng)].max())

    assert [hardest(p) for p in (0.0, 0.12, 0.24, 0.4, 1.0)] == [1, 3, 5, 8, 8]


def test_an_example_beyond_the_loops_drawn_does_not_count():
    task, recipe = Permutation(), Recipe("looped", hidden=4, loops=4)
    steps = words(20, 8, 1)
    hard = steps.rows(steps.difficulty > 5)  # five quarters of four loops reach five letters
    model = task.model(recipe)
    assert all(task.loss(model, recipe, hard, np.random.default_rng(s)).item() == 0.0 for s in range(4))
    assert task.loss(model, replace(recipe, layers=(1, 2, 1)), hard, np.random.default_rng(1)).item() > 0.0


@pytest.mark.parametrize("name", ["looped", "stacked", "wide", "single_pass"])
def test_a_run_is_kept_and_trained_once(name, tmp_path):
    task, recipe = SmallSandpile(), Recipe(name, free_loops=4, steps=3)
    path = lab.train(task, recipe, tmp_path)
    written = path.stat().st_mtime_ns
    assert lab.train(task, recipe, tmp_path) == path and path.stat().st_mtime_ns == written
    fresh, trained = task.model(recipe).state_dict(), lab.load(task, recipe, tmp_path).state_dict()
    assert any(not torch.equal(fresh[key], trained[key]) for key in fresh)
    size = sum(p.numel() for p in task.model(recipe).parameters())
    assert lab.summary(recipe, tmp_path)["parameters"] == size and "curve" not in lab.summary(recipe, tmp_path)
    assert [step for step, _ in lab.learning_curve(recipe, tmp_path)] == [1, 2, 3]
    assert len({recipe.name, replace(recipe, seed=1).name, replace(recipe, layers=(1, 2, 1)).name}) == 3


class SmallTimeWarp(TimeWarp):
    collected = {lab.TRAINING: 200, lab.VALIDATION: 60, lab.TEST: 120, lab.IN_A_ROW: 120}


class SmallControl(Control):
    collected = {lab.TRAINING: 120, lab.VALIDATION: 40, lab.TEST: 120}


def test_a_training_that_diverged_is_written_down_in_plain_json(tmp_path):
    recipe = Recipe("looped", steps=24, hidden=4, loops=4, learning_rate=1e30)
    written = lab.train(SmallSandpile(), recipe, tmp_path).with_suffix(".json").read_text(encoding="utf-8")
    found = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["loss"] is None and found["curve"][-1][1] == 1.0  # no answer is right


def test_a_timed_loop_takes_as_many_loops_as_the_example_is_difficult(tmp_path):
    task, free = SmallTimeWarp(tmp_path, "cartpole-swingup"), Recipe("looped", hidden=4, loops=4)
    timed, steps = replace(free, timed=True), task.examples(20, 99, lab.TEST)
    model = task.model(timed)
    assert timed.depth() == timed.depth(4) != free.depth(4) == 16 and timed.name != free.name
    loss = task.loss(model, timed, steps, np.random.default_rng(0))
    errors, loops = predict_errors(task, model, steps, timed.depth())
    assert torch.equal(loops, steps.difficulty) and len(loops.unique()) > 8
    assert loss.item() == pytest.approx(float(errors.mean()), rel=1e-5)
    one = steps.rows(steps.difficulty == 11)
    by_hand = predict_errors(task, model, one, 11)[0]
    torch.testing.assert_close(predict_errors(task, model, one, timed.depth())[0], by_hand)
    assert depth_extrapolation.depths_of(timed) == [depth_extrapolation.deep(timed)]
    fixed = replace(free, fixed=True)
    assert fixed.depth() == fixed.depth(4) == 4 and depth_extrapolation.depths_of(fixed) == [4]
    at_four = float(predict_errors(task, model, steps, 4)[0].mean())
    assert task.loss(model, fixed, steps, np.random.default_rng(0)).item() == pytest.approx(at_four, rel=1e-5)
    assert depth_extrapolation.depths_of(free) == [1, 2, 4, 8, 16, 64]


def test_a_repeated_model_is_one_control_step_as_often_as_the_hold_says(tmp_path):
    task = SmallTimeWarp(tmp_path, "cartpole-swingup")
    recipe = replace(task.models["looped, linear, repeated"], hidden=4, steps=3, loops=2)
    assert recipe.shares and not recipe.timed and recipe.depth(4) == 2 and "repeated" in recipe.name
    assert replace(task.models["stacked, repeated"]).shares and not task.models["stacked"].shares
    data = task.examples(4, 16, lab.TEST)
    once, times = task.held(data.inputs[1][:, 0])
    assert torch.equal(times, data.difficulty) and int(times.max()) > task.trained
    model = lab.load(task, recipe, lab.train(task, recipe, tmp_path).parent)
    assert model.dynamics.most == 16 and model.dynamics.step.mean_loops == 2
    with torch.no_grad():
        found, z = model(*data.inputs, depth=recipe.depth())[0][:, 0], data.inputs[0][:1]
        for _ in range(int(times[0])):
            z = model.dynamics.step(z, once[:1], 2).z_next
    torch.testing.assert_close(found[:1], z)
    variants = training_flops.variants(task, 7, "looped, linear, fixed depth")
    whole = variants["all of it looped"]
    assert (whole.loops, whole.steps, whole.repeated) == (2, 7, True)
    assert "all of it looped" not in training_flops.variants(task, 7, "looped")


def test_timewarp_trains_on_short_holds_and_shows_the_model_what_happened(tmp_path):
    task = SmallTimeWarp(tmp_path, "cartpole-swingup")
    train, test = task.training_set(), task.examples(50, 99, lab.TEST)
    assert int(train.difficulty.max()) <= 8 < int(test.difficulty.max()) <= 16
    obs, action = test.inputs
    torch.testing.assert_close(action[:, 0, -1] * 8, test.difficulty.float())  # in units of the trained longest
    raw, (mean, std) = task.steps(lab.TEST), task.scale
    at = np.flatnonzero(np.abs(raw["obs"] - (obs[0] * std + mean).numpy()).max(-1) < 1e-4)
    assert len(at) == 1  # the row of the data it came from
    torch.testing.assert_close(test.target[0, 0] * std + mean, torch.from_numpy(raw["after"][at[0]]), atol=1e-4, rtol=0)
    assert (tmp_path / task.name / f"data_{lab.TEST}.npz").exists()


def test_windows_stay_inside_an_episode_and_follow_one_another(tmp_path):
    task = SmallControl(tmp_path, "cartpole-swingup", policy=False)
    data = task.steps(lab.TEST)
    data["episode"][60:] = 1  # as if another had begun there
    data["obs"][60] += 9.0
    task.steps = lambda seed: data
    found = task.examples(1000, 99, lab.TEST)
    assert found.target.shape == (11 + 11, 50, 5) and task.examples(3, 0, lab.VALIDATION).target.shape == (3, 5, 5)
    np.testing.assert_array_equal(data["after"][:59], data["obs"][1:60])
    starts = task.standardised(data["obs"])
    assert all((starts[list(range(11)) + list(range(60, 71))] == obs).all(-1).any() for obs in found.inputs[0])


def test_open_loop_errors_are_in_standard_deviations():
    task = Control.__new__(Control)
    errors = task.errors(torch.zeros(2, 50, 3), torch.full((2, 50, 3), 2.0))
    assert errors.shape == (2, 50)
    assert task.breakdown(errors, None) == {"1 step": 2.0, "5 steps": 2.0, "20 steps": 2.0, "50 steps": 2.0}
    errors[0, -1] = torch.nan
    assert task.breakdown(errors, None)["50 steps"] > 1e100  # what left the numbers is not forgotten


def test_every_task_is_named_as_it_names_itself(tmp_path):
    assert all(make(tmp_path).name == name for name, make in TASKS.items())
    assert set(WITH_DIFFICULTY) <= set(TASKS)
    for make in TASKS.values():
        task = make(tmp_path)
        assert set(task.ladder) <= set(task.models) and task.beyond and task.edge not in task.beyond


def made_up(looped: float, stacked: float, deep: float, shallow: float | None = None) -> list[dict]:
    rows = []
    for name, recipe in Sandpile.models.items():
        depths = depth_extrapolation.depths_of(recipe)
        for depth in depths:
            error = deep if recipe.looped and depth == depths[-1] else looped
            error = shallow if recipe.looped and shallow and depth == depths[2] else error
            error = error if name == "looped" else stacked if name == "stacked" else 0.9
            groups = {"4-8": 0.1, "9-16": error, "17-99": 1.0}
            rows += [{"model": name, "seed": s, "size": 8, "depth": depth, "error": groups} for s in (0, 1)]
    return rows


def test_the_verdict_says_who_won_and_whether_the_answer_was_kept():
    _, won = depth_extrapolation.verdict(Sandpile(), made_up(0.4, 0.8, 0.4))
    assert "beats every control on 9-16 (error 0.40 against 0.80 of stacked) and keeps its answers" in won
    _, lost = depth_extrapolation.verdict(Sandpile(), made_up(0.8, 0.4, 0.9))
    assert "does not beat every control" in lost and "loses its answers" in lost
    _, faded = depth_extrapolation.verdict(Sandpile(), made_up(0.3, 0.8, 0.5, shallow=0.5))
    assert "loses its answers" in faded  # it had them at four times the depth, if not yet at the trained one
    rows = made_up(0.4, 0.7, 0.4)
    for row in rows:
        if (row["model"], row["seed"]) == ("stacked", 1):
            row["error"] = row["error"] | {"9-16": 0.3}
    assert (
        "beats every control on the mean, not in every seed, on 9-16"
        in depth_extrapolation.verdict(Sandpile(), rows)[1]
    )

    alone = Sandpile()
    alone.models = {name: recipe for name, recipe in Sandpile.models.items() if recipe.looped}
    assert "has an error of 0.40 on 9-16 and keeps" in depth_extrapolation.verdict(alone, rows)[1]


def test_some_models_of_a_task_are_trained_alone(tmp_path, monkeypatch):
    """The loop among them, and without changing the task for anybody else."""
    asked = []
    monkeypatch.setattr(depth_extrapolation, "train_all", lambda task, recipes, *rest: asked.extend(recipes))
    monkeypatch.setattr(depth_extrapolation, "evaluate", lambda task, name, *rest: [{"model": name}])
    monkeypatch.setattr(depth_extrapolation, "verdict", lambda task, rows: ({}, " ".join(task.models)))
    for named in (["wide"], ["looped", "loped"]):
        with pytest.raises(SystemExit):
            depth_extrapolation.main(["--quick", "--models", *named])
    depth_extrapolation.main(["--quick", "--models", "wide", "looped", "--json", str(tmp_path / "x.json")])
    assert [recipe.dynamics for recipe in asked] == ["looped", "wide"] and len(Sandpile.models) > 2
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["verdict"] == "looped wide"


def test_halting_is_judged_at_the_widest_tolerance_within_the_loss():
    """On a model that is never right every tolerance is within the loss, so the widest is taken: one loop a step."""
    task = Sandpile()
    model, data = task.model(Recipe("looped")), avalanches(3, 8, 7, 8)
    model.dynamics.max_loops = 8
    rule = adaptive_depth.rules(model, GateHalting(model.dynamics.state_dim))["prediction"]
    found = adaptive_depth.measure(task, model, "x", rule, data, data, 8, 1)
    assert found["tolerance"] == adaptive_depth.TOLERANCES[0] and found["loops"] == 1.0 and found["correlation"] == 0.0
    fixed = adaptive_depth.fixed_depth(task, model, data, data, 8, 1)
    assert fixed["loops"] == 1.0 and fixed["seconds"] > 0 and fixed["seconds_full"] > 0


@pytest.mark.parametrize("world", [Sandpile, Permutation, TokenPermutation, SmallTimeWarp])
def test_a_trajectory_of_the_laboratory_holds_every_prediction(world, tmp_path):
    task = world(tmp_path, "cartpole-swingup") if world is SmallTimeWarp else world()
    torch.manual_seed(0)
    model = task.model(replace(task.models["looped"], hidden=8)).eval()  # words of tokens begin anywhere in training
    data = task.examples(2, task.trained, lab.VALIDATION)
    with torch.no_grad():
        for p in model.parameters():  # zero weights at the start would make all loops alike
            p.add_(0.1 * torch.randn_like(p))
        states, predictions = model.trajectory(*data.inputs, 3)
        assert len(states) == 4 and len(predictions) == 3
        for t in (1, 2, 3):
            prediction, out = model(*data.inputs, depth=t)
            torch.testing.assert_close(predictions[t - 1], prediction)
            torch.testing.assert_close(states[t], out.h)
    assert not torch.allclose(predictions[0], predictions[2])


def test_the_gate_of_a_trained_loop_learns_what_its_losses_still_do(tmp_path):
    """It forecasts better than a constant can, and the loop stays as it was."""
    torch.manual_seed(0)
    task = Permutation()
    model = task.model(replace(task.models["looped"], hidden=8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = [adaptive_depth.trained_gate(task, model, 6, 20, steps) for steps in (0, 400)]
    data = task.examples(20, 32, lab.VALIDATION)
    with torch.no_grad():
        states, predictions = model.trajectory(*data.inputs, 6)
        losses = torch.stack([task.losses(p, data.target) for p in predictions])
        gates[0].gate.layers[-1].bias.fill_(float(remaining_drop(losses)[:-1].mean().log()))  # the best constant
        constant, learnt = (float(gate_loss(rule.gate, states, losses)) for rule in gates)
    assert learnt < constant - 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert adaptive_depth.rules(model, gates[1])["gate"](0.5).threshold == 0.5
    asked, trajectory = [], model.trajectory
    model.trajectory = lambda row, end, loops: (asked.append(end), trajectory(row, end, loops))[1]
    adaptive_depth.trained_gate(task, model, 6, 20, 5, hardest=4)
    with pytest.raises(SystemExit):
        adaptive_depth.main(["--quick", "--task", "permutation", "--gate-difficulty", "0"])
    lengths = torch.cat(asked).flatten(1).argmax(1)
    assert len(asked) == 5 and lengths.max() == 4 and asked[0].shape[-1] == 33  # short words in long rows


def test_the_verdict_on_halting_compares_its_time_with_that_of_the_fixed_depth():
    def rows(seconds: float) -> list[dict]:
        shared = {"seconds_full": 2.0, "error_full": 0.1, "error": 0.1}
        quicker = {"rule": "residual", "loops": 2, "seconds": 0.1, "correlation": 0.9, "error_random": 0.4}
        rule = {
            "rule": adaptive_depth.HEADLINE,
            "loops": 8,
            "seconds": seconds,
            "correlation": 0.5,
            "error_random": 0.4,
        }
        return [
            shared | {"rule": "smallest fixed depth", "loops": 16.0, "seconds": 1.0},
            shared | quicker,
            shared | rule,
        ]

    slow, quick = (adaptive_depth.verdict(Sandpile(), rows(s), 64)[1] for s in (1.5, 0.5))
    assert "fewer than the smallest fixed depth (16), which takes 50% of the time: halting saves none beside it" in slow
    assert "saves none" not in quick and "halting takes 50% of its time" in quick
    assert quick.startswith(f"Halting by {adaptive_depth.HEADLINE} takes 12% of the loops")  # one rule for all worlds


def test_a_loss_of_one_per_cent_is_of_the_answers_or_of_the_distance(tmp_path):
    exact, distance = Sandpile(), TimeWarp(tmp_path, "cartpole-swingup")
    assert exact.within(0.305, 0.3, 0.01) and not exact.within(0.315, 0.3, 0.01)
    assert distance.within(0.302, 0.3, 0.01) and not distance.within(0.305, 0.3, 0.01)


def test_paired_seconds_take_turns():
    calls = []
    adaptive_depth.paired_seconds(lambda: calls.append(1), lambda: calls.append(2), 3)
    assert calls == [1, 2] * 3


def test_parameters_of_equal_error_are_read_off_the_controls_front():
    points = [(100, 0.4), (200, 0.5), (10_000, 0.004), (1000, 0.04)]  # the second is beaten by the first
    assert parameter_efficiency.front(points) == [(100, 0.4), (1000, 0.04), (10_000, 0.004)]
    found = parameter_efficiency.parameters_for(0.04 * 10**-0.5, points)
    assert found == (pytest.approx(1000 * 10**0.5), "")  # half way, in logarithms
    assert parameter_efficiency.parameters_for(0.4, points) == (pytest.approx(100), "")
    assert parameter_efficiency.parameters_for(0.9, points) == (pytest.approx(100), "at most ")
    assert parameter_efficiency.parameters_for(0.001, points) == (pytest.approx(10_000), "at least ")


def test_parameters_of_equal_error_where_trainings_diverged():
    some, none = [(100, math.inf), (1000, 0.04)], [(100, math.inf), (1000, math.inf)]
    assert parameter_efficiency.parameters_for(0.01, some) == (pytest.approx(1000), "at least ")
    assert parameter_efficiency.parameters_for(0.01, none) == (1000, "at least ")
    for points in (some, none):
        assert parameter_efficiency.parameters_for(math.inf, points)[1] == "at most "


def test_the_ratio_says_when_no_control_reaches_the_loop_and_when_the_loop_loses():
    def rows(error: float, parameters: int = 500) -> list[dict]:
        controls = [("stacked", 1000, 0.1), ("wide", 2000, 0.3), ("single_pass", 50, 0.9)]
        points = [("looped", parameters, error), *controls]
        return [{"model": m, "parameters": n, "seed": 0, "error": {"all": e}} for m, n, e in points]

    won = parameter_efficiency.verdict(Sandpile(), rows(0.01))[1]
    assert (
        "at least 2.0 times (by seed at least 2.0 to at least 2.0) the 500 parameters" in won
        and "no control of the ladder reaches it" in won
    )
    lost = parameter_efficiency.verdict(Sandpile(), rows(0.95))[1]
    assert (
        "at most 0.1 times (by seed at most 0.1 to at most 0.1) the 500" in lost
        and "is not shown to need fewer" in lost
    )
    tiny = parameter_efficiency.verdict(Sandpile(), rows(0.95, parameters=10))[1]
    assert "at most 5.0 times (by seed at most 5.0 to at most 5.0) the 10" in tiny
    assert "is not shown to need fewer" in tiny


def test_sizes_that_differ_in_their_loops_alone_are_not_taken_together():
    def row(model: str, parameters: int, loops: int, error: float) -> dict:
        return {"model": model, "parameters": parameters, "loops": loops, "seed": 0, "error": {"all": error}}

    rows = [row("stacked", n, 16, 40.0 / n) for n in (100, 1000, 10_000)]
    rows += [row("looped", 400, 4, 0.1), row("looped", 400, 8, 0.01), row("looped", 200, 8, 0.1)]
    found = parameter_efficiency.verdict(Sandpile(), rows)[0]
    ratios = {name: x["value"] for name, x in found.items() if "ratio" in name}
    assert ratios == {
        "all: ratio, looped, 4 loops, 400 parameters": pytest.approx(1.0),
        "all: ratio, looped, 8 loops, 400 parameters": pytest.approx(10.0),
        "all: ratio, looped, 200 parameters": pytest.approx(2.0),
    }
    assert found["all: error, looped, 8 loops, 400 parameters"]["value"] == 0.01


@pytest.mark.parametrize("worst, wins", [(0.09, True), (0.11, False)])
def test_the_loop_needs_fewer_parameters_only_if_every_seed_says_so(worst, wins):
    """A front of one slope: ten times the parameters have a tenth of the error. The loop has 400 parameters."""

    def row(model: str, parameters: int, seed: int, error: float) -> dict:
        return {"model": model, "parameters": parameters, "seed": seed, "error": {"all": error}}

    rows = [row("stacked", n, seed, 40.0 / n) for seed in (0, 1) for n in (100, 1000, 10_000)]
    rows += [row("looped", 400, 0, 0.01), row("looped", 400, 1, worst)]
    headline, said = parameter_efficiency.verdict(Sandpile(), rows)
    found = headline["all: ratio, looped, 400 parameters"]
    assert found["high"] == pytest.approx(10.0, abs=0.01) and found["low"] == pytest.approx(0.1 / worst, abs=0.01)
    mean = (0.01 + worst) / 2
    assert found["value"] == pytest.approx(0.1 / mean, abs=0.01) and found["value"] > 1.0
    assert ("the loop needs fewer parameters" in said) == wins


def depths_in_training(task, recipe) -> set[int]:
    """All depths that ``Task.loss`` asks a model for."""
    asked, rng = set(), np.random.default_rng(0)
    model, batch = task.model(recipe), task.examples(1, task.trained, lab.VALIDATION)

    def spy(*inputs, depth, h0):
        asked.add(depth)
        return model(*inputs, depth=1)

    for _ in range(200):
        task.loss(spy, recipe, batch, rng)
    return asked


def test_a_sampler_draws_a_depth_for_each_example_with_the_mean_of_the_quarters():
    task, asked = Permutation(), []
    recipe = Recipe("looped", hidden=4, loops=16, sampler="lognormal_poisson")
    model, batch = task.model(recipe), task.examples(400, task.trained, lab.VALIDATION)

    def spy(*inputs, depth, h0):
        asked.append(depth)
        return model(*inputs, depth=1)

    torch.manual_seed(0)
    task.loss(spy, recipe, batch, np.random.default_rng(0))
    depths = asked[0]
    assert depths.shape == (1200,) and depths.min() >= 1 and depths.max() <= 32
    assert depths.float().mean() == pytest.approx(12.0, abs=0.5) and depths.unique().numel() > 15


def test_what_cannot_be_known_at_its_depth_does_not_count():
    task, recipe = Permutation(), Recipe("looped", hidden=4, loops=16)
    batch = task.examples(5, task.trained, lab.VALIDATION)
    said = torch.randn(len(batch), 5, 5)
    losses, spent = task.losses(said, batch.target), torch.arange(len(batch)) % 8 + 1
    counted = task.counted(said, batch, recipe, spent)
    assert counted.item() == pytest.approx(float(losses[batch.difficulty <= spent].mean()))
    twice = task.counted(said, batch, replace(recipe, layers=(1, 2, 1)), spent)
    assert twice.item() == pytest.approx(float(losses[batch.difficulty <= 2 * spent].mean()))
    for all_count in ((recipe, None), (replace(recipe, untold=True), spent)):
        assert task.counted(said, batch, *all_count).item() == pytest.approx(float(losses.mean()))


def test_the_early_loss_is_that_of_an_earlier_loop_of_the_same_pass():
    task, recipe = Permutation(), Recipe("looped", hidden=4, loops=4, fixed=True, early=0.5)
    torch.manual_seed(0)
    model, batch = task.model(recipe), task.examples(5, task.trained, lab.VALIDATION)
    torch.manual_seed(1)
    found = task.loss(model, recipe, batch, np.random.default_rng(0))
    torch.manual_seed(1)
    prediction, out = model(*batch.inputs, depth=4)
    loops = out.early().loops
    assert set(loops.tolist()) == {1, 2, 3}
    by_hand = task.counted(prediction, batch, recipe, 4)
    said = torch.cat([model(*batch.rows(slice(i, i + 1)).inputs, depth=int(n))[0] for i, n in enumerate(loops)])
    by_hand = by_hand + 0.5 * task.counted(said, batch, recipe, loops)
    torch.testing.assert_close(found, by_hand)


class TinyLadder(SmallTimeWarp):
    ladder = {"looped": ((4, 8), (6, 8)), "stacked": ((4, 8),)}


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """(words, name of a JSON) -> what ``parameter_efficiency`` finds of a tiny ladder; ``trained``: for that."""
    trained = []

    def serially(task, recipes, folder, jobs, device):
        for recipe in recipes:
            if not (folder / f"{recipe.name}.pt").exists():
                trained.append(recipe)
                lab.train(task, recipe, folder)

    for module in (lab, parameter_efficiency):
        monkeypatch.setattr(module, "train_all", serially)
    name = "timewarp-cartpole-swingup"
    monkeypatch.setitem(TASKS, name, lambda runs: TinyLadder(tmp_path, "cartpole-swingup"))

    def run(words: str, file: str) -> dict:
        trained.clear()
        out = ["--json", str(tmp_path / file), "--runs", str(tmp_path / file[0])]
        parameter_efficiency.main(["--task", name, "--steps", "8", "--rates", "1e30", "0.001", *words.split(), *out])
        return json.loads((tmp_path / file).read_text(encoding="utf-8"))

    run.trained = trained
    return run


def test_seeds_are_added_to_an_earlier_result_at_its_rates(ladder, tmp_path, monkeypatch):
    """Its rows stay as they are and nothing of it is trained again."""
    run, trained, name = ladder, ladder.trained, "timewarp-cartpole-swingup"
    one = run("--seeds 1", "a.json")
    assert len(trained) == 2 * 2 + 3 and one["task"] == name and one["options"]["rates"] == [1e30, 0.001]
    rates = {row["model"]: row["learning_rate"] for row in one["rows"]}
    assert set(rates.values()) == {0.001}, "what diverges is no candidate"
    two = run(f"--seeds 2 --more-of {tmp_path / 'a.json'}", "b.json")
    assert [recipe.seed for recipe in trained] == [1] * 3 and two["rows"][:3] == one["rows"]
    assert all(row["learning_rate"] == rates[row["model"]] for row in two["rows"]) and len(two["rows"]) == 6
    assert "rates" not in two["options"], "which were not chosen from"
    full = run("--seeds 2 --rates-in-full", "d.json")  # of two rates, three sizes and two seeds
    assert len(trained) == 12 and {row["learning_rate"] for row in full["rows"]} == {0.001}
    more = run(f"--seeds 3 --more-of {tmp_path / 'd.json'}", "e.json")
    assert [recipe.seed for recipe in trained] == [2] * 3 and more["rows"][:6] == full["rows"]
    monkeypatch.setattr(TinyLadder, "ladder", TinyLadder.ladder | {"looped": ((4, 8), (6, 8), (5, 8))})
    wider = run(f"--seeds 2 --rates-in-full --more-of {tmp_path / 'd.json'}", "e.json")  # two rates of the new size
    assert [recipe.hidden for recipe in trained] == [5] * 4 and len(wider["rows"]) == 8
    assert [row for row in wider["rows"] if row["hidden"] != 5] == full["rows"]
    # Of several files the rows stand together, at one rate for each size.
    parts = [
        [row for row in wider["rows"] if row["hidden"] == 5],
        [row for row in wider["rows"] if row["hidden"] != 5],
        [row | {"learning_rate": 0.5} for row in wider["rows"][:1]],
    ]
    for name_of, part in zip("pqr", parts, strict=True):
        (tmp_path / f"{name_of}.json").write_text(json.dumps(wider | {"rows": part}), encoding="utf-8")
    together = run(f"--seeds 2 --more-of {tmp_path / 'p.json'} {tmp_path / 'q.json'}", "g.json")
    assert not trained and together["rows"] == wider["rows"]
    with pytest.raises(SystemExit):
        run(f"--seeds 2 --more-of {tmp_path / 'q.json'} {tmp_path / 'r.json'}", "g.json")


def test_what_an_earlier_result_may_lack_and_what_not(ladder, tmp_path):
    """Errors of what diverged, weights, and some of the errors; another task's result is refused."""
    run, trained = ladder, ladder.trained
    one = run("--seeds 1", "a.json")
    # A training that diverged has no error in JSON: an infinite one, than which every control is better.
    first, *others = one["rows"]
    lost = [first | {"error": dict.fromkeys(first["error"])}, *others]
    (tmp_path / "lost.json").write_text(json.dumps(one | {"rows": lost}), encoding="utf-8")
    again = run(f"--seeds 2 --more-of {tmp_path / 'lost.json'}", "b.json")
    end = f"ratio, looped, {first['parameters']} parameters"
    ratio = next(name for name in again["headline"] if name.endswith(end))
    assert again["rows"][:3] == lost and "at most" in ratio
    shorter = [row | {"error": dict(list(row["error"].items())[:1])} for row in one["rows"]]
    (tmp_path / "few.json").write_text(json.dumps(one | {"rows": shorter}), encoding="utf-8")
    anew = run(f"--seeds 1 --more-of {tmp_path / 'few.json'}", "f.json")  # with neither weights nor all errors
    assert len(trained) == 3 and [row["error"] for row in anew["rows"]] == [row["error"] for row in one["rows"]]
    unsized = [{k: v for k, v in row.items() if k != "parameters"} for row in one["rows"]]
    grown = [row | {"parameters": row["parameters"] + 1} for row in one["rows"]]
    renamed = [row | {"model": "gone"} for row in one["rows"]]
    rows = [{"rows": found} for found in ([], [{}], unsized, grown, renamed)]
    wrongs = [one | x for x in ({"task": "sandpile"}, {"quick": True}, {"benchmark": "cost"}, *rows)]
    for wrong, more in [(w, "") for w in wrongs] + [(one, "--steps 9"), (one, "--quick")]:
        (tmp_path / "wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(SystemExit):
            run(f"--seeds 2 --more-of {tmp_path / 'wrong.json'} {more}", "c.json")
    assert not (tmp_path / "c.json").exists()


def test_a_rate_in_full_is_the_best_of_each_size_by_the_mean_of_its_seeds(tmp_path, monkeypatch):
    found = {("small", 1.0): (0.3, 0.3), ("small", 2.0): (0.1, 0.4), ("large", 1.0): (0.3, 0.3)}  # validation, by seed
    found |= {("large", 2.0): (0.2, 0.5), ("large", 4.0): (float("nan"), 0.1), ("small", 4.0): (0.9, 0.9)}
    recipes = {"small": Recipe("looped", hidden=4), "large": Recipe("looped", hidden=8)}
    names, trained = {4: "small", 8: "large"}, []
    monkeypatch.setattr(lab, "train_all", lambda task, some, *rest: trained.extend(some))
    monkeypatch.setattr(
        lab, "learning_curve", lambda r, folder: [(1, 0.0), (2, found[names[r.hidden], r.learning_rate][r.seed])]
    )
    args = argparse.Namespace(rates=[1.0, 2.0, 4.0], jobs=1, device="cpu")
    chosen = lab.choose_rates_in_full(Sandpile(), recipes, range(2), tmp_path, args)
    assert {key: r.learning_rate for key, r in chosen.items()} == {"small": 2.0, "large": 1.0}
    assert len(set(trained)) == 2 * 3 * 2


def test_ways_to_train_a_loop_differ_in_that_alone(tmp_path):
    """Same parameters; implicit gradients stop by the rule, and only a warm start reads the state before."""
    task = SmallControl(tmp_path, "cartpole-swingup", policy=False)
    plan = {name: replace(r, hidden=8, steps=2) for name, r in loop_training.ways(task).items()}
    assert list(plan)[3:] == ["implicit", "implicit_anderson", "warm_start"]
    warp = SmallTimeWarp(tmp_path, "cartpole-swingup")
    drawn = loop_training.ways(warp)
    assert list(drawn) == [*list(plan)[:3], "fixed_mean", "around", "widely_around", *list(plan)[3:5]]
    assert drawn["fixed_mean"].depth() == 6 and drawn["around"].depth() == drawn["widely_around"].depth() == 8
    for name, (fewest, most) in {"unrolled": (2, 10), "around": (4, 12), "widely_around": (2, 14)}.items():
        assert depths_in_training(warp, drawn[name]) == set(range(fewest, most + 1))
    assert len({recipe.name for recipe in plan.values()}) == 6
    assert [r.mode for r in loop_training.ways(task, "linear").values()] == ["linear"] * 4  # no certificate to need
    with pytest.raises(SystemExit):
        loop_training.main(["--quick", "--ways", "implicit"])  # nothing to compare it with
    thrice = plan["fixed_thrice"]
    assert task.model(thrice).dynamics.sample_depth(5) == thrice.loops == 24
    models = {name: task.model(recipe) for name, recipe in plan.items()}
    for model in models.values():
        model.load_state_dict(models["unrolled"].state_dict())
    data = task.examples(8, 0, lab.VALIDATION)
    cold, warm = (models[name](*data.inputs, depth=1)[0] for name in ("unrolled", "warm_start"))
    assert torch.equal(cold[:, 0], warm[:, 0]) and not torch.allclose(cold[:, 1], warm[:, 1])
    assert models["implicit"].dynamics.gradient.trains_at_fixed_point and plan["implicit"].depth(4) is None
    assert type(models["implicit_anderson"].dynamics.solver).__name__ == "AndersonSolver"
    for name, recipe in plan.items():
        lab.train(task, recipe, tmp_path)
        found = loop_training.evaluate(task, name, recipe, tmp_path, 8)
        assert found["loops"] == recipe.loops  # what the rule spends has a name of its own
        test = task.examples(8, 0, lab.TEST)
        loops = predict_errors(task, lab.load(task, recipe, tmp_path), test, None)[1]
        assert set(found["error"]) == {f"{k} step{'s' * (k > 1)}, {d}" for k in (1, 5, 20, 50) for d in DEPTHS}
        assert found["loops to rest"] == float(loops.double().mean())


@pytest.mark.parametrize(
    ("errors", "said"), [((0.1, 0.1), "a lower error"), ((0.1, 0.3), "no lower"), ((0.3, 0.3), "a higher error")]
)
def test_a_way_to_train_is_said_to_be_better_only_if_it_is_on_every_seed(errors, said):
    def row(way: str, error: float, time: float) -> dict:
        return {
            "way": way,
            "error": {"all, trained depth": error},
            "milliseconds an update": time,
            "loops to rest": 4.0,
        }

    rows = [row("unrolled", 0.2, 2.0), row("unrolled", 0.2, 2.0), *(row("implicit", e, 5.0) for e in errors)]
    headline, text = loop_training.verdict(TimeWarp(Path(), "cartpole-swingup"), rows)
    assert f"implicit has {said}" in text and "at 2.5 times its time" in text
    assert headline["implicit: error, all, trained depth"]["value"] == pytest.approx(sum(errors) / 2)


def test_flops_of_an_update_are_those_of_the_layers():
    """A single pass on vectors, by hand: three products a matrix (forward, to the weight, to the input)."""

    class Line(Sandpile):
        batch = 10

        def model(self, recipe):
            model = torch.nn.Linear(4, 3, bias=False)
            model.dynamics = LoopedDynamics(2, 1, 2, mode="linear")  # no norms to count
            return model

        def loss(self, model, recipe, batch, rng):
            return model(torch.ones(len(batch), 4, requires_grad=True)).sum()

        def training_set(self):
            return avalanches(6, 8, 5, 8)

    assert training_flops.flops_of_update(Line(), Recipe("looped"), 2) == 3 * 2 * 10 * 4 * 3


def test_the_speedup_is_told_only_where_the_goal_was_reached():
    assert training_flops.steps_to(0.2, [(10, 0.5), (20, 0.2), (30, 0.1)]) == 20
    assert training_flops.steps_to(0.05, [(10, 0.5)]) is None

    def rows(*speeds: float | None) -> list[dict]:
        names = ("stacked", "one layer looped", "a layer after the loop")
        return [{"variant": n, "error": 0.1, "speedup": s} for n, s in zip(names, speeds, strict=True)]

    _, text = training_flops.verdict(rows(1.0, 2.5, None))
    assert "takes fewer training FLOPs: the control's are 2.50 times" in text
    assert "not reached by a layer after the loop in 1 of 1" in text
    assert "takes more training FLOPs" in training_flops.verdict(rows(1.0, 0.5, 0.4))[1]
    assert training_flops.verdict(rows(1.0, None, None))[1].startswith("No loop has the final error")


def test_halved_loops_have_the_layers_of_whole_ones():
    plan = training_flops.variants(Permutation(), 10)
    fixed = training_flops.variants(Permutation(), 10, "looped, fixed depth")
    assert [r.fixed for r in fixed.values()] == [False, *[True] * 4] and fixed["stacked"] == plan["stacked"]
    timed = ["--task", "timewarp-cartpole-swingup", "--loop", "looped, linear, a loop a step"]  # not to be halved
    for wrong in (["--loop", "stacked"], timed, ["--task", "sandpile", "--loop", "looped, certified in the sup norm"]):
        with pytest.raises(SystemExit):
            training_flops.main(["--quick", *wrong])
    half, whole = plan["two layers looped, half the loops"], plan["one layer looped"]
    assert half.loops * half.layers[1] == whole.loops * whole.layers[1]
    task = SmallSandpile()
    flops = {n: training_flops.flops_of_update(task, replace(plan[n], loops=plan[n].loops // 2), 8) for n in plan}
    ratio = flops["two layers looped, half the loops"] / flops["one layer looped"]
    assert 0.7 < ratio < 1.3  # depths are random


def counted(action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return action[:, :-1], action[:, -1].long()


def test_untied_steps_of_equal_weights_are_a_repeated_one():
    """And with weights of their own they are not; what comes after the last place is the last one's."""
    torch.manual_seed(0)
    step = DYNAMICS["single_pass"](3, 2, 4)
    z, action = torch.randn(5, 3), torch.cat([torch.randn(5, 2), torch.tensor([[1.0], [4], [2], [6], [1]])], 1)
    once = RepeatedDynamics(step, counted, 6)(z, action)
    same = Untied([step] * 4, counted)(z, action)
    torch.testing.assert_close(same.z_next, once.z_next)
    assert same.loops.tolist() == [1, 4, 2, 6, 1]
    steps = [DYNAMICS["single_pass"](3, 2, 4) for _ in range(4)]
    own = Untied(steps, counted)(z, action).z_next
    by_hand = z[3:4]
    for place in (0, 1, 2, 3, 3, 3):
        by_hand = steps[place](by_hand, action[3:4, :-1]).z_next
    torch.testing.assert_close(own[3:4], by_hand)
    assert len(list(Untied(steps, counted).parameters())) == 4 * len(list(step.parameters()))


@pytest.mark.parametrize("name", [name for name in Permutation.models if "letter by letter" in name])
def test_a_reader_knows_the_letters_of_the_word_in_their_order_and_no_others(name):
    torch.manual_seed(0)
    recipe = replace(Permutation.models[name], hidden=6)
    model, data = Permutation().model(recipe), words(20, 8, 3)
    assert isinstance(model, WordReader) and len(model.dynamics.steps) == (8 if "untied" in name else 1)
    assert recipe.shares == ("untied" not in name) and recipe.depth(4) is None
    row, end = data.inputs
    with model.dynamics.frozen():
        said, out = model(row, end)
    assert said.shape == (len(data), 5, 5) and torch.equal(out.loops, data.difficulty)
    beyond = row.clone()
    rows = torch.arange(row.shape[-1]) > data.difficulty[:, None]  # cells after the word's end
    beyond[:, 25:, 0] += rows[:, None]
    torch.testing.assert_close(model(beyond, end)[0], said)
    longer = model(nn.functional.pad(row, (0, 24)), nn.functional.pad(end, (0, 24)))[0]
    torch.testing.assert_close(longer, said)
    two = data.rows(torch.nonzero(data.difficulty == 2).squeeze(1))
    turned = two.inputs[0].clone()
    turned[..., 1], turned[..., 2] = two.inputs[0][..., 2], two.inputs[0][..., 1]
    differs = (two.inputs[0][..., 1] != two.inputs[0][..., 2]).flatten(1).any(1)
    moved = (model(turned, two.inputs[1])[0] - model(*two.inputs)[0]).abs().flatten(1).amax(1)
    assert differs.any() and bool((moved[differs] > 1e-6).all()) and bool((moved[~differs] < 1e-6).all())


def test_steps_in_turn_of_a_torch_cell():
    torch.manual_seed(0)
    cell, z, inputs = nn.GRUCell(2, 3), torch.randn(2, 3), torch.randn(4, 2, 2)
    out = InTurn([cell])(z, inputs, torch.tensor([1, 3]))
    by_hand = [cell(inputs[0], z)]
    for given in inputs[1:3]:
        by_hand.append(cell(given, by_hand[-1]))
    torch.testing.assert_close(out.z_next, torch.stack([by_hand[0][0], by_hand[2][1]]))
    change = (by_hand[2][1] - by_hand[1][1]).norm() / by_hand[1][1].norm()
    torch.testing.assert_close(out.residual[1], change)
