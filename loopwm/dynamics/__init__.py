"""Latent dynamics: the looped model and its unlooped controls. Depends on torch alone.

dynamics = LoopedDynamics(latent_dim=64, action_dim=6, hidden_dim=64)
out = dynamics(z, action)            # adaptive depth
out = dynamics(z, action, depth=16)  # exactly 16 loops
out.early()                          # what an earlier loop would have predicted, for a loss on early exits

Registries name the variants: ``DYNAMICS``, ``BLOCKS``, ``ORDERS``, ``MODES``, ``DEPTH_SAMPLERS``, ``HALTING``,
``SOLVERS``, ``GRADIENTS``, ``INJECTIONS``, ``ACTIVATIONS``.
"""

from __future__ import annotations

from torch import nn

from loopwm.dynamics.architecture import BLOCKS, Architecture
from loopwm.dynamics.base import Dynamics, DynamicsOutput, LatentNorm
from loopwm.dynamics.cell import ACTIVATIONS, INJECTIONS, MODES, Cell
from loopwm.dynamics.controls import DeepThinDynamics, SinglePassDynamics, StackedDynamics, WideDynamics
from loopwm.dynamics.depth import DEPTH_SAMPLERS, DepthSchedule, sample_depths
from loopwm.dynamics.gradients import GRADIENTS, ImplicitGradient, UnrolledGradient
from loopwm.dynamics.halting import HALTING
from loopwm.dynamics.halting.gate import DropForecast, GateHalting, gate_loss
from loopwm.dynamics.halting.rule import HaltingRule, HaltingRun, PatientHalting
from loopwm.dynamics.halting.scheduled import FixedHalting, RandomHalting
from loopwm.dynamics.halting.steps import (
    CertifiedHalting,
    PredictionHalting,
    ResidualHalting,
    SecondDifferenceHalting,
)
from loopwm.dynamics.layers import ORDERS
from loopwm.dynamics.looped import LoopedDynamics
from loopwm.dynamics.penalty import jacobian_penalty
from loopwm.dynamics.repeated import RepeatedDynamics
from loopwm.dynamics.solvers import SOLVERS, AndersonSolver, PlainSolver

DYNAMICS: dict[str, type[nn.Module]] = {
    "looped": LoopedDynamics,
    "single_pass": SinglePassDynamics,
    "stacked": StackedDynamics,
    "wide": WideDynamics,
    "deep_thin": DeepThinDynamics,
}

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "DEPTH_SAMPLERS",
    "DYNAMICS",
    "GRADIENTS",
    "HALTING",
    "INJECTIONS",
    "MODES",
    "ORDERS",
    "SOLVERS",
    "AndersonSolver",
    "Architecture",
    "Cell",
    "CertifiedHalting",
    "DeepThinDynamics",
    "DepthSchedule",
    "DropForecast",
    "Dynamics",
    "DynamicsOutput",
    "FixedHalting",
    "GateHalting",
    "HaltingRule",
    "HaltingRun",
    "ImplicitGradient",
    "LatentNorm",
    "LoopedDynamics",
    "PatientHalting",
    "PlainSolver",
    "PredictionHalting",
    "RandomHalting",
    "RepeatedDynamics",
    "ResidualHalting",
    "SecondDifferenceHalting",
    "SinglePassDynamics",
    "StackedDynamics",
    "UnrolledGradient",
    "WideDynamics",
    "gate_loss",
    "jacobian_penalty",
    "sample_depths",
]
