"""Where the loop's gradient comes from: back through every loop, or from the fixed point that they lead to.

Forward and backward on one CPU core, D = 64, 256 rows, median ms: unrolled 2.3, 3.5, 6.2, 12.1 for 4, 8, 16, 32 loops;
implicit 6.3 after 8 loops and 8.0 after 32, of which the adjoint (about 20 iterations to 1e-4) takes the most. It pays
from some twenty loops on, if their number is given. Where a rule finds it, sample by sample, a training takes 2.6 times
as long as with 24 unrolled loops, to the same error (``benchmarks.loop_training``): ``unrolled`` is the default.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopwm.dynamics.adaptive import LoopResult
from loopwm.dynamics.base import sample_norm
from loopwm.dynamics.layers import RepeatedLayers
from loopwm.dynamics.solvers import PlainSolver

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopwm.dynamics.base import Depth
    from loopwm.dynamics.looped import LoopedDynamics


class UnrolledGradient:
    """Back-propagate through every loop."""

    trains_at_fixed_point = False

    def check(self, dynamics: LoopedDynamics) -> None:
        """Any dynamics will do."""

    def __call__(self, dynamics: LoopedDynamics, loop: Callable, h: Tensor, depth: Depth, z: Tensor) -> LoopResult:
        """Loop h (B, ...) as ``depth`` says, see ``LoopedDynamics.run_loops``; every loop is differentiated."""
        return dynamics.run_loops(loop, h, depth, z)


class ImplicitGradient:
    """The gradient of the fixed point h* = f(h*, theta): dL/dtheta = u df/dtheta with u = g + u df/dh.

    Bai et al. 2019 (1909.01377, theorem 1). The loops run without a graph, so memory does not grow with their number;
    one more application gives df/dh and df/dtheta, and u is the fixed point of a map that contracts by the same
    certified rho. It is the gradient at the state reached, so the depth must suffice to reach h*; what the state
    started from has no gradient.

    Args:
        tolerance: certified bound on ||u - u*|| / ||g|| of every sample, down to rounding, in the dual norm of the
        cell's: Euclidean too, or the sum of absolute values with block ``rank``.

    Raises:
        ValueError: tolerance not in (0, 1); dynamics that are not certified to contract, or of order AABB, where the
        fixed point is that of the last layer.
    """

    trains_at_fixed_point = True

    def __init__(self, tolerance: float = 1e-4):
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}")
        self.tolerance = tolerance

    def check(self, dynamics: LoopedDynamics) -> None:
        dynamics.require_certificate("gradient 'implicit'")
        if isinstance(dynamics.cell, RepeatedLayers):
            raise ValueError("gradient 'implicit' trains the last layer of order 'aabb' alone; choose order 'abab'")

    def __call__(self, dynamics: LoopedDynamics, loop: Callable, h: Tensor, depth: Depth, z: Tensor) -> LoopResult:
        """Loop h (B, ...) as ``depth`` says; the gradient is that of the fixed point, whatever loops led there."""
        with torch.no_grad():
            result = dynamics.run_loops(loop, h, depth, z)
        if not torch.is_grad_enabled():
            return result
        before = result.previous().detach().requires_grad_()
        after = loop(before)
        attached = after.view_as(after)  # the hook sits on a node of its own, or solving would call it again
        # Now, of the weights that made the loop: in a backward pass they may be others (torch.func.functional_call).
        rho, order = dynamics.lipschitz_bound(), dual_order(dynamics.cell.norm_order)

        def adjoint(grad: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("gradient 'implicit' has no second derivative")
            if not rho < 1.0:  # a weight is no number: the state is none either
                return torch.full_like(grad, math.nan)
            return solve_adjoint(after, before, grad, rho, self.tolerance, dynamics.solver, order)[0]

        attached.register_hook(adjoint)
        # Another node again, so that a gradient by ``h`` itself is not that which the hook makes of it.
        return result._replace(h=attached.view_as(attached), at=None)


def adjoint_iterations(rho: float, tolerance: float) -> int:
    """Iterations after which ||u - u*|| <= tolerance ||g|| for certain: rho^(n + 1) / (1 - rho) <= tolerance."""
    if rho == 0.0:
        return 1
    return max(1, math.ceil(math.log(tolerance * (1.0 - rho)) / math.log(rho)) - 1)


def dual_order(order: float) -> float:
    """q with 1 / p + 1 / q = 1: u J contracts by rho in that norm where J v does in the norm of order p."""
    return 1.0 if math.isinf(order) else order / (order - 1.0)


def solve_adjoint(
    after: Tensor,
    before: Tensor,
    grad: Tensor,
    rho: float,
    tolerance: float,
    solver: PlainSolver,
    order: float = 2.0,
) -> tuple[Tensor, int]:
    """u = grad + u d(after)/d(before), each (B, ...), from u = grad on.

    A sample is done, and held, when rho / (1 - rho) times its last step is at most ``tolerance`` ||grad|| (Banach), or
    the step is down to rounding; norms of an ``order`` in which u d(after)/d(before) contracts by rho. Returns
    (u, iterations).
    """
    run, u = solver.begin(order), grad
    goal = tolerance * sample_norm(grad, order) * (1.0 - rho) / max(rho, 1e-12)  # (B,) size of the last step
    rounding = 4 * torch.finfo(grad.dtype).eps
    done = ~(goal > 0) | goal.isinf()  # of what is no number nothing comes to rest
    final, most = grad, 2 * adjoint_iterations(rho, tolerance)  # twice: a solver's detours are at most every second
    for iteration in range(1, most + 1):
        image = grad + torch.autograd.grad(after, before, u, retain_graph=True)[0]
        step = sample_norm(image - u, order)
        final = torch.where(done.view(-1, *[1] * (grad.ndim - 1)), final, image)
        done = done | (step <= goal) | (step <= rounding * sample_norm(image, order))
        if iteration == most or done.all():
            break
        u = run(u, image)
    return final, iteration


GRADIENTS: dict[str, type] = {"unrolled": UnrolledGradient, "implicit": ImplicitGradient}
