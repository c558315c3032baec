"""Exact resume of a vector env.

A simulator's state cannot be written down in general: dm_control keeps a task's target in the model,
Gymnasium its step counts in wrappers. But an episode is a function of its seed and its actions, so these are
what is saved, and the episode is played again.
"""

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv


def vector_env_state(venv: VectorEnv) -> list[dict[str, Any]]:
    """Return per env {"seed", "index", "episode": int, "actions": float32 (t, A) or int64 (t,)}.

    `actions` are those since the episode's reset. Lists in place of arrays (JSON) can be restored as well.

    Args:
        venv: made by make_vector_env.

    Raises:
        RuntimeError: before the first reset.
    """
    states = list(venv.call("episode_state"))
    if any(state["episode"] < 0 for state in states):
        raise RuntimeError("a vector env has a state only after reset()")
    return states


def restore_vector_env(venv: VectorEnv, states: list[dict[str, Any]]) -> np.ndarray:
    """Put `venv` where another one was when `states` was taken; return its current obs, float32 (N, O).

    What follows is equal to the bit, autoresets included. It costs about as much as the recorded steps did.

    Args:
        venv: made by make_vector_env with the same task, number of envs and action repeat, and any seed.
        states: from vector_env_state.

    Raises:
        ValueError: the states are not those of this many envs.
        RuntimeError: the replay took another course (another version of the simulator).
    """
    indices = [state["index"] for state in states]
    if indices != list(range(venv.num_envs)):
        raise ValueError(f"states of the envs {indices} cannot be restored into {venv.num_envs} envs")
    venv.reset()  # clears the vector env's own notes of which envs are to be reset
    problems = [problem for problem in venv.call("prepare_restore", states) if problem]
    if problems:
        raise RuntimeError(f"cannot replay the saved episode (another simulator version?): {problems[0]}")
    # The last action is done by a step of the vector env, so that it takes note if that ended the episode.
    ignored = np.zeros(venv.action_space.shape, venv.action_space.dtype)
    obs, *_ = venv.step(ignored)
    return obs
