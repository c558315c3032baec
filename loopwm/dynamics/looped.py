"""The looped latent dynamics: prelude, ONE shared block applied again and again, coda.

The way of a prediction: ``forward`` -> ``gradient`` (how gradients come back: gradients.py) -> ``run_loops`` -> plain
loops, an unrolled schedule of mixed depths (unroll.py, where training spends its time) or ``loop_adaptive``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from loopwm.dynamics.adaptive import LoopResult, loop_adaptive
from loopwm.dynamics.architecture import Architecture
from loopwm.dynamics.base import Depth, DynamicsOutput, banach_distance, first_state, relative_step, sample_norm
from loopwm.dynamics.cell import CERTIFIED, MODES, Cell, Loop
from loopwm.dynamics.depth import DepthSchedule, check_sampler, sample_depths
from loopwm.dynamics.gradients import GRADIENTS
from loopwm.dynamics.halting import HaltingRule, make_halting
from loopwm.dynamics.halting.rule import whole
from loopwm.dynamics.penalty import jacobian_penalty
from loopwm.dynamics.solvers import SOLVERS
from loopwm.dynamics.spectral import autocasts
from loopwm.dynamics.unroll import unroll, unroll_plain


class LoopedDynamics(nn.Module):
    """z' = latent_norm(z + C h[T]) with h[t+1] = Abar h[t] + Bbar e + Rbar(h[t], e), e = LayerNorm(P [z; a]).

    After equations 4-8 of 2606.18208 (and Parcae, 2604.12946), with the block made a contraction in h (see ``Cell``), z
    in the place of the state carried over and of a random h0, a diagonal Bbar by the exact zero-order hold (``euler``
    is the published one), a coda that adds a step to z, and blocks of several kinds. The number of loops T is a free
    choice of every call:

    - ``depth`` an int: exactly that many loops, also beyond ``max_loops``;
    - ``depth`` a (B,) integer tensor (or a ``DepthSchedule`` made from one): one depth per sample;
    - ``depth`` None: adaptive; each sample stops by ``halting``, within [min_loops, max_loops]; ``solver`` says what
      enters the next loop.

    Second derivatives by z and action are exact where all samples go equally deep, or adaptively; those that would go
    through normalised weights, several depths at once, block ``rank`` or implicit gradients raise RuntimeError. Under
    autocast weights are folded, and bounds computed, in full precision; loops then multiply by these rounded to 16
    bits, which may stretch a little further (1.7 % was built for one matrix of width 64): the bound is not of autocast.
    Transforms of ``torch.func`` work inside ``with dynamics.frozen():``, but for block ``rank``, and for vectors whose
    samples go unequally deep. Save its ``state_dict()``: a parametrised module cannot be pickled.

    Args:
        latent_dim: Z. action_dim: A. hidden_dim: D, width of h.
        mean_loops: mean of the training depths. max_loops: cap of the sampled and of the adaptive depth.
        min_loops: floor of both. depth_sampler: a name in ``DEPTH_SAMPLERS``.
        halting: rule of the adaptive depth, a name in ``HALTING``, a class of rules or a rule. halt_tolerance: the one
        number of a rule given by name or class. patience: loops in a row for which the rule must hold.
        solver: a name in ``SOLVERS``, for adaptive depth and for implicit gradients; an asked-for depth is always that
        many plain loops. gradient: a name in ``GRADIENTS``.
        architecture: the fields of ``Architecture`` by name, ``block="conv"`` for grids, say.

    Raises:
        TypeError: an unknown field.
        ValueError: unless 1 <= min_loops <= mean_loops <= max_loops; unknown names; halting ``certified`` or gradient
        ``implicit`` in a mode that is not certified.
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
        depth_sampler: str = "poisson",
        halt_tolerance: float = 0.01,
        halting: str | type[HaltingRule] | HaltingRule = "residual",
        patience: int = 1,
        solver: str = "plain",
        gradient: str = "unrolled",
        **architecture: Any,
    ):
        super().__init__()
        for loops, name in ((min_loops, "min_loops"), (mean_loops, "mean_loops"), (max_loops, "max_loops")):
            whole(loops, name)
        if not min_loops <= mean_loops <= max_loops:
            raise ValueError(
                f"need 1 <= min_loops <= mean_loops <= max_loops, got {min_loops}, {mean_loops}, {max_loops}"
            )
        for name, known, what in ((solver, SOLVERS, "solver"), (gradient, GRADIENTS, "gradient")):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
        check_sampler(depth_sampler)
        self.state_dim, self.min_loops, self.mean_loops, self.max_loops = hidden_dim, min_loops, mean_loops, max_loops
        self.depth_sampler = depth_sampler
        parts = Architecture.of(latent_dim, action_dim, hidden_dim, **architecture)
        self.prelude, self.start = parts.make_prelude(), parts.make_start()
        self.cell, self.coda = parts.make_block(), parts.make_coda()
        self._bound: tuple[list[Tensor], list[float], float] | None = None  # weights and gammas, and their bound
        self.solver, self.gradient = SOLVERS[solver](), GRADIENTS[gradient]()
        self.gradient.check(self)
        self.halting = make_halting(halting, self, halt_tolerance, patience)

    def forward(self, z: Tensor, action: Tensor, depth: Depth = None, h0: Tensor | None = None) -> DynamicsOutput:
        """Predict the next latent: z (B, Z), action (B, A), or as the block says (``Architecture``).

        ``h0`` (B, ...) is the state to start from instead of the one made from z: a warm start, such as the last state
        of the prediction before. A certified loop has one fixed point, so there it changes how soon that is reached;
        at a depth too small to reach it, h0 becomes a memory beside z.

        Raises:
            ValueError: depth < 1, a depth tensor whose length is not B, h0 of another shape than the state, or (block
            ``mlp``) z or action of another width.
        """
        stages = self.cell.stages(self.prelude(z, action))
        h, results = first_state(self.start, z, h0), []
        for loop in stages:
            results.append(self.gradient(self, loop, h, depth, z))
            h = results[-1].h
        return self._output(z, _joined(results), self._penalty(stages, results))

    def _output(self, z: Tensor, result: LoopResult, penalty: Callable | None = None) -> DynamicsOutput:
        h, previous, loops, at = result

        def earlier(count: Tensor) -> DynamicsOutput:
            state, before = at(count)
            return self._output(z, LoopResult(state, lambda: before, lambda: count))

        def residual() -> Tensor:
            return relative_step(h, previous())

        return DynamicsOutput(self.coda(z, h), h, loops, residual, None if at is None else earlier, penalty)

    def _penalty(self, stages: list[Loop], results: list[LoopResult]) -> Callable | None:
        if not MODES[self.cell.mode].penalised:
            return None
        ends = [result.h for result in results]

        def penalty(generator: torch.Generator | None) -> Tensor:
            each = [jacobian_penalty(loop, h, generator) for loop, h in zip(stages, ends, strict=True)]
            return torch.stack(each).mean(0)  # (B,)

        return penalty

    def run_loops(self, loop: Loop, h: Tensor, depth: Depth, z: Tensor) -> LoopResult:
        """Apply a prepared loop to h (B, ...) as ``depth`` says, on the way from z (B, ...); see ``forward``.

        Raises:
            ValueError: depth < 1, or no depth at all, or a depth tensor whose length is not B.
        """
        if depth is None:
            rule, solver = self.halting.begin(self, h, z), self.solver.begin(self.cell.norm_order)
            return loop_adaptive(loop, h, rule, solver, self.min_loops, self.max_loops)
        if isinstance(depth, int) and not isinstance(depth, bool):
            return self._loop_exact(loop, h, depth)
        if not isinstance(depth, (torch.Tensor, DepthSchedule)):
            return self._loop_exact(loop, h, _whole(depth))
        return self._loop_scheduled(loop, h, DepthSchedule.of(depth, h.shape[0]))

    def _loop_exact(self, loop: Loop, h: Tensor, depth: int) -> LoopResult:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        batch, device = h.shape[0], h.device
        if not torch.is_grad_enabled():  # keep no states that nothing holds anyway
            for _ in range(depth):
                previous, h = h, loop(h)
            return LoopResult(h, lambda: previous, lambda: torch.full((batch,), depth, device=device))
        states = [h]
        for _ in range(depth):
            states.append(loop(states[-1]))

        def at(loops: Tensor) -> tuple[Tensor, Tensor]:
            every, row = torch.stack(states), torch.arange(batch, device=device)  # (T + 1, B, ...)
            return every[loops, row], every[loops - 1, row].detach()

        return LoopResult(states[-1], lambda: states[-2], lambda: torch.full((batch,), depth, device=device), at)

    def _loop_scheduled(self, loop: Loop, h: Tensor, schedule: DepthSchedule) -> LoopResult:
        """Mixed depths, deepest samples first: each loop runs on a shrinking head of the batch."""
        device = h.device  # a schedule drawn on the CPU serves a model elsewhere
        order = None if schedule.order is None else schedule.order.to(device)
        if order is not None:
            loop, h = loop.select(order), h.index_select(0, order)
        run = unroll if loop.fused and not autocasts(device) else unroll_plain
        final, states = run(h, loop, schedule.active)  # (B, ...), deepest first
        if order is not None:
            final = final.index_select(0, schedule.inverse.to(device))

        def loops() -> Tensor:
            return schedule.loops.to(device)

        def at(count: Tensor) -> tuple[Tensor, Tensor]:
            last = count == loops()  # what a sample's last loop gave enters no further one
            rows = schedule.rows(torch.where(last, 0, count)).to(device)
            state = states().index_select(0, rows)
            state = torch.where(last.view(-1, *[1] * (state.ndim - 1)), final, state)
            return state, states()[schedule.rows(count - 1).to(device)].detach()

        rows = schedule.rows
        return LoopResult(final, lambda: states()[rows(schedule.loops - 1).to(device)], loops, at)

    def trajectory(self, z: Tensor, action: Tensor, loops: int, h0: Tensor | None = None) -> Tensor:
        """Every state of ``loops`` plain loops from z (B, Z), action (B, A): (loops + 1, B, ...), the start first.

        ``coda(z, states[1:])`` are the predictions after loops 1, 2, ...; in order AABB the states are those of the
        last layer, after ``loops`` of each before it.

        Raises:
            ValueError: loops < 1, or h0 of another shape than the state.
        """
        if loops < 1:
            raise ValueError(f"loops must be at least 1, got {loops}")
        stages = self.cell.stages(self.prelude(z, action))
        h = first_state(self.start, z, h0)
        for loop in stages:
            states = [h]
            for _ in range(loops):
                states.append(loop(states[-1]))
            h = states[-1]
        return torch.stack(states)

    def sample_depth(self, batch: int, generator: torch.Generator | None = None) -> Depth:
        """One training depth per sequence, as a schedule that a whole rollout re-uses (an int when it is fixed).

        None with implicit gradients, which hold at the fixed point: there training too loops until the rule stops it.
        """
        if self.gradient.trains_at_fixed_point:
            return None
        if self.depth_sampler == "fixed":
            return self.mean_loops
        depths = sample_depths(self.depth_sampler, batch, self.mean_loops, self.min_loops, self.max_loops, generator)
        return DepthSchedule(depths)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the parameters do not change (see ``Cell.frozen``)."""
        return self.cell.frozen()

    def lipschitz_bound(self) -> float:
        """True upper bound on the contraction factor rho of one loop, by exact singular values.

        In the norm of h that the block's ``norm_order`` names: the Euclidean one (2), of block ``rank`` the largest
        entry (infinity). Where the mode certifies nothing it may be any number; infinite once a weight is none.

        Kept until a parameter of the cell changes. They are compared entry by entry, which costs a fortieth of the
        singular values: no other sign of a change (version counters, say) is safe from writes through ``.data``.
        """
        weights = [p.detach() for p in self.cell.parameters()]
        shares = [cell.gamma for cell in self.cell.modules() if isinstance(cell, Cell)]
        if self._bound is None or shares != self._bound[1] or not _same(weights, self._bound[0]):
            self._bound = ([w.clone() for w in weights], shares, self.cell.lipschitz_bound())
        return self._bound[2]

    def require_certificate(self, what: str) -> None:
        """Raises ValueError unless the cell contracts by construction."""
        if self.cell.mode not in CERTIFIED:
            raise ValueError(f"{what} needs mode {' or '.join(map(repr, CERTIFIED))}, got mode {self.cell.mode!r}")

    def distance_to_fixed_point(self, h: Tensor, step: Tensor) -> Tensor:
        """Certified bound (B,) on ||h - h*||, given h (B, ...) and the step (B, ...) that led to it (Banach).

        In the norm of order ``cell.norm_order``: Euclidean, or the largest entry with block ``rank``. Infinite where
        the cell is not certified to contract. h* is that of the loop with its weights as they are rounded; what
        rounding does to one loop is allowed for (``rounding_error``), so in float32 the distance never falls to zero.
        That allowance is of the size of h: where the input terms of a loop are a thousand times larger and cancel each
        other (a bias of ``inject`` of 1e3, say), their rounding is not covered. Contraction itself always is.
        """
        return banach_distance(self.lipschitz_bound(), h, step, self.cell.norm_order)

    @torch.no_grad()
    def measured_contraction(self, z: Tensor, action: Tensor, loops: int | None = None) -> float:
        """Largest ||h[t+1] - h[t]|| / ||h[t] - h[t-1]|| over the batch and the first ``loops`` loops.

        A lower bound on the true factor of one loop, so when certified never above ``lipschitz_bound()`` but for
        rounding, which steps of more than 1e-4 of the state keep below 1e-3 in float32.
        """
        h, worst, order = self.start(z), 0.0, self.cell.norm_order
        for loop in self.cell.stages(self.prelude(z, action)):
            step = None
            for _ in range(loops or self.max_loops):
                h_next = loop(h)
                size = sample_norm(h_next - h, order)
                if step is not None:
                    # Steps near float32 rounding say nothing about the map.
                    sound = step > 1e-4 * sample_norm(h, order).clamp_min(1e-3)
                    if sound.any():
                        worst = max(worst, float((size[sound] / step[sound]).max()))
                step, h = size, h_next
        return worst


def _whole(depth: Any) -> int:
    """A depth that is no int: one of numpy's. Raises ValueError: anything else."""
    try:
        if isinstance(depth, bool):
            raise TypeError
        return operator.index(depth)
    except TypeError:
        wanted = "an int, a (B,) integer tensor, a DepthSchedule or None"
        raise ValueError(f"depth must be {wanted}, got {depth!r}") from None


def _joined(results: list[LoopResult]) -> LoopResult:
    """One result of loops run one after the other: the last one's, and the mean of their loops, rounded up."""
    if len(results) == 1:
        return results[0]

    def loops() -> Tensor:
        return -(-torch.stack([result.loops() for result in results]).sum(0) // len(results))  # (B,)

    return results[-1]._replace(loops=loops)


def _same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they are equal entry by entry, in one dtype and on one device."""
    pairs = zip(tensors, others, strict=True)
    return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs)
