"""Maps any supported space to what agents see: a flat float32 Box, or a Discrete that starts at 0."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.spaces.utils import flatten, flatten_space
from gymnasium.vector import VectorEnv

from envs.errors import TaskError

# MuJoCo writes "no limit" as a finite number: dm_control reports +-1e10 for such an actuator.
UNBOUNDED = 1e9


def flat_observation(space: Space, task: str) -> tuple[Box, Callable[[Any], np.ndarray]]:
    """Describe how observations of `space` become flat vectors.

    Args:
        space: Box of any shape, Discrete (one-hot), or a Dict/Tuple of these (in the space's order).
        task: only for the error message.

    Returns:
        The flat float32 Box of shape (O,), and a function from one observation to a NEW float32 array (O,).

    Raises:
        TaskError: the space holds something else, images (uint8 of three axes or more), or nothing at all.
    """
    for leaf in _leaves(space):
        if not isinstance(leaf, (Box, Discrete)):
            kind = type(leaf).__name__
            raise TaskError(f"task '{task}' has a {kind} observation; supported are Box and Discrete")
        if leaf.dtype == np.uint8 and len(leaf.shape) >= 3:
            raise TaskError(f"task '{task}' has an image of shape {leaf.shape} as observation; vectors are supported")
    flat = flatten_space(space)
    if flat.shape == (0,):
        raise TaskError(f"task '{task}' has an empty observation")
    with np.errstate(over="ignore"):  # a float64 bound beyond float32 becomes an infinite one, as meant
        box = Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)
    return box, _flatten_function(space)


def _leaves(space: Space) -> Iterator[Space]:
    if isinstance(space, Dict):
        children = space.spaces.values()
    elif isinstance(space, Tuple):
        children = space.spaces
    else:
        yield space
        return
    for child in children:
        yield from _leaves(child)


def _flatten_function(space: Space) -> Callable[[Any], np.ndarray]:
    # The first two are the hot path: gymnasium's flatten dispatches per leaf and costs several times as much.
    if isinstance(space, Box):
        return lambda obs: np.array(obs, dtype=np.float32).reshape(-1)
    if isinstance(space, Dict) and all(isinstance(leaf, Box) for leaf in space.spaces.values()):
        keys = tuple(space.spaces)
        return lambda obs: np.concatenate([np.ravel(obs[k]) for k in keys], dtype=np.float32, casting="unsafe")
    return lambda obs: flatten(space, obs).astype(np.float32)


def flat_action(space: Space, task: str) -> tuple[Box | Discrete, Callable[[Any], Any]]:
    """Describe how the agents' actions become actions of `space`.

    Args:
        space: bounded floating-point Box of any shape, or Discrete.
        task: only for the error message.

    Returns:
        The agents' space, Box [-1, 1] float32 (A,) or Discrete(n) from 0; and a function from a checked
        action of it to a NEW native action. A component outside of [-1, 1] is clipped to the native bound.

    Raises:
        TaskError: another kind of space, integers in a Box, or a Box without finite bounds.
    """
    if isinstance(space, Discrete):
        start = int(space.start)
        return Discrete(int(space.n)), lambda action: start + action
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        kind = f"{space.dtype} Box" if isinstance(space, Box) else type(space).__name__
        raise TaskError(f"task '{task}' has a {kind} action; supported are float Box and Discrete")
    if not (np.all(np.abs(space.low) < UNBOUNDED) and np.all(np.abs(space.high) < UNBOUNDED)):
        raise TaskError(f"task '{task}' has unbounded actions, which cannot be rescaled from [-1, 1]")
    if space.low.size == 0:
        raise TaskError(f"task '{task}' has an empty action")
    return Box(-1.0, 1.0, (space.low.size,), np.float32), _rescale_function(space)


def space_dims(venv: VectorEnv) -> tuple[int, int, bool]:
    """Return (O, A, discrete) of an env from make_vector_env; A counts the actions where discrete."""
    action = venv.single_action_space
    discrete = isinstance(action, Discrete)
    return venv.single_observation_space.shape[0], int(action.n) if discrete else action.shape[0], discrete


def _rescale_function(space: Box) -> Callable[[np.ndarray], np.ndarray]:
    low, high = space.low.reshape(-1), space.high.reshape(-1)  # (A,)
    middle, half = (high + low) / 2, (high - low) / 2
    dtype, shape = space.dtype, space.shape
    identity = bool(np.all(low == -1.0) and np.all(high == 1.0))

    def rescale(action: np.ndarray) -> np.ndarray:
        native = action.astype(dtype)
        if not identity:
            native = middle + half * native
        # Clipped after the scaling: rounding may have carried an action of exactly 1 over the bound.
        return np.minimum(np.maximum(native, low), high).reshape(shape)

    return rescale
