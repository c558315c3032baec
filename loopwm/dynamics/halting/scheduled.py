"""Rules that know each sample's number of loops beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopwm.dynamics.depth import sample_depths
from loopwm.dynamics.halting.rule import HaltingRule, HaltingRun, whole

if TYPE_CHECKING:
    from loopwm.dynamics.looped import LoopedDynamics


class FixedHalting(HaltingRule):
    """Stop every sample after ``loops`` loops. By name: ``mean_loops``.

    Raises:
        ValueError: unless loops is an integer of at least 1.
    """

    def __init__(self, loops: int):
        super().__init__()
        self.loops = whole(loops, "loops")

    @classmethod
    def for_dynamics(cls, dynamics: LoopedDynamics, tolerance: float) -> HaltingRule:
        return cls(dynamics.mean_loops)

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        return _ScheduledRun(torch.full((h.shape[0],), self.loops, device=h.device))


class RandomHalting(HaltingRule):
    """Stop each sample at a depth drawn from ``depths``, whatever the sample: the control of every other rule.

    Systematic sampling: a batch as large as ``depths`` gets exactly these depths in random order, so a rule's own
    depths on a batch make a control of exactly its mean. By name: the dynamics' training depths.

    Args:
        depths: (n,) integers >= 1. seed: of the rule's own random stream.

    Raises:
        ValueError: depths that are not (n,) integers >= 1.
    """

    def __init__(self, depths: Tensor, seed: int = 0):
        super().__init__()
        if depths.ndim != 1 or depths.numel() == 0 or depths.is_floating_point() or int(depths.min()) < 1:
            raise ValueError(f"depths must be (n,) integers of at least 1, got {tuple(depths.shape)} {depths.dtype}")
        self.depths, self.generator = depths.long().cpu().sort().values, torch.Generator().manual_seed(seed)

    @classmethod
    def for_dynamics(cls, dynamics: LoopedDynamics, tolerance: float) -> HaltingRule:
        d = dynamics
        draws = (d.depth_sampler, 4096, d.mean_loops, d.min_loops, d.max_loops)
        return cls(sample_depths(*draws, torch.Generator().manual_seed(0)))

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        batch, known = h.shape[0], self.depths.shape[0]
        rank = torch.randperm(batch, generator=self.generator)
        offset = torch.rand((), generator=self.generator, dtype=torch.float64)
        index = ((rank + offset) * (known / max(batch, 1))).long().clamp_max(known - 1)
        return _ScheduledRun(self.depths[index].to(h.device))


class _ScheduledRun:
    """Stops each sample at its own number of loops, (n,)."""

    sees_every_loop = True

    def __init__(self, loops: Tensor):
        self.loops, self.t = loops, 0

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        self.t += 1
        return self.loops <= self.t

    def keep(self, index: Tensor) -> None:
        self.loops = self.loops[index]
