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


class HeldActions:
    """Now and then, in place of what is chosen, one random action held for a while.

    Temporally extended epsilon-greedy exploration (Dabney et al. 2021, 2006.01782), with lengths drawn alike from 1 to
    2 ``mean`` - 1: noise of a few steps' memory leaves a place much more slowly than one push that lasts.

    Args:
        share: of the steps, in [0, 1). mean: length, agent steps.
    """

    def __init__(self, share: float, mean: int):
        self.begin, self.longest = share / (share + (1.0 - share) * mean), 2 * mean - 1  # so many idle steps between
        self.state: tuple[Tensor, Tensor] | None = None  # steps left (N,), the action that is held (N, A)

    def __call__(self, action: Tensor, first: np.ndarray | None, fresh: Tensor, generator: torch.Generator) -> Tensor:
        """The held actions where there are some, else action (N, A); the state becomes that of the next step.

        ``fresh`` (N, A): random actions, to be held where one begins. first: (N,) bool, where an episode begins.
        """
        rows, device = len(action), action.device
        left, held = self.state or (torch.zeros(rows, dtype=torch.long, device=device), fresh)
        if first is not None:
            left = left.masked_fill(torch.as_tensor(first, device=device), 0)
        begins = (left == 0) & (torch.rand(rows, generator=generator, device=device) < self.begin)
        length = torch.randint(1, self.longest + 1, (rows,), generator=generator, device=device)
        left, held = torch.where(begins, length, left), torch.where(begins.unsqueeze(1), fresh, held)
        self.state = ((left - 1).clamp_min(0), held)
        return torch.where((left > 0).unsqueeze(1), held, action)
