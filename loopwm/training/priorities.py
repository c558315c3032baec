"""Weights of a ring's rows, and draws in proportion to them, for prioritised replay (Schaul et al. 2016, 1511.05952).

Two levels, not a tree: sums of blocks of ``BLOCK`` rows, and the rows of the blocks drawn. For a batch of 128 from a
million rows that is 8192 + 128 * 128 additions, where a tree would cost 20 Python-level passes.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128


class Priorities:
    """Weights of ``count`` entries, zero until set.

    The sum of a block is always computed from its entries anew: it is a function of them alone, so that a run that is
    resumed from the entries draws what the other would have drawn, bit for bit.
    """

    def __init__(self, count: int):
        self._blocks = -(-count // BLOCK)
        self._weight = np.zeros((self._blocks, BLOCK), np.float32)
        self._sum = np.zeros(self._blocks)
        self.count = count

    @property
    def weight(self) -> np.ndarray:
        """(count,) float32, a view to read."""
        return self._weight.reshape(-1)[: self.count]

    def set(self, index: np.ndarray, weight: np.ndarray | float) -> None:
        """Give the entries ``index`` (n,) these weights, >= 0; of equal entries the last one counts."""
        self._weight.reshape(-1)[index] = weight
        touched = np.unique(index // BLOCK)
        self._sum[touched] = self._weight[touched].sum(1, dtype=np.float64)

    def set_all(self, weight: np.ndarray) -> None:
        """Give every entry its weight: ``weight`` (count,)."""
        self._weight.reshape(-1)[: self.count] = weight
        self._sum[:] = self._weight.sum(1, dtype=np.float64)

    def draw_alike(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Entries (size,), each that has a weight as likely as the next; looks at all of them, so seldom.

        Raises:
            ValueError: every weight is zero.
        """
        held = np.flatnonzero(self.weight)
        if not held.size:
            raise ValueError("every priority is zero")
        return held[rng.integers(held.size, size=size)]

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Entries (size,) in proportion to their weights, with replacement; never one of weight zero.

        Raises:
            ValueError: every weight is zero.
        """
        reached = np.cumsum(self._sum)
        if not reached[-1] > 0.0:
            raise ValueError("every priority is zero")
        goal = rng.random(size) * reached[-1]
        # Rounding may put the goal at the very end, or at the end of its block: the last entry with weight is meant.
        block = np.minimum(np.searchsorted(reached, goal, side="right"), np.searchsorted(reached, reached[-1]))
        inside = np.cumsum(self._weight[block], 1, dtype=np.float64)  # (size, BLOCK)
        left = np.maximum(goal - (reached[block] - self._sum[block]), 0.0)  # below zero by rounding alone
        entry = (inside <= left[:, None]).sum(1)
        entry = np.minimum(entry, (inside >= inside[:, -1:]).argmax(1))
        return block * BLOCK + entry
