"""A supervised laboratory: one step of a world, or a few, learned by the loop and by its unlooped controls.

A ``Task`` gives the data and says what an error is; a ``Recipe`` is one model and how it is trained. Every model of a
task has the same data, optimiser, schedule and number of steps, and a learning rate that is chosen for it from the same
three; but the loss of loops of random depth is told what they need (``Task.loops_needed``), unless they are ``untold``.
Trained models are kept, so that the benchmarks that ask different things of one model share its training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import device_name
from loopwm.dynamics import sample_depths
from loopwm.training.run_dir import commit

TRAINING, VALIDATION, TEST, IN_A_ROW = 1, 2, 3, 4  # seeds of the data
RATES = (1e-3, 2e-3, 4e-3)
FLOOR = 1e-4  # an error of none on some hundred examples is drawn, and compared, as no less than this
TIMED = "difficulty"  # the depth of an example where a loop is one unit of it
CHECKS = 24  # times that a training's error is measured on validation data


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained; every run of a benchmark is one of these."""

    dynamics: str  # a name in DYNAMICS
    mode: str = "linear"  # stability mode of the cells
    free_loops: int = 0  # most loops without gradient before those that are trained (looped alone)
    learning_rate: float = 2e-3
    steps: int = 6000
    seed: int = 0
    hidden: int = 32  # width of the latent, of h and of the block
    loops: int = 16  # the controls' depth, or that of the loop whose FLOPs they have
    layers: tuple[int, int, int] = (1, 1, 1)  # of the prelude, the block and the coda
    block: str = "conv"  # on grids
    timed: bool = False  # a loop for each unit of difficulty, where the inputs say it; else its depth is its own
    gradient: str = "unrolled"  # implicit: of the fixed point, which a rule says when it is near (certified loops)
    solver: str = "plain"  # that leads there
    fixed: bool = False  # whether every batch goes through ``loops`` loops, not a random number
    warm: bool = False  # whether each step of several starts from the loop state of the one before
    quarters: tuple[int, int] = (1, 5)  # fewest and most loops of a random number, in quarters of ``loops``
    skip: bool = False  # whether the block has a linear layer beside its own
    injection: str = "zoh"  # a name in INJECTIONS (on grids)
    order: str = "abab"  # how loops go through a block of several layers, a name in ORDERS (on grids)
    sampler: str = ""  # a name in DEPTH_SAMPLERS: a depth for each example, of the mean of ``quarters``
    early: float = 0.0  # weight of the loss at a random earlier loop (on grids)
    untold: bool = False  # whether what needs more loops than were drawn counts in the loss like all else
    repeated: bool = False  # whether it is one unit of the difficulty, applied as often as the inputs say
    untied: bool = False  # whether each of these applications has weights of its own

    @property
    def name(self) -> str:
        """All of it; the fields from ``layers`` on are named only where they are not the default's."""
        known = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        first = list(known).index("layers")
        parts = [value for value, _ in list(known.values())[:first]]
        for field, (value, default) in list(known.items())[first:]:
            if value != default:
                each = value if isinstance(value, tuple) else (value,)
                parts.append(field if value is True else "".join(map(str, each)))
        return "_".join(map(str, parts))

    @property
    def looped(self) -> bool:
        return self.dynamics == "looped"

    @property
    def shares(self) -> bool:
        """Whether a prediction uses some weights more than once; else it is a control."""
        return self.looped or (self.repeated and not self.untied)

    def depth(self, factor: float = 1.0) -> int | str | None:
        """``factor`` times the controls' depth, TIMED or fixed; None: as far as a rule says, or a control's own."""
        if not self.looped or self.gradient == "implicit":
            return None
        return TIMED if self.timed else self.loops if self.fixed else int(self.loops * factor)


class Examples(NamedTuple):
    """n steps of a world: what a model is given, what it should say, how difficult that is."""

    inputs: tuple[Tensor, ...]  # each (n, ...)
    target: Tensor  # (n, ...)
    difficulty: Tensor  # (n,) int64

    def rows(self, index: slice | Tensor) -> Examples:
        return Examples(tuple(x[index] for x in self.inputs), self.target[index], self.difficulty[index])

    def to(self, device: torch.device | str) -> Examples:
        return Examples(tuple(x.to(device) for x in self.inputs), self.target.to(device), self.difficulty.to(device))

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.difficulty)


class Task:
    """A world to learn, in which the loop may be run at any depth and difficulty may go beyond the trained.

    Attributes:
        unit: of difficulty. trained: the largest in training. bins: (lowest, highest) of the groups to report.
        models: recipes by their names in the tables. ladder: sizes (hidden, loops) of each family that
        ``parameter_efficiency`` trains. sizes: of the worlds to test on, the trained one first.
        curriculum: share of training over which the largest difficulty rises to the trained one; 0: at once.
        error_name: what is reported, in words. exact: whether that is a share of answers, not a distance.
        in_a_row: steps open loop that are reported beside ``measures``.
    """

    name: str
    unit: ClassVar[str]
    trained: ClassVar[int]
    bins: ClassVar[tuple[tuple[int, int], ...]]
    models: ClassVar[dict[str, Recipe]]
    ladder: ClassVar[dict[str, tuple[tuple[int, int], ...]]]
    sizes: ClassVar[tuple[int, ...]] = (0,)
    curriculum: ClassVar[float] = 0.0
    exact: ClassVar[bool] = True
    in_a_row: ClassVar[tuple[int, ...]] = (5, 20, 50)
    error_name: ClassVar[str]
    batch: ClassVar[int] = 64

    def examples(self, each: int, longest: int, seed: int, size: int | None = None) -> Examples:
        """``each`` examples of every bin of difficulties up to ``longest``."""
        raise NotImplementedError

    def sequence(self, each: int, steps: int, seed: int) -> list[Examples]:
        """``steps`` steps one after the other, each of ``each`` worlds, none harder than any in training."""
        raise NotImplementedError

    def carried(self, inputs: tuple[Tensor, ...], prediction: Tensor) -> tuple[Tensor, ...]:
        """``inputs`` of a step of ``sequence`` that begins where the step before was predicted to end."""
        raise NotImplementedError

    def model(self, recipe: Recipe) -> nn.Module:
        """``model(*inputs, depth=, h0=)`` -> (prediction (B, ...), ``DynamicsOutput``), with ``model.dynamics``."""
        raise NotImplementedError

    def losses(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,) what training lowers."""
        raise NotImplementedError

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,) what is reported."""
        raise NotImplementedError

    def pool(self, errors: Tensor) -> float:
        """One figure of the errors (n,) of many examples."""
        return float(errors.float().mean())

    @property
    def edge(self) -> str:
        """The hardest group of ``breakdown`` in training."""
        return [bin_name(low, high) for low, high in self.bins if low <= self.trained][-1]

    @property
    def beyond(self) -> list[str]:
        """The groups of ``breakdown`` that are harder than any in training."""
        return [bin_name(low, high) for low, high in self.bins if low > self.trained]

    def breakdown(self, errors: Tensor, difficulty: Tensor) -> dict[str, float]:
        """Errors (n, ...) of the test data by groups, from easy to hard."""
        return by_difficulty(self, errors, difficulty)

    def measures(self, errors: Tensor, difficulty: Tensor) -> dict[str, float]:
        """The figures that stand for a model's errors (n, ...) on test data of the trained difficulty, by name."""
        return {self.measured[0]: self.pool(errors)}

    @property
    def measured(self) -> list[str]:
        """The names of all that ``parameter_efficiency`` reports of a model."""
        return [f"up to {self.trained} {self.unit}", *map(row_name, self.in_a_row)]

    def within(self, error: float, best: float, loss: float) -> bool:
        """Whether ``error`` is at most ``loss`` more than ``best``: of all answers, or of the distance."""
        return error <= (best + loss if self.exact else best * (1.0 + loss))

    def loops_needed(self, difficulty: Tensor) -> Tensor:
        """(B,) loops without which an example cannot be known, so that it does not count in training, see ``loss``."""
        return torch.zeros_like(difficulty)

    def training_set(self) -> Examples:
        return self.examples(30_000, self.trained, TRAINING)

    def loss(self, model: nn.Module, recipe: Recipe, batch: Examples, rng: np.random.Generator) -> Tensor:
        """Mean loss of a batch, the loop's at a random depth.

        Half of the looped batches start at h0 and go through ``recipe.quarters`` of ``recipe.loops``. Where
        there are free loops the others first run up to that many without gradient and are trained from where these
        lead, which teaches the loop to go on from its own states and to keep an answer it has (progressive training:
        Bansal et al. 2022, arXiv 2202.05826, section 3.2). A timed loop goes through as many as the difficulty is.
        Where a depth is drawn, an example that cannot be known by then does not count, unless ``recipe.untold``: so
        the loop's loss is told the true difficulty, which controls, whose depth is their own, have no use for.
        """
        depth, h0, spent = None, None, None
        if recipe.timed:
            depth = batch.difficulty
        elif recipe.fixed:
            depth = spent = recipe.loops
        elif recipe.sampler:
            mean = sum(recipe.quarters) * recipe.loops // 8
            depth = spent = sample_depths(recipe.sampler, len(batch), mean, 1, 2 * recipe.loops)
        elif recipe.looped and recipe.gradient == "unrolled":
            quarter = recipe.loops // 4
            fewest, most = recipe.quarters
            free, depth = 0, int(rng.integers(fewest * quarter, most * quarter + 1))
            if recipe.free_loops and rng.random() < 0.5:
                free, depth = int(rng.integers(1, recipe.free_loops + 1)), int(rng.integers(quarter, 3 * quarter + 1))
                with torch.no_grad():
                    h0 = model(*batch.inputs, depth=free)[1].h
            spent = free + depth
        prediction, out = model(*batch.inputs, depth=depth, h0=h0)
        loss = self.counted(prediction, batch, recipe, spent)
        if recipe.early:
            early = out.early()
            said = model.decode(early.z_next, batch.inputs[-1])
            loss = loss + recipe.early * self.counted(said, batch, recipe, early.loops)
        return loss

    def counted(self, prediction: Tensor, batch: Examples, recipe: Recipe, spent: int | Tensor | None) -> Tensor:
        """Mean loss of the examples that can be known after ``spent`` loops (B,); None: of all."""
        losses, weight = self.losses(prediction, batch.target), torch.ones(len(batch), device=batch.target.device)
        if spent is not None and not recipe.untold:
            told = torch.as_tensor(spent, device=batch.difficulty.device)  # a sampler's stands on the CPU
            weight = (self.loops_needed(batch.difficulty) <= told * recipe.layers[1]).float()
        return (losses * weight).sum() / weight.sum().clamp_min(1.0)


@torch.no_grad()
def predict_errors(
    task: Task, model: nn.Module, data: Examples, depth: int | str | None, batch: int = 500
) -> tuple[Tensor, Tensor]:
    """(errors (n,), loops spent (n,)) at ``depth`` (see ``Recipe.depth``), or where the model's rule stops."""
    errors, loops = [], []
    device = next(model.dynamics.parameters()).device
    with model.dynamics.frozen():
        for at in range(0, len(data), batch):
            part = data.rows(slice(at, at + batch)).to(device)
            prediction, out = model(*part.inputs, depth=part.difficulty if depth == TIMED else depth)
            errors.append(task.errors(prediction, part.target).cpu())
            loops.append(out.loops.cpu())
    return torch.cat(errors), torch.cat(loops)


@torch.no_grad()
def open_loop_errors(
    task: Task, model: nn.Module, sequence: list[Examples], depth: int | str | None, batch: int = 500
) -> Tensor:
    """(n, steps) errors along ``Task.sequence``, each step from what was predicted of the one before."""
    device, rows = next(model.dynamics.parameters()).device, []
    with model.dynamics.frozen():
        for at in range(0, len(sequence[0]), batch):
            errors, prediction = [], None
            for step in sequence:
                part = step.rows(slice(at, at + batch)).to(device)
                inputs = part.inputs if prediction is None else task.carried(part.inputs, prediction)
                prediction = model(*inputs, depth=part.difficulty if depth == TIMED else depth)[0]
                errors.append(task.errors(prediction, part.target).reshape(len(part), -1).mean(1))
            rows.append(torch.stack(errors, 1).cpu())
    return torch.cat(rows)


def row_name(steps: int) -> str:
    """The name of the error after so many steps open loop."""
    return f"{steps} steps in a row"


def bin_name(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def groups(task: Task, difficulty: Tensor) -> dict[str, Tensor]:
    """Name -> (n,) bool of each bin that has examples."""
    found = {bin_name(a, b): (difficulty >= a) & (difficulty <= b) for a, b in task.bins}
    return {name: rows for name, rows in found.items() if rows.any()}


def by_difficulty(task: Task, errors: Tensor, difficulty: Tensor) -> dict[str, float]:
    """Error of each bin of difficulties."""
    return {name: round(task.pool(errors[rows]), 4) for name, rows in groups(task, difficulty).items()}


def rows_at(task: Task, limits: np.ndarray, order: np.ndarray, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Random rows (batch,) of the training set; ``limits`` are its sorted difficulties, ``order`` their rows."""
    if not task.curriculum:
        return rng.integers(0, len(order), task.batch)
    share = min(1.0, progress / task.curriculum)
    lowest = int(limits[0])
    allowed = np.searchsorted(limits, lowest + int((task.trained - lowest) * share), side="right")
    return order[rng.integers(0, allowed, task.batch)]


def train(task: Task, recipe: Recipe, folder: Path, device: torch.device | str = "cpu") -> Path:
    """Train one recipe, on a CPU on one thread, and keep weights and summary; a finished run is kept."""
    path = folder / f"{recipe.name}.pt"
    if path.exists():
        return path
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of a GPU as exact as those of a CPU
    torch.manual_seed(recipe.seed)
    rng, data, check = np.random.default_rng(recipe.seed), task.training_set(), validation_set(task)
    order = np.argsort(data.difficulty.numpy(), kind="stable")
    limits = data.difficulty.numpy()[order]
    data, model = data.to(device), task.model(recipe).to(device)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    warm_up = 0.1 * recipe.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1.0 + np.cos(np.pi * step / recipe.steps)))
    )
    start, losses, curve = time.perf_counter(), deque(maxlen=200), []
    for step in range(recipe.steps):
        rows = torch.from_numpy(rows_at(task, limits, order, step / recipe.steps, rng)).to(device)
        with model.dynamics.frozen():
            loss = task.loss(model, recipe, data.rows(rows), rng)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        if (step + 1) * CHECKS // recipe.steps > step * CHECKS // recipe.steps:
            curve.append((step + 1, round(validation_error(task, model, recipe, check), 5)))
    last = float(torch.stack(tuple(losses)).mean())
    written = asdict(recipe) | {
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(last, 5) if math.isfinite(last) else None,  # None: training diverged
        "parameters": count(model),
        "curve": curve,
        "trained_at": commit(),
        "device": device_name(torch.device(device)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    torch.save(model.cpu().state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    print(f"{task.name} {recipe.name:48s} {written['seconds']:7.0f} s  loss {last:.4f}", flush=True)
    return path


def validation_set(task: Task, each: int = 200) -> Examples:
    return task.examples(each, task.trained, VALIDATION)


def validation_error(task: Task, model: nn.Module, recipe: Recipe, data: Examples) -> float:
    """Error on examples of the trained difficulty, at twice the controls' depth for a loop of random depth."""
    training = model.training
    try:
        return task.pool(predict_errors(task, model.eval(), data, recipe.depth(2))[0])
    finally:
        model.train(training)


def load(task: Task, recipe: Recipe, folder: Path) -> nn.Module:
    """The trained model of a recipe, for evaluation."""
    model = task.model(recipe)
    model.load_state_dict(torch.load(folder / f"{recipe.name}.pt", weights_only=True))
    return model.eval()


def record(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What ``train`` wrote of a recipe; its curve: (optimiser steps, validation error), early to late."""
    written = json.loads((folder / f"{recipe.name}.json").read_text(encoding="utf-8"))
    return written | {"curve": [tuple(at) for at in written["curve"]]}


def summary(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What ``train`` wrote of a recipe, without its curve."""
    return {key: value for key, value in record(recipe, folder).items() if key != "curve"}


def learning_curve(recipe: Recipe, folder: Path) -> list[tuple[int, float]]:
    """(optimiser steps, validation error), early to late."""
    return record(recipe, folder)["curve"]


def train_all(task: Task, recipes: list[Recipe], folder: Path, jobs: int, device: torch.device | str = "cpu") -> None:
    """Train what is not there yet, ``jobs`` at a time, one thread each."""
    missing = [recipe for recipe in dict.fromkeys(recipes) if not (folder / f"{recipe.name}.pt").exists()]
    if not missing:
        return
    task.training_set()  # made and kept on disk once, where that takes long
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in [pool.submit(train, task, recipe, folder, device) for recipe in missing]:
            done.result()


def choose_rates(task: Task, recipes: dict[str, Recipe], folder: Path, args: argparse.Namespace) -> dict[str, Recipe]:
    """Each recipe with the one of ``args.rates`` that is best on validation data after a quarter of its steps."""
    if len(args.rates) == 1:
        return {name: replace(recipe, learning_rate=args.rates[0]) for name, recipe in recipes.items()}
    tries = {
        name: [replace(r, steps=r.steps // 4, learning_rate=rate) for rate in args.rates] for name, r in recipes.items()
    }
    train_all(task, [recipe for row in tries.values() for recipe in row], folder, args.jobs, args.device)
    data, chosen = validation_set(task), {}
    for name, row in tries.items():
        errors = [validation_error(task, load(task, r, folder), r, data) for r in row]
        chosen[name] = replace(recipes[name], learning_rate=args.rates[int(np.argmin(errors))])
        shown = (f"{rate:g}: {error:.3f}" for rate, error in zip(args.rates, errors, strict=True))
        print(f"{name:24s} " + "  ".join(shown), flush=True)
    return chosen


def choose_rates_in_full(
    task: Task, recipes: dict[Any, Recipe], seeds: Sequence[int], folder: Path, args: argparse.Namespace
) -> dict[Any, Recipe]:
    """Each recipe with the one of ``args.rates`` that is best on validation data at the end, by the mean of the seeds.

    All are trained to the end, so it costs as many trainings as there are rates.
    """
    tries = {
        key: [[replace(r, learning_rate=rate, seed=seed) for seed in seeds] for rate in args.rates]
        for key, r in recipes.items()
    }
    train_all(task, [r for rates in tries.values() for row in rates for r in row], folder, args.jobs, args.device)
    chosen = {}
    for key, rates in tries.items():
        errors = np.array([[learning_curve(r, folder)[-1][1] for r in row] for row in rates]).mean(1)
        errors = np.nan_to_num(errors, nan=np.inf)
        chosen[key] = replace(recipes[key], learning_rate=args.rates[int(np.argmin(errors))])
    return chosen


def with_steps(recipes: dict[Any, Recipe], args: argparse.Namespace, quick_steps: int) -> dict[Any, Recipe]:
    """The recipes at the steps that ``tasks.lab_parser``'s options ask for."""
    if not (args.quick or args.steps):
        return recipes
    return {key: replace(r, steps=args.steps or quick_steps) for key, r in recipes.items()}


def prepared(
    task: Task,
    recipes: dict[str, Recipe],
    folder: Path,
    args: argparse.Namespace,
    quick_steps: int,
) -> dict[str, Recipe]:
    """The recipes at the steps that ``tasks.lab_parser``'s options ask for, at their best rates unless ``--quick``."""
    recipes = with_steps(recipes, args, quick_steps)
    return recipes if args.quick else choose_rates(task, recipes, folder, args)


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def recipe_of(row: dict[str, Any]) -> Recipe:
    """The recipe that a benchmark's row is of; fields that were not there yet are as by default."""
    named = {f.name: row[f.name] for f in fields(Recipe) if f.name in row}
    return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in named.items()})


def kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from a file, made and written first where there is none yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = make()
        with path.with_suffix(".tmp").open("wb") as file:
            np.savez(file, **arrays)
        path.with_suffix(".tmp").replace(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
