"""Replay: every sampled sequence is a piece of one episode, exactly as the environments played it.

The environments count (see counting_env.py), so an observation says which one it is: [env, episode, step].
"""

import functools

import gymnasium
import numpy as np
import pytest
from counting_env import CountingEnv
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from loopwm.config import ConfigError
from loopwm.training.priorities import BLOCK, Priorities
from loopwm.training.replay import Batch, Replay

ENVS = ((1, "terminated"), (3, "truncated"), (4, "terminated"), (11, "truncated"))  # length, how it ends


class NumberedEnv(gymnasium.ObservationWrapper):
    """obs = [env, episode, step]"""

    def __init__(self, number: int, length: int, ends: str):
        super().__init__(CountingEnv(length, ends))
        self.number, self.observation_space = number, Box(0, np.inf, (3,), np.float32)

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return np.array([self.number, *obs], np.float32)


def counting_venv(envs=ENVS) -> SyncVectorEnv:
    makers = [functools.partial(NumberedEnv, i, *env) for i, env in enumerate(envs)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)


def action_of(obs: np.ndarray) -> np.ndarray:
    """An action (..., 2) that says on which obs (..., 3) it was chosen."""
    return np.stack([obs[..., 0] + 0.5, 100 * obs[..., 1] + obs[..., 2]], -1)


def fill(replay: Replay, steps: int, envs=ENVS) -> Replay:
    venv = counting_venv(envs)
    obs, _ = venv.reset(seed=0)
    last = np.zeros(venv.num_envs, bool)
    for _ in range(steps):
        following, reward, terminated, truncated, _ = venv.step(np.zeros(venv.num_envs, np.int64))
        replay.add(obs, action_of(obs), reward, terminated, last)
        obs, last = following, terminated | truncated
    return replay


def filled(steps: int, capacity: int, seed: int = 0, path: str = "", envs=ENVS) -> Replay:
    return fill(Replay(capacity, len(envs), 3, 2, seed=seed, path=path), steps, envs)


def check(batch: Batch, newest: np.ndarray, envs=ENVS) -> None:
    """Compare a batch with what the environments must have done; newest (N, 3) is the last obs stored."""
    length, size = batch.mask.shape
    assert batch.obs.shape == (length + 1, size, 3) and batch.action.shape == (length, size, 2)
    assert all(field.dtype == np.float32 for field in batch[:5]) and batch.start.shape == (size,)
    for b in range(size):
        env, episode, step = batch.obs[0, b].astype(int)
        steps, ends = envs[env]
        assert step < steps, "began at the end of an episode"
        valid = int(batch.mask[:, b].sum())
        held = newest[env, 2] - step if episode == newest[env, 1] else steps - step
        assert valid == min(length, held) >= 1
        np.testing.assert_array_equal(batch.mask[:, b], np.arange(length) < valid)
        passed = np.minimum(np.arange(length + 1), valid)  # obs[valid] is the last one, and it is repeated
        np.testing.assert_array_equal(batch.obs[:, b], [[env, episode, step + t] for t in passed])
        np.testing.assert_array_equal(batch.action[:valid, b], action_of(batch.obs[:valid, b]))
        np.testing.assert_array_equal(batch.reward[:valid, b], step + 1 + np.arange(valid))
        over = (step + 1 + np.arange(length) == steps) & (ends == "terminated")
        np.testing.assert_array_equal(batch.terminated[:valid, b], over[:valid])
        assert not batch.reward[valid:, b].any() and not batch.terminated[valid:, b].any()


@pytest.mark.parametrize("steps", [2, 3, 30, 31, 32, 33, 95, 96, 97, 260])  # 32 rows a stream: before and after
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_sequences_are_pieces_of_one_episode(steps, length):
    replay = filled(steps, capacity=4 * 32)
    newest = replay.obs[(replay.total - 1) % replay.rows]
    assert len(replay) == min(steps, 32)
    for _ in range(4):
        check(replay.sample(64, length), newest)


def check_earned(replay: Replay, discount: float) -> int:
    """Compare ``earned`` of every transition held with what the environments did; returns how many are known."""
    newest, start = replay.obs[(replay.total - 1) % replay.rows], np.flatnonzero(replay.priorities.weight > 0)
    row, stream = np.divmod(start, replay.num_envs)
    earned = replay.earned(start)
    for b, (env, episode, step) in enumerate(replay.obs[row, stream].astype(int)):
        length, ends = ENVS[env]
        over = episode < newest[env, 1] or newest[env, 2] == length
        assert earned.known[b] == over
        if over:
            rewards = np.arange(step + 1, length + 1)
            np.testing.assert_allclose(earned.reward[b], (discount ** np.arange(len(rewards)) * rewards).sum(), 1e-6)
            assert earned.steps[b] == length - step and earned.terminated[b] == (ends == "terminated")
            np.testing.assert_array_equal(earned.obs[b], [env, episode, length])
    return int(earned.known.sum())


@pytest.mark.parametrize("steps", [2, 3, 13, 31, 32, 33, 95, 260])  # 32 rows a stream: before and after
@pytest.mark.parametrize("mapped", [False, True])
def test_earned_is_what_followed_until_the_episode_ended(steps, mapped, tmp_path):
    """The same whether kept from the first row on, or asked for late, by another discount before, or after a resume."""
    (tmp_path / "x").mkdir()
    kept, late = Replay(4 * 32, 4, 3, 2, path=str(tmp_path / "x") if mapped else ""), filled(steps, capacity=4 * 32)
    kept.keep_earned(0.9)
    fill(kept, steps)
    late.keep_earned(0.5)
    assert check_earned(late, 0.5) == check_earned(kept, 0.9) and (steps < 13 or check_earned(kept, 0.9) > 0)
    late.keep_earned(0.9)
    np.testing.assert_array_equal(late._to_go[late._last >= 0], kept._to_go[kept._last >= 0])
    np.testing.assert_array_equal(late._last, kept._last)
    again = Replay(4 * 32, 4, 3, 2)
    again.keep_earned(0.9)
    oldest = kept.total - len(kept)
    again.restore(oldest, kept.slice(oldest, kept.total))
    again.keep_earned(0.9)
    np.testing.assert_array_equal(again._last[: len(kept)], kept._last[: len(kept)])
    assert check_earned(again, 0.9) == check_earned(kept, 0.9)


def test_terminal_observations_are_sampled_as_next_and_never_as_start():
    replay = filled(200, capacity=4 * 32)
    batch = replay.sample(4000, 1)
    ends = np.array([length for length, _ in ENVS])[batch.obs[1, :, 0].astype(int)]
    assert (batch.obs[1, :, 2] == ends).any() and (batch.obs[0, :, 2] < ends).all()
    assert batch.mask.all()


@pytest.mark.parametrize("steps", [60, 150])
def test_starts_are_uniform_over_transitions(steps):
    replay = filled(steps, capacity=4 * 64, seed=3)
    starts = np.concatenate([replay.sample(500, 3).obs[0] for _ in range(80)])
    _, counts = np.unique(starts, axis=0, return_counts=True)
    oldest = replay.total - len(replay)
    rows = np.arange(oldest, replay.total - 1) % replay.rows
    transitions = int((~replay.is_last[rows]).sum())
    assert len(counts) == transitions, "some transition is never drawn"
    expected = len(starts) / transitions
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = transitions - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_transitions_are_drawn_by_their_priority():
    """Those of one stream three times as often; new ones as often as the largest, once that is looked up."""
    replay = filled(40, capacity=4 * 64)
    everyone = replay.priorities.weight > 0
    stream = np.arange(everyone.size) % 4
    replay.prioritise(np.flatnonzero(everyone & (stream == 2)), 3.0)
    counts = np.bincount(replay.sample(60_000, 1).start, minlength=everyone.size)
    expected = 60_000 * replay.priorities.weight / replay.priorities.weight.sum()
    assert not counts[~everyone].any()
    chi_square = ((counts - expected)[everyone] ** 2 / expected[everyone]).sum()
    freedom = everyone.sum() - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
    assert replay.new_priority == 1.0
    replay.refresh_priority()
    fill(replay, 2)
    assert replay.priorities.weight[40 * 4 : 41 * 4].tolist() == [3.0] * 4  # row 41 is the newest: nothing leaves it
    assert not replay.priorities.weight[41 * 4 :].any()


@pytest.mark.parametrize("steps", [60, 150, 400])
def test_a_row_that_is_overwritten_loses_its_priority(steps):
    replay = filled(steps, capacity=4 * 64)
    held = (replay.total - len(replay) + np.arange(len(replay))) % replay.rows  # oldest first
    opens = ~replay.is_last[held]
    opens[-1] = False
    weight = replay.priorities.weight.reshape(replay.rows, 4)
    np.testing.assert_array_equal(weight[held] > 0, opens)
    assert weight.sum() == opens.sum()


def test_priorities_come_back_with_the_state_and_draw_the_same():
    replay = filled(150, capacity=4 * 64)
    for seed in range(30):  # of many sizes, so that sums would drift if they were only added to
        start = replay.sample(32, 1).start
        replay.prioritise(start, np.random.default_rng(seed).exponential(10.0 ** (seed % 7), 32).astype(np.float32))
    replay.refresh_priority()
    copy = Replay(4 * 64, 4, 3, 2, seed=9)
    oldest = replay.total - len(replay)
    copy.restore(oldest, replay.slice(oldest, replay.total))
    copy.load_state_dict(replay.state_dict())
    assert copy.new_priority == replay.new_priority
    for a, b in zip(replay.sample(500, 3), copy.sample(500, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_mean_size_of_a_reward_is_of_the_rows_held():
    replay = Replay(8, 2, 1, 1)
    rewards = np.array([[-3.0, 1.0], [0.0, 2.0], [5.0, -1.0], [1.0, 1.0], [2.0, 2.0]], np.float32)
    for row, reward in enumerate(rewards):  # a ring of four rows
        replay.add(np.zeros((2, 1)), np.zeros((2, 1)), reward, np.zeros(2, bool), np.zeros(2, bool))
        assert replay.mean_reward_size() == pytest.approx(np.abs(rewards[max(0, row - 3) : row + 1]).mean())


def test_a_state_without_priorities_makes_all_alike():
    replay, copy = filled(30, capacity=4 * 64), filled(9, capacity=4 * 64)
    for one in (replay, copy):
        one.prioritise(np.flatnonzero(one.priorities.weight), 3.0)
    copy.restore(0, replay.slice(0, replay.total))
    copy.load_state_dict({key: replay.state_dict()[key] for key in ("total", "rng")})
    np.testing.assert_array_equal(copy.priorities.weight, replay.priorities.weight > 0)


class Ends:
    """A generator whose numbers are the ends of [0, 1), where rounding shows."""

    def random(self, size):
        return np.resize([0.0, np.nextafter(1.0, 0.0)], size)


def test_a_goal_at_the_border_of_blocks_draws_no_entry_without_weight():
    """The sums before a block may round to more than its true begin: what is left of the goal is then below zero."""
    rng = np.random.default_rng(0)
    weights = (rng.exponential(size=20 * BLOCK) ** 8).astype(np.float32)
    weights[::BLOCK] = 0.0  # the first of every block
    priorities = Priorities(weights.size)
    priorities.set_all(weights)
    sums = np.cumsum(priorities._sum)
    for border in sums[:-1]:

        class Near:
            def random(self, size, share=border / sums[-1]):
                return share + np.arange(-(size // 2), size - size // 2) * np.spacing(share)

        assert (weights[priorities.draw(64, Near())] > 0).all()


def test_a_look_at_all_alike_is_not_by_priority():
    replay = filled(40, capacity=4 * 64)
    held = np.flatnonzero(replay.priorities.weight)
    replay.prioritise(held[:1], 1e6)
    start = replay.sample(4000, 1, rng=np.random.default_rng(0), uniform=True).start
    assert set(start.tolist()) == set(held.tolist())
    with pytest.raises(ValueError, match="no transition"):
        Replay(12, 1, 3, 2).sample(1, 1, uniform=True)


@pytest.mark.parametrize(
    "weights", [[0, 0, 5, 0], [1e-30, 0, 1e8, 0], [0.1] * 300 + [0.0] * 40, [0] * 200 + [0.3] + [0] * 90]
)
def test_an_entry_of_no_weight_is_never_drawn(weights):
    priorities, weights = Priorities(len(weights)), np.array(weights, np.float32)
    priorities.set(np.arange(len(weights)), weights)
    for rng in (Ends(), np.random.default_rng(0)):
        assert (weights[priorities.draw(3000, rng)] > 0).all()
    with pytest.raises(ValueError, match="zero"):
        Priorities(5).draw(1, rng)


def test_own_generator_leaves_the_replays_stream_alone():
    one, other = filled(50, 400), filled(50, 400)
    one.sample(32, 3, rng=np.random.default_rng(1))
    for a, b in zip(one.sample(32, 3), other.sample(32, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_mapped_equals_in_memory(tmp_path):
    mapped, plain = filled(150, 4 * 32, path=str(tmp_path / "replay")), filled(150, 4 * 32)
    assert isinstance(mapped.obs, np.memmap) and (tmp_path / "replay" / "obs.npy").stat().st_size > mapped.obs.nbytes
    for _ in range(3):
        for a, b in zip(mapped.sample(64, 5), plain.sample(64, 5), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_folder_serves_one_replay_at_a_time(tmp_path):
    """Its files are written anew, also under the feet of a run that uses them."""
    path = str(tmp_path / "replay")
    first = filled(20, 4 * 32, path=path)
    before = first.obs.copy()
    with pytest.raises(ConfigError, match="replay.path=.*in use"):
        Replay(4 * 32, 4, 3, 2, path=path)
    np.testing.assert_array_equal(first.obs, before)
    del first
    Replay(4 * 32, 4, 3, 2, path=path)


@pytest.mark.parametrize("steps", [20, 32, 75])
def test_slice_and_restore(steps):
    replay, copy = filled(steps, 4 * 32), Replay(4 * 32, 4, 3, 2)
    oldest = replay.total - len(replay)
    middle = oldest + len(replay) // 3
    for begin, stop in ((oldest, middle), (middle, replay.total)):
        copy.restore(begin, replay.slice(begin, stop))
    assert copy.total == replay.total
    for a, b in zip(replay.sample(64, 5), copy.sample(64, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    for begin, stop in ((oldest - 1, middle), (middle, replay.total + 1), (middle, oldest)):
        with pytest.raises(ValueError, match="not all held"):
            replay.slice(begin, stop)


def test_rows_are_copies_of_what_came():
    """Simulators and agents may use one array again and again."""
    replay, obs = Replay(12, 1, 3, 2), np.zeros((1, 3), np.float32)
    for i in range(6):
        obs[:] = i
        replay.add(obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1, bool), np.zeros(1, bool))
    np.testing.assert_array_equal(replay.obs[:6, 0, 0], np.arange(6))
    batch = replay.sample(4, 2)
    batch.obs[:] = -1
    assert (replay.obs >= 0).all()


def test_nothing_to_sample_yet():
    for steps in (0, 1):
        with pytest.raises(ValueError, match="no transition yet"):
            filled(steps, 400).sample(4, 1)


@pytest.mark.parametrize("capacity", [1, 2, 11])
def test_capacity_too_small(capacity):
    with pytest.raises(ConfigError, match=rf"replay.capacity={capacity}: must be at least 12 for num_envs=4"):
        Replay(capacity, 4, 3, 2)


def test_smallest_capacity_always_holds_a_transition():
    """Of two rows the first may be an episode's last one: nothing to draw."""
    for steps in range(3, 40):
        check((replay := filled(steps, 12)).sample(16, 2), replay.obs[(replay.total - 1) % 3])


def test_capacity_beyond_the_memory():
    with pytest.raises(ConfigError, match=r"\d GiB of obs alone, more than the memory holds"):
        Replay(10**17, 1, 24, 6)


def test_a_million_rows_take_less_than_200_mb():
    replay = Replay(1_000_000, 4, 24, 6)
    assert sum(getattr(replay, name).nbytes for name in Replay.FIELDS) < 200e6
