"""A grid block that contracts in the LARGEST entry of the state, not in its Euclidean norm, and still relays a bit.

Why another norm: a cell that passes a change on to its four neighbours turns one changed entry into four, so a map of
Euclidean norm one must pass on half of it at most, and a quarter where each neighbour is told apart. What reaches a
place n cells away has shrunk by 2 ** n, whatever the training does. In the largest entry nothing has to shrink: max,
min and sorting are 1-Lipschitz there, and so is a weighted sum whose weights add up to one in absolute value. A loop of
them with factor gamma is the sup-norm contraction of value iteration and of discounted reachability: what is reached
after n loops stands at gamma ** n, what only supports itself decays, and the fixed point is the least one that the
input asks for. Ranks are what a sum would be used for elsewhere: "at least k of my neighbours" is their k-th largest.

Sorting for sup-norm Lipschitz networks: Anil, Lucas and Grosse 2019 (1811.05381, section 4); rank filters are the order
statistics of image processing; the maximum of affine maps is maxout (Goodfellow et al. 2013, 1302.4389).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from loopwm.dynamics.cell import MODES, Cell
from loopwm.dynamics.conv import GridCoda, GridLinear, GridPrelude
from loopwm.dynamics.spectral import autocasts, check_precision, first_order

SOURCES = 5  # the cell itself and the order statistics of its four neighbours
SORT_FOUR = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))  # comparators that sort four values, largest first
ROW_MARGIN = 1e-5  # the rounding of a sum of a few hundred float32 numbers, and of the quotients
DECAY_INIT = 0.05  # a wave front has to pass in one loop: what the linear path keeps of the past holds it back
START_WEIGHT = 0.9  # of the one source that a piece looks at before training; the rest is spread thinly


class UnitRowSum(nn.Module):
    """Parametrisation: divides the rows of a matrix whose absolute sum is above one by that sum.

    Raises:
        TypeError: see ``check_precision``.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """weight (m, n) -> (m, n) whose rows have absolute sums of at most one."""
        check_precision(weight)
        total = weight.abs().sum(1, keepdim=True) * (1.0 + ROW_MARGIN)
        return weight / total.clamp_min(1.0)


class ZeroStart(nn.Module):
    """h0 = 0 (B, D, S, S) of latents z (B, Z, S, S): the loop climbs to its fixed point from below."""

    def __init__(self, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, z: Tensor) -> Tensor:
        """z (B, Z, S, S) -> zeros (B, D, S, S)."""
        return z.new_zeros(z.shape[0], self.hidden_dim, *z.shape[2:])


class RankCell(Cell):
    """One loop on a grid h (B, D, S, S) with injected input e (B, D, S, S), K = ``block_dim`` / D pieces an entry:

        R(h, e)_c = max_k (w_ck . [h, sort(neighbours of h)] + u_ck . e + b_ck)

    sort is taken channel by channel over the four neighbours, zeros outside the grid, largest first. In mode
    ``certified`` the absolute row sums of w are at most one, and entry c of the block is scaled by
    gamma (1 - Abar_c), so that one loop contracts by rho = max_c (Abar_c + gamma (1 - Abar_c)) < 1 in the sup norm
    (``norm_order``), in which ``distance_to_fixed_point`` and the certified rule then speak. It does not know one
    neighbour from another: where directions matter they must be in z. ``activation`` is not used. The loop starts
    at zero, not at z; B starts at zero, since the pieces have e already. The rest: see ``Cell``.

    Raises:
        ValueError: a block_dim that is no multiple of hidden_dim.
    """

    name = "rank"
    prelude, start, coda = GridPrelude, ZeroStart, GridCoda
    places = (2, 3)
    norm_order = math.inf
    flops = (SOURCES, 1)  # the pieces' sources; U

    @staticmethod
    def width_multiple(hidden_dim: int) -> int:
        return hidden_dim

    def __init__(self, hidden_dim: int, block_dim: int, *args, **kwargs):
        super().__init__(hidden_dim, block_dim, *args, **kwargs)
        if block_dim % hidden_dim:
            raise ValueError(f"block 'rank' needs a block_dim that is a multiple of {hidden_dim}, got {block_dim}")
        self.read = nn.Linear(SOURCES * hidden_dim, block_dim, bias=False)  # w, piece by piece: row k D + c
        self.inject = GridLinear(hidden_dim, block_dim)  # u, b: free, they do not touch dh'/dh
        with torch.no_grad():
            self.log_dt.fill_(math.log(-math.log(DECAY_INIT)))
            self.input_gain.zero_()
            # Dense rows of absolute sum one would average everything away: each piece starts with one source.
            self.read.weight.normal_(0.0, (1.0 - START_WEIGHT) / self.read.in_features)
            chosen = torch.randint(self.read.in_features, (block_dim, 1))
            self.read.weight.scatter_add_(1, chosen, torch.full((block_dim, 1), START_WEIGHT))
        if MODES[self.mode].certified:
            parametrize.register_parametrization(self.read, "weight", UnitRowSum())

    def block_scale(self, decay: Tensor) -> Tensor:
        """(D,): in the sup norm every entry has a head-room of its own."""
        return self.gamma * (1.0 - decay) if MODES[self.mode].certified else torch.ones_like(decay)

    def fold(self) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
        decay = self.decay()
        return decay, self.input_scale(decay), self.read.weight, self.block_scale(decay)

    def prepare(self, e: Tensor) -> RankLoop:
        decay, input_scale, read, scale = self.folded()
        # Channels before samples: every operation of a loop then runs over long rows.
        injected, constant = self.inject(e).transpose(0, 1), e.transpose(0, 1)
        if isinstance(input_scale, Tensor):
            constant = constant * input_scale.view(-1, 1, 1, 1)
        fused = not MODES[self.mode].penalised  # the penalty differentiates twice
        return RankLoop(decay, constant.contiguous(), injected.contiguous(), read, scale, fused)

    def factor(self, folded: tuple) -> float:
        """In the sup norm: the largest absolute row sum, in float64."""
        decay, _, read, scale = folded
        sums = read.double().abs().sum(1).view(-1, len(decay)).amax(0)  # (D,) the worst of K pieces
        return float((decay.double() + scale.double() * sums).max())


class RankLoop:
    """A rank cell with its weights and its input fixed: constant (D, B, S, S) and injected (W, B, S, S)."""

    __slots__ = ("decay", "constant", "injected", "read", "scale", "one_node")
    fused = False  # as ``unroll`` means it
    waiting = 0.0

    def __init__(self, decay: Tensor, constant: Tensor, injected: Tensor, read: Tensor, scale: Tensor, one_node: bool):
        self.decay, self.constant, self.injected = decay, constant, injected
        self.read, self.scale, self.one_node = read, scale, one_node

    def __call__(self, h: Tensor) -> Tensor:
        run = _RankStep.apply if self.one_node and torch.is_grad_enabled() and not autocasts(h.device) else rank_step
        parts = (self.constant, self.injected, self.decay, self.scale, self.read)
        return run(h.transpose(0, 1), *parts).transpose(0, 1)

    def first(self, rows: int) -> RankLoop:
        """The same loop on the first ``rows`` samples."""
        return self._with(self.constant[:, :rows], self.injected[:, :rows])

    def select(self, index: Tensor) -> RankLoop:
        """The same loop on the samples ``index`` (n,)."""
        return self._with(self.constant.index_select(1, index), self.injected.index_select(1, index))

    def _with(self, constant: Tensor, injected: Tensor) -> RankLoop:
        return RankLoop(self.decay, constant, injected, self.read, self.scale, self.one_node)


def _neighbours(padded: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views (..., S, S) of a grid padded by one: above, below, left, right of each cell."""
    return padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]


def rank_step(h: Tensor, constant: Tensor, injected: Tensor, decay: Tensor, scale: Tensor, read: Tensor) -> Tensor:
    """One loop: h, constant (D, B, S, S), injected (K D, B, S, S), decay, scale (D,), read (K D, 5 D) -> (D, B, S, S).

    By operations of torch alone: without gradients the fastest way, and the reference for ``_RankStep``.
    """
    ranks = list(_neighbours(pad(h, (1, 1, 1, 1))))
    for i, j in SORT_FOUR:
        ranks[i], ranks[j] = torch.maximum(ranks[i], ranks[j]), torch.minimum(ranks[i], ranks[j])
    pieces = torch.addmm(injected.flatten(1), read, torch.cat([h, *ranks]).flatten(1))  # (K D, B S S)
    best = pieces.view(len(read) // len(h), *h.shape).amax(0)
    wide = (-1, 1, 1, 1)
    return constant + decay.view(wide) * h + scale.view(wide) * best


class _RankStep(torch.autograd.Function):
    """``rank_step`` as one autograd node, 1.5 times as fast forward and back: comparisons are kept, not repeated."""

    @staticmethod
    def forward(ctx, h, constant, injected, decay, scale, read):
        sources = h.new_empty(read.shape[1], *h.shape[1:])
        sources[: len(h)] = h
        ranks = list(_neighbours(pad(h, (1, 1, 1, 1))))
        won = [_compare(ranks, i, j) for i, j in SORT_FOUR]
        torch.cat(ranks, out=sources[len(h) :])
        pieces = torch.addmm(injected.flatten(1), read, sources.flatten(1))  # (K D, B S S)
        pieces = list(pieces.view(len(read) // len(h), len(h), h[0].numel()))
        duels = _duels(len(pieces))
        won += [_compare(pieces, i, j, keep_loser=False) for i, j in duels]
        best, flat = pieces[0], h.reshape(len(h), h[0].numel())
        ctx.save_for_backward(flat, sources, best, decay, scale, read, *won)
        ctx.duels, ctx.shape = duels, h.shape
        out = torch.addcmul(constant.flatten(1), flat, decay.view(-1, 1)).addcmul_(best, scale.view(-1, 1))
        return out.view(h.shape)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        flat, sources, best, decay, scale, read, *won = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.flatten(1)  # (D, n)
        pieces: list[Tensor | None] = [None] * (len(read) // len(rows))
        pieces[0] = rows * scale.view(-1, 1)
        for (i, j), first in zip(reversed(ctx.duels), reversed(won[len(SORT_FOUR) :]), strict=True):
            kept = pieces[i] * first
            pieces[i], pieces[j] = kept, pieces[i] - kept
        pieces = torch.cat(pieces)  # (K D, n)
        grad_sources = (read.t() @ pieces).view(read.shape[1], *ctx.shape[1:])  # (5 D, B, S, S)
        own, *ranks = grad_sources.split(len(rows))
        for (i, j), first in zip(reversed(SORT_FOUR), reversed(won[: len(SORT_FOUR)]), strict=True):
            # The larger value's gradient goes where it came from: to i if the first won, else to j.
            moved = (ranks[i] - ranks[j]) * first
            ranks[i], ranks[j] = ranks[j] + moved, ranks[i] - moved
        padded = grad.new_zeros(*ctx.shape[:-2], ctx.shape[-2] + 2, ctx.shape[-1] + 2)
        inside = padded[..., 1:-1, 1:-1]
        torch.add(own, grad * decay.view(-1, 1, 1, 1), out=inside)
        for view, part in zip(_neighbours(padded), ranks, strict=True):
            view += part
        by_decay, by_scale = torch.linalg.vecdot(rows, flat), torch.linalg.vecdot(rows, best)
        by_read = pieces @ sources.flatten(1).t()
        return inside, grad, pieces.view(len(read), *ctx.shape[1:]), by_decay, by_scale, by_read


def _duels(count: int) -> list[tuple[int, int]]:
    """Pairs of places whose larger values, each put in the first place, leave the largest of ``count`` in place 0."""
    found, step = [], 1
    while step < count:
        found += [(i, i + step) for i in range(0, count - step, 2 * step)]
        step *= 2
    return found


def _compare(values: list[Tensor], i: int, j: int, keep_loser: bool = True) -> Tensor:
    """Put the larger of two values first, and the smaller second unless nobody asks; returns where the first won."""
    a, b = values[i], values[j]
    values[i] = torch.maximum(a, b)
    if keep_loser:
        values[j] = torch.minimum(a, b)
    return a >= b
