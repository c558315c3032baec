"""envs: the API, episode ends, seeding, exact resume, and the errors a person can cause."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text, Tuple
from gymnasium.utils.env_checker import check_env

from envs import (
    RenderingUnavailable,
    TaskError,
    make_env,
    make_vector_env,
    resolve_action_repeat,
    restore_vector_env,
    vector_env_state,
)
from envs.episode import episode_seed
from loopwm.training.trainer import EVAL_SEED

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # works with and without tests being a package
import counting_env  # noqa: E402, F401 - registers the test environments


@pytest.fixture
def make():
    """make_vector_env, with every env closed at the end (workers are processes)."""
    made = []

    def make_closing(*args, **kwargs):
        made.append(make_vector_env(*args, **kwargs))
        return made[-1]

    yield make_closing
    for venv in made:
        venv.close()


def spaces_env(**spaces):
    """An env of these spaces, made as any registered one."""
    gymnasium.register("SpacesForTest-v0", counting_env.SpacesEnv, kwargs=spaces)
    try:
        return make_env("gym/SpacesForTest-v0")
    finally:
        del gymnasium.registry["SpacesForTest-v0"]


def roll(venv, steps, seed=0):
    """Outcomes of `steps` random steps: a list of (obs, rewards, terminated, truncated)."""
    venv.action_space.seed(seed)
    return [venv.step(venv.action_space.sample())[:4] for _ in range(steps)]


def assert_equal(outcomes, others):
    assert len(outcomes) == len(others)
    for left, right in zip(outcomes, others, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- the API


@pytest.mark.parametrize(
    "task", ["dmc/cartpole-swingup", "dmc/walker-walk", "gym/Pendulum-v1", "gym/Hopper-v5", "gym/CartPole-v1"]
)
def test_passes_gymnasiums_checker(task):
    env = make_env(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about infinite bounds, and that there are wrappers
        check_env(env, skip_render_check=True, skip_close_check=True)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.dtype == obs.dtype == np.float32 and obs.ndim == 1
    if isinstance(env.action_space, Box):
        assert env.action_space == Box(-1.0, 1.0, env.action_space.shape, np.float32)
    _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    env.close()


def test_dmc_obs_is_the_observation_dict_in_its_order():
    env = make_env("dmc/walker-walk")
    obs, _ = env.reset(seed=1)
    physics = env.unwrapped._env.physics
    expected = np.concatenate([physics.orientations(), [physics.torso_height()], physics.velocity()])
    np.testing.assert_array_equal(obs, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("alias", "domain", "size"),
    [
        ("dmc/finger-turn_easy", "finger", 12),
        ("dmc/finger-turn-easy", "finger", 12),
        ("dmc/ball_in_cup-catch", "ball_in_cup", 8),
        ("dmc/ball-in-cup-catch", "ball_in_cup", 8),
        ("dmc/cup-catch", "ball_in_cup", 8),
        ("dmc/point-mass-easy", "point_mass", 4),
    ],
)
def test_names_with_dashes_or_underscores(alias, domain, size):
    env = make_env(alias)
    assert env.observation_space.shape == (size,)
    assert type(env.unwrapped._env.task).__module__.endswith(f".{domain}")


def test_nested_observations_become_one_vector():
    mixed = Dict({"b": Box(0, 255, (2, 2), np.uint8), "a": Tuple([Discrete(3, start=5), Box(-1, 1, (1,))])})
    env = spaces_env(observation_space=mixed)
    obs, info = env.reset(seed=0)
    native = info["obs"]
    one_hot = np.eye(3)[native["a"][0] - 5]
    expected = np.concatenate([one_hot, native["a"][1], native["b"].ravel()]).astype(np.float32)
    np.testing.assert_array_equal(obs, expected)
    assert env.observation_space.contains(obs)
    boxes = Dict({"b": Box(0, 1, (2, 2), np.float64), "a": Box(0, 1, (), np.float64)})  # has a path of its own
    obs, info = spaces_env(observation_space=boxes).reset(seed=0)
    expected = np.concatenate([[info["obs"]["a"]], info["obs"]["b"].ravel()]).astype(np.float32)
    np.testing.assert_array_equal(obs, expected)


def test_suites_are_imported_lazily():
    code = (
        "import sys, envs; envs.make_env('gym/CartPole-v1');"
        "assert not {'dm_control', 'mujoco', 'envs.dmc'} & set(sys.modules);"
        "envs.make_env('dmc/cartpole-balance'); assert 'dm_control' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- actions, action repeat, episode ends


def test_actions_are_rescaled_to_the_true_bounds():
    low, high = np.array([[0.1, -4.0]]), np.array([[0.7, 2.0]])
    env = spaces_env(action_space=Box(low, high, dtype=np.float64))
    env.reset(seed=0)
    assert env.action_space == Box(-1.0, 1.0, (2,), np.float32)
    for action, native in [((-1, -1), low), ((1, 1), high), ((0, 0), [[0.4, -1.0]]), ((-3, 9), [[0.1, 2.0]])]:
        got = env.step(np.array(action, np.float32))[-1]["action"]
        assert got.shape == (1, 2) and env.unwrapped.action_space.contains(got)
        np.testing.assert_allclose(got, native, atol=1e-12)


def test_pendulum_gets_its_full_torque():
    env, raw = make_env("gym/Pendulum-v1", seed=3), gymnasium.make("Pendulum-v1")
    env.reset()
    raw.reset(seed=episode_seed(3, 0, 0))
    ours = env.step(np.array([0.75], np.float32))
    native = raw.step(np.array([1.5], np.float32))
    np.testing.assert_array_equal(ours[0], native[0])
    assert ours[1] == native[1]


def test_discrete_actions_start_at_zero():
    env = make_env("gym/Counting-v0")
    env.reset()
    assert env.action_space == Discrete(3)
    assert [env.step(np.int64(a))[-1]["action"] for a in (0, 1, 2)] == [-1, 0, 1]
    with pytest.raises(ValueError, match=r"action 3 is not in \[0, 3\)"):
        env.step(3)


def test_action_of_a_wrong_shape_is_refused():
    env = make_env("dmc/walker-walk")
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(6,\)"):
        env.step(np.zeros(1, np.float32))  # would otherwise be broadcast


@pytest.mark.parametrize(("task", "flags"), [("Counting-v0", (True, False)), ("CountingTruncated-v0", (False, True))])
def test_action_repeat_sums_rewards_and_stops_at_the_end(task, flags):
    env = make_env(f"gym/{task}", action_repeat=3)  # episodes of five frames with rewards 1 2 3 4 5
    env.reset()
    obs, *rest, _ = env.step(0)
    assert (obs.tolist(), rest) == ([0, 3], [6.0, False, False])
    obs, *rest, _ = env.step(0)
    assert (obs.tolist(), rest) == ([0, 5], [9.0, *flags])
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_action_repeat_defaults():
    assert resolve_action_repeat("dmc/cartpole-swingup", 0) == 2
    assert resolve_action_repeat("gym/CartPole-v1", 0) == 1
    assert resolve_action_repeat("dmc/cartpole-swingup", 5) == 5
    with pytest.raises(ValueError, match="action_repeat"):
        resolve_action_repeat("gym/CartPole-v1", -1)


def test_dmc_time_limit_truncates_and_never_terminates():
    env = make_env("dmc/pendulum-swingup")  # 1000 frames, two a step
    env.reset()
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]


def test_making_an_env_prints_nothing(caplog):
    make_env("dmc/cheetah-run").close()  # MuJoCo calls a setting of its model deprecated
    assert not caplog.records
    logging.getLogger("absl").warning("Nan, Inf or huge value in QACC")  # what a simulation says is heard
    assert len(caplog.records) == 1


def test_dmc_discount_zero_terminates(monkeypatch):
    env = make_env("dmc/cartpole-balance")
    env.reset()
    task = env.unwrapped._env.task
    monkeypatch.setattr(task, "get_termination", lambda physics: 0.0)
    assert env.step(np.zeros(1, np.float32))[2:4] == (True, False)
    env.reset()
    monkeypatch.setattr(task, "get_termination", lambda physics: 1.0)  # over, but not for good
    assert env.step(np.zeros(1, np.float32))[2:4] == (False, True)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(1, np.float32))  # dm_control would quietly begin an unseeded episode


# ---------------------------------------------------------------- vector envs


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("task", ["Counting-v0", "CountingTruncated-v0"])
def test_autoreset_takes_the_next_step_and_loses_none(make, task, workers):
    venv = make(f"gym/{task}", 2, workers=workers)
    obs, _ = venv.reset()
    assert obs.tolist() == [[0, 0], [0, 0]]
    for step in range(1, 15):
        episode, at = divmod(step, 6)  # five steps, then the one that resets
        obs, rewards, terminated, truncated, _ = venv.step(np.array([0, 2]))
        assert obs.tolist() == [[episode, at]] * 2
        assert rewards.tolist() == [at] * 2
        ended, other = (truncated, terminated) if "Truncated" in task else (terminated, truncated)
        assert ended.tolist() == [at == 5] * 2 and not other.any()
    assert [len(state["actions"]) for state in vector_env_state(venv)] == [2, 2]


def test_observations_are_not_overwritten_by_the_next_step():
    env = make_env("gym/Counting-v0")  # it writes each into the same array
    first, _ = env.reset()
    env.step(0)
    assert first.tolist() == [0, 0]


# ---------------------------------------------------------------- seeding


def test_an_environment_is_told_what_stands_behind_the_question_mark():
    assert make_env("gym/loopwm/Sandpile-v0?size=5").observation_space.shape == (25,)
    assert make_env("gym/Pendulum-v1?g=1e+1").unwrapped.g == 10.0
    env = make_env("gym/Pendulum-v1?g=0.5&max_episode_steps=3")
    assert env.unwrapped.g == 0.5
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(3)] == [False, False, True]
    told = make_env("gym/Hopper-v5?terminate_when_unhealthy=false&healthy_z_range=[0.5,9]").unwrapped
    assert told._terminate_when_unhealthy is False and told._healthy_z_range == [0.5, 9]
    assert make_vector_env("gym/loopwm/Sandpile-v0?size=4", 2).single_action_space.n == 16


@pytest.mark.parametrize("task", ["dmc/cartpole-swingup", "gym/Hopper-v5"])
def test_an_episode_is_a_function_of_seed_index_and_number(task):
    def episodes(**kwargs):
        env = make_env(task, **kwargs)
        found = []
        for count in range(3):
            obs, _ = env.reset()
            for _ in range(count * 3):  # what happened before must not matter
                env.step(np.full(env.action_space.shape, 0.5, np.float32))
            found.append(obs.tolist())
        return found

    base = episodes(seed=7)
    assert base == episodes(seed=7)
    distinct = base + episodes(seed=8) + episodes(seed=7, index=1)
    assert len({tuple(obs) for obs in distinct}) == 9


def test_reset_seed_replaces_the_base_seed(make):
    venv, other = make("dmc/cartpole-swingup", 3, seed=1), make("dmc/cartpole-swingup", 3, seed=5)
    first, _ = venv.reset()
    venv.reset()
    again, _ = venv.reset(seed=1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(venv.reset(seed=5)[0], other.reset()[0])
    np.testing.assert_array_equal(venv.reset()[0], other.reset()[0])
    assert not np.array_equal(first, again := venv.reset()[0]) and len(np.unique(again, axis=0)) == 3


def test_episode_seeds_of_neighbours_differ():
    seeds = {episode_seed(s, i, e) for s in range(6) for i in range(6) for e in range(6)}
    assert len(seeds) == 216 and max(seeds) < 2**31 and min(seeds) >= 0


def test_no_evaluation_plays_an_episode_of_a_training_whatever_its_seeds_and_environments():
    """The first 40 episodes of eight environments, of the trainer's evaluations and of evaluate.py's."""

    def episodes(base: int) -> set[int]:
        return {episode_seed(base, index, episode) for index in range(8) for episode in range(40)}

    train = {s: episodes(s) for s in (0, 1, 7, 2**32 - 1)}
    # of 320 and 320 numbers of 31 bits next to none is in both by chance
    assert not any(own & episodes(s + EVAL_SEED) or own & episodes(2**34) for s, own in train.items())
    assert all(len(own) == 320 for own in train.values())


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("kind", ["none", "lengths", "mixed", "nested"])
def test_infos_that_do_not_stack_end_nothing(make, kind, workers):
    venv = make(f"gym/Info-v0?kind={kind}", 3, workers=workers)
    venv.reset()
    for _ in range(4):
        obs, reward, *_, info = venv.step(np.zeros(3, np.int64))
        if kind != "none":
            assert info["k"].tolist() == [1, 1, 1]
        if kind == "nested":
            assert info["z"]["k"].tolist() == [1, 1, 1]
    assert reward.tolist() == [4.0] * 3


def test_a_film_is_as_fast_as_its_frames_are_apart(make):
    """Ten images of an environment a second; of one step in five two."""
    for repeat in (1, 5):
        assert make("gym/Counting-v0", 1, action_repeat=repeat, render=True).metadata["render_fps"] == 10 / repeat


# ---------------------------------------------------------------- exact resume

RESUMED = [
    ("dmc/cartpole-swingup", False, 20),
    ("dmc/finger-turn_easy", False, 20),  # its target is in the model, not in the physics state
    ("gym/Hopper-v5", False, 25),
    ("gym/CartPole-v1", False, 30),
    ("gym/CartPole-v1", True, 17),
    ("dmc/finger-turn_easy", True, 7),
]


@pytest.mark.parametrize(("task", "workers", "steps"), RESUMED)
def test_resume_is_exact(make, task, workers, steps):
    venv = make(task, 2, seed=3, workers=workers)
    venv.reset()
    roll(venv, 3)
    venv.reset()  # so that the episode is not the first
    obs = roll(venv, steps)[-1][0]
    states = vector_env_state(venv)
    copy = make(task, 2, seed=99, workers=workers)
    copy.reset()
    roll(copy, 2, seed=5)  # a used one must do as well
    np.testing.assert_array_equal(restore_vector_env(copy, states), obs)
    assert_equal(roll(venv, 40, seed=1), roll(copy, 40, seed=1))
    for state, other in zip(vector_env_state(venv), vector_env_state(copy), strict=True):
        np.testing.assert_array_equal(state.pop("actions"), other.pop("actions"))
        assert state == other


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 7])
def test_resume_at_every_place_of_the_autoreset(make, steps, workers):
    # Episodes of five steps: 5 ends one, 6 is the reset (no action recorded), 0 the very first reset.
    venv, copy = make("gym/Counting-v0", 2, workers=workers), make("gym/Counting-v0", 2, workers=workers)
    venv.reset()
    roll(venv, steps)
    copy.reset()
    roll(copy, 5)  # leaves an autoreset pending, which must not come through
    restored = restore_vector_env(copy, vector_env_state(venv))
    assert restored[:, 1].tolist() == [steps % 6] * 2
    # This env counts its resets, and the copy has seen others: compare what follows without that column.
    after = [[(obs[:, 1], *rest) for obs, *rest in roll(env, 9, seed=1)] for env in (venv, copy)]
    assert_equal(*after)


@pytest.mark.parametrize(("task", "steps"), [("gym/CartPole-v1", 80), ("gym/Hopper-v5", 80)])
def test_resume_at_a_terminal_step(make, task, steps):
    venv, copy = make(task, 2, seed=1), make(task, 2)
    venv.reset()
    venv.action_space.seed(0)
    for _ in range(steps):
        obs, _, terminated, _, _ = venv.step(venv.action_space.sample())
        if terminated.any():
            break
    assert terminated.any() and not terminated.all()  # one env ended, the other goes on
    np.testing.assert_array_equal(restore_vector_env(copy, vector_env_state(venv)), obs)
    assert_equal(roll(venv, 30, seed=1), roll(copy, 30, seed=1))


def test_state_survives_json_and_its_own_restore(make):
    venv, copy = make("dmc/walker-walk", 2), make("dmc/walker-walk", 2)
    venv.reset()
    roll(venv, 4)
    states = vector_env_state(venv)
    assert [(s["seed"], s["index"], s["episode"], s["actions"].shape) for s in states] == [
        (0, 0, 0, (4, 6)),
        (0, 1, 0, (4, 6)),
    ]
    assert states[0]["actions"].dtype == np.float32
    text = json.dumps([{**state, "actions": state["actions"].tolist()} for state in states])
    restore_vector_env(copy, json.loads(text))
    for state, other in zip(states, vector_env_state(copy), strict=True):
        np.testing.assert_array_equal(state["actions"], other["actions"])
    assert_equal(roll(venv, 3, seed=1), roll(copy, 3, seed=1))


def test_recorded_actions_are_copies(make):
    venv = make("dmc/cartpole-swingup", 1)
    venv.reset()
    action = np.full((1, 1), 0.25, np.float32)
    venv.step(action)
    action[:] = -1.0  # an agent may reuse its buffer
    assert vector_env_state(venv)[0]["actions"].tolist() == [[0.25]]


def test_states_that_do_not_fit_are_refused(make):
    venv, copy = make("gym/Counting-v0", 2), make("gym/Counting-v0", 1)
    with pytest.raises(RuntimeError, match="only after reset"):
        vector_env_state(venv)
    venv.reset()
    with pytest.raises(ValueError, match=r"\[0, 1\] cannot be restored into 1 envs"):
        restore_vector_env(copy, vector_env_state(venv))
    states = vector_env_state(venv)
    states[1]["actions"] = np.zeros(8, np.int64)  # longer than this env's episodes
    with pytest.raises(RuntimeError, match="env 1 ended after 5 of 8"):
        restore_vector_env(venv, states)


def test_an_environment_that_fails_while_its_episode_is_replayed(make, monkeypatch):
    """Its reason comes as a line, since an exception would end a worker process; the environment can be reset."""
    venv = make("gym/Counting-v0", 1)
    venv.reset()
    roll(venv, 3)
    states = vector_env_state(venv)
    native = venv.envs[0].env.unwrapped
    monkeypatch.setattr(native, "_length", 1)  # it asserts that nobody goes beyond its end
    monkeypatch.setattr(native, "_ends", "never")
    with pytest.raises(RuntimeError, match="cannot replay the saved episode.*AssertionError"):
        restore_vector_env(venv, states)
    monkeypatch.undo()
    assert venv.reset()[0].shape == (1, 2)


def test_a_worker_that_was_killed_is_one_line(make):
    venv = make("gym/Counting-v0", 2, workers=True)
    venv.reset()
    venv.processes[1].kill()
    venv.processes[1].join()
    for ask in (lambda: venv.step(np.zeros(2, np.int64)), venv.reset, lambda: vector_env_state(venv)):
        with pytest.raises(TaskError, match="process of an environment has ended"):
            ask()
    venv.close()
    assert not any(process.is_alive() for process in venv.processes)


def test_workers_that_end_in_mid_step_are_closed_in_silence(make):
    """As by a SIGTERM to all processes of a run."""
    venv = make("gym/Counting-v0", 2, workers=True)
    venv.reset()
    venv.step_async(np.zeros(2, np.int64))
    for process in venv.processes:
        process.kill()
        process.join()
    venv.close()


def test_an_episode_without_a_time_limit_is_cut_where_it_is_told(make):
    """The third step is truncated, unless the environment ends there itself, or has a limit of its own."""
    for task, flags in (("gym/Counting-v0?length=9", (False, True)), ("gym/Counting-v0?length=3", (True, False))):
        venv = make(task, 1, longest=3)
        venv.reset()
        ends = [venv.step(np.zeros(1, np.int64))[2:4] for _ in range(3)]
        assert [bool(t[0] or u[0]) for t, u in ends] == [False, False, True]
        assert tuple(bool(x[0]) for x in ends[-1]) == flags
    limited = make("gym/CartPole-v1?max_episode_steps=5", 1, longest=3)
    limited.reset()
    assert not any(limited.step(np.ones(1, np.int64))[3][0] for _ in range(3))


# ---------------------------------------------------------------- errors

WRONG = {
    "dmc/cartpole-swingpu": "unknown task 'dmc/cartpole-swingpu'; did you mean 'dmc/cartpole-swingup'?",
    "dmc/cup-cach": "did you mean 'dmc/ball_in_cup-catch'?",
    "dcm/cartpole-swingup": "unknown task 'dcm/cartpole-swingup'; did you mean 'dmc/cartpole-swingup'?",
    "cartpole-swingup": "such as 'dmc/cartpole-swingup'",
    "CartPole-v1": "such as 'gym/CartPole-v1'",
    "gym/ALE/Pong-v5": "Namespace ALE not found",
    "gym/Hoper-v5": "unknown task 'gym/Hoper-v5'; did you mean 'gym/Hopper-v5'?",
    "gym/CartPole-v7": "did you mean 'gym/CartPole-v",
    "gym/a:b:c": "is written gym/<module>:<id>",
    "gym/CartPole-v1?": "is written ?name=value",
    "gym/CartPole-v1?size": "is written ?name=value",
    "gym/CartPole-v1?size=3": "unexpected keyword argument 'size'",
    "gym/CartPole-v1?=3": "each name once",
    "gym/Pendulum-v1?g=1&g=2": "each name once",
    "gym/Hopper-v5?terminate_when_unhealthy=False": "False is written false, as in JSON",
    "gym/FrozenLake-v1?map_name=9x9": "KeyError",
    "gym/Hopper-v5?frame_skip=0": "ZeroDivisionError",
    "gym/Hopper-v5?xml_file=no_such.xml": "no_such.xml",
    "gym/CartPole-v1?render_mode=human": "render_mode is not for a task to choose",
    "gym/loopwm/Sandpile-v0?size=-3": "size",
    "gym/CartPole-v7?size=3": "did you mean 'gym/CartPole-v",
    "dmc/cartpole-swingup?x=1": "dmc/cartpole-swingup'",
    "gym/:CartPole-v1": "is written gym/<module>:<id>",
    "gym/.x:y": "is written gym/<module>:<id>",
    "gym/no_such_module:Foo-v0": "can be imported. (is its folder on PYTHONPATH?)",
    "dmc/lqr-lqr_2_1": "unbounded actions",
    "gym/loopwm/Sandpil-v0": "did you mean 'gym/loopwm/Sandpile-v0'?",
    "gym/Sandpile-v0": "did you mean 'gym/loopwm/Sandpile-v0'",
    "gym/loopwn/Permutation-v0": "did you mean 'gym/loopwm/Permutation-v0'?",
    "gym/loopwm/TimeWarp-cartpole-swingpu-v0": "did you mean 'gym/loopwm/TimeWarp-cartpole-swingup-v0'?",
    "gym/loopwm/TimeWarp-finger-turn-easy-v0": "did you mean 'gym/loopwm/TimeWarp-finger-turn_easy-v0'?",
    "gym/loopwm/TimeWarp-nonsense-v0": "unknown task 'gym/loopwm/TimeWarp-nonsense-v0'",
    "foo/bar": "the suites are dmc and gym",
    "": "must be 'dmc/<domain>-<task>' or 'gym/<id>'",
}


@pytest.mark.parametrize("task", WRONG)
def test_wrong_tasks_get_one_helpful_line(task):
    with pytest.raises(TaskError) as caught:
        make_env(task)
    assert WRONG[task] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"action_space": Box(-np.inf, 1.0, (2,))}, "unbounded actions"),
        ({"action_space": Box(0, 5, (2,), np.int64)}, "int64 Box action"),
        ({"action_space": MultiDiscrete([2, 2])}, "MultiDiscrete action"),
        ({"observation_space": Dict({"a": Text(3)})}, "Text observation"),
        ({"observation_space": Box(0, 255, (64, 64, 3), np.uint8)}, "has an image of shape"),
        ({"observation_space": Box(0, 255, (4, 16, 16, 3), np.uint8)}, "has an image of shape"),
    ],
)
def test_unsupported_spaces_are_named(spaces, message):
    with pytest.raises(TaskError, match=message):
        spaces_env(**spaces)


def test_missing_dm_control_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)  # makes its import fail
    with pytest.raises(TaskError, match="pip install dm-control"):
        make_env("dmc/cartpole-swingup")


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="num_envs"):
        make_vector_env("gym/CartPole-v1", 0)
    with pytest.raises(ValueError, match="seed"):
        make_env("gym/CartPole-v1", seed=-1)
    with pytest.raises(ValueError, match="seed"):
        make_env("gym/CartPole-v1").reset(seed=-1)


# ---------------------------------------------------------------- rendering


def test_frames(make):
    env = make_env("gym/Counting-v0", render=True)
    assert env.episode_state()["episode"] == -1  # the early check must not use up an episode
    env.reset()
    env.step(0)
    frame = env.render()
    assert frame.shape == (4, 6, 3) and frame.dtype == np.uint8 and (frame == 1).all()
    with pytest.raises(RenderingUnavailable, match="render=True"):
        make_env("gym/Counting-v0").render()


def test_missing_gl_is_one_line_at_make_time(monkeypatch):
    def no_gl(self):
        raise OSError("no EGL device\nand a second line")

    monkeypatch.setattr("envs.dmc.prefer_egl", lambda: None)  # as with MUJOCO_GL set by hand
    monkeypatch.setattr("envs.dmc.DMCEnv.render", no_gl)
    with pytest.raises(RenderingUnavailable) as caught:
        make_env("dmc/cartpole-swingup", render=True)
    message = str(caught.value)
    assert "apt-get install libegl1 libgl1-mesa-dri" in message and "MUJOCO_GL=egl" in message
    assert "no EGL device" in message and "\n" not in message


def headless(monkeypatch):
    """As on a Linux server where nobody has chosen a backend; whatever gets set is undone afterwards."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # after setenv, so that an unset one gets unset again
    monkeypatch.delitem(sys.modules, "dm_control._render", raising=False)


def test_headless_without_egl_is_told_before_gl_is_touched(monkeypatch):
    headless(monkeypatch)
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)
    with pytest.raises(RenderingUnavailable, match="apt-get install libegl1"):
        make_env("dmc/cartpole-swingup", render=True)
    make_env("dmc/cartpole-swingup").reset()  # which needs no GL


def test_headless_with_egl_selects_it(monkeypatch):
    from envs.rendering import prefer_egl

    headless(monkeypatch)
    monkeypatch.setitem(sys.modules, "mujoco.egl", sys)  # any module will do as one that loads
    assert prefer_egl() is None and os.environ["MUJOCO_GL"] == "egl"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")  # a person's choice stays
    assert prefer_egl() is None and os.environ["MUJOCO_GL"] == "osmesa"


def test_unknown_backend_is_one_line():
    code = (
        "import envs\n"
        "for task in ('dmc/cartpole-swingup', 'gym/Hopper-v5'):\n"
        "    try: envs.make_env(task)\n"
        "    except envs.RenderingUnavailable as error: print(error)"
    )
    env = {**os.environ, "MUJOCO_GL": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("MUJOCO_GL=nonsense does not load" in line for line in lines)


def test_dmc_draws_or_says_why_not():
    # In a process of its own: a failing GL context can abort it, and a working one is opened after an env
    # without frames has made dm_control choose another backend. MUJOCO_GL gets set where EGL works.
    code = (
        "import os, envs; envs.make_env('dmc/cartpole-balance').reset()\n"
        "try: env = envs.make_env('dmc/cartpole-swingup', render=True)\n"
        "except envs.RenderingUnavailable as error:\n"
        "    print('apt-get install libegl1' in str(error) and 'MUJOCO_GL' not in os.environ)\n"
        "else:\n"
        "    env.reset(); frame = env.render(); env.close()\n"
        "    envs.make_env('gym/Hopper-v5', render=True).close()\n"  # both suites in one process
        "    print(frame.shape == (240, 320, 3) and frame.dtype == 'uint8' and frame.std() > 1)"
    )
    display = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")
    env = {name: value for name, value in os.environ.items() if name not in display}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr, "close() left the GL context to the process's end"


def test_no_state_task_opens_a_gl_context():
    env = make_env("dmc/quadruped-escape")  # would do so at every reset
    env.reset()
    assert env.unwrapped._env.physics.contexts is None
