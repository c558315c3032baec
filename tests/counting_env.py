"""Environments for tests: one that says where it is, and one with any spaces. Importing registers them."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space


class CountingEnv(gymnasium.Env):
    """obs = [resets so far - 1, steps since the reset]; the reward is the step's number, counted from 1.

    Args:
        length: steps of an episode.
        ends: which flag the last step carries, "terminated" or "truncated".
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, length: int = 5, ends: str = "terminated", render_mode: str | None = None):
        self.observation_space = Box(0, np.inf, (2,), np.float32)
        self.action_space = Discrete(3, start=-1)
        self.render_mode = render_mode
        self._length, self._ends = length, ends
        self._episode, self._step = -1, 0
        self._buffer = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._episode, self._step = self._episode + 1, 0
        return self._observation(), {"seed": seed}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self._step += 1
        assert self._step <= self._length, "stepped beyond the end"
        over = self._step == self._length
        flags = over and self._ends == "terminated", over and self._ends == "truncated"
        return self._observation(), float(self._step), *flags, {"action": action}

    def render(self) -> np.ndarray:
        return np.full((4, 6, 3), self._step, np.uint8)

    def _observation(self) -> np.ndarray:
        self._buffer[:] = self._episode, self._step
        return self._buffer  # always the same array, as some simulators do


class SpacesEnv(gymnasium.Env):
    """Any spaces. Observations are drawn from theirs by the seed; `info` returns the action as it arrived."""

    def __init__(self, observation_space: Space | None = None, action_space: Space | None = None, **_: Any):
        self.observation_space = observation_space or Box(0, 1, (2,), np.float32)
        self.action_space = action_space or Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        obs = self.observation_space.sample()
        return obs, {"obs": obs}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {"action": action}


class InfoEnv(CountingEnv):
    """A ``CountingEnv`` whose infos do not stack, or are none; `k` is in all that are."""

    def __init__(self, kind: str = "none", **told: Any):
        super().__init__(**told)
        self._kind, self._told = kind, np.random.default_rng(0)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        *found, _ = super().step(action)
        n = int(self._told.integers(1, 9))
        infos = {
            "none": None,
            "lengths": {"k": 1, "x": np.zeros(n)},
            "mixed": {"k": 1, "x": n if n % 2 else "word"},
            "nested": {"k": 1, "x": {"y": n} if n % 2 else n, "z": {"k": 1, "w": np.zeros(n)}},
        }
        return *found, infos[self._kind]


gymnasium.register("Counting-v0", CountingEnv)
gymnasium.register("Info-v0", InfoEnv)
gymnasium.register("CountingTruncated-v0", CountingEnv, kwargs={"ends": "truncated"})
gymnasium.register("Spaces-v0", SpacesEnv)
