"""The unlooped controls: same prelude, coda and cell equation, but no weight is used twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from loopwm.dynamics.architecture import Architecture
from loopwm.dynamics.base import Depth, DynamicsOutput, first_state, relative_step
from loopwm.dynamics.cell import Cell
from loopwm.dynamics.looped import LoopedDynamics

LOOP_WORDS = {p.name for p in signature(LoopedDynamics).parameters.values() if p.kind is p.KEYWORD_ONLY}


def equal_flops_width(cell: type[Cell], block_dim: int, loops: int) -> int:
    """Total inner width of unlooped cells that cost what ``loops`` loops of one ``cell`` of ``block_dim`` do.

    The loop pays for the injection once, an unlooped cell always: with W1, W2 and U alike, 2 T + 1 against 3 T.
    """
    looped, once = cell.flops
    return max(1, round(block_dim * (looped * loops + once) / (looped + once)))


class StackedDynamics(nn.Module):
    """``mean_loops`` cells with weights of their own: the loop's FLOPs, unlooped (see ``equal_flops_width``).

    Takes every argument of ``LoopedDynamics``, so that one word swaps them; how deep to loop and when to halt mean
    nothing here and are ignored, in ``forward`` too: an unlooped model has the depth it was built with.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int,
        mean_loops: int = 4,
        max_loops: int = 8,
        **options: Any,
    ):
        super().__init__()
        self.state_dim = hidden_dim
        words = {name: value for name, value in options.items() if name not in LOOP_WORDS}
        parts = Architecture(latent_dim, action_dim, hidden_dim, **words)
        self.prelude, self.start = parts.make_prelude(), parts.make_start()
        self.cells = nn.ModuleList(
            parts.make_cell(width) for width in self._widths(parts.kind, parts.width, mean_loops)
        )
        self.mean_loops = self.max_loops = len(self.cells)
        self.coda = parts.make_coda()

    @staticmethod
    def _widths(cell: type[Cell], block_dim: int, loops: int) -> list[int]:
        """Inner width of each cell."""
        total = equal_flops_width(cell, block_dim, loops)
        return [total // loops + (i < total % loops) for i in range(loops)]

    def forward(self, z: Tensor, action: Tensor, depth: Depth = None, h0: Tensor | None = None) -> DynamicsOutput:
        """Predict the next latent: z (B, Z), action (B, A) -> ``DynamicsOutput``; h0 as in ``LoopedDynamics``.

        Raises:
            ValueError: h0 of another shape than the state.
        """
        e, h = self.prelude(z, action), first_state(self.start, z, h0)
        previous = h
        for cell in self.cells:
            previous, h = h, cell.prepare(e)(h)
        layers, batch = len(self.cells), z.shape[0]
        return DynamicsOutput(
            self.coda(z, h),
            h,
            lambda: torch.full((batch,), layers, device=z.device),
            lambda: relative_step(h, previous),
        )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the parameters do not change (see ``Cell.frozen``)."""
        with ExitStack() as stack:
            for cell in self.cells:
                stack.enter_context(cell.frozen())
            yield

    def sample_depth(self, batch: int, generator: torch.Generator | None = None) -> Depth:
        return self.mean_loops

    def lipschitz_bound(self) -> float:
        """Infinite: what is applied once has no fixed point to converge to."""
        return float("inf")

    def measured_contraction(self, z: Tensor, action: Tensor, loops: int | None = None) -> float:
        """Not a number: successive layers are different maps."""
        return float("nan")


class SinglePassDynamics(StackedDynamics):
    """The loop's very cell, applied once: the same parameters, a fraction of the FLOPs."""

    @staticmethod
    def _widths(cell: type[Cell], block_dim: int, loops: int) -> list[int]:
        return [block_dim]


class WideDynamics(StackedDynamics):
    """One wide block, applied once: the loop's FLOPs spent on width."""

    @staticmethod
    def _widths(cell: type[Cell], block_dim: int, loops: int) -> list[int]:
        return [equal_flops_width(cell, block_dim, loops)]
