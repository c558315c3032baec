"""Worlds on a grid for the laboratory: the sandpile, and the word problem of S5 with its word laid out in a row.

The dynamics are convolutional: a loop carries what a cell knows to its neighbours, so what is far away, or comes
late, takes many loops. A prediction is right only when every part of the answer is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.in_turn import InTurn
from benchmarks.lab import Examples, Recipe, Task
from envs.worlds.permutation import GENERATORS, PERMUTATIONS, POINTS, compose
from envs.worlds.sandpile import FULL, recurrent_piles, topple
from loopwm.dynamics import DYNAMICS, DynamicsOutput
from loopwm.dynamics.conv import ConvCell

SIZE, MAX_LOOPS = 8, 32
PIECES = 4  # of the block ``rank``
WHOLE = "wide_whole"  # see the function
GRU = "gru"  # see WordReader
SUP_NORM = "looped, certified in the sup norm"
RANK = "looped, of the same cells, uncertified"
MODELS = {  # name in the tables: recipe
    "looped": Recipe("looped", free_loops=24),
    "stacked": Recipe("stacked"),
    "wide": Recipe("wide"),
    "wide, sees all": Recipe(WHOLE),
    "single_pass": Recipe("single_pass"),
    "deep_thin": Recipe("deep_thin"),
    "looped, certified": Recipe("looped", "certified", 24),
    "looped, from h0 only": Recipe("looped"),
    SUP_NORM: Recipe("looped", "certified", hidden=16, layers=(2, 1, 1), block="rank"),
    "stacked, of the same cells": Recipe("stacked", "certified", hidden=16, layers=(2, 1, 1), block="rank"),
    RANK: Recipe("looped", hidden=16, layers=(2, 1, 1), block="rank"),
    "stacked, of the same cells, uncertified": Recipe("stacked", hidden=16, layers=(2, 1, 1), block="rank"),
}
MODELS |= {f"{name}, untold": replace(MODELS[name], untold=True) for name in ("looped", SUP_NORM, RANK)}
LETTER_BY_LETTER = {  # of permutations, see WordReader
    "GRU, letter by letter": Recipe(GRU, repeated=True),
    "single_pass, letter by letter": Recipe("single_pass", repeated=True),
    "untied, letter by letter": Recipe("single_pass", repeated=True, untied=True),
}
LADDER = {
    "looped": ((16, 16), (24, 16), (32, 16)),
    "stacked": ((16, 4), (16, 8), (16, 16), (32, 4), (32, 8), (32, 16)),
    "wide": ((32, 16),),
    "wide, sees all": ((16, 16), (32, 16)),
    "single_pass": ((32, 16),),
    "deep_thin": ((32, 16),),
}


class WholeGridCell(ConvCell):
    """A ``ConvCell`` whose kernel reaches from any cell of a grid (rows, columns) to any other."""

    def __init__(self, hidden_dim: int, block_dim: int, grid: tuple[int, int]):
        super().__init__(hidden_dim, block_dim, "linear")
        self.read = nn.Conv2d(hidden_dim, block_dim, [2 * side - 1 for side in grid], bias=False)


def wide_whole(grid: tuple[int, int], words: dict[str, Any]) -> nn.Module:
    """The control ``wide`` for a grid: one layer with the loop's FLOPs that sees all of it, spent on reach and width.

    One application of a 3 x 3 convolution sees its neighbours alone, so the plain ``wide`` cannot answer far ones.
    FLOPs are counted twice, as torch does, with the products beyond the edges of the grid, and without these; it gets
    the larger width. ``words``: what the loop is made with.
    """
    dynamics = DYNAMICS["single_pass"](**words)
    width = max(
        round(words["block_dim"] * ((near + 1) * words["mean_loops"] + 1) / (far + 1 + 1))  # W2 and U beside each
        for near, far in (
            (9, math.prod(2 * side - 1 for side in grid)),
            (math.prod(3 * side - 2 for side in grid) / math.prod(grid), math.prod(grid)),
        )
    )
    dynamics.cells = nn.ModuleList([WholeGridCell(words["hidden_dim"], width, grid)])
    return dynamics


class GridModel(nn.Module):
    """Encoder, dynamics of a name, decoder; all but the block cell by cell. ``grid``: rows and columns in training."""

    def __init__(self, recipe: Recipe, channels: int, classes: int, block_dim: int, grid: tuple[int, int]):
        super().__init__()
        width, layers = recipe.hidden, recipe.layers
        words = {
            "latent_dim": width,
            "action_dim": 1,
            "hidden_dim": width,
            "mean_loops": recipe.loops,
            "max_loops": MAX_LOOPS,
            "block": recipe.block,
            "block_dim": PIECES * width if recipe.block == "rank" else block_dim,
            "mode": recipe.mode,
            "gamma": 0.99,
            "prelude_layers": layers[0],
            "block_layers": layers[1],
            "coda_layers": layers[2],
            "injection": recipe.injection,
            "order": recipe.order,
        }
        self.encoder = nn.Conv2d(channels, width, 1)
        whole = recipe.dynamics == WHOLE
        self.dynamics = wide_whole(grid, words) if whole else DYNAMICS[recipe.dynamics](**words)
        self.decoder = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, classes, 1))

    def encode(self, world: Tensor) -> Tensor:
        """What is seen of the world (B, ...) -> z (B, D, rows, columns)."""
        return self.encoder(world)

    def read(self, world: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What the dynamics are given: z (B, D, rows, columns) and action (B, 1, rows, columns)."""
        return self.encode(world), action

    def decode(self, z_next: Tensor, action: Tensor) -> Tensor:
        """z' (B, D, rows, columns), action (B, 1, rows, columns) -> logits (B, classes, ...)."""
        return self.decoder(z_next)

    def forward(
        self, world: Tensor, action: Tensor, depth: int | None = None, h0: Tensor | None = None
    ) -> tuple[Tensor, DynamicsOutput]:
        """(logits, the dynamics' output)."""
        out = self.dynamics(*self.read(world, action), depth, h0)
        return self.decode(out.z_next, action), out

    def trajectory(self, world: Tensor, action: Tensor, loops: int) -> tuple[Tensor, list[Tensor]]:
        """(states (loops + 1, B, ...), the logits after each of the loops)."""
        z, told = self.read(world, action)
        states = self.dynamics.trajectory(z, told, loops)
        return states, [self.decode(self.dynamics.coda(z, h), action) for h in states[1:]]


class SandpileModel(GridModel):
    """pile (B, S, S) in 0..3, drop (B, 1, S, S) -> logits (B, 4, S, S) of the stable pile."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe, FULL, FULL, recipe.hidden, (SIZE, SIZE))

    def encode(self, world: Tensor) -> Tensor:
        return self.encoder(nn.functional.one_hot(world, FULL).movedim(-1, 1).float())


class PermutationModel(GridModel):
    """row (B, 29, 1, L + 1): a state's matrix, then L letters; end (B, 1, 1, L + 1) marks the last letter.

    -> logits (B, 5, 5) of where the state's product with the word sends each point, classes second.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(
            recipe, POINTS**2 + len(GENERATORS), POINTS**2, 2 * recipe.hidden, (1, Permutation.trained + 1)
        )

    def decode(self, z_next: Tensor, action: Tensor) -> Tensor:
        logits = (self.decoder(z_next) * action).sum((2, 3))  # (B, 25), read off where the word ends
        return logits.unflatten(-1, (POINTS, POINTS)).mT


class WordReader(nn.Module):
    """The row of ``PermutationModel`` read letter by letter: one step for each, on a latent (B, D).

    What a loop over the row has to find out is built in: which letter is next, and where the word ends. The step is
    torch's GRU cell or one application of a dynamics of vectors, the same for all letters, or, untied, one of its own
    for each of the trained places (the last of them serves longer words).
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        width, letters = recipe.hidden, len(GENERATORS)

        def step() -> nn.Module:
            if recipe.dynamics == GRU:
                return nn.GRUCell(letters, width)
            return DYNAMICS[recipe.dynamics](width, letters, width, mode=recipe.mode)

        self.encoder = nn.Linear(POINTS**2, width)
        self.dynamics = InTurn([step() for _ in range(Permutation.trained if recipe.untied else 1)])
        self.decoder = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, POINTS**2))

    def forward(
        self, world: Tensor, action: Tensor, depth: None = None, h0: None = None
    ) -> tuple[Tensor, DynamicsOutput]:
        """As ``PermutationModel``; it has no depth but the word's length."""
        state, word = world[:, : POINTS**2, 0, 0], world[:, POINTS**2 :, 0, 1:].permute(2, 0, 1)
        out = self.dynamics(self.encoder(state), word, action[:, 0, 0].argmax(1))
        return self.decoder(out.z_next).unflatten(-1, (POINTS, POINTS)).mT, out


class GridTask(Task):
    models, ladder = MODELS, LADDER
    error_name = "share of steps with any part wrong"

    def losses(self, prediction: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(prediction, target, reduction="none").flatten(1).mean(1)

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(1) != target).flatten(1).any(1).float()


class Sandpile(GridTask):
    """A grain is dropped on a pile, which topples in rounds until it is stable: ``envs.worlds.sandpile``.

    Trained on avalanches of at most 8 rounds on 8 x 8. One round needs one loop and a little more, since the rounds
    are as many as the loops a topple can travel at the least.
    """

    ladder = LADDER | {
        SUP_NORM: ((16, 16),),
        "stacked, of the same cells": ((16, 4), (16, 8), (16, 16)),
        "stacked, of the same cells, uncertified": ((16, 4), (16, 8), (16, 12), (16, 16)),
        "looped, untold": ((32, 16),),
        **dict.fromkeys((RANK, f"{SUP_NORM}, untold", f"{RANK}, untold"), ((16, 16),)),
    }
    name, unit, trained = "sandpile", "toppling rounds", 8
    bins = ((0, 0), (1, 3), (4, 8), (9, 16), (17, 99))
    sizes = (SIZE, 12)

    def model(self, recipe: Recipe) -> SandpileModel:
        return SandpileModel(recipe)

    def loops_needed(self, difficulty: Tensor) -> Tensor:
        return 1.25 * difficulty + 2

    def examples(self, each: int, longest: int, seed: int, size: int | None = None) -> Examples:
        return avalanches(each, longest, seed, size or SIZE)

    def sequence(self, each: int, steps: int, seed: int) -> list[Examples]:
        return drops_in_a_row(each, steps, seed)

    def carried(self, inputs: tuple[Tensor, ...], prediction: Tensor) -> tuple[Tensor, ...]:
        return prediction.argmax(1), inputs[1]


@cache
def avalanches(each: int, longest: int, seed: int, size: int) -> Examples:
    """``each`` steps of every bin up to ``longest`` rounds, from recurrent piles under random drops.

    inputs: pile (n, S, S), drop (n, 1, S, S); target: the stable pile (n, S, S).
    """
    rng = np.random.default_rng(seed)
    bins = [(low, min(high, longest)) for low, high in Sandpile.bins if low <= longest]
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in bins]
    while any(sum(len(part[1]) for part in kept) < each for kept in found):
        pile, cell = recurrent_piles(rng, 4096, size), rng.integers(0, size * size, 4096)
        after, rounds = dropped(pile, cell)
        for kept, (low, high) in zip(found, bins, strict=True):
            room = each - sum(len(part[1]) for part in kept)
            rows = np.flatnonzero((rounds >= low) & (rounds <= high))[:room]
            kept.append((pile[rows], cell[rows], after[rows], rounds[rows]))
    pile, cell, after, rounds = (
        np.concatenate(column) for column in zip(*(part for kept in found for part in kept), strict=True)
    )
    return drops(pile, cell, after, rounds)


@cache
def drops_in_a_row(each: int, steps: int, seed: int) -> list[Examples]:
    """``steps`` drops on each of ``each`` recurrent piles, anywhere but where more than 8 rounds would follow."""
    rng = np.random.default_rng(seed)
    pile, found = recurrent_piles(rng, each, SIZE), []
    for _ in range(steps):
        cell, after, rounds = np.zeros(each, np.int64), pile.copy(), np.zeros(each, np.int64)
        wanted = np.arange(each)
        while len(wanted):
            cell[wanted] = rng.integers(0, SIZE * SIZE, len(wanted))
            after[wanted], rounds[wanted] = dropped(pile[wanted], cell[wanted])
            wanted = wanted[rounds[wanted] > Sandpile.trained]
        found.append(drops(pile, cell, after, rounds))
        pile = after
    return found


def dropped(pile: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the stable piles (n, S, S), rounds (n,)) after a grain on a cell (n,) of each pile (n, S, S)."""
    loaded = pile.copy()
    loaded.reshape(len(pile), -1)[np.arange(len(pile)), cell] += 1
    return topple(loaded)[:2]


def drops(pile: np.ndarray, cell: np.ndarray, after: np.ndarray, rounds: np.ndarray) -> Examples:
    """pile and after (n, S, S), cell and rounds (n,) -> inputs: pile (n, S, S), drop (n, 1, S, S); target: after."""
    drop = np.zeros((len(pile), 1, *pile.shape[1:]), np.float32)
    drop.reshape(len(pile), -1)[np.arange(len(pile)), cell] = 1.0
    inputs = (torch.from_numpy(pile).long(), torch.from_numpy(drop))
    return Examples(inputs, torch.from_numpy(after).long(), torch.from_numpy(rounds))


class Permutation(GridTask):
    """The product of a state and a word of k generators of S5, in order: ``envs.worlds.permutation``.

    The state stands in the first cell of a row and the letters in the next ones, so one loop can carry a product on by
    one letter. Trained on words of at most 8 letters, of which ever longer ones are shown over the first 40 % of the
    steps, to the loop and to the controls alike: without that none of them starts to learn.
    """

    models = {  # loops from h0 alone: going on from their own states bought nothing on the sandpile
        "looped": Recipe("looped"),
        "stacked": Recipe("stacked"),
        "wide": Recipe("wide"),
        "wide, sees all": Recipe(WHOLE),
        "single_pass": Recipe("single_pass"),
        "deep_thin": Recipe("deep_thin"),
        "looped, fixed depth": Recipe("looped", fixed=True),
        "looped, untold": Recipe("looped", untold=True),
        "stacked, twice as deep": Recipe("stacked", loops=2 * Recipe.loops),
    } | LETTER_BY_LETTER
    ladder = LADDER | {
        **dict.fromkeys(("looped, fixed depth", "looped, untold"), LADDER["looped"]),
        **dict.fromkeys(LETTER_BY_LETTER, ((8, 16), (16, 16), (32, 16))),
    }
    name, unit, trained = "permutation", "letters", 8
    bins = ((1, 2), (3, 4), (5, 8), (9, 16), (17, 32))
    curriculum = 0.4

    def model(self, recipe: Recipe) -> PermutationModel | WordReader:
        return WordReader(recipe) if recipe.repeated else PermutationModel(recipe)

    def loops_needed(self, difficulty: Tensor) -> Tensor:
        return difficulty

    def examples(self, each: int, longest: int, seed: int, size: int | None = None) -> Examples:
        return words(each, min(longest, self.bins[-1][1]), seed)

    def sequence(self, each: int, steps: int, seed: int) -> list[Examples]:
        return words_in_a_row(each, steps, seed)

    def carried(self, inputs: tuple[Tensor, ...], prediction: Tensor) -> tuple[Tensor, ...]:
        row = inputs[0].clone()
        row[:, : POINTS**2, 0, 0] = nn.functional.one_hot(prediction.argmax(1), POINTS).flatten(1).to(row.dtype)
        return row, inputs[1]


@cache
def words(each: int, longest: int, seed: int) -> Examples:
    """``each`` products for every length of word up to ``longest`` letters, in rows of ``longest`` + 1 cells."""
    rng = np.random.default_rng(seed)
    bins = [(low, min(high, longest)) for low, high in Permutation.bins if low <= longest]
    k = np.concatenate([rng.integers(low, high + 1, each) for low, high in bins])
    state, word = rng.integers(0, len(PERMUTATIONS), len(k)), rng.integers(0, len(GENERATORS), (len(k), longest))
    return products(state, word, k, compose(state, word, k))


@cache
def words_in_a_row(each: int, steps: int, seed: int) -> list[Examples]:
    """``steps`` words of 1 to 8 letters, all lengths alike, on each of ``each`` states."""
    rng, longest = np.random.default_rng(seed), Permutation.trained
    state, found = rng.integers(0, len(PERMUTATIONS), each), []
    for _ in range(steps):
        k, word = rng.integers(1, longest + 1, each), rng.integers(0, len(GENERATORS), (each, longest))
        after = compose(state, word, k)
        found.append(products(state, word, k, after))
        state = after
    return found


def products(state: np.ndarray, word: np.ndarray, k: np.ndarray, after: np.ndarray) -> Examples:
    """state, k and after (n,), word (n, L), of which k letters count, as ``compose`` has them.

    inputs: row (n, 29, 1, L + 1), end (n, 1, 1, L + 1); target: where the points go (n, 5).
    """
    longest = word.shape[1]
    row = np.zeros((len(k), POINTS**2 + len(GENERATORS), 1, longest + 1), np.float32)
    row[:, : POINTS**2, 0, 0] = np.eye(POINTS)[PERMUTATIONS[state]].reshape(len(k), -1)
    for letter in range(longest):
        there = np.flatnonzero(letter < k)
        row[there, POINTS**2 + word[there, letter], 0, letter + 1] = 1.0
    end = np.zeros((len(k), 1, 1, longest + 1), np.float32)
    end[np.arange(len(k)), 0, 0, k] = 1.0
    inputs = (torch.from_numpy(row), torch.from_numpy(end))
    return Examples(inputs, torch.from_numpy(PERMUTATIONS[after]), torch.from_numpy(k))
