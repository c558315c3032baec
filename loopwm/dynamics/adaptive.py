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

    Finished rows leave the batch when they are more than ``loop.waiting`` of it. Vectors leave at once: with D = 64 on
    one CPU core taking them out costs 7 to 9 us up to 128 rows and 16 us at 512, a row left in costs 0.34 us a loop and
    the mask it needs 3 us, so waiting gains at most a few per cent of a prediction, at 4 to 16 rows, and loses
    everywhere else. Convolutions wait: see ``ConvLoop``.
    """
    left = len(h)  # samples that have not finished
    if not left:
        return LoopResult(h, lambda: h, lambda: torch.zeros(0, dtype=torch.int64, device=h.device))
    done: list[tuple[Tensor, Tensor, Tensor, int]] = []  # rows, their states after and before their last loop, its t
    index: Tensor | None = None  # rows of the batch that are still looped; None: all
    running: Tensor | None = None  # (n,) bool, those of them that have not finished; None: all
    for t in range(1, high + 1):
        previous, h = h, loop(h)
        halted = _checked(rule(h, previous), len(h)) if t >= low or rule.sees_every_loop else None
        if t == high:
            halted = torch.ones(h.shape[0], dtype=torch.bool, device=h.device)
        if halted is not None and running is not None:
            halted = halted & running
        if t < low or not halted.any():
            h = solver(previous, h)
            continue
        rows = halted.nonzero().squeeze(1)
        done.append((rows if index is None else index[rows], h[rows], previous[rows], t))
        left -= len(rows)
        if not left:
            break
        running = ~halted if running is None else running & ~halted
        h = solver(previous, h)
        if len(h) - left > loop.waiting * len(h):
            stay = running.nonzero().squeeze(1)
            index, running, h = stay if index is None else index[stay], None, h[stay]
            loop = loop.select(stay)
            rule.keep(stay)
            solver.keep(stay)
    rows, after, before, at = zip(*done, strict=True)
    place = torch.cat(rows).argsort()  # (B,) where each sample's own stand
    each = torch.tensor([len(some) for some in rows])
    return LoopResult(
        torch.cat(after)[place],
        lambda: torch.cat(before)[place],
        lambda: torch.tensor(at).repeat_interleave(each).to(place.device)[place],
    )


def _checked(halted: Tensor, samples: int) -> Tensor:
    """What a rule answered for so many samples. Raises TypeError unless it is a (n,) tensor of bool."""
    if not isinstance(halted, Tensor) or halted.dtype is not torch.bool or halted.shape != (samples,):
        got = f"{tuple(halted.shape)} of {halted.dtype}" if isinstance(halted, Tensor) else repr(halted)
        raise TypeError(f"a halting rule answers with a ({samples},) tensor of bool, got {got}")
    return halted
