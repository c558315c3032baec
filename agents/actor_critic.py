"""Policy prior and value ensemble on latents, shared by the agents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopwm.model.encoders import mlp
from loopwm.model.heads import TwoHot


class ContinuousPolicy(nn.Module):
    """z (..., Z) -> action (..., A) in [-1, 1]: tanh of an MLP, deterministic; noise is the caller's."""

    discrete = False

    def __init__(self, latent_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.layers = mlp(latent_dim, hidden_dim, 2, action_dim)
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(action (..., A), pre-activation (..., A))."""
        raw = self.layers(z)
        return torch.tanh(raw), raw

    def perturb(self, action: Tensor, std: float, clip: float, generator: torch.Generator) -> Tensor:
        """Target smoothing (TD3, 1802.09477 eq. 14): clipped Gaussian noise, kept inside [-1, 1]."""
        noise = torch.randn(action.shape, generator=generator, device=action.device) * std
        return (action + noise.clamp_(-clip, clip)).clamp_(-1.0, 1.0)


class DiscretePolicy(nn.Module):
    """z (..., Z) -> one-hot action (..., A) of the best logit, with the softmax's gradient (1308.3432)."""

    discrete = True

    def __init__(self, latent_dim: int, action_dim: int, hidden_dim: int, temperature: float = 1.0):
        super().__init__()
        self.layers = mlp(latent_dim, hidden_dim, 2, action_dim)
        self.temperature = temperature

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(one-hot action (..., A), logits (..., A)), so that dQ/da reaches the logits."""
        logits = self.layers(z)
        soft = torch.softmax(logits / self.temperature, -1)
        hard = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
        return hard + soft - soft.detach(), logits

    def perturb(self, action: Tensor, std: float, clip: float, generator: torch.Generator) -> Tensor:
        """Epsilon-greedy with epsilon = std: a uniformly drawn one-hot action replaces a share of the rows."""
        drawn = torch.randint(action.shape[-1], action.shape[:-1], generator=generator, device=action.device)
        random = torch.nn.functional.one_hot(drawn, action.shape[-1]).to(action.dtype)
        swap = torch.rand(action.shape[:-1], generator=generator, device=action.device).unsqueeze(-1) < std
        return torch.where(swap, random, action)


class ValueEnsemble(nn.Module):
    """``members`` independent state-action values, each a two-hot distribution (TD-MPC2, 2310.16828).

    Args:
        width: of what they read of a state and an action, see ``PlannerAgent.pair``.
    """

    def __init__(self, width: int, hidden_dim: int, members: int = 2, bins: int = 63, limit: float = 10.0):
        super().__init__()
        self.members = nn.ModuleList(mlp(width, hidden_dim, 2, bins) for _ in range(members))
        self.code = TwoHot(bins, -limit, limit)
        for member in self.members:
            nn.init.zeros_(member[-1].weight)
            nn.init.zeros_(member[-1].bias)

    def forward(self, pair: Tensor) -> Tensor:
        """pair (..., width) -> logits (E, ..., bins)."""
        return torch.stack([member(pair) for member in self.members])

    def first_value(self, pair: Tensor) -> Tensor:
        """pair (..., width) -> value (...,) of the first member alone, at a fraction of the cost."""
        return self.code.decode(self.members[0](pair))

    def values(self, pair: Tensor) -> Tensor:
        """pair (..., width) -> values (E, ...)."""
        return self.code.decode(self.forward(pair))
