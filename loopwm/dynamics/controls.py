"""The unlooped controls: same prelude, coda and cell equation, but no weight is used twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import Coda, Depth, DynamicsOutput, Prelude, relative_step
from loopwm.dynamics.cell import LoopCell


def equal_flops_width(block_dim: int, loops: int) -> int:
    """Total inner width of unlooped cells that cost what ``loops`` loops of one cell of ``block_dim`` do.

    A loop multiplies by W1 and W2, and by U once for all loops; an unlooped cell by all three: 2 T + 1 against 3 T.
    """
    return max(1, round(block_dim * (2 * loops + 1) / 3))


class StackedDynamics(nn.Module):
    """``mean_loops`` cells with weights of their own: the loop's FLOPs, unlooped (see ``equal_flops_width``).

    ``depth`` is accepted and ignored: an unlooped model has the depth it was built with.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int,
        mean_loops: int = 4,
        max_loops: int = 8,
        *,
        block_dim: int | None = None,
        prelude_layers: int = 1,
        mode: str = "certified",
        gamma: float = 0.95,
        injection: str = "zoh",
        activation: str = "relu",
        latent_norm: nn.Module | None = None,
        min_loops: int = 1,
        depth_sampler: str = "fixed",
        halt_tolerance: float = 0.01,
    ):  # depths and halting mean nothing here; the arguments are the loop's, so that one word swaps them
        super().__init__()
        self.state_dim = hidden_dim
        self.prelude = Prelude(latent_dim, action_dim, hidden_dim, prelude_layers)
        self.start = nn.Linear(latent_dim, hidden_dim, bias=False) if latent_dim != hidden_dim else nn.Identity()
        self.cells = nn.ModuleList(
            LoopCell(hidden_dim, width, mode, gamma, injection, activation)
            for width in self._widths(block_dim or 2 * hidden_dim, mean_loops)
        )
        self.mean_loops = self.max_loops = len(self.cells)
        self.coda = Coda(hidden_dim, latent_dim, latent_norm)

    @staticmethod
    def _widths(block_dim: int, loops: int) -> list[int]:
        """Inner width of each cell."""
        total = equal_flops_width(block_dim, loops)
        return [total // loops + (i < total % loops) for i in range(loops)]

    def forward(self, z: Tensor, action: Tensor, depth: Depth = None) -> DynamicsOutput:
        """Predict the next latent: z (B, Z), action (B, A) -> ``DynamicsOutput``."""
        e, h = self.prelude(z, action), self.start(z)
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
        """Inside, the parameters do not change (see ``LoopCell.frozen``)."""
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
    def _widths(block_dim: int, loops: int) -> list[int]:
        return [block_dim]


class WideDynamics(StackedDynamics):
    """One wide block, applied once: the loop's FLOPs spent on width."""

    @staticmethod
    def _widths(block_dim: int, loops: int) -> list[int]:
        return [equal_flops_width(block_dim, loops)]
