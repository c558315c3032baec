"""Several layers in the shared block, each a cell of its own, and the order in which loops apply them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from loopwm.dynamics.cell import Cell, Loop


class RepeatedBlock(nn.Module):
    """Order ABAB: one loop applies every layer once, T loops the whole block T times.

    Where each layer contracts by a factor of its own, a loop contracts by their product: the bound speaks of L layers
    at once, and falls with L for that reason alone.
    """

    def __init__(self, layers: Iterable[Cell]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.mode: str = self.layers[0].mode
        self.norm_order: float = self.layers[0].norm_order

    def stages(self, e: Tensor) -> list[Loop]:
        """The loops to run one after the other, each as often as the depth says: e (B, ...)."""
        return [PreparedLayers([layer.prepare(e) for layer in self.layers])]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the parameters do not change (see ``Cell.frozen``)."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.frozen())
            yield

    def lipschitz_bound(self) -> float:
        """Upper bound on |dh'/dh| of one loop."""
        bounds = [layer.lipschitz_bound() for layer in self.layers]
        return math.prod(bounds) if all(map(math.isfinite, bounds)) else math.inf  # 0 times infinity is no bound


class RepeatedLayers(RepeatedBlock):
    """Order AABB: T loops apply the first layer T times, then the second T times (MobileLLM, 2402.14905).

    The bound is that of the worst layer, since one loop applies one of them. A layer that contracts forgets what it
    started from: run to its end, the block is its last layer, and earlier ones only count while T is small.
    """

    def stages(self, e: Tensor) -> list[Loop]:
        return [layer.prepare(e) for layer in self.layers]

    def lipschitz_bound(self) -> float:
        return max(layer.lipschitz_bound() for layer in self.layers)


class PreparedLayers:
    """Layers with their weights and their input fixed: one application of the whole block."""

    __slots__ = ("loops", "waiting")
    fused = False

    def __init__(self, loops: list[Loop]):
        self.loops, self.waiting = loops, max(loop.waiting for loop in loops)

    def __call__(self, h: Tensor) -> Tensor:
        for loop in self.loops:
            h = loop(h)
        return h

    def first(self, rows: int) -> PreparedLayers:
        """The same block on the first ``rows`` samples."""
        return PreparedLayers([loop.first(rows) for loop in self.loops])

    def select(self, index: Tensor) -> PreparedLayers:
        """The same block on the samples ``index`` (n,)."""
        return PreparedLayers([loop.select(index) for loop in self.loops])


ORDERS: dict[str, type[RepeatedBlock]] = {"abab": RepeatedBlock, "aabb": RepeatedLayers}
