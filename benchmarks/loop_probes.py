"""Ways to look for a loop that grows: largest singular values, hostile points, hostile actions, random latents, depth.

Every probe gives a lower bound on the worst case; ``lipschitz_bound`` and ``state_radius`` are the upper ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loopwm.dynamics import LoopedDynamics

DEPTHS = tuple(2**k for k in range(11))  # 1 .. 1024
REFERENCE = 8192  # loops after which a state stands for the fixed point, with its own certified distance as its error


# ---- one loop ------------------------------------------------------------------------------------


def jacobian_factor(
    loop: Callable[[Tensor], Tensor], h: Tensor, generator: torch.Generator, most: int = 500, tolerance: float = 1e-10
) -> Tensor:
    """Largest singular value (B,) of dh'/dh at each of h (B, D), by power iteration on J^T J.

    A product with J and one with its transpose an iteration, for all samples at once, until no value changes by
    ``tolerance`` of itself or ``most`` iterations are done. ||J v|| of a unit v is never above the true value.
    """
    v = torch.randn(h.shape, generator=generator, dtype=h.dtype).to(h.device)
    last, pull = torch.zeros(h.shape[0], dtype=h.dtype, device=h.device), torch.func.vjp(loop, h)[1]
    for _ in range(most):
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
        after = torch.func.jvp(loop, (h,), (v,))[1]  # (B, D)
        factor = after.norm(dim=-1)
        if bool(((factor - last).abs() <= tolerance * factor).all()):
            break
        last, v = factor, pull(after)[0]
    return torch.maximum(factor, last)


def as_double(dynamics: LoopedDynamics) -> LoopedDynamics:
    """A copy in float64 whose parameters take no gradient."""
    return copy.deepcopy(dynamics).double().requires_grad_(False)


def random_factor(dynamics: LoopedDynamics, z: Tensor, action: Tensor, generator: torch.Generator) -> float:
    """Largest factor of one loop at the states visited from z (B, Z), action (B, A), and at random ones of any size."""
    dynamics, z, action = as_double(dynamics), z.double(), action.double()
    loop = dynamics.cell.prepare(dynamics.prelude(z, action))
    size = torch.logspace(-2, 2, z.shape[0], dtype=z.dtype).unsqueeze(1)
    states = [*dynamics.trajectory(z, action, dynamics.max_loops)]
    states.append(size * torch.randn(states[0].shape, generator=generator, dtype=z.dtype))
    return max(float(jacobian_factor(loop, h, generator).max()) for h in states if bool(h.isfinite().all()))


def hostile_factor(
    dynamics: LoopedDynamics, z: Tensor, action: Tensor, generator: torch.Generator, steps: int
) -> float:
    """Largest factor of one loop that gradient ascent over state, latent and action comes by.

    The ascent is on ||F(h + d) - F(h)|| / ||d||, which is a factor itself and, unlike the Jacobian of a piecewise
    linear block, has a gradient in h. The Jacobians at its ends are measured too.
    """
    dynamics, z = as_double(dynamics), z.detach().clone().double().requires_grad_()
    raw = action.double().clamp(-0.99, 0.99).atanh().requires_grad_()
    h = torch.randn(z.shape[0], dynamics.state_dim, generator=generator, dtype=z.dtype).requires_grad_()
    d = torch.randn(h.shape, generator=generator, dtype=z.dtype).requires_grad_()
    adam, worst = torch.optim.Adam([h, d, z, raw], 0.1, maximize=True), 0.0
    for _ in range(steps):
        adam.zero_grad()
        loop = dynamics.cell.prepare(dynamics.prelude(dynamics.coda.latent_norm(z), raw.tanh()))
        # Neither so short that rounding shows, nor so long that the pair leaves every place that states reach.
        length = d.norm(dim=-1, keepdim=True)
        apart = d / length * length.clamp(1e-3, 1e2)
        ratio = (loop(h + apart) - loop(h)).norm(dim=-1) / apart.norm(dim=-1)
        worst = max(worst, float(ratio.detach().max()))
        ratio.log().mean().backward()
        adam.step()
    with torch.no_grad():
        loop = dynamics.cell.prepare(dynamics.prelude(dynamics.coda.latent_norm(z), raw.tanh()))
        ends = (h.detach(), (h + apart).detach())
    return max(worst, *(float(jacobian_factor(loop, end, generator).max()) for end in ends))


@torch.no_grad()
def state_radius(dynamics: LoopedDynamics) -> float:
    """What no state of a certified loop on vectors leaves once inside, whatever z and actions are; inf unless rho < 1.

    ||h'|| <= rho ||h|| + c, with c the largest ||F(0)||: its input e is a layer norm's output, hence bounded, and every
    activation is zero at zero. So ||h|| <= max(||h0||, c / (1 - rho)), also where h is carried from step to step.
    """
    cell, norm, rho = dynamics.cell, dynamics.prelude.layers[-1], dynamics.lipschitz_bound()
    if rho >= 1.0:
        return math.inf
    decay = cell.decay().double()
    e = math.sqrt(dynamics.state_dim) * float(norm.weight.abs().max()) + float(norm.bias.norm())
    write = cell.fold()[-1]  # as a loop multiplies by it, the block's scale in it
    inject, write = (torch.linalg.matrix_norm(weight.double(), 2) for weight in (cell.inject.weight, write))
    inner = cell.activation_lipschitz * (float(inject) * e + float(cell.inject.bias.norm()))
    gain = torch.as_tensor(cell.input_scale(decay)).abs().max()
    return (float(gain) * e + float(write) * inner) / (1.0 - rho)


# ---- many steps ----------------------------------------------------------------------------------


def _state(states: Tensor, latent: Tensor) -> Tensor:
    return states[-1].norm(dim=-1).log()


def _latent(states: Tensor, latent: Tensor) -> Tensor:
    return latent.norm(dim=-1).log()


def step_growth(states: Tensor, latent: Tensor | None = None) -> Tensor:
    """log ||h[T] - h[T-1]|| - log ||h[1] - h[0]||, (B,): what a contraction keeps below zero."""
    step = (states[1:] - states[:-1]).norm(dim=-1).clamp_min(1e-30)  # (T, B)
    return step[-1].log() - step[0].log()


# What hostile actions make large, of states (T + 1, B, D) and the latent before its norm (B, Z) -> (B,).
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"state": _state, "latent": _latent, "growth": step_growth}
ACTIONS = (*OBJECTIVES, "bang_bang", "random")  # the last two look at nothing
# name: is h carried over from prediction to prediction, is the latent normalised after each
STARTS = {"fresh": (False, True), "carried": (True, True), "no_latent_norm": (False, False)}


def hostile_rollout(
    dynamics: LoopedDynamics, z: Tensor, action_dim: int, start: str, steps: int, generator: torch.Generator
) -> dict[str, dict]:
    """Open-loop rollouts of ``steps`` predictions under every kind of action in ``ACTIONS``: a row for each kind.

    Hostile actions are the corner of the box [-1, 1]^A that the gradient of their objective points to, anew at every
    step. z (B, Z) are the starts of each kind. A row has the steps that stayed finite, and the running maxima of
    ||h|| and of ||z + C h|| at up to 40 steps.
    """
    carry, normalise = STARTS[start]
    dynamics = copy.deepcopy(dynamics).requires_grad_(False)
    norm, dynamics.coda.latent_norm = dynamics.coda.latent_norm, nn.Identity()
    each, z, h = z.shape[0], z.repeat(len(ACTIONS), 1), None
    action = torch.rand(z.shape[0], action_dim, generator=generator).to(z) * 2 - 1
    peaks, alive = torch.zeros(2, z.shape[0]).to(z), torch.zeros(z.shape[0], dtype=torch.int64)
    kept, marks = [], {round(steps ** (k / 39)) for k in range(40)} | {steps // 2}
    with torch.no_grad(), dynamics.frozen():
        for t in range(1, steps + 1):
            action = _hostile_actions(dynamics, z, action, h, each, generator)
            h_next = dynamics.trajectory(z, action, dynamics.mean_loops, h)[-1]
            latent = dynamics.coda(z, h_next)
            sizes = torch.stack([h_next.norm(dim=-1), latent.norm(dim=-1)])  # (2, B)
            finite = sizes.isfinite().all(0)
            alive += finite & (alive == t - 1)
            peaks = torch.where(finite & (alive == t), torch.maximum(peaks, sizes), torch.inf)
            if t in marks:
                kept.append((t, peaks.view(2, len(ACTIONS), each).amax(2)))
            if not finite.any():
                kept.append((t, torch.full((2, len(ACTIONS)), torch.inf)))
                break
            z, h = norm(latent) if normalise else latent, h_next if carry else None
    return {kind: _row(i, alive.view(len(ACTIONS), each), kept, steps) for i, kind in enumerate(ACTIONS)}


def _hostile_actions(dynamics, z: Tensor, action: Tensor, h: Tensor | None, each: int, generator) -> Tensor:
    """(B, A) for the rows of every kind, kinds one after the other."""
    hostile = slice(0, each * len(OBJECTIVES))
    with torch.enable_grad():
        at = action[hostile].clone().requires_grad_()
        states = dynamics.trajectory(z[hostile], at, dynamics.mean_loops, None if h is None else h[hostile])
        latent = dynamics.coda(z[hostile], states[-1])
        parts = enumerate(OBJECTIVES.values())
        score = [f(states, latent)[i * each : (i + 1) * each] for i, f in parts]
        (gradient,) = torch.autograd.grad(torch.cat(score).sum(), at)
    free = torch.rand(2, each, action.shape[1], generator=generator).to(z) * 2 - 1
    return torch.cat([gradient.nan_to_num().sign(), free[0].sign(), free[1]])


def _row(kind: int, alive: Tensor, kept: list, steps: int) -> dict:
    """Of the rollouts of one kind."""
    curve = [(t, *peaks[:, kind].tolist()) for t, peaks in kept]
    half = next((size for t, *size in curve if t >= steps // 2), [math.inf, math.inf])
    end = curve[-1][1:]
    # A size that saturates has been reached by half-time; one that drifts by an equal amount a step doubles after it.
    settled = [math.isfinite(b) and b <= 1.2 * a for a, b in zip(half, end, strict=True)]
    return {
        "finite_steps": int(alive[kind].min()),
        "finite": bool((alive[kind] == steps).all()),
        "bounded": settled[0],
        "latent_bounded": settled[1],
        "largest_state": end[0],
        "largest_latent": end[1],
        "curve": [(t, state) for t, state, _ in curve],
    }


@torch.no_grad()
def random_latents(dynamics: LoopedDynamics, count: int, action_dim: int, generator: torch.Generator) -> dict:
    """``count`` predictions at full depth from normal latents, half of them normalised, half of sizes 1e-3 .. 1e3."""
    dynamics, rows, finite, excess, step = copy.deepcopy(dynamics), 10_000, 0, 0.0, 0.0
    radius = state_radius(dynamics)
    with dynamics.frozen():
        for low in range(0, count, rows):
            n = min(rows, count - low)
            z = torch.randn(n, dynamics.coda.out.out_features, generator=generator)
            wild = 10.0 ** (6 * torch.rand(n, 1, generator=generator) - 3)
            half = torch.arange(n).unsqueeze(1) < n // 2
            z = torch.where(half, dynamics.coda.latent_norm(z), z * wild)
            action = torch.rand(n, action_dim, generator=generator) * 2 - 1
            out = dynamics(z, action, dynamics.max_loops)
            finite += int((out.h.isfinite().all(1) & out.z_next.isfinite().all(1)).sum())
            most = dynamics.start(z).norm(dim=-1).clamp_min(radius)
            if math.isfinite(radius):
                excess = max(excess, float((out.h.norm(dim=-1) / most).nan_to_num(torch.inf).max()))
            step = max(step, dynamics.measured_contraction(z, action, dynamics.max_loops))
    return {"count": count, "finite": finite, "state_over_radius": excess, "largest_step_ratio": step}


@torch.no_grad()
def depth_errors(dynamics: LoopedDynamics, z: Tensor, action: Tensor, z_after: Tensor) -> dict:
    """1 to 1024 loops at fixed z, action, in float64: true and certified distance to the fixed point.

    Both relative to the norm of the fixed point, medians over the batch; ``prediction`` is the mean squared error of
    the latent that is predicted at each depth. ``sound``: nowhere is the true distance above the certified one.
    """
    dynamics = as_double(dynamics)
    z, action, z_after = z.double(), action.double(), z_after.double()
    loop, h = dynamics.cell.prepare(dynamics.prelude(z, action)), dynamics.start(z)
    states, prediction = {}, []
    for t in range(1, REFERENCE + 1):
        previous, h = h, loop(h)
        if t in DEPTHS:
            states[t] = (h, dynamics.distance_to_fixed_point(h, h - previous))
            prediction.append(float((dynamics.coda(z, h) - z_after).square().mean()))
    slack, size = dynamics.distance_to_fixed_point(h, h - previous), h.norm(dim=-1)
    rest = float(((h - previous).norm(dim=-1) / size).max())
    true = torch.stack([(state - h).norm(dim=-1) for state, _ in states.values()])  # (depths, B)
    certified = torch.stack([distance for _, distance in states.values()])
    rounding = 1e-12 * size
    return {
        "loops": DEPTHS,
        "error": (true / size).median(1).values.tolist(),
        "certified": (certified / size).median(1).values.tolist(),
        "prediction": prediction,
        "converged": bool(rest < 1e-9),  # False also where a state is not finite
        "sound": bool(((true <= certified + slack + rounding) | certified.isinf()).all()),
    }
