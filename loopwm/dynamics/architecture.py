"""What the loop and its controls are built from: prelude, start, cell and coda of one kind of block."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from torch import nn

from loopwm.dynamics.cell import Cell, LoopCell
from loopwm.dynamics.conv import ConvCell, GridPrelude
from loopwm.dynamics.flat import FlatCoda, FlatPrelude, FlatStart, has_an_entry_a_cell
from loopwm.dynamics.layers import ORDERS, RepeatedBlock
from loopwm.dynamics.rank import RankCell
from loopwm.dynamics.transformer import TransformerCell

BLOCKS: dict[str, type[Cell]] = {
    "mlp": LoopCell,
    "conv": ConvCell,
    "rank": RankCell,
    "transformer": TransformerCell,
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and kinds, with the defaults that the loop and every control share.

    Attributes:
        latent_dim: Z. action_dim: A. hidden_dim: D, width of h.
        block: a name in ``BLOCKS``: ``mlp`` for vectors z (B, Z), action (B, A), h (B, D); ``conv`` and ``rank``
        for grids z (B, Z, S, S), action (B, A, S, S) or (B, A), h (B, D, S, S) of any size S; ``transformer`` for
        tokens z (B, G, Z), action (B, G, A) or (B, A), h (B, G, D) of any number G.
        block_dim: W, inner width of the block (default 2 D).
        prelude_layers: layers from (z, action) to the injected input. coda_layers: layers from h to the step of z.
        block_layers: layers in the shared block, each a cell of its own. order: a name in ``ORDERS``, how loops go
        through them.
        latent_norm: the module that normalises latents (the encoder's; of a grid, it is given the grid).
        side: S, where a block for grids is to take z (B, Z S S) and action (B, A) as vectors (see ``flat``); 0: grids.
        The rest: see ``Cell``.

    Raises:
        ValueError: unknown block or order, a size or a number of layers below one, or a side for a block that is not
        for grids.
    """

    latent_dim: int
    action_dim: int
    hidden_dim: int
    block: str = "mlp"
    block_dim: int | None = None
    prelude_layers: int = 1
    block_layers: int = 1
    coda_layers: int = 1
    order: str = "abab"
    mode: str = "certified"
    gamma: float = 0.95
    injection: str = "zoh"
    activation: str = "relu"
    skip: bool = False
    latent_norm: nn.Module | None = None
    side: int = 0

    def __post_init__(self) -> None:
        for value, known, what in ((self.block, BLOCKS, "block"), (self.order, ORDERS, "order")):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(known)}")
        sizes = ("latent_dim", "action_dim", "hidden_dim", *(() if self.block_dim is None else ("block_dim",)))
        for name in (*sizes, "prelude_layers", "block_layers", "coda_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.side and not issubclass(self.kind.prelude, GridPrelude):
            raise ValueError(f"block {self.block!r} is not for grids, so it takes no side")

    @classmethod
    def of(cls, *sizes: int, **words: Any) -> Architecture:
        """The architecture of these sizes and words. Raises TypeError: a word that it does not know."""
        known = [item.name for item in fields(cls)]
        for word in words:
            if word not in known:
                near = get_close_matches(word, known, 1)
                raise TypeError(f"unknown argument {word!r}" + (f": did you mean {near[0]}?" if near else ""))
        return cls(*sizes, **words)

    @property
    def kind(self) -> type[Cell]:
        """The cell of this block."""
        return BLOCKS[self.block]

    @property
    def width(self) -> int:
        """W."""
        return self.block_dim or 2 * self.hidden_dim

    @property
    def unit(self) -> int:
        """What inner widths are multiples of."""
        return self.kind.width_multiple(self.hidden_dim)

    def make_prelude(self) -> nn.Module:
        """(z, action) -> the injected input e."""
        channels = 1 if has_an_entry_a_cell(self.action_dim, self.side) else self.action_dim
        prelude = self.kind.prelude(self.latent_dim, channels, self.hidden_dim, self.prelude_layers)
        return FlatPrelude(prelude, self.side) if self.side else prelude

    def make_start(self) -> nn.Module:
        """z -> the first state h0."""
        start = self.kind.start(self.latent_dim, self.hidden_dim)
        return FlatStart(start, self.side) if self.side else start

    def make_block(self) -> Cell | RepeatedBlock:
        """The shared block."""
        if self.block_layers == 1:
            return self.make_cell(self.width)
        return ORDERS[self.order](self.make_cell(self.width) for _ in range(self.block_layers))

    def make_cell(self, width: int) -> Cell:
        """One layer of inner width ``width``."""
        return self.kind(self.hidden_dim, width, self.mode, self.gamma, self.injection, self.activation, self.skip)

    def make_coda(self) -> nn.Module:
        """(z, h) -> the next latent."""
        coda = self.kind.coda(self.hidden_dim, self.latent_dim, self.latent_norm, self.coda_layers)
        return FlatCoda(coda, self.side) if self.side else coda
