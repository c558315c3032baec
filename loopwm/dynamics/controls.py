"""The unlooped controls: same prelude, coda and cell equation, but no weight is used twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from loopwm.dynamics.architecture import Architecture
from loopwm.dynamics.base import Depth, DynamicsOutput, first_state, relative_step
from loopwm.dynamics.halting.rule import whole
from loopwm.dynamics.looped import LoopedDynamics

LOOP_WORDS = {p.name for p in signature(LoopedDynamics).parameters.values() if p.kind is p.KEYWORD_ONLY}


def equal_flops_width(parts: Architecture, loops: int, cells: int) -> int:
    """Total inner width of ``cells`` unlooped cells that cost what ``loops`` loops of the block do.

    The loop pays for the injection once, an unlooped cell always: with W1, W2 and U alike, 2 T + 1 against 3 T. A skip
    costs a layer or a cell D, whatever its width.
    """
    looped, once = parts.kind.flops
    unit, layers = parts.unit, parts.block_layers
    skips = parts.skip * (loops * layers - cells) * parts.hidden_dim
    return unit * max(1, round((layers * parts.width * (looped * loops + once) + skips) / (looped + once) / unit))


def split_width(total: int, cells: int, unit: int) -> list[int]:
    """``total`` shared out over ``cells`` as evenly as multiples of ``unit`` allow."""
    units = total // unit
    return [unit * max(1, units // cells + (i < units % cells)) for i in range(cells)]


class StackedDynamics(nn.Module):
    """``mean_loops`` blocks with weights of their own: the loop's FLOPs, unlooped (see ``equal_flops_width``).

    Takes every argument of ``LoopedDynamics``, so that one word swaps them; how deep to loop and when to halt mean
    nothing here and are ignored, in ``forward`` too: an unlooped model has the depth it was built with.

    Raises:
        TypeError: an argument that neither ``LoopedDynamics`` nor ``Architecture`` knows.
        ValueError: mean_loops that is no integer >= 1, and as ``Architecture`` and ``Cell``.
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
        words = {name: value for name, value in options.items() if name not in LOOP_WORDS}
        loops = whole(mean_loops, "mean_loops")
        parts, widths = self.plan(Architecture.of(latent_dim, action_dim, hidden_dim, **words), loops)
        self.state_dim = parts.hidden_dim
        self.prelude, self.start = parts.make_prelude(), parts.make_start()
        self.cells = nn.ModuleList(parts.make_cell(width) for width in widths)
        self.mean_loops = self.max_loops = len(self.cells)
        self.coda = parts.make_coda()

    @staticmethod
    def plan(parts: Architecture, loops: int) -> tuple[Architecture, list[int]]:
        """What to build in place of ``loops`` loops of ``parts``: sizes, and the inner width of each cell."""
        cells = loops * parts.block_layers
        return parts, split_width(equal_flops_width(parts, loops, cells), cells, parts.unit)

    def forward(self, z: Tensor, action: Tensor, depth: Depth = None, h0: Tensor | None = None) -> DynamicsOutput:
        """Predict the next latent: z (B, Z), action (B, A) -> ``DynamicsOutput``; h0 as in ``LoopedDynamics``.

        Raises:
            ValueError: h0 of another shape than the state, or (block ``mlp``) z or action of another width.
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
        """The depth that there is; nothing is drawn."""
        return self.mean_loops

    def lipschitz_bound(self) -> float:
        """Infinite: what is applied once has no fixed point to converge to."""
        return float("inf")

    def measured_contraction(self, z: Tensor, action: Tensor, loops: int | None = None) -> float:
        """Not a number: successive layers are different maps."""
        return float("nan")


class SinglePassDynamics(StackedDynamics):
    """The loop's very block, applied once: the same parameters, a fraction of the FLOPs."""

    @staticmethod
    def plan(parts: Architecture, loops: int) -> tuple[Architecture, list[int]]:
        return parts, [parts.width] * parts.block_layers


class WideDynamics(StackedDynamics):
    """One wide layer, applied once: the loop's FLOPs spent on width."""

    @staticmethod
    def plan(parts: Architecture, loops: int) -> tuple[Architecture, list[int]]:
        return parts, [equal_flops_width(parts, loops, 1)]


class DeepThinDynamics(StackedDynamics):
    """As many cells as ``stacked``, so much thinner, in h and inside, that all have the loop's parameters together.

    Beside ``single_pass``, which has them in one block, it says what depth is worth at equal parameters (MobileLLM,
    2402.14905, finds deep and thin the better), beside the loop what sharing is. ``state_dim`` is the thinner D.

    Raises:
        ValueError: more cells than the loop's parameters suffice for.
    """

    @staticmethod
    def plan(parts: Architecture, loops: int) -> tuple[Architecture, list[int]]:
        cells = loops * parts.block_layers
        budget = parameter_count(parts, [parts.width] * parts.block_layers)
        for hidden in range(parts.hidden_dim, 0, -1):
            thin = replace(parts, hidden_dim=hidden)
            unit = thin.unit
            width = unit * max(1, round(parts.width * hidden / parts.hidden_dim / unit))
            spent = parameter_count(thin, [width] * cells)
            if spent <= budget:
                # What whole numbers leave of the budget goes into the width inside, where steps are small.
                step = parameter_count(thin, [width] * (cells - 1) + [width + unit]) - spent
                return thin, split_width(cells * width + (budget - spent) // step * unit, cells, unit)
        raise ValueError(f"{cells} cells are too many for the {budget} parameters of the loop")


def parameter_count(parts: Architecture, widths: list[int]) -> int:
    """Parameters of prelude, start, coda and cells of these inner widths, without the encoder's norm."""
    # A norm cannot be taken on the meta device, and has no parameters.
    parts = replace(parts, latent_norm=None, mode="linear" if parts.mode == "certified" else parts.mode)
    with torch.device("meta"):
        ends = (parts.make_prelude(), parts.make_start(), parts.make_coda())
        sizes = {width: _count(parts.make_cell(width)) for width in set(widths)}
    return sum(map(_count, ends)) + sum(sizes[width] for width in widths)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
