"""The block of grid latents: a 3 x 3 convolution, an activation, a 1 x 1 convolution, on states h (B, D, S, S)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils import parametrize

from loopwm.dynamics.base import Coda, Prelude, make_start
from loopwm.dynamics.cell import MODES, Cell, FoldedWeights, PreparedLoop
from loopwm.dynamics.spectral import UnitSpectralNorm
from loopwm.dynamics.spectral_conv import UnitConvolutionNorm, convolution_norm


def channels_last(x: Tensor) -> Tensor:
    """(..., C, S, S) -> (..., S, S, C)."""
    return x.movedim(-3, -1)


def channels_first(x: Tensor) -> Tensor:
    """(..., S, S, C) -> (..., C, S, S)."""
    return x.movedim(-1, -3)


class GridPrelude(Prelude):
    """The prelude cell by cell: z (B, Z, S, S) and action (B, A, S, S), or (B, A) for every cell, -> e (B, D, S, S).

    Raises ValueError: other shapes.
    """

    layout = "z (B, {z}, S, S) and action (B, {a}, S, S) or (B, {a})"
    axes = 4

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        self.check(z, action)
        if action.ndim == 2:
            action = action[:, :, None, None]
        action = action.expand(-1, -1, *z.shape[2:])
        return channels_first(self.embed(channels_last(z), channels_last(action)))


class GridLinear(nn.Linear):
    """The same matrix in every cell: (..., C, S, S) -> (..., C', S, S)."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward(channels_last(x)))


class GridCoda(Coda):
    """The coda cell by cell; ``latent_norm`` gets (B, Z, S, S)."""

    def step(self, h: Tensor) -> Tensor:
        return channels_first(super().step(channels_last(h)))


class ConvCell(Cell):
    """One loop on a grid h (B, D, S, S) with injected input e (B, D, S, S): R(h, e) = W2 s(W1 * h + U e + b).

    W1 is a 3 x 3 convolution to W = ``block_dim`` channels, zero-padded; U, b and W2 are 1 x 1; Abar and Bbar are one
    number a channel. In mode ``certified`` W1 and W2 have operator norms of at most one on a grid of any size S (see
    ``spectral_conv``). The rest: see ``Cell``.

    On a GPU torch computes float32 convolutions in TF32 unless ``torch.backends.cudnn.allow_tf32`` is False: 10 bits,
    which the allowance for rounding in ``distance_to_fixed_point`` does not cover.
    """

    name = "conv"
    prelude, coda = GridPrelude, GridCoda
    places = (2, 3)
    flops = (10, 1)  # nine neighbours and W2; U

    @staticmethod
    def start(latent_dim: int, hidden_dim: int) -> nn.Module:
        return make_start(latent_dim, hidden_dim, GridLinear)

    def __init__(self, hidden_dim: int, block_dim: int, *args, **kwargs):
        super().__init__(hidden_dim, block_dim, *args, **kwargs)
        self.read = nn.Conv2d(hidden_dim, block_dim, 3, padding=1, bias=False)  # W1
        self.inject = GridLinear(hidden_dim, block_dim)  # U, b: free, they do not touch dh'/dh
        self.write = nn.Linear(block_dim, hidden_dim, bias=False)  # W2
        nn.init.zeros_(self.write.weight)
        if MODES[self.mode].certified:
            parametrize.register_parametrization(self.read, "weight", UnitConvolutionNorm())
            parametrize.register_parametrization(self.write, "weight", UnitSpectralNorm(), unsafe=True)

    def fold(self) -> FoldedWeights:
        decay = self.decay()
        input_scale = self.input_scale(decay)
        if isinstance(input_scale, Tensor):
            input_scale = input_scale[:, None, None]  # (D, 1, 1)
        write = (self.write.weight * self.block_scale(decay))[:, :, None, None]  # (D, W, 1, 1)
        return decay[:, None, None], input_scale, self.read.weight, write

    def prepare(self, e: Tensor) -> ConvLoop:
        decay, input_scale, read, write = self.folded()
        return ConvLoop(decay, e * input_scale, self.inject(e), read, write, self.activation)

    def norms(self, folded: FoldedWeights) -> list[Tensor]:
        *_, read, write = folded
        return [convolution_norm(read.double()), torch.linalg.matrix_norm(write[:, :, 0, 0].double(), 2)]


class ConvLoop(PreparedLoop):
    """A convolutional cell with its weights and its input fixed."""

    __slots__ = ()
    fused = False
    # Every batch size is another convolution to oneDNN: with a gate, on words of mixed lengths, a prediction takes 0.79
    # of the time that it takes if rows leave one by one (0.05 to 0.25 are level, 0.5 is worse; 500 rows, one core).
    waiting = 0.125

    def __call__(self, h: Tensor) -> Tensor:
        inner = self.activation(conv2d(h, self.read, padding="same") + self.injected)  # (B, W, S, S)
        return torch.addcmul(self.constant, h, self.decay) + conv2d(inner, self.write)  # (B, D, S, S)
