"""A supervised laboratory on the sandpile: one step of the world, learned by the loop and by its unlooped controls.

The world is ``envs.worlds.sandpile``: a grain is dropped, the pile topples in rounds until it is stable; the number of
rounds is the difficulty of the step. A model sees the pile and the drop, and predicts the stable pile; a prediction
counts as right when every cell is. Training sees avalanches of at most ``TRAINED`` rounds, the test goes far beyond.
``benchmarks.depth_extrapolation``, ``adaptive_depth`` and ``parameter_efficiency`` read the same trained models.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from envs.worlds.sandpile import FULL, recurrent_piles, topple
from loopwm.dynamics import DYNAMICS

TRAINED = 8  # most rounds of an avalanche in training
BINS = ((0, 0), (1, 3), (4, 8), (9, 16), (17, 99))  # difficulties that are reported together, rounds
SIZE, HIDDEN, LOOPS, MAX_LOOPS, BATCH = 8, 32, 16, 32, 64
VALIDATION, TEST = 2, 3  # seeds of the data; training is 1


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained; every run of a benchmark is one of these."""

    dynamics: str  # a name in DYNAMICS
    mode: str = "linear"  # stability mode of the cells
    free_loops: int = 0  # most loops without gradient before those that are trained (looped alone)
    learning_rate: float = 2e-3
    steps: int = 6000
    seed: int = 0
    hidden: int = HIDDEN  # width of the latent, of h and of the block
    loops: int = LOOPS  # the controls' depth, or that of the loop whose FLOPs they have

    @property
    def name(self) -> str:
        return "_".join(str(value) for value in asdict(self).values())


class GridModel(nn.Module):
    """pile and drop -> logits of the stable pile, cell by cell: encoder, dynamics of a name, decoder."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        width = recipe.hidden
        self.encoder = nn.Conv2d(FULL, width, 1)
        self.dynamics = DYNAMICS[recipe.dynamics](
            width, 1, width, recipe.loops, MAX_LOOPS, block="conv", block_dim=width, mode=recipe.mode, gamma=0.99
        )
        self.decoder = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, FULL, 1))

    def forward(self, pile: Tensor, drop: Tensor, depth: int | None = None, h0: Tensor | None = None):
        """pile (B, S, S) in 0..3, drop (B, 1, S, S) -> (logits (B, 4, S, S), ``DynamicsOutput``)."""
        z = self.encoder(nn.functional.one_hot(pile, FULL).movedim(-1, 1).float())  # (B, D, S, S)
        out = self.dynamics(z, drop, depth, h0)
        return self.decoder(out.z_next), out


class Steps:
    """Steps of the world: pile (n, S, S), drop (n, 1, S, S), after (n, S, S), rounds (n,)."""

    def __init__(self, pile: np.ndarray, cell: np.ndarray, after: np.ndarray, rounds: np.ndarray):
        size = pile.shape[-1]
        drop = np.zeros((len(pile), 1, size * size), np.float32)
        drop[np.arange(len(pile)), 0, cell] = 1.0
        self.pile, self.after = torch.from_numpy(pile).long(), torch.from_numpy(after).long()
        self.drop, self.rounds = torch.from_numpy(drop).view(-1, 1, size, size), torch.from_numpy(rounds)

    def __len__(self) -> int:
        return len(self.rounds)


@cache
def world_steps(each: int, longest: int, seed: int, size: int = SIZE) -> Steps:
    """``each`` steps of every bin of difficulties up to ``longest`` rounds, from recurrent piles under random drops."""
    rng = np.random.default_rng(seed)
    bins = [(low, min(high, longest)) for low, high in BINS if low <= longest]
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in bins]
    while any(sum(len(part[1]) for part in kept) < each for kept in found):
        pile, cell = recurrent_piles(rng, 4096, size), rng.integers(0, size * size, 4096)
        loaded = pile.copy()
        loaded.reshape(len(pile), -1)[np.arange(len(pile)), cell] += 1
        after, rounds, _ = topple(loaded)
        for kept, (low, high) in zip(found, bins, strict=True):
            room = each - sum(len(part[1]) for part in kept)
            rows = np.flatnonzero((rounds >= low) & (rounds <= high))[:room]
            kept.append((pile[rows], cell[rows], after[rows], rounds[rows]))
    return Steps(*(np.concatenate(columns) for columns in zip(*(p for kept in found for p in kept), strict=True)))


def by_difficulty(right: Tensor, rounds: Tensor) -> dict[str, float]:
    """Share of right (n,) in each bin of rounds (n,)."""
    groups = ((f"{low}-{high}", (rounds >= low) & (rounds <= high)) for low, high in BINS)
    return {name: round(float(right[rows].float().mean()), 4) for name, rows in groups if rows.any()}


@torch.no_grad()
def right(model: GridModel, steps: Steps, depth: int | None, batch: int = 500) -> tuple[Tensor, Tensor]:
    """(every cell right (n,) bool, loops spent (n,)) of the predictions at ``depth``."""
    ok, loops = [], []
    with model.dynamics.frozen():
        for at in range(0, len(steps), batch):
            rows = slice(at, at + batch)
            logits, out = model(steps.pile[rows], steps.drop[rows], depth)
            ok.append((logits.argmax(1) == steps.after[rows]).flatten(1).all(1))
            loops.append(out.loops)
    return torch.cat(ok), torch.cat(loops)


def loss_of(model: GridModel, recipe: Recipe, steps: Steps, rows: Tensor, rng: np.random.Generator) -> Tensor:
    """Cross-entropy of a batch, at a depth as the recipe draws it.

    Half of the looped batches start at h0 and go through 4 to 20 loops; the others first run up to ``free_loops`` loops
    without gradient and are trained from where these lead, which teaches the loop to go on from its own states and to
    keep an answer it has (progressive training: Bansal et al. 2022, arXiv 2202.05826, section 3.2). An avalanche that
    the loops drawn cannot have followed does not count.
    """
    pile, drop, after = steps.pile[rows], steps.drop[rows], steps.after[rows]
    depth, h0, weight = None, None, torch.ones(len(rows))
    if recipe.dynamics == "looped":
        free, depth = 0, int(rng.integers(4, 21))
        if recipe.free_loops and rng.random() < 0.5:
            free, depth = int(rng.integers(1, recipe.free_loops + 1)), int(rng.integers(4, 13))
            with torch.no_grad():
                h0 = model(pile, drop, free)[1].h
        weight = (1.25 * steps.rounds[rows] + 2 <= free + depth).float()
    logits, _ = model(pile, drop, depth, h0)
    loss = nn.functional.cross_entropy(logits, after, reduction="none").flatten(1).mean(1)  # (B,)
    return (loss * weight).sum() / weight.sum().clamp_min(1.0)


def train(recipe: Recipe, folder: Path) -> Path:
    """Train one recipe on one thread and keep weights and summary; a finished run is kept."""
    path = folder / f"{recipe.name}.pt"
    if path.exists():
        return path
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    rng, steps = np.random.default_rng(recipe.seed), world_steps(30_000, TRAINED, 1)
    model = GridModel(recipe)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    warm_up = 0.1 * recipe.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1.0 + np.cos(np.pi * step / recipe.steps)))
    )
    start, losses = time.perf_counter(), []
    for _ in range(recipe.steps):
        rows = torch.from_numpy(rng.integers(0, len(steps), BATCH))
        with model.dynamics.frozen():
            loss = loss_of(model, recipe, steps, rows, rng)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    summary = asdict(recipe) | {
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(float(np.mean(losses[-200:])), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    torch.save(model.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    print(f"{recipe.name:48s} {summary['seconds']:7.0f} s  loss {summary['loss']:.4f}", flush=True)
    return path


def load(recipe: Recipe, folder: Path) -> GridModel:
    """The trained model of a recipe, for evaluation."""
    model = GridModel(recipe)
    model.load_state_dict(torch.load(folder / f"{recipe.name}.pt", weights_only=True))
    return model.eval()


def summary(recipe: Recipe, folder: Path) -> dict:
    """What ``train`` wrote of a recipe."""
    return json.loads((folder / f"{recipe.name}.json").read_text(encoding="utf-8"))


def train_all(recipes: list[Recipe], folder: Path, jobs: int) -> None:
    """Train what is not there yet, ``jobs`` at a time, one thread each."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(train, recipes, [folder] * len(recipes)))
