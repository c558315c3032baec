"""Rules that look at the steps the state takes, or at what is read off it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopwm.dynamics.base import banach_distance, relative_step, sample_norm
from loopwm.dynamics.halting.rule import HaltingRule, HaltingRun, positive

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopwm.dynamics.looped import LoopedDynamics

    Readout = Callable[[Tensor, Tensor], Tensor]


class ResidualHalting(HaltingRule):
    """Stop when ||h[t+1] - h[t]|| / ||h[t]|| < tolerance. Raises ValueError unless tolerance > 0.

    By which solvers of fixed points stop, as in deep equilibrium models (1909.01377).
    """

    def __init__(self, tolerance: float = 0.01):
        super().__init__()
        self.tolerance = positive(tolerance, "tolerance")

    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:  # not forward: the way there costs a tenth of a rule
        return relative_step(h, previous) < self.tolerance


class SecondDifferenceHalting(HaltingRule):
    """Stop when ||h[t+1] - 2 h[t] + h[t-1]|| / ||h[t]|| < tolerance: the steps have stopped changing.

    The acceleration exit of Pappone et al. 2025 (2509.23314), made relative; it asks for two hits in a row, which is
    ``patience=2`` here. The first loop has no second difference and never stops.
    """

    def __init__(self, tolerance: float = 0.01):
        super().__init__()
        self.tolerance = positive(tolerance, "tolerance")

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        return _SecondDifferenceRun(self.tolerance)


class _SecondDifferenceRun:
    sees_every_loop = True

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.step: Tensor | None = None  # (n, ...) the last step

    @torch.no_grad()
    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        step, before = h - previous, self.step
        self.step = step
        if before is None:
            return torch.zeros(h.shape[0], dtype=torch.bool, device=h.device)
        return sample_norm(step - before) < self.tolerance * sample_norm(previous).clamp_min(1e-8)

    def keep(self, index: Tensor) -> None:
        self.step = self.step.index_select(0, index)


class CertifiedHalting(HaltingRule):
    """Stop when the state is certainly within ``distance`` of its fixed point.

    (rho ||step|| + r) / (1 - rho) < distance: Banach's a-posteriori bound, with the dynamics' own
    ``lipschitz_bound()`` read anew for every prediction (cached while the weights stay as they are), and r what
    rounding may do to one loop (``rounding_error``). Where the bound is not below one nothing is certain, and nothing
    stops; nor where ``distance`` is finer than rounding allows.
    Raises ValueError unless distance > 0.
    """

    def __init__(self, distance: float = 0.01):
        super().__init__()
        self.distance = positive(distance, "distance")

    @classmethod
    def for_dynamics(cls, dynamics: LoopedDynamics, tolerance: float) -> HaltingRule:
        dynamics.require_certificate("halting 'certified'")
        return cls(tolerance)

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        return _CertifiedRun(dynamics.lipschitz_bound(), self.distance, dynamics.cell.norm_order)


class _CertifiedRun:
    sees_every_loop = False

    def __init__(self, rho: float, distance: float, order: float):
        self.rho, self.distance, self.order = rho, distance, order  # of the norm in which rho is a factor

    @torch.no_grad()
    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        return banach_distance(self.rho, h, h - previous, self.order) < self.distance

    def keep(self, index: Tensor) -> None:
        """Nothing to keep."""


class PredictionHalting(HaltingRule):
    """Stop when what is read off the state no longer changes: max_k |r(z, h[t+1])_k - r(z, h[t])_k| < tolerance.

    An exit by predictions that stay as they are, as of classifiers in PABEE (2006.04152), here by their change.

    Args:
        tolerance: in the units of the read-out. readout: the latents z (n, ...) that the predictions start from and
        the states h (n, ...), as the coda reads them, -> (n, K), such as reward and value. A ``WorldModel`` fills it
        with its reward and continuation where it is None, an agent with the reward and the value after it.

    Raises:
        ValueError: tolerance <= 0; at the first prediction, if there is no read-out.
    """

    def __init__(self, tolerance: float = 0.01, readout: Readout | None = None):
        super().__init__()
        self.tolerance = positive(tolerance, "tolerance")
        self.read_off(readout)

    @property
    def readout(self) -> Readout | None:
        """z (n, ...), h (n, ...) -> (n, K), what the rule looks at; None: nothing yet."""
        return self._readout[0]

    def read_off(self, readout: Readout | None) -> None:
        """Look at ``readout`` from now on."""
        self._readout = (readout,)  # in a tuple, so that a module's parameters do not become the rule's own

    def begin(self, dynamics: LoopedDynamics, h: Tensor, z: Tensor) -> HaltingRun:
        if self.readout is None:
            raise ValueError("halting 'prediction' needs a read-out z, h -> (B, K): give it one by read_off(readout)")
        return _PredictionRun(self.readout, self.tolerance, z)


class _PredictionRun:
    sees_every_loop = True

    def __init__(self, readout: Readout, tolerance: float, z: Tensor):
        self.readout, self.tolerance, self.z = readout, tolerance, z
        self.last: Tensor | None = None  # (n, K) read off the state before this loop

    @torch.no_grad()
    def __call__(self, h: Tensor, previous: Tensor) -> Tensor:
        before = self.readout(self.z, previous) if self.last is None else self.last
        self.last = self.readout(self.z, h)
        return (self.last - before).abs().amax(-1) < self.tolerance

    def keep(self, index: Tensor) -> None:
        self.last, self.z = self.last.index_select(0, index), self.z.index_select(0, index)
