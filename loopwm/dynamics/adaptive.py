"""Adaptive depth: loop until a rule stops each sample. Finished rows leave the batch, so they cost nothing more."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loopwm.dynamics.halting.rule import HaltingRun
from loopwm.dynamics.solvers import SolverRun


class LoopResult(NamedTuple):
    """What a pass through the loop leaves behind."""

    h: Tensor  # (B, ...) state after each sample's last loop
    previous: Callable[[], Tensor]  # -> (B, ...) the state that entered it
    loops: Callable[[], Tensor]  # -> (B,) int64
    at: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # loops (B,) -> the states after and before that loop


def loop_adaptive(loop: Callable, h: Tensor, rule: HaltingRun, solver: SolverRun, low: int, high: int) -> LoopResult:
    """Apply ``loop`` to h (B, ...) until ``rule`` stops each sample, after ``low`` loops at least and ``high`` at most.

    ``loop.select(index)`` is the same loop on some of its samples. The result is always the output of the block, also
    where the solver chose what entered it: that is what the rules' bounds speak of.

    Rows leave at once, whatever the size of the batch: with D = 64 on one CPU core taking them out costs 7 to 9 us up
    to 128 rows and 16 us at 512, a row left in costs 0.34 us a loop and the mask it needs 3 us, so waiting gains at
    most a few per cent of a prediction, at 4 to 16 rows, and loses everywhere else.
    """
    batch = h.shape[0]
    final, last = h.clone(), h.clone()  # rows are filled as samples finish; `last` is the state one loop earlier
    loops = torch.zeros(batch, dtype=torch.int64, device=h.device)
    index: Tensor | None = None  # rows of the batch still running; None: all
    for t in range(1, high + 1):
        previous, h = h, loop(h)
        halted = _checked(rule(h, previous), len(h)) if t >= low or rule.sees_every_loop else None
        if t == high:
            halted = torch.ones(h.shape[0], dtype=torch.bool, device=h.device)
        if t < low or not halted.any():
            h = solver(previous, h)
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
        h = solver(previous, h)[stay]
        loop = loop.select(stay)
        rule.keep(stay)
        solver.keep(stay)
    return LoopResult(final, lambda: last, lambda: loops)


def _checked(halted: Tensor, samples: int) -> Tensor:
    """What a rule answered for so many samples. Raises TypeError unless it is a (n,) tensor of bool."""
    if not isinstance(halted, Tensor) or halted.dtype is not torch.bool or halted.shape != (samples,):
        got = f"{tuple(halted.shape)} of {halted.dtype}" if isinstance(halted, Tensor) else repr(halted)
        raise TypeError(f"a halting rule answers with a ({samples},) tensor of bool, got {got}")
    return halted
