"""When a sample may stop looping: small rules in a registry.

A rule sees one loop of every running sample and says which may stop: ``rule(h, previous)``. A rule that remembers more
than that step gives each prediction a run of its own, ``rule.begin(dynamics, h0, z)``, which is told by ``keep(index)``
which samples go on when finished rows leave the batch. The floor and the cap of the loops are the dynamics' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopwm.dynamics.halting.gate import GateHalting
from loopwm.dynamics.halting.rule import HaltingRule, PatientHalting
from loopwm.dynamics.halting.scheduled import FixedHalting, RandomHalting
from loopwm.dynamics.halting.steps import (
    CertifiedHalting,
    PredictionHalting,
    ResidualHalting,
    SecondDifferenceHalting,
)

if TYPE_CHECKING:
    from loopwm.dynamics.looped import LoopedDynamics

HALTING: dict[str, type[HaltingRule]] = {
    "residual": ResidualHalting,
    "fixed": FixedHalting,
    "random": RandomHalting,
    "second_difference": SecondDifferenceHalting,
    "certified": CertifiedHalting,
    "prediction": PredictionHalting,
    "gate": GateHalting,
}


def make_halting(
    halting: str | type[HaltingRule] | HaltingRule, dynamics: LoopedDynamics, tolerance: float, patience: int
) -> HaltingRule:
    """The rule of that name or class for these dynamics, or the given one; made patient where ``patience`` is not 1.

    Raises:
        ValueError: unknown name; a tolerance or patience that the rule refuses.
        TypeError: neither a name nor a rule.
    """
    if isinstance(halting, str):
        if halting not in HALTING:
            raise ValueError(f"unknown halting {halting!r}; choose from {', '.join(HALTING)}")
        halting = HALTING[halting]
    if isinstance(halting, type) and issubclass(halting, HaltingRule):
        halting = halting.for_dynamics(dynamics, tolerance)
    if not isinstance(halting, HaltingRule):
        raise TypeError(f"halting must be a name, a HaltingRule or a class of them, got {halting!r}")
    return halting if patience == 1 else PatientHalting(halting, patience)
