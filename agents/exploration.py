"""Exploration noise that is correlated from step to step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class CorrelatedNoise:
    """Standard normal noise with correlation ``rho`` between steps, AR(1), restarted where an episode begins."""

    def __init__(self, rho: float):
        self.rho = rho
        self.state: Tensor | None = None  # (N, A), the last noise

    def __call__(self, like: Tensor, first: np.ndarray | None, generator: torch.Generator) -> Tensor:
        """The next noise (N, A), shaped as ``like``; first: (N,) bool, where an episode begins."""
        fresh = torch.randn(like.shape, generator=generator, device=like.device)
        if self.state is None or self.state.shape != fresh.shape:
            self.state = fresh
            return fresh
        self.state = self.rho * self.state + (1.0 - self.rho**2) ** 0.5 * fresh
        if first is not None and first.any():
            begins = torch.as_tensor(first, device=like.device).unsqueeze(1)
            self.state = torch.where(begins, fresh, self.state)
        return self.state
