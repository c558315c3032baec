"""Policy prior and value ensemble on latents, shared by the agents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopwm.model.encoders import mlp
from loopwm.model.heads import ScaledHuber, TwoHot


class ContinuousPolicy(nn.Module):
    """z (..., Z) -> action (..., A) in [-1, 1]: tanh of an MLP, deterministic; noise is the caller's."""

    discrete = False

    def __init__(self, latent_dim: int, action_dim: int, hidden_dim: int, activation: str = "relu"):
        super().__init__()
        self.layers = mlp(latent_dim, hidden_dim, 2, action_dim, activation)
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
    """z (..., Z) -> one-hot (..., A) of the best logit, with the softmax's gradient (1611.01144, section 2.2)."""

    discrete = True

    def __init__(
        self, latent_dim: int, action_dim: int, hidden_dim: int, activation: str = "relu", temperature: float = 1.0
    ):
        super().__init__()
        self.layers = mlp(latent_dim, hidden_dim, 2, action_dim, activation)
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
    """``members`` independent state-action values.

    Args:
        width: of what they read of a state and an action, see ``PlannerAgent.value_input``.
        loss: ``huber``: each is a number in units of a reward (MR.Q, 2501.16142); ``two_hot``: a distribution (TD-MPC2,
            2310.16828).
    """

    def __init__(self, width: int, hidden_dim: int, members: int = 2, loss: str = "two_hot", activation: str = "relu"):
        super().__init__()
        self.code = ScaledHuber() if loss == "huber" else TwoHot(63, -10.0, 10.0)
        self.members = nn.ModuleList(mlp(width, hidden_dim, 2, self.code.bins, activation) for _ in range(members))
        for member in self.members:
            nn.init.zeros_(member[-1].weight)
            nn.init.zeros_(member[-1].bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., width) -> (E, ..., bins), what ``code`` decodes."""
        return torch.stack([member(inputs) for member in self.members])

    def first_value(self, inputs: Tensor) -> Tensor:
        """inputs (..., width) -> value (...,) of the first member alone, at a fraction of the cost."""
        return self.code.decode(self.members[0](inputs))

    def values(self, inputs: Tensor) -> Tensor:
        """inputs (..., width) -> values (E, ...)."""
        return self.code.decode(self.forward(inputs))

    @property
    def unit(self) -> Tensor | None:
        """The unit () of the values; None where there is none, with ``two_hot``."""
        return self.code.scale if isinstance(self.code, ScaledHuber) else None

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """From now on the values are in units of ``scale`` > 0. They stay what they are: the last layer takes up the
        change (as in Pop-Art, 1602.07714), so that no target jumps.
        """
        if self.unit is not None:
            for member in self.members:
                member[-1].weight.mul_(self.unit / scale)
                member[-1].bias.mul_(self.unit / scale)
            self.unit.fill_(scale)
