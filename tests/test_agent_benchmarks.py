"""The benchmarks of agents: what they read, and figures whose answer is known."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from training_tools import CARTPOLE, SWINGUP, forbid_filming, run

from agents import make_agent
from benchmarks import (
    action_effects,
    branches,
    compare,
    depth_dial,
    diagnose,
    figures,
    harness,
    headline,
    policy_gradients,
    representation,
    returns,
    time_to_score,
)
from benchmarks.diagnose import Episodes
from envs import make_env
from loopwm.config import load_config, read_config, save_config
from loopwm.inspect.run import load_run
from loopwm.model.encoders import symlog
from loopwm.training.checkpoint import lock_run
from loopwm.training.run_dir import changed_settings

TINY = ["task=dmc/x-y", "size=small"]


def write(path, rows):
    """A CSV as ``benchmarks.returns`` writes it, with a curve of two points a row (task, dynamics, seed, return)."""
    written = [
        {
            "task": f"dmc/{task}",
            "dynamics": name,
            "seed": seed,
            "curve": [(20_004, 1.0), (40_002, value)],
            "frames_per_second": [(1000, 90.0), (2000, 100.0), (3000, 400.0)],
            "commit": f"c{seed}",
        }
        for task, name, seed, value in rows
    ]
    returns.write_csv(path, written)
    return path


def test_a_csv_of_returns_is_read_back_by_task_seed_and_frames(tmp_path):
    path = write(tmp_path / "x.csv", [("a-b", "looped", 0, 500.0), ("a-b", "looped", 1, 700.0)])
    lines = path.read_text().splitlines()
    assert lines[0] == "task,dynamics,seed,frames,return,frames_per_second,commit"
    assert lines[1] == "a-b,looped,0,20000,1.0,100,c0"
    assert lines[-1] == "a-b,looped,1,40000,700.0,100,c1"
    assert compare.read_scores([path], 40_000) == {"looped": {"a-b": {0: 0.5, 1: 0.7}}}
    assert compare.read_scores([path], 20_000)["looped"]["a-b"] == {0: 0.001, 1: 0.001}


def test_only_tasks_and_seeds_that_all_have_are_compared(tmp_path):
    rows = [("a", "looped", seed, 100.0 * seed) for seed in range(4)] + [("b", "looped", 0, 1.0)]
    rows += [("a", "wide", seed, 300.0) for seed in (1, 3)]
    tasks, seeds, runs = compare.matrices(compare.read_scores([write(tmp_path / "x.csv", rows)], 40_000))
    assert tasks == ["a"] and seeds == [1, 3]
    assert {name: m.tolist() for name, m in runs.items()} == {"looped": [[0.1], [0.3]], "wide": [[0.3], [0.3]]}


def test_a_part_of_the_files_is_compared_by_all_the_seeds_that_it_has(tmp_path):
    rows = [(task, name, s, 100.0 * s) for task in "ab" for name in ("looped", "wide") for s in range(3)]
    rows += [("a", "stacked", s, 7.0) for s in (0, 1)]
    scores = compare.read_scores([write(tmp_path / "x.csv", rows)], 40_000)
    assert compare.matrices(compare.only(scores, None, None))[:2] == (["a"], [0, 1])
    assert compare.matrices(compare.only(scores, ["looped", "wide"], ["b"]))[:2] == (["b"], [0, 1, 2])


def test_the_part_is_named_on_the_command_line(tmp_path, capsys):
    rows = [(task, name, 0, 100.0) for task in "abc" for name in ("looped", "wide", "stacked")]
    path, out = write(tmp_path / "x.csv", rows), tmp_path / "x.json"
    words = [str(path), "--frames", "40000", "--json", str(out)]
    assert compare.main([*words, "--dynamics", "wide", "looped", "--task", "b", "a"]) == 0
    found = [(row["dynamics"], row["task"]) for row in json.loads(out.read_text())["rows"]]
    assert found == [("looped", "a"), ("looped", "b"), ("wide", "a"), ("wide", "b")]
    for word, value in (("--dynamics", "loped"), ("--task", "d")):
        assert compare.main([*words, word, value]) == 2
        error = capsys.readouterr().err
        assert f"{word} {value!r}: the files have" in error and error.count("\n") == 1


def test_what_a_person_can_get_wrong_ends_in_one_line(tmp_path, capsys):
    good = write(tmp_path / "good.csv", [("a", "looped", 0, 100.0)])
    other = write(tmp_path / "other.csv", [("b", "wide", 0, 100.0)])
    bad = tmp_path / "bad.csv"
    bad.write_text("task,frames\na,b\n")
    odd = tmp_path / "odd.csv"
    odd.write_bytes(b"\xff\xfe\x00")
    both = write(tmp_path / "both.csv", [("a", n, s, 1.0) for n in ("looped", "wide") for s in (0, 1)])
    single = write(tmp_path / "single.csv", [("a", n, 0, 1.0) for n in ("looped", "wide")])
    cases = {
        (str(bad),): "not a CSV of benchmarks.returns",
        (str(good), "--frames", "7"): "at 7 frames",
        (str(good), str(other), "--frames", "40000"): "share no task",
        (str(odd),): "not a CSV of benchmarks.returns",
        (str(good), "--frames", "40000"): "looped alone",
        (str(single), "--frames", "40000"): "share 1 seeds of 1 tasks",
        (str(both), str(good), "--frames", "40000"): "is there twice",
        (str(both), "--frames", "40000", "--base", "stacked"): "the files have looped, wide",
        (str(tmp_path / "none.csv"),): "none.csv",
    }
    for words, said in cases.items():
        assert compare.main(list(words)) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_verdict_names_only_what_an_interval_shows():
    odds = {
        "P(looped > wide)": {"value": 0.7, "low": 0.55, "high": 0.9},
        "P(looped > stacked)": {"value": 0.4, "low": 0.2, "high": 0.6},
        "P(looped > single_pass)": {"value": 0.1, "low": 0.0, "high": 0.3},
    }
    said = compare.verdict(odds, "looped", ["a"], 3)
    assert "better: P(looped > wide)" in said and "worse: P(looped > single_pass)" in said and "stacked" not in said
    assert "no difference" in compare.verdict({k: odds[k] for k in ["P(looped > stacked)"]}, "looped", ["a"], 3)


def test_one_seed_is_compared_by_pairs_of_tasks(tmp_path, capsys):
    noise = {"a": 0.0, "b": 40.0, "c": -40.0}
    rows = [(t, "looped", 0, 100.0 * k + 300) for k, t in enumerate(noise)]
    rows += [(t, "wide", 0, 100.0 * k + noise[t]) for k, t in enumerate(noise)]
    rows += [(t, "stacked", 0, 100.0 * k + 300 + noise[t]) for k, t in enumerate(noise)]
    path, out = write(tmp_path / "x.csv", rows), tmp_path / "x.json"
    assert compare.main([str(path), "--frames", "40000", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["headline"]["looped minus wide"]["value"] == 0.3 and found["headline"]["looped minus wide"]["low"] > 0
    assert found["headline"]["looped minus stacked"]["value"] == 0.0
    assert not [name for name in found["headline"] if name.startswith(("P(", "IQM"))]
    assert "better: looped minus wide." in found["verdict"] and "3 tasks and 1 seeds" in found["verdict"]
    assert found["seeds"] == [0]


def test_pairs_are_tasks_where_there_are_several_and_seeds_where_there_is_one():
    looped = np.array([[0.1, 0.5], [0.3, 0.9]])
    found = compare.differences({"looped": looped, "wide": looped * 0.5}, "looped")["looped minus wide"]
    by_task = stats.t.interval(0.95, 1, loc=0.225, scale=0.125)  # differences of 0.1 and 0.35
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.225, *by_task), abs=1e-3)
    one = compare.differences({"looped": looped[:, :1], "wide": looped[:, :1] * 0.5}, "looped")["looped minus wide"]
    by_seed = stats.t.interval(0.95, 1, loc=0.1, scale=0.05)
    assert (one["value"], one["low"], one["high"]) == pytest.approx((0.1, *by_seed), abs=1e-3)


def test_a_seed_below_zero_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        returns.main(["--first-seed", "-1"])
    assert ended.value.code == 2 and "--first-seed -1" in capsys.readouterr().err


def test_dynamics_of_ones_own_are_a_row_of_their_own(tmp_path, monkeypatch, capsys):
    def trained(jobs, workers):
        for run_dir in jobs:
            run_dir.mkdir(parents=True)
            lines = ({"frames": 1000, "eval/return": 7.0}, {"frames": 1000, "time/frames_per_second": 100.0})
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            (run_dir / "summary.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(returns, "train_all", trained)
    words = ["--frames", "1000", "--seeds", "1", "--runs", str(tmp_path), "--csv", str(tmp_path / "x.csv")]
    returns.main([*words, "--set", "dynamics.name=gru:GRU"])
    assert "gru:GRU @1000" in capsys.readouterr().out
    assert (tmp_path / "x.csv").read_text().splitlines()[1].startswith("cartpole-swingup,gru:GRU,0,1000,7.0,100,")
    with pytest.raises(SystemExit):
        returns.main([*words, "--dynamics", "looped", "wide", "--set", "dynamics.name=gru:GRU"])
    assert "takes the place of one --dynamics" in capsys.readouterr().err


def test_rliable_agrees_on_a_clear_case():
    pytest.importorskip("rliable")
    runs = {"looped": np.full((3, 4), 0.9), "wide": np.full((3, 4), 0.1)}
    found = compare.compare(runs, "looped", 100)
    assert found["IQM, looped"]["value"] == 0.9 and found["P(looped > wide)"]["low"] == 1.0


def test_intervals_of_the_same_runs_are_the_same_again():
    pytest.importorskip("rliable")
    rng = np.random.default_rng(0)
    runs = {name: rng.uniform(size=(2, 7)) for name in ("looped", "wide")}
    first, second = (compare.compare(runs, "looped", 2000) for _ in range(2))
    assert first == second


def test_a_run_that_cannot_be_diagnosed_ends_in_one_line(tmp_path, capsys):
    assert diagnose.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        diagnose.main([str(tmp_path), "--episodes", "0"])
    assert ended.value.code == 2


def test_the_dial_is_paired_over_runs_and_its_verdict_needs_an_interval():
    noise = [0.0, 3.0, -2.0]
    rows = [{"loops": 4, "return": 100.0 * k} for k in range(3)]
    rows += [{"loops": 1, "return": 100.0 * k - 50.0 + noise[k]} for k in range(3)]
    rows += [{"loops": 0, "return": 100.0 * k + noise[k]} for k in range(3)]
    found = depth_dial.differences(rows, 4)
    assert found["return, 1 loops minus 4 loops"]["value"] == pytest.approx(-49.667, abs=1e-3)
    assert found["return, 1 loops minus 4 loops"]["high"] < -40  # runs differ by hundreds, pairs by a few
    said = depth_dial.verdict(found, 3)
    assert "1 loops minus 4" in said and "adaptive" not in said
    del found["return, 1 loops minus 4 loops"]
    assert "no setting is shown to differ" in depth_dial.verdict(found, 3)


@pytest.mark.filterwarnings("ignore:Precision loss")  # the two runs are one
def test_a_trained_agent_is_dialled(tmp_path, monkeypatch, capsys):
    forbid_filming(monkeypatch)
    run(tmp_path / "x", *SWINGUP, "agent.plan_samples=8", "frames=200")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    out, runs = tmp_path / "dial.json", [str(tmp_path / "x"), str(tmp_path / "y")]
    assert depth_dial.main([*runs, "--quick", "--loops", "1", "0", "--base", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["loops"] for row in rows] == ["policy alone", 1, 0] * 2
    assert rows[1]["loops spent"] == 1.0 < rows[2]["loops spent"] <= 8.0
    assert rows[1]["latent, 3 ahead"] != rows[2]["latent, 3 ahead"] and rows[1]["returns"] != rows[2]["returns"]
    assert [row["returns"] for row in rows[:3]] == [row["returns"] for row in rows[3:]]  # the same episodes and noise
    capsys.readouterr()
    for changed in ("plan_samples: 8", "eval_samples: 64"):
        config = tmp_path / "y" / "config.yaml"
        kept = config.read_text()
        config.write_text(kept.replace(changed, changed.split()[0] + " 0"))
        assert config.read_text() != kept and depth_dial.main(runs) == 2
        assert "nothing to turn" in (said := capsys.readouterr().err) and said.count("\n") == 1
        config.write_text(kept)


def test_what_cannot_be_dialled_ends_in_one_line(tmp_path, capsys):
    none = [str(tmp_path / "none"), str(tmp_path / "neither")]
    assert depth_dial.main(none) == 2
    assert capsys.readouterr().err.count("\n") == 1
    wrong = (["--episodes", "0"], ["--loops", "-1", "4"], ["--loops", "4", "4"], ["--base", "3"])
    for arguments in (*([*none, *words] for words in wrong), none[:1], none[:1] * 2):
        with pytest.raises(SystemExit) as ended:
            depth_dial.main(arguments)
        assert ended.value.code == 2


def test_a_kept_run_of_other_settings_is_not_passed_off(tmp_path):
    words = ["task=dmc/a-b", "agent.tau=0.5"]
    save_config(load_config(words), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text('{"finished": true}')
    assert harness.train(tmp_path, words) == tmp_path
    with pytest.raises(harness.RunFailed, match=r"was run with agent.tau=0.5 \(now 0.02\)"):
        harness.train(tmp_path, words[:1])


def test_a_run_that_fails_ends_in_its_own_words(tmp_path, capsys):
    words = ["--runs", str(tmp_path), "--seeds", "1", "--frames", "10", "--jobs", "1"]
    assert returns.main(["--task", "gym/NoSuch-v0", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("returns: train.py: ") and "NoSuch-v0" in said and said.count("\n") == 1
    folder = harness.training_run(tmp_path, "gym/CartPole-v1", "looped", 0, 10, [])[0]
    with lock_run(folder):
        assert returns.main(["--task", "gym/CartPole-v1", *words]) == 2
    assert "in use" in (said := capsys.readouterr().err) and said.count("\n") == 1
    (tmp_path / "train.log").write_text("Traceback\nboom\n")
    assert harness.why_failed(1, tmp_path / "train.log") == f"train.py ended with 1: see {tmp_path / 'train.log'}"


def test_kept_runs_are_looked_at_side_by_side(tmp_path, capsys):
    jobs = {tmp_path / f"{seed}": ["task=dmc/a-b", f"seed={seed}"] for seed in range(8)}
    for folder, words in jobs.items():
        save_config(load_config(words), folder / "config.yaml")
        (folder / "summary.json").write_text('{"finished": true}')
    harness.train_all(jobs, 8)
    assert capsys.readouterr().out.count("no evaluation") == 8


def test_runs_side_by_side_take_turns_on_the_cores_that_are_allowed(tmp_path, monkeypatch):
    """Not on the machine's first ones: another benchmark may have been given those."""
    taken: list[int | None] = []
    monkeypatch.setattr(harness, "train", lambda run_dir, words, core, one_thread: taken.append(core))
    monkeypatch.setattr(harness.os, "sched_getaffinity", lambda pid: {5, 3}, raising=False)
    for found, cores in (("/usr/bin/taskset", [3, 5, 3]), (None, [None] * 3)):  # None: no machine to pin anything on
        monkeypatch.setattr(harness.shutil, "which", lambda name, found=found: found)
        for workers in (1, 2, 3):
            taken.clear()
            harness.train_all({tmp_path / f"{i}": [] for i in range(workers)}, workers)
            assert sorted(taken, key=str) == sorted(cores[:workers], key=str)


def test_unexplained_is_a_share_of_the_variance():
    truth = torch.tensor([0.0, 2.0])
    assert diagnose.unexplained(truth, truth) == 0.0
    assert diagnose.unexplained(truth.mean().expand(2), truth) == pytest.approx(1.0)


def test_latents_are_held_against_the_observations_and_their_own_steps():
    agent = make_agent(load_config(TINY), 3, 2, False)
    obs = torch.randn(30, 4, 3, generator=torch.Generator().manual_seed(0))
    data = Episodes(obs, torch.zeros(30, 4, 2), torch.ones(30, 4))
    wide = torch.eye(3, 6)
    with torch.no_grad():
        agent.encode = lambda seen: symlog(seen) @ wide  # which tells everything
        agent.slow_model = SimpleNamespace(dynamics=lambda z, action, depth: SimpleNamespace(z_next=z))  # all stays
        found = diagnose.latent_quality(agent, data, 2)
        assert found["observation, unread"] == pytest.approx(0.0, abs=1e-6)
        assert found["latent, error of a step"] == pytest.approx(1.0)
        assert 2.0 < found["latent, rank"] <= 3.0
        agent.encode = lambda seen: torch.ones(*seen.shape[:-1], 6)  # which tells nothing
        found = diagnose.latent_quality(agent, data, 2)
        assert found["observation, unread"] == pytest.approx(1.0, abs=0.1)
        assert found["latent, variance"] == found["latent, rank"] == 0.0
        assert "latent, error of a step" not in found, "nothing moves"
        agent.encode = lambda seen: torch.full((*seen.shape[:-1], 6), float("nan"))  # of a run that diverged
        assert "observation, unread" not in diagnose.latent_quality(agent, data, 2)
        agent.encode = lambda seen: symlog(seen) @ wide
        dull = Episodes(torch.ones_like(data.obs), *data[1:])
        assert set(diagnose.latent_quality(agent, dull, 2)) == {"latent, variance", "latent, rank"}
        alone = Episodes(*(x[:, :1] for x in data))
        assert "observation, unread" not in diagnose.latent_quality(agent, alone, 2), "no other episode to try it on"


def test_a_value_is_held_against_the_return_that_followed():
    """A constant reward of one: the discounted return is known, and a fresh value of zero lies below it by as much."""
    agent = make_agent(load_config([*TINY, "agent.discount=0.5"]), 3, 2, False)
    data = Episodes(torch.zeros(40, 2, 3), torch.zeros(40, 2, 2), torch.ones(40, 2))
    with torch.no_grad():
        found = diagnose.value_errors(agent, data)
    assert found["return, discounted"] == pytest.approx(
        2.0, rel=diagnose.TAIL
    )  # of which so much may lie beyond the end
    assert found["value minus return"] == pytest.approx(-found["return, discounted"], abs=1e-2)
    assert found["values apart"] == pytest.approx(0.0, abs=1e-5)
    short = Episodes(*(x[:3] for x in data))
    assert diagnose.value_errors(agent, short) == {}


@pytest.mark.parametrize("task", ["gym/Pendulum-v1", "gym/Acrobot-v1"])
def test_episodes_with_the_targets_noise(task):
    words = [f"task={task}", "size=small", "agent.plan_samples=0", "agent.smooth_clip=0.1"]
    dims, noise = ((3, 1, False), "smooth_std") if "Pendulum" in task else ((6, 3, True), "smooth_share")
    plain, none, much = (
        diagnose.play(make_agent(load_config([*words, f"agent.{noise}={std}"]), *dims), task, 1, 2, noisy=noisy)
        for std, noisy in ((0.5, False), (0.0, True), (0.5, True))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, none, strict=True))
    moved = (much.action[0] - plain.action[0]).abs().max()  # later observations differ too
    assert not torch.equal(much.action, plain.action) and (dims[2] or moved <= 0.1 + 1e-6)


def test_what_a_plan_decides_by_is_held_against_what_it_ends_in():
    """The spread of known scores, and the value at the imagined and at the real end of one step, by hand."""
    words = ["agent.plan_samples=400", "agent.plan_std_final=0.1", "agent.plan_std=0.1", "agent.plan_horizon=1"]
    agent = make_agent(load_config([*TINY, *words]), 3, 2, False)
    data = Episodes(torch.randn(12, 2, 3), torch.zeros(12, 2, 2), torch.zeros(12, 2))
    agent.score = lambda z, actions: 5.0 * actions[0, :, 0]
    with torch.no_grad():
        found = diagnose.plan_errors(agent, data, 2)
        assert found["scores of a plan, spread"] == pytest.approx(0.5, rel=0.1)
        assert found["value at a plan's end, imagined minus real, rms"] == pytest.approx(0.0, abs=1e-6)  # a fresh value
        for member in agent.value.members:
            torch.nn.init.normal_(member[-1].weight)
        found = diagnose.plan_errors(agent, data, 2)
        z = agent.encode(data.obs)
        ends = [agent.slow_model.dynamics(z[:-1].flatten(0, 1), torch.zeros(22, 2), 2).z_next, z[1:].flatten(0, 1)]
        worth = [agent.value.values(agent.value_input(end, agent.policy(end)[0])).mean(0) for end in ends]
        off = float((worth[0] - worth[1]).square().mean().sqrt())
        assert found["value at a plan's end, imagined minus real, rms"] == pytest.approx(off) and off > 0
    agent.config = dataclasses.replace(agent.config, plan_samples=0)
    assert diagnose.plan_errors(agent, data, 2) == {}


def test_a_model_is_held_against_what_came_each_step_ahead():
    """Rewards that the model itself imagines are explained wholly at every distance; a wrong shift by one is not."""
    torch.manual_seed(0)
    agent = make_agent(load_config(TINY), 3, 2, False)
    torch.nn.init.normal_(agent.slow_model.reward.layers[-1][-1].weight)
    obs, action = torch.randn(30, 2, 3), torch.rand(30, 2, 2) * 2 - 1
    one = agent.slow_model.rollout(agent.encode(obs).flatten(0, 1), action.flatten(0, 1)[None], 4)
    reward = agent.slow_model.predict(one.h)[0].view(30, 2)
    found = diagnose.model_errors(agent, Episodes(obs, action, reward.detach()), 4)
    assert found["reward, 1 ahead"] < 1e-9
    assert found["reward, 3 ahead"] > 0.1  # the observations are noise: the model cannot know them ahead
    late = Episodes(obs, action, torch.roll(reward.detach(), 1, 0))
    assert diagnose.model_errors(agent, late, 4)["reward, 1 ahead"] > 0.1


def test_a_branch_goes_on_from_the_checkpoint_of_its_run(tmp_path, monkeypatch, capsys):
    forbid_filming(monkeypatch)
    words = [*CARTPOLE, "frames=60", "eval_every=30", "checkpoint_every=30", "eval_episodes=1"]
    assert run(tmp_path / "run", *words) == 0
    options = ["--frames", "40", "--runs", str(tmp_path / "kept"), "--jobs", "1", "--json", str(tmp_path / "found")]
    branches.main([str(tmp_path / "run"), "--set-change", "slow=agent.learning_rate=1e-9", *options])
    found = json.loads((tmp_path / "found").read_text())
    assert [(row["change"], row["from"]) for row in found["rows"]] == [("unchanged", 60), ("slow", 60)]
    assert all(row["return"] > 0 for row in found["rows"])
    folders = [tmp_path / "kept" / "branches" / f"run__{name}_40" for name in ("unchanged", "slow")]
    configs = [read_config(folder / "config.yaml") for folder in folders]
    assert [cfg.agent.learning_rate for cfg in configs] == [1e-3, 1e-9]
    assert {changed.partition("=")[0] for changed in changed_settings(*configs)} == {"agent.learning_rate"}
    for folder in folders:
        assert [at for at, _ in harness.curve(folder)] == [30, 60, 80, 100]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--change", "one_step_returns"], "is not a run directory"),
        (["--change", "nothing_such"], "choose from"),
        (["--set-change", "more=agent.update_ratio=2"], "cannot change in the middle of a run"),
        (["--change", "fast"], "cannot change in the middle of a run"),
        ([], "name a --change or a --set-change"),
    ],
)
def test_a_branch_that_cannot_be_made_ends_in_one_line(tmp_path, capsys, words, complaint):
    try:
        code = branches.main([str(tmp_path / "none"), *words, "--runs", str(tmp_path)])
    except SystemExit as ended:  # of what is wrong in the command itself
        code = ended.code
    assert code == 2 and complaint in capsys.readouterr().err


# ---- what latents keep of observations ------------------------------------------------------------------


def test_a_network_reads_what_a_latent_holds_and_nothing_else():
    stream = torch.Generator().manual_seed(0)
    obs, held = (torch.randn(n, 4, generator=stream) for n in (4000, 1000))
    obs[:, 3], held[:, 3] = 1.0, 1.0  # what does not vary is left out

    def latent(x):
        return torch.stack([3.0 * x[:, 0], x[:, 0] * x[:, 1], torch.zeros(len(x))], 1)

    known, half, unknown = representation.unread(latent(obs), obs, latent(held), held).tolist()
    assert known < 0.01 and 0.02 < half < 0.6 and unknown > 0.98


def test_stretches_of_a_replay_are_held_out(tmp_path, monkeypatch):
    forbid_filming(monkeypatch)
    monkeypatch.setattr(representation, "LEAST", 8)
    assert run(tmp_path / "run", *CARTPOLE, "frames=1000", "num_envs=2") == 0
    whole = load_run(tmp_path / "run")
    learnt, held = representation.split_replay(tmp_path / "run", whole, 900)
    assert (len(learnt), len(held), whole.discrete) == (40 * 9, 10 * 9, True)
    rows = {part: {r.tobytes() for r in part.obs[: len(part)].reshape(-1, 4)} for part in (learnt, held)}
    assert not rows[learnt] & rows[held]
    for part in (learnt, held):
        assert part.is_last[8 : len(part) : 9].all()
        batch = part.sample(200, 3, uniform=True)
        begin = batch.start // 2 % 9  # steps of a stretch
        assert (batch.mask.sum(0) <= 8 - begin).all() and batch.mask.any()


def test_latents_are_learnt_anew_from_a_run(tmp_path, monkeypatch, capsys):
    forbid_filming(monkeypatch)
    monkeypatch.setattr(representation, "LEAST", 8)
    words = [*CARTPOLE[1:], "task=gym/Pendulum-v1", "frames=500"]
    assert run(tmp_path / "run", *words) == 0
    found = tmp_path / "found.json"
    options = ["--frames", "500", "--updates", "20", "--set-change", "fixed=agent.encoder_rate=0", "--json", str(found)]
    assert representation.main([str(tmp_path / "run"), *options]) == 0
    unchanged, fixed = json.loads(found.read_text())["rows"]
    assert [row["change"] for row in (unchanged, fixed)] == ["unchanged", "fixed"]
    for row in (unchanged, fixed):
        assert len(row["entries"]) == 3 and row["step"] > 0.0 and 0.0 <= row["unread"] <= 1.0 and row["rank"] >= 1.0
    assert unchanged["rank"] != fixed["rank"]
    capsys.readouterr()
    for wrong, frames in (("run", 700), ("run", 300), ("none", 500)):  # too long, too short, not there
        words = ["--set-change", "fixed=agent.encoder_rate=0", "--frames", str(frames), "--updates", "1"]
        assert representation.main([str(tmp_path / wrong), *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- which gradient a policy should climb ---------------------------------------------------------------


def test_agreement_of_changes():
    truth = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    assert policy_gradients.agreement(5.0 * truth + 3.0, truth) == pytest.approx(1.0)
    assert policy_gradients.agreement(-truth, truth) == pytest.approx(-1.0)
    assert policy_gradients.agreement(torch.stack([truth[0], torch.ones(3)]), truth) == pytest.approx(1.0)  # one varies
    assert policy_gradients.agreement(torch.ones(2, 3), truth) == 0.0


@pytest.mark.parametrize("horizon", [0, 2])
def test_a_gradient_is_the_slope_of_what_it_says(horizon):
    """Against central differences of the planner's own score of the action and the policy's after it, in float64."""
    agent = make_agent(load_config([*TINY, "agent.plan_loops=3"]), 3, 2, False)
    for member in agent.value.members:
        torch.nn.init.normal_(member[-1].weight, 0.0, 1e-3)
    torch.nn.init.normal_(agent.slow_model.reward.layers[-1][-1].weight)
    for part in (agent.policy, agent.value, agent.slow_model):
        part.double()
    z = agent.encode(torch.randn(4, 3, dtype=torch.float64))
    found = policy_gradients.gradient(agent, z.detach(), policy_gradients.Kind(horizon, 2, 0.0))

    def worth(change):
        at, a, actions = z, agent.policy(z)[0] + change, []
        for _ in range(horizon):
            actions.append(a)
            at = agent.slow_model.dynamics(at, a, 3).z_next
            a = agent.policy(at)[0]
        return agent.score(z, torch.stack(actions)) if horizon else agent.value.values(agent.value_input(z, a)).mean(0)

    with torch.no_grad():
        for i in range(2):
            step = 1e-5 * torch.eye(2, dtype=torch.float64)[i]
            slope = (worth(step) - worth(-step)) / 2e-5
            torch.testing.assert_close(found[:, i], slope, rtol=1e-3, atol=1e-6)
    one = policy_gradients.gradient(agent, z.detach(), policy_gradients.Kind(horizon, 1, 0.0))
    assert not torch.allclose(one, found)
    noisy = policy_gradients.gradient(agent, z.detach(), policy_gradients.Kind(horizon, 2, 0.3))
    assert not torch.allclose(noisy, found)


def worth_by_hand(agent, env, obs, action, steps):
    """(discounted reward, what of it is left, the last observation) of ``action`` and the policy after it."""
    total, left = 0.0, 1.0
    for step in range(steps):
        obs, reward, terminated, *_ = env.step(action)
        total += 0.9**step * float(reward)
        left *= 0.0 if terminated else 0.9
        if terminated:
            break
        action = policy_gradients._act_of(agent, obs)
    return total, left, obs


def test_a_changed_action_is_worth_what_the_simulator_says():
    task = "gym/Pendulum-v1"
    agent = make_agent(load_config([f"task={task}", "size=small", "agent.discount=0.9"]), 3, 1, False)
    agent.state_value = lambda z: 5.0 * z[..., 0]
    found = policy_gradients.play_changes(agent, task, 1, 2, 3)
    assert found.obs.shape == (2, 3) and found.action.shape == (2, 3, 1)
    assert (found.action - agent.policy(agent.encode(found.obs))[0].unsqueeze(1)).abs().min() > 0.0
    names = {
        policy_gradients.REWARDS: policy_gradients.TRUTHS[0],
        policy_gradients.BOOTSTRAP: policy_gradients.TRUTHS[1],
    }
    for state in range(2):
        for steps, name in names.items():
            env = make_env(task, action_repeat=1, seed=0)
            obs = env.reset(seed=diagnose.SEED + state)[0]
            while not np.allclose(obs, found.obs[state].numpy(), atol=1e-6):
                obs = env.step(policy_gradients._act_of(agent, obs))[0]
            total, left, obs = worth_by_hand(agent, env, obs, found.action[state, 2].numpy(), steps)
            if steps == policy_gradients.BOOTSTRAP:
                total += left * float(agent.state_value(agent.encode(torch.as_tensor(obs)[None])))
            assert float(found.worth[name][state, 2]) == pytest.approx(total, rel=1e-4)


def test_nothing_is_worth_anything_after_a_termination():
    """Rewards of one for four steps, then a terminal one: no value is added, whatever it says."""

    class Short:
        def reset(self, seed):
            self.left = 4
            return np.zeros(3, np.float32), {}

        def step(self, action):
            self.left -= 1
            return np.zeros(3, np.float32), 1.0, self.left == 0, False, {}

    agent = make_agent(load_config(["task=gym/Pendulum-v1", "size=small", "agent.discount=0.5"]), 3, 1, False)
    agent.state_value = lambda z: torch.full(z.shape[:-1], 100.0)
    assert policy_gradients._worth(agent, Short(), 0, [np.zeros(1)]) == (1.875, 1.875)


def test_effects_of_actions_that_are_known_and_unknown():
    """Latents are the observations and a step adds the action; the value is the first latent."""
    agent = make_agent(load_config([*TINY, "agent.discount=0.5"]), 3, 3, False)
    stream = torch.Generator().manual_seed(0)
    obs, action = torch.randn(6, 3, generator=stream), torch.randn(6, 5, 3, generator=stream)
    after, reward = obs.unsqueeze(1) + action, torch.randn(6, 5, generator=stream)
    agent.encode = lambda seen: seen
    agent.state_value = lambda z: z[..., 0]
    agent.value_input = lambda z, action: torch.cat([z, action], -1)
    known = reward.flatten() + 0.5 * after[..., 0].flatten()
    over = torch.zeros(6, 5)
    agent.value = SimpleNamespace(values=lambda pair: torch.stack([known, known]))

    def found(step):
        agent.slow_model = SimpleNamespace(dynamics=lambda z, action, depth: SimpleNamespace(z_next=step(z, action)))
        return list(action_effects.effects(agent, obs, action, reward, over, after).values())

    assert found(lambda z, action: z + action) == pytest.approx([1.0, 1.0, 1.0])
    assert found(lambda z, action: z) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    assert found(lambda z, action: z - action) == pytest.approx([-3.0, -1.0, 1.0])
    assert found(lambda z, action: z + action + 7.0) == pytest.approx([1.0, 1.0, 1.0]), "an error for all alike is none"
    over[:, ::2] = 1.0  # where nothing follows
    assert found(lambda z, action: z + action)[2] < 0.999
    known = reward.flatten() + 0.5 * ((1.0 - over) * after[..., 0]).flatten()
    assert found(lambda z, action: z + action)[2] == pytest.approx(1.0)


def test_effects_of_a_runs_actions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(policy_gradients, "LATEST", 20)
    forbid_filming(monkeypatch)
    assert run(tmp_path / "run", *SWINGUP[2:], "task=gym/Pendulum-v1", "frames=60") == 0
    found = tmp_path / "found.json"
    assert action_effects.main([str(tmp_path / "run"), "--quick", "--json", str(found)]) == 0
    (row,) = json.loads(found.read_text())["rows"]
    assert row["states"] == 8 and all(-1e9 < row[name] <= 1.0 for name in action_effects.MEASURES)
    assert abs(row["value, by the model"]) > 0.0 and row["latent"] != 0.0
    capsys.readouterr()
    assert action_effects.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("action_effects: ")
    with pytest.raises(SystemExit, match="2"):
        action_effects.main([str(tmp_path / "run"), "--changes", "1"])


def test_gradients_of_a_run_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(policy_gradients, "LATEST", 20)
    forbid_filming(monkeypatch)
    for name, task in (("run", "gym/Pendulum-v1"), ("discrete", "gym/CartPole-v1")):
        assert run(tmp_path / name, *SWINGUP[2:], f"task={task}", "frames=60") == 0
    found = tmp_path / "found.json"
    assert policy_gradients.main([str(tmp_path / "run"), "--quick", "--json", str(found)]) == 0
    rows = json.loads(found.read_text())["rows"]
    assert len(rows) == len(policy_gradients.HORIZONS) * 4
    assert [row["climbed"] for row in rows].count(True) == 1  # the first value alone
    for name in policy_gradients.TRUTHS:
        assert all(abs(row[name]) <= 1.0 for row in rows) and len({row[name] for row in rows}) > 2
    assert "over 1 runs" in capsys.readouterr().out.lower()
    for wrong in (tmp_path / "discrete", tmp_path / "none"):
        assert policy_gradients.main([str(wrong)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_curves_are_drawn_where_all_seeds_were_evaluated():
    x, y = figures.together(
        [[(20_004, 1.0), (20_200, 2.0), (40_002, 3.0)], [(20_000, 5.0), (30_000, 6.0), (40_000, 7.0)]]
    )
    assert x.tolist() == [20_004, 40_002] and y.tolist() == [[1.0, 3.0], [5.0, 7.0]]
    alone = [(1500, 1.0), (2500, 2.0), (100_000, 3.0)]
    assert figures.together([alone])[0].tolist() == [1500, 2500, 100_000]
    assert figures.together([alone, [(2502, 4.0), (100_000, 5.0)]])[1].tolist() == [[2.0, 3.0], [4.0, 5.0]]


def test_figures_tell_two_defaults_apart(tmp_path, monkeypatch):
    drawn, panel = {}, figures.panel

    def watched(axes, title, rows, *rest, **words):
        drawn[title] = rows
        panel(axes, title, rows, *rest, **words)

    monkeypatch.setattr(figures, "panel", watched)
    for name, task in (("old", "dmc/a"), ("new", "dmc/a"), ("new2", "dmc/b")):
        rows = [{"task": task, "seed": seed, "dynamics": "looped", "curve": [[1, 2.0], [2, seed]]} for seed in (0, 1)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmark": "returns", "rows": rows}), encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps({"benchmark": "cost", "rows": [{}]}), encoding="utf-8")
    files = [str(tmp_path / f"{name}.json") for name in ("new", "new2", "other", "old")]
    figures.main([*files[:3], "--before", files[3], "--grid", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").stat().st_size > 1000
    found = {title: [row["dynamics"] for row in rows] for title, rows in drawn.items()}
    assert found == {"a (2 seeds)": ["looped, before"] * 2 + ["looped"] * 2, "b (2 seeds)": ["looped"] * 2}


def test_figures_read_the_csv_of_a_result(tmp_path):
    lines = ["task,dynamics,seed,frames,return,frames_per_second,commit"]
    for task, seed in (("cup-catch", 0), ("cup-catch", 1), ("gym/CartPole-v1", 0)):
        lines += [f"{task},looped,{seed},{frames},{frames + seed}.5,100,abc" for frames in (20_000, 40_000)]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = figures.read_rows(tmp_path / "x.csv")
    assert [(row["task"], row["seed"]) for row in rows] == [
        ("dmc/cup-catch", 0),
        ("dmc/cup-catch", 1),
        ("gym/CartPole-v1", 0),
    ]
    assert rows[1] == {
        "task": "dmc/cup-catch",
        "dynamics": "looped",
        "seed": 1,
        "curve": [(20_000, 20_001.5), (40_000, 40_001.5)],
    }


def test_figures_end_where_they_are_told_to(tmp_path, monkeypatch):
    lines = ["task,dynamics,seed,frames,return,frames_per_second,commit"]
    lines += [f"gym/loopwm/Sandpile-v0,looped,0,{frames},1.0,100,abc" for frames in (2500, 5002, 10_000)]
    lines += ["gym/loopwm/Sandpile-v0,wide,0,10000,1.0,100,abc"]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    drawn = []
    monkeypatch.setattr(figures, "panel", lambda axes, title, rows, *rest: drawn.extend(rows))
    figures.main([str(tmp_path / "x.csv"), "--until", "5000", "--out", str(tmp_path)])
    assert [(row["dynamics"], row["curve"]) for row in drawn] == [("looped", [(2500, 1.0), (5002, 1.0)])]
    assert (tmp_path / "loopwm-Sandpile-v0.png").exists()  # a file, whatever the task's name


# ---- headline -------------------------------------------------------------------------------------------


def test_the_headline_reads_errors_and_older_shares_right(tmp_path):
    def row(model, depth, right):
        return {"model": model, "depth": depth, "size": 8, "seed": 0} | right

    rows = [
        row("looped", 16, {"right": {"0-0": 1.0, "1-3": 0.75, "4-8": 0.5}}),
        row("looped", 64, {"right": {"0-0": 1.0, "1-3": 1.0, "4-8": 0.25}}),
        row("looped", 64, {"error": {"0": 0.0, "1-3": 0.5, "4-8": 1.0}}),
        row("looped", 64, {"right": {"0-0": 1.0, "1-3": 0.0, "4-8": 0.0}}) | {"size": 12},
        row("stacked", None, {"error": {"0": 0.0, "1-3": 0.0, "4-8": 0.125}}),
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    names, right = headline.shares_right(tmp_path, headline.Line("x", "looped", 64, "", "k"))
    assert names == ["1-3", "4-8"] and right.tolist() == [[1.0, 0.25], [0.5, 0.0]]
    assert headline.shares_right(tmp_path, headline.Line("x", "stacked", None, "", "k"))[1].tolist() == [[1.0, 0.875]]
    other = [row("wide", None, {"error": {"0": 0.0, "1-2": 0.0, "3-8": 0.125}})]
    (tmp_path / "y.json").write_text(json.dumps({"rows": other}), encoding="utf-8")
    lines = [headline.Line("x", "looped", 64, "", "k"), headline.Line("y", "wide", None, "", "k")]
    with pytest.raises(ValueError, match="'wide' has the groups"):
        headline.draw_depth(
            SimpleNamespace(plot=lambda *_, **__: None, fill_between=lambda *_, **__: None), "", tmp_path, lines
        )


def test_the_headline_is_drawn_from_the_results_that_are_kept(tmp_path):
    headline.main(["--out", str(tmp_path / "headline.png")])
    assert (tmp_path / "headline.png").stat().st_size > 10_000


# ---- time_to_score --------------------------------------------------------------------------------------


def test_the_clock_stops_at_two_evaluations_in_a_row(tmp_path):
    words = [*CARTPOLE, "frames=100000", "eval_every=40", "log_every=1000", "checkpoint_every=1000"]
    found = time_to_score.timed_run(tmp_path / "x", words, score=1.0)  # any episode has more
    assert (found["first_frames"], found["second_frames"]) == (40, 80)
    assert 0.0 < found["first_seconds"] <= found["second_seconds"]
    with pytest.raises(harness.RunFailed, match="NoSuch-v0"):
        time_to_score.timed_run(tmp_path / "y", ["task=gym/NoSuch-v0"], score=1.0)
