"""obs -> latent z. One normalisation, shared by encoder and dynamics, keeps every latent on the same scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import LatentNorm
from loopwm.dynamics.conv import channels_first, channels_last


def latent_spread(z: Tensor) -> dict[str, float]:
    """How latents z (..., Z), from two rows on, differ from one another.

    Latents that are trained to be predicted are predicted best where they are all alike, and a constant vector passes
    ``LatentNorm``: so look.

    Returns:
        ``variance``: over the rows, mean over Z; with ``LatentNorm`` at most 1, up to n / (n - 1) for n rows. ``rank``:
        in how many directions alike they would have to vary to vary as they do, from 1 to Z (0: nowhere); the
        participation ratio of the covariance's eigenvalues, (their sum)^2 over the sum of their squares.
    """
    covariance = torch.cov(z.flatten(0, -2).T)  # (Z, Z)
    total, squares = float(covariance.trace()), float(covariance.square().sum())
    return {"variance": total / len(covariance), "rank": total**2 / squares if squares else 0.0}


def step_error(ahead: Tensor, z: Tensor, z_next: Tensor) -> float:
    """Squared error of the predictions ``ahead`` as a share of the steps from z to z_next, (..., Z) each, in all.

    0: exact; 1: no better than to predict that nothing moves. nan where nothing does.
    """
    moved = float((z_next - z).square().sum())
    return float((ahead - z_next).square().sum()) / moved if moved else math.nan


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), the compression of DreamerV3 (2301.04104v2, eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


def mlp(width_in: int, hidden: int, layers: int, width_out: int, activation: str = "relu") -> nn.Sequential:
    """``layers`` blocks of Linear, LayerNorm and an activation of ``ACTIVATIONS``, then a Linear to ``width_out``.

    Raises:
        ValueError: fewer layers than none, or another activation.
    """
    if layers < 0:
        raise ValueError(f"an MLP needs at least one linear layer, got {layers + 1}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Linear(width_in if i == 0 else hidden, hidden), nn.LayerNorm(hidden), ACTIVATIONS[activation]()]
    modules.append(nn.Linear(hidden if layers else width_in, width_out))
    return nn.Sequential(*modules)


class MLPEncoder(nn.Module):
    """State observations (..., O) -> z (..., Z): symlog, MLP, latent norm."""

    side = 0  # no grid

    def __init__(self, obs_dim: int, latent_dim: int, hidden_dim: int, layers: int = 2, activation: str = "relu"):
        super().__init__()
        self.layers = mlp(obs_dim, hidden_dim, layers - 1, latent_dim, activation)
        self.norm, self.width = LatentNorm(latent_dim), latent_dim

    def forward(self, obs: Tensor) -> Tensor:
        return self.norm(self.layers(symlog(obs)))


class CellNorm(LatentNorm):
    """``LatentNorm`` of the channels of each cell: (..., C, S, S)."""

    def forward(self, z: Tensor) -> Tensor:
        return channels_first(super().forward(channels_last(z)))


class GridEncoder(nn.Module):
    """Observations (..., S S F) of a grid, cell by cell in rows with F numbers each -> z (..., Z S S): Z channels.

    The same network in every cell: what a cell has to know of others is for the dynamics to carry there.

    Raises:
        ValueError: observations that are no such grid.
    """

    def __init__(
        self,
        obs_dim: int,
        latent_dim: int,
        hidden_dim: int,
        layers: int = 2,
        activation: str = "relu",
        side: int = 0,
    ):
        super().__init__()
        self.side = side or math.isqrt(obs_dim)
        if not side and self.side**2 != obs_dim or obs_dim % self.side**2:
            what = f"{self.side} by {self.side} cells" if side else "a square with one number a cell: set encoder.side"
            raise ValueError(f"observations of {obs_dim} numbers are not {what}")
        self.features = obs_dim // self.side**2  # F
        self.layers = mlp(self.features, hidden_dim, layers - 1, latent_dim, activation)
        self.norm, self.width = CellNorm(latent_dim), latent_dim * self.side**2

    def forward(self, obs: Tensor) -> Tensor:
        cells = symlog(obs).unflatten(-1, (self.side, self.side, self.features))
        return self.norm(channels_first(self.layers(cells))).flatten(-3)


ENCODERS: dict[str, type[nn.Module]] = {"mlp": MLPEncoder, "grid": GridEncoder}
