"""The measurements: how a loop settles, what its depth buys, how far the model can be trusted open loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loopwm.dynamics import LoopedDynamics
from loopwm.inspect.run import Windows
from loopwm.model import WorldModel

SETTLED = 512  # loops after which a contracting loop counts as at its fixed point
SHOWN = 32  # loops of which the distance to it is looked at, or the trained mean, where that is more
ROWS = 64  # states whose every loop is kept at once: of grids they are large
QUANTILES = (0.1, 0.5, 0.9)


def unexplained(prediction: Tensor, truth: Tensor) -> float:
    """Squared error over the variance of what was predicted, (n,) or (n, Z); where that is none, zero or infinity."""
    spread, error = (truth - truth.mean(0)).square().mean(), (prediction - truth).square().mean()
    if spread > 1e-9 or not bool(error.isfinite()):  # an error that is no number stays one
        return float(error / spread)
    return math.inf if error > 1e-9 else 0.0


def strict(value: Any) -> Any:
    """The same dicts and lists, with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settling(dynamics: LoopedDynamics, z: Tensor, action: Tensor) -> dict[str, Any]:
    """How the loop state comes to rest from z (B, Z), action (B, A), as a share of its size there.

    Returns:
        ``distance``: for t = 0, 1, ... the quantiles over the batch of ||h[t] - h[SETTLED]|| / ||h[SETTLED]||, in the
        norm of the certificate: Euclidean, or the largest entry with block ``rank``;
        ``settled``: whether the last hundredth of those loops moved no state by more than a thousandth;
        ``bound``, ``measured``: the contraction factor of one loop, certified and seen (``LoopedDynamics``).
    """
    shown = max(SHOWN, dynamics.mean_loops)
    with dynamics.frozen():
        parts = zip(z.split(ROWS), action.split(ROWS), strict=True)
        distance, moved = map(torch.cat, zip(*(_approach(dynamics, *rows, shown) for rows in parts), strict=True))
        bound, measured = dynamics.lipschitz_bound(), dynamics.measured_contraction(z, action)
    levels = torch.quantile(distance, torch.tensor(QUANTILES), dim=0).T  # (shown + 1, 3)
    return {
        "distance": levels.tolist(),
        "settled": bool((moved < 1e-3).all()),
        "bound": bound,
        "measured": measured,
    }


def _approach(dynamics: LoopedDynamics, z: Tensor, action: Tensor, shown: int) -> tuple[Tensor, Tensor]:
    """(distances (B, shown + 1), how far the last loops moved (B,)), see ``settling``."""
    states = dynamics.trajectory(z, action, max(SETTLED, 2 * shown)).flatten(2)  # (T + 1, B, D), or all of a grid

    def length(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dynamics.cell.norm_order, dim=-1)

    size = length(states[-1]).clamp_min(1e-8)  # (B,)
    distance = length(states[: shown + 1] - states[-1]) / size  # (shown + 1, B)
    return distance.T, length(states[-1] - states[-1 - SETTLED // 100]) / size


def depth_errors(
    model: WorldModel, data: Windows, depths: tuple[int | None, ...], ahead: tuple[int, ...]
) -> list[dict]:
    """A row for each depth: latent and reward left unexplained so many steps ``ahead``, and the loops spent.

    None stands for the run's own halting rule, or, where nothing is looped, for the model as it is.
    """
    rows = []
    z = model.encode(data.obs)  # (H + 1, B, Z)
    with model.frozen():
        for depth in depths:
            imagined = model.rollout(z[0], data.action, depth)
            reward = model.predict(imagined.h)[0]  # (H, B)
            row: dict[str, Any] = {"depth": depth, "loops": float(imagined.loops.double().mean())}
            for k in ahead:
                row[f"latent, {k} ahead"] = unexplained(imagined.z[k], z[k])
                row[f"reward, {k} ahead"] = unexplained(reward[k - 1], data.reward[k - 1])
            rows.append(row)
    return rows


def chosen_depths(model: WorldModel, z: Tensor, action: Tensor) -> list[int]:
    """How many of the predictions from z (B, Z), action (B, A) stop after 1, 2, ... ``max_loops`` loops by the rule."""
    with model.frozen():
        loops = model.dynamics(z, action).loops
    return torch.bincount(loops, minlength=model.dynamics.max_loops + 1)[1:].tolist()
