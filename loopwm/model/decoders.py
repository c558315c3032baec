"""Latent z -> obs: the way back from the encoder."""

from __future__ import annotations

from torch import Tensor, nn

from loopwm.model.encoders import mlp, symlog
from loopwm.model.heads import symexp


class MLPDecoder(nn.Module):
    """z (..., Z) -> state observations (..., O): an MLP that predicts symlog(obs), what ``MLPEncoder`` sees of it."""

    def __init__(self, latent_dim: int, obs_dim: int, hidden_dim: int, layers: int = 2):
        super().__init__()
        self.layers = mlp(latent_dim, hidden_dim, layers - 1, obs_dim)

    def forward(self, z: Tensor) -> Tensor:
        """The observation (..., O) in its own units."""
        return symexp(self.layers(z))

    def loss(self, z: Tensor, obs: Tensor) -> Tensor:
        """Mean over O of the squared error of symlog(obs) (2301.04104, eq. 10): (..., Z), (..., O) -> (...,)."""
        return (self.layers(z) - symlog(obs)).square().mean(-1)


DECODERS: dict[str, type[nn.Module]] = {"mlp": MLPDecoder}
