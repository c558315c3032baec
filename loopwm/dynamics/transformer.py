"""The block of token latents: self-attention and an MLP on states h (B, G, D), G tokens of width D."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from loopwm.dynamics.base import Prelude
from loopwm.dynamics.cell import CERTIFIED, Cell

HEADS = 4


class TokenPrelude(Prelude):
    """The prelude token by token: z (B, G, Z) and action (B, G, A), or (B, A) for every token, -> e (B, G, D).

    Raises ValueError: other shapes.
    """

    layout = "z (B, G, {z}) and action (B, G, {a}) or (B, {a})"
    axes, channel = 3, 2

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        self.check(z, action)
        if action.ndim == 2:
            action = action.unsqueeze(1)
        return self.embed(z, action.expand(-1, z.shape[1], -1))


class TransformerCell(Cell):
    """One loop on tokens h (B, G, D) with injected input e (B, G, D): R(h, e) = m + W2 s(W1 norm(h + m) + U e + b).

    m is the softmax dot-product self-attention of norm(h + e), with 4 heads that are W = ``block_dim`` wide together.
    Which token is which must be in z: nothing here knows.

    There is no certified mode: dot-product attention has no Lipschitz constant (Kim et al. 2021, 2006.04710,
    theorem 3.1), nor has a norm near zero, so ``lipschitz_bound()`` is infinite. The rest: see ``Cell``.

    Raises:
        ValueError: a certified mode, or a block_dim that 4 does not divide.
    """

    name = "transformer"
    prelude = TokenPrelude
    places = (1,)
    lacks: ClassVar[dict[str, str]] = dict.fromkeys(CERTIFIED, "since dot-product attention has no Lipschitz constant")
    flops = (6, 1)  # queries, keys, values, their join, W1 and W2; U. Scores add G / 3 D to the six: little, if G < D

    @staticmethod
    def width_multiple(hidden_dim: int) -> int:
        return HEADS

    def __init__(self, hidden_dim: int, block_dim: int, *args, **kwargs):
        super().__init__(hidden_dim, block_dim, *args, **kwargs)
        if block_dim % HEADS:
            raise ValueError(f"block 'transformer' needs a block_dim that {HEADS} divides, got {block_dim}")
        self.norm_attention, self.norm_mlp = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.attend = nn.Linear(hidden_dim, 3 * block_dim, bias=False)  # queries, keys, values
        self.join = nn.Linear(block_dim, hidden_dim, bias=False)
        self.read = nn.Linear(hidden_dim, block_dim, bias=False)  # W1
        self.inject = nn.Linear(hidden_dim, block_dim)  # U, b
        self.write = nn.Linear(block_dim, hidden_dim, bias=False)  # W2
        nn.init.zeros_(self.join.weight)
        nn.init.zeros_(self.write.weight)

    def fold(self) -> tuple[Tensor, Tensor | float]:
        decay = self.decay()
        return decay, self.input_scale(decay)

    def prepare(self, e: Tensor) -> TransformerLoop:
        decay, input_scale = self.folded()
        return TransformerLoop(self, decay, e, e * input_scale, self.inject(e))

    def attention(self, x: Tensor) -> Tensor:
        """m (B, G, D) of tokens x (B, G, D)."""
        query, key, value = self.attend(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, G, w)
        # Written out: torch's own attention has no second derivative on the CPU, which the Jacobian penalty takes.
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # (B, heads, G, G)
        return self.join((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def norms(self, folded: tuple) -> list[Tensor]:
        return [torch.tensor(math.inf)]


class TransformerLoop:
    """A transformer cell with its input fixed."""

    __slots__ = ("cell", "decay", "e", "constant", "injected")
    fused = False
    waiting = 0.0

    def __init__(self, cell: TransformerCell, decay: Tensor, e: Tensor, constant: Tensor, injected: Tensor):
        self.cell, self.decay, self.e, self.constant, self.injected = cell, decay, e, constant, injected

    def __call__(self, h: Tensor) -> Tensor:
        cell = self.cell
        mixed = cell.attention(cell.norm_attention(h + self.e))  # (B, G, D)
        inner = cell.activation(cell.read(cell.norm_mlp(h + mixed)) + self.injected)  # (B, G, W)
        return torch.addcmul(self.constant, h, self.decay) + mixed + cell.write(inner)

    def first(self, rows: int) -> TransformerLoop:
        """The same loop on the first ``rows`` samples."""
        return TransformerLoop(self.cell, self.decay, self.e[:rows], self.constant[:rows], self.injected[:rows])

    def select(self, index: Tensor) -> TransformerLoop:
        """The same loop on the samples ``index`` (n,)."""
        e, constant, injected = (x.index_select(0, index) for x in (self.e, self.constant, self.injected))
        return TransformerLoop(self.cell, self.decay, e, constant, injected)
