"""How new a latent is, for plans whose sequences do not differ in what they are worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Novelty(nn.Module):
    """Error with which a network predicts what a random one says of a latent: small where it has learnt to.

    Random network distillation (Burda et al. 2018, 1810.12894, section 2.2). The predictor alone is trained.

    Args:
        latent_dim: Z. generator: of the first weights of both. hidden_dim, features: widths of both.
    """

    def __init__(self, latent_dim: int, generator: torch.Generator, hidden_dim: int = 64, features: int = 32):
        super().__init__()
        widths = (latent_dim, hidden_dim, hidden_dim, features)
        self.random, self.predictor = _relu_mlp(widths, generator), _relu_mlp(widths, generator)
        self.random.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., Z) -> mean squared error (...,) over the features."""
        return (self.predictor(z) - self.random(z)).square().mean(-1)


def _relu_mlp(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths, widths[1:], strict=False):
        layer = nn.Linear(width_in, width_out)
        with torch.no_grad():  # He et al. 2015, 1502.01852, eq. 10: keeps the scale of z through the layers
            layer.weight.normal_(0.0, (2.0 / width_in) ** 0.5, generator=generator)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
