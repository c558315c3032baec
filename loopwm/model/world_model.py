"""The world model: encoder, latent dynamics, reward and continuation heads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import Depth, DynamicsOutput
from loopwm.model.heads import ContinuationHead, RewardHead


class Step(NamedTuple):
    """One imagined step."""

    z_next: Tensor  # (B, Z)
    reward: Tensor  # (B,) in the environment's units
    continuation: Tensor  # (B,) probability in [0, 1] that the episode goes on
    out: DynamicsOutput


class Rollout(NamedTuple):
    """H imagined steps, time first."""

    z: Tensor  # (H + 1, B, Z), z[0] the start
    h: Tensor  # (H, B, D), loop states: z[t], action[t] -> h[t] -> z[t + 1], reward[t]
    outputs: list[DynamicsOutput]

    @property
    def loops(self) -> Tensor:
        """(H, B) int64, how often the block was applied; stacked when asked for."""
        return torch.stack([out.loops for out in self.outputs])


class WorldModel(nn.Module):
    """encode, step, rollout.

    Args:
        encoder: obs (..., O) -> z (..., Z). dynamics: see ``loopwm.dynamics``. head_dim: hidden width of the heads.
    """

    def __init__(self, encoder: nn.Module, dynamics: nn.Module, head_dim: int):
        super().__init__()
        self.encoder, self.dynamics = encoder, dynamics
        self.reward = RewardHead(dynamics.state_dim, head_dim)
        self.continuation = ContinuationHead(dynamics.state_dim, head_dim // 2)

    def encode(self, obs: Tensor) -> Tensor:
        """obs (..., O) -> z (..., Z)."""
        return self.encoder(obs)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the weights do not change, so what depends on them alone is computed once (see ``LoopCell``)."""
        return self.dynamics.frozen()

    def step(self, z: Tensor, action: Tensor, depth: Depth = None) -> Step:
        """Imagine one step: z (B, Z), action (B, A) -> ``Step``."""
        out = self.dynamics(z, action, depth)
        reward = self.reward.code.decode(self.reward(out.h))
        return Step(out.z_next, reward, torch.sigmoid(self.continuation(out.h)), out)

    def rollout(self, z: Tensor, actions: Tensor, depth: Depth = None) -> Rollout:
        """Imagine H steps of given actions: z (B, Z), actions (H, B, A) -> ``Rollout``.

        ``depth`` holds for every step; None lets each prediction choose its own.
        """
        zs, hs, outputs = [z], [], []
        for action in actions:
            out = self.dynamics(zs[-1], action, depth)
            zs.append(out.z_next)
            hs.append(out.h)
            outputs.append(out)
        return Rollout(torch.stack(zs), torch.stack(hs), outputs)

    def predict(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Loop states h (..., D) -> reward (...,) and continuation probability (...,)."""
        return self.reward.code.decode(self.reward(h)), torch.sigmoid(self.continuation(h))
