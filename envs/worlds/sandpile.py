"""The abelian sandpile: one grain may topple nothing or the whole pile, and only the avalanche itself tells.

Sources: Bak, Tang, Wiesenfeld 1987 (the model), Dhar 1990 (why order does not matter; recurrent states).
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from envs.errors import TaskError
from envs.worlds.arguments import is_whole
from envs.worlds.drawing import grid_frame

FULL = 4  # a cell with this many grains gives one to each of its four neighbours
DROP_COST = 1  # grains; beside the dropped grain itself


def topple(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Topple piles until they are stable; in one round every cell with >= 4 grains topples once, at once.

    Grains that leave the grid are lost. Each pile stops for itself, so that a batch costs what its piles
    need and not its size times the longest avalanche.

    Args:
        grids: grains per cell, integers >= 0, (B, S, S). Not changed.

    Returns:
        The stable piles int32 (B, S, S) in 0..3, the rounds int64 (B,), the grains lost int64 (B,).

    Raises:
        ValueError: another shape or dtype, or a negative number of grains.
    """
    stable, active = _checked(grids), np.arange(len(grids))
    rounds, before = np.zeros(len(stable), np.int64), stable.sum((1, 2))
    work = stable.copy()  # (b, S, S): the piles still moving, b <= B
    while len(active):
        over = work >= FULL
        moving = over.any((1, 2))
        if not moving.all():
            stable[active[~moving]] = work[~moving]
            active, work, over = active[moving], work[moving], over[moving]
        _give(work, over.astype(np.int32))
        rounds[active] += 1
    return stable, rounds, before - stable.sum((1, 2))


def _checked(grids: np.ndarray) -> np.ndarray:
    """A copy in int32."""
    grids = np.asarray(grids)
    if grids.ndim != 3 or grids.shape[1] != grids.shape[2] or not np.issubdtype(grids.dtype, np.integer):
        raise ValueError(f"grids must be integers (B, S, S), got {grids.dtype} {grids.shape}")
    if grids.size and grids.min() < 0:
        raise ValueError("a cell cannot hold a negative number of grains")
    return grids.astype(np.int32)


def _give(piles: np.ndarray, over: np.ndarray) -> None:
    """One round, in place: cells marked in `over` (b, S, S) give a grain to each neighbour."""
    piles -= FULL * over
    piles[:, 1:] += over[:, :-1]
    piles[:, :-1] += over[:, 1:]
    piles[:, :, 1:] += over[:, :, :-1]
    piles[:, :, :-1] += over[:, :, 1:]


def least_mass(size: int) -> int:
    """Return the fewest grains that a pile can be drained to by dropping grains: 2 S (S - 1).

    A pile that every drop can lead back to (a recurrent one) stays so forever, and holds at least one grain
    for each pair of neighbouring cells: burning the pile from the edge uses each pair once (Dhar 1990).
    """
    return 2 * size * (size - 1)


def recurrent_piles(rng: np.random.Generator, batch: int, size: int) -> np.ndarray:
    """Draw stable piles near the critical density, int32 (B, S, S).

    Full cells plus random grains, toppled: what comes from the full pile is recurrent (Dhar 1990).
    """
    return topple(FULL - 1 + rng.integers(0, FULL, (batch, size, size)))[0]


class SandpileEnv(gymnasium.Env):
    """Drain a sandpile with few drops.

    obs: heights / 3, float32 (S * S,) in [0, 1], row by row. action: the cell that gets one grain. reward:
    (grains lost - the grain dropped - DROP_COST) / S; summed over an episode that is how much lighter the pile
    got, less the drops it took. Terminated when nothing can be drained any more: the pile holds `least_mass`.
    Draining well means building slopes now for an avalanche later. Because topplings commute, a plan's final
    pile depends on which cells are used and not on their order.

    info["difficulty"]: toppling rounds of the step, the sequential depth of its outcome.

    Args:
        size: S, cells along a side, >= 2.
        render_mode: None or "rgb_array".

    Raises:
        TaskError: a bad size.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, size: int = 8, render_mode: str | None = None):
        if not is_whole(size, 2):
            raise TaskError(f"a sandpile's size must be a whole number >= 2, got {size!r}")
        self.render_mode = render_mode
        self._size = size = int(size)
        self.observation_space = Box(0.0, 1.0, (size * size,), np.float32)
        self.action_space = Discrete(size * size)
        self._pile = np.zeros((size, size), np.int32)

    @property
    def pile(self) -> np.ndarray:
        """A copy of the heights, int32 (S, S) in 0..3."""
        return self._pile.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start from a random recurrent pile that is not yet drained. Return obs and an empty info."""
        super().reset(seed=seed)
        self._pile = self._draw_pile()
        while self._drained():  # next to impossible but for tiny grids
            self._pile = self._draw_pile()
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Drop one grain on cell `action` and let the pile come to rest.

        Raises:
            ValueError: no such cell.
        """
        if not (is_whole(action, 0) and action < self._pile.size):
            raise ValueError(f"a cell must be a whole number in 0..{self._pile.size - 1}, got {action!r}")
        self._pile.reshape(-1)[action] += 1
        piles, rounds, lost = topple(self._pile[None])
        self._pile = piles[0]
        reward = float(lost[0] - 1 - DROP_COST) / self._size
        return self._observation(), reward, self._drained(), False, {"difficulty": int(rounds[0])}

    def render(self) -> np.ndarray:
        """Return a frame, uint8 (16 S, 16 S, 3): the more grains, the brighter."""
        return grid_frame(self._pile / (FULL - 1))

    def _draw_pile(self) -> np.ndarray:
        return recurrent_piles(self.np_random, 1, self._size)[0]

    def _drained(self) -> bool:
        return bool(self._pile.sum() <= least_mass(self._size))

    def _observation(self) -> np.ndarray:
        return self._pile.reshape(-1).astype(np.float32) / (FULL - 1)
