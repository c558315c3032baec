"""Latent z -> obs: the way back from the encoder."""

from __future__ import annotations

from torch import Tensor, nn

from loopwm.model.encoders import mlp, symlog
from loopwm.model.heads import symexp


class Decoder(nn.Module):
    """z (..., Z) -> state observations (..., O) by way of symlog(obs), which is what ``MLPEncoder`` sees of them."""

    def squashed(self, z: Tensor) -> Tensor:
        """symlog of the observation: (..., Z) -> (..., O)."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        """The observation (..., O) in its own units."""
        return symexp(self.squashed(z))

    def loss(self, z: Tensor, obs: Tensor) -> Tensor:
        """Mean over O of the squared error of symlog(obs) (2301.04104v2, eq. 8): (..., Z), (..., O) -> (...,)."""
        return (self.squashed(z) - symlog(obs)).square().mean(-1)


class MLPDecoder(Decoder):
    """An MLP of ``layers`` layers."""

    def __init__(self, latent_dim: int, obs_dim: int, hidden_dim: int, layers: int = 2):
        super().__init__()
        self.layers = mlp(latent_dim, hidden_dim, layers - 1, obs_dim)

    def squashed(self, z: Tensor) -> Tensor:
        return self.layers(z)


class LinearDecoder(Decoder):
    """One matrix, so that what it reads lies open in the latent."""

    LEAST_SPREAD = 0.1  # units of symlog(obs): an entry that varies less is hardly worth a latent

    def __init__(self, latent_dim: int, obs_dim: int):
        super().__init__()
        self.layer = nn.Linear(latent_dim, obs_dim)

    def squashed(self, z: Tensor) -> Tensor:
        return self.layer(z)

    def unexplained(self, z: Tensor, obs: Tensor, mask: Tensor) -> Tensor:
        """Share of the variance of symlog(obs) over the valid rows that z leaves unexplained: a scalar ().

        So an entry counts by how much of it is known, not by its units. The mean is over the entries whose standard
        deviation is at least ``LEAST_SPREAD``, and that is added to each: a constant would count without end until its
        offset is learnt. z (..., Z), obs (..., O), mask (...), 1: valid.
        """
        truth, valid = symlog(obs), mask.unsqueeze(-1)
        rows, floor = valid.sum().clamp_min(1.0), self.LEAST_SPREAD**2

        def mean(x: Tensor) -> Tensor:
            """x (..., O) over the valid rows: (O,)."""
            return (x * valid).flatten(0, -2).sum(0) / rows

        variance = mean((truth - mean(truth)).square())
        error = mean((self.squashed(z) - truth).square())
        varies = (variance >= floor).to(error.dtype)
        return (error / (variance + floor) * varies).sum() / varies.sum().clamp_min(1.0)


DECODERS: dict[str, type[Decoder]] = {"mlp": MLPDecoder}
