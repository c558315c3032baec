"""The DeepMind Control Suite as Gymnasium environments. The only file that imports dm_control."""

import logging
import warnings
from collections import OrderedDict
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from envs.errors import TaskError, suggestion
from envs.rendering import check_backend, prefer_egl, unavailable

_CAMERA = {"quadruped": 2}  # its camera 0 is fixed in the world, and the robot walks away
_ALIASES = {"cup_catch": ("ball_in_cup", "catch")}
_IDENTIFIER = str.maketrans("-", "_")


def load(name: str, task: str, render: bool) -> gymnasium.Env:
    """Make the suite's env called `name`: <domain>-<task>, where dashes and underscores mean the same.

    Args:
        name: as in "finger-turn-easy"; "cup-catch" is "ball_in_cup-catch".
        task: the full name, for error messages.
        render: frames are wanted.

    Raises:
        TaskError: no such task, or dm_control is not installed.
        RenderingUnavailable: no GL for the wanted frames, or not the backend which MUJOCO_GL names.
    """
    problem = prefer_egl() if render else None
    if problem is not None:
        # Trying all the same would abort the process: MuJoCo does not survive a second failing GL context.
        raise unavailable(problem, task)
    suite = _import_suite(task)
    tasks = {f"{domain}_{kind}".lower(): (domain, kind) for domain, kind in suite.ALL_TASKS}
    found = {**tasks, **_ALIASES}.get(name.lower().translate(_IDENTIFIER))
    if found is None:
        names = [f"dmc/{domain}-{kind}" for domain, kind in suite.ALL_TASKS]
        hint = suggestion(task.replace("/cup-", "/ball_in_cup-"), names) or f"an example is '{names[0]}'"
        raise TaskError(f"unknown task '{task}'; {hint}")
    # `random` only keeps dm_control from reading the clock: reset(seed=...) is what sets an episode.
    env = suite.load(*found, task_kwargs={"random": 0})
    if not render:
        # quadruped-escape opens a GL context at every reset to upload its terrain, unless there can be none.
        env.physics._make_rendering_contexts = lambda: None
    return DMCEnv(env, camera=_CAMERA.get(found[0], 0), render_mode="rgb_array" if render else None)


def _import_suite(task: str) -> Any:
    check_backend(task)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*DISPLAY")  # GLFW's, on every machine without one
            from dm_control import suite
    except ImportError as error:
        raise TaskError(f"task '{task}' needs a package: pip install dm-control ({error})") from error
    logging.getLogger("absl").addFilter(_says_something)  # the same filter twice is one
    return suite


def _says_something(record: logging.LogRecord) -> bool:
    """Not what MuJoCo has to say of the suite's own models (cheetah's settotalmass): nobody here can change them."""
    return "is deprecated and will be removed" not in record.getMessage()


class DMCEnv(gymnasium.Env):
    """A dm_control env: obs is the dict of its observations in the suite's order, a step one control step.

    An episode is terminated when the task says that nothing follows (discount 0), and truncated when only the
    time is up. After `reset(seed=s)` it is a function of s and the actions alone.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, env: Any, *, camera: int = 0, render_mode: str | None = None):
        self._env = env
        self._camera = min(camera, env.physics.model.ncam - 1)  # -1 is the free camera
        self.render_mode, self._closed = render_mode, False
        self.metadata = {**self.metadata, "render_fps": round(1 / env.control_timestep())}
        spec = env.observation_spec()
        self.observation_space = Dict(
            OrderedDict((key, Box(-np.inf, np.inf, value.shape, np.float64)) for key, value in spec.items())
        )
        action = env.action_spec()
        self.action_space = Box(action.minimum, action.maximum, action.shape, np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode, decided by `seed` (31 bits). Return the observations and an empty info."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        return self._env.reset().observation, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Advance by one control timestep with the native action (A,)."""
        timestep = self._env.step(action)
        over = timestep.last()
        terminated = over and timestep.discount == 0
        return timestep.observation, timestep.reward, terminated, over and not terminated, {}

    def render(self) -> np.ndarray:
        """Return a frame, uint8 (240, 320, 3)."""
        return self._env.physics.render(height=240, width=320, camera_id=self._camera)

    def close(self) -> None:
        """Free the GL context, which prints errors if it is left to the process's end. Safe to repeat."""
        # Not self._env.close(), which dm_control leaves empty.
        if self.render_mode is not None and not self._closed:
            self._env.physics.free()
        self._closed = True
