"""Loops and wall-clock that halting saves, and whether loops go where the world is difficult.

Reads the trained loops of ``benchmarks.depth_extrapolation``, in worlds that say how difficult a step is. Each rule's
tolerance is the widest that costs at most one per cent more error than the full depth (of all answers where they are
right or wrong, else of the error), chosen on validation data. Its controls: random halting at the very same depths, and
the smallest FIXED depth within the same one per cent. The learned gate is trained for it, on the loss drops of the
trained loop, with examples of every difficulty from the training data's seed, or up to ``--gate-difficulty``; the
other rules learn nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.harness import interval, report
from benchmarks.lab import TEST, TRAINING, VALIDATION, Examples, Task, groups, load, predict_errors, prepared, train_all
from benchmarks.plots import plt, save_figure
from benchmarks.tasks import TASKS, WITH_DIFFICULTY, lab_parser
from loopwm.dynamics import (
    MODES,
    CertifiedHalting,
    GateHalting,
    HaltingRule,
    PatientHalting,
    PredictionHalting,
    RandomHalting,
    ResidualHalting,
    SecondDifferenceHalting,
    gate_loss,
)

FULL = 4  # the full depth over the trained mean
LOSS = 0.01  # what a rule or a smaller depth may cost, see ``Task.within``
LONGEST = 99
FIXED = "smallest fixed depth"
HEADLINE = "gate, patience 2"  # one rule for every world, not the best of each on its test data
TOLERANCES = tuple(float(x) for x in np.geomspace(10.0, 1e-4, 31))
GATE_STEPS, GATE_RATE = 600, 3e-3


def trained_gate(
    task: Task, model: nn.Module, full: int, each: int, steps: int = GATE_STEPS, hardest: int = LONGEST
) -> GateHalting:
    """The gate that foretells how far the loss of a trained model still falls, within ``full`` loops.

    It learns from examples of the sizes that the test has, up to the ``hardest`` difficulty.
    """
    data, rng = task.examples(each, LONGEST, TRAINING), np.random.default_rng(0)
    data = data.rows(torch.nonzero(data.difficulty <= hardest).squeeze(1))
    torch.manual_seed(0)
    rule = GateHalting.for_dynamics(model.dynamics, 1.0)
    optimizer = torch.optim.Adam(rule.parameters(), GATE_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = data.rows(torch.from_numpy(rng.integers(0, len(data), task.batch)))
        with torch.no_grad(), model.dynamics.frozen():
            states, predictions = model.trajectory(*batch.inputs, full)
            losses = torch.stack([task.losses(prediction, batch.target) for prediction in predictions])  # (T, B)
        optimizer.zero_grad()
        gate_loss(rule.gate, states, losses).backward()
        optimizer.step()
        scheduler.step()
    return rule.requires_grad_(False)


def rules(model: nn.Module, gate: GateHalting) -> dict[str, Callable[[float], HaltingRule]]:
    """Name -> rule of a tolerance. ``prediction`` reads the step of the latent, off every cell of a grid.

    The certified rule, and its tolerance in units of the state, for models that contract by construction alone; the
    gate's is in units of the training's loss.
    """

    def step_of_latent(z, h):
        return model.dynamics.coda.step(h).flatten(1)

    def gated(threshold: float) -> HaltingRule:
        gate.threshold = threshold
        return gate

    certified = {"certified distance": CertifiedHalting} if MODES[model.dynamics.cell.mode].certified else {}
    return {
        "residual": ResidualHalting,
        "residual, patience 2": lambda tolerance: PatientHalting(ResidualHalting(tolerance), 2),
        "second difference, patience 2": lambda tolerance: PatientHalting(SecondDifferenceHalting(tolerance), 2),
        "prediction": lambda tolerance: PredictionHalting(tolerance, step_of_latent),
        "prediction, patience 2": lambda tolerance: PatientHalting(PredictionHalting(tolerance, step_of_latent), 2),
        "gate": gated,
        "gate, patience 2": lambda tolerance: PatientHalting(gated(tolerance), 2),
    } | certified


def mixed(data: Examples) -> Examples:
    """In random order, as a world gives them: in a batch of one difficulty all rows would stop together."""
    return data.rows(torch.from_numpy(np.random.default_rng(0).permutation(len(data))))


def error_and_loops(task: Task, model: nn.Module, data: Examples, depth: int | None) -> tuple[float, np.ndarray]:
    """(error, loops (n,)) at a depth, or by the model's rule."""
    errors, loops = predict_errors(task, model, data, depth)
    return task.pool(errors), loops.numpy()


def paired_seconds(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two calls that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for action, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            action()
            kept.append(time.perf_counter() - start)
    return float(np.median(times[0])), float(np.median(times[1]))


def seconds_beside_full(
    task: Task, model: nn.Module, data: Examples, depth: int | None, full: int, repeats: int
) -> dict[str, float]:
    """Seconds of all predictions at ``depth``, or by the model's rule, and at the full depth."""
    depths = (depth, full)
    times = paired_seconds(*(partial(predict_errors, task, model, data, one) for one in depths), repeats)
    return dict(zip(("seconds", "seconds_full"), (round(time, 4) for time in times), strict=True))


def measure(
    task: Task, model: nn.Module, name: str, rule: Callable, check: Examples, data: Examples, full: int, repeats: int
) -> dict:
    """One rule on one model: its tolerance by validation, then everything on test data."""
    dynamics, full_check = model.dynamics, error_and_loops(task, model, check, full)[0]
    for tolerance in TOLERANCES:
        dynamics.halting = rule(tolerance)
        if task.within(error_and_loops(task, model, check, None)[0], full_check, LOSS):
            break
    error, loops = error_and_loops(task, model, data, None)
    seconds = seconds_beside_full(task, model, data, None, full, repeats)
    rank = 0.0  # the same loops for every step
    if loops.min() < loops.max():
        rank = float(spearmanr(loops, data.difficulty.numpy()).statistic)
    by_difficulty = {
        k: round(float(loops[rows.numpy()].mean()), 2) for k, rows in groups(task, data.difficulty).items()
    }
    dynamics.halting = RandomHalting(predict_errors(task, model, data, None)[1])
    return {
        "rule": name,
        "tolerance": tolerance,
        "error": round(error, 5),
        "error_random": round(error_and_loops(task, model, data, None)[0], 5),
        "loops": round(float(loops.mean()), 2),
        "loops_by_difficulty": by_difficulty,
        "correlation": round(rank, 4),
    } | seconds


def fixed_depth(task: Task, model: nn.Module, check: Examples, data: Examples, full: int, repeats: int) -> dict:
    """The smallest fixed depth within the allowed loss on validation data."""
    best = error_and_loops(task, model, check, full)[0]
    depths = range(1, full + 1)
    depth = next(d for d in depths if task.within(error_and_loops(task, model, check, d)[0], best, LOSS))
    error = error_and_loops(task, model, data, depth)[0]
    found = {"rule": FIXED, "error": round(error, 5), "loops": float(depth)}
    return found | seconds_beside_full(task, model, data, depth, full, repeats)


def draw(task: Task, rows: list[dict], full: int, path: Path) -> None:
    """Loops by difficulty of each rule, mean over seeds."""
    figure, axes = plt.subplots(figsize=(8.2, 3.8), dpi=130)
    for name in dict.fromkeys(row["rule"] for row in rows if "loops_by_difficulty" in row):
        mine = [row["loops_by_difficulty"] for row in rows if row["rule"] == name]
        axes.plot(list(mine[0]), [np.mean([r[k] for r in mine]) for k in mine[0]], marker="o", ms=3, label=name)
    axes.set(xlabel=f"{task.unit} of the step", ylabel=f"loops (full depth: {full})", title=task.name)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1.0))  # off the lines
    figure.tight_layout()
    save_figure(figure, path)


def main(arguments: list[str]) -> None:
    p = lab_parser(__doc__.splitlines()[0], WITH_DIFFICULTY[0], WITH_DIFFICULTY)
    told = "the hardest that the gate is shown (default: all)"
    p.add_argument("--gate-difficulty", type=int, default=LONGEST, metavar="N", help=told)
    args = p.parse_args(arguments)
    task, folder = TASKS[args.task](args.runs), args.runs / args.task
    if args.gate_difficulty < task.bins[0][0]:
        p.error(f"--gate-difficulty {args.gate_difficulty}: at least {task.bins[0][0]} {task.unit}")
    seeds, each = (range(1), 50) if args.quick else (range(args.seeds), 400)
    recipe = prepared(task, {"looped": task.models["looped"]}, folder, args, quick_steps=400)["looped"]
    train_all(task, [replace(recipe, seed=seed) for seed in seeds], folder, args.jobs, args.device)
    full, rows, repeats = FULL * recipe.loops, [], 1 if args.quick else 5
    check, data = task.examples(each // 2, LONGEST, VALIDATION), mixed(task.examples(each, LONGEST, TEST))
    for seed in seeds:
        model = load(task, replace(recipe, seed=seed), folder)
        model.dynamics.max_loops = full
        shared = {"seed": seed, "error_full": round(error_and_loops(task, model, data, full)[0], 5)}
        rows.append(shared | fixed_depth(task, model, check, data, full, repeats))
        gate = trained_gate(task, model, full, 5 * each, 20 if args.quick else GATE_STEPS, args.gate_difficulty)
        for name, rule in rules(model, gate).items():
            rows.append(shared | measure(task, model, name, rule, check, data, full, repeats))
            print(rows[-1], flush=True)
    if args.figure:
        draw(task, rows, full, args.figure)
    report("adaptive_depth", args, seeds, rows, *verdict(task, rows, full))


def verdict(task: Task, rows: list[dict], full: int) -> tuple[dict, str]:
    """(headline, one sentence) of the rule HEADLINE."""
    of = {name: [row for row in rows if row["rule"] == name] for name in (HEADLINE, FIXED)}
    figures = {
        "loops, share of full": [row["loops"] / full for row in of[HEADLINE]],
        "seconds, share of full": [row["seconds"] / row["seconds_full"] for row in of[HEADLINE]],
        f"correlation with {task.unit}": [row["correlation"] for row in of[HEADLINE]],
        "error": [row["error"] for row in of[HEADLINE]],
        "error at full depth": [row["error_full"] for row in of[HEADLINE]],
        "error, random halting": [row["error_random"] for row in of[HEADLINE]],
        "loops, smallest fixed depth": [row["loops"] for row in of[FIXED]],
        "seconds, smallest fixed depth, share of full": [row["seconds"] / row["seconds_full"] for row in of[FIXED]],
    }
    headline = {f"{HEADLINE}: {key}": interval(values) for key, values in figures.items()}
    mean = {key: float(np.mean(values)) for key, values in figures.items()}
    fixed = mean["loops, smallest fixed depth"]
    beats = "fewer" if mean["loops, share of full"] * full < fixed else "no fewer"
    spent, fixed_time = mean["seconds, share of full"], mean["seconds, smallest fixed depth, share of full"]
    saves = (
        f"halting takes {spent / fixed_time:.0%} of its time" if spent < fixed_time else "halting saves none beside it"
    )
    return headline, (
        f"Halting by {HEADLINE} takes {mean['loops, share of full']:.0%} of the loops and {spent:.0%} of the time of "
        f"{full} loops at an error of {mean['error']:.3f} against {mean['error at full depth']:.3f} (random halting "
        f"{mean['error, random halting']:.3f}), {beats} than the smallest fixed depth ({fixed:.0f}), which takes "
        f"{fixed_time:.0%} of the time: {saves}; loops follow the {task.unit} with a rank correlation of "
        f"{mean[f'correlation with {task.unit}']:.2f}."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
