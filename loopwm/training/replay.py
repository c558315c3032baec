"""Replay of whole streams, from which subsequences are drawn that never cross an episode.

One row per environment step and stream, and an observation is stored once:

    row      :   0        1        2        3        4        5
    obs      :  o0 ----> o1 ----> o2 ----> o3       o0' ---> o1'
    action   :  a0       a1       a2       -        a0'
    reward   :  r0       r1       r2       -        r0'
    terminated  0        0        1        -        0                 (of the transition out of this row)
    is_last  :  0        0        0        1        0                 (no transition leaves this row)

obs[t], action[t] -> reward[t], terminated[t], obs[t + 1]. Row 3 is the terminal observation; the vector
environment's NEXT_STEP autoreset gives it a step of its own, whose action is ignored: the next episode starts
in row 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from loopwm.config import ConfigError


class Batch(NamedTuple):
    """Sequences of L steps, time first, float32 unless said otherwise."""

    obs: np.ndarray  # (L + 1, B, O)
    action: np.ndarray  # (L, B, A)
    reward: np.ndarray  # (L, B)
    terminated: np.ndarray  # (L, B)
    mask: np.ndarray  # (L, B), 1 while the step belongs to the episode that the sequence began in


class Replay:
    """A ring of ``capacity`` rows over ``num_envs`` streams, preallocated.

    Args:
        capacity: rows in all; each stream holds capacity // num_envs.
        path: a folder for memory-mapped arrays; empty keeps them in memory (touched only as rows arrive).

    Raises:
        ConfigError: a capacity larger than the memory, or too small for three rows a stream (of two, none may
        begin a transition).
    """

    FIELDS = ("obs", "action", "reward", "terminated", "is_last")

    def __init__(self, capacity: int, num_envs: int, obs_dim: int, action_dim: int, *, seed: int = 0, path: str = ""):
        self.rows, self.num_envs = capacity // num_envs, num_envs
        if self.rows < 3:
            raise ConfigError(f"replay.capacity={capacity}: must be at least {3 * num_envs} for num_envs={num_envs}")
        self._path = Path(path) if path else None
        self.obs = self._allocate("obs", np.float32, obs_dim)
        self.action = self._allocate("action", np.float32, action_dim)
        self.reward = self._allocate("reward", np.float32)
        self.terminated = self._allocate("terminated", np.bool_)
        self.is_last = self._allocate("is_last", np.bool_)
        self.total = 0  # rows ever written to each stream; row i lives at i % self.rows
        self.rng = np.random.default_rng(seed)

    def _allocate(self, name: str, dtype: type, width: int | None = None) -> np.ndarray:
        shape = (self.rows, self.num_envs) + (() if width is None else (width,))
        if self._path is None:
            try:
                return np.zeros(shape, dtype)
            except (MemoryError, ValueError):  # ValueError: beyond what an address can say
                raise ConfigError(f"replay.capacity={self.rows * self.num_envs}: more than the memory holds") from None
        self._path.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self._path / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    def __len__(self) -> int:
        """Rows held in each stream."""
        return min(self.total, self.rows)

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        is_last: np.ndarray,
    ) -> None:
        """Write one row to every stream.

        Args:
            obs: (N, O) what the action was chosen on.
            action: (N, A).
            reward, terminated: (N,) of the transition out of obs.
            is_last: (N,) True where obs ended its episode, so that no transition leaves it.
        """
        i = self.total % self.rows
        self.obs[i], self.action[i], self.reward[i] = obs, action, reward
        self.terminated[i], self.is_last[i] = terminated, is_last
        self.total += 1

    def sample(self, batch_size: int, length: int, rng: np.random.Generator | None = None) -> Batch:
        """Draw ``batch_size`` sequences of ``length`` steps, uniformly over the transitions held.

        ``rng`` replaces the replay's own stream, for looking without disturbing training.
        A sequence that meets its episode's end (or the newest row) is padded by its last row, and masked.

        Raises:
            ValueError: no transition is held yet.
        """
        held, oldest = len(self), self.total - len(self)
        rng = rng or self.rng
        stream = rng.integers(self.num_envs, size=batch_size)
        age = self._draw_starts(stream, oldest, held, rng)
        steps = age + np.arange(length + 1)[:, None]  # (L + 1, B), counted from the oldest row
        rows = (oldest + np.minimum(steps, held - 1)) % self.rows
        # A step is valid if neither its row nor one before it is a last one, and its next row is held.
        open_rows = ~self.is_last[rows[:-1], stream] & (steps[1:] < held)
        mask = np.logical_and.accumulate(open_rows, 0)  # (L, B)
        # Padding repeats the sequence's last valid row, so that masked entries are never another episode's.
        last = mask.sum(0)
        rows = (oldest + age + np.minimum(np.arange(length + 1)[:, None], last)) % self.rows
        now = rows[:-1]
        return Batch(
            self.obs[rows, stream],
            self.action[now, stream],
            self.reward[now, stream] * mask,
            (self.terminated[now, stream] & mask).astype(np.float32),
            mask.astype(np.float32),
        )

    def _draw_starts(self, stream: np.ndarray, oldest: int, held: int, rng: np.random.Generator) -> np.ndarray:
        """Rows (B,), counted from the oldest, that a transition leaves; redrawn where none does."""
        if held < 2:
            raise ValueError("the replay holds no transition yet")
        age = rng.integers(held - 1, size=stream.shape)
        for _ in range(1000):
            bad = self.is_last[(oldest + age) % self.rows, stream]
            if not bad.any():
                return age
            # Redraw the stream too, so that the draw stays uniform over transitions.
            stream[bad] = rng.integers(self.num_envs, size=int(bad.sum()))
            age[bad] = rng.integers(held - 1, size=int(bad.sum()))
        raise ValueError("the replay holds no transition yet")

    def slice(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start..stop (counted over all ever written) of every field, copied; for checkpoints.

        Raises:
            ValueError: a row that is not held.
        """
        if not self.total - len(self) <= start <= stop <= self.total:
            raise ValueError(f"rows {start}..{stop} are not all held")
        rows = np.arange(start, stop) % self.rows
        return {name: np.ascontiguousarray(getattr(self, name)[rows]) for name in self.FIELDS}

    def restore(self, start: int, fields: dict[str, np.ndarray]) -> None:
        """Put back rows that ``slice(start, ...)`` gave; ``total`` becomes the row after the last one."""
        count = fields["is_last"].shape[0]
        rows = np.arange(start, start + count) % self.rows
        for name in self.FIELDS:
            getattr(self, name)[rows] = fields[name]
        self.total = start + count
