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

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from loopwm.config import ConfigError
from loopwm.training.lock import lock_folder
from loopwm.training.priorities import Priorities


class Batch(NamedTuple):
    """Sequences of L steps, time first, float32 unless said otherwise; of arrays, or of tensors but for ``start``."""

    obs: np.ndarray | torch.Tensor  # (L + 1, B, O)
    action: np.ndarray | torch.Tensor  # (L, B, A)
    reward: np.ndarray | torch.Tensor  # (L, B)
    terminated: np.ndarray | torch.Tensor  # (L, B)
    mask: np.ndarray | torch.Tensor  # (L, B), 1 while the step belongs to the episode that the sequence began in
    start: np.ndarray  # (B,) int64, where each sequence begins: what ``Replay.prioritise`` takes


class Earned(NamedTuple):
    """What followed B transitions until their episodes were over; of arrays, or of tensors."""

    reward: np.ndarray | torch.Tensor  # (B,) float32, discounted sum of the rewards from the transition's own on
    steps: np.ndarray | torch.Tensor  # (B,) int64, transitions in that sum
    obs: np.ndarray | torch.Tensor  # (B, O) the last observation
    terminated: np.ndarray | torch.Tensor  # (B,) float32, ended by the task rather than by a time limit
    known: np.ndarray | torch.Tensor  # (B,) bool; of an episode that goes on nothing is, and the rest means nothing


class Replay:
    """A ring of ``capacity`` rows over ``num_envs`` streams, preallocated.

    Every transition has a priority, and sequences are drawn by that of their first one. A new transition has the
    largest of the last look (``refresh_priority``), so that it is seen soon; all are one until ``prioritise``.

    Args:
        capacity: rows in all; each stream holds capacity // num_envs.
        path: a folder for memory-mapped arrays; empty keeps them in memory (touched only as rows arrive).

    Raises:
        ConfigError: a capacity larger than the memory, or too small for three rows a stream (of two, none may
        begin a transition); a path that another run uses. OSError: a path that cannot be written.
    """

    FIELDS = ("obs", "action", "reward", "terminated", "is_last")

    def __init__(self, capacity: int, num_envs: int, obs_dim: int, action_dim: int, *, seed: int = 0, path: str = ""):
        self.rows, self.num_envs = capacity // num_envs, num_envs
        if self.rows < 3:
            raise ConfigError(f"replay.capacity={capacity}: must be at least {3 * num_envs} for num_envs={num_envs}")
        self._path = Path(path) if path else None
        self._lock = lock_folder(self._path) if self._path else None  # its files are written anew
        if self._path and self._lock is None:
            raise ConfigError(f"replay.path={path}: in use by another process; choose another folder")
        self.obs = self._allocate("obs", np.float32, obs_dim)
        self.action = self._allocate("action", np.float32, action_dim)
        self.reward = self._allocate("reward", np.float32)
        self.terminated = self._allocate("terminated", np.bool_)
        self.is_last = self._allocate("is_last", np.bool_)
        self.total = 0  # rows ever written to each stream; row i lives at i % self.rows
        self.rng = np.random.default_rng(seed)
        self.priorities = Priorities(self.rows * num_envs)  # zero where no transition begins
        self.new_priority = 1.0
        self._discount: float | None = None  # of ``earned``, once it is kept

    def _allocate(self, name: str, dtype: type, width: int | None = None) -> np.ndarray:
        shape = (self.rows, self.num_envs) + (() if width is None else (width,))
        if self._path is None:
            try:
                return np.zeros(shape, dtype)
            except (MemoryError, ValueError):  # ValueError: beyond what an address can say
                size = f"{math.prod(shape) * np.dtype(dtype).itemsize / 2**30:.1f} GiB of {name} alone"
                capacity = self.rows * self.num_envs
                raise ConfigError(f"replay.capacity={capacity}: {size}, more than the memory holds") from None
        return np.lib.format.open_memmap(self._path / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    def close(self) -> None:
        """Leave ``path`` to others; the rows stay."""
        if self._lock is not None:
            self._lock.close()

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
        self._open(i)
        self.total += 1
        if self._discount is not None:
            self._last[i] = -1
            for stream in np.flatnonzero(is_last):
                self._close(i, int(stream))

    def _open(self, i: int) -> None:
        """Row i is the newest: no transition leaves it yet, but now one leaves the row before."""
        streams = np.arange(self.num_envs)
        self.priorities.set(i * self.num_envs + streams, 0.0)
        if self.total:
            before = (i - 1) % self.rows
            weight = np.where(self.is_last[before], 0.0, self.new_priority)
            self.priorities.set(before * self.num_envs + streams, weight)

    def keep_earned(self, discount: float) -> None:
        """From now on ``earned`` answers, by this discount; what is held of whole episodes is looked through."""
        if self._discount == discount:
            return
        if self._discount is None:
            self._to_go = self._allocate("to_go", np.float32)
            self._last = self._allocate("last", np.int64)  # the row of the episode's last observation
        self._discount = discount
        self._last[: len(self)] = -1
        for last, stream in np.argwhere(self.is_last[: len(self)]).tolist():
            self._close(last, stream)

    def _close(self, last: int, stream: int) -> None:
        """The episode of ``stream`` whose last observation stands in row ``last`` is over: its rows are told."""
        oldest = (self.total - len(self)) % self.rows
        to_go, i = 0.0, last
        while i != oldest:
            i = (i - 1) % self.rows
            if self.is_last[i, stream]:
                break
            to_go = float(self.reward[i, stream]) + self._discount * to_go
            self._to_go[i, stream], self._last[i, stream] = to_go, last

    def earned(self, start: np.ndarray) -> Earned:
        """What the transitions that ``Batch.start`` (B,) names went on to earn; ``keep_earned`` comes first."""
        row, stream = np.divmod(start, self.num_envs)
        known = self._last[row, stream] >= 0
        last = np.where(known, self._last[row, stream], row)
        steps = (last - row) % self.rows
        terminated = self.terminated[(last - 1) % self.rows, stream].astype(np.float32)
        return Earned(self._to_go[row, stream], steps, self.obs[last, stream], terminated, known)

    def prioritise(self, start: np.ndarray, priority: np.ndarray) -> None:
        """Give the transitions that ``Batch.start`` (B,) names these priorities (B,), > 0."""
        self.priorities.set(start, priority)

    def refresh_priority(self) -> None:
        """From now on new transitions get the largest priority that is held (as TD7 does, 2306.02451)."""
        self.new_priority = float(self.priorities.weight.max()) or 1.0

    def mean_reward_size(self) -> float:
        """Mean of |reward| over the rows held, in the environment's units; rows that no transition leaves have none."""
        return float(np.abs(self.reward[: len(self)]).mean())

    def sample(
        self, batch_size: int, length: int, rng: np.random.Generator | None = None, *, uniform: bool = False
    ) -> Batch:
        """Draw ``batch_size`` sequences of ``length`` steps by the priorities of the transitions that begin them.

        ``rng`` replaces the replay's own stream, for looking without disturbing training; ``uniform`` draws all alike.
        A sequence that meets its episode's end (or the newest row) is padded by its last row, and masked.

        Raises:
            ValueError: no transition is held yet.
        """
        held, oldest = len(self), self.total - len(self)
        try:
            draw = self.priorities.draw_alike if uniform else self.priorities.draw
            start = draw(batch_size, rng or self.rng)
        except ValueError:
            raise ValueError("the replay holds no transition yet") from None
        row, stream = np.divmod(start, self.num_envs)
        age = (row - oldest) % self.rows  # (B,), counted from the oldest row
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
            start,
        )

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
        """Put back rows that ``slice(start, ...)`` gave; ``total`` becomes the row after the last one.

        All transitions held have the same priority then; ``load_state_dict`` puts back their own.
        """
        count = fields["is_last"].shape[0]
        rows = np.arange(start, start + count) % self.rows
        for name in self.FIELDS:
            getattr(self, name)[rows] = fields[name]
        self.total = start + count
        self._discount = None  # what followed is looked up anew
        opens = ~self.is_last
        opens[(self.total - 1) % self.rows] = False
        opens[len(self) :] = False
        self.priorities.set_all(opens.reshape(-1).astype(np.float32))

    def state_dict(self) -> dict[str, Any]:
        """What the rows do not say: how many were written, who is drawn how often, and the random stream."""
        held = self.priorities.weight[: len(self) * self.num_envs].copy()
        return {
            "total": self.total,
            "rng": self.rng.bit_generator.state,
            "priority": torch.from_numpy(held),
            "new_priority": self.new_priority,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After ``restore`` has put back the rows; a state without priorities leaves them equal.

        Raises:
            KeyError, ValueError: a state of another replay.
        """
        self.rng.bit_generator.state = state["rng"]
        if "priority" in state:
            weight = np.zeros(self.priorities.count, np.float32)
            weight[: len(self) * self.num_envs] = state["priority"].numpy()
            self.priorities.set_all(weight)
            self.new_priority = state["new_priority"]
