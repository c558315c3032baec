"""Avalanches longer than any in training, at depths from a quarter to sixteen times the trained mean.

Loop and controls learn one step of the sandpile from avalanches of at most 8 rounds (``benchmarks.sandpile_lab``); the
score is the share of steps whose every cell is right, by rounds, on the trained 8 x 8 grid and on 12 x 12. The learning
rate of each model is chosen on validation data of the trained difficulty.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.harness import interval, parser, report
from benchmarks.sandpile_lab import (
    BINS,
    LOOPS,
    TEST,
    TRAINED,
    VALIDATION,
    Recipe,
    by_difficulty,
    load,
    right,
    summary,
    train_all,
    world_steps,
)

MODELS = {  # name in the tables: recipe
    "looped": Recipe("looped", free_loops=24),
    "stacked": Recipe("stacked"),
    "wide": Recipe("wide"),
    "single_pass": Recipe("single_pass"),
    "looped, certified": Recipe("looped", "certified", 24),
    "looped, from h0 only": Recipe("looped"),
}
CONTROLS = ("stacked", "wide", "single_pass")
RATES = (1e-3, 2e-3, 4e-3)
DEPTHS = (LOOPS // 4, LOOPS // 2, LOOPS, 2 * LOOPS, 4 * LOOPS, 16 * LOOPS)
SIZES = (8, 12)
BEYOND = [f"{low}-{high}" for low, high in BINS if low > TRAINED]


def choose_rates(recipes: dict[str, Recipe], folder: Path, jobs: int) -> dict[str, Recipe]:
    """Each recipe with the learning rate that is best on validation data after a quarter of its steps, seed 0."""
    tries = {
        name: [replace(r, steps=r.steps // 4, learning_rate=rate) for rate in RATES] for name, r in recipes.items()
    }
    train_all([recipe for row in tries.values() for recipe in row], folder, jobs)
    data, chosen = world_steps(200, TRAINED, VALIDATION), {}
    for name, row in tries.items():
        score = [float(right(load(r, folder), data, 2 * LOOPS)[0].float().mean()) for r in row]
        chosen[name] = replace(recipes[name], learning_rate=RATES[int(np.argmax(score))])
        print(
            f"{name:24s} " + "  ".join(f"{rate:g}: {s:.3f}" for rate, s in zip(RATES, score, strict=True)), flush=True
        )
    return chosen


def evaluate(name: str, recipe: Recipe, folder: Path, each: int) -> list[dict]:
    """One row a grid size and depth; a control has one depth, its own."""
    model, rows = load(recipe, folder), []
    looped = recipe.dynamics == "looped"
    for size in SIZES:
        data = world_steps(each, 99, TEST, size)
        for depth in DEPTHS if looped else (None,):
            score = by_difficulty(right(model, data, depth)[0], data.rounds)
            rows.append({"model": name, "seed": recipe.seed, "size": size, "depth": depth, "right": score})
    return [row | {k: v for k, v in summary(recipe, folder).items() if k not in row} for row in rows]


def mean_right(rows: list[dict], name: str, size: int, depth: int | None, group: str) -> list[float]:
    """Of every seed."""
    return [r["right"][group] for r in rows if (r["model"], r["size"], r["depth"]) == (name, size, depth)]


def draw(rows: list[dict], path: Path) -> None:
    """Score against difficulty at four times the trained depth, and against depth."""
    figure, (left, beside) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=130)
    groups = [f"{low}-{high}" for low, high in BINS]
    for name, recipe in MODELS.items():
        depth = 4 * LOOPS if recipe.dynamics == "looped" else None
        scores = np.array([mean_right(rows, name, 8, depth, group) for group in groups])  # (bins, seeds)
        if scores.size:
            line = left.plot(groups, scores.mean(1), marker="o", ms=3, label=name)[0]
            left.fill_between(groups, scores.min(1), scores.max(1), color=line.get_color(), alpha=0.15, linewidth=0)
        if scores.size and recipe.dynamics == "looped":
            for group, style in zip(("4-8", BEYOND[0]), ("--", "-"), strict=True):
                y = [np.mean(mean_right(rows, name, 8, d, group)) for d in DEPTHS]
                beside.plot(DEPTHS, y, style, color=line.get_color(), marker="o", ms=3, label=f"{name}: {group} rounds")
    left.axvspan(2.5, len(groups) - 0.5, color="#eeeeee", zorder=0)
    left.set(
        xlabel="toppling rounds of the step (grey: longer than in training)", ylabel="share of steps exactly right"
    )
    beside.axvline(LOOPS, color="#bbbbbb", linewidth=0.8)
    beside.set(xscale="log", xlabel="loops (line: the controls' depth)", ylim=(-0.03, 1.03))
    beside.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
    for axes in (left, beside):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows."""
    headline, means = {}, {}
    for name, recipe in MODELS.items():
        depth = 4 * LOOPS if recipe.dynamics == "looped" else None
        for group in ("4-8", *BEYOND):
            headline[f"{name}: {group} rounds"] = interval(mean_right(rows, name, 8, depth, group))
            means[name, group] = headline[f"{name}: {group} rounds"]["value"]
    group = BEYOND[0]
    best = max(CONTROLS, key=lambda name: means[name, group])
    word = "beats" if means["looped", group] > means[best, group] else "does not beat"
    deep, shallow = (np.mean(mean_right(rows, "looped", 8, d, group)) for d in (16 * LOOPS, LOOPS))
    keeps = "keeps" if deep >= shallow - 0.01 else "loses"
    return headline, (
        f"Trained on up to {TRAINED} rounds, the loop {word} every control on {group} rounds "
        f"({means['looped', group]:.2f} against {means[best, group]:.2f} of {best}) and {keeps} its answers at sixteen "
        f"times the depth ({deep:.2f} against {shallow:.2f}); certified to contract it gets "
        f"{means['looped, certified', group]:.2f}."
    )


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=6000, help="optimiser steps of every model")
    p.add_argument("--figure", type=Path, metavar="FILE")
    args = p.parse_args(arguments)
    seeds, steps = (range(1), 400) if args.quick else (range(args.seeds), args.steps)
    folder, each = args.runs / "sandpile", 100 if args.quick else 400
    recipes = {name: replace(recipe, steps=steps) for name, recipe in MODELS.items()}
    if not args.quick:
        recipes = choose_rates(recipes, folder, args.jobs)
    plan = [(name, replace(recipe, seed=seed)) for seed in seeds for name, recipe in recipes.items()]
    train_all([recipe for _, recipe in plan], folder, args.jobs)
    rows = [row for name, recipe in plan for row in evaluate(name, recipe, folder, each)]
    if args.figure:
        draw(rows, args.figure)
    report("depth_extrapolation", args, seeds, rows, *verdict(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
