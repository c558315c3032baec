"""A DeepMind Control task in which the agent says for how long each action is held."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from envs import dmc
from envs.errors import TaskError
from envs.worlds.arguments import equal_bins, is_whole


class TimeWarpEnv(gymnasium.Env):
    """A DMC task whose action has one more entry: the number of control steps for which the rest is held.

    Predicting one step means predicting 1 to `max_hold` steps of the simulator with the same dynamics, so the
    computation needed is in the action. obs: the task's dict. action: the task's native one (A,) and then the
    hold, in [-1, 1] cut into `max_hold` equal bins for 1..max_hold. reward: the sum over the held control steps,
    in 0..max_hold. An agent's discount counts decisions and not control steps here.
    The episode is truncated after the task's 1000 control steps: a hold is cut short there, never passing the
    end, and also where the task terminates.

    info["difficulty"]: the control steps that were done.

    Args:
        task: a DMC task's name, <domain>-<task> as in "cartpole-swingup".
        max_hold: longest hold in control steps, >= 1.
        render_mode: None or "rgb_array".

    Raises:
        TaskError: no such task, dm_control is not installed, or a bad max_hold.
        RenderingUnavailable: no GL for the wanted frames.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, task: str, max_hold: int = 16, render_mode: str | None = None):
        if not is_whole(max_hold, 1):
            raise TaskError(f"max_hold must be a whole number >= 1, got {max_hold!r}")
        self._env = dmc.load(task, f"dmc/{task}", render=render_mode is not None)
        self._max_hold = int(max_hold)
        self.render_mode, self.metadata = render_mode, self._env.metadata
        self.observation_space = self._env.observation_space
        native = self._env.action_space
        self.action_space = Box(np.append(native.low, -1.0), np.append(native.high, 1.0), dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode, decided by `seed` (31 bits). Return the observations and an empty info."""
        super().reset(seed=seed)
        return self._env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Hold `action[:-1]` for as long as `action[-1]` says or the episode lasts."""
        total, held, terminated, truncated = 0.0, 0, False, False
        hold = hold_steps(action[-1], self._max_hold)
        while held < hold and not (terminated or truncated):
            obs, reward, terminated, truncated, _ = self._env.step(action[:-1])
            total, held = total + float(reward), held + 1
        return obs, total, terminated, truncated, {"difficulty": held}

    def render(self) -> np.ndarray:
        """Return a frame, uint8 (240, 320, 3)."""
        return self._env.render()

    def close(self) -> None:
        """Free the GL context. Safe to repeat."""
        self._env.close()


def hold_steps(entry: float, max_hold: int) -> int:
    """Return the control steps in 1..max_hold that an action's last entry in [-1, 1] asks for."""
    return 1 + int(equal_bins(entry, max_hold))
