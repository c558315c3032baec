"""What a halting rule is, and the one that asks another to hold for several loops in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from loopwm.dynamics.looped import LoopedDynamics


class HaltingRun(Protocol):
    """A rule in one prediction: ``run(h, previous)`` -> (n,) bool, True where looping may stop.

    h (n, ...) is the state after this loop, previous the one before, of the n samples in the batch. Some of them may
    have stopped before, and wait for others to leave it with: what is said of those changes nothing.
    """

    sees_every_loop: bool  # False: need not be called before ``min_loops``

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor: ...

    def keep(self, index: Tensor) -> None:
        """Only the samples ``index`` (n,) go on."""


class HaltingRule(nn.Module):
    """Base of the rules. A rule that remembers nothing is its own run."""

    sees_every_loop = False

    @classmethod
    def for_dynamics(cls, dynamics: LoopedDynamics, tolerance: float) -> HaltingRule:
        """The rule that its name stands for: its one number is the dynamics' ``halt_tolerance``."""
        return cls(tolerance)

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        """The run of one prediction that starts from h (B, ...), of what follows the latent z (B, ...)."""
        return self

    def keep(self, index: Tensor) -> None:
        """Nothing to keep."""


def positive(value: float, name: str) -> float:
    """``value``, if it is. Raises ValueError, which says ``name``, unless it is above zero."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def whole(value: int, name: str) -> int:
    """``value``, if it counts something. Raises ValueError, which says ``name``, unless it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


class PatientHalting(HaltingRule):
    """Stop when ``rule`` held for ``patience`` loops in a row. Raises ValueError unless patience is an int >= 1."""

    def __init__(self, rule: HaltingRule, patience: int):
        super().__init__()
        self.rule, self.patience = rule, whole(patience, "patience")

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        return _PatientRun(self.rule.begin(dynamics, h, z), self.patience, h)


class _PatientRun:
    sees_every_loop = True

    def __init__(self, run: HaltingRun, patience: int, h: Tensor):
        self.run, self.patience = run, patience
        self.held = torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)  # (n,) loops in a row

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        self.held = (self.held + 1) * self.run(h, previous)
        return self.held >= self.patience

    def keep(self, index: Tensor) -> None:
        self.run.keep(index)
        self.held = self.held[index]
