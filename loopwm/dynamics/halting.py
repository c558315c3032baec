"""When a sample may stop looping. A rule sees one step of every running sample and says which are finished."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from loopwm.dynamics.base import relative_step


class HaltingRule(Protocol):
    """``rule(h, previous)`` -> (B,) bool, True where looping may stop; h and previous are (B, D)."""

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor: ...


class ResidualHalting:
    """Stop when ||h[t+1] - h[t]|| / ||h[t]|| < tolerance."""

    def __init__(self, tolerance: float = 0.01):
        if tolerance <= 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        self.tolerance = tolerance

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        return relative_step(h, previous) < self.tolerance


class CertifiedHalting:
    """Stop when the state is certainly within ``distance`` of its fixed point: rho / (1 - rho) * ||step|| < distance.

    Banach's a-posteriori bound; needs a certified factor rho < 1.
    """

    def __init__(self, lipschitz: float, distance: float):
        if not 0.0 <= lipschitz < 1.0:
            raise ValueError(f"certified halting needs a contraction factor below 1, got {lipschitz}")
        self.factor, self.distance = lipschitz / (1.0 - lipschitz), distance

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        return self.factor * torch.linalg.vector_norm(h - previous, dim=-1) < self.distance


class NeverHalt:
    """Run every sample to the maximum depth."""

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        return torch.zeros(h.shape[0], dtype=torch.bool, device=h.device)
