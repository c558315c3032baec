"""The word problem of S5 for the block of tokens: every letter is a token, and attention reaches all of them at once.

On a row of cells (``grid_tasks.Permutation``) a convolution passes a product on by one letter a loop. A transformer
is not told who stands beside whom, but for the positions in its latents, and could join far letters in few loops.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.grid_tasks import Permutation, PermutationModel
from benchmarks.lab import Recipe

BLOCK = "transformer"
SLOWEST = 1e-4  # of the sinusoids of a position, over the fastest (Vaswani et al. 2017, 1706.03762, section 3.5)


def positions(places: int, width: int) -> Tensor:
    """(places, width) sines and cosines of a place, of geometric frequencies from one to ``SLOWEST``."""
    frequency = torch.exp(torch.arange(0, width, 2) / width * math.log(SLOWEST))
    angle = torch.arange(places).unsqueeze(1) * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class TokenPermutationModel(PermutationModel):
    """row (B, 29, 1, L + 1), end (B, 1, 1, L + 1), as on the grid -> logits (B, 5, 5); latents are tokens (B, G, D).

    Words longer than any in training stand on places that it has not seen, in rows with more tokens to attend to. So
    in training every batch is padded to a random number of tokens, up to the longest of the test, and every word begins
    at a random place (shifted absolute positions: Kiyono et al. 2021, 2109.05644), where in the test all begin at 0.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.places = TokenPermutation.bins[-1][1] + 1
        self.register_buffer("position", positions(2 * self.places, recipe.hidden))

    def read(self, world: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, G, D) and action (B, G, 1), where the word ends."""
        rows, letters = len(world), world.shape[-1]
        tokens, first = letters, torch.zeros(rows, dtype=torch.long, device=world.device)
        if self.training and letters < self.places:
            tokens = int(torch.randint(letters, self.places + 1, ()))
            first = torch.randint(0, self.places, (rows,)).to(world.device)
        places = first.unsqueeze(1) + torch.arange(tokens, device=world.device)
        world, action = (nn.functional.pad(x, (0, tokens - letters)) for x in (world, action))
        z = self.encode(world).flatten(2).mT + self.position[places]
        return z, action.flatten(2).mT

    def decode(self, z_next: Tensor, action: Tensor) -> Tensor:
        return super().decode(z_next[:, : action.shape[-1]].mT.unsqueeze(2), action)


class TokenPermutation(Permutation):
    """``Permutation`` with a token for the state and for every letter."""

    models: ClassVar[dict[str, Recipe]] = {
        "looped": Recipe("looped", block=BLOCK),
        "stacked": Recipe("stacked", block=BLOCK),
        "wide": Recipe("wide", block=BLOCK),
        "single_pass": Recipe("single_pass", block=BLOCK),
        "looped, fixed depth": Recipe("looped", block=BLOCK, fixed=True),
    }
    ladder: ClassVar[dict[str, tuple[tuple[int, int], ...]]] = {
        "looped": ((16, 16), (24, 16), (32, 16)),
        "stacked": ((16, 4), (16, 8), (16, 16), (32, 4), (32, 8), (32, 16)),
        "wide": ((32, 16),),
        "single_pass": ((32, 16),),
    }
    name = "permutation-tokens"

    def model(self, recipe: Recipe) -> TokenPermutationModel:
        return TokenPermutationModel(recipe)
