"""Flattens and unflattens grid latents and actions, so that an agent of vectors can have a block for grids.

z (B, Z S S) holds Z channels of S rows of S cells, in that order; the loop's state stays a grid (B, D, S, S).
"""

from __future__ import annotations

from torch import Tensor, nn

from loopwm.dynamics.base import Coda, Prelude


def to_grid(x: Tensor, side: int) -> Tensor:
    """(..., C S S) -> (..., C, S, S)."""
    return x.unflatten(-1, (-1, side, side))


def has_an_entry_a_cell(action_dim: int, side: int) -> bool:
    """Whether an action is laid out on the grid, as one channel; any other is broadcast to every cell."""
    return 0 < action_dim == side * side


class FlatPrelude(nn.Module):
    """z (B, Z S S), action (B, A) -> e (B, D, S, S). An action of S S entries, row by row, is one number for each cell.

    So is a one-hot action that chooses a cell. Any other action is broadcast to every cell.
    """

    def __init__(self, prelude: Prelude, side: int):
        super().__init__()
        self.prelude, self.side = prelude, side

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        if has_an_entry_a_cell(action.shape[-1], self.side):
            action = to_grid(action, self.side)
        return self.prelude(to_grid(z, self.side), action)


class FlatStart(nn.Module):
    """z (B, Z S S) -> h0 (B, D, S, S)."""

    def __init__(self, start: nn.Module, side: int):
        super().__init__()
        self.start, self.side = start, side

    def forward(self, z: Tensor) -> Tensor:
        return self.start(to_grid(z, self.side))


class FlatCoda(nn.Module):
    """z (B, Z S S), h (B, D, S, S) -> z' (B, Z S S)."""

    def __init__(self, coda: Coda, side: int):
        super().__init__()
        self.coda, self.side = coda, side

    def forward(self, z: Tensor, h: Tensor) -> Tensor:
        return self.coda(to_grid(z, self.side), h).flatten(-3)
