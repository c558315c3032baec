"""The learned gate: a small network that foretells how much more the loop would lower the loss.

It learns from the realised loss drop alone. The gate printed in 2606.18208 (equations 11 and 12) stops the loop at
inference and stands in no loss but its own entropy's, which has nothing to do with the prediction, and 2607.20519 finds
that training a gate together with the trajectory is what spoils the trajectory. So here the loop is trained by its
depth prior, as without a gate; states and losses enter ``gate_loss`` detached, and nothing flows back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import relative_step
from loopwm.dynamics.cell import Cell
from loopwm.dynamics.halting.rule import HaltingRule, HaltingRun, positive

if TYPE_CHECKING:
    from loopwm.dynamics.looped import LoopedDynamics


class DropForecast(nn.Module):
    """The gate's network: (h, previous, t) -> log of the loss drop still to come.

    Untrained it foretells a drop of ``exp(0) = 1``. Of a grid or of tokens it reads each channel's mean, and its
    largest size, over all places, so it has the same weights for any number of them.

    Args:
        state_size: width D of the state h. hidden_dim: width of its one hidden layer. places: the dimensions of
        h (n, ...) over which it is laid out: none for a vector, (2, 3) for a grid (n, D, rows, columns).
    """

    def __init__(self, state_size: int, hidden_dim: int = 32, places: tuple[int, ...] = ()):
        super().__init__()
        self.state_size, self.places = state_size, places
        read = 2 * state_size * (2 if places else 1)
        self.layers = nn.Sequential(nn.Linear(read + 2, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, h: Tensor, previous: Tensor, t: int | Tensor) -> Tensor:
        """log drop (n,) after loop t >= 1, one or (n,), from h (n, ...) and the state before it.

        Raises:
            ValueError: for states of another width.
        """
        parts = [part for x in (h, h - previous) for part in self._read(x)]  # each (n, D)
        # Directions and sizes apart: steps shrink by orders of magnitude, and their size says most.
        size = relative_step(h, previous).clamp_min(1e-8).log().unsqueeze(1)  # (n, 1)
        count = torch.as_tensor(t, dtype=size.dtype, device=size.device).log().reshape(-1, 1).expand_as(size)
        normal = [nn.functional.layer_norm(x, (self.state_size,), eps=1e-12) for x in parts]
        return self.layers(torch.cat([*normal, size, count], 1)).squeeze(1)

    def _read(self, x: Tensor) -> list[Tensor]:
        """What the network sees of x (n, ...): all of a vector, else mean and largest size over the places, (n, D)."""
        width = [size for i, size in enumerate(x.shape) if i not in (0, *self.places)]
        if x.ndim != 2 + len(self.places) or width != [self.state_size]:
            state = "x".join(map(str, x.shape[1:]))
            raise ValueError(f"the gate was made for states of width {self.state_size}, got {state}")
        return [x.mean(self.places), x.abs().amax(self.places)] if self.places else [x]


def remaining_drop(losses: Tensor) -> Tensor:
    """How far below each loop's loss the best of it and the later loops lies: losses (T, B) -> (T, B), >= 0."""
    return losses - losses.flip(0).cummin(0).values.flip(0)


def gate_loss(gate: DropForecast, states: Tensor, losses: Tensor) -> Tensor:
    """What the gate learns from: its forecasts against the realised drops of one unrolled batch.

    The Poisson deviance exp(f) - y f of the drop y and the forecast f of its log, over the mean drop: its minimum is
    the conditional mean of y, as a squared error's is, over the orders of magnitude that drops span. The last loop is
    left out, since nothing is known of what would come after it.

    Args:
        gate: ``dynamics.halting.gate``. states: (T + 1, B, ...) from the start on (``LoopedDynamics.trajectory``).
        losses: (T, B) of the predictions after loops 1 .. T. Neither gets a gradient.

    Returns:
        () loss of the gate's parameters.

    Raises:
        ValueError: T < 2, or states and losses of different T or B.
    """
    if losses.ndim != 2 or losses.shape[0] < 2 or states.shape[:2] != (losses.shape[0] + 1, losses.shape[1]):
        raise ValueError(
            f"need losses (T, B) with T >= 2 and states (T + 1, B, ...), got {tuple(losses.shape)} and "
            f"{tuple(states.shape)}"
        )
    states, drop = states.detach(), remaining_drop(losses.detach())[:-1].flatten()  # ((T - 1) B,)
    t = torch.arange(1, losses.shape[0]).repeat_interleave(losses.shape[1])
    forecast = gate(states[1:-1].flatten(0, 1), states[:-2].flatten(0, 1), t)
    return (forecast.exp() - drop * forecast).mean() / drop.mean().clamp_min(torch.finfo(drop.dtype).tiny)


class GateHalting(HaltingRule):
    """Stop when the loss drop still to come, as foretold by ``gate``, is below ``threshold``.

    An untrained gate foretells 1 and stops nothing below a threshold of 1: train it with ``gate_loss``.

    Args:
        state_size, places: see ``DropForecast``; by name those of the dynamics' block. threshold: in units of the loss
        it was trained on.

    Raises:
        ValueError: threshold <= 0; at a prediction, for states of another width.
    """

    def __init__(self, state_size: int, threshold: float = 0.01, places: tuple[int, ...] = ()):
        super().__init__()
        self.threshold = positive(threshold, "threshold")
        self.gate = DropForecast(state_size, places=places)

    @classmethod
    def for_dynamics(cls, dynamics: LoopedDynamics, tolerance: float) -> HaltingRule:
        block = next(cell for cell in dynamics.cell.modules() if isinstance(cell, Cell))
        return cls(dynamics.state_dim, tolerance, block.places)

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        return _GateRun(self.gate, self.threshold)


class _GateRun:
    sees_every_loop = True

    def __init__(self, gate: DropForecast, threshold: float):
        self.gate, self.log_threshold, self.t = gate, math.log(threshold), 0

    @torch.no_grad()
    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        self.t += 1
        return self.gate(h, previous, self.t) < self.log_threshold

    def keep(self, index: Tensor) -> None:
        """Nothing to keep: the number of loops is the same for all."""
