"""The looped latent dynamics: prelude, ONE shared block applied again and again, coda."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import Coda, Depth, DynamicsOutput, Prelude, relative_step
from loopwm.dynamics.cell import LoopCell, PreparedLoop
from loopwm.dynamics.depth import DepthSchedule, sample_depths
from loopwm.dynamics.halting import HaltingRule, ResidualHalting
from loopwm.dynamics.unroll import unroll


class LoopedDynamics(nn.Module):
    """z' = latent_norm(z + C h[T]) with h[t+1] = Abar h[t] + Bbar e + Rbar(h[t], e), e = LayerNorm(P [z; a]).

    Equations 3-8 of 2606.18208 (after Parcae, 2604.12946) with the block made a contraction in h; see
    ``LoopCell``. The number of loops T is a free choice of every call:

    - ``depth`` an int: exactly that many loops, also beyond ``max_loops``;
    - ``depth`` a (B,) integer tensor (or a ``DepthSchedule`` made from one): one depth per sample;
    - ``depth`` None: adaptive; each sample stops by ``halting``, within [min_loops, max_loops].

    Args:
        latent_dim: Z. action_dim: A. hidden_dim: D, width of h. block_dim: inner width of the block (default 2 D).
        mean_loops: mean of the training depths. max_loops: cap of the sampled and of the adaptive depth.
        min_loops: floor of both. depth_sampler: ``poisson``, ``uniform`` or ``fixed``.
        halting: rule of the adaptive depth; default: relative residual below ``halt_tolerance``.
        latent_norm: the module that normalises latents (the encoder's). The rest: see ``LoopCell``.

    Raises:
        ValueError: unless 1 <= min_loops <= mean_loops <= max_loops; unknown mode, injection or activation.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        hidden_dim: int,
        mean_loops: int = 4,
        max_loops: int = 8,
        *,
        min_loops: int = 1,
        block_dim: int | None = None,
        prelude_layers: int = 1,
        mode: str = "certified",
        gamma: float = 0.95,
        injection: str = "zoh",
        activation: str = "relu",
        depth_sampler: str = "poisson",
        halt_tolerance: float = 0.01,
        halting: HaltingRule | None = None,
        latent_norm: nn.Module | None = None,
    ):
        super().__init__()
        if not 1 <= min_loops <= mean_loops <= max_loops:
            raise ValueError(
                f"need 1 <= min_loops <= mean_loops <= max_loops, got {min_loops}, {mean_loops}, {max_loops}"
            )
        self.state_dim, self.min_loops, self.mean_loops, self.max_loops = hidden_dim, min_loops, mean_loops, max_loops
        self.depth_sampler = depth_sampler
        self.halting: HaltingRule = halting or ResidualHalting(halt_tolerance)
        self.prelude = Prelude(latent_dim, action_dim, hidden_dim, prelude_layers)
        self.start = nn.Linear(latent_dim, hidden_dim, bias=False) if latent_dim != hidden_dim else nn.Identity()
        self.cell = LoopCell(hidden_dim, block_dim or 2 * hidden_dim, mode, gamma, injection, activation)
        self.coda = Coda(hidden_dim, latent_dim, latent_norm)

    def forward(self, z: Tensor, action: Tensor, depth: Depth = None) -> DynamicsOutput:
        """Predict the next latent: z (B, Z), action (B, A) -> ``DynamicsOutput``.

        Raises:
            ValueError: depth < 1, or a depth tensor whose length is not B.
        """
        loop = self.cell.prepare(self.prelude(z, action))
        h = self.start(z)  # (B, D)
        if depth is None:
            h, loops, residual = self._loop_adaptive(loop, h)
        elif isinstance(depth, int):
            h, loops, residual = self._loop_exact(loop, h, depth)
        elif not isinstance(depth, (torch.Tensor, DepthSchedule)):
            raise ValueError(f"depth must be an int, a (B,) integer tensor, a DepthSchedule or None, got {depth!r}")
        else:
            schedule = depth if isinstance(depth, DepthSchedule) else DepthSchedule(depth)
            if len(schedule) != z.shape[0]:
                raise ValueError(f"depth has {len(schedule)} entries for a batch of {z.shape[0]}")
            h, loops, residual = self._loop_scheduled(loop, h, schedule)
        return DynamicsOutput(self.coda(z, h), h, loops, residual)

    def _loop_exact(self, loop: PreparedLoop, h: Tensor, depth: int) -> tuple[Tensor, Callable, Callable]:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        previous = h
        for _ in range(depth):
            previous, h = h, loop(h)
        batch, device = h.shape[0], h.device
        return h, lambda: torch.full((batch,), depth, device=device), lambda: relative_step(h, previous)

    def _loop_scheduled(
        self, loop: PreparedLoop, h: Tensor, schedule: DepthSchedule
    ) -> tuple[Tensor, Callable, Callable]:
        """Mixed depths, deepest samples first: each loop runs on a shrinking head of the batch."""
        device = h.device  # a schedule drawn on the CPU serves a model elsewhere
        order = None if schedule.order is None else schedule.order.to(device)
        if order is not None:
            loop, h = loop.select(order), h.index_select(0, order)
        if loop.activation is not torch.relu:
            final, states = self._unroll_plain(loop, h, schedule.active)
        else:
            final, states = unroll(h, loop, schedule.active)  # (B, D), deepest first
        if order is not None:
            final = final.index_select(0, schedule.inverse.to(device))
        last = schedule.last_rows
        return final, lambda: schedule.loops.to(device), lambda: relative_step(final, states[last().to(device)])

    @staticmethod
    def _unroll_plain(loop: PreparedLoop, h: Tensor, active: list[int]) -> tuple[Tensor, Tensor]:
        """What ``unroll`` does, by autograd alone: for other activations, and to test it against."""
        states = []
        for rows in active:
            states.append(h[:rows])
            h = torch.cat([loop.first(rows)(h[:rows]), h[rows:]])
        return h, torch.cat(states)

    def _loop_adaptive(self, loop: PreparedLoop, h: Tensor) -> tuple[Tensor, Callable, Callable]:
        """Loop until the halting rule stops each sample; finished rows leave the batch, so they cost nothing more."""
        batch = h.shape[0]
        final, last = h.clone(), h.clone()  # rows are filled as samples finish; `last` is the state one loop earlier
        loops = torch.zeros(batch, dtype=torch.int64, device=h.device)
        index: Tensor | None = None  # rows of the batch still running; None: all
        for t in range(1, self.max_loops + 1):
            previous, h = h, loop(h)
            if t < self.min_loops:
                continue
            halted = self.halting(h, previous)
            if t == self.max_loops:
                halted = torch.ones_like(halted)
            if not halted.any():
                continue
            gone = halted.nonzero().squeeze(1)
            rows = gone if index is None else index[gone]
            final = final.index_copy(0, rows, h[gone])
            last = last.index_copy(0, rows, previous[gone])
            loops[rows] = t
            stay = (~halted).nonzero().squeeze(1)
            if stay.numel() == 0:
                break
            index = stay if index is None else index[stay]
            h, loop = h[stay], loop.select(stay)
        return final, lambda: loops, lambda: relative_step(final, last)

    def sample_depth(self, batch: int, generator: torch.Generator | None = None) -> Depth:
        """One training depth per sequence, as a schedule that a whole rollout re-uses (an int when it is fixed)."""
        if self.depth_sampler == "fixed":
            return self.mean_loops
        depths = sample_depths(self.depth_sampler, batch, self.mean_loops, self.min_loops, self.max_loops, generator)
        return DepthSchedule(depths)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the parameters do not change (see ``LoopCell.frozen``)."""
        return self.cell.frozen()

    def lipschitz_bound(self) -> float:
        """True upper bound on the contraction factor rho of one loop, by exact singular values."""
        return self.cell.lipschitz_bound()

    def distance_to_fixed_point(self, h: Tensor, step: Tensor) -> Tensor:
        """Certified bound (B,) on ||h - h*||, given h (B, D) and the step (B, D) that led to it (Banach).

        Infinite where the cell is not certified to contract.
        """
        rho = self.lipschitz_bound()
        size = torch.linalg.vector_norm(step, dim=-1)
        return size * (rho / (1.0 - rho)) if rho < 1.0 else torch.full_like(size, torch.inf)

    @torch.no_grad()
    def measured_contraction(self, z: Tensor, action: Tensor, loops: int | None = None) -> float:
        """Largest ||h[t+1] - h[t]|| / ||h[t] - h[t-1]|| over the batch and the first ``loops`` loops.

        A lower bound on the true factor of one loop, so never above ``lipschitz_bound()`` when certified.
        """
        loop, h = self.cell.prepare(self.prelude(z, action)), self.start(z)
        step, worst = None, 0.0
        for _ in range(loops or self.max_loops):
            h_next = loop(h)
            size = torch.linalg.vector_norm(h_next - h, dim=-1)
            if step is not None:
                # Steps near float32 rounding say nothing about the map.
                sound = step > 1e-4 * torch.linalg.vector_norm(h, dim=-1).clamp_min(1e-3)
                if sound.any():
                    worst = max(worst, float((size[sound] / step[sound]).max()))
            step, h = size, h_next
        return worst
