"""envs.worlds: the rules by hand, difficulty, seeds and resume, episode ends, and the errors a person can cause."""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.world_oracles import DISTANCE, drop_plan, word_plan
from envs import TaskError, make_env, make_vector_env, restore_vector_env, vector_env_state
from envs.worlds import TIME_WARP_TASKS
from envs.worlds.arguments import equal_bins
from envs.worlds.permutation import AFTER, GENERATORS, PERMUTATIONS, PermutationEnv, compose, letters
from envs.worlds.sandpile import SandpileEnv, least_mass, recurrent_piles, topple
from envs.worlds.time_warp import TimeWarpEnv, hold_steps
from loopwm.config import load_config

ROOT = Path(__file__).resolve().parents[1]
SANDPILE, PERMUTATION, HIDDEN = "loopwm/Sandpile-v0", "loopwm/Permutation-v0", "loopwm/PermutationHidden-v0"
TIME_WARP = "loopwm/TimeWarp-cartpole-swingup-v0"
WORLDS = [SANDPILE, PERMUTATION, HIDDEN, TIME_WARP]
BAD_NUMBERS = [0, -1, 2.5, "3", None, True]


def roll(env, seed, steps=30):
    """What one seed and fixed random actions lead to, over episode ends."""
    env.action_space.seed(0)
    outcomes = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        outcomes += [obs, reward, info["difficulty"]]
        if terminated or truncated:
            outcomes.append(env.reset()[0])
    return outcomes


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", WORLDS)
def test_passes_gymnasiums_checker(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about DMC's infinite bounds, and that there are wrappers
        check_env(gymnasium.make(name).unwrapped, skip_render_check=True)
        check_env(make_env(f"gym/{name}"), skip_render_check=True, skip_close_check=True)


@pytest.mark.parametrize("name", WORLDS)
def test_an_episode_is_a_function_of_seed_and_actions(name):
    env, other = make_env(f"gym/{name}"), make_env(f"gym/{name}")
    roll(other, seed=5)  # what happened before must not matter
    first = roll(env, seed=1)
    assert_same(first, roll(other, seed=1))
    assert not np.array_equal(first[0], env.reset(seed=2)[0])


@pytest.mark.parametrize(("name", "workers"), [*((name, False) for name in WORLDS), (SANDPILE, True)])
def test_resume_is_exact(name, workers):
    venv = make_vector_env(f"gym/{name}", 2, seed=3, workers=workers)
    copy = make_vector_env(f"gym/{name}", 2, seed=9)
    venv.action_space.seed(0)
    venv.reset()
    for _ in range(12):
        obs, *_ = venv.step(venv.action_space.sample())
    np.testing.assert_array_equal(restore_vector_env(copy, vector_env_state(venv)), obs)
    for _ in range(12):
        action = venv.action_space.sample()
        *outcome, info = venv.step(action)
        *same, same_info = copy.step(action)
        assert_same(outcome, same)
        np.testing.assert_array_equal(info["difficulty"], same_info["difficulty"])
    venv.close()


@pytest.mark.parametrize("name", WORLDS)
def test_train_py_understands_the_id(name):
    assert load_config([f"task=gym/{name}"]).task.id == f"gym/{name}"


@pytest.mark.parametrize("name", [SANDPILE, PERMUTATION])
def test_pickling_in_the_middle_of_an_episode(name):
    env = gymnasium.make(name).unwrapped
    roll(env, seed=0, steps=5)
    copy = pickle.loads(pickle.dumps(env))
    for _ in range(20):
        action = env.action_space.sample()
        assert_same(env.step(action), copy.step(action))


def test_registering_imports_no_dm_control():
    code = "import sys, envs, gymnasium; print('dm_control' in sys.modules, gymnasium.spec(sys.argv[1]).id)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, TIME_WARP], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["False", TIME_WARP], done.stderr


@pytest.mark.parametrize(("name", "shape"), [(SANDPILE, (128, 128, 3)), (PERMUTATION, (80, 176, 3))])
def test_frames(name, shape):
    env = make_env(f"gym/{name}", render=True)
    env.reset()
    frame = env.render()
    assert frame.shape == shape and frame.dtype == np.uint8 and frame.max() == 255


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [(SANDPILE, {"size": size}, "size must be a whole number >= 2") for size in [1, *BAD_NUMBERS]]
    + [(PERMUTATION, {"max_k": k}, "1 <= min_k <= max_k") for k in BAD_NUMBERS]
    + [(PERMUTATION, {"min_k": 9}, "1 <= min_k <= max_k, got 9 and 8")]
    + [(TIME_WARP, {"max_hold": hold}, "max_hold must be a whole number >= 1") for hold in BAD_NUMBERS]
    + [(TIME_WARP, {"task": "cartpole-swingpu"}, "did you mean 'dmc/cartpole-swingup'")],
)
def test_bad_arguments_are_named(name, kwargs, message):
    gymnasium.register("WorldForTest-v0", gymnasium.spec(name).entry_point, kwargs=gymnasium.spec(name).kwargs | kwargs)
    try:
        with pytest.raises(TaskError, match=message):
            make_env("gym/WorldForTest-v0")
    finally:
        del gymnasium.registry["WorldForTest-v0"]


# ---------------------------------------------------------------- sandpile


def slow_topple(grid):
    """(stable, rounds, lost), cell by cell."""
    grid, rounds, lost, size = [list(row) for row in grid], 0, 0, len(grid)
    while over := [(i, j) for i in range(size) for j in range(size) if grid[i][j] >= 4]:
        rounds += 1
        for i, j in over:
            grid[i][j] -= 4
            for x, y in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= x < size and 0 <= y < size:
                    grid[x][y] += 1
                else:
                    lost += 1
    return grid, rounds, lost


def sandpile(pile):
    """An env whose pile is `pile`."""
    env = SandpileEnv(size=len(pile))
    env.reset(seed=0)
    env._pile = np.array(pile, np.int32)
    return env


@pytest.mark.parametrize(
    ("grid", "stable", "rounds", "lost"),
    [
        ([[0, 3], [2, 1]], [[0, 3], [2, 1]], 0, 0),
        ([[0, 0, 0], [0, 4, 0], [0, 0, 0]], [[0, 1, 0], [1, 0, 1], [0, 1, 0]], 1, 0),
        ([[4, 0], [0, 0]], [[0, 1], [1, 0]], 1, 2),
        ([[4, 3], [0, 0]], [[1, 0], [1, 1]], 2, 4),
        ([[4, 4], [4, 4]], [[2, 2], [2, 2]], 1, 8),  # all at once
        ([[8, 0], [0, 0]], [[0, 2], [2, 0]], 2, 4),  # once a round, however high
    ],
)
def test_toppling_by_hand(grid, stable, rounds, lost):
    found = topple(np.array([grid]))
    assert (found[0][0].tolist(), found[1].tolist(), found[2].tolist()) == (stable, [rounds], [lost])
    assert slow_topple(grid) == (stable, rounds, lost)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_toppling_equals_the_slow_reference(size):
    grids = np.random.default_rng(0).integers(0, 9, (30, size, size))
    before = grids.copy()
    for grid, *found in zip(grids.tolist(), *topple(grids), strict=True):
        assert [value.tolist() for value in found] == list(slow_topple(grid))
    np.testing.assert_array_equal(grids, before)
    assert [len(part) for part in topple(grids[:0])] == [0, 0, 0]


def test_the_order_of_drops_does_not_matter():
    rng = np.random.default_rng(0)
    start, drops = recurrent_piles(rng, 1, 6)[0], rng.integers(0, 36, 25)

    def drop(cells):
        env, lost = sandpile(start), 0.0
        for cell in cells:
            lost += env.step(cell)[1] * 6 + 2
        return env.pile.tolist(), round(lost)

    together = topple((start + np.bincount(drops, minlength=36).reshape(6, 6))[None])
    assert drop(drops) == drop(rng.permutation(drops)) == (together[0][0].tolist(), int(together[2][0]))


def test_bad_grids_are_refused():
    for grids in (np.zeros((2, 3)), np.zeros((1, 2, 3), int), np.zeros((1, 2, 2)), np.full((1, 2, 2), -1)):
        with pytest.raises(ValueError):
            topple(grids)


def test_a_drop_is_paid_by_what_is_lost():
    env = sandpile([[3, 3, 0], [0, 0, 0], [0, 3, 3]])
    obs, reward, terminated, truncated, info = env.step(0)
    assert env.pile.tolist() == [[1, 0, 1], [1, 1, 0], [0, 3, 3]]
    assert reward == pytest.approx((3 - 2) / 3) and info == {"difficulty": 2}
    np.testing.assert_allclose(obs, env.pile.ravel() / 3, rtol=1e-6)
    assert terminated and not truncated  # 10 grains, at most 2 * 3 * 2
    assert env.step(4)[1] == pytest.approx(-2 / 3)


def test_no_pile_can_be_drained_below_the_bound_and_a_planner_gets_there():
    env, rng = SandpileEnv(size=4), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    start, rewards, terminated = env.pile.sum(), [], False
    assert start > least_mass(4) == 24 and obs.max() <= 1
    while not terminated:
        _, reward, terminated, _, _ = env.step(drop_plan(env, rng, 2))
        rewards.append(reward)
        assert len(rewards) < 100
    assert env.pile.sum() == 24 and sum(rewards) == pytest.approx((start - 24 - len(rewards)) / 4)
    for _ in range(100):
        env.step(rng.integers(16))
        assert env.pile.sum() >= 24


def test_sandpile_is_truncated_after_100_drops():
    env = gymnasium.make(SANDPILE)
    env.reset(seed=0)
    flags = [env.step(0)[2:4] for _ in range(100)]  # a corner drains nothing
    assert flags == [(False, False)] * 99 + [(False, True)]


# ---------------------------------------------------------------- permutation


def test_products_by_hand():
    identity, swap, cycle, back = range(4)
    word = np.array([[swap, cycle, back, identity]])
    for k, product in enumerate([(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 2, 3, 4, 1), (1, 0, 2, 3, 4), (1, 0, 2, 3, 4)]):
        assert PERMUTATIONS[compose([0], word, [k])[0]].tolist() == list(product)
    assert compose([7], [[cycle] * 5], [5]) == [7] and AFTER.shape == (120, 4)


def test_compose_equals_the_slow_reference():
    rng = np.random.default_rng(0)
    states, words, k = rng.integers(120, size=50), rng.integers(4, size=(50, 8)), rng.integers(9, size=50)
    for state, word, length, found in zip(states, words, k, compose(states, words, k), strict=True):
        product = list(PERMUTATIONS[state])
        for letter in word[:length]:
            product = [product[i] for i in GENERATORS[letter]]
        assert PERMUTATIONS[found].tolist() == product


def test_the_generators_reach_everything_in_ten_letters():
    assert DISTANCE.min() == 0 and DISTANCE.max() == 10


@pytest.mark.parametrize(
    ("states", "words", "k"),
    [([120], [[0]], [1]), ([0], [[4]], [1]), ([0], [[0]], [2]), ([0, 1], [[0]], [1]), ([0], [0], [1])],
)
def test_bad_words_are_refused(states, words, k):
    with pytest.raises(ValueError):
        compose(states, words, k)


def test_actions_are_cut_into_equal_bins():
    assert letters(np.float32([-1, -0.51, -0.49, -0.01, 0.01, 0.49, 0.51, 1])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_entries_far_beyond_the_bins_are_in_the_last_and_no_number_is_refused():
    assert equal_bins(np.array([1e19, np.inf, -np.inf, -1e300]), 4).tolist() == [3, 3, 0, 0]
    with pytest.raises(ValueError, match="must be of numbers"):
        equal_bins(np.array([0.0, np.nan]), 4)


@pytest.mark.parametrize("cell", [-1, 16, True, None, 1.0, [0, 1]])
def test_a_grain_is_dropped_on_one_cell(cell):
    env = SandpileEnv(size=np.int8(4))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="a cell must be a whole number in 0..15"):
        env.step(cell)


def test_what_the_obs_shows_and_what_k_means():
    env = PermutationEnv(min_k=2, max_k=3)
    obs, _ = env.reset(seed=0)
    lengths = set()
    for _ in range(20):
        state, k = env.state, env.k
        np.testing.assert_array_equal(obs[:25].reshape(5, 5).argmax(1), PERMUTATIONS[state])
        np.testing.assert_array_equal(obs[28:].reshape(5, 5).argmax(1), PERMUTATIONS[env.goal])
        assert obs.sum() == 11 and obs[25:28].argmax() == k - 1
        action = env.action_space.sample()
        obs, _, terminated, truncated, info = env.step(action)
        assert info == {"difficulty": k} and not (terminated or truncated)
        assert env.state == compose([state], letters(action)[None, :k], [k])[0]  # the rest is ignored
        lengths.add(k)
    assert lengths == {2, 3}


def test_reaching_the_goal_pays_one_and_draws_another():
    env = PermutationEnv(min_k=10, max_k=10)  # every goal is within one word
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        goal = env.goal
        assert env.step(word_plan(env, rng, shape_far=True))[1] == 1.0
        assert env.state == goal != env.goal
    assert env.step(np.full(10, -1.0))[1] == 0.0  # ten identities stay


def test_hidden_shows_the_state_once():
    env, plain = gymnasium.make(HIDDEN), gymnasium.make(PERMUTATION)
    obs, other = env.reset(seed=0)[0], plain.reset(seed=0)[0]
    np.testing.assert_array_equal(obs, other)
    action = np.full(8, 0.6, np.float32)
    obs, other = env.step(action)[0], plain.step(action)[0]
    assert not obs[:25].any() and other[:25].sum() == 5
    np.testing.assert_array_equal(obs[25:], other[25:])
    flags = [env.step(action)[2:4] for _ in range(49)]
    assert flags == [(False, False)] * 48 + [(False, True)]


# ---------------------------------------------------------------- time warp


def test_every_dmc_task_but_lqr_is_registered():
    from dm_control import suite

    assert set(TIME_WARP_TASKS) == {f"{domain}-{kind}" for domain, kind in suite.ALL_TASKS if domain != "lqr"}
    assert all(f"loopwm/TimeWarp-{task}-v0" in gymnasium.registry for task in TIME_WARP_TASKS)


def test_the_hold_has_equal_bins():
    assert [hold_steps(x, 16) for x in (-1, -0.876, -0.874, 0, 0.874, 0.876, 1, 5)] == [1, 1, 2, 9, 15, 16, 16, 16]
    assert hold_steps(np.float32(1), 1) == 1


def test_a_hold_is_that_many_control_steps():
    env, plain = make_env(f"gym/{TIME_WARP}"), make_env("dmc/cartpole-swingup", action_repeat=1)
    env.reset(seed=4)
    plain.reset(seed=4)
    for hold in (1, 16, 5):
        obs, reward, *_, info = env.step(np.float32([0.3, (hold - 0.5) / 8 - 1]))
        steps = [plain.step(np.float32([0.3])) for _ in range(hold)]
        assert info == {"difficulty": hold} and reward == pytest.approx(sum(step[1] for step in steps))
        np.testing.assert_array_equal(obs, steps[-1][0])


def test_an_episode_has_exactly_1000_control_steps():
    env = TimeWarpEnv("cartpole-swingup")
    env.reset(seed=0)
    held, truncated = [], False
    while not truncated:
        _, _, terminated, truncated, info = env.step(np.array([0.0, 1.0]))
        held.append(info["difficulty"])
        assert not terminated
    assert held == [16] * 62 + [8]
