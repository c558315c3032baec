"""What enters the next loop: the last state itself (plain iteration), or a mixture of the last few (Anderson).

The packages on PyPI that have both Anderson acceleration and implicit gradients for torch, torchdeq (one release,
0.1.0) and xitorch (0.5.1), have no per-sample exit from the batch and are dependencies that ``loopwm.dynamics`` may not
have: so they are written here, small.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from loopwm.dynamics.base import sample_norm


class SolverRun(Protocol):
    """The solver in one prediction: ``run(x, fx)`` is what enters the next loop, after x (n, ...) gave fx (n, ...).

    ``keep(index)``: only the samples ``index`` (n,) go on.
    """

    def __call__(self, x: Tensor, fx: Tensor) -> Tensor: ...

    def keep(self, index: Tensor) -> None: ...


class PlainSolver:
    """x[t+1] = f(x[t]). Keeps nothing, so it is its own run."""

    def begin(self, order: float = 2.0) -> SolverRun:
        """The run of one prediction; the norm makes no difference to it."""
        return self

    def __call__(self, x: Tensor, fx: Tensor) -> Tensor:
        return fx

    def keep(self, index: Tensor) -> None:
        """Nothing to keep."""


class AndersonSolver:
    """Anderson acceleration, type II (Walker and Ni 2011, SIAM J. Numer. Anal. 49, section 2), sample by sample.

    With r = f(x) - x and the last m differences dr, df between evaluations, x[t+1] = f(x[t]) - sum_i g_i df_i where g
    minimises |r - sum_i g_i dr_i|. Each sample has its own g and its own history: nothing depends on the rest of the
    batch.

    Safe: an evaluation whose residual did not fall forgets its sample's history and goes on from f of the best state
    so far, which is a plain step. Where f contracts in the norm of ``order`` no two evaluations in a row fail, the
    best residual never rises, and after a failure it falls by the contraction factor at least. Without that, folded
    maps exist on which the mixture never converges. A plain step is always taken: where f does not contract, the
    iteration goes on, and no state is evaluated twice.

    Args:
        memory: m, differences kept. ridge: weight of |g|^2 in the least squares, relative to the mean square of dr.

    Raises:
        ValueError: memory < 1 or ridge <= 0.
    """

    def __init__(self, memory: int = 5, ridge: float = 1e-8):
        if memory < 1 or ridge <= 0:
            raise ValueError(f"Anderson acceleration needs memory >= 1 and ridge > 0, got {memory}, {ridge}")
        self.memory, self.ridge = memory, ridge

    def begin(self, order: float = 2.0) -> SolverRun:
        """The run of one prediction, which judges progress in the norm of an ``order`` (2: Euclidean, inf, 1)."""
        return _AndersonRun(self.memory, self.ridge, order)


class _AndersonRun:
    """History of the running samples. ``best`` is also the evaluation that differences are taken against."""

    def __init__(self, memory: int, ridge: float, order: float):
        self.memory, self.ridge, self.order, self.count = memory, ridge, order, 0
        self.best: list[Tensor] = []  # f(x) (n, S), r (n, S), |r| (n,), whether a plain step follows (n,)
        self.history: list[Tensor] = []  # df, dr, each (n, m, S)

    def __call__(self, x: Tensor, fx: Tensor) -> Tensor:
        f = fx.flatten(1)  # (n, S)
        r = (fx - x).flatten(1)
        size = sample_norm(r, self.order).detach()  # (n,)
        if not self.best:
            self.best = [f, r, size, torch.ones_like(size, dtype=torch.bool)]
            self.history = [f.new_zeros(f.shape[0], self.memory, f.shape[1]) for _ in range(2)]
            return fx
        better = size < self.best[2]  # also False where a step left the finite numbers
        taken = better | (self.best[3] & size.isfinite())
        fresh, new = better.unsqueeze(1), taken.unsqueeze(1)  # (n, 1)
        differences = [torch.where(fresh, a - b, 0.0) for a, b in zip((f, r), self.best, strict=False)]
        slot = self.count % self.memory
        self.count += 1
        self.history = [
            torch.cat([h[:, :slot], d.unsqueeze(1), h[:, slot + 1 :]], 1) * fresh.unsqueeze(2)
            for h, d in zip(self.history, differences, strict=True)
        ]
        f, r = torch.where(new, f, self.best[0]), torch.where(new, r, self.best[1])
        self.best = [f, r, torch.where(taken, size, self.best[2]), ~better]
        weights = self._weights(self.history[1].detach(), r.detach())  # (n, m)
        return (f - (weights.unsqueeze(1) @ self.history[0]).squeeze(1)).view_as(fx)

    def _weights(self, dr: Tensor, r: Tensor) -> Tensor:
        """argmin_g |r - sum_i g_i dr_i|^2 + ridge |g|^2, with dr scaled to unit rows; zero rows get weight zero."""
        scale = torch.linalg.vector_norm(dr, dim=-1).clamp_min(torch.finfo(r.dtype).tiny)  # (n, m)
        unit = dr / scale.unsqueeze(2)
        ridge = max(self.ridge, 10 * torch.finfo(r.dtype).eps)
        gram = unit @ unit.mT + ridge * torch.eye(self.memory, dtype=r.dtype, device=r.device)  # (n, m, m)
        right = unit @ r.unsqueeze(2)  # (n, m, 1)
        wide = torch.promote_types(gram.dtype, torch.float32)
        lower = torch.linalg.cholesky_ex(gram.to(wide))[0]
        return torch.cholesky_solve(right.to(wide), lower).to(r.dtype).squeeze(2) / scale

    def keep(self, index: Tensor) -> None:
        self.best = [tensor.index_select(0, index) for tensor in self.best]
        self.history = [tensor.index_select(0, index) for tensor in self.history]


SOLVERS: dict[str, type] = {"plain": PlainSolver, "anderson": AndersonSolver}
