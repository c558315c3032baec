"""The world model: encoder, latent dynamics, reward and continuation heads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import Depth, DynamicsOutput
from loopwm.dynamics.cell import Cell
from loopwm.dynamics.halting.steps import PredictionHalting
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
    h: Tensor  # (H, B, D) or, of grids, (H, B, D, S, S), loop states: z[t], action[t] -> h[t] -> z[t + 1], reward[t]
    outputs: list[DynamicsOutput]

    @property
    def loops(self) -> Tensor:
        """(H, B) int64, how often the block was applied; stacked when asked for."""
        return torch.stack([out.loops for out in self.outputs])

    def early(self, generator: torch.Generator | None = None) -> Rollout:
        """What every step would have predicted at one random earlier loop (see ``DynamicsOutput.early``).

        Each step starts where this rollout's step did, so the losses of an early rollout are those of early exits.

        Raises:
            ValueError: where the earlier loops were not kept.
        """
        early = [out.early(generator) for out in self.outputs]
        z = torch.stack([self.z[0], *(out.z_next for out in early)])
        return Rollout(z, torch.stack([out.h for out in early]), early)


class WorldModel(nn.Module):
    """encode, step, rollout, decode.

    Args:
        encoder: obs (..., O) -> z (..., Z). dynamics: see ``loopwm.dynamics``. head_dim: hidden width of the heads.
        decoder: z (..., Z) -> obs (..., O), of ``DECODERS`` or a ``LinearDecoder``; None: nothing is decoded.
        activation: of the heads, a name in ``ACTIVATIONS``. grid: the loop states are grids (B, D, S, S).

    Raises:
        ValueError: dynamics of tokens (block ``transformer``), whose states the heads cannot read.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dynamics: nn.Module,
        head_dim: int,
        decoder: nn.Module | None = None,
        activation: str = "relu",
        grid: bool = False,
    ):
        super().__init__()
        if any(cell.places == (1,) for cell in dynamics.modules() if isinstance(cell, Cell)):
            raise ValueError("reward and continuation are read off vectors and grids, not off tokens")
        self.encoder, self.dynamics = encoder, dynamics
        self.reward = RewardHead(dynamics.state_dim, head_dim, activation=activation, grid=grid)
        self.continuation = ContinuationHead(dynamics.state_dim, head_dim // 2, activation, grid)
        self.decoder = decoder
        for rule in self._prediction_rules():
            if rule.readout is None:
                rule.read_off(self._readout)

    def _prediction_rules(self) -> list[PredictionHalting]:
        return [rule for rule in self.dynamics.modules() if isinstance(rule, PredictionHalting)]

    def halt_on(self, readout: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Let the rule that halts by a prediction, if there is one, look at ``readout`` in place of the heads here."""
        for rule in self._prediction_rules():
            rule.read_off(readout)

    def heads(self) -> list[nn.Module]:
        """What is read off the latents and the loop's states."""
        return [head for head in (self.reward, self.continuation, self.decoder) if head is not None]

    def encode(self, obs: Tensor) -> Tensor:
        """obs (..., O) -> z (..., Z)."""
        return self.encoder(obs)

    def decode(self, z: Tensor) -> Tensor:
        """z (..., Z) -> obs (..., O).

        Raises:
            ValueError: a model without a decoder.
        """
        if self.decoder is None:
            raise ValueError("this world model has no decoder: build it with decoder=MLPDecoder(...)")
        return self.decoder(z)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the weights do not change, so what depends on them alone is computed once (see ``LoopCell``)."""
        return self.dynamics.frozen()

    def step(self, z: Tensor, action: Tensor, depth: Depth = None) -> Step:
        """Imagine one step: z (B, Z), action (B, A) -> ``Step``."""
        out = self.dynamics(z, action, depth)
        reward = self.reward.code.decode(self.reward(out.h))
        return Step(out.z_next, reward, torch.sigmoid(self.continuation(out.h)), out)

    def rollout(self, z: Tensor, actions: Tensor, depth: Depth = None, warm_start: bool = False) -> Rollout:
        """Imagine H steps of given actions: z (B, Z), actions (H, B, A) -> ``Rollout``.

        ``depth`` holds for every step; None lets each prediction choose its own. With ``warm_start`` every step but
        the first starts from the last state of the step before (the ``h0`` of the dynamics).

        Raises:
            ValueError: no step.
        """
        if not len(actions):
            raise ValueError("a rollout needs at least one action")
        zs, hs, outputs = [z], [], []
        for action in actions:
            carried = {"h0": hs[-1]} if warm_start and hs else {}
            out = self.dynamics(zs[-1], action, depth, **carried)
            zs.append(out.z_next)
            hs.append(out.h)
            outputs.append(out)
        return Rollout(torch.stack(zs), torch.stack(hs), outputs)

    def predict(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Loop states h (..., D), of grids (..., D, S, S), -> reward (...,) and continuation probability (...,)."""
        return self.reward.code.decode(self.reward(h)), torch.sigmoid(self.continuation(h))

    def _readout(self, z: Tensor, h: Tensor) -> Tensor:
        """Loop states h (..., D) -> (..., 2): what halting by the change of the prediction looks at."""
        return torch.stack(self.predict(h), -1)
