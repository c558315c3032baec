"""What the trainer knows of an agent, and nothing more."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Agent(Protocol):
    """Acts on observations, learns from a replay, and can be saved."""

    parameter_counts: dict[str, int]  # trainable parameters by part, and their total

    def act(self, obs: np.ndarray, *, first: np.ndarray | None = None, explore: bool = False) -> np.ndarray:
        """Choose actions.

        Args:
            obs: (N, O) float32.
            first: (N,) bool, True where obs begins an episode (carried state is dropped there).
            explore: True while collecting; False: no exploration noise. Planning may still draw from the agent's random
                stream; ``evaluator()`` gives a view that acts alike every time.

        Returns:
            (N, A) float32 in [-1, 1] for continuous actions, (N,) int64 for discrete ones.
        """
        ...

    def encode_action(self, action: np.ndarray) -> np.ndarray:
        """What ``act`` gave -> (N, A) float32 as the replay keeps it (one-hot where discrete)."""
        ...

    def learn(self, replay: Any, agent_steps: int) -> dict[str, Any] | None:
        """Do the gradient updates due after ``agent_steps`` environment steps; the latest metrics, if any."""
        ...

    def evaluator(self) -> Agent:
        """A view for evaluation: the same weights, but none of the carried acting state or random streams."""
        ...

    def diagnostics(self, replay: Any) -> dict[str, float]:
        """Slower measurements for the log (contraction bound and the like); draws from no training stream."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
