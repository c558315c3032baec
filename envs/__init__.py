"""Gymnasium, DeepMind Control and our own worlds behind one make_env and one make_vector_env."""

from envs import worlds  # registers them with Gymnasium
from envs.errors import RenderingUnavailable, TaskError
from envs.make import LONGEST_EVALUATION, make_env, make_vector_env, resolve_action_repeat
from envs.resume import restore_vector_env, vector_env_state
from envs.spaces import space_dims

__all__ = [
    "LONGEST_EVALUATION",
    "RenderingUnavailable",
    "TaskError",
    "make_env",
    "make_vector_env",
    "resolve_action_repeat",
    "restore_vector_env",
    "space_dims",
    "vector_env_state",
    "worlds",
]
