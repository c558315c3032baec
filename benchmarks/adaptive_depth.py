"""Loops and wall-clock that halting saves on the sandpile, and whether loops go where the world is difficult.

Reads the trained loops of ``benchmarks.depth_extrapolation``. Each rule's tolerance is the widest that costs at most
one per cent of exactly right steps against the full depth, chosen on validation data. Its controls: random halting at
the very same depths, and the smallest FIXED depth within the same one per cent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

from benchmarks.depth_extrapolation import MODELS, choose_rates
from benchmarks.harness import interval, parser, report
from benchmarks.sandpile_lab import BINS, LOOPS, TEST, VALIDATION, GridModel, Steps, load, right, train_all, world_steps
from loopwm.dynamics import HaltingRule, PatientHalting, PredictionHalting, RandomHalting, ResidualHalting

FULL_DEPTH = 4 * LOOPS
LOSS = 0.01  # of exactly right steps, what a rule or a smaller depth may cost
TOLERANCES = tuple(float(x) for x in np.geomspace(10.0, 0.01, 19))


def rules(model: GridModel) -> dict[str, Callable[[float], HaltingRule]]:
    """Name -> rule of a tolerance. ``prediction`` reads the step of the latent off every cell of the grid."""

    def step_of_latent(h):
        return model.dynamics.coda.step(h).flatten(1)

    return {
        "residual": ResidualHalting,
        "residual, patience 2": lambda tolerance: PatientHalting(ResidualHalting(tolerance), 2),
        "prediction": lambda tolerance: PredictionHalting(tolerance, step_of_latent),
        "prediction, patience 2": lambda tolerance: PatientHalting(PredictionHalting(tolerance, step_of_latent), 2),
    }


def accuracy(model: GridModel, data: Steps, depth: int | None) -> tuple[float, np.ndarray]:
    """(share exactly right, loops (n,)) at a depth, or by the model's rule."""
    ok, loops = right(model, data, depth)
    return float(ok.float().mean()), loops.numpy()


def paired_seconds(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two calls that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for action, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            action()
            kept.append(time.perf_counter() - start)
    return float(np.median(times[0])), float(np.median(times[1]))


def measure(model: GridModel, name: str, rule: Callable, check: Steps, data: Steps, repeats: int) -> dict:
    """One rule on one model: its tolerance by validation, then everything on test data."""
    dynamics, full_check = model.dynamics, accuracy(model, check, FULL_DEPTH)[0]
    for tolerance in TOLERANCES:
        dynamics.halting = rule(tolerance)
        if accuracy(model, check, None)[0] >= full_check - LOSS:
            break
    score, loops = accuracy(model, data, None)
    seconds, full_seconds = paired_seconds(
        lambda: right(model, data, None), lambda: right(model, data, FULL_DEPTH), repeats
    )
    rank = float(spearmanr(loops, data.rounds.numpy()).statistic)
    groups = ((f"{low}-{high}", (data.rounds >= low) & (data.rounds <= high)) for low, high in BINS)
    by_rounds = {group: round(float(loops[rows.numpy()].mean()), 2) for group, rows in groups if rows.any()}
    dynamics.halting = RandomHalting(right(model, data, None)[1])
    return {
        "rule": name,
        "tolerance": tolerance,
        "right": round(score, 4),
        "right_random": round(accuracy(model, data, None)[0], 4),
        "loops": round(float(loops.mean()), 2),
        "loops_by_rounds": by_rounds,
        "correlation": 0.0 if np.isnan(rank) else round(rank, 4),  # nan: the same loops for every step
        "seconds": round(seconds, 4),
        "seconds_full": round(full_seconds, 4),
    }


def fixed_depth(model: GridModel, check: Steps, data: Steps) -> dict:
    """The smallest fixed depth within the allowed loss on validation data."""
    full = accuracy(model, check, FULL_DEPTH)[0]
    depth = next(d for d in range(1, FULL_DEPTH + 1) if accuracy(model, check, d)[0] >= full - LOSS)
    return {"rule": "smallest fixed depth", "right": round(accuracy(model, data, depth)[0], 4), "loops": float(depth)}


def draw(rows: list[dict], path: Path) -> None:
    """Loops by difficulty of each rule, mean over seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=130)
    groups = [f"{low}-{high}" for low, high in BINS]
    for name in dict.fromkeys(row["rule"] for row in rows if "loops_by_rounds" in row):
        y = np.array([[row["loops_by_rounds"][group] for group in groups] for row in rows if row["rule"] == name])
        axes.plot(groups, y.mean(0), marker="o", ms=3, label=name)
    axes.set(xlabel="toppling rounds of the step", ylabel=f"loops (full depth: {FULL_DEPTH})")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=6000, help="optimiser steps of the loops, as in depth_extrapolation")
    p.add_argument("--figure", type=Path, metavar="FILE")
    args = p.parse_args(arguments)
    seeds, steps = (range(1), 400) if args.quick else (range(args.seeds), args.steps)
    folder, each = args.runs / "sandpile", 50 if args.quick else 400
    recipes = {"looped": replace(MODELS["looped"], steps=steps)}
    recipe = recipes["looped"] if args.quick else choose_rates(recipes, folder, args.jobs)["looped"]
    train_all([replace(recipe, seed=seed) for seed in seeds], folder, args.jobs)
    check, data, rows = world_steps(each // 2, 99, VALIDATION), world_steps(each, 99, TEST), []
    for seed in seeds:
        model = load(replace(recipe, seed=seed), folder)
        model.dynamics.max_loops = FULL_DEPTH
        shared = {"seed": seed, "right_full": round(accuracy(model, data, FULL_DEPTH)[0], 4)}
        rows.append(shared | fixed_depth(model, check, data))
        for name, rule in rules(model).items():
            rows.append(shared | measure(model, name, rule, check, data, 1 if args.quick else 5))
            print(rows[-1], flush=True)
    if args.figure:
        draw(rows, args.figure)
    report("adaptive_depth", args, seeds, rows, *verdict(rows))


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence) of the rule with the fewest loops."""
    names = list(dict.fromkeys(row["rule"] for row in rows if "correlation" in row))
    of = {name: [row for row in rows if row["rule"] == name] for name in names}
    best = min(names, key=lambda name: np.mean([row["loops"] for row in of[name]]))
    figures = {
        "loops, share of full": [row["loops"] / FULL_DEPTH for row in of[best]],
        "seconds, share of full": [row["seconds"] / row["seconds_full"] for row in of[best]],
        "correlation with rounds": [row["correlation"] for row in of[best]],
        "right": [row["right"] for row in of[best]],
        "right at full depth": [row["right_full"] for row in of[best]],
        "right, random halting": [row["right_random"] for row in of[best]],
        "loops, smallest fixed depth": [row["loops"] for row in rows if row["rule"] == "smallest fixed depth"],
    }
    headline = {f"{best}: {key}": interval(values) for key, values in figures.items()}
    mean = {key: float(np.mean(values)) for key, values in figures.items()}
    fixed = mean["loops, smallest fixed depth"]
    beats = "fewer" if mean["loops, share of full"] * FULL_DEPTH < fixed else "no fewer"
    return headline, (
        f"Halting by {best} takes {mean['loops, share of full']:.0%} of the loops and "
        f"{mean['seconds, share of full']:.0%} of the time of {FULL_DEPTH} loops at {mean['right']:.3f} right against "
        f"{mean['right at full depth']:.3f} (random halting {mean['right, random halting']:.3f}), {beats} than the "
        f"smallest fixed depth ({fixed:.0f}); loops follow the rounds with a rank correlation of "
        f"{mean['correlation with rounds']:.2f}."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
