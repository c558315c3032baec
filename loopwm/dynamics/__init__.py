"""Latent dynamics: the looped model and its unlooped controls. Depends on torch alone.

dynamics = LoopedDynamics(latent_dim=64, action_dim=6, hidden_dim=64)
out = dynamics(z, action)            # adaptive depth
out = dynamics(z, action, depth=16)  # exactly 16 loops
"""

from __future__ import annotations

from torch import nn

from loopwm.dynamics.base import Dynamics, DynamicsOutput
from loopwm.dynamics.controls import SinglePassDynamics, StackedDynamics, WideDynamics
from loopwm.dynamics.depth import DepthSchedule
from loopwm.dynamics.halting import CertifiedHalting, NeverHalt, ResidualHalting
from loopwm.dynamics.looped import LoopedDynamics

DYNAMICS: dict[str, type[nn.Module]] = {
    "looped": LoopedDynamics,
    "single_pass": SinglePassDynamics,
    "stacked": StackedDynamics,
    "wide": WideDynamics,
}

__all__ = [
    "DYNAMICS",
    "CertifiedHalting",
    "DepthSchedule",
    "Dynamics",
    "DynamicsOutput",
    "LoopedDynamics",
    "NeverHalt",
    "ResidualHalting",
    "SinglePassDynamics",
    "StackedDynamics",
    "WideDynamics",
]
