"""One dynamics applied several times in turn, each time to the latent that it has just predicted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import Depth, DynamicsOutput
from loopwm.dynamics.depth import DepthSchedule
from loopwm.dynamics.halting.steps import PredictionHalting

Split = Callable[[Tensor], tuple[Tensor, Tensor]]


class RepeatedDynamics(nn.Module):
    """z[i + 1] = f(z[i], a') for i = 0 .. n - 1, with f any dynamics, a' and n read off the action; z' = z[n].

    For steps whose action says how many equal ones they are made of, such as one that is held for n control steps; of
    vectors z (B, Z) or grids (B, Z, S, S).

    The loops of ``LoopedDynamics`` read z once and carry h; here it is the latent that is carried from one application
    to the next: a plain recurrence in z, whose step f may loop by itself. Samples that are done leave the batch.

    The output's ``h`` (B, 2 D, ...) is the state of the last application and, divided by ``most``, the sum of all, off
    which what adds up on the way (a reward) can be read. ``loops`` are those of all applications together, ``residual``
    is of the last one, the penalty of mode ``soft`` the mean over all; earlier loops are not kept
    (``DynamicsOutput.at``).

    Args:
        step: f, looped or not (see ``Dynamics``), of z (B, Z) and a' (B, A').
        split: action (B, A) -> (a' (B, A'), n (B,) int64, at least 1).
        most: the largest n.

    Raises:
        ValueError: f halts by the prediction of a world model's heads, which read the whole ``h`` and not f's.
    """

    def __init__(self, step: nn.Module, split: Split, most: int):
        super().__init__()
        if any(isinstance(rule, PredictionHalting) and rule.readout is None for rule in step.modules()):
            raise ValueError("repeated dynamics cannot halt by the prediction of a world model, which reads all of h")
        self.step, self.split, self.most = step, split, most
        self.state_dim = 2 * step.state_dim
        self.mean_loops, self.max_loops = step.mean_loops, step.max_loops  # of one application

    def forward(self, z: Tensor, action: Tensor, depth: Depth = None, h0: Tensor | None = None) -> DynamicsOutput:
        """Predict the next latent: z (B, Z), action (B, A) -> ``DynamicsOutput``; ``depth`` is of every application.

        Raises:
            ValueError: h0, since a state that f would start from is of one application; n < 1 or above ``most``; as f.
        """
        if h0 is not None:
            raise ValueError("repeated dynamics start every application anew and take no h0")
        once, times = self.split(action)
        plan = DepthSchedule(_counts(times, len(z), self.most))
        if isinstance(depth, (Tensor, DepthSchedule)):
            depth = DepthSchedule.of(depth, len(z)).loops.to(z.device)  # it may have been drawn on the CPU
        if plan.order is not None:
            z, once, depth = z[plan.order], once[plan.order], _rows(depth, plan.order)
        outs: list[DynamicsOutput] = []
        for going in plan.active:  # the first rows are those that need the most
            outs.append(self.step(z[:going], once[:going], _rows(depth, slice(going))))
            z = outs[-1].z_next

        def last(each: list[Tensor]) -> Tensor:
            """(B, ...) of what each application left (going, ...), what every sample's own last one did."""
            ends = [x[rows:] for x, rows in zip(each, [*plan.active[1:], 0], strict=True)]
            whole = torch.cat(ends[::-1])
            return whole if plan.order is None else whole[plan.inverse]

        def total(each: list[Tensor]) -> Tensor:
            """(B, ...) the sum over each sample's own applications."""
            sums = each[:1]
            for x in each[1:]:
                sums.append(sums[-1][: len(x)] + x)
            return last(sums)

        def penalty(generator: torch.Generator | None) -> Tensor:
            return total([out.jacobian_penalty(generator) for out in outs]) / times

        states = [out.h for out in outs]
        return DynamicsOutput(
            last([out.z_next for out in outs]),
            torch.cat([last(states), total(states) / self.most], 1),
            lambda: total([out.loops for out in outs]),
            lambda: last([out.residual for out in outs]),
            penalty=penalty if outs[0].penalised else None,
        )

    def sample_depth(self, batch: int, generator: torch.Generator | None = None) -> Depth:
        """As ``step`` draws it; one draw serves all applications."""
        return self.step.sample_depth(batch, generator)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the parameters do not change."""
        return self.step.frozen()

    def lipschitz_bound(self) -> float:
        """That of a loop of ``step``: nothing is promised of the recurrence in z."""
        return self.step.lipschitz_bound()

    def measured_contraction(self, z: Tensor, action: Tensor, loops: int | None = None) -> float:
        """That of a loop of ``step``, in the first application."""
        return self.step.measured_contraction(z, self.split(action)[0], loops)


def _counts(times: Tensor, batch: int, most: int) -> Tensor:
    """``times`` as ``split`` gave them. Raises ValueError unless each sample has a whole number of them, 1 to most."""
    whole = isinstance(times, Tensor) and not (times.is_floating_point() or times.dtype == torch.bool)
    if not whole or times.shape != (batch,):
        got = f"{tuple(times.shape)} {times.dtype}" if isinstance(times, Tensor) else repr(times)
        raise ValueError(f"split must give a whole number of applications for each of {batch} samples, got {got}")
    if batch and not 1 <= int(times.min()) <= int(times.max()) <= most:
        raise ValueError(f"a step is repeated 1 to {most} times, got {int(times.min())} to {int(times.max())}")
    return times


def _rows(depth: Depth, rows: Tensor | slice) -> Depth:
    """The depth of some samples, where each has its own."""
    return depth[rows] if isinstance(depth, Tensor) else depth
