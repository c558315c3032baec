"""Exact resume after every kind of end, checkpoints that survive, one rollout for all, honest logs."""

import copy
import functools
import io
import json
import os
import pickle
import random
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_replay import ENVS, action_of, check, counting_venv
from training_tools import (
    CARTPOLE,
    SWINGUP,
    TINY,
    content,
    differences,
    forbid_filming,
    lines,
    run,
    start,
    untimed,
    wait_until,
)

from agents import load_agent
from agents.planner import PlannerAgent
from envs import make_vector_env
from loopwm.training import trainer
from loopwm.training.checkpoint import CheckpointError, Checkpoints
from loopwm.training.interrupt import Interrupt
from loopwm.training.logger import Logger
from loopwm.training.random_state import random_state, set_random_state
from loopwm.training.replay import Replay
from loopwm.training.rollout import rollout
from loopwm.training.trainer import Schedule, Trainer
from loopwm.training.video import VideoError, film_episode

EVERY = ["eval_every=300", "checkpoint_every=150", "log_every=50", "frames=600"]
PLAN = ["agent.plan_collect=true", "agent.plan_samples=24", "agent.plan_horizon=2"]
SHALLOW = ["dynamics.mean_loops=2", "agent.plan_loops=2"]
AHEAD = ["agent.policy_horizon=2", "agent.policy_switch_steps=0"]  # at once: runs of tests are over before it
CASES = {
    "swingup": [*SWINGUP, *EVERY],
    "cartpole-3-envs": [*CARTPOLE, *EVERY, "num_envs=3"],
    "plan-collect": [*SWINGUP, *EVERY, *PLAN, "num_envs=2", "task.action_repeat=30"],
    "horizon": [*SWINGUP, *EVERY, *AHEAD, "agent.policy_std=0.2", "agent.policy_penalty_kept=0.1"],
    "known-steps": [*SWINGUP, *EVERY, *AHEAD, "agent.policy_step_error=1e6"],  # looked at once in 250
    "resets": [*SWINGUP, *EVERY, "agent.reset_every=8", "agent.reset_updates=5"],  # of 30 steps
    "global-streams": [*CARTPOLE, *EVERY, "task=gym/Drawing-v0"],
    "grid": ["task=gym/loopwm/Sandpile-v0", *TINY, *EVERY, *PLAN, "encoder=grid", *SHALLOW, "agent.novelty_spread=0"],
    "ring-wraps": [*CARTPOLE, *EVERY, "replay.capacity=200"],
    "return-floor": [*CARTPOLE, *EVERY, "replay.capacity=200", "num_envs=2", "agent.return_floor=0.9"],
}


@pytest.fixture(autouse=True)
def no_videos(monkeypatch):
    """Filming takes seconds, and needs GL."""
    forbid_filming(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """name -> the run directory of a case trained without a stop, made once."""
    folder = tmp_path_factory.mktemp("straight")

    @functools.cache
    def make(name: str) -> Path:
        assert run(folder / name, *CASES[name]) == 0
        return folder / name

    return make


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: weights, optimisers, targets, counters, random streams, envs, replay, metrics."""
    assert differences(content(one), content(other)) == []
    assert untimed(one) == untimed(other)


# ---- exact resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_two_halves_equal_the_whole(name, straight, tmp_path):
    words = CASES[name]
    assert run(tmp_path, *words, "frames=300") == 0
    assert json.loads((tmp_path / "summary.json").read_text())["frames"] in range(300, 350)
    assert run(tmp_path, *words, "resume=true") == 0
    assert_same_run(straight(name), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is True


@pytest.mark.parametrize("name", ["swingup", pytest.param("cartpole-3-envs", marks=pytest.mark.slow)])
def test_kill_between_checkpoints(name, straight, tmp_path):
    """SIGKILL beyond a checkpoint, and a torn last line: the same command goes on to the same bits."""
    words = CASES[name]
    process = start(tmp_path, *words)

    def beyond() -> bool:
        saved = Checkpoints(tmp_path).frames()
        return bool(saved) and any(one["frames"] >= saved[-1] + 50 for one in lines(tmp_path))

    wait_until(beyond, process)
    process.kill()
    process.wait()
    assert Checkpoints(tmp_path).frames()[-1] < lines(tmp_path)[-1]["frames"]
    assert not (tmp_path / "summary.json").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"frames": 9')
    time.sleep(1)  # TensorBoard orders the files of a run by the second
    assert run(tmp_path, *words, "resume=true") == 0
    assert_same_run(straight(name), tmp_path)
    # TensorBoard's curves have every point once: no second past, no gap before the kill.
    steps = [e.step for e in events(tmp_path).Scalars("train/agent_steps")]
    assert steps == [one["frames"] for one in lines(tmp_path) if "train/agent_steps" in one]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_interrupt_writes_a_checkpoint(number, straight, tmp_path):
    words = CASES["cartpole-3-envs"]
    process = start(tmp_path, *words)
    wait_until(lambda: len(lines(tmp_path)) >= 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "stopping after this step" in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] is False and Checkpoints(tmp_path).frames()[-1] == summary["frames"] < 600
    assert f"run_dir={tmp_path} resume=true" in out
    assert run(tmp_path, *words, "resume=true") == 0
    assert_same_run(straight("cartpole-3-envs"), tmp_path)


def test_an_interrupt_does_not_wait_for_an_evaluation(tmp_path):
    """It is dropped, and made when the run goes on, where it was due."""
    words = [*SWINGUP, "eval_every=200", "checkpoint_every=100", "log_every=100"]
    process = start(tmp_path, *words, "eval_episodes=2000")
    wait_until(lambda: bool(lines(tmp_path)) and lines(tmp_path)[-1]["frames"] >= 200, process)
    time.sleep(0.3)  # it evaluates now, for minutes
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted at 200 frames" in out
    assert Checkpoints(tmp_path).frames() == [100, 200]
    assert run(tmp_path, *words, "eval_episodes=1", "frames=200", "resume=true") == 0
    assert [one["frames"] for one in lines(tmp_path) if "eval/return" in one] == [200]
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is True


def test_a_run_that_is_cut_short_is_evaluated_where_it_ends(tmp_path):
    process = start(tmp_path, *SWINGUP, "eval_every=100", "log_every=20", "checkpoint_every=100")
    wait_until(lambda: bool(lines(tmp_path)) and lines(tmp_path)[-1]["frames"] >= 120, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    at = Checkpoints(tmp_path).frames()[-1]
    assert run(tmp_path, *SWINGUP, "frames=80", "resume=true") == 0
    assert max(one["frames"] for one in lines(tmp_path) if "eval/return" in one) == at


class Impatient(gymnasium.Wrapper):
    """CartPole in whose 100th step somebody presses Ctrl-C twice."""

    steps = 0

    def __init__(self):  # takes no render_mode
        super().__init__(gymnasium.make("CartPole-v1"))

    def step(self, action):
        Impatient.steps += 1
        if Impatient.steps == 100:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return self.env.step(action)


gymnasium.register("Impatient-v0", Impatient)


def test_second_interrupt_does_not_wait(tmp_path, capsys):
    words = [*CARTPOLE, "task=gym/Impatient-v0", "eval_every=1000", "checkpoint_every=60"]
    assert run(tmp_path, *words) == 130
    assert "stopped at once" in capsys.readouterr().err and Checkpoints(tmp_path).frames() == [60]


class Failing(gymnasium.Wrapper):
    """CartPole that fails in one of its episodes, by its seed: the 8th that is begun, from its 4th step on."""

    how, begun, bad = "", 0, None

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1"))

    def reset(self, *, seed=None, options=None):
        Failing.begun += 1
        if Failing.begun == 8:
            Failing.bad = seed
        self.seed, self.at = seed, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.at += 1
        if self.seed == Failing.bad and self.at >= 4:
            if self.how == "raise":
                raise ValueError("the solver did not converge\nat all")
            if self.how == "numpy":
                np.linalg.inv(np.zeros((2, 2)))
            reward = {"none": None, "reward": np.nan, "infinite": np.inf}.get(self.how, reward)
            obs = {"obs": obs * np.nan, "size": obs[:2], "overflow": obs * 1e300 * 1e200}.get(self.how, obs)
        return obs, reward, *rest


gymnasium.register("Failing-v0", Failing)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "how, said",
    [
        ("raise", "ValueError: the solver did not converge ("),
        ("numpy", "LinAlgError: Singular matrix (" + __file__),
        ("none", "TypeError: "),
        ("reward", "a reward of nan"),
        ("infinite", "a reward of inf"),
        ("obs", "an observation with NaN or infinity"),
        ("overflow", "an observation with NaN or infinity"),
        ("size", "an observation of 2 numbers, not 4"),
    ],
)
def test_an_environment_that_fails_costs_no_frame(how, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Failing, "how", how)
    monkeypatch.setattr(Failing, "begun", 0)
    monkeypatch.setattr(Failing, "bad", None)
    words = [*CARTPOLE, "task=gym/Failing-v0", "eval_every=10000", "checkpoint_every=10000", "frames=400"]
    assert run(tmp_path, *words) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert len(err) == 1 and said in err[0] and "in step 4 of episode 7" in err[0], err
    (at,) = Checkpoints(tmp_path).frames()
    rows = content(tmp_path)["rows"]
    assert len(rows["obs"]) == at + 7 and rows["is_last"].sum() == 7  # every step of episodes 0 to 6, three of the 7th
    assert run(tmp_path, *words, "resume=true") == 0  # the episode by which it failed does not come again
    assert "had failed: resuming with new episodes" in capsys.readouterr().out
    after = content(tmp_path)
    assert len(after["rows"]["obs"]) > 400 and np.isfinite(after["rows"]["obs"]).all()
    assert (after["rows"]["obs"][: at + 7] == rows["obs"]).all() and after["rows"]["is_last"][at + 7]


@pytest.mark.filterwarnings("ignore:.*ERROR")
def test_a_worker_that_fails_costs_no_frame(tmp_path, capsys, monkeypatch):
    """Every process counts its episodes anew, so each fails in its 8th."""
    monkeypatch.setattr(Failing, "how", "raise")
    words = [*CARTPOLE, "task=gym/Failing-v0", "eval_every=10000", "checkpoint_every=10000", "workers=true"]
    for _ in range(2):
        before = max(Checkpoints(tmp_path).frames(), default=0)
        assert run(tmp_path, *words, "resume=true") == 2
        assert "in step 4 of episode" in capsys.readouterr().err
        assert max(Checkpoints(tmp_path).frames()) > before + 50


def test_an_evaluation_that_fails_costs_no_frame(tmp_path, capsys, monkeypatch):
    words = [*CARTPOLE, "frames=200", "eval_every=150", "checkpoint_every=1000"]

    def fail(*_, **__):
        raise OSError("no such display")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "rollout", fail)
        assert run(tmp_path, *words) == 2
    assert Checkpoints(tmp_path).frames() == [150]
    assert run(tmp_path, *words, "resume=true") == 0
    assert [one["frames"] for one in lines(tmp_path) if "eval/return" in one] == [200]  # not the same one again


@pytest.mark.parametrize("task", [CARTPOLE, SWINGUP], ids=["discrete", "continuous"])
@pytest.mark.parametrize("loss", ["two_hot", "huber"])
def test_an_agent_that_diverges_says_so_and_is_not_kept(task, loss, tmp_path, capsys, monkeypatch):
    words = [*task, *PLAN, f"agent.value_loss={loss}", "frames=600", "eval_every=10000", "log_every=100"]
    assert run(tmp_path, *words, "frames=200", "checkpoint_every=200") == 0
    before = content(tmp_path)
    update = PlannerAgent._update_value

    def broken(agent, inputs, target, weight):
        return update(agent, inputs, target * (np.nan if agent.acted > 10 else 1.0), weight)

    monkeypatch.setattr(PlannerAgent, "_update_value", broken)
    assert run(tmp_path, *words, "checkpoint_every=250", "resume=true") == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert len(err) == 1 and "diverged: " in err[0] and "agent.learning_rate" in err[0]
    assert differences(before, content(tmp_path)) == []


def test_interrupt_with_workers(tmp_path):
    """A terminal sends Ctrl-C to the workers as well."""
    process = start(tmp_path, *CARTPOLE, "num_envs=2", "workers=true", "log_every=100")
    wait_until(lambda: len(lines(tmp_path)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert Checkpoints(tmp_path).frames()


def test_copied_run_goes_on_elsewhere(straight, tmp_path):
    words = CASES["cartpole-3-envs"]
    run(tmp_path / "a", *words, "frames=300")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert run(tmp_path / "b", *words, "resume=true") == 0
    assert_same_run(straight("cartpole-3-envs"), tmp_path / "b")


def test_resuming_a_finished_run_changes_nothing(straight, tmp_path):
    shutil.copytree(straight("swingup"), tmp_path / "run")
    assert run(tmp_path / "run", *CASES["swingup"], "resume=true") == 0
    assert_same_run(straight("swingup"), tmp_path / "run")


class DrawingEnv(gymnasium.Wrapper):
    """CartPole that moves the global random streams, as packages of others may."""

    def __init__(self, **_):
        super().__init__(gymnasium.make("CartPole-v1"))

    def step(self, action):
        random.random(), np.random.rand(), torch.rand(())
        return self.env.step(action)


gymnasium.register("Drawing-v0", DrawingEnv)


class ForgetfulEnv(gymnasium.Env):
    """Does not repeat itself: obs = [0, episodes ever begun, step] of all environments in this process."""

    begun = 0

    def __init__(self, **_):
        self.observation_space, self.action_space = Box(0, np.inf, (3,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        ForgetfulEnv.begun += 1
        self.episode, self.at = ForgetfulEnv.begun, 0
        return np.array([0, self.episode, 0], np.float32), {}

    def step(self, action):
        self.at += 1
        return np.array([0, self.episode, self.at], np.float32), float(self.at), False, self.at == 40, {}


gymnasium.register("Forgetful-v0", ForgetfulEnv)


def test_environment_that_does_not_repeat_itself(tmp_path, capsys):
    """Its episodes are cut off in the replay, also for the process after the next."""
    words = [*CARTPOLE, "task=gym/Forgetful-v0", "eval_every=1000", "checkpoint_every=30", "log_every=30"]
    for frames in (50, 110, 190):
        assert run(tmp_path, *words, f"frames={frames}", "resume=true") == 0
    assert capsys.readouterr().out.count("not deterministic") == 2
    rows = content(tmp_path)["rows"]
    for now, after, last in zip(rows["obs"][:-1, 0], rows["obs"][1:, 0], rows["is_last"][:-1, 0], strict=True):
        assert last == (now[1] != after[1]), (now, after)
        assert last or after[2] == now[2] + 1


# ---- checkpoints --------------------------------------------------------------------------------------


def grown(replay: Replay, rows: int) -> Replay:
    """Rows that say which they are."""
    while replay.total < rows:
        i, n = replay.total, replay.num_envs
        replay.add(np.full((n, 3), i), np.full((n, 2), -i), np.full(n, i), np.zeros(n, bool), np.zeros(n, bool))
    return replay


def assert_rows(replay: Replay, total: int) -> None:
    assert replay.total == total
    held = replay.slice(total - len(replay), total)["reward"]
    np.testing.assert_array_equal(held, np.arange(total - len(replay), total)[:, None] + np.zeros(replay.num_envs))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_ones_are_kept(keep, tmp_path):
    keeper, replay = Checkpoints(tmp_path, keep), Replay(60, 2, 3, 2)
    for step in range(1, 12):
        keeper.save(step * 10, {"step": step}, grown(replay, 7 * step))
        assert keeper.frames() == [10 * s for s in range(max(1, step - keep + 1), step + 1)]
        assert all(keeper.load(frames)["step"] == frames // 10 for frames in keeper.frames())
        for frames in keeper.frames()[-2:]:  # the last but one can be gone back to at any time
            fresh = Replay(60, 2, 3, 2)
            one = Checkpoints(tmp_path)
            assert one._read(frames, fresh)["step"] == frames // 10
            assert_rows(fresh, 7 * frames // 10)
    assert len(list((tmp_path / "checkpoints" / "replay").iterdir())) <= 8, "overwritten rows stay on the disk"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_the_only_checkpoint_is_written_again_loses_nothing(renames, tmp_path, monkeypatch):
    """Killed before any of the renames of a second save of frame 10, or after them: one of the two is there."""
    keeper, replay = Checkpoints(tmp_path, keep=1), grown(Replay(60, 2, 3, 2), 7)
    keeper.save(10, {"step": "old"}, replay)
    done, rename = [], Path.rename

    def killed(path, to):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", killed)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            keeper.save(10, {"step": "new"}, replay)
    else:
        keeper.save(10, {"step": "new"}, replay)
    monkeypatch.undo()
    fresh, step = Replay(60, 2, 3, 2), "new" if renames == 2 else "old"
    reader = Checkpoints(tmp_path)  # as evaluate.py reads: it holds no lock, and moves nothing
    assert reader.frames() == [10] and reader.load(10)["step"] == step
    assert Checkpoints(tmp_path).load_newest(fresh)["step"] == step
    assert_rows(fresh, 7)
    Checkpoints(tmp_path, keep=1).save(20, {}, replay)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000020", "replay"]


def test_more_rows_between_checkpoints_than_the_ring_holds(tmp_path):
    keeper, replay = Checkpoints(tmp_path), Replay(60, 2, 3, 2)
    for step, rows in enumerate((20, 90, 95, 300)):
        keeper.save(step, {}, grown(replay, rows))
        for frames, total in list(enumerate((20, 90, 95, 300)))[max(0, step - 1) : step + 1]:
            fresh = Replay(60, 2, 3, 2)
            Checkpoints(tmp_path)._read(frames, fresh)
            assert_rows(fresh, total)


def test_rows_of_a_killed_future_are_not_mixed_in(tmp_path):
    """Killed after the rows, before the state; what a resumed run then sees may differ (a GPU)."""
    keeper, replay = Checkpoints(tmp_path), Replay(200, 2, 3, 2)
    keeper.save(10, {}, grown(replay, 10))
    keeper._save_replay(grown(replay, 20))
    resumed, fresh = Checkpoints(tmp_path), Replay(200, 2, 3, 2)
    resumed.load_newest(fresh)
    assert_rows(fresh, 10)
    for i in range(10, 30):
        fresh.add(np.full((2, 3), i + 0.5), np.zeros((2, 2)), np.full(2, i + 0.5), np.zeros(2), np.zeros(2))
        if i in (12, 14, 29):
            resumed.save(i, {}, fresh)
    again = Replay(200, 2, 3, 2)
    Checkpoints(tmp_path).load_newest(again)
    np.testing.assert_array_equal(again.reward[:30], fresh.reward[:30])


@pytest.mark.parametrize("torn", ["state", "rows"])
def test_torn_newest_checkpoint_falls_back(torn, straight, tmp_path, capsys):
    """The one before is used, a line says so, and the end is the same to the bit."""
    words = CASES["cartpole-3-envs"]
    run(tmp_path, *words, "frames=300")
    newest = Checkpoints(tmp_path).frames()[-1]
    path = tmp_path / "checkpoints" / f"{newest:08d}" / "state.pt"
    if torn == "rows":
        path = max((tmp_path / "checkpoints" / "replay").iterdir(), key=lambda p: int(p.stem.split("-")[1]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert run(tmp_path, *words, "resume=true") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "cannot be read" in warnings[0] and "going on from frame" in warnings[0]
    assert_same_run(straight("cartpole-3-envs"), tmp_path)


def test_a_torn_checkpoint_pushes_out_no_good_one(tmp_path):
    checkpoints, replay = Checkpoints(tmp_path), grown(Replay(50, 1, 3, 2), 10)
    for frames in (10, 20):
        checkpoints.save(frames, {"a": frames}, replay)
    (tmp_path / "checkpoints" / "00000020" / "state.pt").write_bytes(b"torn")
    again = Checkpoints(tmp_path)
    assert again.load_newest(Replay(50, 1, 3, 2))["a"] == 10
    again.save(30, {"a": 30}, replay)
    assert Checkpoints(tmp_path).frames() == [10, 30]


def test_no_readable_checkpoint_is_an_error_and_nothing_is_lost(straight, tmp_path, capsys):
    shutil.copytree(straight("swingup"), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.pt"):
        path.write_bytes(b"torn")
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("[!c]*") if p.is_file()}
    before |= {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()}
    assert run(tmp_path / "run", *CASES["swingup"], "resume=true") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be read" in err and "choose another run_dir" in err
    assert {p: p.read_bytes() for p in before} == before


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
def test_a_checkpoint_runs_no_code(write, tmp_path):
    path = tmp_path / "checkpoints" / "00000010" / "state.pt"
    path.parent.mkdir(parents=True)
    write({"agent": Malicious(tmp_path / "executed")}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoints(tmp_path).load(10)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_appears_whole(tmp_path, monkeypatch):
    """By one rename, of what is complete and on the disk."""
    rename, moved = Path.rename, []

    def watched(self: Path, target: Path) -> None:
        assert not target.exists() and synced[-1] > 0
        moved.append(torch.load(self / "state.pt", weights_only=True)["x"] if self.is_dir() else None)
        rename(self, target)

    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), synced.append(os.fstat(handle).st_size)))
    monkeypatch.setattr(Path, "rename", watched)
    Checkpoints(tmp_path).save(7, {"x": 3}, grown(Replay(60, 2, 3, 2), 5))
    assert moved == [None, 3] and Checkpoints(tmp_path).frames() == [7]


def save_for_ever(folder: Path) -> None:
    keeper, replay = Checkpoints(folder), Replay(300, 2, 3, 2)
    state = keeper.load_newest(replay)
    for step in range(state["step"] + 1 if state else 1, 10**6):
        keeper.save(step, {"step": step, "weights": torch.full((20_000,), step)}, grown(replay, 5 * step))


def test_kill_at_any_moment_of_writing(tmp_path):
    draw, seen, kills = random.Random(0), 0, 0
    while kills < 25 or (seen <= 10 and kills < 250):  # on a loaded machine few get far enough to write
        kills += 1
        process = get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(draw.uniform(0.01, 0.1))
        process.kill()
        process.join()
        replay = Replay(300, 2, 3, 2)
        state = Checkpoints(tmp_path).load_newest(replay)
        if state is not None:
            assert state["step"] == Checkpoints(tmp_path).frames()[-1], "what is visible is whole"
            assert state["step"] >= seen and (state["weights"] == state["step"]).all()
            assert_rows(replay, 5 * state["step"])
            seen = state["step"]
    assert seen > 10
    folder = tmp_path / "checkpoints"
    Checkpoints(tmp_path).load_newest(replay := Replay(300, 2, 3, 2))
    last = Checkpoints(tmp_path)
    last.load_newest(replay)
    last.save(10**6, {}, replay)
    assert not [*folder.glob(".*"), *folder.glob("replay/*.tmp")], "drafts of killed processes stay"


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, capsys):
    words = CASES["swingup"]
    run(tmp_path, *words, "frames=300")
    write, kept = os.fsync, Checkpoints(tmp_path).frames()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert run(tmp_path, *words, "resume=true") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in last and str(tmp_path) in last
    assert Checkpoints(tmp_path).frames() == kept
    monkeypatch.setattr(os, "fsync", write)
    assert run(tmp_path, *words, "resume=true") == 0


def test_random_streams_of_all_three():
    def draw():
        return [
            random.gauss(0, 1),
            random.random(),
            *np.random.randn(3),
            np.random.rand(),
            *torch.randn(3).tolist(),
        ]

    draw()
    state = random_state()
    first, _ = draw(), draw()
    set_random_state(torch.load(_through_disk(state), weights_only=True))
    assert draw() == first


def _through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


# ---- the loop, with an agent that only counts ---------------------------------------------------------


class CountingAgent:
    """Plays action 0 (or what it is told), and remembers what it was asked."""

    parameter_counts = {"total": 0}

    def __init__(self):
        self.learned, self.firsts, self.rollouts = [], [], 0

    def act(self, obs, *, first=None, explore=False):
        if explore:
            self.firsts.append((obs.copy(), first.copy()))
        self.obs = obs
        return np.zeros(len(obs), np.int64)

    def encode_action(self, action):
        return action_of(self.obs).astype(np.float32)

    def learn(self, replay, agent_steps):
        self.learned.append((replay.total, agent_steps))
        return {"loss/steps": agent_steps}

    def evaluator(self):
        self.rollouts += 1
        return self

    def diagnostics(self, replay):
        return {"loop/mean": 1.0}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def counting_trainer(run_dir: Path, **schedule) -> Trainer:
    schedule = {"frames": 240, "eval_every": 100, "eval_episodes": 1, "log_every": 50} | schedule
    schedule = {"checkpoint_every": 10**6, "keep_checkpoints": 2, "video_every": 0, "action_repeat": 2} | schedule
    venv = counting_venv()
    return Trainer(
        CountingAgent(),
        venv,
        counting_venv(),
        Replay(4 * 30, 4, 3, 2),
        run_dir,
        Schedule(**schedule),
        seed=0,
        save_env=lambda _: [],
        restore_env=None,
        make_video_env=None,
        summary={"config": {"seed": 0}},
    )


def test_the_trainer_fills_the_replay_without_a_seam(tmp_path):
    trainer = counting_trainer(tmp_path, frames=1000)
    trainer.run()
    replay = trainer.replay
    check(replay.sample(500, 6), replay.obs[(replay.total - 1) % replay.rows])
    for obs, first in trainer.agent.firsts:
        np.testing.assert_array_equal(first, obs[:, 2] == 0)


def test_frames_count_action_repeat_and_no_resets(tmp_path):
    trainer = counting_trainer(tmp_path)
    result = trainer.run()
    rows = trainer.replay.slice(trainer.replay.total - 30, trainer.replay.total)
    assert result["frames"] == 2 * result["agent_steps"] >= 240 and trainer.replay.total > 30
    resets = sum(int((obs[:, 2] == [n for n, _ in ENVS]).sum()) for obs, _ in trainer.agent.firsts)
    assert result["agent_steps"] == 4 * len(trainer.agent.firsts) - resets
    assert rows["is_last"].sum() > 0
    assert [one["frames"] // 100 for one in lines(tmp_path) if "eval/return" in one] == [1, 2, 2]
    assert trainer.agent.rollouts == 3


def test_train_return_is_of_whole_episodes(tmp_path):
    counting_trainer(tmp_path).run()
    totals = [n * (n + 1) / 2 for n, _ in ENVS]
    assert all(min(totals) <= one["train/return"] <= max(totals) for one in lines(tmp_path) if "train/return" in one)


# ---- rollouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("episodes", [1, 3, 4, 9])
def test_every_environment_plays_its_quota(episodes):
    """Counting finished episodes as they come would fill the mean with the shortest ones."""
    result = rollout(CountingAgent(), counting_venv(), episodes, seed=0)
    lengths, ends = zip(*[ENVS[i % 4] for i in range(episodes)], strict=True)
    np.testing.assert_array_equal(result.lengths, lengths)
    np.testing.assert_array_equal(result.returns, [n * (n + 1) / 2 for n in lengths])
    np.testing.assert_array_equal(result.terminated, [end == "terminated" for end in ends])


@pytest.mark.parametrize("name", ["cartpole-3-envs", "plan-collect"])
def test_rollouts_repeat_and_leave_training_alone(name, straight):
    agent, cfg, _ = load_agent(straight(name))
    venv = make_vector_env(cfg.task.id, 2, action_repeat=cfg.task.action_repeat)
    train_venv = make_vector_env(cfg.task.id, cfg.num_envs, action_repeat=cfg.task.action_repeat)
    obs, _ = train_venv.reset(seed=0)
    before = copy.deepcopy((agent.state_dict(), random_state()))
    first = rollout(agent, venv, 2, seed=7)
    assert differences((agent.state_dict(), random_state()), before) == []
    for field, again in zip(first, rollout(agent, venv, 2, seed=7), strict=True):
        np.testing.assert_array_equal(field, again)
    assert not np.array_equal(first.returns, rollout(agent, venv, 2, seed=8).returns)
    action = load_agent(straight(name))[0].act(obs, first=np.ones(len(obs), bool), explore=True)
    np.testing.assert_array_equal(agent.act(obs, first=np.ones(len(obs), bool), explore=True), action)


def test_evaluating_more_often_trains_the_same(straight, tmp_path):
    words = CASES["cartpole-3-envs"]
    assert run(tmp_path, *words, "eval_every=110", "eval_episodes=2", "log_every=70") == 0
    one, other = content(straight("cartpole-3-envs")), content(tmp_path)
    assert {d for d in differences(one, other) if not d.startswith(".evaluat")} == set()


# ---- what is written ----------------------------------------------------------------------------------


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_says_what_metrics_jsonl_says(straight):
    run_dir = straight("cartpole-3-envs")
    found, written = events(run_dir), lines(run_dir)
    tags = {tag for one in written for tag in one} - {"frames"}
    assert tags == {tag for tag in found.Tags()["scalars"] if not tag.startswith("final/")}
    for tag in tags:
        scalars = [(e.step, round(e.value, 3)) for e in found.Scalars(tag)]
        assert scalars == [
            (one["frames"], pytest.approx(one[tag], abs=1e-3, rel=1e-3)) for one in written if tag in one
        ]
    for wanted in (
        *("eval/return", "eval/return_std", "eval/length", "train/return", "loss/consistency", "loss/reward"),
        *(
            "loop/mean",
            "loop/adaptive_mean",
            "loop/adaptive_max",
            "loop/adaptive_residual",
            "loop/contraction_bound",
            "loop/contraction_measured",
        ),
        *("latent/variance", "latent/rank"),
        *("time/frames_per_second", "time/env_seconds", "time/act_seconds", "time/update_seconds"),
    ):
        assert wanted in tags
    plugins = {tag: found.SummaryMetadata(tag).plugin_data.plugin_name for tag in found.summary_metadata}
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= {t for t, p in plugins.items() if p == "hparams"}


def test_a_checkpoint_takes_the_curves_along(tmp_path, monkeypatch):
    """What TensorBoard is to show of the frames before it must not be lost in a kill after it."""
    trainer, seen = counting_trainer(tmp_path, frames=200, checkpoint_every=100), []

    def look(*_):
        seen.append(len(events(tmp_path).Scalars("train/agent_steps")))

    monkeypatch.setattr(trainer.checkpoints, "save", look)
    trainer.run()
    assert seen == [2, 4]


def test_logger_drops_torn_and_later_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"frames": 1}\n{"frames": 5}\n{"fra\xff\n[]\n{"frames": 2, "a": 1}\n{"frames": 2')
    logger = Logger(tmp_path, 2)
    logger.write(3, {"a": 2.5})
    logger.close()
    assert lines(tmp_path) == [{"frames": 1}, {"frames": 2, "a": 1}, {"frames": 3, "a": 2.5}]
    Logger(tmp_path).close()
    assert lines(tmp_path) == []


def test_bar_is_quiet_where_there_is_no_terminal(tmp_path, capsys):
    words = [*CARTPOLE, "frames=600", "log_every=10", "eval_every=200"]
    assert run(tmp_path, *words) == 0
    captured = capsys.readouterr()
    drawings = captured.err.replace("\r", "\n").split("\n")
    assert len([d for d in drawings if d.strip()]) <= 10
    for word in ("600/600 frames", "frame/s", "return=", "loops=", "eval="):
        assert word in captured.err
    assert captured.out.count("eval return") == 3


def test_interrupt_restores_the_handlers_and_counts():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_film_of_an_endless_episode_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("loopwm.training.video.LONGEST_FILM", 30)
    make = functools.partial(make_vector_env, "gym/Counting-v0?length=50", 1, render=True)
    assert len(film_episode(CountingAgent(), make, 0, tmp_path / "out.mp4")) == 30


def test_video(tmp_path):
    make = functools.partial(make_vector_env, "gym/Counting-v0", 1, render=True)
    images = film_episode(CountingAgent(), make, 0, tmp_path / "new" / "out.mp4")
    assert images.shape == (5, 4, 6, 3) and (tmp_path / "new" / "out.mp4").stat().st_size > 0
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match="^no video: .+"):
        film_episode(CountingAgent(), make, 0, tmp_path / "file" / "out.mp4")
