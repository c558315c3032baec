"""The one wrapper around every environment: seeds, flattens, rescales, repeats and records in one `step`."""

import math
import traceback
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from envs.errors import RenderingUnavailable, TaskError, first_line
from envs.rendering import unavailable
from envs.spaces import flat_action, flat_observation


def episode_seed(seed: int, index: int, episode: int) -> int:
    """Return the 31-bit seed of one episode, a hash of (base seed, env index, episode number), each >= 0.

    Hashed and not added up, so that seed 0 / index 1 and seed 1 / index 0 have nothing in common.
    """
    words = (seed, index, episode)
    if seed < 2**32 and index > 1:
        # numpy takes a seed of 2**33 + s for the words (s, 2), and fills up with zeros: episode 0 of its env i would be
        # episode i of env 2 of seed s. Five words are none of its.
        words += (0, 1)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0]) >> 1


class EpisodeEnv(gymnasium.Wrapper):
    """An environment as agents see it, whose state is its episode's seed and the actions since.

    obs: float32 (O,). action: float32 (A,) in [-1, 1], or an int in [0, n). reward: float, summed over the
    repeated frames. Episode k after a seeded reset is a function of (seed, index, k) and of the actions
    alone; `reset(options=...)` goes to the environment but is not recorded.

    Args:
        env: the suite's environment.
        task: its name, for error messages.
        action_repeat: frames per step, >= 1.
        seed: base seed, >= 0.
        index: which of several parallel envs this is, >= 0.
        longest: steps after which an episode is truncated; 0: as the environment says.

    Raises:
        TaskError: spaces that cannot be flattened or rescaled.
    """

    def __init__(self, env: gymnasium.Env, task: str, *, action_repeat: int, seed: int, index: int, longest: int = 0):
        super().__init__(env)
        self.observation_space, self._flatten = flat_observation(env.observation_space, task)
        self.action_space, self._to_native = flat_action(env.action_space, task)
        self._task, self._drawn = task, False
        if fps := env.metadata.get("render_fps"):
            self.metadata = {**env.metadata, "render_fps": fps / action_repeat}  # of a frame for each step
        self._discrete = isinstance(self.action_space, Discrete)
        self._repeat, self._longest = action_repeat, longest
        self._seed, self._index, self._episode = seed, index, -1
        self._actions: list[np.ndarray | int] = []
        self._running = False  # False: no episode, or restored but not yet stepped
        self._restored: tuple[np.ndarray | int | None, np.ndarray] | None = None  # last action, obs before it

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start the next episode, or with `seed` episode 0 of that base seed. Return obs (O,) and the info.

        Raises:
            ValueError: a negative seed.
        """
        if seed is not None:
            if seed < 0:
                raise ValueError(f"a seed must be >= 0, got {seed}")
            self._seed, self._episode = int(seed), -1
        self._episode += 1
        self._actions, self._restored, self._running = [], None, True
        number = episode_seed(self._seed, self._index, self._episode)
        try:
            obs, info = self.env.reset(seed=number, options=options)
            flat = self._flatten(obs)
        except Exception as error:
            raise self._failure(error) from error
        return self._checked_obs(flat), info or {}

    def step(self, action: np.ndarray | int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeat one action until the frames are through or the episode ends.

        Returns obs (O,), the summed reward, terminated, truncated, and the last frame's info.

        Raises:
            ValueError: an action of the wrong shape or out of a Discrete range.
            gymnasium.error.ResetNeeded: before the first reset, or after the end of an episode.
            TaskError: the environment raises, or answers with what is no finite number or of another shape.
        """
        if not self._running:
            if self._restored is None:
                raise gymnasium.error.ResetNeeded("the episode is over: call reset() before step()")
            return self._step_restored()
        action = self._checked(action)
        self._actions.append(action)
        native = self._to_native(action)
        total = 0.0
        try:
            for _ in range(self._repeat):
                obs, reward, terminated, truncated, info = self.env.step(native)
                total += reward
                if terminated or truncated:
                    break
            truncated = truncated or (not terminated and len(self._actions) == self._longest)
            self._running = not (terminated or truncated)
            total = float(np.asarray(total).item())  # some environments give it as an array of one
            flat = self._flatten(obs)
        except Exception as error:
            raise self._failure(error) from error
        if not math.isfinite(total):
            raise TaskError(f"task '{self._task}' gave a reward of {total} {self._place()}")
        return self._checked_obs(flat), total, bool(terminated), bool(truncated), info or {}

    def _checked_obs(self, flat: np.ndarray) -> np.ndarray:
        """The obs (O,). Raises TaskError if it is of another size, or holds what is no number."""
        if flat.shape != self.observation_space.shape:
            size, meant = flat.shape[0], self.observation_space.shape[0]
            raise TaskError(f"task '{self._task}' gave an observation of {size} numbers, not {meant}, {self._place()}")
        if not np.isfinite(flat).all():
            raise TaskError(f"task '{self._task}' gave an observation with NaN or infinity {self._place()}")
        return flat

    def _place(self) -> str:
        return f"in step {len(self._actions)} of episode {self._episode} (seed {self._seed}, environment {self._index})"

    def _failure(self, error: Exception) -> TaskError:
        """What the environment raised, where, in one line: the source line is the innermost that no package owns."""
        said = (str(error).strip() or "no message").splitlines()[0]
        frames = traceback.extract_tb(error.__traceback__)  # the first is our own
        at = next((frame for frame in reversed(frames[1:]) if "site-packages" not in frame.filename), frames[-1])
        source = f"{at.filename}:{at.lineno}"
        return TaskError(f"task '{self._task}' failed {self._place()}: {type(error).__name__}: {said} ({source})")

    def _checked(self, action: np.ndarray | int) -> np.ndarray | int:
        """A copy to keep: vector envs hand out views of the caller's array."""
        if self._discrete:
            action = int(action)
            if not 0 <= action < self.action_space.n:
                raise ValueError(f"action {action} is not in [0, {self.action_space.n})")
            return action
        action = np.array(action, dtype=np.float32)
        if action.shape != self.action_space.shape:
            raise ValueError(f"action has shape {action.shape}, expected {self.action_space.shape}")
        return action

    def episode_state(self) -> dict[str, Any]:
        """Return {"seed", "index", "episode": int, "actions": float32 (t, A) or int64 (t,)}.

        Before the first reset the episode is -1.
        """
        return {
            "seed": self._seed,
            "index": self._index,
            "episode": self._episode,
            "actions": self._as_array(self._actions),
        }

    def _as_array(self, actions: Any) -> np.ndarray:
        if self._discrete:
            return np.array(actions, dtype=np.int64).reshape(len(actions))
        return np.array(actions, dtype=np.float32).reshape(len(actions), *self.action_space.shape)

    def prepare_restore(self, states: list[dict[str, Any]]) -> str | None:
        """Replay the episode of `states[index]` without its last action; the next `step` ends the replay.

        That step ignores its argument. It does the last recorded action and returns the true outcome, so that
        a vector env sees again that an episode ended; or, with no action recorded, it returns the reset's
        obs, reward 0 and no flags, which is what a vector env's autoreset step returns.

        Returns:
            None, or one line on why the replay failed. Not raised: an exception would kill a worker process.
        """
        try:
            return self._prepare_restore(states)
        except Exception as error:  # an environment that is not what it was may raise anything
            return first_line(error)

    def _prepare_restore(self, states: list[dict[str, Any]]) -> str | None:
        state = states[self._index]
        self._seed, self._episode = int(state["seed"]), int(state["episode"]) - 1
        obs, _ = self.reset()
        actions = self._as_array(state["actions"])
        for step, action in enumerate(actions[:-1]):
            obs, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:
                return f"env {self._index} ended after {step + 1} of {len(actions)} recorded actions"
        last = self._checked(actions[-1]) if len(actions) else None
        self._restored, self._running = (last, obs), False
        return None

    def render(self) -> np.ndarray:
        """Return a frame, uint8 (H, W, 3).

        Raises:
            RenderingUnavailable: made without render=True, or the first frame could not be drawn.
        """
        if self.render_mode is None:
            raise RenderingUnavailable(f"cannot render '{self._task}': make it with render=True")
        try:
            frame = self.env.render()
        except Exception as error:
            # MuJoCo, the GL bindings, dm_control and gymnasium each raise their own kinds. Once a frame has
            # been drawn GL is there, and an error is a bug to be seen as it is.
            if self._drawn:
                raise
            raise unavailable(error, self._task) from error
        self._drawn = True
        return frame

    def check_rendering(self) -> None:
        """Draw one frame of an episode that does not count. Raises RenderingUnavailable."""
        self.env.reset(seed=0)
        self.render()

    def _step_restored(self) -> tuple[np.ndarray, float, bool, bool, dict]:
        action, obs = self._restored
        self._restored, self._running = None, True
        return (obs, 0.0, False, False, {}) if action is None else self.step(action)
