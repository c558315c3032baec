"""How many loops each sequence gets in training, and how a batch of mixed depths is run without waste."""

from __future__ import annotations

import torch
from torch import Tensor


class DepthSchedule:
    """A batch's depths, sorted so that the samples still looping are always the first rows.

    Finished samples are frozen by leaving the batch: loop t runs on ``active[t]`` rows only, so a batch of mixed
    depths costs its mean depth, not its maximum. Build it once per update; every step of a rollout re-uses it.

    Args:
        depth: (B,) integers >= 1, any order. A descending order (what the samplers give) needs no permutation.

    Raises:
        ValueError: a depth below one, no depth at all, or a tensor that is not one-dimensional.
    """

    def __init__(self, depth: Tensor):
        if depth.numel() == 0:
            raise ValueError("depth must hold one integer for each sample, got none")
        if depth.ndim != 1 or depth.is_floating_point() or depth.dtype == torch.bool:
            raise ValueError(f"depth must be a (B,) tensor of integers, got {tuple(depth.shape)} {depth.dtype}")
        values = depth.cpu()
        if int(values.min()) < 1:
            raise ValueError(f"depth must be at least 1, got {int(values.min())}")
        self.loops = depth.long().clone()  # (B,) in the caller's order; the caller's own may change
        self.order: Tensor | None = None
        if bool((values[1:] > values[:-1]).any()):
            self.order = values.argsort(descending=True, stable=True).to(depth.device)
            self.inverse = self.order.argsort()
            values = values[self.order.cpu()]
        # active[t] = number of samples whose depth exceeds t, for t = 0 .. max depth - 1
        counts = torch.bincount(values)  # (max + 1,)
        self.active: list[int] = counts.flip(0).cumsum(0).flip(0)[1:].tolist()

    @classmethod
    def of(cls, depth: Tensor | DepthSchedule, batch: int) -> DepthSchedule:
        """The schedule of a (B,) tensor of depths, or the given one. Raises ValueError: not of ``batch`` samples."""
        schedule = depth if isinstance(depth, DepthSchedule) else cls(depth)
        if len(schedule) != batch:
            raise ValueError(f"depth has {len(schedule)} entries for a batch of {batch}")
        return schedule

    def rows(self, loop: Tensor) -> Tensor:
        """(B,) where loop number ``loop`` (B,), from 0, of each sample stands among the rows of all loops."""
        starts = torch.tensor([0, *self.active]).cumsum(0).to(self.loops.device)  # row where loop t begins
        position = torch.arange(len(self), device=self.loops.device) if self.order is None else self.inverse
        return starts[loop.to(self.loops.device)] + position

    def __len__(self) -> int:
        return self.loops.shape[0]


def _poisson(batch: int, mean: int, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    """clip(Poisson(mean), low, high): the depth prior of 2606.18208, equation 9."""
    return torch.poisson(torch.full((batch,), float(mean)), generator=generator).long().clamp(low, high)


RATE_SIGMA = 0.5  # of the log of the rate


def _lognormal_poisson(batch: int, mean: int, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    """clip(1 + Poisson(rate), low, high), log rate ~ N(log(mean - 1) - sigma^2 / 2, sigma), sigma = 1/2.

    Geiping et al. 2025 (2502.05171, section 3.3). The shift makes the rate's mean ``mean - 1``, so before clipping
    the mean is ``mean``: most draws lie below it, and a heavy tail trains deep loops now and then.
    """
    noise = torch.randn(batch, generator=generator)
    rate = (mean - 1) * torch.exp(RATE_SIGMA * noise - 0.5 * RATE_SIGMA**2)  # (batch,)
    return (1 + torch.poisson(rate, generator=generator).long()).clamp(low, high)


def _uniform(batch: int, mean: int, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    """U{low .. 2 mean - low}, capped at high: its mean is ``mean`` where the cap does not bind."""
    top = min(max(2 * mean - low, low), high)
    return torch.randint(low, top + 1, (batch,), generator=generator)


def _fixed(batch: int, mean: int, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    return torch.full((batch,), mean)


DEPTH_SAMPLERS = {
    "poisson": _poisson,
    "lognormal_poisson": _lognormal_poisson,
    "uniform": _uniform,
    "fixed": _fixed,
}


def check_sampler(name: str) -> None:
    """Raises ValueError, with the names there are, for an unknown depth sampler."""
    if name not in DEPTH_SAMPLERS:
        raise ValueError(f"unknown depth sampler {name!r}; choose from {', '.join(DEPTH_SAMPLERS)}")


def sample_depths(
    sampler: str, batch: int, mean: int, low: int, high: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one depth per sequence, (batch,) int64, sorted descending (rows of a replay batch are exchangeable).

    Raises:
        ValueError: unknown sampler name.
    """
    check_sampler(sampler)
    return DEPTH_SAMPLERS[sampler](batch, mean, low, high, generator).sort(descending=True).values


def earlier_loops(loops: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One random earlier loop per sample, (B,) int64: uniform on {1 .. loops - 1}, and 1 where loops (B,) is 1."""
    share = torch.rand(loops.shape[0], generator=generator).to(loops.device)
    return 1 + (share * (loops - 1)).long()
