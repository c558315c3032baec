"""What is read off the loop state: reward, continuation. And two codes of a scalar that make regression scale-free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopwm.model.encoders import mlp, symlog


def symexp(x: Tensor) -> Tensor:
    """Inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class TwoHot(nn.Module):
    """A scalar as a distribution over ``bins`` values, symexp of equal steps in [low, high] (2301.04104v2, eq. 9-10).

    Mean and code are linear in the scalar itself, not in its symlog: an expectation taken in symlog space lies below
    that of the scalar wherever there is spread, and bootstrapping would pile the difference up.
    """

    centers: Tensor

    def __init__(self, bins: int, low: float, high: float):
        super().__init__()
        if bins < 2 or low >= high:
            raise ValueError(f"need bins >= 2 and low < high, got {bins}, {low}, {high}")
        self.bins, self.low, self.step = bins, low, (high - low) / (bins - 1)
        self.register_buffer("centers", symexp(torch.linspace(low, high, bins)), persistent=False)

    def decode(self, logits: Tensor) -> Tensor:
        """Expected value (...,) of logits (..., bins)."""
        return torch.softmax(logits, -1) @ self.centers

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (...,) of logits (..., bins) with the two-hot code of target (...,)."""
        position = (symlog(target) - self.low) / self.step
        below = position.floor().nan_to_num(0.0).clamp(0, self.bins - 2).long()  # the loss of no number is none either
        under, over = self.centers[below], self.centers[below + 1]
        weight = ((target - under) / (over - under)).clamp(0, 1).unsqueeze(-1)  # (..., 1), share of the upper bin
        index = below.unsqueeze(-1)
        log_p = torch.log_softmax(logits, -1)
        lower, upper = log_p.gather(-1, index), log_p.gather(-1, index + 1)
        return -(lower + weight * (upper - lower)).squeeze(-1)


class ScaledHuber(nn.Module):
    """A scalar as one number in units of ``scale``, and the Huber loss with its bend at one unit.

    The loss of the values of MR.Q (2501.16142, section 4), whose unit is the mean size of a reward. Steps and gradients
    are alike at every height, where the bins of a two-hot code lie ever further apart.
    """

    bins = 1
    scale: Tensor  # (), > 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def decode(self, out: Tensor) -> Tensor:
        """out (..., 1) -> scalar (...,)."""
        return out.squeeze(-1) * self.scale

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Huber loss (...,) of out (..., 1) for the scalar target (...,)."""
        return nn.functional.smooth_l1_loss(out.squeeze(-1), target / self.scale, reduction="none")


def mean_pool(h: Tensor) -> Tensor:
    """Global average pooling: loop states of grids (..., D, S, S) -> their mean over the cells (..., D)."""
    return h.mean((-2, -1))


class RewardHead(nn.Module):
    """Loop state h (..., D), or with ``grid`` (..., D, S, S), -> two-hot reward logits (..., bins)."""

    def __init__(
        self,
        state_dim: int,
        hidden_dim: int,
        bins: int = 63,
        limit: float = 6.0,
        activation: str = "relu",
        grid: bool = False,
    ):
        super().__init__()
        self.grid = grid
        self.layers = nn.Sequential(nn.LayerNorm(state_dim), mlp(state_dim, hidden_dim, 1, bins, activation))
        self.code = TwoHot(bins, -limit, limit)
        nn.init.zeros_(self.layers[-1][-1].weight)
        nn.init.zeros_(self.layers[-1][-1].bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(mean_pool(h) if self.grid else h)


class ContinuationHead(nn.Module):
    """Loop state h (..., D), or (..., D, S, S), -> logit (...,) that the episode does not terminate with this step."""

    def __init__(self, state_dim: int, hidden_dim: int, activation: str = "relu", grid: bool = False):
        super().__init__()
        self.grid = grid
        self.layers = nn.Sequential(nn.LayerNorm(state_dim), mlp(state_dim, hidden_dim, 1, 1, activation))
        nn.init.constant_(self.layers[-1][-1].bias, 4.0)  # terminations are rare: start from p = 0.98

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(mean_pool(h) if self.grid else h).squeeze(-1)
