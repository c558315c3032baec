"""Steps that are applied one after the other, each with an input of its own, as many as a sample asks for.

One step with the same weights every time is a recurrent network (``loopwm.dynamics.RepeatedDynamics`` does it where
all inputs are the same); a list of steps, each with weights of its own, is its control: the same structure, untied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from loopwm.dynamics import DynamicsOutput
from loopwm.dynamics.base import relative_step
from loopwm.dynamics.repeated import Split


class InTurn(nn.Module):
    """z[i + 1] = step i(z[i], input i) for i < k; a step beyond the last of ``steps`` is the last one again.

    ``steps`` are dynamics of vectors, or torch's recurrent cells.
    """

    def __init__(self, steps: Sequence[nn.Module]):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, z: Tensor, inputs: Sequence[Tensor], k: Tensor) -> DynamicsOutput:
        """z (B, D), inputs of each step (B, A), k (B,) -> ``DynamicsOutput``, whose loops are k."""
        before = z
        for place in range(int(k.max())):
            step, given = self.steps[min(place, len(self.steps) - 1)], inputs[place]
            after = step(given, z) if isinstance(step, nn.RNNCellBase) else step(z, given).z_next
            going = (place < k).unsqueeze(1)
            before, z = torch.where(going, z, before), torch.where(going, after, z)
        return DynamicsOutput(z, z, lambda: k, lambda: relative_step(z, before))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the parameters do not change."""
        with ExitStack() as stack:
            for step in self.steps:
                if not isinstance(step, nn.RNNCellBase):
                    stack.enter_context(step.frozen())
            yield


class Untied(InTurn):
    """What ``RepeatedDynamics`` does, called as it is, with a step of its own for each application."""

    def __init__(self, steps: Sequence[nn.Module], split: Split):
        super().__init__(steps)
        self.split = split

    def forward(self, z: Tensor, action: Tensor, depth: None = None, h0: None = None) -> DynamicsOutput:
        """z (B, D), action (B, A) that says how many steps -> ``DynamicsOutput``."""
        once, times = self.split(action)
        return super().forward(z, [once] * int(times.max()), times)
