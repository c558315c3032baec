"""One name for an environment of any suite, and one way to make it."""

import contextlib
import difflib
import functools
import importlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from envs.episode import EpisodeEnv
from envs.errors import TaskError


@dataclass(frozen=True)
class _Suite:
    module: str  # imported when a task of the suite is made: dm_control alone takes a second
    action_repeat: int


LONGEST_EVALUATION = 10_000  # agent steps of an episode; an agent that stands still would be evaluated for ever

_SUITES = {"dmc": _Suite("envs.dmc", action_repeat=2), "gym": _Suite("envs.gym_suite", action_repeat=1)}


def make_env(
    task: str, *, action_repeat: int = 0, seed: int = 0, index: int = 0, render: bool = False, longest: int = 0
) -> gymnasium.Env:
    """Make one environment with flat float32 obs (O,) and actions in [-1, 1] (A,) or Discrete from 0.

    Args:
        task: "dmc/<domain>-<task>" or "gym/<Gymnasium id>", whose arguments may follow: "gym/Pendulum-v1?g=5".
        action_repeat: frames per step; 0 is the suite's default (dmc 2, gym 1).
        seed: base seed, >= 0. Episode k is a function of (seed, index, k) and the actions.
        index: number of this env among parallel ones, >= 0.
        render: make `render()` return frames, uint8 (H, W, 3). One is drawn here, to fail early.
        longest: steps after which an episode is truncated where Gymnasium's spec of the environment names no limit (as
            of gym/CliffWalking-v1; one that ends by itself before is not changed); 0: none.

    Raises:
        TaskError: unknown suite or task, a missing package, or unsupported spaces.
        RenderingUnavailable: frames were asked for, and this machine cannot draw them.
        ValueError: a negative number.
    """
    repeat = resolve_action_repeat(task, action_repeat)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed {seed} and index {index}")
    suite, name = _split(task)
    native = importlib.import_module(suite.module).load(name, task, render)
    try:
        limited = native.spec is not None and native.spec.max_episode_steps is not None
        cut = 0 if limited else longest
        env = EpisodeEnv(native, task, action_repeat=repeat, seed=int(seed), index=int(index), longest=cut)
        if render:
            env.check_rendering()
    except Exception:
        native.close()
        raise
    return env


def make_vector_env(
    task: str,
    num_envs: int,
    *,
    action_repeat: int = 0,
    seed: int = 0,
    workers: bool = False,
    render: bool = False,
    longest: int = 0,
) -> VectorEnv:
    """Make `num_envs` copies, env i with index i, in this process or each in a worker process of its own.

    obs: float32 (N, O). actions: float32 (N, A) or int64 (N,). rewards: float64 (N,). terminated, truncated:
    bool (N,). Autoreset is gymnasium's NEXT_STEP: the step after a terminated or truncated one ignores that
    env's action and returns the next episode's first obs, reward 0 and neither flag.
    `reset(seed=s)` makes s the base seed of every env, as if made with `seed=s`.

    Raises:
        What make_env raises; ValueError if num_envs < 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be >= 1, got {num_envs}")
    make = functools.partial(make_env, task, action_repeat=action_repeat, seed=seed, render=render, longest=longest)
    env_fns = [functools.partial(make, index=index) for index in range(num_envs)]
    if not workers:
        return _SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.NEXT_STEP)
    # A forked copy of an open GL context does not draw, so workers that render start from nothing.
    context = "spawn" if render else None
    return _AsyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.NEXT_STEP, context=context)


def resolve_action_repeat(task: str, action_repeat: int) -> int:
    """Return the frames per step: `action_repeat`, or where it is 0 the default of the task's suite.

    Raises:
        TaskError: unknown suite.
        ValueError: a negative number.
    """
    suite, _ = _split(task)
    if action_repeat < 0:
        raise ValueError(f"action_repeat must be >= 0 (0: the suite's default), got {action_repeat}")
    return int(action_repeat) or suite.action_repeat


def _split(task: str) -> tuple[_Suite, str]:
    """Suite and name within it. A gym name may hold more slashes."""
    name, slash, rest = task.partition("/")
    if name in _SUITES and rest:
        return _SUITES[name], rest
    if not slash:
        # Only Gymnasium ids end with a version.
        near = f"gym/{task}" if task.rpartition("-v")[2].isdigit() else f"dmc/{task}"
        if name in _SUITES or not task:
            near = "dmc/cartpole-swingup" if name != "gym" else "gym/CartPole-v1"
        raise TaskError(f"task '{task}' must be 'dmc/<domain>-<task>' or 'gym/<id>', such as '{near}'")
    close = difflib.get_close_matches(name, _SUITES, n=1, cutoff=0.3)
    valid = " and ".join(_SUITES)
    hint = f"did you mean '{close[0]}/{rest}'?" if close and rest else f"the suites are {valid}"
    raise TaskError(f"unknown task '{task}'; {hint}")


@contextlib.contextmanager
def _dead_workers_named() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise TaskError("the process of an environment has ended (killed, for want of memory?)") from error


class _OneSeed:
    """gymnasium gives env i the seed s + i; here every env gets s, and tells itself apart by its index."""

    def reset(self, *, seed=None, options=None):
        if isinstance(seed, (int, np.integer)):
            seed = [int(seed)] * self.num_envs
        return super().reset(seed=seed, options=options)

    def _add_info(self, vector_infos, env_info, env_num):
        """As gymnasium's, without what does not stack: arrays of many lengths, words among numbers.

        Nobody here learns from an info, so that none ends a run.
        """
        for key, value in env_info.items():
            try:
                vector_infos = super()._add_info(vector_infos, {key: value}, env_num)
            except Exception:  # numpy and gymnasium have many
                for name in (key, f"_{key}"):
                    vector_infos.pop(name, None)
        return vector_infos


class _SyncVectorEnv(_OneSeed, SyncVectorEnv):
    pass


class _AsyncVectorEnv(_OneSeed, AsyncVectorEnv):
    def __init__(self, *args, **kwargs):
        # A terminal sends Ctrl-C to the workers too; they inherit that it is ignored, and are ended by us.
        here = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be set
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if here else None
        try:
            super().__init__(*args, **kwargs)
        finally:
            if here:
                signal.signal(signal.SIGINT, before)

    def step(self, actions):
        with _dead_workers_named():
            return super().step(actions)

    def reset(self, **told):
        with _dead_workers_named():
            return super().reset(**told)

    def call(self, name, *args, **kwargs):
        with _dead_workers_named():
            return super().call(name, *args, **kwargs)

    def close_extras(self, timeout=None, terminate=False):
        gone = not all(process.is_alive() for process in self.processes)  # it would be asked to close
        if gone:
            self._state = AsyncState.DEFAULT  # nor will it answer what it was asked before
        super().close_extras(timeout, terminate or gone)
