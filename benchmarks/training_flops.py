"""Training FLOPs until a model has the stack's final error, by which part of the dynamics is looped.

The loop alone, with a layer of its own before it or after it, with two layers in the block at half the loops, and,
where a task has models that are repeated, all of it looped: prelude, two loops, coda, once for each unit of the
difficulty; beside the stack of equal FLOPs (``benchmarks.lab``). FLOPs are torch's own count of whole updates (forward
passes without gradient too), the mean over the depths that training may draw: for a loop of random depth three
quarters of the stack's. The error is that of validation data, such a loop's at twice the stack's depth, its
last value the final one. ``--loop`` says which of a task's loops it is. ``--more-of`` an earlier result keeps its
seeds and learning rates and trains the seeds that it lacks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import earlier_rows, interval, report
from benchmarks.lab import FLOOR, Recipe, Task, choose_rates, recipe_of, record, train_all
from benchmarks.plots import plt, save_figure
from benchmarks.tasks import TASKS, lab_parser

CONTROL = "stacked"


def variants(task: Task, steps: int, loop: str = "looped") -> dict[str, Recipe]:
    """Name -> recipe of a loop, by its name in ``task.models``; halved, its two layers stand for two of its loops."""
    loop = replace(task.models[loop], steps=steps)
    half = {"loops": loop.loops // 2, "free_loops": loop.free_loops // 2, "layers": (1, 2, 1)}
    whole = task.models.get("looped, linear, repeated") if loop.mode == "linear" else None
    return {
        CONTROL: replace(task.models[CONTROL], steps=steps),
        "one layer looped": loop,
        "a layer before the loop": replace(loop, layers=(2, 1, 1)),
        "a layer after the loop": replace(loop, layers=(1, 1, 2)),
        "two layers looped, half the loops": replace(loop, **half),
    } | ({"all of it looped": replace(whole, steps=steps, loops=2)} if whole else {})


class End(NamedTuple):
    """A random stream that draws one end of everything: FLOPs are linear in depths, so their mean is that of both."""

    highest: bool
    free: bool  # whether the batch first goes through loops without gradient, as every second one does

    def integers(self, low: int, high: int) -> int:
        return high - 1 if self.highest else low

    def random(self) -> float:
        return 0.0 if self.free else 1.0


def flops_of_update(task: Task, recipe: Recipe, batches: int = 8) -> float:
    """Mean FLOPs of one update on one batch: over so many batches, and over all depths that may be drawn."""
    torch.manual_seed(0)
    rng, model, data = np.random.default_rng(0), task.model(recipe), task.training_set()
    both = (False, True)
    ends = [End(*bits) for bits in product(both, both if recipe.free_loops else (False,))]
    with FlopCounterMode(display=False) as counter:
        for _ in range(batches):
            batch = data.rows(torch.from_numpy(rng.integers(0, len(data), task.batch)))
            for end in ends:
                with model.dynamics.frozen():
                    task.loss(model, recipe, batch, end).backward()
    return counter.get_total_flops() / batches / len(ends)


def steps_to(error: float, curve: list[tuple[int, float]]) -> int | None:
    """Optimiser steps at the first check whose error is at most this; None: never."""
    return next((step for step, found in curve if found <= error), None)


def evaluate(found: dict[str, dict], flops: dict[str, float]) -> list[dict]:
    """One row a variant of one seed, ``found`` what is on record of each: against the control of the same seed."""
    goal = found[CONTROL]["curve"][-1][1]
    spent = flops[CONTROL] * steps_to(goal, found[CONTROL]["curve"])
    rows = []
    for name, training in found.items():
        reached = steps_to(goal, training["curve"])
        measured = {
            "variant": name,
            "flops_per_update": flops[name],
            "goal": goal,
            "error": training["curve"][-1][1],
            "steps_to_goal": reached,
            "speedup": None if reached is None else round(spent / (flops[name] * reached), 4),
        }
        rows.append(training | measured)
    return rows


def earlier_seeds(task: Task, plan: dict[str, Recipe], path: Path) -> dict[int, dict[str, dict]]:
    """Seed -> variant -> row of an earlier result on the recipes of ``plan``, at any learning rate.

    Raises:
        ValueError: it is none of this benchmark, task or recipes, or a seed of it lacks a variant.
    """
    found: dict[int, dict[str, dict]] = {}
    try:
        for row in earlier_rows(path, "training_flops", task.name):
            recipe, base = recipe_of(row), plan.get(row["variant"])
            if base is None or recipe != replace(base, seed=recipe.seed, learning_rate=recipe.learning_rate):
                raise ValueError(f"{path}: {row['variant']!r} is not of these steps, or of another loop")
            found.setdefault(recipe.seed, {})[row["variant"]] = row | {"curve": [tuple(at) for at in row["curve"]]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no result of this benchmark ({type(error).__name__})") from None
    short = [name for rows in found.values() for name in plan if name not in rows]
    if short:
        raise ValueError(f"{path}: lacks {short[0]!r}")
    return found


def draw(task: Task, rows: list[dict], path: Path) -> None:
    """Validation error against training FLOPs, mean and range over seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=130)
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        x = np.array([step for step, _ in mine[0]["curve"]]) * mine[0]["flops_per_update"]
        y = np.array([[max(error, FLOOR) for _, error in row["curve"]] for row in mine])  # (seeds, checks)
        line = axes.plot(x, y.mean(0), label=name)[0]
        axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="training FLOPs", ylabel=task.error_name, yscale="log", title=task.name)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows; a variant that misses the goal in one seed has no speed-up."""
    headline, speed, never = {}, {}, {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        headline[f"{name}: final error"] = interval([row["error"] for row in mine])
        never[name] = sum(row["speedup"] is None for row in mine)
        if not never[name]:
            headline[f"{name}: FLOPs of the {CONTROL} / its own"] = interval([row["speedup"] for row in mine])
            speed[name] = float(np.mean([row["speedup"] for row in mine]))
    loops = {name: value for name, value in speed.items() if name != CONTROL}
    missed = ", ".join(f"{name} in {n} of {len(mine)}" for name, n in never.items() if n)
    ends = f"; the goal was not reached by {missed}" if missed else ""
    if not loops:
        return headline, f"No loop has the final error of {CONTROL} in every seed{ends}."
    best = max(loops, key=loops.__getitem__)
    word = "fewer" if loops[best] > 1 else "more"
    return headline, (
        f"To the final error of {CONTROL}, '{best}' takes {word} training FLOPs: the control's are {loops[best]:.2f} "
        "times its own ("
        + ", ".join(f"{name}: {value:.2f}" for name, value in loops.items() if name != best)
        + f"){ends}."
    )


def main(arguments: list[str]) -> None:
    p = lab_parser(__doc__.splitlines()[0], "permutation")
    p.add_argument(
        "--loop", default="looped", metavar="NAME", help="of the task's loops of one layer (default: %(default)s)"
    )
    p.add_argument("--more-of", type=Path, metavar="FILE", help="an earlier result of this task, to add seeds")
    args = p.parse_args(arguments)
    task, folder = TASKS[args.task](args.runs), args.runs / args.task
    # A timed or repeated loop cannot be halved, and one of more layers has no variant with fewer.
    plain = {name: r for name, r in task.models.items() if r.looped and not (r.timed or r.repeated)}
    loops = [name for name, r in plain.items() if r.layers == (1, 1, 1)]
    if args.loop not in loops:
        p.error(f"--loop: one of {', '.join(map(repr, loops))}")
    seeds = range(1) if args.quick else range(args.seeds)
    plan = variants(task, args.steps or (240 if args.quick else task.models[args.loop].steps), args.loop)
    if args.more_of and args.quick:
        p.error("--more-of: not with --quick")
    try:
        earlier = earlier_seeds(task, plan, args.more_of) if args.more_of else {}
    except ValueError as error:
        p.error(f"--more-of {error}")
    if earlier:
        plan, args.rates = {name: recipe_of(row) for name, row in next(iter(earlier.values())).items()}, None
    elif not args.quick:
        plan = choose_rates(task, plan, folder, args)
    new = [seed for seed in seeds if seed not in earlier]
    train_all(task, [replace(r, seed=seed) for seed in new for r in plan.values()], folder, args.jobs, args.device)
    flops = {name: flops_of_update(task, recipe) for name, recipe in plan.items()}
    found = earlier | {seed: {name: record(replace(r, seed=seed), folder) for name, r in plan.items()} for seed in new}
    rows = [row for seed in seeds for row in evaluate(found[seed], flops)]
    if args.figure:
        draw(task, rows, args.figure)
    report("training_flops", args, seeds, rows, *verdict(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
